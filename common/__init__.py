"""What every script needs and no algorithm decides: see the table in README.md.

A command whose output nobody reads to the end, as with `| head`, ends without a word, as others of the shell.
"""

import atexit
import contextlib
import os
import select
import signal
import sys
from typing import Any


def is_unread() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    poll = select.poll()
    with contextlib.suppress(AttributeError, OSError, ValueError):  # there is none, it is closed, or no file
        poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _end(kind: type, error: BaseException, trace: Any) -> None:
    if isinstance(error, BrokenPipeError) and is_unread():
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGPIPE)
    sys.__excepthook__(kind, error, trace)


@atexit.register
def _drop_the_rest() -> None:
    if is_unread():  # Python writes at exit what is left, or that it cannot
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


sys.excepthook = _end
