"""Programs of the project in forks of the test's process, which has imported PyTorch: that takes a fresh one seconds."""

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


class Forked:
    """`python GIVEN ...`, a script or `-m` and a module; the parts of `subprocess.Popen` that tests need."""

    def __init__(self, *given: object, cwd: Path = ROOT, env: Mapping[str, str] | None = None, merged: bool = False):
        self.argv = [str(part) for part in given]
        self._out = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as this)
        self._err = self._out if merged else tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            self._become(cwd, env or {})

    def _become(self, cwd: Path, env: Mapping[str, str]) -> None:
        status = 1
        try:
            os.chdir(cwd)
            os.environ.update(env)
            for stream, number in ((self._out, 1), (self._err, 2)):
                os.dup2(stream.fileno(), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", 1)
            module = self.argv[0] == "-m"
            name, *sys.argv[1:] = self.argv[module:]
            sys.argv[0] = name
            if module:
                sys.modules.pop(name, None)
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(cwd / name), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float = 240.0) -> tuple[str, str]:
        """Wait for the end: standard output and error, the first with both if they are merged."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(self.argv, timeout)
            time.sleep(0.01)
        texts = []
        for stream in (self._out, self._err):
            stream.seek(0)
            texts.append(stream.read())
        return texts[0], "" if self._err is self._out else texts[1]


def run(*given: object, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess:
    """`python GIVEN ...` to its end."""
    if torch.cuda.is_initialized():  # which no fork may use
        command = [sys.executable, *map(str, given)]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ | dict(env or {}))
    forked = Forked(*given, cwd=cwd, env=env)
    out, err = forked.communicate()
    return subprocess.CompletedProcess(forked.argv, forked.returncode or 0, out, err)
