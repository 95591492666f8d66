"""Running it: options and their checks, devices and data-parallel, the loop, checkpoint and log.

Shared by the scripts. The loop is `train`; what happens to one batch is `make_step`.
"""
import argparse
import ctypes
import errno
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

import cv2
import h5py
import hickle
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor
from torchnet.meter import AverageValueMeter
from tqdm import tqdm

from resnet import STATISTICS
from utils import (
    ADAPTER,
    CHECKPOINT,
    TORCHVISION,
    InputError,
    Network,
    Params,
    Trained,
    activation_loss,
    export_folded,
    export_torchvision,
    find_checkpoint,
    gradient_at_loss,
    input_gradient,
    is_torchvision,
    load_network,
    load_teacher,
    make_adapters,
    min_l2_loss,
    read_checkpoint,
    symmetry_loss,
    trainable,
    transfer_loss,
)

LOG = 'log.txt'
LOCK = '.lock'
WARM_UP = 3         # steps of a kind before one is recorded as a CUDA graph
HEARTBEAT = 20      # seconds between two signs of life in a lock
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
STOP_CHECK = 10     # steps after which several processes ask each other whether one was told to stop
LOCK_EXPIRES = 120  # seconds after which a lock from another machine counts as abandoned
# What others compute with in a log's record, and may be missing.
LOG_NUMBERS = ('epochs', 'seed', 'depth', 'width', 'lr', 'power', 'train_time', 'test_time', 'train_acc', 'test_acc',
               'test_acc5')
LOG_TEXTS = ('net', 'dataset', 'mapping', 'teacher_id', 'teacher_params')
NARROWEST = 100     # times that one side of an image may be the other
IMAGE_SUFFIXES = {'.jpg', '.jpeg', '.png', '.bmp', '.webp', '.ppm', '.pgm', '.tif', '.tiff'}
DTYPES = {'float': torch.float32, 'bfloat16': torch.bfloat16, 'half': torch.float16}
GRADIENT_TERMS = ('grad_at', 'symmetry', 'min_l2')  # the options that weight the losses on ∂ℓ/∂x
# Options that say where and not what: a resumed run does not take them from its checkpoint.
PLACE_OPTIONS = ('save', 'save_every', 'resume', 'evaluate', 'overwrite', 'nthread', 'cuda', 'ngpu', 'gpu_id',
                 'check_teacher', 'export', 'export_format', 'tensorboard', 'capture')
# It does take these, but what they name may have moved. (That a teacher is the same is checked.)
DATA_OPTIONS = ('dataroot', 'imagenetpath', 'teacher_id', 'teacher_params', 'student_params')


# ------------------------------------------------------------------------------------------- options

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a help text that does not say it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.default is None or action.default is False or 'default' in (action.help or '')
        return action.help if said else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and exit status 2."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f'{self.prog}: error: {" ".join(message.split())}\n')


@contextmanager
def input_errors() -> Iterator[None]:
    """Turns what is wrong with a user's input, or files, into one line and exit status 2; an interrupt into 130."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):
            stream.reconfigure(errors='backslashreplace')  # a file's name need not be text
    try:
        yield
    except (InputError, OSError) as e:
        print(f'error: {" ".join(str(e).split())}', file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr, flush=True)
        raise SystemExit(130) from None


def number(low: float, high: float = math.inf, *, above: bool = False, whole: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number from `low` (or `above` it) to `high`, a whole one if asked for."""
    wanted = f'{"a whole" if whole else "a"} number {"above" if above else "from"} {low:g}'
    wanted += '' if high == math.inf else f' to {high:g}'
    highest = min(high, 2 ** 63 - 1) if whole else high

    def parse(text: str) -> float:
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or not value <= highest or value == math.inf:
            raise argparse.ArgumentTypeError(f'must be {wanted}, not {text!r}')
        return value
    return parse


def milestones(text: str) -> list[int]:
    """An argparse type: a JSON list of increasing epochs."""
    try:
        epochs = json.loads(text)
    except (ValueError, RecursionError):
        epochs = None
    if (not isinstance(epochs, list) or not all(type(e) is int and e > 0 for e in epochs)
            or any(a >= b for a, b in itertools.pairwise(epochs))):
        wanted = "a JSON list of increasing whole numbers, as '[60,120,160]'"
        raise argparse.ArgumentTypeError(f'must be {wanted}, not {text!r}')
    return epochs


def indices(text: str) -> list[int]:
    """An argparse type: different whole numbers from 0 on, with commas between them."""
    parts = text.split(',')
    if not all(p.strip().isdecimal() for p in parts) or len({int(p) for p in parts}) < len(parts):
        raise argparse.ArgumentTypeError(f"must be different whole numbers, as '0,1', not {text!r}")
    return [int(p) for p in parts]


