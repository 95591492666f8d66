"""What the processes of test_parallel.py run: one training step, whose loss and gradients each rank writes down."""
import sys
from functools import partial

import torch

from cifar import make_parser
from resnet import network_in_network, wide_resnet
from training import make_step
from utils import Trained, fold_batch_norm, make_adapters

N_CLASSES = 4
# Options and network of each way to learn.
METHODS = {'at_kd': ('--alpha 0.9 --beta 1e3', partial(wide_resnet, 10, 0.5, N_CLASSES)),
           'gradients': ('--grad_at 3 --symmetry 2 --min_l2 1 --factt 100',
                         partial(network_in_network, 1 / 24, N_CLASSES, batch_norm=False))}


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradients it was given and changes nothing."""

    def step(self, closure=None):
        self.gradients = [p.grad.clone() for g in self.param_groups for p in g['params']]


def batch(n):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, 3, 8, 8, generator=generator), torch.randint(0, N_CLASSES, (n,), generator=generator)


def options(method='at_kd'):
    opt = make_parser().parse_args([*METHODS[method][0].split(), '--no-deterministic'])
    opt.at_groups = [0, 1, 2]
    return opt


def one_step(place, method, x, y, n, n_global):
    """The means that the step logs, times n, and the gradients."""
    network = METHODS[method][1]
    f, params = network()
    teacher = Trained(f, fold_batch_norm(network(seed=2)[1]), '', N_CLASSES, 3, 0)
    if method == 'gradients':
        teacher = Trained(partial(doubled, f), teacher.params, '', N_CLASSES, 3, 0)  # of other widths, for adapters
        params |= make_adapters(f(x, params, False)[1], teacher.f(x, teacher.params, False)[1], [0, 1, 2], seed=3)
    trained = [p for p in params.values() if p.requires_grad]
    optimizer, scaler = Recorder(trained, 0.1), torch.amp.GradScaler('cpu', enabled=False)
    step = make_step(options(method), place, f, params, teacher, optimizer, scaler)
    return step(x, y, n, n_global, torch.tensor(1.0)), optimizer.gradients


def doubled(f, x, params, training):
    """The network f with every channel of its first group twice."""
    logits, (first, *rest) = f(x, params, training)
    return logits, (first.repeat(1, 2, 1, 1), *rest)


def worker(opt, place, folder, n_global, method='at_kd'):
    """Run by training.launch: this rank's part of a batch."""
    x, y = batch(n_global)
    index, n = place.part(torch.arange(n_global))
    sums, gradients = one_step(place, method, x[index], y[index], n, n_global)
    torch.save({'sums': place.sum(sums), 'gradients': gradients}, f'{folder}/{place.rank}.pt')


def failing_worker(opt, place):
    """One rank meets bad input, the others wait for it."""
    from utils import InputError
    if place.rank == 1:
        raise InputError('rank 1 has no data')
    place.wait()


def dying_worker(opt, place):
    if place.rank == 1:
        import os
        import signal
        os.kill(os.getpid(), signal.SIGKILL)
    place.wait()


if __name__ == '__main__':
    from training import launch
    launch(worker, options(sys.argv[3]), sys.argv[1], int(sys.argv[2]), sys.argv[3])
