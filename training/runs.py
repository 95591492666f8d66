"""A run's folder: its lock, its checkpoint with the log in it, and going on from there.

The checkpoint is the one source of truth. `log.txt` is written from the records in it, after it.
"""
import argparse
import hashlib
import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torchnet.meter import AverageValueMeter

from resnet import Params, trainable
from training.distributed import Rank, average_statistics
from training.errors import one_line
from utils import ADAPTER
from weights import CHECKPOINT, InputError, find_checkpoint, read_checkpoint

LOG = 'log.txt'
LOCK = '.lock'
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
STOP_CHECK = 10     # steps after which ranks ask each other whether one was told to stop
FINITE_CHECK = 50   # steps between checks of the loss; each sees it as it was at the one before
SAVE_SECONDS = 30   # at least, between the checkpoints of two epochs
# Entries of a log's record that others compute with, by type. They may be missing.
LOG_NUMBERS = ('epoch', 'epochs', 'seed', 'depth', 'width', 'lr', 'power', 'train_fraction',
               'test_fraction', 'train_time', 'test_time', 'train_acc', 'train_acc5', 'test_acc',
               'test_acc5')
LOG_TEXTS = ('net', 'network', 'dataset', 'mapping', 'teacher_id', 'teacher_params')


# ---------------------------------------------------------------------------- files

def write_whole(files: dict[Path, bytes]) -> None:
    """Replaces these files, in order, so that each is whole at every moment, old or new.

    All are on the disk under temporary names before the first is replaced.
    """
    temporary = {path: path.with_name(f'{path.name}.{os.getpid()}.tmp') for path in files}
    try:
        for path, content in files.items():
            temporary[path].unlink(missing_ok=True)
            with open(temporary[path], 'xb') as file:  # x: not through a link that is there
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


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps every other process from training in `folder`, which is made if need be.

    Raises InputError if another process does. The system drops the lock when its process ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=1)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f'{folder}: another process trains there') from None
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether a process trains in `folder`."""
    if not (folder / LOCK).is_file():
        return False
    try:
        FileLock(folder / LOCK, timeout=0).acquire().lock.release()
    except Timeout:
        return True
    return False


def check_writable(option: str, folder: Path) -> None:
    """Raises InputError, about the option, if a folder cannot be written to, or made."""
    there = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f'{option} {folder}: {there} is not a folder that can be written to')


def resumes_in_place(opt: argparse.Namespace) -> bool:
    """Whether a resumed run replaces the checkpoint that it comes from."""
    own = (Path(opt.save) / CHECKPOINT).resolve()
    return bool(opt.resume) and find_checkpoint(opt.resume).resolve() == own


def check_save(opt: argparse.Namespace) -> None:
    """Raises InputError if --save cannot be written, or already holds a run that is to be kept.

    A folder that has a log and no checkpoint holds no run.
    """
    folder = Path(opt.save)
    if not (opt.overwrite or resumes_in_place(opt)) and (folder / CHECKPOINT).exists():
        raise InputError(f'{folder} already holds a run: continue it with --resume {folder}, '
                         'replace it with --overwrite, or choose another --save')
    check_writable('--save', folder)
    for name in (LOG, CHECKPOINT, LOCK):
        if (folder / name).exists() and not (folder / name).is_file():
            raise InputError(f'--save {folder}: {folder / name} is in the way')


# ---------------------------------------------------------------------------- the log

def well_formed(record: Any) -> bool:
    """Whether this is an epoch's record, and what others compute with in it has a sound value."""
    if not isinstance(record, dict) or type(record.get('epoch')) is not int:
        return False
    numbers, texts = ([record.get(name) for name in names] for names in (LOG_NUMBERS, LOG_TEXTS))
    sound = all(v is None or (type(v) in (int, float) and not abs(v) > 1e30) for v in numbers)
    return sound and all(isinstance(v, str | None) for v in texts)