def folder_name(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError('must name a folder or a file, and is empty')
    return text


def add_options(parser: Parser, *, batch_size: int, epochs: int, epoch_step: list[int], lr_decay_ratio: float,
                weight_decay: float) -> None:
    """The options that every training script has; the arguments are the script's own defaults."""
    add = parser.add_argument
    yes_or_no = argparse.BooleanOptionalAction
    add('--dtype', default='float', choices=DTYPES, help='compute type (autocast); parameters stay float32')
    add('--nthread', default=4, type=number(1, whole=True), help='threads, or workers a GPU, that read image files')
    add('--batch_size', default=batch_size, type=number(1, 2 ** 31, whole=True), help='of all processes together')
    add('--lr', default=0.1, type=number(0, above=True), help='learning rate of the first epochs')
    add('--epochs', default=epochs, type=number(1, whole=True), help='how many to train')
    add('--weight_decay', default=weight_decay, type=number(0), help='on every trainable parameter')
    add('--epoch_step', default=epoch_step, type=milestones, help='JSON list: the lr drops after these many epochs')
    add('--lr_decay_ratio', default=lr_decay_ratio, type=number(0, 1, above=True), help='factor of an lr drop')
    add('--seed', default=0, type=number(0, 2 ** 63 - 1, whole=True), help='of all that is drawn at random')
    add('--temperature', default=4, type=number(0, above=True), help='T of knowledge distillation')
    add('--alpha', default=0, type=number(0, 1), help='weight of knowledge distillation; 0: none')
    add('--beta', default=0, type=number(0), help='weight of attention transfer; 0: none')
    add('--factt', default=0, type=number(0), metavar='BETA', help='weight of full-activation transfer; 0: none')
    add('--beta_decay', default='none', choices=('none', 'step', 'linear', 'cosine'),
        help='of these two weights, epoch by epoch: with the lr drops, or to 0 at the end, straight or as a cosine')
    add('--at_groups', type=indices, help='residual groups for both, from 0, as 0,2 (default: all; on ImageNet 2,3)')
    add('--mapping', default='sum', choices=('sum', 'max'), help='of channels to an attention map')
    add('--power', default=2, type=number(1, 100), help='p of the attention maps, F^p')
    add('--grad_at', default=0, type=number(0), metavar='BETA', help='weight of gradient-based AT; 0: none')
    add('--symmetry', default=0, type=number(0), metavar='BETA', help='weight of the symmetry norm; 0: none')
    add('--min_l2', default=0, type=number(0), metavar='BETA', help="weight of the gradient's own norm; 0: none")
    add('--save', type=folder_name, help='folder for log and checkpoint (default: logs/ and the settings)')
    add('--save_every', type=number(1, whole=True), metavar='N', help='save a checkpoint every N steps, too')
    add('--tensorboard', action='store_true', help="write the log's figures into --save for TensorBoard, too")
    add('--resume', type=folder_name, metavar='RUN', help='run folder or checkpoint to go on from, with its options')
    add('--overwrite', action='store_true', help='replace the run in --save once the first new checkpoint is there')
    add('--evaluate', type=folder_name, nargs='?', const=True, metavar='RUN',
        help='test a run or weight file, or without one the teacher, and train nothing')
    add('--check_teacher', action=yes_or_no, default=True, help='test the teacher before the first epoch')
    add('--cuda', action='store_true', help='insist on a GPU: fail if there is none')
    add('--ngpu', default=1, type=number(0, whole=True), help='GPUs to use, where there are any; 0: the CPU')
    add('--gpu_id', type=indices, help='which of the visible GPUs, as 0,1; the first --ngpu of them (default: all)')
    add('--compile', action=yes_or_no, help='torch.compile the training step (default: on a GPU)')
    add('--capture', action=yes_or_no, help='launch the training step as one CUDA graph (default: on one GPU)')
    add('--deterministic', action=yes_or_no,
        help='only algorithms that repeat themselves on a GPU (default: with losses on gradients)')


def parse_options(parser: Parser, argv: list[str] | None, teacher: str) -> tuple[argparse.Namespace, dict | None]:
    """The options, checked as far as they can be without data; and the checkpoint that is resumed, if any.

    `teacher` is the option that names the teacher. With --resume or --evaluate, what the command line leaves out is
    as in the checkpoint. Raises InputError.
    """
    argv = sys.argv[1:] if argv is None else argv
    opt = parser.parse_args(argv)
    choose_devices(opt)  # or say now that they are not there
    if opt.evaluate:
        if opt.resume or opt.save or opt.overwrite:
            raise InputError('--evaluate trains nothing: leave out --resume, --save and --overwrite')
        network = getattr(opt, teacher) if opt.evaluate is True else opt.evaluate
        if network is None:
            raise InputError(f'--evaluate: name what to test, here or with --{teacher}')
        stored = options_of(network)
        opt = parser.parse_args([*as_arguments({k: v for k, v in stored.items() if k in opt}), *argv])
        opt.evaluate = network
        return opt, None
    if not opt.resume:
        return opt, None
    path = find_checkpoint(opt.resume)
    state = read_checkpoint(path)
    stored = as_arguments(stored_options(state, path, opt))
    opt = parser.parse_args([*stored, *argv])
    check_resumable(vars(opt), vars(parser.parse_args(stored)), path)
    opt.save = opt.save or str(path.parent)
    return opt, state


def options_of(run: str) -> dict:
    """The options in a checkpoint; none for a file of another kind."""
    path = None if run in TORCHVISION else find_checkpoint(run)
    stored = read_checkpoint(path).get('options') if path and path.suffix != '.hkl' else None
    return stored if isinstance(stored, dict) and plain(stored) else {}


def plain(options: dict) -> bool:
    """Whether options from a file are such as this code writes."""
    return all(isinstance(k, str) and (v is None or isinstance(v, bool | int | float | str)
                                       or (isinstance(v, list) and all(type(i) is int for i in v)))
               for k, v in options.items())


def as_arguments(options: dict) -> list[str]:
    """The command line of these options, but for those that are each process's own."""
    arguments = []
    for name, value in options.items():
        if name in PLACE_OPTIONS or value is None:
            continue
        if isinstance(value, bool):
            arguments.append(f'--{name}' if value else f'--no-{name}')
        else:
            groups = name == 'at_groups' and isinstance(value, list)
            arguments.append(f'--{name}={",".join(map(str, value)) if groups else value}')
    return arguments


def stored_options(state: dict, path: Path, opt: argparse.Namespace) -> dict:
    """The options in a checkpoint, which must be one that can be resumed by the script that has these options."""
    stored = state.get('options')
    if not isinstance(stored, dict) or not plain(stored) or not {'params', 'optimizer', 'epoch', 'rng'} <= state.keys():
        raise InputError(f'{path}: holds no state to resume from (it can still be a teacher, or be tested)')
    if foreign := [name for name in stored if name not in opt]:
        raise InputError(f'{path}: written by another script or version: there is no --{foreign[0]} here')
    return stored


def check_resumable(options: dict, stored: dict, path: Path) -> None:
    """Raises InputError, with the option, where one that changes the result is not as in the checkpoint."""
    for name, old in stored.items():
        new = options[name]
        more_epochs = name == 'epochs' and new > old and options['beta_decay'] not in ('linear', 'cosine')
        moved = name in DATA_OPTIONS and None not in (old, new)
        if new != old and name not in PLACE_OPTIONS and not moved and not more_epochs:
            raise InputError(f'--{name} is {old} in {path} and {new} now: a resumed run keeps its options, but for '
                             'more --epochs (where --beta_decay does not depend on them)')


def learning_rate(opt: argparse.Namespace, epoch: int) -> float:
    """The learning rate of an epoch, counted from 0: it drops after each of the completed epochs in epoch_step."""
    return opt.lr * opt.lr_decay_ratio ** sum(epoch >= milestone for milestone in opt.epoch_step)


def beta_decay(opt: argparse.Namespace, epoch: int) -> float:
    """The factor of β in an epoch, counted from 0 (section 4.1 lets β decay with KD; the schedules are ours)."""
    progress = epoch / opt.epochs
    return {'none': 1.0, 'step': learning_rate(opt, epoch) / opt.lr, 'linear': 1 - progress,
            'cosine': (1 + math.cos(math.pi * progress)) / 2}[opt.beta_decay]


def needs_teacher(opt: argparse.Namespace) -> bool:
    return bool(opt.alpha or opt.beta or opt.factt or opt.grad_at)


def gradient_terms(opt: argparse.Namespace) -> list[str]:
    """Those losses on gradients that have a weight."""
    return [name for name in GRADIENT_TERMS if getattr(opt, name)]


def settle_gradients(opt: argparse.Namespace) -> None:
    """Makes --deterministic what it is by default."""
    opt.deterministic = bool(gradient_terms(opt)) if opt.deterministic is None else opt.deterministic


def check_gradients(opt: argparse.Namespace) -> None:
    """Raises InputError for what losses on gradients do not go with."""
    terms = gradient_terms(opt)
    if terms and opt.compile:
        raise InputError(f'--compile: torch.compile cannot differentiate twice, as --{terms[0]} needs')
    if terms and opt.dtype == 'half':
        raise InputError(f'--dtype half: the gradients that --{terms[0]} is made of would vanish in it')


# ------------------------------------------------------------------------------------------- devices

@dataclass(frozen=True)
class Place:
    """Where a process computes: its device, and its rank among the `world` processes of the run."""
    device: torch.device
    rank: int = 0
    world: int = 1
    cpu_group: Any = None  # for what the processes tell each other without waiting for their GPUs

    def __str__(self) -> str:
        if self.device.type == 'cuda':
            return f'{self.world} × {torch.cuda.get_device_name(self.device)}'
        return f'{self.world} × CPU with {torch.get_num_threads()} threads'

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.world == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.cpu_group)
        return bool(flags)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def part(self, batch: Tensor) -> tuple[Tensor, int]:
        """This process's part of a batch, and its size.

        Where a batch has fewer samples than there are processes, some get its first sample and size 0: they
        must take part in the step, and count for nothing in it.
        """
        part = batch.tensor_split(self.world)[self.rank]
        return (part, len(part)) if len(part) else (batch[:1], 0)


