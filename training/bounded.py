"""Reads untrusted files within limits on memory and time, first in a child process.

    state = read_bounded(torch.load, 'model.pt7')
"""
import faulthandler
import os
import pickle
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

from training.errors import InputError, first_line

# Limits on reading a weight file: MEMORY bytes + 4 times its size; SECONDS + 1 second per MiB.
MEMORY, SECONDS = 2 ** 28, 20
MAX_NESTING = 10  # limit on the nesting of dicts, lists and tuples
TENSORS = Tensor, torch.nn.Parameter
PLAIN = (*TENSORS, str, int, float, bool, type(None))
NUMBERS = (torch.half, torch.bfloat16, torch.float, torch.double, torch.uint8, torch.int8,
           torch.short, torch.int, torch.long)


def bound_memory(size: int) -> None:
    """Limits this process's address space to its present size + `size` bytes.

    Larger allocations then fail. Does nothing on systems without such a limit.
    """
    with suppress(OSError, ValueError), open('/proc/self/statm') as file:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        new = int(file.read().split()[0]) * resource.getpagesize() + size
        resource.setrlimit(resource.RLIMIT_AS, (min(new, soft) if soft > 0 else new, hard))


def read_bounded(read: Callable[[Path], Any], path: str | Path) -> Any:
    """Returns read(path), after a child process could read the file within the limits.

    A file that fills the memory, never ends, or crashes the library that reads it only harms the
    child. Only Linux has the child: elsewhere fork is not safe. Raises InputError.
    """
    if not os.path.isfile(path):
        raise InputError(f'{path}: there is no such file')
    if sys.platform == 'linux' and (reason := why_unreadable(read, path)):
        raise InputError(reason)
    return read_or_refuse(read, path)


def read_or_refuse(read: Callable[[Path], Any], path: str | Path) -> Any:
    """Returns read(path). Turns every exception into an InputError."""
    try:
        with warnings.catch_warnings(action='ignore'):  # torch warns before it raises
            return read(path)
    except Exception as e:  # torch and HDF5 raise a dozen types for damaged or other files
        kind = '' if type(e) is ValueError else f'{type(e).__name__}: '
        # torch's message for this error is advice to programmers.
        reason = 'no plain data' if isinstance(e, pickle.UnpicklingError) else first_line(e)[:100]
        raise InputError(f'{path}: not a weight file, or a damaged one ({kind}{reason})') from None


def why_unreadable(read: Callable[[Path], Any], path: str | Path) -> str:
    """Reads a file in a child process. Returns why that failed, or '' if it worked."""
    size, (out, into) = os.path.getsize(path), os.pipe()
    if not (child := os.fork()):
        answer = ' '  # success; '' means that the child was killed
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # no messages of libraries on stderr
            faulthandler.disable()
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the alarm kills this child
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
    return answer.strip() if answer else f'{path}: reading it crashes, or takes too long'


def plain_copy(value: Any, left: list[int], depth: int = 0) -> Any:
    """A copy of a file's content: dicts, lists, tuples, plain values and tensors of numbers.

    `left` holds one number, the bytes that the copy may still take: it can be far larger than the
    file, where tensors share storage or a list occurs many times. Raises ValueError beyond this,
    and for other types.
    """
    kind = type(value)
    if kind in TENSORS:
        value = Tensor.detach(value)  # without attributes, which a file may set
        if (value.layout, value.device.type) != (torch.strided, 'cpu') or value.is_nested \
                or value.dtype not in NUMBERS:
            raise ValueError(f'it holds a tensor of an unsupported kind, {value.dtype}')
        left[0] -= value.numel() * value.element_size()
    left[0] -= len(value) if kind is str else 1
    if left[0] < 0 or depth > MAX_NESTING:
        raise ValueError('its content is larger than its size allows, or nested too deeply')
    if issubclass(kind, dict):
        if not all(type(key) in (str, int) for key in dict.keys(value)):
            raise ValueError('it holds names that are neither text nor numbers')
        return {plain_copy(k, left): plain_copy(v, left, depth + 1) for k, v in dict.items(value)}
    if kind in (list, tuple):
        return kind(plain_copy(v, left, depth + 1) for v in value)
    if kind not in PLAIN or (kind is int and value.bit_length() > 64):
        raise ValueError(f'it holds a value of type {kind.__name__}')
    return value
