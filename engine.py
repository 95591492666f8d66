"""A run: options, devices and ranks, its folder, a step, an epoch, evaluation.

The scripts call `parse`, `start`, `open_folder`, then `Run`, `train` and `step_in_turn`; their
`main` shows the order. A run is its model.pt7; log.txt is made from it.
"""
import argparse
import contextlib
import ctypes
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor
from torchnet.meter import TimeMeter
from tqdm import tqdm

import utils
from resnet import InputError, Model, Network, Params, trainable

# Options that are never compared or restored. They are not in a folder's default name, except,
# with --dataset folder, the last part of dataroot.
FREE = {'save', 'resume', 'overwrite', 'evaluate', 'export', 'test_every', 'check_teacher',
        'tensorboard', 'cuda', 'ngpu', 'gpu_id', 'nthread', 'compile', 'capture', 'dataroot',
        'imagenetpath'}
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # quiet: read_image raises errors
SAVE_SECONDS = 10  # least time between checkpoints
WARM_UP = 3        # steps before a CUDA graph is captured
AUTOCAST = {'bfloat16': torch.bfloat16, 'half': torch.float16}


class Place(NamedTuple):
    """The device of this process, its rank among `world` processes, and what it still trains."""
    device: torch.device
    rank: int
    world: int
    runs: list[Iterator[None]]  # of `train`, for `step_in_turn`


class Diverged(Exception):  # noqa: N818
    """Loss or parameters are not finite."""


def say(text: str) -> None:
    """Prints a line on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(text, flush=True)


# ------------------------------------------------------------------ options

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds defaults to the help, where there are any and the text does not say them."""

    def _get_help_string(self, action: argparse.Action) -> str:
        said = action.default in (None, '', False) or 'default' in action.help
        return action.help if said else super()._get_help_string(action)


def new_parser(doc: str, usage: str = '%(prog)s [options]') -> ArgumentParser:
    """A parser with the first line of a module's docstring as description."""
    return ArgumentParser(description=doc.splitlines()[0], usage=usage, allow_abbrev=False,
                          formatter_class=HelpFormatter)


def add_options(parser: ArgumentParser, **defaults: Any) -> None:
    """Adds the options that both scripts share, with this script's defaults."""
    number, whole, wholes = utils.number, utils.whole_number, utils.whole_numbers
    yes_or_no = BooleanOptionalAction
    add = parser.add_argument_group('training').add_argument
    add('--batch_size', type=whole, help='over all ranks')
    add('--epochs', type=whole, help='of training')
    add('--lr', type=number, help='learning rate')
    add('--epoch_step', type=wholes, help='completed epochs after which the lr drops')
    add('--lr_decay_ratio', type=number, help='factor of the lr at each step')
    add('--weight_decay', type=number, help='on every trainable parameter')
    add('--seed', default='0', type=wholes, help='cifar.py trains several at once: 0,1,2')
    add('--dtype', default='float', choices=('float', 'bfloat16', 'half', 'double'),
        help='of the networks; parameters stay float32, except with double')
    add('--compile', action=yes_or_no, help='default: on a GPU, unless a loss uses gradients')
    add('--deterministic', action=yes_or_no, help='default: with losses on gradients')
    utils.add_loss_options(parser)
    add = parser.add_argument_group('run').add_argument
    add('--save', default='', metavar='FOLDER',
        help='default: logs/ and a name made of the settings. A run that is in it goes on')
    add('--resume', default='', metavar='RUN',
        help='go on with this run; its settings are the defaults, but name the data folder again')
    add('--overwrite', action='store_true', help='begin anew in --save')
    add('--evaluate', default='', nargs='?', const=True, metavar='RUN',
        help='only test this run (without RUN: the teacher); with a teacher compare their maps')
    add('--test_every', default=1, type=whole, metavar='EPOCHS', help='and after the last')
    add('--check_teacher', default=True, action=yes_or_no, help='test the teacher at the start')
    add('--tensorboard', action='store_true', help='also write the metrics for TensorBoard')
    add = parser.add_argument_group('devices').add_argument
    add('--ngpu', default=1, type=whole, help='number of GPUs, where there are any; 0: CPU')
    add('--gpu_id', type=wholes, help='which GPUs, --ngpu of them (default: the first)')
    add('--cuda', action='store_true', help='fail if there is no GPU')
    add('--capture', action=yes_or_no,
        help='a step as one CUDA graph; default: on one GPU, if it is compiled')
    add('--nthread', default=4, type=whole, help='workers that read images')
    parser.set_defaults(**defaults)


