"""Checks before training that a lower bound of a run's memory is available."""
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
    """Bytes of a GPU's memory; for the CPU the least of RAM, container and process limit."""
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).total_memory
    sizes = [os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')]
    for path in LIMITS:
        with suppress(OSError, ValueError):
            sizes.append(int(Path(path).read_text()))
    of_process = resource.getrlimit(resource.RLIMIT_AS)[0]  # set by `ulimit -v`; -1: no limit
    return min(size for size in (*sizes, of_process) if size >= 0)


def check_memory(what: str, needed: float, device: torch.device) -> None:
    """Raises InputError, which starts with `what`, if a device has fewer than `needed` bytes."""
    if needed > (available := memory_of(device)):
        raise InputError(f'{what}: training takes at least {needed / 1e9:,.1f} GB of memory, and '
                         f'there are {available / 1e9:,.1f} GB')


def new_student(net: str, settings: dict[str, Any], num_classes: int, seed: int) -> Model:
    """Same as `new_model`, but raises InputError if the parameters alone need too much memory."""
    with torch.device('meta'):  # shapes alone
        planned = new_model(net, settings, num_classes)
    n = planned.n_parameters  # 12 bytes for each: value, gradient and momentum in float32
    check_memory(f'--net {net}: {planned.name} has {n:,} parameters', 12 * n, torch.device('cpu'))
    return new_model(net, settings, num_classes, seed)


def kept_for_backward(model: Model, size: tuple[int, int]) -> float:
    """How many numbers a training step saves for backward, per image of `size` (height, width).

    Counted on two images, and halved: batch norm cannot train on one value per channel.
    """
    params = {name: t.clone() if name.endswith(STATISTICS) else t
              for name, t in model.params.items()}  # training would change the statistics
    kept = {}  # by address: two operations may save the same tensor

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.f(torch.zeros(2, 3, *size), params, True)
    own = {t.data_ptr() for t in params.values()}
    return sum(t.numel() for address, t in kept.items() if address not in own) / 2


def check_step(model: Model, batch: int, size: tuple[int, int], dtype: str, compiled: bool,
               device: torch.device) -> None:
    """Raises InputError if a training step certainly needs more memory than the device has."""
    full, short = (8, 8) if dtype == 'double' else (4, 4 if dtype == 'float' else 2)  # bytes
    each = kept_for_backward(model, size) * short
    each *= 0.5 if compiled else 1  # compiled, the input of each convolution may be recomputed
    check_memory(f'--batch_size: a step of {batch:,} images, {model.name}',
                 batch * each + 3 * full * model.n_parameters, device)
