"""Devices and ranks: which GPUs to use, starting a process for each, and what ranks share."""
import argparse
import ctypes
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from resnet import STATISTICS, Params
from training.errors import RunError, first_line, input_errors, say
from weights import InputError

TIMEOUT = 600  # seconds after which a worker or another rank that does not answer counts as stuck
# What torchrun sets for each rank, with the value that counts where it is missing.
RANK_VARIABLES = {'LOCAL_RANK': '0', 'RANK': '', 'WORLD_SIZE': '', 'LOCAL_WORLD_SIZE': '1'}


@dataclass(frozen=True)
class Rank:
    """One process of a run: its device, and its rank among `world` processes."""
    device: torch.device
    rank: int = 0
    world: int = 1
    control: Any = None  # gloo group for control messages, so that they never synchronise a GPU

    def __str__(self) -> str:
        if self.device.type == 'cuda':
            return f'{self.world} × {torch.cuda.get_device_name(self.device)}'
        return f'{self.world} × CPU with {torch.get_num_threads()} threads'

    def print(self, text: str) -> None:
        """Prints on rank 0."""
        if self.rank == 0:
            say(text)

    def barrier(self) -> None:
        """Waits until all ranks are here."""
        if self.world > 1:
            dist.barrier(group=self.control)

    def long_barrier(self, seconds: int) -> Callable[[], None]:
        """A barrier that waits longer than TIMEOUT. All ranks call this, and then what it gives."""
        if self.world == 1:
            return lambda: None
        group = dist.new_group(backend='gloo', timeout=timedelta(seconds=seconds))
        return partial(dist.barrier, group=group)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.world == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.control)
        return bool(flags)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def shard(self, batch: Tensor) -> tuple[Tensor, int]:
        """This rank's shard of a batch (B,), and its size.

        A rank without samples gets one placeholder and size 0: it must join the collectives.
        """
        shard = batch.tensor_split(self.world)[self.rank]
        return (shard, len(shard)) if len(shard) else (batch[:1], 0)


# ---------------------------------------------------------------------------- devices

def choose_devices(opt: argparse.Namespace) -> list[torch.device]:
    """The devices that the options ask for. Raises InputError if they are not there."""
    there = torch.cuda.device_count()
    if opt.cuda and not (there and opt.ngpu):
        why = '--cuda contradicts --ngpu 0' if there else '--cuda: there is no GPU to use'
        raise InputError(why)
    if opt.gpu_id and (max(opt.gpu_id) >= there or not opt.ngpu):
        raise InputError(f'--gpu_id {",".join(map(str, opt.gpu_id))}: there are {there} GPUs, '
                         f'counted from 0, and --ngpu is {opt.ngpu}')
    ids = opt.gpu_id or list(range(there))
    if opt.ngpu > max(1, len(ids)):
        what = 'ids in --gpu_id' if opt.gpu_id else 'GPUs'
        raise InputError(f'--ngpu {opt.ngpu}: there are {len(ids)} {what}')
    return [torch.device('cuda', i) for i in ids[:opt.ngpu]] or [torch.device('cpu')]


