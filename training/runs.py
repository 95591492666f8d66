"""A run's folder: its lock, its checkpoint, which holds the log, too, and resuming from it.

The checkpoint is the only source of truth: after it, `log.txt` is written from its records.
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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from resnet import Params, trainable
from training.distributed import Rank, average_statistics
from training.errors import one_line
from training.log import LOG, Totals, finite, log_text, records_of
from utils import ADAPTER
from weights import CHECKPOINT, InputError, find_checkpoint, read_checkpoint

LOCK = '.lock'
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
STOP_CHECK = 10     # with several ranks: steps between checks whether one got a signal to stop
FINITE_CHECK = 50   # steps between checks that the loss was finite at the last check
SAVE_SECONDS = 30   # least time between checkpoints at the ends of epochs


# ---------------------------------------------------------------------------- files

def write_atomically(files: dict[Path, bytes]) -> None:
    """Replaces files in the given order, each atomically.

    All new files are on the disk, under temporary names, before the first is replaced.
    """
    temporary = {path: path.with_name(f'{path.name}.{os.getpid()}.tmp') for path in files}
    try:
        for path, content in files.items():
            temporary[path].unlink(missing_ok=True)
            with open(temporary[path], 'xb') as file:  # x: never writes through an existing link
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


def locked(folder: Path) -> AbstractContextManager:
    """Locks `folder`, which is created if missing, against training by other processes.

    Raises InputError if it is locked. The system releases the lock when its process ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder / LOCK, timeout=1).acquire()
    except Timeout:
        raise InputError(f'{folder}: another process is training in this folder') from None


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
    """Raises InputError, which names the option, if a folder is not writable, or not creatable."""
    existing = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f'{option} {folder}: {existing} is not a folder that can be written to')


def resumes_in_place(opt: argparse.Namespace) -> bool:
    """Whether --resume overwrites its own checkpoint, that is, --save names no other folder."""
    own = (Path(opt.save) / CHECKPOINT).resolve()
    return bool(opt.resume) and find_checkpoint(opt.resume).resolve() == own


def check_save(opt: argparse.Namespace) -> None:
    """Raises InputError if --save cannot be written, or already holds a run that is to be kept.

    A folder with a log but without a checkpoint does not count as a run.
    """
    folder = Path(opt.save)
    if not (opt.overwrite or resumes_in_place(opt)) and (folder / CHECKPOINT).exists():
        raise InputError(f'{folder} already holds a run: continue it with --resume {folder}, '
                         'replace it with --overwrite, or choose another --save')
    check_writable('--save', folder)
    for name in (LOG, CHECKPOINT, LOCK):
        if (folder / name).exists() and not (folder / name).is_file():
            raise InputError(f'--save {folder}: {folder / name} exists and is not a file')


# ---------------------------------------------------------------------------- signals to stop

class Stop:
    """Records SIGTERM and SIGINT, so that training ends after a step, with a checkpoint."""
    signum = 0

    def __enter__(self) -> 'Stop':
        self.old = [signal.signal(s, self.record) for s in STOP_SIGNALS]
        return self

    def __exit__(self, *error: object) -> None:
        for s, handler in zip(STOP_SIGNALS, self.old, strict=True):
            signal.signal(s, handler)

    def record(self, signum: int, frame: object) -> None:
        self.signum = signum


# ---------------------------------------------------------------------------- a run's state

