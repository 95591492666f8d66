"""What the benchmarks share: the runs of table 1, the plain step and ours, timing."""
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F

import cifar
import paper
from resnet import trainable
from training.distributed import Rank, choose_devices, set_up_device, to_device
from training.loop import make_optimizer, make_step
from training.runs import Run
from utils import (
    ADAPTER,
    InputError,
    Model,
    fold_batch_norm,
    losses_needing,
    make_adapters,
    new_model,
)

ROOT = Path(__file__).resolve().parents[2]
CIFAR = 50_000, 10_000                                # images for training and for testing
N_IMAGES = {'cuda': CIFAR, 'cpu': (2048, 410)}
N_BATCHES = {'cuda': 64, 'cpu': 4}                    # of a timed round
RUNS = {cell.run: cell for cell in paper.table_1()}  # each once


# ---------------------------------------------------------------------------- runs of table 1

def options(run, argv=()):
    """The options of cifar.py for a run, others added."""
    opt = cifar.make_parser().parse_args([*argv, *RUNS[run].options.split()])
    cifar.fill_defaults(opt)
    return opt


def networks(run, opt):
    """The student, with adapters if it takes them, and its teacher, or None: untrained models."""
    student = new_model(opt.net, vars(opt), 10, opt.seed)
    opt.at_groups = opt.at_groups or list(range(student.n_groups))
    if not RUNS[run].teacher:
        return student, None
    of_teacher = options(RUNS[run].teacher)
    teacher = new_model(of_teacher.net, vars(of_teacher), 10, seed=1)
    teacher = replace(teacher, params={k: p.detach() for k, p in teacher.params.items()})
    adapters = make_adapters(student, teacher, opt.at_groups, opt.seed) \
        if losses_needing(opt, 'adapters') else {}
    return replace(student, params=student.params | adapters), teacher


def set_up(opt):
    """The first device that the options ask for, set up as a run does."""
    device = choose_devices(opt)[0]
    set_up_device(device, opt)
    return Rank(device)


def random_data(opt, rank):
    """Random images in place of CIFAR-10's, on a CPU fewer."""
    sizes = N_IMAGES[rank.device.type]
    images = np.random.default_rng(0).integers(0, 256, (sum(sizes), 32, 32, 3), dtype=np.uint8)
    train, test = np.split(images, sizes[:1])
    return cifar.DeviceData(opt, rank, (train, np.arange(len(train)) % 10,
                                        test, np.arange(len(test)) % 10))


def some_batches(data, opt, rank):
    """The batches of a timed round, all of the whole size."""
    whole = [b for b in data.train_batches(0) if b[2] == opt.batch_size]
    return whole[:N_BATCHES[rank.device.type]]


# ---------------------------------------------------------------------------- the steps

def on_device(model: Model | None, rank, dtype='float'):
    """A copy on the device; its batch norm is folded if it is a teacher."""
    if model is None:
        return None
    if not trainable(model.params):
        model = fold_batch_norm(model)
    return replace(model, params=to_device(model.params, rank.device, dtype == 'double'))


def our_step(student, teacher, opt, rank):
    """The step of a run, and the run. The teacher is folded."""
    params = on_device(student, rank, opt.dtype).params
    scaler = torch.amp.GradScaler(rank.device.type, enabled=opt.dtype == 'half')
    run = Run(opt, rank, params, make_optimizer(opt, params, rank.device), scaler)
    return make_step(opt, run, student.f, on_device(teacher, rank, opt.dtype)), run


def plain(params, device):
    """A copy on the device, in torch's default layout."""
    return {k: p.detach().clone().to(device).requires_grad_(p.requires_grad)
            for k, p in params.items()}


def plain_optimizer(opt, params):
    return torch.optim.SGD(trainable(params).values(), torch.tensor(opt.lr, dtype=torch.double),
                           momentum=0.9, weight_decay=opt.weight_decay)


def plain_step(f, params, teacher: Model | None, opt, optimizer=None):
    """The step as one would write it first: torch's default layout and SGD, the loss read at once.

    It returns the logits and the loss. `decay` is the factor of β and of F-ActT's weight.
    """
    if losses_needing(opt, 'gradient') or (opt.mapping, opt.power) != ('sum', 2):
        raise InputError('the plain step has no losses on gradients, and no mapping but F_sum²')
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
                t_logits, t_groups = teacher.f(x.contiguous(), teacher.params, False)
        if opt.alpha:
            T = opt.temperature
            p, q = F.log_softmax(logits / T, dim=1), F.softmax(t_logits / T, dim=1)
            kd = T ** 2 * F.kl_div(p, q, reduction='batchmean')
            loss = opt.alpha * kd + (1 - opt.alpha) * loss
        if opt.beta:
            loss = loss + decay * opt.beta * sum(
                distance(groups[g].pow(2).mean(1), t_groups[g].pow(2).mean(1))
                for g in opt.at_groups)
        if opt.factt:
            loss = loss + decay * opt.factt * sum(
                distance(adapted(g, groups[g]), t_groups[g]) for g in opt.at_groups)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return logits, loss.item()
    return step


# ---------------------------------------------------------------------------- timing

def seconds(device, function):
    start = time.perf_counter()
    function()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turns(first, second, repeats, warm_up):
    """Median seconds of the first and of the second, and the median of second / first."""
    pairs = [(first(), second()) for _ in range(warm_up + repeats)][warm_up:]
    a, b = (statistics.median(times) for times in zip(*pairs, strict=True))
    return a, b, statistics.median(q / p for p, q in pairs)


def time_rounds(pipe, make_round, *args):
    """A process's work: the seconds of a round for each message that comes; None ends it."""
    a_round, device = make_round(*args)
    for _ in iter(pipe.recv, None):
        pipe.send(seconds(device, a_round))


@contextmanager
def timing_process(make_round: Callable, *args) -> Iterator:
    """A process of its own, as a pipe: for each message it gives the seconds of a round.

    make_round(*args) gives the round and its device. Each thing timed has a new process: what one
    has freed before decides what its memory costs it.
    """
    context = mp.get_context('spawn')
    pipe, theirs = context.Pipe()
    process = context.Process(target=time_rounds, args=(theirs, make_round, *args), daemon=True)
    process.start()
    theirs.close()
    yield pipe
    pipe.send(None)
    process.join()
