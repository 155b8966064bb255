"""The cells of a sweep: chains of scripts, several at a time on this machine, or on the nodes of a Dask cluster.

Each script is a process of its own. It ends with the process that started it: when that one is killed, the script finishes
its step, saves, and lets its run folder go, and another node takes the cell over.
"""

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from tqdm import tqdm

from extraction.errors import UserError, printable

ANSWER_SECONDS = 10  # that an engine may take to answer
STOP_SECONDS = 45  # between Ctrl-C, after which scripts finish their step and save, and the end of those that have not
LOCK_SECONDS = 300  # that a cell waits for a run whose node was lost, and which is saving

# What stands between this process and a script. When the pipe to it is closed, which the system does too for a process that is
# killed, it asks the script to stop, once: a second time would cut its step short. (Linux's PR_SET_PDEATHSIG comes again for
# each thread of the parent that ends.)
_SUPERVISOR = """
import os, subprocess, sys, threading
script = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
threading.Thread(target=lambda: (os.read(0, 1), script.terminate()), daemon=True).start()
status = script.wait()
os._exit(status if status >= 0 else 128 - status)
"""

_lock = threading.Lock()
_running: dict[subprocess.Popen, str] = {}  # the scripts of this process, each with its sweep
_stopped: set[str] = set()  # sweeps


class Step(NamedTuple):
    """One script of a cell."""

    name: str  # in the line of those that failed
    title: str  # in the lines of its start and its end
    folder: str  # its run folder
    command: tuple[str, ...]  # the script and its flags; `{node}` stands for the machine's name


def run_cells(cells: Sequence[Sequence[Step]], jobs: int = 1, cluster: str | None = None) -> list[str]:
    """Run all steps of all cells, those of a cell in order. Returns the names of the steps that failed, in order.

    `jobs` cells run at a time on this machine, or as many as the nodes of the Dask scheduler at `cluster` have threads. One
    at a time writes to the terminal; of several each script writes into `log.txt` of its run folder, and the terminal shows
    when they start and end. Ctrl-C (or SIGTERM) lets the steps under way finish and save, ends what has not within a minute,
    and raises KeyboardInterrupt. Raises UserError for an engine that is not there.
    """
    if cluster is not None and jobs > 1:
        raise UserError("--jobs and --cluster: choose one; a node runs as many cells at a time as it has threads")
    if not cells:
        return []
    sweep = uuid.uuid4().hex
    engine = _open_machine(jobs, sweep) if cluster is None else _open_cluster(cluster, sweep)
    failed: list[str] = []
    futures: dict[Future, Sequence[Step]] = {}
    with _terminable(), engine as (submit, stop):
        try:
            futures.update((submit(steps), steps) for steps in cells)
            alone = cluster is None and jobs == 1
            for future in tqdm(as_completed(futures), "cells", len(cells), unit="cell", dynamic_ncols=True, disable=alone):
                if cluster is None:
                    future.result()
            for future, steps in futures.items():
                failed += _name_failed(future, steps)
        except BaseException as error:
            done = sum(future.done() for future in futures)
            try:
                stop()
                wait(futures, STOP_SECONDS)
            finally:  # after a second Ctrl-C too
                stop(at_once=True)
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(f"stopped, {done} of {len(cells)} cells are done; the same command goes on") from None
            raise
    return failed


def _name_failed(future: Future, steps: Sequence[Step]) -> list[str]:
    """The steps of a cell that failed: all, if the engine could not run it."""
    try:
        return future.result()
    except Exception as error:  # CancelledError, which says nothing: the engine itself is gone
        tqdm.write(printable(f"{steps[0].title}: not run to its end ({type(error).__name__} {error})"))
        return [step.name for step in steps]


