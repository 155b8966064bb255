"""Errors the user can fix, each with one line that says how; and what every command line does about output."""

import contextlib
import io
import os
import select
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

UNREAD = 141  # exit status when nobody reads the output any more, as shells have it


class UserError(Exception):
    """An error the user can fix: one line that names the file or value, and the fix.

    Scripts print it without a traceback and end with exit status 1.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class BudgetExhausted(UserError):
    """The query budget leaves no room for the clips asked about. Nothing was answered or counted."""


def printable(name: object) -> str:
    """A name as it can be printed: in one line, what commands a terminal (ESC, bidirectional overrides, ...) as in `\\x1b`.

    Names of files, classes and victims come from others' archives. Letters of every script stay, and so do the two characters
    without width that some scripts join letters by.
    """
    shown = (
        c if c.isprintable() or c in "\u200c\u200d" or unicodedata.category(c) == "Zs" else ascii(c)[1:-1] for c in str(name)
    )
    return "".join(shown)


@contextlib.contextmanager
def command_line(leave: Callable[[int], Any] = sys.exit) -> Iterator[None]:
    """What a script or tool runs in: it ends by `leave(UNREAD)`, without a word, when nobody reads its output (`| head`).

    Characters that the output's encoding lacks are escaped.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # here, where it can be caught, not as Python ends
    except BrokenPipeError:
        unread = [number for number in (1, 2) if _is_unread(number)]
        if not unread:
            raise  # another pipe's
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in unread:
            os.dup2(nowhere, number)
        leave(UNREAD)


def _is_unread(number: int) -> bool:
    """Whether a file descriptor is a pipe that has no reader."""
    poll = select.poll()
    poll.register(number, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def run_tool(tool: Callable[[], Any]) -> None:
    """The command line of a tool: UserError becomes its one line and exit status 1, Ctrl-C exit status 130."""
    with command_line():
        try:
            tool()
        except UserError as error:
            print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on", file=sys.stderr)
            sys.exit(130)
