"""Images a second of cifar.py's training step, and the time of a whole run, by its defaults on this machine.

    python tests/benchmark_cifar.py                                 # WRN-16-1 and WRN-16-2, the second row of table 1
    python tests/benchmark_cifar.py --all --dtype bfloat16          # all of table 1, and the time that it would take

Each step is timed in turns with the same step written plainly (eager, float32, NCHW, batch norm not folded), which
has a process of its own with torch's settings as they come; medians over the repeats. The time of a run is that of the
real loop's epochs, with augmentation, evaluation, log and checkpoint, on random images (on a CPU some of CIFAR-10's
number, and scaled). The floor of a step is the time of its convolutions at the speed of a large matrix product or
convolution, or of their operands, read and written once, at that of a copy, all measured here; the larger of the two.
"""
import copy
import io
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import cifar
import tables
import training
from resnet import trainable
from training import Place, choose_devices, number
from utils import ADAPTER, load_network, load_teacher

ROOT = Path(__file__).resolve().parents[1]
CIFAR = 50_000, 10_000                                          # images for training and for testing
N_IMAGES = {'cuda': CIFAR, 'cpu': (2048, 410)}
N_BATCHES = {'cuda': 64, 'cpu': 4}                              # of a timed round
EPOCHS, SEEDS = 3, 5                                            # timed ones, after a first; and of table 1
RUNS = {cell.run: cell for cell in tables.table_1()}            # those of table 1, each once
ROW = [cell.run for cell in tables.table_1() if cell.row == 'WRN-16-1:WRN-16-2']


def options(run, argv=()):
    """Those of a run of table 1 and of this benchmark."""
    parser = cifar.make_parser()
    parser.add_argument('--repeats', type=number(1, whole=True), default=5, help='timed pairs of each step')
    parser.add_argument('--all', action='store_true', help='all runs of table 1')
    opt = parser.parse_args([*argv, *RUNS[run].options.split()])
    cifar.settle(opt)
    training.settle_gradients(opt)
    return opt


def networks(run, opt):
    """The student's function and parameters, and its teacher as it is, and with its batch norm folded, or None."""
    f, params = cifar.make_student(opt, 10)[0]()
    if not RUNS[run].teacher:
        return f, params, None, None
    with tempfile.TemporaryDirectory() as folder:
        save_new(RUNS[run].teacher, folder)
        unfolded, folded = load_network(folder), load_teacher(folder)
    return f, params | training.adapters_of(opt, f, params, folded), unfolded, folded


def save_new(run, folder):
    """A checkpoint with the network of a run, untrained."""
    params = cifar.make_student(options(run, ['--seed', '1']), 10)[0]()[1]
    torch.save({'params': params}, f'{folder}/model.pt7')


def random_data(opt, place):
    n = sum(N_IMAGES[place.device.type])
    images = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    parts = np.split(images, [N_IMAGES[place.device.type][0]])
    return cifar.DeviceData(opt, place, (parts[0], np.arange(len(parts[0])) % 10, parts[1],
                                         np.arange(len(parts[1])) % 10))


def some_batches(data, opt, place):
    whole = (b for b in data.train_batches(0) if b[2] == opt.batch_size)
    return list(itertools.islice(whole, N_BATCHES[place.device.type]))


# ------------------------------------------------------------------------------------------- the steps

def plain(params, place):
    """A copy on the device, in torch's default layout."""
    return {k: p.detach().clone().to(place.device).requires_grad_(p.requires_grad) for k, p in params.items()}


def plain_optimizer(opt, params):
    return torch.optim.SGD(trainable(params).values(), opt.lr, momentum=0.9, weight_decay=opt.weight_decay)


def plain_step(f, params, teacher, opt, optimizer=None):
    """The step as one would write it first: default layout, torch's default SGD, the loss read at once.

    It returns the logits and the loss. `decay` is the factor of β and of F-ActT's weight.
    """
    optimizer = optimizer or plain_optimizer(opt, params)

    def distance(s, t):
        return (F.normalize(s.flatten(1)) - F.normalize(t.flatten(1))).pow(2).mean()

    def adapted(g, s):
        return F.conv2d(s, params[f'{ADAPTER}{g}']) if f'{ADAPTER}{g}' in params else s

    def step(x, y, decay=1):
        logits, groups = f(x.contiguous(), params, True)
        loss = F.cross_entropy(logits, y)
        if teacher:
            with torch.no_grad():
                teacher_logits, teacher_groups = teacher.f(x.contiguous(), teacher.params, False)
        if opt.alpha:
            T = opt.temperature
            p, q = F.log_softmax(logits / T, dim=1), F.softmax(teacher_logits / T, dim=1)
            loss = opt.alpha * T ** 2 * F.kl_div(p, q, reduction='batchmean') + (1 - opt.alpha) * loss
        if opt.beta:
            loss = loss + decay * opt.beta * sum(
                distance(groups[g].pow(2).mean(1), teacher_groups[g].pow(2).mean(1)) for g in opt.at_groups)
        if opt.factt:
            loss = loss + decay * opt.factt * sum(
                distance(adapted(g, groups[g]), teacher_groups[g]) for g in opt.at_groups)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return logits, loss.item()
    return step


