"""Data loader workers: starts them, waits for them with a time limit, and ends them."""
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from training.distributed import TIMEOUT
from training.errors import InputError, RunError, time_limit


def start_worker(_: int) -> None:
    """Keeps a worker alive after signals to all processes, until the training process ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))  # ends it in 20 s, after the save
    torch.set_num_threads(1)


def make_loader(data: Dataset, batches: Iterable[list], collate: Callable[[list], Any],
                workers: int, pin_memory: bool) -> DataLoader:
    """A DataLoader over `batches`, lists of keys of `data`. `workers` 0: read in this process."""
    warnings.filterwarnings('ignore', 'This DataLoader will create')  # more workers than cores
    cv2.setNumThreads(0)  # OpenCV's threads do not survive the fork: a worker would hang
    return DataLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=workers,
                      worker_init_fn=start_worker, pin_memory=pin_memory,
                      persistent_workers=workers > 0, prefetch_factor=4 if workers else None)


def read_batches(loader: DataLoader) -> Iterator[Any]:
    """The loader's batches. Raises RunError if a worker does not start, ends, or does not answer.

    Also raises an InputError that stands in place of a batch. DataLoader's own timeout does not
    cover the transfer of a batch from a worker.
    """
    batches, end = None, object()
    while True:
        try:
            with time_limit(TIMEOUT, 'the workers that read images have not answered'):
                batches = batches or iter(loader)
                samples = next(batches, end)
        except (OSError, EOFError) as e:  # of the workers: a bad image is an InputError in a batch
            sys.unraisablehook = lambda _: None  # no messages on workers that have half started
            kill(multiprocessing.active_children())
            raise RunError(f'--nthread {loader.num_workers}: a worker that reads images does not '
                           f'start, or has ended: {e}') from None
        if samples is end:
            return
        if isinstance(samples, InputError):
            raise samples
        yield samples


def end_workers(loaders: Iterable[DataLoader]) -> None:
    """Ends the workers now, because the garbage collector may do it late, and wait for them."""
    for loader in loaders:
        if loader.num_workers and loader._iterator is not None:
            loader._iterator._shutdown_workers()
            kill(loader._iterator._workers)  # a suspended worker (SIGSTOP) is still alive


def kill(processes: Iterable[BaseProcess]) -> None:
    for process in processes:
        process.kill()
        process.join(5)
