"""What the ranks of test_parallel.py run: steps whose loss and gradients each rank writes down.

    parallel.py FOLDER N METHOD [N METHOD …]    a step of N samples in all, for each pair
    parallel.py fails                           one rank meets bad input, the others wait for it
    parallel.py waits                           one rank keeps the others waiting for 5 s
    parallel.py dies                            one rank is killed, the others wait for it
    parallel.py stops                           one rank is stopped, the others wait for it
"""
import os
import signal
import sys
import time
from dataclasses import replace
from functools import partial

import torch
from helpers import options

from training import distributed
from training.errors import one_line_errors
from training.loop import make_step
from training.runs import Run
from utils import InputError, fold_batch_norm, make_adapters, new_model, trainable

N_CLASSES = 4
# Network, its settings and options of each way to learn.
METHODS = {'at_kd': ('wrn', {'depth': 10, 'width': 0.5}, '--alpha 0.9 --beta 1e3'),
           'gradients': ('nin', {'width': 1 / 24, 'batch_norm': False},
                         '--grad_at 3 --symmetry 2 --min_l2 1 --factt 100')}


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradients it was given and changes nothing."""

    def step(self, closure=None):
        self.gradients = [p.grad.clone() for g in self.param_groups for p in g['params']]


def batch(n):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 3, 8, 8, generator=generator)
    return x, torch.randint(0, N_CLASSES, (n,), generator=generator)


def doubled(f, x, params, training):
    """The network f with every channel of its first group twice."""
    logits, (first, *rest) = f(x, params, training)
    return logits, (first.repeat(1, 2, 1, 1), *rest)


def one_step(rank, method, x, y, n, n_global):
    """The sums over n samples that the step logs, and the gradients."""
    net, settings, argv = METHODS[method]
    opt = options(*argv.split(), '--no-deterministic')
    student = new_model(net, settings, N_CLASSES)
    teacher = fold_batch_norm(new_model(net, settings, N_CLASSES, seed=2))
    params = student.params
    if method == 'gradients':  # a teacher of other widths, for adapters
        teacher = replace(teacher, f=partial(doubled, teacher.f))
        params = params | make_adapters(student, teacher, [0, 1, 2], seed=3)
    optimizer = Recorder(trainable(params).values(), 0.1)
    run = Run(opt, rank, params, optimizer, torch.amp.GradScaler('cpu', enabled=False))
    step = make_step(opt, run, student.f, teacher)
    step(x, y, n, n_global, torch.tensor(1.0))
    run.totals.count += n
    return run.totals.sums(rank), optimizer.gradients


def steps(folder, cases, rank):
    """This rank's shard of each batch."""
    for n_global, method in cases:
        x, y = batch(n_global)
        index, n = rank.shard(torch.arange(n_global))
        sums, gradients = one_step(rank, method, x[index], y[index], n, n_global)
        torch.save((sums, gradients), f'{folder}/{n_global}-{method}-{rank.rank}.pt')


def fails(rank):
    if rank.rank == 1:
        raise InputError('rank 1 has no data')
    rank.barrier()


def waits(rank):
    """For longer than control messages may take."""
    wait = rank.long_barrier(60)
    if rank.rank == 0:
        time.sleep(5)
    wait()


def dies(rank):
    if rank.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    rank.barrier()


def stops(rank):
    if rank.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    rank.barrier()


def main(argv):
    what, *rest = argv
    distributed.TIMEOUT = 3 if what in ('stops', 'waits') else distributed.TIMEOUT
    cases = [(int(n), method) for n, method in zip(rest[::2], rest[1::2], strict=True)]
    work = {'fails': fails, 'waits': waits, 'dies': dies, 'stops': stops}.get(what)
    work = work or partial(steps, what, cases)
    with one_line_errors():
        distributed.launch(work, options())


if __name__ == '__main__':
    main(sys.argv[1:])
