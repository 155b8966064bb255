"""TFLite and ONNX files as victims: a network that answers clips through them, on several threads."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from extraction.errors import UserError
from extraction.network import VideoModel
from extraction.victims import onnx_model, tflite
from extraction.victims.classes import KNOWN_CLASSES, check_classes, read_classes
from extraction.victims.graphs import Graph, Plan, Run, Trial, answer_clip, plan_graph, read_about
from extraction.weights import fingerprint

TRIAL_SECONDS = 300  # what a damaged graph may take to try before it counts as one that never ends


class GraphModel(nn.Module):
    """A graph as a network: normalised (B, 3, T, H, W) -> float32 logits (B, num_classes).

    It runs on the CPU, a clip at a time, so that an answer depends on its clip alone, and on as many threads as PyTorch has,
    each with a runner of its own. It has no parameters, and answers come back to the device of the clips.
    """

    def __init__(self, graph: Graph, plan: Plan, num_classes: int, says_probs: bool):
        super().__init__()
        self.graph, self.plan, self.num_classes, self.says_probs = graph, plan, num_classes, says_probs
        self._runners: list[Run] = []

    def forward(self, batch: Tensor) -> Tensor:
        rows = torch.from_numpy(self._answer(batch.float().cpu().numpy())).to(batch.device)
        return rows.clamp_min(torch.finfo(torch.float32).tiny).log() if self.says_probs else rows

    def _answer(self, clips: np.ndarray) -> np.ndarray:
        if not len(clips):
            return np.empty((0, self.num_classes), np.float32)
        num_threads = min(len(clips), torch.get_num_threads())
        while len(self._runners) < num_threads:
            self._runners.append(self.graph.open_runner())
        if num_threads == 1:
            return np.stack([answer_clip(self.graph, self.plan, self._runners[0], clip) for clip in clips])
        idle: SimpleQueue[Run] = SimpleQueue()
        for run in self._runners[:num_threads]:
            idle.put(run)

        def answer(clip: np.ndarray) -> np.ndarray:
            run = idle.get()
            try:
                return answer_clip(self.graph, self.plan, run, clip)
            finally:
                idle.put(run)

        with ThreadPoolExecutor(num_threads) as pool:
            return np.stack(list(pool.map(answer, clips)))


def find_files(kind: str, file: Path, about: str | Path | None) -> list[Path]:
    """What makes a model file's answers beside it: its JSON file, and an ONNX file's weights."""
    path = find_about(file, about)
    return [*([] if path is None else [path]), *(onnx_model.find_data(file) if kind == "onnx" else [])]


def find_about(file: Path, about: str | Path | None) -> Path | None:
    """The JSON file that says what a model file does not: `about`, or `<file>.json` beside it if there is one."""
    beside = file.with_name(file.name + ".json")
    if about is not None and not Path(about).is_file():
        raise UserError(f"--victim-about {about}: there is no such file")
    return Path(about) if about is not None else beside if beside.is_file() else None


def _load(
    kind: Any, file: Path, classes: list[str] | None = None, about: str | Path | None = None
) -> tuple[VideoModel, list[str]]:
    """A TFLite or ONNX file with its classes: those given, else those that its JSON file says. Raises UserError."""
    if not file.is_file():
        raise UserError(f"{file}: is no file; give the model's own")
    kind.import_runtime()
    path = find_about(file, about)
    said = {} if path is None else read_about(path)
    classes = _find_classes(said, path) if classes is None else classes
    trial = _try_apart(kind.__name__, file, json.dumps(said), fingerprint(file))
    graph = kind.open_graph(file)
    plan = plan_graph(graph, said)
    says_probs = trial.says_probs if "answers" not in said else said["answers"] == "probs"
    if classes is None:
        raise UserError(
            f"{file}: has {trial.num_classes} outputs and no class names; name them by --victim-classes "
            f"({', '.join(KNOWN_CLASSES)}, or a text file with one name a line)"
        )
    check_classes(classes, file, trial.num_classes)
    net = GraphModel(graph, plan, trial.num_classes, says_probs)
    return VideoModel(net, plan.frames, plan.size, plan.mean, plan.std), classes


def _find_classes(said: dict[str, Any], path: Path | None) -> list[str] | None:
    named = said.get("classes")
    if path is None or not isinstance(named, str):
        return named
    return read_classes(named if named in KNOWN_CLASSES else path.parent / named)


@cache
def _try_apart(module: str, file: Path, said: str, _fingerprint: str) -> Trial:
    """Try a file in a process of its own, once per content. Raises UserError for what it says, and when it crashes."""
    command = [sys.executable, "-P", "-m", module, str(file.absolute())]
    paths = [str(Path(__file__).parents[2]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, paths))}
    run = partial(subprocess.run, capture_output=True, text=True, timeout=TRIAL_SECONDS, env=environment)
    try:
        with tempfile.TemporaryDirectory() as empty:  # nothing lies there that a path within the file could mean
            done = run(command, input=said, cwd=empty)
    except subprocess.TimeoutExpired:
        raise UserError(f"{file}: did not answer two clips within {TRIAL_SECONDS} s; damaged, or far too large") from None
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit status {done.returncode}"
        raise UserError(f"{file}: crashes what runs it ({how}); damaged, or made for another version") from None
    if "error" in found:
        raise UserError(found["error"].replace(str(file.absolute()), str(file)))
    return Trial(**found)


load_tflite: Callable[..., tuple[VideoModel, list[str]]] = partial(_load, tflite)
load_onnx: Callable[..., tuple[VideoModel, list[str]]] = partial(_load, onnx_model)