def choose_devices(opt: argparse.Namespace) -> list[torch.device]:
    """The devices that the options ask for, of those that are visible. Raises InputError where they are not there."""
    there = torch.cuda.device_count()
    if opt.cuda and not (there and opt.ngpu):
        raise InputError('--cuda: there is no GPU to use' if not there else '--cuda contradicts --ngpu 0')
    if opt.gpu_id and (max(opt.gpu_id) >= there or not opt.ngpu):
        text = ','.join(map(str, opt.gpu_id))
        raise InputError(f'--gpu_id {text}: there are {there} GPUs, counted from 0, and --ngpu is {opt.ngpu}')
    ids = opt.gpu_id or list(range(there))
    if opt.ngpu > max(1, len(ids)):
        raise InputError(f'--ngpu {opt.ngpu}: there are {len(ids)} ' + ('ids in --gpu_id' if opt.gpu_id else 'GPUs'))
    return [torch.device('cuda', i) for i in ids[:opt.ngpu]] or [torch.device('cpu')]


def launch(worker: Callable[..., None], opt: argparse.Namespace, *args: Any) -> None:
    """Runs worker(opt, place, *args): here, in a new process for each of several devices, or as torchrun's rank."""
    devices = choose_devices(opt)
    if 'LOCAL_RANK' in os.environ:  # torchrun started this process and says which it is
        local = int(os.environ['LOCAL_RANK'])
        ids = opt.gpu_id or range(torch.cuda.device_count())
        if devices[0].type == 'cuda' and local >= len(ids):
            raise InputError(f'torchrun starts more processes here than there are GPUs ({len(ids)})')
        device = torch.device('cuda', ids[local]) if devices[0].type == 'cuda' else devices[0]
        run_worker(int(os.environ['RANK']), worker, opt, [device], int(os.environ['WORLD_SIZE']), *args)
    elif len(devices) == 1:
        run_worker(0, worker, opt, devices, 1, *args)
    else:
        start_processes(worker, opt, devices, *args)


def start_processes(worker: Callable[..., None], opt: argparse.Namespace, devices: list[torch.device], *args: Any
                    ) -> None:
    """A process for each device. The first that fails ends all; signals to stop are passed on."""
    os.environ['MASTER_ADDR'], os.environ['MASTER_PORT'] = '127.0.0.1', str(free_port())
    processes = mp.spawn(run_worker, (worker, opt, devices, len(devices), *args), nprocs=len(devices), join=False)

    def pass_on(signum: int, frame: object) -> None:
        for process in processes.processes:
            process.terminate()
    old = [signal.signal(s, pass_on) for s in STOP_SIGNALS]
    try:
        while not processes.join():
            pass
    except mp.ProcessExitedException as e:
        if e.exit_code > 0:
            raise SystemExit(e.exit_code) from None
        raise SystemExit(f'rank {e.error_index} was killed ({e}): the others are ended; --resume goes on') from None
    finally:
        for s, handler in zip(STOP_SIGNALS, old, strict=True):
            signal.signal(s, handler)


def run_worker(rank: int, worker: Callable[..., None], opt: argparse.Namespace, devices: list[torch.device],
               world: int, *args: Any) -> None:
    place = Place(devices[rank % len(devices)], rank, world)
    set_up_device(place.device, opt)
    if world > 1:
        dist.init_process_group('nccl' if place.device.type == 'cuda' else 'gloo', rank=rank, world_size=world)
        place = replace(place, cpu_group=dist.new_group(backend='gloo'))
    with input_errors():
        worker(opt, place, *args)
    if world > 1:
        dist.destroy_process_group()


def set_up_device(device: torch.device, opt: argparse.Namespace) -> None:
    torch.manual_seed(opt.seed)  # nothing here draws from it; what somebody adds to a network may
    if opt.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS asks for it
    torch.use_deterministic_algorithms(opt.deterministic)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TF32
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = not opt.deterministic
    elif sys.platform == 'linux':
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Makes the C library keep the memory of freed tensors.

    By default glibc gives large blocks back, and the system clears their pages anew for the next step.
    """
    trim_threshold, mmap_threshold = -1, -3  # names of mallopt(3), from malloc.h
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', lambda *_: 0)  # not in every C library
    # Older ones take no more than 32 MiB; one threshold without the other would make matters worse.
    if mallopt(mmap_threshold, 2 ** 30) or mallopt(mmap_threshold, 2 ** 25):
        mallopt(trim_threshold, 2 ** 30)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def to_device(params: Params, device: torch.device) -> Params:
    """The parameters on a device, filters channels-last; gradients are asked for as before."""
    moved = {}
    for name, p in params.items():
        layout = torch.channels_last if p.dim() == 4 else torch.contiguous_format
        t = p.detach().to(device, copy=True, memory_format=layout)
        moved[name] = torch.nn.Parameter(t) if p.requires_grad else t
    return moved


class Parallel(torch.nn.Module):
    """What DistributedDataParallel asks for: a module that owns the parameters. Calling it calls `function`."""

    def __init__(self, function: Callable, params: Params) -> None:
        super().__init__()
        self.function = function
        self.params = torch.nn.ParameterList(params.values())

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def data_parallel(function: Callable, params: Params, place: Place) -> Callable:
    """`function`, whose gradients with respect to `params` become, in backward, their mean over the processes."""
    if place.world == 1:
        return function
    ids = [place.device.index] if place.device.type == 'cuda' else None
    return torch.nn.parallel.DistributedDataParallel(Parallel(function, params), device_ids=ids)


def moving_statistics(params: Params) -> list[Tensor]:
    """The running statistics of batch norm that is not fixed."""
    return [t for name, t in params.items()
            if name.endswith(STATISTICS) and params[f'{name.rpartition(".")[0]}.weight'].requires_grad]


def average_statistics(params: Params, place: Place) -> None:
    """Makes the running statistics of batch norm their mean over the processes."""
    statistics = moving_statistics(params)
    if place.world > 1 and statistics:
        mean = place.sum(torch.cat(statistics)) / place.world
        for tensor, value in zip(statistics, mean.split([len(t) for t in statistics]), strict=True):
            tensor.copy_(value)


def wants_compile(opt: argparse.Namespace, place: Place) -> bool:
    """Whether to torch.compile: as --compile says, else on a GPU. Both need a compiler on the machine."""
    by_default = place.device.type == 'cuda' and not gradient_terms(opt)  # it has no double backward
    if not (by_default if opt.compile is None else opt.compile):
        return False
    if any(shutil.which(c) for c in (os.environ.get('CXX'), os.environ.get('CC'), 'g++', 'gcc', 'clang', 'cc') if c):
        return True
    if opt.compile:
        raise InputError('--compile: there is no C++ compiler on this machine')
    place.say('no C++ compiler on this machine: the step is not compiled, and slower for it')
    return False


# ------------------------------------------------------------------------------------------- a run's folder

def check_writable(option: str, folder: Path) -> None:
    """Raises InputError, about the option, where a folder cannot be written to, or made."""
    there = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f'{option} {folder}: {there} is not a folder that can be written to')


def check_save(opt: argparse.Namespace) -> None:
    """Raises InputError where --save already holds a run that nobody allowed to touch, or cannot be written."""
    folder = Path(opt.save)
    if not (opt.overwrite or goes_on(opt)) and ((folder / LOG).exists() or (folder / CHECKPOINT).exists()):
        raise InputError(f'{folder} already holds a run: go on with --resume {folder}, replace it with --overwrite, '
                         'or choose another --save')
    check_writable('--save', folder)
    for name in (LOG, CHECKPOINT, f'{LOG}.tmp', f'{CHECKPOINT}.tmp', LOCK):
        if (folder / name).exists() and not (folder / name).is_file():
            raise InputError(f'--save {folder}: {folder / name} is in the way')


def goes_on(opt: argparse.Namespace) -> bool:
    """Whether a resumed run replaces the very checkpoint that it comes from."""
    return bool(opt.resume) and find_checkpoint(opt.resume).resolve() == (Path(opt.save) / CHECKPOINT).resolve()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps every other process from training in `folder`, which is made if need be.

    The system drops its lock with the process, however that ends. For machines that share the folder but not
    locks, the file says host and pid, and its time is a heartbeat. Raises InputError where it is taken.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, 'a+') as file:
        taken = False
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            taken = e.errno in (errno.EACCES, errno.EAGAIN)  # others: this file system knows no locks
        file.seek(0)
        owner = file.read().strip()
        age = time.time() - os.stat(file.name).st_mtime
        if taken or (owner and not owner.startswith(socket.gethostname() + ' ') and age < LOCK_EXPIRES):
            raise InputError(f'{folder}: another process trains there ({owner}; last sign of life {age:.0f} s ago)')
        file.truncate(0)
        file.write(f'{socket.gethostname()} {os.getpid()}\n')
        file.flush()
        done = threading.Event()
        threading.Thread(target=heartbeat, args=(file.name, done), daemon=True).start()
        try:
            yield
        finally:
            done.set()
            file.truncate(0)  # the file stays: to remove it would let two processes lock two files of one name


def owner(folder: Path) -> str | None:
    """Who trains in a folder, as 'host pid', if somebody does. It takes no lock, and so is in nobody's way."""
    try:
        text, age = (folder / LOCK).read_text().strip(), time.time() - (folder / LOCK).stat().st_mtime
        host, pid = text.split()
        if host == socket.gethostname():
            os.kill(int(pid), 0)
    except (OSError, ValueError) as e:  # no lock, nobody's, or of a process that is no more
        if not isinstance(e, PermissionError):
            return None
    return text if age < LOCK_EXPIRES else None


