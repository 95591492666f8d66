"""The log, with a record for each epoch, and the sums of an epoch's metrics."""
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchnet.meter import AverageValueMeter

from training.distributed import Rank
from training.errors import InputError

LOG = 'log.txt'
# Entries of a record that other code computes with: numbers, and texts. Each may be missing.
LOG_NUMBERS = ('epoch', 'epochs', 'seed', 'depth', 'width', 'lr', 'power', 'train_fraction',
               'test_fraction', 'train_time', 'test_time', 'train_acc', 'train_acc5', 'test_acc',
               'test_acc5')
LOG_TEXTS = ('net', 'network', 'dataset', 'mapping', 'teacher_id', 'teacher_params')


# ---------------------------------------------------------------------------- the log

def well_formed(record: Any) -> bool:
    """Whether this is an epoch's record, and its LOG_NUMBERS and LOG_TEXTS have valid values."""
    if not isinstance(record, dict) or type(record.get('epoch')) is not int:
        return False
    numbers = [record.get(name) for name in LOG_NUMBERS]
    texts = [record.get(name) for name in LOG_TEXTS]
    sound = all(v is None or (type(v) in (int, float) and not abs(v) > 1e30) for v in numbers)
    return sound and all(isinstance(v, str | None) for v in texts)


def read_log(path: Path) -> list[dict]:
    """The records of a log.txt, one per epoch. Skips other lines; accepts NaN, as in old logs."""
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


def records_of(state: dict, path: Path) -> list[dict]:
    """The records up to a checkpoint's epoch. An old checkpoint has them in its folder's log."""
    records = state.get('records', read_log(path.parent / LOG))
    records = [r for r in records if well_formed(r) and r['epoch'] <= state['epoch']]
    log_text(records)  # raises an error if they cannot be written as JSON
    return records


# ---------------------------------------------------------------------------- metrics of an epoch

class Totals:
    """Sums of metrics over the samples of an epoch, on the device; `add` waits for no GPU."""

    def __init__(self) -> None:
        self.count = 0                          # samples so far; the caller adds to it
        self.sizes: dict[str, int | None] = {}  # how many numbers a metric has; None for a scalar
        self.flat: Tensor | None = None         # all sums, one after another
        self.checked: Tensor | None = None      # loss sum at the last check, on the CPU

    def add(self, metrics: dict[str, Tensor], n: int) -> None:
        """Adds metrics that are means over n samples. Raises InputError if their names changed."""
        new = torch.cat([v.detach().reshape(-1).double() for v in metrics.values()]) * n
        if self.flat is None:
            self.sizes = {name: len(v) if v.dim() else None for name, v in metrics.items()}
            self.flat = torch.zeros_like(new)
        if list(metrics) != list(self.sizes) or len(self.flat) != len(new):
            raise InputError('the checkpoint holds sums of other losses')
        self.flat += new

    def finite_at_last_check(self) -> bool:
        """Whether the loss sum was finite at the previous call: one call later, without waiting."""
        if self.checked is None:
            self.checked = torch.zeros(1, dtype=torch.double, pin_memory=self.flat.is_cuda)
        finite = bool(self.checked.isfinite())
        self.checked.copy_(self.flat[:1], non_blocking=True)
        return finite

    def clear(self) -> None:
        """Sets all sums to 0, in place: a CUDA graph may hold their address."""
        self.count = 0
        if self.flat is not None:
            self.flat.zero_()

    def means(self, rank: Rank) -> dict[str, Any]:
        """The means over the samples of all ranks, and `count`, the number of samples.

        Raises InputError if there are no samples.
        """
        sums = self.sums(rank)
        count = sums.pop('count')
        if not count:
            raise InputError('none of the images could be read')

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
        """Restores what `sums` returned: on rank 0, with zeros on all others."""
        values = {name: v for name, v in sums.items() if name != 'count'}
        flat = [x for v in values.values() for x in (v if isinstance(v, list) else [v])]
        self.sizes = {name: len(v) if isinstance(v, list) else None for name, v in values.items()}
        self.flat = torch.tensor(flat, dtype=torch.double, device=rank.device) * (rank.rank == 0)
        self.count = int(sums['count']) * (rank.rank == 0)
