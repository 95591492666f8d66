"""How a script ends when it cannot go on: one line on stderr, and an exit status, no traceback."""
import errno
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# Error numbers of a machine that is out of disk space, memory, processes, …: not an input error.
RESOURCE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EAGAIN, errno.EMFILE,
                   errno.ENFILE, errno.EFBIG}
RESOURCE_MESSAGES = re.compile("DataLoader|out of memory|can't allocate memory|"
                               "can't start new thread")


def shortened(text: object, limit: int = 60) -> str:
    """Any text on one line: control characters as escapes, cut in the middle beyond `limit`."""
    # Lone surrogates, of file names that are not UTF-8, are escaped, too.
    text = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode()
                   for c in str(text))
    half = (limit - 1) // 2
    return text if len(text) <= limit else f'{text[:limit - 1 - half]}…{text[len(text) - half:]}'


def one_line(text: str) -> str:
    """A message as one line that is safe to print, whatever characters it contains."""
    return shortened(' '.join(text.split()), 1000)


def first_line(error: BaseException) -> str:
    """The first line of an error's message; '' if there is no message."""
    return str(error).strip().partition('\n')[0]


def print_line(text: str) -> None:
    """Prints a message as one line."""
    print(one_line(text), flush=True)


class InputError(ValueError):
    """A wrong option, file or environment variable. The message is printed as one line."""


class RunError(Exception):
    """A failure at run time that no input caused. The message is printed as one line."""


def status_and_message(e: BaseException) -> tuple[int, str] | None:
    """Exit status and message of an expected error; None for a bug."""
    if isinstance(e, BrokenPipeError):  # the reader of the output, such as head, has exited
        return 141, ''
    out_of_resources = isinstance(e, OSError) and e.errno in RESOURCE_ERRNOS
    if isinstance(e, KeyboardInterrupt):
        status, line = 130, 'interrupted'
    elif isinstance(e, InputError | OSError) and not out_of_resources:
        status, line = 2, f'error: {e}'
    elif out_of_resources or isinstance(e, RunError | MemoryError) or (
            isinstance(e, RuntimeError) and RESOURCE_MESSAGES.search(str(e))):
        status, line = 1, 'error: ' + (first_line(e) or type(e).__name__)
    else:
        return None
    return status, '; '.join([line, *getattr(e, '__notes__', ())])


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the script on an expected error: one line on stderr, exit status, no traceback."""
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:  # closed: else its descriptor could become a checkpoint's
            setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115
        with suppress(AttributeError):
            getattr(sys, name).reconfigure(errors='backslashreplace')
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            yield
            sys.stdout.flush()
        finally:
            signal.signal(signal.SIGINT, before)
    except (Exception, KeyboardInterrupt) as e:
        if (known := status_and_message(e)) is None:
            raise
        status, line = known
        with suppress(OSError):
            print(one_line(line), end='\n' * bool(line), file=sys.stderr, flush=True)
        for stream in (sys.stdout, sys.stderr):  # else Python reports a failed flush when it exits
            try:
                stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise SystemExit(status) from None


@contextmanager
def time_limit(seconds: int, what: str) -> Iterator[None]:
    """Raises RunError(`what` for … s) if the block takes longer. For the main thread only."""
    def late(*_: object) -> None:
        raise RunError(f'{what} for {seconds} s')

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
