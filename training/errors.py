"""How a script ends when it cannot go on: one line on stderr, and an exit status, no traceback."""
import errno
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# Errors for which no option or file is to blame: the machine lacks disk, memory, processes, …
LACKING = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EAGAIN, errno.EMFILE,
           errno.ENFILE, errno.EFBIG}
OF_TORCH = re.compile("DataLoader|out of memory|can't allocate memory|can't start new thread")


def escaped(text: str) -> str:
    """The text with control characters, lone surrogates and the like as escapes, such as \\n."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)


def shown(text: object, limit: int = 60) -> str:
    """Any text in one short line: escaped, and cut in its middle where it is too long."""
    text = escaped(str(text))
    half = (limit - 1) // 2
    return text if len(text) <= limit else f'{text[:limit - 1 - half]}…{text[len(text) - half:]}'


def one_line(text: str) -> str:
    """A message as one line for the terminal, whatever the names in it are."""
    return shown(' '.join(text.split()), 1000)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, which may be empty."""
    return str(error).strip().partition('\n')[0]


def say(text: str) -> None:
    """Prints a message as one line."""
    print(one_line(text), flush=True)


class InputError(ValueError):
    """Something that a user gave does not work; the message is the one line to show."""


class RunError(Exception):
    """A failure at run time for which no input is to blame; the message is the one line to show."""


def outcome(e: BaseException) -> tuple[int, str] | None:
    """Exit status and line for what can go wrong without a bug; None for a bug."""
    if isinstance(e, BrokenPipeError):  # whoever read the output has gone, as head does
        return 141, ''
    lacking = isinstance(e, OSError) and e.errno in LACKING
    if isinstance(e, KeyboardInterrupt):
        status, line = 130, 'interrupted'
    elif isinstance(e, InputError | OSError) and not lacking:
        status, line = 2, f'error: {e}'
    elif lacking or isinstance(e, RunError | MemoryError) or (
            isinstance(e, RuntimeError) and OF_TORCH.search(str(e))):
        status, line = 1, 'error: ' + (first_line(e) or type(e).__name__)
    else:
        return None
    return status, '; '.join([line, *getattr(e, '__notes__', ())])


@contextmanager
def input_errors() -> Iterator[None]:
    """Turns what `outcome` knows into its line on stderr and exit status, without a traceback."""
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:  # closed: else a checkpoint could be opened in its place
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
        if (known := outcome(e)) is None:
            raise
        status, line = known
        with suppress(OSError):
            print(one_line(line), end='\n' * bool(line), file=sys.stderr, flush=True)
        for stream in (sys.stdout, sys.stderr):  # at its end Python would complain of what is left
            try:
                stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise SystemExit(status) from None


@contextmanager
def time_limit(seconds: int, what: str) -> Iterator[None]:
    """Raises RunError, which says `what`, in a block that takes longer; in the main thread only."""
    def late(*_: object) -> None:
        raise RunError(f'{what} for {seconds} s')

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
