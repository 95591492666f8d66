"""Devices and ranks: chooses GPUs, starts a process for each, and connects the processes."""
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
from training.errors import RunError, first_line, one_line_errors, print_line
from weights import InputError

TIMEOUT = 600  # seconds to wait for a data loader worker, or for another rank
# The environment variables that torchrun sets for each rank, and their defaults ('': required).
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
            print_line(text)

    def barrier(self) -> None:
        """Waits until all ranks have called it."""
        if self.world > 1:
            dist.barrier(group=self.control)

    def long_barrier(self, seconds: int) -> Callable[[], None]:
        """Returns a barrier with a timeout of its own. All ranks must call this and the barrier."""
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
        """This rank's shard of a batch (B,), and the number of samples in it.

        An empty shard becomes one placeholder sample with number 0, because every rank must take
        part in the collective operations.
        """
        shard = batch.tensor_split(self.world)[self.rank]
        return (shard, len(shard)) if len(shard) else (batch[:1], 0)


# ---------------------------------------------------------------------------- devices

def choose_devices(opt: argparse.Namespace) -> list[torch.device]:
    """The devices that the options ask for. Raises InputError if the machine lacks them."""
    n_gpus = torch.cuda.device_count()
    if opt.cuda and not (n_gpus and opt.ngpu):
        why = '--cuda contradicts --ngpu 0' if n_gpus else '--cuda: there is no GPU to use'
        raise InputError(why)
    if opt.gpu_id and (max(opt.gpu_id) >= n_gpus or not opt.ngpu):
        raise InputError(f'--gpu_id {",".join(map(str, opt.gpu_id))}: there are {n_gpus} GPUs '
                         f'(the first is 0), and --ngpu is {opt.ngpu}')
    ids = opt.gpu_id or list(range(n_gpus))
    if opt.ngpu > max(1, len(ids)):
        what = 'ids in --gpu_id' if opt.gpu_id else 'GPUs'
        raise InputError(f'--ngpu {opt.ngpu}: there are {len(ids)} {what}')
    return [torch.device('cuda', i) for i in ids[:opt.ngpu]] or [torch.device('cpu')]


