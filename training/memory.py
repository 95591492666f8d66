"""Checks before training that a run can fit in memory, by a lower bound of what it takes."""
import os
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet import STATISTICS
from weights import InputError, Model, new_model

LIMITS = ('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes')


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU's memory, or of the machine's, or what its container or process may use."""
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory
    sizes = [os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')]
    for path in LIMITS:
        with suppress(OSError, ValueError):
            sizes.append(int(Path(path).read_text()))
    of_process = resource.getrlimit(resource.RLIMIT_AS)[0]  # as `ulimit -v` sets it; or -1
    return min(size for size in (*sizes, of_process) if size >= 0)


def check_memory(what: str, needed: float, device: torch.device) -> None:
    """Raises InputError if a device has less than the bytes needed."""
    if needed > (there := memory_of(device)):
        raise InputError(f'{what}: training takes {needed / 1e9:,.1f} GB at least, and there are '
                         f'{there / 1e9:,.1f}')


def new_student(net: str, settings: dict[str, Any], num_classes: int, seed: int) -> Model:
    """As `new_model`. Raises InputError for a network too large to train on this machine."""
    with torch.device('meta'):  # shapes alone
        planned = new_model(net, settings, num_classes)
    n = planned.n_parameters  # each has a gradient and a momentum
    check_memory(f'--net {net}: {planned.name} has {n:,} parameters', 12 * n, torch.device('cpu'))
    return new_model(net, settings, num_classes, seed)


def kept_for_backward(model: Model, size: tuple[int, int]) -> float:
    """How many numbers a training step keeps for backward, for an image of this height and width.

    Counted on two images, and halved: batch norm cannot train on a single value.
    """
    params = {name: t.clone() if name.endswith(STATISTICS) else t
              for name, t in model.params.items()}  # training would change the statistics
    kept = {}  # by place: two operations may keep the same tensor

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.f(torch.zeros(2, 3, *size), params, True)
    own = {t.data_ptr() for t in params.values()}
    return sum(t.numel() for place, t in kept.items() if place not in own) / 2


def check_step(model: Model, batch: int, size: tuple[int, int], dtype: str, compiled: bool,
               device: torch.device) -> None:
    """Raises InputError if a training step of so many images of a size does not fit the device."""
    full, short = (8, 8) if dtype == 'double' else (4, 4 if dtype == 'float' else 2)  # bytes
    each = kept_for_backward(model, size) * short
    each *= 0.5 if compiled else 1  # the input of each convolution can be computed again
    check_memory(f'--batch_size: a step of {batch:,} images, {model.name}',
                 batch * each + 3 * full * model.n_parameters, device)
