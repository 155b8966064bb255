"""Errors the user can fix. Each carries one line that says how."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


class UserError(Exception):
    """An error the user can fix: one line that names the file or value, and the fix.

    Scripts print it without a traceback and end with exit status 1.
    """


class BudgetExhausted(UserError):
    """The query budget leaves no room for the clips asked about. Nothing was answered or counted."""


def run_tool(tool: Callable[[], Any]) -> None:
    """The command line of a tool: UserError becomes its one line and exit status 1, Ctrl-C exit status 130."""
    try:
        tool()
    except UserError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