def read_log(path: Path) -> list[dict]:
    """The records of a log.txt, one an epoch; other lines are left out. NaN of old logs is read."""
    records = []
    for line in path.read_text(errors='replace').splitlines() if path.is_file() else []:
        try:
            record = json.loads(line.partition('json_stats: ')[2])
        except (ValueError, RecursionError):
            continue
        if well_formed(record):
            records.append(record)
    return records


def finite(value: Any) -> Any:
    """A value of a record for JSON: None for a number that is not finite."""
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def log_text(records: list[dict]) -> bytes:
    """A whole log.txt: a line of valid JSON for each record."""
    lines = (json.dumps(record, allow_nan=False) for record in records)
    return ''.join(f'json_stats: {line}\n' for line in lines).encode()


class Totals:
    """Sums of figures over the samples of an epoch, on the device; nothing waits for a GPU."""

    def __init__(self) -> None:
        self.count = 0                          # samples so far; the caller adds to it
        self.sizes: dict[str, int | None] = {}  # how many numbers a figure has; None for a scalar
        self.flat: Tensor | None = None         # all sums, one after another
        self.earlier: Tensor | None = None      # the first sum, when last asked for, on the CPU

    def add(self, figures: dict[str, Tensor], n: int) -> None:
        """Adds figures that are means over n samples."""
        new = torch.cat([v.detach().reshape(-1).double() for v in figures.values()]) * n
        if self.flat is None:
            self.sizes = {name: len(v) if v.dim() else None for name, v in figures.items()}
            self.flat = torch.zeros_like(new)
        if len(self.flat) != len(new):
            raise InputError('the checkpoint holds sums of other figures')
        self.flat += new

    def were_finite(self) -> bool:
        """Whether the first sum, the loss, was finite at the call before; waits for no GPU."""
        if self.earlier is None:
            self.earlier = torch.zeros(1, dtype=torch.double, pin_memory=self.flat.is_cuda)
        finite = bool(self.earlier.isfinite())
        self.earlier.copy_(self.flat[:1], non_blocking=True)
        return finite

    def clear(self) -> None:
        """Starts anew, in the same memory: a CUDA graph may add to it."""
        self.count = 0
        if self.flat is not None:
            self.flat.zero_()

    def means(self, rank: Rank) -> dict[str, Any]:
        """The figures' means over the samples of all ranks, with their `count`.

        Raises InputError if there are none.
        """
        sums = self.sums(rank)
        count = sums.pop('count')
        if not count:
            raise InputError('not one of the images could be read')

        def mean(value: float) -> float:
            meter = AverageValueMeter()
            meter.add(value, count)
            return meter.value()[0]
        return {'count': count} | {name: [mean(x) for x in v] if isinstance(v, list) else mean(v)
                                   for name, v in sums.items()}

    def sums(self, rank: Rank) -> dict[str, Any]:
        """The sums over all ranks, as plain numbers, with `count`. All ranks must call it."""
        count = torch.tensor([float(self.count)], dtype=torch.double, device=rank.device)
        both = count if self.flat is None else torch.cat([count, self.flat])
        total, *values = rank.sum(both.clone()).tolist()
        sums, rest = {'count': round(total)}, iter(values)
        for name, size in self.sizes.items():
            sums[name] = next(rest) if size is None else [next(rest) for _ in range(size)]
        return sums

    def restore(self, sums: dict[str, Any], rank: Rank) -> None:
        """Puts back what `sums` gave; rank 0 has it all, so that the sum over ranks is right."""
        values = {name: v for name, v in sums.items() if name != 'count'}
        flat = [x for v in values.values() for x in (v if isinstance(v, list) else [v])]
        self.sizes = {name: len(v) if isinstance(v, list) else None for name, v in values.items()}
        self.flat = torch.tensor(flat, dtype=torch.double, device=rank.device) * (rank.rank == 0)
        self.count = int(sums['count']) * (rank.rank == 0)


# ---------------------------------------------------------------------------- being told to stop

