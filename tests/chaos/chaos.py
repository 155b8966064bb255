"""Chaos: seeded schedules of faults over short runs of every script, and what must hold after each.

    python tests/chaos/chaos.py --schedules 1000 --jobs 2
    python tests/chaos/chaos.py --schedules 1 --seed 17 --keep /tmp/chaos      # one schedule again, its folders kept

A schedule is a run of one script, sometimes within a query budget, sometimes in two processes, that meets one to four faults,
one a life, and is started again after each until it ends. A fault comes at the n-th event of a life: a step of an optimiser, a
transaction of the ledger, an answer of the victim, an fsync, a rename; n is drawn from the seed. An independent meter stands
at the victim and writes down each clip that was answered. After a schedule:

- the victim answered no more clips than the budget allows, and the ledger's count is never below what it answered;
- the count is above that of the undisturbed run by the batches in flight at a fault, at most;
- the ledger is whole, and no key has two answers;
- student, history and tables are the undisturbed run's, bit for bit (unless its budget went on batches asked twice);
- every stop gave one line of reason and no traceback, none hung, no temporary file is left.

Runs are forked from this process, which has imported all they need: a life takes a second or two.
"""

import argparse
import atexit
import contextlib
import errno
import importlib
import json
import multiprocessing.util
import os
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import sqlite3
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import golden
from metered import put_meter, read_meter
from torch.optim.optimizer import register_optimizer_step_post_hook
from tqdm import tqdm

from extraction.data.demo import write_demo_set
from extraction.errors import UserError
from extraction.evaluation import plots
from extraction.victims import ledger
from extraction.weights import read_metadata, read_state, write_atomically

TIMEOUT = 240.0  # seconds of a life; one takes two or three
FAULTS = (
    "kill", "kill, torn files", "kill, damaged checkpoint", "kill, damaged ledger", "kill, damaged cache", "kill worker",
    "kill one of two", "freeze", "second start", "disk full", "I/O error", "file too large", "clock set back", "Ctrl-C",
    "Ctrl-C twice", "SIGTERM",
)  # fmt: skip
CHAINS = [run for chain in golden.CHAINS for run in chain if not run[0].endswith("_budget")]
SCRIPTS = {name: (script, flags) for name, script, flags in CHAINS}
STATELESS = ("eval_only", "eval_teacher_swin", "eval_teacher_movinet")  # what keeps nothing between two starts
UNMETERED = (*STATELESS, "train_victim")


class Fault(NamedTuple):
    kind: str
    at: int  # number of the event
    rank: int = 0  # of the process that meets it


class Life(NamedTuple):
    """One process of a run, from its start to its end."""

    status: int  # negative: killed by that signal
    output: str


class Setting(NamedTuple):
    """A run: the same setting, undisturbed, is what a disturbed one is compared with."""

    name: str
    budget: int | None = None
    num_processes: int = 1


class Violation(Exception):
    pass


# --- in the process of a run -------------------------------------------------------------------------------------------------


class Events:
    """Counts events in the process of a run, and lets its fault happen at one of them."""

    def __init__(self, fault: Fault | None, counted_in: Path):
        self.fault, self.count, self.process = fault, 0, os.getpid()
        self.disk_is_full = self.clock_is_back = False
        self.counted_in = counted_in

    def tick(self, writes: Callable[[int], Exception] | None = None) -> None:
        """An event; `writes` makes the error of a write that fails out of an errno."""
        if os.getpid() != self.process:  # a loader worker
            return
        self.count += 1
        fault = self.fault
        if fault is not None and self.count >= fault.at:
            self.meet(fault, writes)
        if self.disk_is_full and writes is not None:
            raise writes(errno.ENOSPC)

    def meet(self, fault: Fault, writes: Callable[[int], Exception] | None) -> None:
        if fault.kind == "I/O error":
            if writes is None:  # the next write, then
                return
            self.fault = None
            raise writes(errno.EIO)
        self.fault = None
        match fault.kind:
            case "freeze" | "second start":
                os.kill(self.process, signal.SIGSTOP)  # the harness lets it go on
            case "Ctrl-C":
                os.kill(self.process, signal.SIGINT)
            case "Ctrl-C twice":
                os.kill(self.process, signal.SIGINT)
                self.fault = Fault("Ctrl-C", self.count + 3)
            case "SIGTERM":
                os.kill(self.process, signal.SIGTERM)
            case "disk full":
                self.disk_is_full = True
            case "file too large":
                resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
            case "clock set back":
                self.clock_is_back = True
            case "kill worker":
                for worker in multiprocessing.active_children()[:1]:
                    os.kill(worker.pid, signal.SIGKILL)
            case _:
                os.kill(self.process, signal.SIGKILL)