def parse(parser: ArgumentParser, argv: list[str] | None, teacher: str) -> Namespace:
    """The options. With --resume or --evaluate those of that run replace the script's defaults.

    `teacher` is the name of the option for it. Ends with the parser's error, or InputError.
    """
    opt = parser.parse_args(argv)
    evaluated = getattr(opt, teacher) if opt.evaluate is True else opt.evaluate
    if opt.evaluate and not evaluated:
        parser.error(f'--evaluate: name a run, or a teacher by --{teacher}')
    if run := opt.resume or evaluated:
        stored = utils.read_checkpoint(run).get('options') or {}
        if stored and teacher not in stored:
            raise InputError(f'{run} is a run of the other script')
        kept = {k: stored[k] for k in vars(opt).keys() - FREE if stored.get(k) is not None}
        kept |= {'seed': [kept.get('seed', 0)]} | ({teacher: ''} if opt.evaluate else {})
        parser.set_defaults(**kept)
        opt = parser.parse_args(argv)
    opt.evaluate = evaluated
    if opt.resume and opt.overwrite:
        parser.error('--resume goes on with a run, --overwrite begins a new one')
    if opt.resume and not opt.save:
        opt.save = str(utils.find_checkpoint(opt.resume).parent)
    opt.seed = list(dict.fromkeys(opt.seed))  # each once
    if min(opt.batch_size, opt.epochs, opt.test_every, len(opt.seed)) < 1 or not opt.lr > 0:
        parser.error('must be above 0: --batch_size, --epochs, --test_every, --lr, count of --seed')
    if opt.tensorboard and not importlib.util.find_spec('tensorboard'):
        parser.error('--tensorboard: pip install tensorboard')
    parser.set_defaults(deterministic=bool(utils.uses_gradients(opt)))
    if opt.deterministic is None:
        opt.deterministic = parser.get_default('deterministic')
    if not opt.evaluate:
        utils.check_loss_options(parser, opt, teacher)
    return opt


def of_seed(parser: ArgumentParser, opt: Namespace, seed: int, network: str) -> Namespace:
    """The options of one seed: {seed} is replaced in all texts; --save gets its default name."""
    if len(opt.seed) > 1 and opt.save and '{seed}' not in opt.save:
        parser.error('several seeds need {seed} in --save')
    texts = {k: v.replace('{seed}', str(seed)) for k, v in vars(opt).items() if isinstance(v, str)}
    opt = Namespace(**vars(opt) | texts | {'seed': seed})
    named = {'dataset', 'net', 'seed', *utils.NETWORKS[opt.net].settings({})}
    data = Path(opt.dataroot).absolute().name if opt.dataset == 'folder' else opt.dataset
    words = [data, network]
    for name, value in vars(opt).items():
        if name not in FREE | named and value != parser.get_default(name):
            text = f'{value:g}' if isinstance(value, float) else Path(str(value)).name
            words.append(name + re.sub(r'[^\w.-]+', '-', text).strip('-'))
    opt.save = opt.save or f'logs/{"_".join([*words, f"seed{seed}"])}'
    return opt


def learning_rate(opt: Namespace, epoch: int) -> float:
    """The learning rate after `epoch` completed epochs."""
    return opt.lr * opt.lr_decay_ratio ** sum(epoch >= milestone for milestone in opt.epoch_step)