def fingerprint(params: Params) -> str:
    """A hash of the parameters, which depends only on their names and values."""
    digest = hashlib.sha256()
    for name in sorted(params):
        digest.update(name.encode())
        digest.update(params[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def copy_checked(to: Tensor, source: Tensor) -> None:
    """Copies `source` to `to`. Raises ValueError unless shape and type agree, and it is finite."""
    if (to.shape, to.dtype) != (source.shape, source.dtype):
        raise ValueError(f'{source.dtype} of shape {tuple(source.shape)} for {to.dtype} of '
                         f'{tuple(to.shape)}')
    if not source.isfinite().all():
        raise ValueError('a tensor that is not finite')
    to.detach().copy_(source)


def restore_scaler(scaler: torch.amp.GradScaler, state: dict) -> None:
    """Restores the loss scale and its growth counter. Other settings of the file are ignored."""
    scale, steps = float(state['scale']), int(state['_growth_tracker'])
    if not (0 < scale < math.inf and 0 <= steps < scaler.get_growth_interval()):
        raise ValueError(f'a loss scale of {scale} after {steps} steps')
    scaler.load_state_dict(scaler.state_dict() | {'scale': scale, '_growth_tracker': steps})


@dataclass
class Run:
    """The state of a run, in memory and in its folder."""
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
    saved: float = -math.inf      # time.monotonic() of the last checkpoint

    def state(self) -> dict:
        """The checkpoint's content. All ranks must call it; it averages the running statistics."""
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
        """Restores a checkpoint's state. Raises InputError if it or the teacher does not fit."""
        name = f'--resume {self.opt.resume}'
        if state.get('teacher') != self.teacher:
            raise InputError(f'{name}: the teacher is not the one that the run began with')
        try:
            if not all(isinstance(state[part], dict) for part in ('params', 'optimizer', 'rng')):
                raise ValueError('params, optimizer or rng is not a dict')
            found = state['params'] | state.get('adapters', {})
            if found.keys() != self.params.keys():
                raise ValueError(f'{min(found.keys() ^ self.params.keys())} is only in one of '
                                 'checkpoint and network')
            for key, tensor in self.params.items():
                copy_checked(tensor, found[key])
            for i, p in enumerate(trainable(self.params).values()):
                momentum = state['optimizer']['state'][i]['momentum_buffer']
                copy_checked(self.optimizer.state[p]['momentum_buffer'], momentum)
            if self.scaler.is_enabled():
                restore_scaler(self.scaler, state['scaler'])
            torch.set_rng_state(state['rng']['cpu'])
            if self.rank.device.type == 'cuda' and 'cuda' in state['rng']:
                torch.cuda.set_rng_state(state['rng']['cuda'])
            self.epoch, self.step = int(state['epoch']), int(state.get('step', 0))
            if self.step and not isinstance(state['sums'], Tensor):  # old ones have no names
                self.totals.restore(state['sums'], self.rank)
            if min(self.epoch, self.step, self.totals.count) < 0 or self.epoch > self.opt.epochs:
                raise ValueError('negative counts, or more epochs than --epochs')
            self.records = records_of(state, find_checkpoint(self.opt.resume))
        except Exception as e:  # a file may hold anything
            raise InputError(f'{name}: not a complete checkpoint of this run ({e})') from None

    def check_progress(self, n_train: int) -> None:
        """Raises InputError if a checkpoint counts more than an epoch of n_train images has."""
        batch = self.opt.batch_size
        if (self.step - 1) * batch >= n_train or self.totals.count > self.step * batch:
            raise InputError(f'--resume {self.opt.resume}: {self.totals.count:,} images in '
                             f'{self.step:,} steps of an epoch, which has {n_train:,} images')

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
            write_atomically({folder / CHECKPOINT: file.getvalue(),
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
        if self.step % FINITE_CHECK == 0 and not self.totals.finite_at_last_check():
            self.diverged()
        self.stop_if_told()
        if self.opt.save_every and self.step % self.opt.save_every == 0:
            self.save()

    def stop_if_told(self) -> None:
        """Saves and exits if a rank got a signal to stop; all ranks must call it at the same step.

        Several ranks only check every STOP_CHECK steps.
        """
        if self.rank.world > 1 and self.step % STOP_CHECK:
            return
        if self.rank.any(bool(self.stop.signum)):
            self.save()
            self.rank.barrier()  # until rank 0 has written the checkpoint
            self.rank.print(f'stopped: continue with --resume {self.opt.save}')
            raise SystemExit(128 + (self.stop.signum or signal.SIGTERM))

    def after_epoch(self, record: dict) -> None:
        """Adds the epoch's record. Saves if the last checkpoint is old, or the run is finished."""
        plain = {name: finite(value) for name, value in record.items()}
        self.records.append(json.loads(json.dumps(plain)))  # only types that `plain_copy` accepts
        self.epoch, self.step = self.epoch + 1, 0
        self.totals.clear()
        old = time.monotonic() - self.saved >= SAVE_SECONDS
        if self.rank.any(old) or self.epoch == self.opt.epochs:
            self.save()


@contextmanager
def run_folder(run: Run, state: dict | None) -> Iterator[None]:
    """Locks the run's folder, on rank 0, and brings its log up to date. Raises InputError.

    Adds to any exception a note that names --resume, if there is a checkpoint.
    """
    folder = Path(run.opt.save)
    with locked(folder) if run.rank.rank == 0 else nullcontext():
        if run.rank.rank == 0:
            clean_up_folder(folder, run, state)
        try:
            yield
        except BaseException as e:
            if (folder / CHECKPOINT).exists():
                e.add_note(f'continue with --resume {folder}')
            raise


def clean_up_folder(folder: Path, run: Run, state: dict | None) -> None:
    """Removes temporary files of a killed process, and rewrites the log of a resumed run.

    Raises InputError if another process has begun or continued this run.
    """
    check_save(run.opt)  # again, now that the folder is locked
    for name in (CHECKPOINT, LOG):
        for leftover in folder.glob(f'{name}.*.tmp'):
            leftover.unlink()
    if state:
        now = read_checkpoint(find_checkpoint(run.opt.resume))
        if any(now.get(name) != state.get(name) for name in ('epoch', 'step')):
            raise InputError(f'--resume {run.opt.resume}: another process has continued this run')
        if resumes_in_place(run.opt):
            write_atomically({folder / LOG: log_text(run.records)})
