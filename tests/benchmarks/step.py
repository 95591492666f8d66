"""Images a second of cifar.py's training step, and the time of a whole run, on this machine.

    python tests/benchmarks/step.py                     # a row of table 1, WRN-16-1 from WRN-16-2
    python tests/benchmarks/step.py --all --dtype bfloat16  # all of table 1, and its time
    python tests/benchmarks/step.py --run WRN-16-1 --profile    # where a step's time goes

Each step is timed in turns with the same step written plainly (eager, float32, NCHW, batch norm not
folded), which has a process of its own; medians over the repeats. The time of a run is that of the
real loop's epochs, with augmentation, test, log and checkpoint, on random images. The lower bound
of a step is the time of its convolutions at the speed of a large one, or of their operands, read
and written once, at the speed of a copy, all measured here; the larger of the two.
"""
import argparse
import copy
import io
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from datetime import timedelta
from unittest import mock

import torch
from common import (
    CIFAR,
    ROOT,
    RUNS,
    in_turns,
    networks,
    on_device,
    options,
    our_step,
    plain,
    plain_step,
    random_data,
    seconds,
    set_up,
    some_batches,
    timing_process,
)
from machine import best_rates, lower_bound

from training.distributed import Rank, choose_devices
from training.loop import AUTOCAST, evaluate, train
from training.options import Parser, number
from training.runs import Run

ROW = [cell.run for cell in RUNS.values() if cell.row == 'WRN-16-1:WRN-16-2']
EPOCHS, SEEDS = 3, 5  # timed epochs, after a first; and seeds of table 1


def plain_round(run, argv):
    """Some plain steps of a run, as a function of no arguments, and their device."""
    opt = options(run, argv)
    device = choose_devices(opt)[0]
    student, teacher = networks(run, opt)
    teacher = teacher and replace(teacher, params=plain(teacher.params, device))
    step = plain_step(student.f, plain(student.params, device), teacher, opt)
    batches = some_batches(random_data(opt, Rank(device)), opt, Rank(device))
    return lambda: [step(*b[:2]) for b in batches], device


def epoch_seconds(opt, rank, student, data, teacher):
    """The median epoch of the real loop, for CIFAR-10's number of images, without the first."""
    ends, after_epoch = [], Run.after_epoch

    def note_end(run, record):
        after_epoch(run, record)
        ends.append(time.perf_counter())
    opt = copy.copy(opt)
    with (tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()),
          mock.patch.object(Run, 'after_epoch', note_end)):
        opt.epochs, opt.save = 1 + EPOCHS, folder
        _, run = our_step(student, teacher, opt, rank)
        train(run, student, data, on_device(teacher, rank))
    times = [b - a for a, b in itertools.pairwise(ends)]
    return statistics.median(times) * sum(CIFAR) / (data.n_train + data.n_test)


def measure(run, argv, rank, data, rates, repeats):
    """A row of the table: images a second of our step and of the plain one, their ratio, GFLOP,
    time as multiple of the lower bound, the seconds of a whole run, and those of its bound."""
    torch.compiler.reset()  # it gives up on what it has compiled eight times
    opt = options(run, argv)
    student, teacher = networks(run, opt)
    ours, _ = our_step(student, teacher, opt, rank)
    eager = copy.copy(opt)
    eager.compile = eager.capture = False
    counted, _ = our_step(student, teacher, eager, rank)  # operation by operation
    batches = some_batches(data, opt, rank)
    decay = torch.tensor(1.0, device=rank.device)
    with timing_process(plain_round, run, argv) as pipe:
        ours_took, plain_took, ratio = in_turns(
            lambda: seconds(rank.device, lambda: [ours(*b, decay) for b in batches]),
            lambda: pipe.send('go') or pipe.recv(), repeats, warm_up=2)
    gflop, bound = lower_bound(lambda: counted(*batches[0], decay), rates)
    _, tested = lower_bound(lambda: evaluate(on_device(student, rank), data, opt, rank), rates)
    epoch = epoch_seconds(opt, rank, student, data, teacher)
    n = opt.batch_size * len(batches)
    least = bound * CIFAR[0] / opt.batch_size + tested * CIFAR[1] / data.n_test
    return (n / ours_took, n / plain_took, ratio, gflop, ours_took / len(batches) / bound,
            opt.epochs * epoch, opt.epochs * least)