def beta_decay(opt: Namespace, epoch: int) -> float:
    """The factor of beta and factt. Section 4.1.1 lets them decay; how, is our choice."""
    t = epoch / opt.epochs
    return {'none': 1.0, 'step': learning_rate(opt, epoch) / opt.lr, 'linear': 1 - t,
            'cosine': (1 + math.cos(math.pi * t)) / 2}[opt.beta_decay]


# ------------------------------------------------------------------ processes, devices, ranks

@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the script with one line: status 2 after an InputError, 143 and 130 after a signal."""
    def leave(signum: int, frame: Any) -> None:  # at once: the last checkpoint is always complete
        line = b'stopped: a run goes on after its last checkpoint by the same command\n'
        os.write(2, b'\n' * sys.stderr.isatty() + line)  # a new line after the progress bar
        os._exit(128 + signum)

    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, leave)
    try:
        yield
    except InputError as e:
        sys.stderr.write(f'error: {" ".join(str(e).split())}\n')
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


def start(opt: Namespace) -> Place:
    """The device, rank and number of ranks. --ngpu N replaces this process by torchrun."""
    visible = torch.cuda.device_count()
    gpu = visible > 0 and opt.ngpu > 0
    ranks, local = os.environ.get('LOCAL_WORLD_SIZE'), int(os.environ.get('LOCAL_RANK', 0))
    n = int(ranks) if ranks else opt.ngpu if gpu else 1  # on this machine
    ids = opt.gpu_id or list(range(n))
    world = int(os.environ.get('WORLD_SIZE', n))
    if not gpu and (opt.cuda or opt.gpu_id or opt.ngpu > 1):
        raise InputError('--cuda, --gpu_id or --ngpu: there is no GPU to use')
    if gpu and (n != len(ids) or not {*ids} <= {*range(visible)}):
        raise InputError(f'--ngpu: {n} ranks on GPUs {ids}; {visible} are visible, from 0 on')
    if opt.capture and not (gpu and world == 1):
        raise InputError('--capture needs one GPU')
    if world > 1 and len(opt.seed) > 1:
        raise InputError('several seeds need one process')
    if n > 1 and not ranks:
        os.execv(sys.executable, [sys.executable, '-m', 'torch.distributed.run', '--standalone',
                                  '--nproc_per_node', str(n), *sys.argv])
    device = torch.device('cuda', ids[local]) if gpu else torch.device('cpu')
    if ranks:
        dist.init_process_group('nccl' if gpu else 'gloo', device_id=device if gpu else None,
                                timeout=timedelta(hours=2))  # rank 0 may download a data set
    place = Place(device, *((dist.get_rank(), dist.get_world_size()) if ranks else (0, 1)), [])
    if opt.batch_size % place.world:
        raise InputError(f'--batch_size {opt.batch_size} is no multiple of {place.world} ranks')
    set_up_torch(opt, device)
    return place


def set_up_torch(opt: Namespace, device: torch.device) -> None:
    """Precision, determinism and memory of the whole process."""
    torch.manual_seed(opt.seed[0])  # for layers that draw numbers; those here do not
    if opt.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS requires it
    torch.use_deterministic_algorithms(opt.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # all of it is written first
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TF32
    elif hasattr(libc := ctypes.CDLL(None), 'mallopt'):
        # glibc returns large freed blocks to the system, which zeroes their pages: a sixth of a
        # step's time. M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h keep them.
        libc.mallopt(-3, 2 ** 30) or libc.mallopt(-3, 2 ** 25)  # older glibc: 32 MiB at most
        libc.mallopt(-1, 2 ** 30)


def to_device(params: Params, device: torch.device, opt: Namespace) -> Params:
    """A copy on a device, in the type of --dtype; 4-D ones channels-last; requires_grad is kept."""
    moved, dtype = {}, torch.double if opt.dtype == 'double' else torch.float
    for name, p in params.items():
        layout = torch.channels_last if p.dim() == 4 else torch.contiguous_format
        t = p.detach().to(device, dtype, copy=True, memory_format=layout)
        moved[name] = torch.nn.Parameter(t) if p.requires_grad else t
    return moved


def read_image(path: str | Path) -> np.ndarray:
    """An image file as (H, W, 3) RGB uint8; its orientation tag is ignored. Raises InputError."""
    try:
        image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:  # for example more pixels than OpenCV takes
        image = None
    if image is None:
        what = 'not an image, or a damaged one' if Path(path).is_file() else 'there is no such file'
        raise InputError(f'{path}: {what}')
    return image


def image_folders(root: Path, test_names: tuple[str, ...], only_test: bool = False
                  ) -> tuple[list[str], Any, Any]:
    """The classes, (paths, labels) of train/, and those of the first of `test_names` that exists.

    With `only_test` train/ is not read: both parts are those for testing. Raises InputError.
    """
    from torchvision.datasets import ImageFolder  # imported here: it takes seconds
    test = next((name for name in test_names if (root / name).is_dir()), test_names[0])
    try:
        parts = [ImageFolder(root / name) for name in ['train'] * (not only_test) + [test]]
    except OSError as e:
        wanted = 'train/<class>/* and ' * (not only_test) + ' or '.join(test_names)
        raise InputError(f'{root.absolute()} must hold {wanted}/<class>/*: {e}') from None
    if parts[0].classes != parts[-1].classes or len(parts[0].classes) < 2:
        raise InputError(f'{root}: train/ and {test}/ must have the same classes, two or more')
    return parts[0].classes, *(([path for path, _ in part.samples], np.array(part.targets))
                               for part in (parts[0], parts[-1]))


# ------------------------------------------------------------------ a run's folder

def open_folder(opt: Namespace, place: Place) -> tuple[FileLock | None, dict | None]:
    """The lock of --save and its checkpoint, {} if new, None if finished. Raises InputError."""
    folder, lock = Path(opt.save), None
    try:
        if place.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / '.lock', timeout=10)  # workers of a killed run may hold it
            lock.acquire()
    except Timeout:
        raise InputError(f'{folder}: another process is training in this folder') from None
    except OSError as e:
        raise InputError(f'--save {folder}: {e.strerror}') from None
    path = own = folder / utils.CHECKPOINT
    if place.world > 1:
        found = [None] * place.world
        dist.all_gather_object(found, own.is_file())
        if len({*found}) > 1:
            raise InputError(f'--save {folder}: not all machines see the checkpoint in it')
    if (folder / 'log.txt').is_file() and not own.is_file() and not opt.overwrite:
        raise InputError(f'{folder}: its log has no checkpoint: another --save, or --overwrite')
    if opt.overwrite or not own.is_file():
        if not opt.resume:
            return lock, {}
        path = utils.find_checkpoint(opt.resume)
    state = utils.read_checkpoint(path)
    check_same_options(opt, state, path)
    if place.rank == 0:
        if path != own:
            write(own, lambda file: file.write(path.read_bytes()))
        write_log(folder, state['records'])
    if place.world > 1:
        dist.barrier()
    if len(state['records']) < opt.epochs:
        return lock, state
    say(f'{opt.save}: all {opt.epochs} epochs are done')
    return lock, None


def difference(opt: Namespace, stored: dict[str, Any]) -> str:
    """The first option that is not as stored, in words; '' if there is none.

    --epochs may grow, unless beta decays over all epochs. An option that `stored` does not know
    counts unless it is 0 or empty.
    """
    for name in [name for name in vars(opt) if name not in FREE]:
        old, new = stored.get(name), getattr(opt, name)
        longer = name == 'epochs' and new > old and opt.beta_decay in ('none', 'step')
        if old != new and not longer and (name in stored or new):
            return f'its --{name} is {old!r}, not {new!r}'
    return ''


def check_same_options(opt: Namespace, state: dict, path: Path) -> None:
    """Raises InputError if an option is not as in the checkpoint."""
    if not {'data', 'records', 'optimizer', 'options'} <= state.keys():
        raise InputError(f'{path}: of an earlier version or a file of weights, cannot go on: '
                         'choose another --save, or --overwrite')
    if words := difference(opt, state['options']):
        raise InputError(f'{path}: {words}: a run goes on only with its own options; another '
                         '--save, or --overwrite, begins anew')


def write(path: Path, content: Callable[[Any], Any]) -> None:
    """Replaces a file at once: content(file) writes it under a temporary name."""
    with open(f'{path}.tmp', 'wb') as file:
        content(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f'{path}.tmp', path)


def write_log(folder: Path, records: list[dict]) -> None:
    """Writes log.txt, a line of JSON an epoch."""
    lines = (f'json_stats: {json.dumps(record, allow_nan=False)}\n' for record in records)
    write(folder / 'log.txt', lambda file: file.write(''.join(lines).encode()))


class Run:
    """One seed's training: what its checkpoint holds, on its device."""

    def __init__(self, opt: Namespace, place: Place, params: Params, adapters: Params,
                 network: dict, data: dict, state: dict) -> None:
        self.opt, self.place, self.network, self.data = opt, place, network, data
        self.params, self.adapters = (to_device(p, place.device, opt) for p in (params, adapters))
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=opt.dtype == 'half')
        self.records, self.saved, self.events = [], -math.inf, None
        git = [shutil.which('git') or 'false', '-C', Path(__file__).parent, 'rev-parse', 'HEAD']
        self.commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        trained = [*trainable(self.params).values(), *self.adapters.values()]
        self.lr = torch.tensor(opt.lr, device=place.device,  # a tensor, for the CUDA graph
                               dtype=torch.float if place.device.type == 'cuda' else torch.double)
        self.optimizer = torch.optim.SGD(trained, opt.lr, momentum=0.9, fused=True,
                                         weight_decay=opt.weight_decay)
        self.optimizer.param_groups[0]['lr'] = self.lr  # SGD() would wait to check it
        for p in trained:  # fused SGD leaves them uninitialised if --dtype half skips a step
            self.optimizer.state[p]['momentum_buffer'] = torch.zeros_like(p)
        if not state:
            return
        # A run goes on with the same bits.
        if any(data.get(name) != value for name, value in state['data'].items()):
            raise InputError(f'{opt.save}: begun with other images or classes: see --dataroot')
        stored = state['params'] | state.get('adapters', {})
        for name, p in (self.params | self.adapters).items():
            p.detach().copy_(stored[name])
        self.optimizer.load_state_dict(state['optimizer'])
        self.optimizer.param_groups[0]['lr'] = self.lr
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state['scaler'])
        torch.set_rng_state(state['rng'])
        self.records = state['records']

    def save(self) -> None:
        """Writes model.pt7, the one source of truth, then log.txt, made from its records."""
        self.saved = time.monotonic()
        state = {'params': {k: p.detach().cpu() for k, p in self.params.items()},
                 'adapters': {k: p.detach().cpu() for k, p in self.adapters.items()},
                 'optimizer': self.optimizer.state_dict(), 'scaler': self.scaler.state_dict(),
                 'options': vars(self.opt), 'records': self.records, 'rng': torch.get_rng_state(),
                 'network': self.network, 'data': self.data}
        state = {k: v for k, v in state.items() if k not in ('adapters', 'scaler') or v}
        write(Path(self.opt.save, utils.CHECKPOINT), lambda file: torch.save(state, file))
        write_log(Path(self.opt.save), self.records)


