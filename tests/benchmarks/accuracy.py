"""Whether speed costs accuracy: test errors with the fast step and with the plain one, in pairs.

    python tests/benchmarks/accuracy.py --folder /tmp/paired --teacher_id logs/teacher --beta 1e3
    python tests/benchmarks/accuracy.py --folder … --dtype bfloat16 --compile …

The two runs of a pair have the same seed: the same initial parameters, and the same batches. One is
cifar.py's with the options given. The other is cifar.py with the plain step of common.py, in
float32, neither compiled nor captured; all around the step is the same. A finished run is not run
again.
"""
import contextlib
import math
import statistics
from pathlib import Path
from unittest import mock

import torch
from common import plain, plain_optimizer, plain_step

import cifar
from training import loop
from training.errors import one_line_errors
from training.log import LOG, read_log
from training.options import Parser, number
from utils import load_model

PLAIN = ['--dtype', 'float', '--no-compile', '--no-capture']


def make_plain_step(opt, run, f, teacher):
    """In place of loop.make_step; the single losses of the log are not computed."""
    teacher = teacher if loop.teacher_losses(opt) else None
    step = plain_step(f, run.params, teacher, opt, run.optimizer)
    totals = run.totals

    def with_totals(x, y, n, n_global, decay):
        logits, loss = step(x, y, decay.item())
        acc = 100 * (logits.argmax(1) == y).double().mean()
        totals.add({'loss': torch.tensor(loss, device=acc.device), 'acc': acc}, n)
    return with_totals


@contextlib.contextmanager
def plainly():
    """cifar.py with the plain step: torch's layout and optimizer, the teacher as it is."""
    changes = {'make_step': make_plain_step, 'load_teacher': load_model,
               'make_optimizer': lambda opt, params, device: plain_optimizer(opt, params),
               'to_device': lambda params, device, double: plain(params, device)}
    with contextlib.ExitStack() as stack:
        for name, function in changes.items():
            stack.enter_context(mock.patch.object(loop, name, function))
        yield


def test_error(folder, argv, way):
    """Of the last epoch, %."""
    epochs = cifar.make_parser().parse_args(argv).epochs
    with way():
        if len(read_log(folder / LOG)) < epochs:
            cifar.main([*argv, '--save', str(folder), '--overwrite'])
    return 100 - read_log(folder / LOG)[-1]['test_acc']


def main():
    parser = Parser(prog='accuracy.py', description=__doc__.partition('\n')[0])
    parser.add_argument('--folder', required=True, type=Path, help='folder for the runs')
    parser.add_argument('--seeds', default=5, type=number(2, whole=True), help='pairs of runs')
    own, argv = parser.parse_known_args()  # the rest goes to cifar.py
    ways = {'plain': (plainly, PLAIN), 'fast': (contextlib.nullcontext, [])}
    with one_line_errors():
        errors = [[test_error(own.folder / f'{name}_seed{seed}',
                              [*argv, *options, '--seed', str(seed)], way)
                   for name, (way, options) in ways.items()] for seed in range(own.seeds)]
    print('| seed | plain, % | fast, % | difference |\n| --- | --- | --- | --- |')
    for seed, (a, b) in enumerate(errors):
        print(f'| {seed} | {a:.2f} | {b:.2f} | {b - a:+.2f} |')
    a, b = map(statistics.mean, zip(*errors, strict=True))
    error = statistics.stdev(b - a for a, b in errors) / math.sqrt(own.seeds)
    print(f'| mean | {a:.2f} | {b:.2f} | {b - a:+.2f}, standard error {error:.2f} |')
    print('the fast step is', 'no worse than two standard errors' if b - a <= 2 * error
          else 'worse')


if __name__ == '__main__':
    main()
