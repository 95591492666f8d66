"""Whether speed costs accuracy: test errors of cifar.py's runs with the fast step and with the plain one, seed by seed.

    python tests/benchmark_accuracy.py --folder /tmp/paired --teacher_id logs/teacher --beta 1e3   # 200 epochs, 5 seeds

What this script does not know goes to cifar.py. The plain step is that of benchmark_cifar.py, in float32; all around it
is cifar.py's: initial parameters, batches, learning rates, evaluation, log. A run that is finished is not run again.
"""
import contextlib
import math
import statistics
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from benchmark_cifar import plain, plain_optimizer, plain_step, plainly_on

import cifar
import training
from training import Parser, Place, folder_name, input_errors, number
from utils import load_network


def make_plain_step(opt, place, f, params, teacher, optimizer, scaler):
    """In place of training.make_step, and with what it returns; the single losses of the log are not computed."""
    step = plain_step(f, params, plainly_on(place, teacher), opt, optimizer)
    n_terms = len(opt.at_groups) * (bool(opt.beta) + bool(opt.factt))

    def with_sums(x, y, n, n_global, decay):
        logits, loss = step(x, y, decay.item())
        hits = (logits.argmax(1) == y).sum().item()
        return torch.tensor([n, n * loss, hits] + [math.nan] * n_terms, dtype=torch.float64, device=place.device)
    return with_sums


@contextlib.contextmanager
def plainly():
    """cifar.py with the plain step."""
    with (mock.patch.object(training, 'make_step', make_plain_step),
          mock.patch.object(training, 'make_optimizer', plain_optimizer),
          mock.patch.object(training, 'load_teacher', load_network),
          mock.patch.object(training, 'to_device', lambda params, device: plain(params, Place(device)))):
        yield


def test_error(folder, argv, way):
    """Of the last epoch, %."""
    opt = cifar.make_parser().parse_args(argv)
    with way():
        if len(training.read_log(folder / training.LOG)) < opt.epochs:
            cifar.main([*argv, '--save', str(folder), '--overwrite'])
    return 100 - training.read_log(folder / training.LOG)[-1]['test_acc']


def main():
    parser = Parser(prog='benchmark_accuracy.py', description=__doc__.partition('\n')[0])
    parser.add_argument('--folder', required=True, type=folder_name, help='folder for the runs')
    parser.add_argument('--seeds', default=5, type=number(2, whole=True), help='pairs of runs')
    opt, argv = parser.parse_known_args()
    ways = {'plain': plainly, 'fast': contextlib.nullcontext}
    with input_errors():
        errors = [[test_error(Path(opt.folder) / f'{way}_seed{seed}', [*argv, '--seed', str(seed)], context)
                   for way, context in ways.items()] for seed in range(opt.seeds)]
    print('| seed | plain, % | fast, % | difference |\n| --- | --- | --- | --- |')
    for seed, (a, b) in enumerate(errors):
        print(f'| {seed} | {a:.2f} | {b:.2f} | {b - a:+.2f} |')
    (a, b), differences = map(statistics.mean, zip(*errors, strict=True)), [b - a for a, b in errors]
    error = statistics.stdev(differences) / math.sqrt(opt.seeds)
    print(f'| mean | {a:.2f} | {b:.2f} | {b - a:+.2f}, standard error {error:.2f} |')
    print('the fast step is', 'no worse than two standard errors' if b - a <= 2 * error else 'worse')


if __name__ == '__main__':
    main()
