"""Run folders: what every script leaves behind, and what resumes it after any interruption."""

import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from extraction import distributed
from extraction.errors import UserError
from extraction.weights import read_checkpoint, write_atomically

# Constants that may differ when a run is resumed: they change how fast it goes, not what comes out.
_FREE = {
    "device", "compile", "num_workers", "checkpoint_seconds", "out_dir", "answers_from", "victim_record", "clip_cache",
    "cache_gb", "price_per_1000", "jobs", "cluster", "share",
}  # fmt: skip


class Run:
    """The folder of one run: `config.json`, `results.json`, TensorBoard events, pictures, and the state that resumes it.

    Opening a folder that holds a run of other constants raises UserError, which names them. `finished` holds the results of a
    run that ended. Ctrl-C sets `stop_asked`, which loops look at after each step.
    """

    def __init__(self, experiment: str, out_dir: str | Path, config: Any, checkpoint_seconds: float = 60.0):
        self.experiment, self.folder, self.checkpoint_seconds = experiment, Path(out_dir), checkpoint_seconds
        self.config = _to_plain(dataclasses.asdict(config))
        # Of an option that is newer than the run in the folder: what it is when nobody sets it, which changes nothing.
        known = [field for field in dataclasses.fields(config) if field.default is not dataclasses.MISSING]
        self._defaults = _to_plain({field.name: field.default for field in known})
        self.stop_asked = False
        self._started, self._seconds_before = time.monotonic(), 0.0
        self._last_checkpoint = time.monotonic()
        self._writer: Any = None  # TensorBoard's, imported when there is something to write
        self.finished = distributed.on_main_process(self._open)

    def _open(self) -> dict | None:
        """Make the folder, or see what is in it: the results of a run that ended."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {self.folder}: {error.strerror}; choose another --out-dir") from None
        self._refuse_other_constants()
        results = self.folder / "results.json"
        if not results.exists():
            return None
        of_an_attack = ("stopped", "num_queries") if "victim" in self.config else ()  # train_victim.py has no victim to query
        finished = _read_json(results, "config", *of_an_attack)
        before, now = finished["config"].get("query_budget"), self.config.get("query_budget")
        if now is not None and now < finished["num_queries"]:
            raise UserError(
                f"{self.folder}: its run has used {finished['num_queries']} queries, --query-budget {now} is less; "
                "choose another --out-dir"
            )
        if now != before and (now is None or now > finished["num_queries"]):
            return None  # it stopped for want of budget, and goes on with a larger one
        return finished

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Within it the folder is this process's alone (the main one of several). Raises UserError, naming the other.

        The lock is the operating system's: it goes with the process, however that ends.
        """
        distributed.on_main_process(self._lock)
        try:
            yield
        finally:
            if distributed.is_main_process():
                os.close(self._lock_file)

    def _lock(self) -> None:
        path = self.folder / "run.lock"
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; choose another --out-dir") from None
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the process's own: loader workers do not inherit it
        except OSError:
            holder = os.read(file, 200).decode(errors="replace").strip()
            os.close(file)
            running = f"a run is going on in it ({holder or 'another process'})"
            raise UserError(f"{self.folder}: {running}; wait for it, or choose another --out-dir") from None
        for partial in self.folder.glob("*.partial"):  # what a crash cut short
            partial.unlink(missing_ok=True)
        os.truncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._lock_file = file

    def begin(self) -> None:
        """Write `config.json`: from here on the folder belongs to a run of these constants."""
        write_atomically(self.folder / "config.json", lambda file: file.write(_to_json(self.config)))

    def _refuse_other_constants(self) -> None:
        path = self.folder / "config.json"
        if not path.exists():
            return
        kept = _read_json(path)
        free = _FREE | {"query_budget"}
        kept = self._defaults | kept
        other = [k for k in self.config if k not in free and kept.get(k) != self.config[k]]
        if other:
            changes = ", ".join(f"{k} {kept.get(k)} -> {self.config[k]}" for k in other[:3])
            raise UserError(
                f"{self.folder} holds a run with other constants ({changes}); choose another --out-dir or delete it"
            )

    @property
    def seconds(self) -> float:
        """Time spent on this run, including time before a resume."""
        return self._seconds_before + time.monotonic() - self._started

    def load_state(self) -> dict | None:
        """The last good checkpoint, or None in a new run."""
        path = self.folder / "state.pt"
        state = distributed.on_main_process(lambda: self._read_state(path) if path.exists() else None)
        if state:
            self._seconds_before, self._started = state.pop("seconds"), time.monotonic()
        return state

    def _read_state(self, path: Path) -> dict:
        try:
            state = read_checkpoint(path)
        except UserError as error:
            raise UserError(f"{error}; remove it to start again: answers stay cached in the ledger") from None
        if not isinstance(state, dict) or not isinstance(state.get("seconds"), int | float):
            raise UserError(f"{path}: not the checkpoint of a run; remove it to start again: answers stay cached in the ledger")
        return state

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """Within it a checkpoint is put to use: what does not fit in it raises UserError."""
        try:
            yield
        except torch.OutOfMemoryError:  # nothing is wrong with the file
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            why = (str(error).strip().splitlines() or [""])[0][:120]
            raise UserError(
                f"{self.folder / 'state.pt'}: its inside is not this run's ({type(error).__name__}: {why}); remove it to start "
                "again: answers stay cached in the ledger"
            ) from None

    def checkpoint_due(self) -> bool:
        """Whether it is time to save, or to stop: the same in all processes."""
        due = self.stop_asked, time.monotonic() - self._last_checkpoint >= self.checkpoint_seconds
        asked, late = zip(*distributed.gather([due]), strict=True)
        self.stop_asked = any(asked)
        return self.stop_asked or late[0]

    def save_state(self, state: dict) -> None:
        """Write a checkpoint (tensors and plain values). Atomic: a crash inside leaves the one before."""
        state = state | {"seconds": self.seconds}
        write_atomically(self.folder / "state.pt", lambda file: torch.save(state, file))
        self._last_checkpoint = time.monotonic()

    def log(self, num_queries: int, values: dict[str, float]) -> None:
        """Write scalars to TensorBoard, against queries."""
        if not distributed.is_main_process():
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=num_queries)
        for name, value in values.items():
            self._writer.add_scalar(name, value, num_queries)
        self._writer.flush()  # one of several processes may end without an orderly exit

    def finish(self, results: dict) -> dict:
        """Write `results.json`, with what every run's results have. Returns the results."""
        results = {
            "experiment": self.experiment,
            **results,
            "seconds": round(self.seconds, 1),
            "commit": current_commit(),
            "num_threads": torch.get_num_threads(),  # on a CPU they decide how sums are rounded
            "num_processes": distributed.num_processes(),
            "config": self.config,
        }
        write_atomically(self.folder / "results.json", lambda file: file.write(_to_json(results)))
        if self._writer is not None:
            self._writer.close()
        return results

    @contextlib.contextmanager
    def interruptible(self):
        """Within it, the first Ctrl-C (or SIGTERM) lets the step finish and be saved; the second stops at once."""

        def ask(signum, _frame):
            self.stop_asked = True
            signal.signal(signum, signal.default_int_handler)
            if distributed.is_main_process():
                print("\nstopping after this step (once more: at once)", file=sys.stderr)

        try:
            before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: signals are someone else's
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def require_form(kept: Any, fresh: Any, name: str) -> None:
    """Raise ValueError when `kept`, of a file, has other types, keys, lengths or shapes than `fresh`."""
    if isinstance(fresh, int | float):
        alike = isinstance(kept, int | float)
    elif isinstance(fresh, dict):
        alike = isinstance(kept, dict) and kept.keys() == fresh.keys()
    elif isinstance(fresh, list | tuple):
        alike = isinstance(kept, list | tuple) and len(kept) == len(fresh)
    elif isinstance(fresh, torch.Tensor):
        alike = isinstance(kept, torch.Tensor) and (kept.shape, kept.dtype) == (fresh.shape, fresh.dtype)
    else:
        alike = fresh is None or type(kept) is type(fresh)
    if not alike:
        raise ValueError(f"{name} is of another form")
    if isinstance(fresh, dict | list | tuple):
        for key in fresh if isinstance(fresh, dict) else range(len(fresh)):
            require_form(kept[key], fresh[key], f"{name} {key}")


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load an optimiser's state. Raises for a wrong form, which PyTorch itself may find only at a later step."""
    require_form(state["param_groups"], optimizer.state_dict()["param_groups"], "optimizer groups")
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if value is not None and value.numel() != 1 and value.shape != parameter.shape:
                raise ValueError(f"optimizer {name} is of another form")


def _read_json(path: Path, *names: str) -> dict:
    """The dict of a file, with these names in it. Raises UserError."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable, damaged perhaps ({error}); remove it, or choose another --out-dir") from None
    if not isinstance(value, dict) or not all(name in value for name in names) or not isinstance(value.get("config", {}), dict):
        raise UserError(f"{path}: not of a run of these scripts; remove it, or choose another --out-dir")
    return value


def _to_plain(value: Any) -> Any:
    """The value as a JSON file would give it back."""
    return json.loads(json.dumps(value, default=str))


def _to_json(value: Any) -> bytes:
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)  # other readers of JSON know no NaN
    return (json.dumps(value, indent=2) + "\n").encode()


def current_commit() -> str:
    """The commit of the code that runs, with `+` when the working tree differs; `unknown` outside a checkout."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