def heartbeat(path: str, done: threading.Event) -> None:
    while not done.wait(HEARTBEAT):
        with suppress(OSError):  # a shared folder may be away for a while
            os.utime(path)


def write_whole(files: dict[Path, bytes]) -> None:
    """Replaces these files, such that each at every moment is whole, as it was or as it will be.

    None is replaced before all are written and on the disk. Then they are, in the order given.
    """
    temporary = {path: path.with_name(path.name + '.tmp') for path in files}
    try:
        for path, content in files.items():
            with open(temporary[path], 'wb') as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            os.replace(temporary[path], path)
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def well_formed(record: Any) -> bool:
    """Whether this is an epoch's record, and what others compute with in it is of the right type."""
    return isinstance(record, dict) and type(record.get('epoch')) is int and all(
        isinstance(record.get(name), kind | None) and not isinstance(record.get(name), bool)
        for names, kind in ((LOG_NUMBERS, int | float), (LOG_TEXTS, str)) for name in names)


def read_log(path: Path) -> list[dict]:
    """The records of a log.txt, an epoch each; lines that are none are left out. NaN of old logs is read."""
    records = []
    for line in path.read_text(errors='replace').splitlines() if path.is_file() else []:
        try:
            record = json.loads(line.partition('json_stats: ')[2])
        except (ValueError, RecursionError):
            continue
        if well_formed(record):
            records.append(record)
    return records