def our_step(f, params, teacher, opt, place):
    optimizer = training.make_optimizer(opt, params)
    scaler = torch.amp.GradScaler(place.device.type, enabled=opt.dtype == 'half')
    return training.make_step(opt, place, f, params, teacher, optimizer, scaler)


def our_steps(f, params, teacher, opt, place):
    """Our step as it is run, and the same one operation by operation, whose operations can be counted."""
    eager = copy.copy(opt)
    eager.compile, eager.capture = False, False
    return [our_step(f, training.to_device(params, place.device), teacher, o, place) for o in (opt, eager)]


def plain_round(run, argv):
    """Some plain steps of a run, as a function of no arguments, and where they are computed."""
    opt = options(run, argv)
    place = Place(choose_devices(opt)[0])
    f, params, teacher, _ = networks(run, opt)
    step = plain_step(f, plain(params, place), plainly_on(place, teacher), opt)
    batches = some_batches(random_data(opt, place), opt, place)
    return lambda: [step(*b[:2]) for b in batches], place


def plainly_on(place, teacher):
    return teacher and replace(teacher, params=plain(teacher.params, place))


def time_rounds(pipe, make_round, *args):
    """A process's work: the seconds of a round for each message that comes; None ends it."""
    a_round, place = make_round(*args)
    for _ in iter(pipe.recv, None):
        pipe.send(seconds(place, a_round))


@contextmanager
def timing_process(make_round, *args):
    """A process of its own, as a pipe: for each message it gives the seconds of a round, one after another."""
    context = mp.get_context('spawn')
    pipe, theirs = context.Pipe()
    process = context.Process(target=time_rounds, args=(theirs, make_round, *args), daemon=True)
    process.start()
    theirs.close()
    yield pipe
    pipe.send(None)
    process.join()


@contextmanager
def plain_process(make_round, *args):
    """A function that gives the seconds of a round, in a process of its own.

    It is a new one for each run, as what a process has freed before decides what its memory costs it.
    """
    with timing_process(make_round, *args) as pipe:
        yield lambda: pipe.send('go') or pipe.recv()


# ------------------------------------------------------------------------------------------- timing

def seconds(place, function):
    start = time.perf_counter()
    function()
    if place.device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(first, second, repeats, warm_up):
    """Median seconds of the first and of the second, and the median of second / first, pair by pair."""
    pairs = [(first(), second()) for _ in range(warm_up + repeats)][warm_up:]
    a, b = (statistics.median(times) for times in zip(*pairs, strict=True))
    return a, b, statistics.median(q / p for p, q in pairs)


def epoch_seconds(opt, place, f, params, data, teacher):
    """The median epoch of the real loop, in CIFAR-10's number of images; the first epoch does not count."""
    ends, after_epoch = [], training.Run.after_epoch

    def note_end(run, results):
        after_epoch(run, results)
        ends.append(time.perf_counter())
    opt = copy.copy(opt)
    with (tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()),
          mock.patch.object(training.Run, 'after_epoch', note_end)):
        opt.epochs, opt.save = 1 + EPOCHS, f'{folder}/run'
        training.train(opt, place, f, params, data, teacher, None)
    times = [b - a for a, b in itertools.pairwise(ends)]
    return statistics.median(times) * sum(CIFAR) / (data.n_train + data.n_test)


def start_up(opt):
    """Seconds of a process that trains for two batches: imports, small data, and what was compiled, from the cache."""
    with tempfile.TemporaryDirectory() as folder:
        save_new('WRN-16-2', folder)
        command = [sys.executable, 'cifar.py', '--dataset', 'Digits', '--train_fraction', '0.1', '--epochs', '1',
                   '--dtype', opt.dtype, '--teacher_id', folder, '--beta', '1e3', '--no-check_teacher', '--overwrite',
                   '--save', f'{folder}/run']
        command += [f'--{"" if value else "no-"}{name}' for name in ('compile', 'capture')
                    if (value := getattr(opt, name)) is not None]
        for _ in range(2):
            start = time.perf_counter()
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start