def install(events: Events, meter: Path) -> None:
    """Put events, faults and the meter where the process writes, asks and steps."""

    def around(owner: Any, name: str, error: Callable[[int], Exception] | None = None) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            events.tick(error)
            result = original(*args, **options)
            events.tick()
            return result

        setattr(owner, name, call)

    def of_files(number: int) -> OSError:
        return OSError(number, os.strerror(number))

    for name in ("fsync", "replace", "rename"):
        around(os, name, of_files)

    class Connection(sqlite3.Connection):
        """A connection whose transactions are events, and fail as a disk fails."""

        def execute(self, statement: str, *values: Any) -> Any:
            if statement.startswith("BEGIN"):
                events.tick(of_sqlite)
            return super().execute(statement, *values)

        def executemany(self, *values: Any) -> Any:
            events.tick(of_sqlite)
            return super().executemany(*values)

        def __exit__(self, kind: Any, *more: Any) -> Any:
            if kind is None:
                try:
                    events.tick(of_sqlite)
                except sqlite3.Error:
                    self.rollback()
                    raise
            result = super().__exit__(kind, *more)
            events.tick(of_sqlite)  # the disk may say no after it has written, too
            return result

    def of_sqlite(number: int) -> sqlite3.Error:
        return sqlite3.OperationalError("database or disk is full" if number == errno.ENOSPC else "disk I/O error")

    connect = sqlite3.connect
    sqlite3.connect = lambda *args, **options: connect(*args, **{"factory": Connection, **options})  # type: ignore[assignment]

    put_meter(meter, events.tick)
    # Half of a life would go on drawing the clips of the first batch.
    plots.draw_clips = lambda path, *_, **__: write_atomically(path, lambda file: file.write(b"drawn"))
    register_optimizer_step_post_hook(lambda *_: events.tick())
    now = time.time
    time.time = lambda: now() - 86_400 * events.clock_is_back