# ------------------------------------------------------------------ a step

class Means:
    """Means of metrics over samples and ranks, summed in place without waiting for the device."""
    sums: Tensor | None = None  # of all metrics, one after another

    def add(self, metrics: dict[str, Tensor], n: int) -> None:
        """Adds means over n samples."""
        flat = torch.cat([v.detach().double().reshape(-1) for v in metrics.values()])
        if self.sums is None:
            self.shapes = {name: v.shape for name, v in metrics.items()}
            self.sums = torch.zeros_like(flat)
        self.sums.add_(flat, alpha=n)

    def result(self, part: str, count: int) -> dict[str, Any]:
        """Means over all ranks (`count` samples here); loss and accuracies are named `part`_…."""
        total = torch.cat([self.sums, torch.full_like(self.sums[:1], count)])
        if dist.is_initialized():
            dist.all_reduce(total)
        self.sums.zero_()
        parts = (total[:-1] / total[-1]).cpu().split([math.prod(s) for s in self.shapes.values()])
        return {f'{part}_{name}' if name in ('loss', 'acc', 'acc5') else name:
                mean.view(self.shapes[name]).tolist()
                for name, mean in zip(self.shapes, parts, strict=True)}


def autocast(f: Network, dtype: str, device: torch.device) -> Network:
    """The network in the type of --dtype; its parameters stay float32, except with double."""
    def run(x: Tensor, params: Params, training: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.autocast(device.type, AUTOCAST.get(dtype), enabled=dtype in AUTOCAST):
            return f(x.double() if dtype == 'double' else x, params, training)
    return run


def wants_compile(opt: Namespace, device: torch.device) -> bool:
    """--compile; by default on a GPU, where a C compiler is found."""
    if opt.compile is not None or device.type == 'cpu' or utils.uses_gradients(opt):
        return bool(opt.compile)
    if not (found := any(map(shutil.which, (os.environ.get('CC', 'cc'), 'gcc', 'clang')))):
        say('no C compiler is found: the step is not compiled, and slower')
    return found


def make_step(run: Run, f: Network, teacher: Model | None) -> tuple[Callable, Means]:
    """step(x, y, decay): objective, backward, SGD, never waiting for the device; and its means."""
    opt, (device, _, world, _), optimizer, scaler = run.opt, run.place, run.optimizer, run.scaler
    f, means = autocast(f, opt.dtype, device), Means()
    teacher = teacher and (autocast(teacher[0], opt.dtype, device), teacher[1])

    def forward(x: Tensor, y: Tensor, decay: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = utils.objective(f, run.params, teacher, x, y, opt, decay, run.adapters)
        return loss, {name: v.detach().double() for name, v in metrics.items()}

    if world > 1:  # averages the gradients of the ranks' means: the mean over the global batch
        trained = [*trainable(run.params).values(), *(run.adapters.values() if teacher else ())]
        module = torch.nn.Module()
        module.params, module.forward = torch.nn.ParameterList(trained), forward
        forward = torch.nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
    fast, compiled = forward, wants_compile(opt, device)
    if compiled:  # combo_kernels: independent small operations in one kernel
        fast = torch.compile(forward, dynamic=False,
                             options={'combo_kernels': device.type == 'cuda'})

    def step(x: Tensor, y: Tensor, decay: Tensor) -> None:
        full = len(y) == opt.batch_size // world  # a smaller last batch is not compiled, but eager
        torch.backends.cudnn.benchmark = full and not opt.deterministic
        optimizer.zero_grad()
        loss, metrics = (fast if full else forward)(x, y, decay)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        means.add(metrics, len(y))

    by_default = compiled and device.type == 'cuda' and world == 1
    capture = by_default if opt.capture is None else opt.capture
    return captured(step, opt.batch_size) if capture else step, means


def captured(step: Callable, batch_size: int) -> Callable:
    """`step`, captured in a CUDA graph after WARM_UP full batches; it changes tensors in place."""
    graph, inputs, seen = torch.cuda.CUDAGraph(), [], 0

    def run(*batch: Tensor) -> None:
        nonlocal seen
        if len(batch[0]) < batch_size or seen < WARM_UP:
            seen += len(batch[0]) == batch_size
            return step(*batch)
        if not inputs:
            inputs.extend(t.clone() for t in batch)
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(),
                                  capture_error_mode='thread_local'):  # loaders may pin memory
                step(*inputs)  # recorded, not computed
        for to, source in zip(inputs, batch, strict=True):
            to.copy_(source)
        return graph.replay()
    return run


# ------------------------------------------------------------------ epochs

@torch.no_grad()
def evaluate(f: Network, params: Params, data: Any, teacher: Model | None = None,
             opt: Namespace | None = None) -> dict[str, Any]:
    """test_loss, test_acc and test_acc5 (%), test_time (s); with a teacher map_similarity."""
    time_meter, means, count = TimeMeter(unit=False), Means(), 0
    torch.backends.cudnn.benchmark = False
    for x, y in data.test_batches():
        x = x.to(next(iter(params.values())).dtype)
        logits, groups = f(x, params, False)
        metrics = {'loss': F.cross_entropy(logits, y), **utils.accuracies(logits, y)}
        if teacher:
            _, t_groups = teacher[0](x, teacher[1], False)
            metrics['map_similarity'] = utils.map_similarity(groups, t_groups, opt.mapping,
                                                             opt.power)
        means.add(metrics, len(y))
        count += len(y)
    return means.result('test', count) | {'test_time': time_meter.value()}


def test(opt: Namespace, place: Place, data: Any, teacher: str) -> None:
    """Prints the test error of --evaluate and, with a teacher, how similar their maps are."""
    names = [opt.evaluate] if teacher in ('', opt.evaluate) else [opt.evaluate, teacher]
    networks = [utils.load_network(name) for name in names]
    utils.check_classes(opt.evaluate, networks[0][2], data.info['classes'])
    (f, params), *other = [(f, to_device(p, place.device, opt)) for f, p, _ in networks]
    result = evaluate(f, params, data, *other, opt=opt)
    say(f'{opt.evaluate}: {errors(result)}, loss {result["test_loss"]:.4f}')
    if other:
        values = ', '.join(f'{v:.4f}' for v in result['map_similarity'])
        say(f'cosine similarity of its maps with those of {teacher}, group by group: {values}')


def prepare_teacher(opt: Namespace, name: str, f: Network, params: Params, data: Any,
                    place: Place) -> tuple[Model | None, Params]:
    """The teacher on the device, tested, or None; and F-ActT's adapters. Raises InputError."""
    classes, size = data.info['classes'], data.info['size']
    if not name:
        return None, utils.check_networks(opt, f, params, None, size)
    *teacher, state = utils.load_network(name)
    if opt.alpha or opt.grad_at:
        utils.check_classes(f'the teacher {name}', state, classes)
    adapters = utils.check_networks(opt, f, params, teacher, size)
    teacher = teacher[0], to_device(teacher[1], place.device, opt)
    if opt.check_teacher and state['network']['num_classes'] == len(classes):
        result = errors(evaluate(*teacher, data))
        say(f'teacher {name}, {utils.label_of(state["network"])}: {result}')
    return teacher, adapters


def train(run: Run, f: Network, teacher: Model | None, data: Any) -> Iterator[None]:
    """Trains the remaining epochs; yields after each step. Raises Diverged."""
    opt, place, steps = run.opt, run.place, {}
    while (epoch := len(run.records)) < opt.epochs:
        time_meter, lr = TimeMeter(unit=False), learning_rate(opt, epoch)
        run.lr.fill_(lr)
        decay = torch.tensor(beta_decay(opt, epoch), device=place.device)
        first, end = opt.at_epochs or (0, opt.epochs)
        now = teacher if first <= epoch < end else None
        if bool(now) not in steps:
            steps[bool(now)] = make_step(run, f, now)
        (step, means), sharing = steps[bool(now)], []
        with tqdm(total=data.n_train, desc=f'epoch {epoch + 1}/{opt.epochs}', unit='img',
                  leave=False, disable=True if place.rank else None) as bar:
            for x, y in data.train_batches(epoch):
                step(x, y, decay)
                bar.update(len(y) * place.world)
                sharing.append(len(place.runs))
                yield
        metrics = means.result('train', data.n_train // place.world)
        metrics['train_time'] = time_meter.value() * len(sharing) / sum(sharing)  # its share
        for t in utils.moving_statistics(run.params) if place.world > 1 else ():
            dist.all_reduce(t)
            t /= place.world
        if (epoch + 1) % opt.test_every == 0 or epoch + 1 == opt.epochs:
            metrics |= evaluate(f, run.params, data)
        finish_epoch(run, epoch + 1, lr, metrics)
    say(f'{opt.save}: all {opt.epochs} epochs are done')


def finish_epoch(run: Run, epoch: int, lr: float, metrics: dict[str, Any]) -> None:
    """Adds the epoch's record, saves, prints. Raises Diverged."""
    opt = run.opt
    finite = torch.stack([p.isfinite().all() for p in (run.params | run.adapters).values()])
    if not (math.isfinite(metrics['train_loss'] + metrics.get('test_loss', 0)) and finite.all()):
        raise Diverged(f'{opt.save}: diverged in epoch {epoch}: try a lower --lr, with another '
                       '--save or --overwrite')
    device = torch.cuda.get_device_name(run.place.device) if run.place.device.type == 'cuda' else \
        f'CPU with {torch.get_num_threads()} threads'
    record = vars(opt) | {'epoch': epoch, 'lr': lr} | metrics | {
        'network': utils.label_of(run.network), 'num_classes': run.network['num_classes'],
        'n_parameters': sum(p.numel() for p in trainable(run.params).values()),
        'device': f'{run.place.world} × {device}', 'torch': str(torch.__version__),
        'commit': run.commit}
    run.records.append(record)
    if run.place.rank == 0:
        if time.monotonic() - run.saved >= SAVE_SECONDS or epoch == opt.epochs:
            run.save()
        if opt.tensorboard:
            write_events(run, epoch, metrics | {'lr': lr})
    tested = f'; {errors(metrics)}, {metrics["test_time"]:.1f} s' if 'test_acc' in metrics else ''
    say(f'{opt.save}: epoch {epoch}/{opt.epochs}: lr {lr:g}, train loss '
        f'{metrics["train_loss"]:.4f}, train error {100 - metrics["train_acc"]:.2f}%, '
        f'{metrics["train_time"]:.1f} s{tested}')


def step_in_turn(place: Place) -> None:
    """Steps the runs in turn, each on its own CUDA stream. One that diverges ends alone."""
    gpu, status = place.device.type == 'cuda', 0
    if gpu:
        torch.cuda.synchronize()  # data and parameters are on the device
    streams = {run: torch.cuda.Stream() if gpu else None for run in place.runs}  # None: no change
    while place.runs:
        for run in list(place.runs):
            try:
                with torch.cuda.stream(streams[run]):
                    ended = next(run, True)  # None after a step
            except Diverged as e:
                print(e, file=sys.stderr)
                ended, status = True, 1
            if ended:
                place.runs.remove(run)
    if status:
        sys.exit(status)


def write_events(run: Run, epoch: int, metrics: dict[str, Any]) -> None:
    """Writes an epoch's metrics for TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter  # imported here: it takes seconds
    run.events = run.events or SummaryWriter(run.opt.save, purge_step=epoch)
    for name, value in metrics.items():
        for i, v in enumerate(value if isinstance(value, list) else [value]):
            run.events.add_scalar(f'{name}/{i}' if isinstance(value, list) else name, v, epoch)
    run.events.flush()


def errors(metrics: dict[str, Any]) -> str:
    """The test errors in words."""
    top5 = f' (top-5 {100 - metrics["test_acc5"]:.2f}%)' if 'test_acc5' in metrics else ''
    return f'test error {100 - metrics["test_acc"]:.2f}%{top5}'