def set_up_device(device: torch.device, opt: argparse.Namespace) -> None:
    """Seeds torch and chooses precision and algorithms, for the whole process."""
    torch.manual_seed(opt.seed)  # for layers that draw random numbers; those here do not
    if opt.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS requires it
    torch.use_deterministic_algorithms(opt.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # this code never reads it
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision('high')  # TF32
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = not opt.deterministic
    elif sys.platform == 'linux':
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Makes the C library keep the memory of freed tensors.

    By default glibc returns large blocks to the system, which zeroes their pages in each step.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', lambda *_: 0)  # not in every C library
    # Older glibc takes at most 32 MiB. One threshold without the other would be slower.
    if mallopt(mmap_threshold, 2 ** 30) or mallopt(mmap_threshold, 2 ** 25):
        mallopt(trim_threshold, 2 ** 30)


# ---------------------------------------------------------------------------- processes

def launch(work: Callable[[Rank], None], opt: argparse.Namespace) -> None:
    """Runs work(rank) on the devices of the options.

    On one device, or in a process that torchrun started, the work runs in this process. For several
    GPUs torchrun's launcher starts this script once per GPU.
    """
    devices = choose_devices(opt)
    if not RANK_VARIABLES.keys() & os.environ.keys() and len(devices) > 1:
        start_ranks(len(devices), opt)
        return
    local, rank, world = rank_from_environment()
    ids = opt.gpu_id or range(torch.cuda.device_count())
    device = devices[0]
    if device.type == 'cuda' and 'LOCAL_RANK' in os.environ:
        if local >= len(ids):
            raise InputError(f'torchrun starts more processes than there are GPUs here, {len(ids)}')
        device = torch.device('cuda', ids[local])
    set_up_device(device, opt)
    if world == 1:
        work(Rank(device))
        return
    nccl, limit = device.type == 'cuda', timedelta(seconds=TIMEOUT)
    try:
        # NCCL kills a process after its timeout, so the control group must time out earlier.
        dist.init_process_group('nccl' if nccl else 'gloo', timeout=2 * limit if nccl else limit,
                                device_id=device if nccl else None)
        with one_line_errors():
            work(Rank(device, rank, world, dist.new_group(backend='gloo', timeout=limit)))
    except RuntimeError as e:
        raise_rank_error(e, rank)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rank_from_environment() -> tuple[int, int, int]:
    """(LOCAL_RANK, RANK, WORLD_SIZE) as torchrun sets them; (0, 0, 1) if none is set.

    Raises InputError if they are incomplete or inconsistent.
    """
    if not RANK_VARIABLES.keys() & os.environ.keys():
        return 0, 0, 1
    found = {name: os.environ.get(name, value) for name, value in RANK_VARIABLES.items()}
    numbers = [int(v) if re.fullmatch(r'\d{1,9}', v) else -1 for v in found.values()]
    local, rank, world, local_world = numbers
    port = os.environ.get('MASTER_PORT', '')
    reachable = os.environ.get('MASTER_ADDR') and re.fullmatch(r'\d{1,5}', port) \
        and 0 < int(port) < 2 ** 16
    if min(numbers) < 0 or max(local, rank) >= world or not 0 < local_world <= world \
            or not (world == 1 or reachable):
        names = (*found, 'MASTER_ADDR', 'MASTER_PORT')
        values = ', '.join(f'{n}={os.environ[n]}' if n in os.environ else f'no {n}' for n in names)
        raise InputError(f'wrong or missing environment variables of torchrun: {values}')
    return local, rank, world


def raise_rank_error(e: RuntimeError, rank: int) -> NoReturn:
    """Turns the error of a lost or unreachable rank into a RunError; raises any other again."""
    late = re.search('timed out|timeout', str(e), re.IGNORECASE)
    if isinstance(e, dist.DistNetworkError) and not late and 'by peer' not in str(e):
        lost = RunError(f'rank {rank}: {first_line(e)}')  # for example, the port is in use
    elif late or isinstance(e, dist.DistError):
        time.sleep(min(rank, 30))  # rank 0 reports first: the launcher then ends the other ranks
        lost = RunError(f'rank {rank}: another rank does not answer')
    elif 'by peer' in str(e):
        time.sleep(30)  # meanwhile the launcher reports the ended rank, and ends this one
        lost = RunError(f'rank {rank}: another rank has ended')
    else:
        raise e
    lost.__notes__ = getattr(e, '__notes__', [])
    raise lost from None


def start_ranks(n: int, opt: argparse.Namespace) -> None:
    """Starts this script n times, as the ranks of one run on this machine, and waits for them.

    If a rank fails, the others are ended, and this process exits with the failed rank's status (1
    if a signal killed it). A signal to stop is passed on to all ranks.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    logging.disable()  # no messages of torchrun
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=n, rdzv_backend='c10d',
                          rdzv_endpoint='localhost:0', run_id=str(os.getpid()), max_restarts=0,
                          monitor_interval=0.1)
    try:
        elastic_launch(config, sys.executable)('-u', *sys.argv)
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        if failure.exitcode > 0:
            raise SystemExit(failure.exitcode) from None
        how = f'; continue with --resume {opt.save}' if opt.save else ''
        raise RunError(f'rank {rank} was killed by signal {-failure.exitcode}: the others were '
                       f'ended{how}') from None
    except SignalException as e:  # the ranks got the signal, too, and have ended
        raise SystemExit(128 + e.sigval) from None
    finally:
        logging.disable(logging.NOTSET)


# ---------------------------------------------------------------------------- data-parallel

class Parallel(torch.nn.Module):
    """Wraps `function` and its parameters as a module, which DistributedDataParallel requires."""

    def __init__(self, function: Callable, params: Params) -> None:
        super().__init__()
        self.function = function
        self.params = torch.nn.ParameterList(params.values())

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def data_parallel(function: Callable, params: Params, rank: Rank) -> Callable:
    """`function`, wrapped so that backward averages the gradients of `params` over the ranks."""
    if rank.world == 1:
        return function
    ids = [rank.device.index] if rank.device.type == 'cuda' else None
    return torch.nn.parallel.DistributedDataParallel(Parallel(function, params), device_ids=ids)


def moving_statistics(params: Params) -> list[Tensor]:
    """The running statistics of batch norm that is not frozen."""
    return [t for name, t in params.items() if name.endswith(STATISTICS)
            and params[f'{name.rpartition(".")[0]}.weight'].requires_grad]


def average_statistics(params: Params, rank: Rank) -> None:
    """Averages the running statistics of batch norm that is not frozen over the ranks, in place."""
    statistics = moving_statistics(params)
    if rank.world > 1 and statistics:
        mean = rank.sum(torch.cat(statistics)) / rank.world
        parts = mean.split([len(t) for t in statistics])
        for tensor, value in zip(statistics, parts, strict=True):
            tensor.copy_(value)


def to_device(params: Params, device: torch.device, double: bool = False) -> Params:
    """A copy of the parameters on a device, 4-D ones channels-last; requires_grad is kept."""
    moved = {}
    for name, p in params.items():
        layout = torch.channels_last if p.dim() == 4 else torch.contiguous_format
        dtype = torch.double if double else p.dtype
        t = p.detach().to(device, dtype, copy=True, memory_format=layout)
        moved[name] = torch.nn.Parameter(t) if p.requires_grad else t
    return moved