def live(script: str, flags: list[str], fault: Fault | None, log: Path, meter: Path, place: dict[str, str]) -> int:
    """Be the process of a run. Returns its exit status."""
    os.setsid()
    tqdm.set_lock(threading.RLock())  # the one it has is shared with all that are forked from here, and dies locked with one
    for number, opened in ((0, os.open(os.devnull, os.O_RDONLY)), (1, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))):
        os.dup2(opened, number)
    os.dup2(1, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(place)
    os.chdir(ROOT)
    events = Events(fault, log.with_suffix(".events"))
    install(events, meter)
    sys.argv = [script, *flags]
    status = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    events.fault, events.disk_is_full = None, False
    events.counted_in.write_text(str(events.count))
    with contextlib.suppress(BaseException):
        multiprocessing.util._exit_function()
        atexit._run_exitfuncs()
    return status


# --- in the harness ----------------------------------------------------------------------------------------------------------


def start(script: str, flags: list[str], fault: Fault | None, log: Path, meter: Path, place: dict[str, str]) -> int:
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        status = 99
        try:
            status = live(script, flags, fault, log, meter, place)
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return process


def wait_for(processes: list[int], deadline: float, when_stopped: Callable[[], None]) -> list[int]:
    """The statuses of the processes of a run; what stops on the way goes on. Raises Violation when one hangs."""
    statuses: dict[int, int] = {}
    while len(statuses) < len(processes):
        for process in processes:
            found, status = os.waitpid(process, os.WNOHANG | os.WUNTRACED) if process not in statuses else (0, 0)
            if found and os.WIFSTOPPED(status):
                try:
                    when_stopped()
                finally:
                    os.kill(process, signal.SIGCONT)
            elif found:
                statuses[process] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for process in [process for process in processes if process not in statuses]:
                os.killpg(process, signal.SIGKILL)
                os.waitpid(process, 0)
            raise Violation(f"hung for {TIMEOUT:.0f} seconds")
        time.sleep(0.01)
    return [statuses[process] for process in processes]


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


class Harness:
    """Runs schedules below one folder; keeps the undisturbed runs that they are compared with."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.references: dict[Setting, int] = {}  # events of a life
        self.lives: Counter[tuple[str, int]] = Counter()  # by kind of fault and status
        self.asked_twice = 0
        write_demo_set(folder / "set", {"train_5per": 2, "val": 1, "unrelated_a": 1, "unrelated_b": 1}, processes=1)

    def flags(self, setting: Setting, out_dir: Path, checkpoint_seconds: float, num_workers: int) -> tuple[str, list[str]]:
        script, flags = SCRIPTS[setting.name]
        flags = [self._fill(flag) for flag in flags]
        demo = [] if setting.name == "train_victim" else ["--demo"]
        where = ["--csv", f"{out_dir}/scores.csv"] if setting.name == "eval_only" else ["--out-dir", str(out_dir)]
        often = [] if setting.name in STATELESS else ["--checkpoint-seconds", str(checkpoint_seconds)]
        budget = [] if setting.budget is None else ["--query-budget", str(setting.budget)]
        return script, [*demo, *flags, *where, *often, *budget, "--device", "cpu", "--num-workers", str(num_workers)]

    def _fill(self, flag: str) -> str:
        """A flag of the golden runs, its folders and weight files those of this harness."""
        if re.fullmatch(r"\{\w+\}", flag):
            setting = Setting(flag[1:-1])
            self.reference(setting)
            return str(self.place(setting) / "student.safetensors")
        return flag.replace(golden.SMALL, str(self.folder / "set"))

    def place(self, setting: Setting) -> Path:
        return self.folder / "undisturbed" / "-".join(map(str, setting))

    def reference(self, setting: Setting) -> int:
        """The events of the undisturbed run, which is made when it is first asked for."""
        if setting not in self.references:
            out_dir = self.place(setting)
            lives = self.run(setting, out_dir, None, 1e9, 0)
            if any(life.status for life in lives):
                raise SystemExit(f"{setting}: the undisturbed run fails\n{lives[0].output[-3000:]}")
            self.references[setting] = int((out_dir.parent / f"{out_dir.name}.0.events").read_text())
        return self.references[setting]

    def run(
        self, setting: Setting, out_dir: Path, fault: Fault | None, checkpoint_seconds: float, num_workers: int,
        when_stopped: Callable[[], None] = lambda: None,
    ) -> list[Life]:  # fmt: skip
        """One life of a run: of all its processes."""
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        if setting.name == "eval_only":
            out_dir.mkdir(exist_ok=True)
        script, flags = self.flags(setting, out_dir, checkpoint_seconds, num_workers)
        together = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE=str(setting.num_processes))
        together["LOCAL_WORLD_SIZE"] = together["WORLD_SIZE"]
        logs = [out_dir.parent / f"{out_dir.name}.{rank}.log" for rank in range(setting.num_processes)]
        meter = out_dir.parent / f"{out_dir.name}.meter"
        processes = []
        for rank, log in enumerate(logs):
            place = together | dict(RANK=str(rank), LOCAL_RANK=str(rank)) if setting.num_processes > 1 else {}
            own = fault if fault is not None and fault.rank == rank else None
            processes.append(start(script, flags, own, log, meter, place))
        deadline = time.monotonic() + TIMEOUT
        statuses = wait_for(processes, deadline, when_stopped)
        return [Life(status, log.read_text(errors="replace")) for status, log in zip(statuses, logs, strict=True)]

    def schedule(self, seed: int, names: list[str]) -> str:
        """Run a schedule. Returns what it was, in a line; raises Violation."""
        chance = random.Random(seed)
        name = names[seed % len(names)]
        setting = Setting(name)
        self.reference(setting)
        most = 0 if name in UNMETERED else count_queries(self.place(setting))
        if most and chance.random() < 0.4:
            setting = Setting(name, chance.choice([most // 3, most // 2, most - 3]))
        kinds = [chance.choice(FAULTS) for _ in range(chance.randint(1, 4))]
        script, flags = SCRIPTS[name]
        if "kill one of two" in kinds and script.startswith("grey_box/swin_to_r21") and "--mixup" not in flags:
            setting = setting._replace(num_processes=2, budget=None)
        out_dir = self.folder / f"schedule{seed}" / "run"
        story = f"seed {seed}: {'-'.join(str(part) for part in setting)}: "
        told: list[str] = []
        events, lost = self.reference(setting), 0
        checkpoint_seconds = chance.choice([0.0, 0.0, 0.3, 1e9])
        try:
            for kind in kinds:
                fault = Fault(kind, chance.randint(1, events), chance.randrange(setting.num_processes))
                num_workers = 0 if kind == "file too large" else 1 if kind == "kill worker" else chance.choice([0, 0, 1])
                stopped = self._second_start(setting, out_dir) if kind == "second start" else lambda: time.sleep(0.3)
                lives = self.run(setting, out_dir, fault, checkpoint_seconds, num_workers, stopped)
                told.append(f"{kind} at {fault.at} -> {', '.join(str(life.status) for life in lives)}")
                self.lives[kind, lives[0].status] += 1
                check_ends(kind, lives)
                lost += count_unanswered(out_dir)
                check_bill(setting, out_dir)
                if kind.startswith("kill, ") and all(life.status < 0 for life in lives):
                    self._damage(kind, setting, out_dir, checkpoint_seconds, chance)
                if all(life.status == 0 for life in lives):
                    break
            lives = self.run(setting, out_dir, None, checkpoint_seconds, 0)
            if any(life.status for life in lives):
                raise Violation(f"the last life ends with {lives[0].status}:\n{lives[0].output[-1500:]}")
            self.asked_twice += self._compare(setting, out_dir, lost)
        except Violation as violation:
            raise Violation(f"{story}{'; '.join(told)}\n  {violation}") from None
        shutil.rmtree(out_dir.parent)
        return story + "; ".join(told)

    def _second_start(self, setting: Setting, out_dir: Path) -> Callable[[], None]:
        """What the harness does while the run is stopped: start it a second time."""

        def start_again() -> None:
            script, flags = self.flags(setting, out_dir, 1e9, 0)
            log = out_dir.parent / "second.log"
            process = start(script, flags, None, log, out_dir.parent / "second.meter", {})
            (status,) = wait_for([process], time.monotonic() + TIMEOUT, lambda: None)
            output = log.read_text()
            answered = read_meter(out_dir.parent / "second.meter")
            refused = status == 1 and "a run is going on in it (process " in output and not answered
            # Before the first took the lock, or after it wrote its results, the second is a start like any other.
            locked = (out_dir / "run.lock").exists() and not (out_dir / "results.json").exists()
            if locked and not refused and setting.num_processes == 1 and setting.name not in STATELESS:
                raise Violation(f"a second start ends with {status}:\n{output[-800:]}")
            if "Traceback" in output:
                raise Violation(f"a second start:\n{output[-1500:]}")

        return start_again

    def _damage(self, kind: str, setting: Setting, out_dir: Path, checkpoint_seconds: float, chance: random.Random) -> None:
        """Damage files after a kill, and see that a start says so or does not mind."""
        if kind == "kill, torn files":  # what was under way when the power went
            for name in ("state.pt", "results.json", "student.safetensors", "config.json"):
                if (self.place(setting) / name).exists() and out_dir.is_dir() and chance.random() < 0.5:
                    (out_dir / f"{name}.partial").write_bytes(chance.randbytes(3000))
            wal = out_dir / "ledger.sqlite-wal"
            if wal.exists():
                with wal.open("ab") as file:
                    file.write(chance.randbytes(chance.randint(1, 20_000)))
            return
        if kind == "kill, damaged cache":  # no word of it: what is damaged is decoded again
            for path in (out_dir.parent / "clip_cache").glob("*"):
                content = bytearray(path.read_bytes() if path.is_file() else b"")
                for _ in range(20 if content else 0):
                    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
                if content:
                    path.write_bytes(content[: chance.choice([len(content), chance.randrange(len(content))])])
            return
        path = out_dir / ("state.pt" if kind == "kill, damaged checkpoint" else "ledger.sqlite")
        if not path.exists() or path.stat().st_size < 2000:
            return
        kept = {file: file.read_bytes() for file in out_dir.iterdir() if file.is_file()}
        content = bytearray(kept[path])
        if kind == "kill, damaged checkpoint":
            content = content[: chance.randrange(len(content))]
        else:
            at = chance.randrange(len(content) - 1000)
            content[at : at + 1000] = chance.randbytes(1000)
        path.write_bytes(content)
        meter = out_dir.parent / f"{out_dir.name}.meter"
        metered = meter.read_bytes() if meter.exists() else b""
        lives = self.run(setting, out_dir, None, checkpoint_seconds, 0)
        for life in lives:
            if "Traceback" in life.output or life.status not in (0, 1, 3):
                raise Violation(f"{path.name} damaged, ends with {life.status}:\n{life.output[-1500:]}")
        if lives[0].status == 1 and path.name not in lives[0].output:
            raise Violation(f"{path.name} damaged, and the line does not name it:\n{lives[0].output[-500:]}")
        for file in out_dir.iterdir():  # as it was before the damage: what the damaged run did is undone
            if file.is_file():
                file.unlink()
        for file, content_before in kept.items():
            file.write_bytes(content_before)
        meter.write_bytes(metered)

    def _compare(self, setting: Setting, out_dir: Path, lost: int) -> int:
        """Hold a run that came to its end against the undisturbed one. Returns how many queries were counted twice."""
        undisturbed = self.place(setting)
        left = [path.name for path in out_dir.rglob("*") if re.search(r"\.(partial|tmp)$", path.name)]
        if left:
            raise Violation(f"temporary files are left: {left}")
        twice = 0
        if (out_dir / "ledger.sqlite").exists() and count_queries(out_dir):
            try:
                with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                    ledger.verify(str(out_dir / "ledger.sqlite"))
            except UserError as error:
                raise Violation(f"the ledger is not whole: {error}") from None
            twice = count_queries(out_dir) - count_queries(undisturbed)
            if not 0 <= twice <= lost:
                raise Violation(f"{twice} queries more than undisturbed, {lost} were in flight at faults")
        if setting.budget is not None and (twice or lost):
            return twice  # what was asked twice is missing at the end
        for mine, other in zip(read_outcome(out_dir), read_outcome(undisturbed), strict=True):
            if mine != other:
                raise Violation(f"not the undisturbed run's: {str(mine)[:300]} / {str(other)[:300]}")
        return twice


def count_queries(out_dir: Path) -> int:
    return json.loads((out_dir / "results.json").read_text())["num_queries"]


def read_ledger(out_dir: Path, statement: str) -> list[tuple]:
    path = out_dir / "ledger.sqlite"
    if not path.exists():
        return []
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=60)) as database:
            return database.execute(statement).fetchall()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):  # killed before it made them
            return []
        raise Violation(f"the ledger cannot be read: {error}") from None


def count_unanswered(out_dir: Path) -> int:
    return (read_ledger(out_dir, "SELECT count(*) FROM asked") or [(0,)])[0][0]


def check_bill(setting: Setting, out_dir: Path) -> None:
    """Raise Violation when the ledger counts less than the meter, or the meter more than the budget."""
    answered = read_meter(out_dir.parent / f"{out_dir.name}.meter")
    counted = int((read_ledger(out_dir, "SELECT value FROM about WHERE name = 'num_queries'") or [(0,)])[0][0])
    if answered > counted:
        raise Violation(f"the victim answered {answered} clips, the ledger counts {counted}")
    if setting.budget is not None and answered > setting.budget:
        raise Violation(f"the victim answered {answered} clips, the budget was {setting.budget}")
    if read_ledger(out_dir, "SELECT key FROM answers GROUP BY key HAVING count(*) > 1"):
        raise Violation("a key has two answers")


def check_ends(kind: str, lives: list[Life]) -> None:
    """Raise Violation when a life ended otherwise than its fault allows, or without one line of reason."""
    fine = {
        "freeze": {0}, "second start": {0}, "clock set back": {0}, "kill worker": {0},
        "Ctrl-C": {0, 130}, "Ctrl-C twice": {0, 130}, "SIGTERM": {0, 130, -15},
        "disk full": {0, 1}, "I/O error": {0, 1}, "file too large": {0, 1},
    }.get(kind, {0, -9})  # fmt: skip
    if kind == "second start" and "another process writes it too" in lives[0].output:  # two that score, without a lock
        fine = {1}
    for number, life in enumerate(lives):
        allowed = fine | ({1, 3, 130} if len(lives) > 1 else set())
        if life.status not in allowed or "Traceback" in life.output:
            raise Violation(f"{kind}: process {number} ends with {life.status}:\n{life.output[-2500:]}")
        said = (life.output.replace("\r", "\n").strip().splitlines() or [""])[-1].strip()  # the last line
        reason = {1: r"\w+\.py: .+", 130: r"saved in .+|interrupted"}.get(life.status)
        if len(lives) == 1 and reason is not None and not re.match(reason, said):
            raise Violation(f"{kind}: ends with {life.status} and without a reason, but with {said[-300:]!r}")


def read_outcome(out_dir: Path) -> list[Any]:
    """What a run leaves, but for times and queries that were counted twice."""
    outcome: list[Any] = []
    for name in ("student.safetensors", "victim.safetensors"):
        if (out_dir / name).exists():
            weights = {key: value.numpy().tobytes() for key, value in read_state(out_dir / name).items()}
            about = {key: value for key, value in read_metadata(out_dir / name).items() if key != "num_queries"}
            outcome += [about, weights]
    if (out_dir / "results.json").exists():
        results = json.loads((out_dir / "results.json").read_text())
        outcome.append([{k: v for k, v in point.items() if k != "num_queries"} for point in results.get("history", [])])
        outcome.append({k: results.get(k) for k in ("top1", "top5", "agreement_at_1", "agreement_at_5", "stopped")})
    return outcome + [re.sub(r"schedule\d+/run|undisturbed/[\w-]+", "", p.read_text()) for p in sorted(out_dir.glob("*.csv"))]


def preload() -> None:
    """Import all that a script imports, once."""
    for path in [*ROOT.glob("*_box/*.py"), ROOT / "eval_only.py", ROOT / "train_victim.py"]:
        runpy.run_path(str(path), run_name="preloaded")
    for name in ("torch.utils.tensorboard", "matplotlib.pyplot", "torchvision.models.video", "timm", "accelerate", "av"):
        importlib.import_module(name)


def run_schedules(folder: Path, seeds: list[int], names: list[str]) -> tuple[list[str], Harness]:
    harness, violations = Harness(folder), []
    for seed in seeds:
        try:
            print(harness.schedule(seed, names), flush=True)
        except Violation as violation:
            violations.append(str(violation))
            print(f"VIOLATION {violation}", flush=True)
    return violations, harness


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="that of the first schedule")
    parser.add_argument("--only", nargs="*", default=(), help="names of runs, as in tests/golden.py")
    parser.add_argument("--jobs", type=int, default=1, help="schedules at a time")
    parser.add_argument("--keep", type=Path, help="a folder that stays; by default a temporary one")
    args = parser.parse_args()
    names = [name for name in SCRIPTS if not args.only or name in args.only]
    seeds = range(args.seed, args.seed + args.schedules)
    preload()
    began, jobs = time.monotonic(), []
    folder = args.keep or Path(tempfile.mkdtemp(prefix="chaos"))
    for job in range(args.jobs):
        process = os.fork()
        if process == 0:
            # A job has scripts of its own, so that no undisturbed run is made twice.
            own = [seed for seed in seeds if seed % len(names) % args.jobs == job]
            violations, harness = run_schedules(folder / f"job{job}", own, names)
            lives = [[kind, status, count] for (kind, status), count in harness.lives.items()]
            summary = dict(violations=violations, lives=lives, twice=harness.asked_twice)
            (folder / f"job{job}.json").write_text(json.dumps(summary))
            os._exit(0)
        jobs.append(process)
    for process in jobs:
        if os.waitpid(process, 0)[1]:
            sys.exit("a job of the harness failed")
    summaries = [json.loads((folder / f"job{job}.json").read_text()) for job in range(args.jobs)]
    by_kind: dict[str, Counter[int]] = {}
    for summary in summaries:
        for kind, status, count in summary["lives"]:
            by_kind.setdefault(kind, Counter())[status] += count
    print(f"\n{'fault':26} lives  by exit status")
    for kind in sorted(by_kind):
        print(f"{kind:26} {by_kind[kind].total():5}  {', '.join(f'{s}: {n}' for s, n in sorted(by_kind[kind].items()))}")
    violations = [line for summary in summaries for line in summary["violations"]]
    print(
        f"{args.schedules} schedules over {len(names)} runs in {time.monotonic() - began:.0f} s: {len(violations)} violations, "
        f"{sum(summary['twice'] for summary in summaries)} queries counted twice"
    )
    if not args.keep and not violations:
        shutil.rmtree(folder)
    sys.exit(bool(violations))


if __name__ == "__main__":
    main()