class Stop:
    """Notes SIGTERM and SIGINT, so that training ends after a step, with a checkpoint."""
    signum = 0

    def __enter__(self) -> 'Stop':
        self.old = [signal.signal(s, self.note) for s in STOP_SIGNALS]
        return self

    def __exit__(self, *error: object) -> None:
        for s, handler in zip(STOP_SIGNALS, self.old, strict=True):
            signal.signal(s, handler)

    def note(self, signum: int, frame: object) -> None:
        self.signum = signum

    def asked(self, rank: Rank, step: int) -> bool:
        """Whether all ranks, which are at the same step, are to stop there."""
        return (rank.world == 1 or step % STOP_CHECK == 0) and rank.any(bool(self.signum))

    def exit(self, rank: Rank, save: str) -> NoReturn:
        rank.barrier()  # until the checkpoint is there
        rank.print(f'stopped: go on with --resume {save}')
        raise SystemExit(128 + (self.signum or signal.SIGTERM))


# ---------------------------------------------------------------------------- a run's state

def fingerprint(params: Params) -> str:
    """A hash of the parameters, the same wherever they were read from."""
    digest = hashlib.sha256()
    for name in sorted(params):
        digest.update(name.encode())
        digest.update(params[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def copy_same_shape(to: Tensor, source: Tensor) -> None:
    """Copies without broadcasting. Raises ValueError if the shapes differ."""
    if to.shape != source.shape:
        raise ValueError(f'a tensor of shape {tuple(source.shape)} for one of {tuple(to.shape)}')
    to.detach().copy_(source)


@dataclass
class Run:
    """All that training changes, in memory and in the run's folder."""
    opt: argparse.Namespace
    rank: Rank
    params: Params                # of the student, and the adapters
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    network: dict | None = None   # what `new_model` builds the student from
    teacher: str | None = None    # fingerprint of its parameters
    epoch: int = 0                # completed epochs
    step: int = 0                 # completed steps of the next one
    totals: Totals = field(default_factory=Totals)  # over these steps
    records: list[dict] = field(default_factory=list)
    stop: Stop = field(default_factory=Stop)
    saved: float = -math.inf      # when, by time.monotonic()

    def state(self) -> dict:
        """The checkpoint: tensors and plain values. All ranks must call it."""
        average_statistics(self.params, self.rank)
        params = {name: t.detach().cpu().contiguous() for name, t in self.params.items()}
        cuda = self.rank.device.type == 'cuda'
        optional = {
            'adapters': {name: t for name, t in params.items() if name.startswith(ADAPTER)},
            'network': self.network, 'teacher': self.teacher, 'step': self.step,
            'sums': self.totals.sums(self.rank) if self.step else None,
            'scaler': self.scaler.state_dict()}
        return {'params': {k: t for k, t in params.items() if not k.startswith(ADAPTER)},
                'optimizer': self.optimizer.state_dict(), 'epoch': self.epoch,
                'options': vars(self.opt), 'records': self.records,
                'rng': {'cpu': torch.get_rng_state()}
                | ({'cuda': torch.cuda.get_rng_state()} if cuda else {}),
                **{name: value for name, value in optional.items() if value}}

    def restore(self, state: dict) -> None:
        """Puts a checkpoint back. Raises InputError if it, or the teacher, does not fit."""
        name = f'--resume {self.opt.resume}'
        if state.get('teacher') != self.teacher:
            raise InputError(f'{name}: the teacher is not the one that the run began with')
        try:
            if not all(isinstance(state[part], dict) for part in ('params', 'optimizer', 'rng')):
                raise ValueError('parts of it are no dicts')
            for key, tensor in self.params.items():
                part = 'adapters' if key.startswith(ADAPTER) else 'params'
                copy_same_shape(tensor, state[part][key])
            for i, p in enumerate(trainable(self.params).values()):
                momentum = state['optimizer']['state'][i]['momentum_buffer']
                copy_same_shape(self.optimizer.state[p]['momentum_buffer'], momentum)
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(state['scaler'])
            torch.set_rng_state(state['rng']['cpu'])
            if self.rank.device.type == 'cuda' and 'cuda' in state['rng']:
                torch.cuda.set_rng_state(state['rng']['cuda'])
            self.epoch, self.step = int(state['epoch']), int(state.get('step', 0))
            if min(self.epoch, self.step) < 0:
                raise ValueError('it counts epochs or steps below 0')
            if isinstance(state.get('sums'), dict):
                self.totals.restore(state['sums'], self.rank)
            self.records = records_of(state, find_checkpoint(self.opt.resume))
        except Exception as e:  # a file may hold anything
            raise InputError(f'{name}: not a whole checkpoint of this run ({e})') from None

    def save(self) -> None:
        """Writes checkpoint and log; a parameter that is not finite ends the run instead."""
        state = self.state()
        self.saved = time.monotonic()
        trained = state['params'] | state.get('adapters', {})
        if not all(t.isfinite().all() for t in trained.values()):
            self.diverged()
        if self.rank.rank == 0:
            file = io.BytesIO()
            torch.save(state, file)
            folder = Path(self.opt.save)
            write_whole({folder / CHECKPOINT: file.getvalue(),
                         folder / LOG: log_text(self.records)})

    def diverged(self) -> NoReturn:
        kept = (Path(self.opt.save) / CHECKPOINT).exists()
        after = 'the last checkpoint is kept' if kept else 'nothing is saved'
        epoch = self.epoch + (self.step > 0)  # after an epoch it has been counted already
        if self.rank.rank == 0:
            print(one_line(f'{self.opt.save}: diverged in epoch {epoch}: loss or parameters are '
                           f'not finite; {after}'), file=sys.stderr)
        raise SystemExit(1)

    def after_step(self) -> None:
        if self.step % FINITE_CHECK == 0 and not self.totals.were_finite():
            self.diverged()
        stop = self.stop.asked(self.rank, self.step)
        if stop or (self.opt.save_every and self.step % self.opt.save_every == 0):
            self.save()
        if stop:
            self.stop.exit(self.rank, self.opt.save)

    def after_epoch(self, record: dict) -> None:
        """Adds the epoch's record to the log, and saves if the last checkpoint is old."""
        plain = {name: finite(value) for name, value in record.items()}
        self.records.append(json.loads(json.dumps(plain)))  # nothing that a reader of files refuses
        self.epoch, self.step = self.epoch + 1, 0
        self.totals.clear()
        old = time.monotonic() - self.saved >= SAVE_SECONDS
        if self.rank.any(old) or self.epoch == self.opt.epochs:
            self.save()


def records_of(state: dict, path: Path) -> list[dict]:
    """The log's records up to a checkpoint; those of an old checkpoint are in the log beside it."""
    records = state.get('records', read_log(path.parent / LOG))
    records = [r for r in records if well_formed(r) and r['epoch'] <= state['epoch']]
    log_text(records)  # can it be written?
    return records


@contextmanager
def run_folder(run: Run, state: dict | None) -> Iterator[None]:
    """Locks the run's folder, on rank 0, and brings its log up to date. Raises InputError.

    What ends the run is given a note of how to go on.
    """
    folder = Path(run.opt.save)
    with locked(folder) if run.rank.rank == 0 else nullcontext():
        if run.rank.rank == 0:
            tidy(folder, run, state)
        try:
            yield
        except BaseException as e:
            if (folder / CHECKPOINT).exists():
                e.add_note(f'go on with --resume {folder}')
            raise


def tidy(folder: Path, run: Run, state: dict | None) -> None:
    """Removes what a killed process left, and brings the log up to date. Raises InputError."""
    check_save(run.opt)  # again: another process may have been faster
    for name in (CHECKPOINT, LOG):
        for leftover in folder.glob(f'{name}.*.tmp'):
            leftover.unlink()
    if state:
        now = read_checkpoint(find_checkpoint(run.opt.resume))
        if any(now.get(name) != state.get(name) for name in ('epoch', 'step')):
            raise InputError(f'--resume {run.opt.resume}: another process trained it meanwhile')
        if resumes_in_place(run.opt):
            write_whole({folder / LOG: log_text(run.records)})
