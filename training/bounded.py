"""Reading files that anyone may have made, with bounds on memory and time; crashes hit a child.

    state = read_bounded(torch.load, 'model.pt7')
"""
import faulthandler
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.errors import InputError

# Reading a file of weights may take MEMORY bytes + 4 times its size, and SECONDS + 1 for each MiB.
MEMORY, SECONDS = 2 ** 28, 20
DEEPEST = 10  # how deep dicts, lists and tuples may be nested
TENSORS = Tensor, torch.nn.Parameter
PLAIN = (*TENSORS, str, int, float, bool, type(None))
NUMBERS = (torch.half, torch.bfloat16, torch.float, torch.double, torch.uint8, torch.int8,
           torch.short, torch.int, torch.long)


def bound_memory(size: int) -> None:
    """Lets this process map `size` more bytes than now; more fails, as where there are no more.

    Where there is no such limit it does nothing.
    """
    with suppress(OSError, ValueError), open('/proc/self/statm') as file:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        new = int(file.read().split()[0]) * resource.getpagesize() + size
        resource.setrlimit(resource.RLIMIT_AS, (min(new, soft) if soft > 0 else new, hard))


def read_bounded(read: Callable[[Path], Any], path: str | Path) -> Any:
    """What `read` makes of a file, once a child process could read it within the bounds.

    A file that fills the memory, never ends, or crashes the library that reads it does so to the
    child. There is a child on Linux alone: elsewhere to fork is not safe. Raises InputError.
    """
    if not os.path.isfile(path):
        raise InputError(f'{path}: there is no such file')
    if sys.platform == 'linux' and (reason := why_unreadable(read, path)):
        raise InputError(reason)
    return read_or_refuse(read, path)


def read_or_refuse(read: Callable[[Path], Any], path: str | Path) -> Any:
    """What `read` makes of a file. Raises InputError for whatever it raises."""
    try:
        with warnings.catch_warnings(action='ignore'):  # torch warns of what it then refuses
            return read(path)
    except Exception as e:  # torch and HDF5 report a broken or foreign file by a dozen types
        reason = (str(e).strip().splitlines() or [''])[0][:100]
        kind = '' if type(e) is ValueError else f'{type(e).__name__}: '
        raise InputError(f'{path}: no file of weights, or a damaged one ({kind}{reason})') from None


def why_unreadable(read: Callable[[Path], Any], path: str | Path) -> str:
    """What is wrong with a file that a child process cannot read; '' if it can."""
    size, (out, into) = os.path.getsize(path), os.pipe()
    if not (child := os.fork()):
        answer = ' '  # it was read
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the one line is ours
            faulthandler.disable()
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends it at once
            signal.alarm(SECONDS + size // 2 ** 20)
            bound_memory(4 * size + MEMORY)
            read_or_refuse(read, path)
        except BaseException as e:
            answer = str(e)[:10_000] or repr(e)
        try:
            os.write(into, answer.encode(errors='backslashreplace'))
        finally:
            os._exit(0)
    os.close(into)
    with open(out, encoding='utf-8') as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer.strip() if answer else f'{path}: to read it crashes, or takes for ever'


def plain(value: Any, left: list[int], depth: int = 0) -> Any:
    """A copy of what a file holds, in dicts, lists, tuples, plain values and tensors of numbers.

    `left` is a list of the bytes that it may still take, for tensors may share what they store, and
    a list be in several places. Raises ValueError for more, and for anything else.
    """
    kind = type(value)
    if kind in TENSORS:
        value = Tensor.detach(value)  # without attributes, which a file may set
        if (value.layout, value.device.type) != (torch.strided, 'cpu') or value.is_nested \
                or value.dtype not in NUMBERS:
            raise ValueError(f'it holds an odd tensor, of {value.dtype}')
        left[0] -= value.numel() * value.element_size()
    left[0] -= len(value) if kind is str else 1
    if left[0] < 0 or depth > DEEPEST:
        raise ValueError('it holds more than its size allows, or is nested too deep')
    if issubclass(kind, dict):
        if not all(type(key) in (str, int) for key in dict.keys(value)):
            raise ValueError('it holds names that are neither text nor numbers')
        return {plain(k, left): plain(v, left, depth + 1) for k, v in dict.items(value)}
    if kind in (list, tuple):
        return kind(plain(v, left, depth + 1) for v in value)
    if kind not in PLAIN or (kind is int and value.bit_length() > 64):
        raise ValueError(f'it holds a value of type {kind.__name__}')
    return value