@contextlib.contextmanager
def _open_machine(jobs: int, sweep: str) -> Iterator[tuple[Callable[..., Future], Callable[..., Any]]]:
    """This machine: what submits a cell, and what stops all of them."""
    environment: dict[str, str] = {}
    gpus: list[str] = []
    if jobs > 1:
        if "OMP_NUM_THREADS" not in os.environ:
            environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
        threads = (os.environ | environment)["OMP_NUM_THREADS"]
        gpus = _list_gpus()
        shared = f"; GPUs {', '.join(gpus)} in turn" if gpus else ""
        print(f"{jobs} cells at a time, OMP_NUM_THREADS {threads} each{shared}", flush=True)
    free: SimpleQueue[dict[str, str]] = SimpleQueue()
    for slot in range(jobs):
        free.put({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {})

    def run(steps: Sequence[Step]) -> list[str]:
        own = free.get()
        try:
            return run_steps(steps, sweep, os.getcwd(), environment | own, tqdm.write if jobs > 1 else None)
        finally:
            free.put(own)

    with ThreadPoolExecutor(jobs) as pool:
        yield lambda steps: pool.submit(run, steps), partial(stop_sweep, sweep)


def _list_gpus() -> list[str]:
    """The GPUs that this process may see, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


@contextlib.contextmanager
def _open_cluster(address: str, sweep: str) -> Iterator[tuple[Callable[..., Future], Callable[..., Any]]]:
    """The nodes of a Dask scheduler: what submits a cell, and what stops all of them.

    The engine gives a cell of a node that it loses to another one, three times.
    """
    try:
        from distributed import Client
    except ImportError:
        raise UserError("--cluster: Dask is not installed: pip install -e '.[cluster]'") from None
    try:
        client = Client(address, timeout=ANSWER_SECONDS, set_as_default=False)
    except (OSError, ValueError, RuntimeError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"--cluster {address}: no Dask scheduler answers there ({why}); start one with `dask scheduler`"
        ) from None
    here = os.getcwd()
    with client:
        nodes = client.run(look_at_node, here, on_error="return")
        for node, found in nodes.items():
            if isinstance(found, BaseException):
                raise UserError(f"--cluster {address}: node {node} cannot run cells ({type(found).__name__}: {found})")
        told = {name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ}
        each = ", ".join(sorted(set(told.values()) or set(nodes.values()))) or "as on the nodes"
        slots = sum(client.nthreads().values())
        print(f"{slots} cells at a time on {len(nodes)} nodes of {address}, OMP_NUM_THREADS {each} each", flush=True)
        client.subscribe_topic(sweep, lambda event: tqdm.write(event[1]))
        submit = client.get_executor(pure=False).submit

        def stop(at_once: bool = False) -> None:  # a node that hangs may not make the others wait
            tell = partial(client.run, stop_sweep, sweep, at_once, on_error="ignore")
            thread = threading.Thread(target=tell, daemon=True)
            thread.start()
            thread.join(ANSWER_SECONDS / 2)

        yield lambda steps: submit(_run_on_node, steps, sweep, here, told), stop


def look_at_node(folder: str) -> str:
    """The number of threads of a node's scripts. Raises FileNotFoundError when it does not see the shared folder."""
    os.stat(folder)
    return os.environ.get("OMP_NUM_THREADS", "of all cores")


def _run_on_node(steps: Sequence[Step], sweep: str, folder: str, environment: Mapping[str, str]) -> list[str]:
    from distributed import get_worker

    return run_steps(steps, sweep, folder, environment, partial(get_worker().log_event, sweep), LOCK_SECONDS)


def run_steps(
    steps: Sequence[Step], sweep: str, folder: str, environment: Mapping[str, str], say: Callable[[str], None] | None,
    patience: float = 0,
) -> list[str]:  # fmt: skip
    """Run the steps of a cell in `folder`, one after the other. Returns the names of those that failed.

    Without `say` the scripts write to the terminal; with it into their logs, and it is told what starts and ends. A run folder
    that another process has is waited for, `patience` seconds at most.
    """
    failed = []
    node = socket.gethostname()
    for step in steps:
        if sweep in _stopped:
            break
        log = Path(folder, step.folder, "log.txt")
        if say is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            say(printable(f"{step.title}: started on {node}, {step.folder}/log.txt"))
        else:
            print(f"\n{step.title}", flush=True)
        _wait_for_folder(log.parent, sweep, patience)
        begin = time.monotonic()
        status = _run_script([flag.replace("{node}", node) for flag in step.command], sweep, folder, environment, say and log)
        if sweep in _stopped:
            break
        if status:
            failed.append(step.name)
        if say is not None:
            end = f"failed with status {status}: {_read_end(log)}" if status else f"done in {time.monotonic() - begin:.0f} s"
            say(printable(f"{step.title}: {end}"))
    return failed


def _run_script(command: Sequence[str], sweep: str, folder: str, environment: Mapping[str, str], log: Path | None) -> int:
    """The exit status of a script, which runs until it ends or its sweep is stopped."""
    with contextlib.nullcontext() if log is None else log.open("ab") as output:
        with _lock:  # a script is stopped, or never started
            if sweep in _stopped:
                return 0
            # In a group of its own: the terminal's Ctrl-C would reach it beside the pipe's end.
            process = subprocess.Popen(
                [sys.executable, "-ISc", _SUPERVISOR, sys.executable, *command],
                cwd=folder, env=os.environ | environment, stdin=subprocess.PIPE, stdout=output, stderr=output, process_group=0,
            )  # fmt: skip
            _running[process] = sweep
        with process:
            try:
                return process.wait()
            finally:
                with _lock:
                    del _running[process]


def stop_sweep(sweep: str, at_once: bool = False) -> None:
    """Have all scripts of a sweep that this process runs finish their step and save, or kill them; start no more of them."""
    with _lock:
        _stopped.add(sweep)
        for process in [process for process, of in _running.items() if of == sweep]:
            if at_once:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.killpg(process.pid, signal.SIGKILL)
            elif process.stdin:
                process.stdin.close()


def _wait_for_folder(folder: Path, sweep: str, patience: float) -> None:
    """Wait until no process has a run folder, or in vain."""
    end = time.monotonic() + patience
    while time.monotonic() < end and sweep not in _stopped:
        try:
            with (folder / "run.lock").open("r+") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.5)


def _read_end(log: Path) -> str:
    """The last line of a log: why a script failed."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
        lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Within it SIGTERM is as Ctrl-C."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