def log_text(records: list[dict]) -> bytes:
    """All of a log.txt: a line of valid JSON for each record, non-finite numbers as null."""
    def finite(value: Any) -> Any:
        if isinstance(value, list):
            return [finite(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    lines = (json.dumps({name: finite(v) for name, v in record.items()}, allow_nan=False) for record in records)
    return ''.join(f'json_stats: {line}\n' for line in lines).encode()


@contextmanager
def run_folder(opt: argparse.Namespace, place: Place, state: dict | None) -> Iterator[list[dict]]:
    """The log's records so far, in a folder that is this run's alone; it changes with the first checkpoint only."""
    if place.rank > 0:
        yield []
        return
    folder = Path(opt.save)
    with locked(folder):
        check_save(opt)  # again: another process may have been faster
        records = []
        if state:
            path = find_checkpoint(opt.resume)
            now = read_checkpoint(path)
            if (now.get('epoch'), now.get('step')) != (state['epoch'], state.get('step')):
                raise InputError(f'{path}: another process has trained this run meanwhile')
            changing = (*PLACE_OPTIONS, *DATA_OPTIONS, 'epochs', 'lr')
            same = {k: v for k, v in state['options'].items() if k not in changing}
            records = [r for r in read_log(path.parent / LOG) if r['epoch'] <= state['epoch']
                       and all(r.get(k) == v for k, v in same.items())]  # and no other run's
            if goes_on(opt):
                write_whole({folder / LOG: log_text(records)})
        yield records


@dataclass
class Progress:
    """How far a run is: completed epochs, and in the next one the steps done, with this process's sums over them."""
    epoch: int = 0
    step: int = 0
    sums: Tensor | None = None
    shown: str = ''  # the last epoch's loss and accuracy, for the progress bar


class Stop:
    """Notes SIGTERM and SIGINT, for training to end after a step with a checkpoint, and not in the middle of one."""
    signum = 0

    def __enter__(self) -> 'Stop':
        self.old = [signal.signal(s, self.note) for s in STOP_SIGNALS]
        return self

    def __exit__(self, *error: object) -> None:
        for s, handler in zip(STOP_SIGNALS, self.old, strict=True):
            signal.signal(s, handler)

    def note(self, signum: int, frame: object) -> None:
        self.signum = signum

    def asked(self, place: Place, step: int) -> bool:
        """Whether all processes, which are at the same step, are to stop there."""
        return (place.world == 1 or step % STOP_CHECK == 0) and place.any(bool(self.signum))

    def exit(self, place: Place, opt: argparse.Namespace) -> NoReturn:
        place.wait()  # until the checkpoint is there
        place.say(f'stopped: go on with --resume {opt.save}')
        raise SystemExit(128 + (self.signum or signal.SIGTERM))


def copy_whole(to: Tensor, source: Tensor) -> Tensor:
    """Copies into `to`, without broadcasting. Raises ValueError where the shapes differ."""
    if to.shape != source.shape:
        raise ValueError(f'a tensor of shape {tuple(source.shape)} for one of {tuple(to.shape)}')
    return to.detach().copy_(source)


def fingerprint(params: Params) -> str:
    """The same for the same parameters, wherever they were read from."""
    digest = hashlib.sha256()
    for name in sorted(params):
        digest.update(name.encode())
        digest.update(params[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass
class Run:
    """All that training changes, in memory and in the run's folder."""
    opt: argparse.Namespace
    place: Place
    params: Params
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    records: list[dict]
    stop: Stop
    teacher: str | None = None  # its fingerprint
    events: Any = None          # TensorBoard's

    def checkpoint(self) -> dict:
        """All that a run needs to go on; only tensors and plain values. All processes must call it."""
        average_statistics(self.params, self.place)
        params = {name: t.detach().cpu().contiguous() for name, t in self.params.items()}
        state = {'params': {name: t for name, t in params.items() if not name.startswith(ADAPTER)},
                 'optimizer': self.optimizer.state_dict(), 'epoch': self.progress.epoch, 'options': vars(self.opt),
                 'rng': {'cpu': torch.get_rng_state()}}
        if adapters := {name: t for name, t in params.items() if name.startswith(ADAPTER)}:
            state['adapters'] = adapters
        if self.progress.step:
            state |= {'step': self.progress.step, 'sums': self.place.sum(self.progress.sums.clone()).cpu()}
        if self.place.device.type == 'cuda':
            state['rng']['cuda'] = torch.cuda.get_rng_state()
        if self.scaler.is_enabled():
            state['scaler'] = self.scaler.state_dict()
        if self.teacher:
            state['teacher'] = self.teacher
        return state

    def restore(self, state: dict) -> None:
        """Puts a checkpoint back. Raises InputError where it is not whole, or the teacher is another one."""
        if state.get('teacher') != self.teacher:
            raise InputError(f'--resume {self.opt.resume}: the teacher is not the one that the run began with')
        try:
            with torch.no_grad():
                for name, tensor in self.params.items():
                    copy_whole(tensor, state['adapters' if name.startswith(ADAPTER) else 'params'][name])
            self.optimizer.load_state_dict(state['optimizer'])
            for p in trainable(self.params).values():  # fused SGD trusts its momenta's shape and layout
                momenta = self.optimizer.state[p]
                momenta['momentum_buffer'] = copy_whole(torch.zeros_like(p), momenta['momentum_buffer'])
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(state['scaler'])
            torch.set_rng_state(state['rng']['cpu'])
            if self.place.device.type == 'cuda' and 'cuda' in state['rng']:
                torch.cuda.set_rng_state(state['rng']['cuda'])
            self.progress = Progress(int(state['epoch']), int(state.get('step', 0)))
            if min(self.progress.epoch, self.progress.step) < 0:
                raise ValueError('it counts epochs or steps below 0')
            if self.progress.step:  # the sums are all processes' together: one has them, the others start from 0
                self.progress.sums = state['sums'].to(self.place.device) * (self.place.rank == 0)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as e:
            raise InputError(f'--resume {self.opt.resume}: not a whole checkpoint of this run ({e})') from None

    def save(self) -> None:
        state = self.checkpoint()
        if self.place.rank == 0:
            weights = io.BytesIO()
            torch.save(state, weights)
            # The log first: a line too many is dropped on resume, one too few would be lost.
            write_whole({Path(self.opt.save) / LOG: log_text(self.records),
                         Path(self.opt.save) / CHECKPOINT: weights.getvalue()})

    def before_epoch(self) -> None:
        for group in self.optimizer.param_groups:
            group['lr'] = learning_rate(self.opt, self.progress.epoch)

    def after_step(self) -> None:
        step = self.progress.step
        stop = self.stop.asked(self.place, step)
        if stop or (self.opt.save_every and step % self.opt.save_every == 0):
            self.save()
        if stop:
            self.stop.exit(self.place, self.opt)

    def after_epoch(self, results: dict) -> None:
        """Adds the epoch to the log, saves, and prints it."""
        epoch = self.progress.epoch + 1
        record = vars(self.opt) | {'epoch': epoch, 'lr': learning_rate(self.opt, epoch - 1)} | results
        own = {name: p for name, p in trainable(self.params).items() if not name.startswith(ADAPTER)}
        record |= {'n_parameters': sum(p.numel() for p in own.values()),
                   'device': str(self.place), 'torch': torch.__version__}
        self.records.append(record)
        shown = f'loss {record["train_loss"]:.3f}, acc {record["train_acc"]:.1f}% in epoch {epoch}'
        self.progress = Progress(epoch, shown=shown)
        self.save()
        if self.opt.tensorboard and self.place.rank == 0:
            self.write_events(epoch, results | {'lr': record['lr']})
        self.place.say(f'epoch {epoch}/{self.opt.epochs}: lr {record["lr"]:g}, train loss {record["train_loss"]:.4f}, '
                       f'train error {100 - record["train_acc"]:.2f}%, {errors(record)}, '
                       f'{record["train_time"]:.1f} + {record["test_time"]:.1f} s'
                       + ('' if math.isfinite(record['train_loss']) else ' (diverged: the loss is not finite)'))
        if self.stop.asked(self.place, 0):
            self.stop.exit(self.place, self.opt)


    def write_events(self, epoch: int, results: dict) -> None:
        """The figures of an epoch as TensorBoard's scalars; those of an older run, or of later epochs, are dropped."""
        if self.events is None:
            for old in Path(self.opt.save).glob('events.out.tfevents.*') if epoch == 1 else ():
                old.unlink()
            self.events = summary_writer()(self.opt.save, purge_step=epoch)
        for name, value in results.items():
            several = isinstance(value, list)
            for i, scalar in enumerate(value if several else [value]):
                self.events.add_scalar(f'{name}/{self.opt.at_groups[i]}' if several else name, scalar, epoch)
        self.events.flush()


def summary_writer() -> type:
    """torch's writer for TensorBoard. Raises InputError where that is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # here, because it takes seconds, and is seldom wanted
    except ImportError:
        raise InputError('--tensorboard: the package is not installed: pip install tensorboard') from None
    return SummaryWriter


# ------------------------------------------------------------------------------------------- image and weight files

def read_image(path: str | Path) -> np.ndarray:
    """An image file as (H, W, 3) RGB uint8, its orientation tag ignored. Raises InputError, with its path.

    One that is far longer than it is wide is refused, too: rescaled by its shorter side it would fill the memory.
    """
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what is wrong is said here, in one line
    try:
        image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except (OSError, cv2.error):  # OpenCV raises for an empty file, and returns None for a damaged one
        image = None
    if image is None:
        raise InputError(f'{path}: not an image, or a damaged one')
    if max(image.shape[:2]) > NARROWEST * min(image.shape[:2]):
        raise InputError(f'{path}: {image.shape[1]}×{image.shape[0]} pixels: too long and narrow an image')
    return image


def matching_classes(root: Path, train: Path, test: Path) -> list[str]:
    """The class folders, which must be the same in both. Raises InputError with one that is not."""
    classes, in_test = (sorted(p.name for p in part.iterdir() if p.is_dir() and not p.name.startswith('.'))
                        for part in (train, test))
    if len(classes) < 2:
        raise InputError(f'{train}: {len(classes)} classes; there must be two or more')
    if classes != in_test:
        raise InputError(f'{root}: the class {min(set(classes) ^ set(in_test))} is in only one of {train.name}/ and '
                         f'{test.name}/')
    return classes


def folder_classes(what: str, root: Path, test_names: tuple[str, ...]) -> tuple[Path, list[str]]:
    """The folder of the test images, the first of these names that is there, and the classes of a folder of images.

    Raises InputError, about `what`, where the folder is not laid out so.
    """
    test = next((root / name for name in test_names if (root / name).is_dir()), None)
    if not (root / 'train').is_dir() or test is None:
        others = ''.join(f' (or {name}/)' for name in test_names[1:])
        raise InputError(f'{what}: {root.absolute()} must hold train/<class>/* and {test_names[0]}/<class>/*{others}')
    return test, matching_classes(root, root / 'train', test)


def list_images(part: Path, classes: list[str]) -> list[list[Path]]:
    """The image files of each class, sorted. Raises InputError for a class that has none."""
    files = [sorted(p for p in (part / c).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != '.')
             for c in classes]
    if [] in files:
        raise InputError(f'{part / classes[files.index([])]}: a class without images')
    return files


def export_kind(path: str, file_format: str | None) -> str:
    """The format of an export, 'torchvision' or 'folded'. Raises InputError where it cannot go to `path`."""
    suffix = Path(path).suffix
    file_format = file_format or ('folded' if suffix == '.hkl' else 'torchvision')
    if suffix not in ('.pth', '.hkl') or (suffix == '.hkl' and file_format == 'torchvision'):
        raise InputError(f'--export {path}: must end in .pth, or for the folded format in .pth or .hkl')
    if Path(path).is_dir() or not os.access(Path(path).absolute().parent, os.W_OK):
        raise InputError(f'--export {path}: cannot be written there')
    return file_format


def export_content(network: Trained, path: str, file_format: str | None) -> bytes:
    """A file of an ImageNet ResNet's weights: torchvision's state dict, or the published folded naming.

    Raises InputError where the network has no such form.
    """
    file_format = export_kind(path, file_format)
    if file_format == 'torchvision' and not is_torchvision(network):
        raise InputError(f'--export {path}: {network.name} has no form in torchvision: that takes width 1, batch norm '
                         'that is not folded, and batch norm in the shortcuts; try --export_format folded')
    if file_format == 'folded' and 'bn.a' in network.params:
        raise InputError(f'--export {path}: the attention-transfer export has no folded form')
    params = export_torchvision(network.params) if file_format == 'torchvision' else export_folded(network.params)
    file = io.BytesIO()
    if Path(path).suffix == '.pth':
        torch.save(params, file)
    else:
        with h5py.File(file, 'w') as hdf:
            hickle.dump({name: t.numpy() for name, t in params.items()}, hdf)
    return file.getvalue()


# ------------------------------------------------------------------------------------------- the loop

class Data(Protocol):
    """What the loop needs of a data set; each process gets its own part, on its device."""
    num_classes: int
    n_train: int
    n_test: int

    def train_batches(self, epoch: int, start: int) -> Iterable[tuple[Tensor, Tensor, int, int]]:
        """From batch `start` on: images (n, 3, H, W), labels (n,), how many count, and how many in all processes."""

    def test_batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Images (n, 3, H, W) and labels (n,)."""

    def close(self) -> None:
        """Ends what reads the data."""


def autocast(opt: argparse.Namespace, place: Place) -> torch.autocast:
    return torch.autocast(place.device.type, DTYPES[opt.dtype], enabled=opt.dtype != 'float')


def make_optimizer(opt: argparse.Namespace, params: Params) -> torch.optim.SGD:
    """SGD with momentum 0.9, no Nesterov, weight decay on all that is trained; its momenta are zeros at first.

    Without them, fused SGD leaves its momenta uninitialised where a GradScaler skips the first step.
    """
    optimizer = torch.optim.SGD(trainable(params).values(), opt.lr, momentum=0.9, weight_decay=opt.weight_decay,
                                fused=True)
    for p in trainable(params).values():
        optimizer.state[p]['momentum_buffer'] = torch.zeros_like(p)
    return optimizer


def make_objective(opt: argparse.Namespace, place: Place, f: Network, params: Params,
                   teacher: Trained | None) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(x, y, decay) → the student's loss on a batch, and [1, loss, accuracy, …] for the statistics.

    What follows the accuracy are the unweighted losses that `named_terms` names. decay is the factor of β. With losses
    on gradients x is made to require one.
    """
    teacher_params = to_device(teacher.params, place.device) if needs_teacher(opt) else None
    settings = {name: getattr(opt, name) for name in ('alpha', 'temperature', 'mapping', 'power')}
    at_groups, act_groups = (opt.at_groups if weight else [] for weight in (opt.beta, opt.factt))

    def objective(x: Tensor, y: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
        x.requires_grad_(bool(gradient_terms(opt)))
        with autocast(opt, place):
            logits, groups = f(x, params, True)  # (N, K), 3 or 4 of (N, C, H, W)
            with torch.set_grad_enabled(bool(opt.grad_at)):
                t_logits, t_groups = teacher.f(x, teacher_params, False) if teacher_params else (None, ())
        gradients = gradient_losses(opt, place, f, params, x, y, logits, t_logits)
        taught = t_logits.detach() if teacher_params else None, [A.detach() for A in t_groups]
        loss, at_losses = transfer_loss(logits, groups, y, *taught, beta=opt.beta * decay, at_groups=at_groups,
                                        **settings)
        act_losses = [activation_loss(groups[g], t_groups[g].detach(), params.get(f'{ADAPTER}{g}')) for g in act_groups]
        loss = loss + opt.factt * decay * sum(act_losses)
        loss = loss + sum(getattr(opt, name) * term for name, term in gradients.items())
        accuracy = (logits.argmax(1) == y).float().mean()
        terms = [torch.ones_like(loss), loss, accuracy, *at_losses, *act_losses, *gradients.values()]
        return loss, torch.stack(terms).detach().double()
    return objective


def gradient_losses(opt: argparse.Namespace, place: Place, f: Network, params: Params, x: Tensor, y: Tensor,
                    logits: Tensor, teacher_logits: Tensor | None) -> dict[str, Tensor]:
    """The losses on ∂ℓ/∂x that have a weight, without it, by name (section 3.2)."""
    terms = gradient_terms(opt)
    J = input_gradient(logits, x, y) if terms else None  # (N, 3, H, W)
    losses = {}
    if 'grad_at' in terms:
        losses['grad_at'] = gradient_at_loss(J, input_gradient(teacher_logits, x, y, create_graph=False))
    if 'symmetry' in terms:
        mirrored = x.detach().flip(3).requires_grad_()
        with autocast(opt, place):
            logits = f(mirrored, params, True)[0]
        losses['symmetry'] = symmetry_loss(J, input_gradient(logits, mirrored, y))
    if 'min_l2' in terms:
        losses['min_l2'] = min_l2_loss(J)
    return losses


def named_terms(opt: argparse.Namespace, values: list[float]) -> dict[str, Any]:
    """The log's names for the losses that `make_objective` puts behind the accuracy."""
    rest = iter(values)
    n = len(opt.at_groups)
    record = {'at_losses': list(itertools.islice(rest, n if opt.beta else 0))}
    if opt.factt:
        record['act_losses'] = list(itertools.islice(rest, n))
    return record | {f'{name}_loss': next(rest) for name in gradient_terms(opt)}


def make_step(opt: argparse.Namespace, place: Place, f: Network, params: Params,
              teacher: Trained | None, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
              ) -> Callable[[Tensor, Tensor, int, int, Tensor], Tensor]:
    """The training step: one batch through the networks, the losses, backward and SGD.

    It returns sums over the batch, on the device: nothing in it waits for a GPU.
    """
    objective = data_parallel(make_objective(opt, place, f, params, teacher), trainable(params), place)
    if wants_compile(opt, place):
        objective = torch.compile(objective, dynamic=False)

    def step(x: Tensor, y: Tensor, n: int, n_global: int, decay: Tensor) -> Tensor:
        loss, means = objective(x, y, decay)
        # The processes' gradients are averaged: this makes of their losses the mean over the global batch.
        scaler.scale(loss * (place.world * n / n_global)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return means * n
    if not wants_capture(opt, place):
        return step
    return captured(step, params, optimizer, graph_recorder(), place.say)


def wants_capture(opt: argparse.Namespace, place: Place) -> bool:
    """Whether to launch a step as one CUDA graph: as --capture says, else where that can be done."""
    obstacle = ('takes a GPU, and there is none' if place.device.type != 'cuda' else
                'takes one GPU, not several' if place.world > 1 else
                'not with --dtype half, whose loss scaling decides step by step' if opt.dtype == 'half' else None)
    if opt.capture and obstacle:
        raise InputError(f'--capture: {obstacle}')
    return opt.capture is not False and not obstacle


def captured(step: Callable[..., Tensor], params: Params, optimizer: torch.optim.Optimizer,
             record: Callable[[Callable[[], Tensor], bool], tuple[Callable[[], None], Tensor]] | None,
             say: Callable[[str], None]) -> Callable[..., Tensor]:
    """`step`, recorded for each size of batch, and then replayed; recorded anew when the learning rate changes.

    The first WARM_UP steps of each are run as they are, for compiling and choosing algorithms; they count. `record`
    gives, for a function of no arguments, what replays it and the tensor that then has its result. It is also told
    whether earlier recordings are gone. Where it cannot, or the replay does not do what the step did, `say` gets a
    line, and steps go on being run as they are.
    """
    lr, seen, recorded = None, Counter(), {}

    def run(x: Tensor, y: Tensor, n: int, n_global: int, decay: Tensor) -> Tensor:
        nonlocal record, lr
        batch, key = (x, y, n, n_global, decay), (x.shape, n, n_global)
        if lr != optimizer.param_groups[0]['lr']:
            lr = optimizer.param_groups[0]['lr']
            seen.clear()
            recorded.clear()
        if key in recorded:
            return recorded[key](*batch)
        seen[key] += 1
        if record is None or seen[key] != WARM_UP:
            return step(*batch)
        state = [list(trainable(params).values()), [s['momentum_buffer'] for s in optimizer.state.values()],
                 moving_statistics(params)]
        before = copies(state)
        sums = step(*batch)
        try:
            recorded[key] = recording(step, batch, sums, partial(record, fresh=not recorded), state, before)
        except RuntimeError as e:
            first = e.__context__ if isinstance(e.__context__, RuntimeError) else e  # what ended the recording
            reason, record = str(first).strip().partition('\n')[0], None
            optimizer.zero_grad()  # of a step recorded in part
            say(f'the step is not launched as one CUDA graph, and slower for it: {reason}')
        return sums
    return run


def recording(step: Callable[..., Tensor], batch: tuple, sums: Tensor, record: Callable, state: list[list[Tensor]],
              before: list[list[Tensor]]) -> Callable[..., Tensor]:
    """What replays a step. It waits for the GPU; `state` is left as the step left it.

    Raises RuntimeError if a replay of the same batch does not give the step's sums, or does not change each list of
    tensors in `state` from `before` as the step did, to 1 %.
    """
    after = copies(state)
    inputs = [torch.zeros_like(t) for t in (batch[0], batch[1], batch[4])]  # where every replay looks for its own

    def run(x: Tensor, y: Tensor, n: int, n_global: int, decay: Tensor) -> Tensor:
        for to, source in zip(inputs, (x, y, decay), strict=True):
            to.detach().copy_(source.detach())
        replay()
        return result.clone()

    try:
        replay, result = record(lambda: step(*inputs[:2], *batch[2:4], inputs[2]))
        set_to(state, before)
        again = run(*batch)
        changes = [(distance(s, a), distance(b, a)) for s, a, b in zip(state, after, before, strict=True)]
        changes.append((distance([again], [sums]), sums.norm().item()))
        if not all(error <= 0.01 * change for error, change in changes):  # nor if anything is NaN
            raise RuntimeError('its replay gave something else, or nothing finite')
    finally:
        set_to(state, after)
    return run


def copies(state: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[t.detach().clone() for t in tensors] for tensors in state]


@torch.no_grad()
def set_to(state: list[list[Tensor]], values: list[list[Tensor]]) -> None:
    for t, value in zip(itertools.chain(*state), itertools.chain(*values), strict=True):
        t.copy_(value)


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    return math.hypot(*(torch.dist(p.detach(), q.detach()).item() for p, q in zip(a, b, strict=True)))


def graph_recorder() -> Callable[[Callable[[], Tensor], bool], tuple[Callable[[], None], Tensor]]:
    """A function that records what another launches on the GPU, without running it.

    Its graphs, which are replayed one at a time, share the memory of their temporary tensors until a `fresh` one comes.
    It raises RuntimeError where that memory and as much again for steps that are not recorded would not fit.
    """
    pool = None

    def record(function: Callable[[], Tensor], fresh: bool) -> tuple[Callable[[], None], Tensor]:
        nonlocal pool
        device = torch.cuda.current_device()
        if 2 * torch.cuda.max_memory_allocated(device) > torch.cuda.get_device_properties(device).total_memory:
            raise RuntimeError('it would need more than the memory of the GPU')
        pool = torch.cuda.graph_pool_handle() if fresh else pool
        stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        try:
            # thread_local: other threads, such as one that pins the next batch's memory, do not end the recording
            with torch.cuda.graph(graph, pool=pool, capture_error_mode='thread_local'):
                result = function()
        finally:
            torch.cuda.set_stream(stream)  # older torch stays on the recording's if that fails
        return graph.replay, result
    return record


def train_epoch(step: Callable[..., Tensor], data: Data, opt: argparse.Namespace, place: Place, progress: Progress,
                after_step: Callable[[], None]) -> dict[str, Any]:
    """Trains what is left of an epoch, in seconds train_time.

    Returns train_loss, train_acc (%) and the losses of `named_terms`, means over the epoch's samples.
    """
    begin, epoch = time.perf_counter(), progress.epoch
    decay = torch.tensor(beta_decay(opt, epoch), device=place.device)
    label, done = f'epoch {epoch + 1}/{opt.epochs}', min(progress.step * opt.batch_size, data.n_train)
    hidden = None if place.rank == 0 else True  # None: where there is no terminal
    with tqdm(total=data.n_train, initial=done, desc=label, unit='img', leave=False, disable=hidden) as bar:
        bar.set_postfix_str(progress.shown, refresh=False)
        for x, y, n, n_global in data.train_batches(epoch, progress.step):
            sums = step(x, y, n, n_global, decay)
            progress.sums = sums if progress.sums is None else progress.sums + sums
            progress.step += 1
            bar.update(n_global)
            if place.device.type == 'cpu' and not bar.disable:  # of a GPU, not to wait for it, the last epoch's stay
                loss, accuracy = (progress.sums[1:3] / progress.sums[0]).tolist()
                bar.set_postfix_str(f'loss {loss:.3f}, acc {accuracy:.1%}', refresh=False)
            after_step()
    count, loss, accuracy, *terms = means(place.sum(progress.sums.clone()))
    return {'train_loss': loss, 'train_acc': 100 * accuracy, **named_terms(opt, terms),
            'train_time': time.perf_counter() - begin} | skipped('train', data.n_train - count)


def means(sums: Tensor) -> list[float]:
    """[count, mean, mean, …] from [count, sum, sum, …]. Here, once an epoch, the process waits for its GPU."""
    count, *sums = sums.tolist()
    if round(count) == 0:
        raise InputError('not one of the images could be read')
    meters = [AverageValueMeter() for _ in sums]
    for meter, value in zip(meters, sums, strict=True):
        meter.add(value, round(count))
    return [round(count), *(meter.value()[0] for meter in meters)]


def skipped(part: str, count: int) -> dict[str, int]:
    return {f'{part}_skipped': count} if count else {}


@torch.no_grad()
def evaluate(f: Network, params: Params, data: Data, opt: argparse.Namespace, place: Place) -> dict[str, float]:
    """test_loss (cross-entropy), test_acc and, from six classes on, test_acc5 (%) over all samples, test_time (s)."""
    start = time.perf_counter()
    ks = (1, 5) if data.num_classes > 5 else (1,)
    sums = torch.zeros(2 + len(ks), dtype=torch.float64, device=place.device)
    for x, y in data.test_batches():
        with autocast(opt, place):
            logits = f(x, params, False)[0].float()           # (n, K)
        hits = logits.topk(max(ks), 1).indices == y[:, None]  # (n, max(ks))
        loss = F.cross_entropy(logits, y, reduction='sum')
        sums += torch.stack([torch.full_like(loss, len(y)), loss, *(hits[:, :k].sum() for k in ks)]).double()
    count, loss, *accuracies = means(place.sum(sums))
    result = {f'test_acc{k if k > 1 else ""}': 100 * a for k, a in zip(ks, accuracies, strict=True)}
    seconds = time.perf_counter() - start
    return {'test_loss': loss, **result, 'test_time': seconds} | skipped('test', data.n_test - count)


def check_groups(opt: argparse.Namespace, n_groups: int) -> None:
    """Raises InputError where the student has not all of --at_groups."""
    if max(opt.at_groups) >= n_groups:
        raise InputError(f'--at_groups {max(opt.at_groups)}: the student has {n_groups} groups, counted from 0')


def check_teacher(opt: argparse.Namespace, run: str | None, n_groups: int, num_classes: int) -> Trained | None:
    """The teacher of a run. Raises InputError where its groups, or its classes, are not the student's and must be."""
    on_groups, on_logits = ([name for name in names if getattr(opt, name)]
                            for names in (('beta', 'factt'), ('alpha', 'grad_at')))
    if run is None:
        if needs_teacher(opt):
            raise InputError(f'--{(on_logits + on_groups)[0]} needs a teacher to learn from')
        return None
    teacher = load_teacher(run)
    if on_groups and teacher.n_groups != n_groups:
        raise InputError(f'--{on_groups[0]}: the teacher {run} has {teacher.n_groups} groups, the student {n_groups}')
    if on_logits:
        check_classes(f'--{on_logits[0]}: the teacher {run}', teacher, num_classes)
    return teacher


def check_classes(what: str, network: Trained, num_classes: int) -> None:
    if network.num_classes != num_classes:
        raise InputError(f'{what} has {network.num_classes} classes, the data {num_classes}')


def describe(what: str, network: Trained, data: Data, opt: argparse.Namespace, place: Place) -> None:
    """Prints what a trained network is, and its test error."""
    params = to_device(network.params, place.device)
    text = f'{what}: {network.name}, {network.n_parameters:,} parameters'
    if network.num_classes == data.num_classes:
        test = evaluate(network.f, params, data, opt, place)
        text += f', {errors(test)} on {data.n_test:,} images, loss {test["test_loss"]:.4f}'
    else:
        text += f', not tested: it has {network.num_classes} classes, the data {data.num_classes}'
    place.say(text)


def errors(record: dict) -> str:
    text = f'test error {100 - record["test_acc"]:.2f}%'
    return text + (f' (top-5 {100 - record["test_acc5"]:.2f}%)' if 'test_acc5' in record else '')


def train(opt: argparse.Namespace, place: Place, f: Network, params: Params, data: Data, teacher: Trained | None,
          state: dict | None) -> None:
    """Trains `params` for the epochs that are left, with a line in the log and a checkpoint after each."""
    params = to_device(params, place.device)
    scaler = torch.amp.GradScaler(place.device.type, enabled=opt.dtype == 'half')
    run = Run(opt, place, params, make_optimizer(opt, params), scaler, Progress(), [], Stop(),
              fingerprint(teacher.params) if teacher else None)
    if state:
        run.restore(state)
    step = make_step(opt, place, f, params, teacher, run.optimizer, scaler)
    with run_folder(opt, place, state) as run.records, run.stop:
        if run.progress.epoch >= opt.epochs and not goes_on(opt):
            run.save()  # a finished run that is resumed elsewhere
        while run.progress.epoch < opt.epochs:
            run.before_epoch()
            results = train_epoch(step, data, opt, place, run.progress, run.after_step)
            average_statistics(params, place)
            run.after_epoch(results | evaluate(f, params, data, opt, place) | {'num_classes': data.num_classes})
    place.say(f'{opt.save}: all {opt.epochs} epochs are done')


# ------------------------------------------------------------------------------------------- a script's work

@dataclass(frozen=True)
class Task:
    """What a script does: its student, its data, and its teacher."""
    student: Callable[[], tuple[Network, Params]]
    name: str                                                # of the student, as WRN-16-1
    load_data: Callable[[argparse.Namespace, Place], Data]
    num_classes: int
    dataset: str                                             # its name, for that of a run
    teacher: str | None = None


def settings_name(opt: argparse.Namespace, task: Task) -> str:
    """A folder's name for a run that was given none."""
    name = f'{task.dataset}_{task.name}'
    mapping = '' if (opt.mapping, opt.power) == ('sum', 2) else f'_{opt.mapping}{opt.power:g}'
    name += f'_AT{opt.beta:g}{mapping}' if opt.beta else ''
    name += f'_KD{opt.alpha:g}' if opt.alpha else ''
    name += ''.join(f'_{term}{getattr(opt, term):g}' for term in ('factt', *GRADIENT_TERMS) if getattr(opt, term))
    name += f'_from_{Path(task.teacher).stem}' if task.teacher else ''
    return f'logs/{name}_seed{opt.seed}'


def execute(opt: argparse.Namespace, state: dict | None, task: Task) -> None:
    """Tests or trains, as the options say; what is wrong with them is found before any process or data."""
    settle_gradients(opt)
    if opt.evaluate:
        network = load_network(opt.evaluate)
        check_classes(opt.evaluate, network, task.num_classes)
        launch(test_only, opt, task, network)
        return
    check_gradients(opt)
    if opt.tensorboard:
        summary_writer()
    opt.save = opt.save or settings_name(opt, task)
    check_save(opt)
    _, params = construct(task.student, task.name)
    own = (Path(opt.save) / CHECKPOINT).resolve()
    if task.teacher not in (None, *TORCHVISION) and find_checkpoint(task.teacher).resolve() == own:
        raise InputError(f'--save {opt.save}: that is the teacher, whom its student would replace')
    if gradient_terms(opt) and moving_statistics(params):
        raise InputError(f'--{gradient_terms(opt)[0]}: {task.name} has batch norm, through which the gradient at one '
                         'sample depends on the others: it takes a network without (cifar.py --net nin '
                         '--no-batch_norm), or with fixed, batch norm')
    n_groups = len({name.split('.')[0] for name in params if name.startswith('group')})
    check_groups(opt, n_groups)
    launch(train_student, opt, task, check_teacher(opt, task.teacher, n_groups, task.num_classes), state)


def construct(student: Callable[[], tuple[Network, Params]], name: str) -> tuple[Network, Params]:
    """A new student. Raises InputError for an impossible network, or one too large for the memory."""
    try:
        return student()
    except (ValueError, RuntimeError, MemoryError) as e:
        raise InputError(f'{name}: {e}') from None


def test_only(opt: argparse.Namespace, place: Place, task: Task, network: Trained) -> None:
    with closing(task.load_data(opt, place)) as data:
        describe(opt.evaluate, network, data, opt, place)


def train_student(opt: argparse.Namespace, place: Place, task: Task, teacher: Trained | None, state: dict | None
                  ) -> None:
    f, params = task.student()
    with closing(task.load_data(opt, place)) as data:
        place.say(f'{opt.save}: {task.name} on {data.n_train:,} images, {place}')
        if teacher and opt.check_teacher:
            describe(f'teacher {task.teacher}', teacher, data, opt, place)
        train(opt, place, f, params | adapters_of(opt, f, params, teacher), data, teacher, state)


@torch.no_grad()
def adapters_of(opt: argparse.Namespace, f: Network, params: Params, teacher: Trained | None) -> Params:
    """What --factt trains beside the student."""
    if not opt.factt:
        return {}
    x = torch.zeros(1, 3, 64, 64)  # the groups of any images tell their channels
    return make_adapters(f(x, params, False)[1], teacher.f(x, teacher.params, False)[1], opt.at_groups, opt.seed)
