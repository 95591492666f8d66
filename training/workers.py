"""Workers of a DataLoader: starting them, waiting with a time limit, ending them."""
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
from training.errors import RunError, time_limit


def start_worker(_: int) -> None:
    """Lets a worker outlive signals to all processes: the training process decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))  # time for a last step, and saving
    torch.set_num_threads(1)


def make_loader(data: Dataset, batches: Iterable[list], collate: Callable[[list], Any],
                workers: int, pin_memory: bool) -> DataLoader:
    """Reads batches, lists of keys of `data`, in this many processes; 0: in this one."""
    warnings.filterwarnings('ignore', 'This DataLoader will create')  # --nthread is a choice
    cv2.setNumThreads(0)  # before it forks: a worker would wait for threads that it lacks
    return DataLoader(data, batch_sampler=batches, collate_fn=collate, num_workers=workers,
                      worker_init_fn=start_worker, pin_memory=pin_memory,
                      persistent_workers=workers > 0, prefetch_factor=4 if workers else None)


def read_all(loader: DataLoader) -> Iterator[Any]:
    """The loader's batches. Raises RunError if a worker does not start, ends, or does not answer.

    The loader's own limit on waiting does not cover the opening of what a worker sends.
    """
    batches, end = None, object()
    while True:
        try:
            with time_limit(TIMEOUT, 'the workers that read images have not answered'):
                batches = batches or iter(loader)
                samples = next(batches, end)
        except (OSError, EOFError) as e:  # not of an image: that is an InputError among the samples
            sys.unraisablehook = lambda _: None  # torch complains of what is half started
            kill(multiprocessing.active_children())
            raise RunError(f'--nthread {loader.num_workers}: a worker that reads images does not '
                           f'start, or has ended: {e}') from None
        if samples is end:
            return
        yield samples


def end_workers(loaders: Iterable[DataLoader]) -> None:
    """Ends the workers now: the garbage collector may be too late, and wait for them."""
    for loader in loaders:
        if loader.num_workers and loader._iterator is not None:
            loader._iterator._shutdown_workers()
            kill(loader._iterator._workers)  # a suspended one (SIGSTOP) does not end when told to


def kill(processes: Iterable[BaseProcess]) -> None:
    for process in processes:
        process.kill()
        process.join(5)
