"""MoViNet Stream in int8, ours beside LiteRT on real videos: how often their answers agree, and clips a second.

python benchmarks/movinet_int8.py --tflite movinet_a0_stream_int8.tflite --videos FOLDER

Both read the same file. The other rows say what the agreement is worth: LiteRT with its other kernels (those that run when
XNNPACK is switched off), and ours without its rounding, which are the weights of the file in float32. Needs `pip install -e
'.[tflite]'`.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import av
import torch
from torch import Tensor

from extraction import options
from extraction.data.decoding import Unreadable, decode_clip, probe
from extraction.errors import UserError
from extraction.experiment import run_script
from extraction.victims import movinet_int8
from extraction.victims.zoo import load_model

Answer = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Config:
    tflite: str = "weights/movinet_a0_stream_int8.tflite"
    """The .tflite file of MoViNet-A0 Stream in int8."""
    videos: str = "datasets/kinetics600_val"
    """A folder of videos, with labels or without."""
    num_frames: options.Count = 16
    """Frames of a clip."""
    frames_per_second: options.Rate = 5.0
    """Frames of a clip in a second of its video."""
    clips_per_video: options.Count = 3
    """Clips of a video, evenly from its beginning to its end."""
    batch_size: options.Count = 4
    """Clips of a batch."""
    threads: options.Count = 1
    """Threads of each of them."""


def read_clips(config: Config) -> Iterator[Tensor]:
    """Clips, uint8 (T, 172, 172, 3)."""
    for path in sorted(path for path in Path(config.videos).rglob("*") if path.is_file()):
        try:
            with av.open(str(path)) as container:
                rate = float(container.streams.video[0].average_rate or 25)
            stride = max(1, round(rate / config.frames_per_second))
            last = max(0, probe(path).num_frames - config.num_frames * stride)
            for k in range(config.clips_per_video):
                start = last * k // max(1, config.clips_per_video - 1)
                yield torch.from_numpy(decode_clip(path, start, config.num_frames, stride, 172))
        except (Unreadable, av.error.FFmpegError, IndexError) as error:
            print(f"{path}: left out ({error})")


def open_other_kernels(file: str, threads: int) -> Answer:
    """LiteRT without XNNPACK."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    kernels = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    run = Interpreter(file, num_threads=threads, experimental_op_resolver_type=kernels).get_signature_runner()
    zeros = {
        name: torch.zeros(*about["shape"]).numpy().astype(about["dtype"]) for name, about in run.get_input_details().items()
    }

    def answer(clips: Tensor) -> Tensor:
        rows = []
        for clip in clips:
            states: dict[str, Any] = {name: values for name, values in zeros.items() if name != "image"}
            for frame in clip.unbind(1):
                states = run(image=frame.permute(1, 2, 0)[None, None].numpy(), **states)
                logits = torch.from_numpy(states.pop("logits").copy())
            rows.append(logits)
        return torch.cat(rows)

    return answer


def without_rounding(answer: Answer) -> Answer:
    def scale(self: movinet_int8.Rounding, x: Tensor) -> Tensor:
        return (x * self.scale.view(-1, *[1] * (x.ndim - 2))).clamp(self.low, self.high)

    def add(self: movinet_int8.Sum, x: Tensor, other: Tensor) -> Tensor:
        total = (x * self.factor + other * self.other_factor) / 2**self.shift
        return total.clamp(self.low, self.high)

    def run(clips: Tensor) -> Tensor:
        with ExitStack() as patches:
            patches.enter_context(patch.object(movinet_int8.Rounding, "forward", scale))
            patches.enter_context(patch.object(movinet_int8.Sum, "forward", add))
            patches.enter_context(patch.object(movinet_int8.Halve, "forward", lambda self, x: movinet_int8.halve(x)))
            return answer(clips)

    return run


def describe(logits: Tensor, wanted: Tensor) -> str:
    best, log_probs, target = wanted.argmax(1), logits.log_softmax(1), wanted.log_softmax(1)
    top1 = (logits.argmax(1) == best).float().mean()
    top5 = (logits.topk(5).indices == best[:, None]).any(1).float().mean()
    divergence = (target.exp() * (target - log_probs)).sum(1).mean()
    same = (logits == wanted).all(1).float().mean()
    return f"agreement@1 {top1:.1%}, @5 {top5:.1%}, KL {divergence:.4f}, logits equal in {same:.1%}"


@torch.inference_mode()
def main(config: Config) -> None:
    options.check_options(config)
    if not Path(config.videos).is_dir():
        raise UserError(f"--videos {config.videos}: there is no such folder")
    torch.set_num_threads(config.threads)
    theirs = load_model(f"tflite:{config.tflite}", classes="k600")
    ours = load_model("movinet_a0_stream_k600", config.tflite)
    rows: dict[str, Answer] = {
        "LiteRT": theirs,
        "ours": ours,
        "LiteRT without XNNPACK": open_other_kernels(config.tflite, config.threads),
        "ours without rounding": without_rounding(ours),
    }
    logits: dict[str, list[Tensor]] = {name: [] for name in rows}
    seconds = dict.fromkeys(rows, 0.0)
    clips = torch.stack(list(read_clips(config)))
    for batch in clips.split(config.batch_size):
        batch = batch.permute(0, 4, 1, 2, 3).float() / 255
        for name, answer in rows.items():  # in turn, so that a slow moment of the machine hits all
            begin = time.perf_counter()
            logits[name].append(answer(batch))
            seconds[name] += time.perf_counter() - begin
    shape = f"{config.num_frames} frames, batches of {config.batch_size}, threads: {config.threads}"
    print(f"{len(clips)} clips of {shape}; agreement with LiteRT's answers")
    wanted = torch.cat(logits["LiteRT"])
    for name in rows:
        print(f"{name:22} {len(clips) / seconds[name]:6.2f} clips/s, {describe(torch.cat(logits[name]), wanted)}")


if __name__ == "__main__":
    run_script(main, Config)
