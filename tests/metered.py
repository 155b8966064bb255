"""Run a script with an independent meter at its victim, which adds a dot to a file of its own for each clip that was answered.

python tests/metered.py METER SCRIPT [FLAG ...]
"""

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from extraction.victims import query_interface


def put_meter(path: str | Path, tick: Callable[[], None] = lambda: None) -> None:
    """Have every answer of a query interface of this process metered; `tick` is called before and after."""
    answer, file = query_interface.Victim.query, os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def query(self: Any, clips: Any) -> Any:
        tick()
        answers = answer(self, clips)
        os.write(file, b"." * len(clips))
        tick()
        return answers

    query_interface.Victim.query = query  # type: ignore[method-assign]


def read_meter(path: str | Path) -> int:
    return Path(path).stat().st_size if Path(path).exists() else 0


if __name__ == "__main__":
    put_meter(sys.argv[1])
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")
