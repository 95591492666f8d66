"""What the processes of test_parallel.py run: one training step, whose loss and gradients each rank writes down."""
import sys

import torch

from cifar import make_parser
from resnet import wide_resnet
from training import make_step
from utils import Trained, fold_batch_norm

N_CLASSES = 4


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradients it was given and changes nothing."""

    def step(self, closure=None):
        self.gradients = [p.grad.clone() for g in self.param_groups for p in g['params']]


def batch(n):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, 3, 8, 8, generator=generator), torch.randint(0, N_CLASSES, (n,), generator=generator)


def options():
    opt = make_parser().parse_args(['--alpha', '0.9', '--beta', '1e3', '--no-deterministic'])
    opt.at_groups = [0, 1, 2]
    return opt


def one_step(place, params, x, y, n, n_global):
    """The means that the step logs, times n, and the gradients."""
    f, _ = wide_resnet(10, 0.5, N_CLASSES)
    teacher = Trained(f, fold_batch_norm(wide_resnet(10, 0.5, N_CLASSES, seed=2)[1]), '', N_CLASSES, 3, 0)
    trained = [p for p in params.values() if p.requires_grad]
    optimizer, scaler = Recorder(trained, 0.1), torch.amp.GradScaler('cpu', enabled=False)
    sums = make_step(options(), place, f, params, teacher, optimizer, scaler)(x, y, n, n_global, torch.tensor(1.0))
    return sums, optimizer.gradients


def worker(opt, place, folder, n_global):
    """Run by training.launch: this rank's part of a batch."""
    params = wide_resnet(10, 0.5, N_CLASSES)[1]
    x, y = batch(n_global)
    index, n = place.part(torch.arange(n_global))
    sums, gradients = one_step(place, params, x[index], y[index], n, n_global)
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
    launch(worker, options(), sys.argv[1], int(sys.argv[2]))