class ConvolutionBytes(TorchDispatchMode):
    """Counts the bytes of what convolutions read and write."""
    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if 'convolution' in str(func):
            outputs = result if isinstance(result, tuple) else (result,)
            self.total += sum(t.numel() * t.element_size() for t in (*args, *outputs) if isinstance(t, torch.Tensor))
        return result


def machine(place, dtype):
    """FLOP and bytes a second, of a large matrix product or convolution in the compute type and of a copy: the best."""
    large = place.device.type == 'cuda'
    n, images = (8192, 512) if large else (2048, 32)
    a, b = (torch.randn(n, n, device=place.device, dtype=dtype) for _ in range(2))
    x, w = (torch.randn(size, device=place.device, dtype=dtype).to(memory_format=torch.channels_last)
            for size in ((images, 256, 30, 30), (256, 256, 3, 3)))  # of which 28×28 pixels come out
    source = torch.randn(2 ** 26, device=place.device)
    to = torch.empty_like(source)

    def best(work, function):
        return max(work / seconds(place, function) for _ in range(20))
    return (max(best(2 * n ** 3, lambda: a @ b), best(2 * images * 28 ** 2 * 256 ** 2 * 9, lambda: F.conv2d(x, w))),
            best(2 * source.numel() * source.element_size(), lambda: to.copy_(source)))


def floor_of(function, rates):
    """GFLOP of a computation, and the seconds that it cannot take less of."""
    with FlopCounterMode(display=False) as flop, ConvolutionBytes() as count:
        function()
    return flop.get_total_flops() / 1e9, max(flop.get_total_flops() / rates[0], count.total / rates[1])


def measure(run, opt, place, data, rates, plain_seconds):
    """Images a second of our step and the plain one, their ratio pair by pair, GFLOP, time as multiple of the floor,
    and the seconds of a whole run, and of its floor."""
    torch.compiler.reset()  # it gives up on what it has compiled eight times
    f, params, _, teacher = networks(run, opt)
    ours, counted = our_steps(f, params, teacher, opt, place)
    batches = some_batches(data, opt, place)
    decay = torch.tensor(1.0, device=place.device)

    def our_round():
        return seconds(place, lambda: [ours(*b, decay) for b in batches])
    ours_took, plain_took, ratio = in_turns(our_round, plain_seconds, opt.repeats, warm_up=2)
    gflop, floor = floor_of(lambda: counted(*batches[0], decay), rates)
    on_device = training.to_device(params, place.device)
    _, tested = floor_of(lambda: training.evaluate(f, on_device, data, opt, place), rates)
    n = opt.batch_size * len(batches)
    epoch = epoch_seconds(opt, place, f, params, data, teacher)
    least = floor * CIFAR[0] / opt.batch_size + tested * CIFAR[1] / data.n_test
    return (n / ours_took, n / plain_took, ratio, gflop, ours_took / len(batches) / floor, opt.epochs * epoch,
            opt.epochs * least)


def span(duration):
    return str(timedelta(seconds=round(duration)))


def main():
    argv = sys.argv[1:]
    opt = options(ROW[0], argv)
    place = Place(choose_devices(opt)[0])
    training.set_up_device(place.device, opt)
    data = random_data(opt, place)
    rates = machine(place, training.DTYPES[opt.dtype])
    print(f'{place}, torch {torch.__version__}, --dtype {opt.dtype}, batch {opt.batch_size}, {opt.repeats} repeats; '
          f'at most {rates[0] / 1e9:,.0f} GFLOP/s, copy {rates[1] / 1e9:,.1f} GB/s')
    print('| run | step, img/s | plain step, img/s | step / plain | GFLOP a step | time / floor | '
          f'{opt.epochs} epochs | their floor |\n' + '| --- ' * 8 + '|')
    times = []
    for run in RUNS if opt.all else ROW:
        with plain_process(plain_round, run, argv) as plain_seconds:
            *rest, whole, floor = measure(run, options(run, argv), place, data, rates, plain_seconds)
        times.append(whole)
        print('| {} | {:,.0f} | {:,.0f} | {:.2f} | {:.1f} | {:.1f} | {} | {} |'.format(
            run, *rest, span(whole), span(floor)), flush=True)
    if opt.all:
        print(f'table 1, {len(times)} runs and {SEEDS} seeds, one at a time: {span(SEEDS * sum(times))}')
    print(f'start-up, compiled before where it is compiled: at most {start_up(opt):.1f} s')


if __name__ == '__main__':
    main()