def set_up_device(device: torch.device, opt: argparse.Namespace) -> None:
    """Seeds torch and chooses precision and algorithms, for the whole process."""
    torch.manual_seed(opt.seed)  # nothing here draws from it; what somebody adds to a network may
    if opt.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS asks for it
    torch.use_deterministic_algorithms(opt.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads such memory
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TF32
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = not opt.deterministic
    elif sys.platform == 'linux':
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Makes the C library keep the memory of freed tensors.

    By default glibc returns large blocks, and the system clears their pages anew for each step.
    """
    trim_threshold, mmap_threshold = -1, -3  # names of mallopt(3), from malloc.h
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', lambda *_: 0)  # not in every C library
    # Older ones take no more than 32 MiB; one threshold without the other would make matters worse.
    if mallopt(mmap_threshold, 2 ** 30) or mallopt(mmap_threshold, 2 ** 25):
        mallopt(trim_threshold, 2 ** 30)


# ---------------------------------------------------------------------------- processes

def launch(work: Callable[[Rank], None], opt: argparse.Namespace, argv: list[str]) -> None:
    """Runs work(rank) on the devices of the options; `argv` is the script's command line.

    On one device, and as a rank that torchrun started, it runs here. For several GPUs it starts
    this script once for each, through torchrun's own launcher.
    """
    devices = choose_devices(opt)
    if not RANK_VARIABLES.keys() & os.environ.keys() and len(devices) > 1:
        start_ranks(len(devices), opt, argv)
        return
    local, rank, world = ranks_given()
    ids = opt.gpu_id or range(torch.cuda.device_count())
    device = devices[0]
    if device.type == 'cuda' and 'LOCAL_RANK' in os.environ:
        if local >= len(ids):
            raise InputError(f'torchrun starts more processes here than the {len(ids)} GPUs')
        device = torch.device('cuda', ids[local])
    set_up_device(device, opt)
    if world == 1:
        work(Rank(device))
        return
    nccl, limit = device.type == 'cuda', timedelta(seconds=TIMEOUT)
    try:
        # NCCL ends a process that waits too long by a signal: control messages are to notice first.
        dist.init_process_group('nccl' if nccl else 'gloo', timeout=2 * limit if nccl else limit,
                                device_id=device if nccl else None)
        with input_errors():
            work(Rank(device, rank, world, dist.new_group(backend='gloo', timeout=limit)))
    except RuntimeError as e:
        raise_lost(e, rank)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def ranks_given() -> tuple[int, int, int]:
    """LOCAL_RANK, RANK and WORLD_SIZE, as torchrun sets them; without them 0, 0, 1.

    Raises InputError for what torchrun would not set.
    """
    if not RANK_VARIABLES.keys() & os.environ.keys():
        return 0, 0, 1
    found = {name: os.environ.get(name, other) for name, other in RANK_VARIABLES.items()}
    numbers = [int(v) if re.fullmatch(r'\d{1,9}', v) else -1 for v in found.values()]
    local, rank, world, here = numbers
    port = os.environ.get('MASTER_PORT', '')
    reachable = os.environ.get('MASTER_ADDR') and re.fullmatch(r'\d{1,5}', port) \
        and 0 < int(port) < 2 ** 16
    if min(numbers) < 0 or max(local, rank) >= world or not 0 < here <= world \
            or not (world == 1 or reachable):
        names = (*found, 'MASTER_ADDR', 'MASTER_PORT')
        there = ', '.join(f'{n}={os.environ[n]}' if n in os.environ else f'no {n}' for n in names)
        raise InputError(f'not the variables of a rank, as torchrun sets them: {there}')
    return local, rank, world


def raise_lost(e: RuntimeError, rank: int) -> NoReturn:
    """Raises RunError if another rank is lost, or cannot be reached; else the error again."""
    late = re.search('timed out|timeout', str(e), re.IGNORECASE)
    if isinstance(e, dist.DistNetworkError) and not late and 'by peer' not in str(e):
        lost = RunError(f'rank {rank}: {first_line(e)}')  # as a port that is taken
    elif late or isinstance(e, dist.DistError):
        time.sleep(min(rank, 30))  # the first rank to say so has all others ended
        lost = RunError(f'rank {rank}: another rank has not answered for {TIMEOUT} s')
    elif 'by peer' in str(e):
        time.sleep(30)  # whoever started the ranks says why one has ended, and ends this one
        lost = RunError(f'rank {rank}: another rank has ended')
    else:
        raise e
    lost.__notes__ = getattr(e, '__notes__', [])
    raise lost from None


def start_ranks(n: int, opt: argparse.Namespace, argv: list[str]) -> None:
    """Starts this script n times, as ranks of a run on this machine, and waits for them.

    If one fails the others are ended, and this ends with its exit status. A signal to stop goes to
    all of them.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    logging.disable()  # the one line is ours
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=n, rdzv_backend='c10d',
                          rdzv_endpoint='localhost:0', run_id=str(os.getpid()), max_restarts=0,
                          monitor_interval=0.1)
    try:
        elastic_launch(config, sys.executable)('-u', sys.argv[0], *argv)
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        if failure.exitcode > 0:
            raise SystemExit(failure.exitcode) from None
        how = f'; go on with --resume {opt.save}' if opt.save else ''
        raise RunError(f'rank {rank} was killed by signal {-failure.exitcode}: the others are '
                       f'ended{how}') from None
    except SignalException as e:  # the ranks have had it, too, and have ended
        raise SystemExit(128 + e.sigval) from None
    finally:
        logging.disable(logging.NOTSET)


# ---------------------------------------------------------------------------- data-parallel

class Parallel(torch.nn.Module):
    """A module that owns the parameters, as DistributedDataParallel wants; it calls `function`."""

    def __init__(self, function: Callable, params: Params) -> None:
        super().__init__()
        self.function = function
        self.params = torch.nn.ParameterList(params.values())

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def data_parallel(function: Callable, params: Params, rank: Rank) -> Callable:
    """`function`, so that backward gives `params` their mean gradients over the ranks."""
    if rank.world == 1:
        return function
    ids = [rank.device.index] if rank.device.type == 'cuda' else None
    return torch.nn.parallel.DistributedDataParallel(Parallel(function, params), device_ids=ids)


def moving_statistics(params: Params) -> list[Tensor]:
    """The running statistics of batch norm that is not frozen."""
    return [t for name, t in params.items() if name.endswith(STATISTICS)
            and params[f'{name.rpartition(".")[0]}.weight'].requires_grad]


def average_statistics(params: Params, rank: Rank) -> None:
    """Makes the running statistics of batch norm their mean over the ranks."""
    statistics = moving_statistics(params)
    if rank.world > 1 and statistics:
        mean = rank.sum(torch.cat(statistics)) / rank.world
        parts = mean.split([len(t) for t in statistics])
        for tensor, value in zip(statistics, parts, strict=True):
            tensor.copy_(value)


def to_device(params: Params, device: torch.device, double: bool = False) -> Params:
    """A copy of the parameters on a device, filters channels-last; gradients required as before."""
    moved = {}
    for name, p in params.items():
        layout = torch.channels_last if p.dim() == 4 else torch.contiguous_format
        dtype = torch.double if double else p.dtype
        t = p.detach().to(device, dtype, copy=True, memory_format=layout)
        moved[name] = torch.nn.Parameter(t) if p.requires_grad else t
    return moved