def profile(run, argv, rank, data):
    """torch's profile of eight steps of a run, after eight others: a table."""
    opt = options(run, argv)
    step, _ = our_step(*networks(run, opt), opt, rank)
    batches = (some_batches(data, opt, rank) * 8)[:8]
    decay = torch.tensor(1.0, device=rank.device)

    def steps():
        return seconds(rank.device, lambda: [step(*b, decay) for b in batches])
    steps()
    with torch.profiler.profile() as profiler:
        steps()
    by = 'self_device_time_total' if rank.device.type == 'cuda' else 'self_cpu_time_total'
    return profiler.key_averages().table(by, row_limit=200, max_name_column_width=90)


def start_up(argv):
    """Seconds of a process that trains for two batches: imports, small data, compiled before."""
    teacher = networks('WRN-16-2', options('WRN-16-2'))[0]
    with tempfile.TemporaryDirectory() as folder:
        torch.save({'params': teacher.params}, f'{folder}/model.pt7')
        command = [sys.executable, 'cifar.py', *argv, '--dataset', 'Digits', '--train_fraction',
                   '0.1', '--epochs', '1', '--teacher_id', folder, '--beta', '1e3',
                   '--no-check_teacher', '--overwrite', '--save', f'{folder}/run']
        for _ in range(2):
            start = time.perf_counter()
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start


def span(duration):
    return str(timedelta(seconds=round(duration)))


def main():
    parser = Parser(prog='step.py', description=__doc__.partition('\n')[0])
    parser.add_argument('--repeats', type=number(1, whole=True), default=5, help='timed pairs')
    parser.add_argument('--all', action='store_true', help='all runs of table 1')
    parser.add_argument('--run', action='append', choices=RUNS, help='only this run of table 1')
    parser.add_argument('--profile', action='store_true', help="only torch's profile of steps")
    parser.add_argument('--start_up', action=argparse.BooleanOptionalAction, default=True,
                        help='also time the start of a process')
    own, argv = parser.parse_known_args()  # the rest goes to cifar.py
    opt = options(ROW[0], argv)
    rank = set_up(opt)
    data = random_data(opt, rank)
    if own.profile:
        for run in own.run or ROW:
            print(f'{run}, {rank}\n{profile(run, argv, rank, data)}')
        return
    rates = best_rates(rank.device, AUTOCAST.get(opt.dtype, torch.float32))
    print(f'{rank}, torch {torch.__version__}, --dtype {opt.dtype}, batch {opt.batch_size}, '
          f'{own.repeats} repeats; at most {rates[0] / 1e9:,.0f} GFLOP/s, '
          f'copy {rates[1] / 1e9:,.1f} GB/s')
    print('| run | step, img/s | plain step, img/s | step / plain | GFLOP a step | time / bound | '
          f'{opt.epochs} epochs | their bound |\n' + '| --- ' * 8 + '|')
    times = []
    for run in own.run or (RUNS if own.all else ROW):
        *rest, whole, bound = measure(run, argv, rank, data, rates, own.repeats)
        times.append(whole)
        print('| {} | {:,.0f} | {:,.0f} | {:.2f} | {:.1f} | {:.1f} | {} | {} |'.format(
            run, *rest, span(whole), span(bound)), flush=True)
    if own.all:
        print(f'table 1, {len(times)} runs and {SEEDS} seeds, one at a time: '
              f'{span(SEEDS * sum(times))}')
    if own.start_up:
        print(f'start-up, compiled before where it is compiled: at most {start_up(argv):.1f} s')


if __name__ == '__main__':
    main()
