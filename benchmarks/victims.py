"""How fast victims answer, in clips a second, and our MoViNet-A2 beside Google's SavedModel on the same clips.

python benchmarks/victims.py
python benchmarks/victims.py --saved-model weights/movinet_a2_base_kinetics-600_classification_3 --threads 1

Published victims get random weights: they are as fast as trained ones. A GPU shows float32 and bfloat16 (autocast) with
their peak memory. The comparison is made on the CPU, where the SavedModel runs, and needs `pip install -e '.[tensorflow]'`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from extraction import options
from extraction.compute import choose_compute, choose_device
from extraction.errors import UserError
from extraction.experiment import run_script
from extraction.network import VideoModel
from extraction.victims import movinet, swin
from extraction.victims.classes import KNOWN_CLASSES
from extraction.victims.query_interface import VictimModel
from extraction.victims.zoo import VICTIMS, load_model


@dataclass(frozen=True, kw_only=True)
class Config:
    victims: tuple[str, ...] = ()
    """Time only these."""
    saved_model: str | None = None
    """Compare with this SavedModel of MoViNet-A2 (an unpacked folder) instead."""
    batch_size: options.Count | None = None
    """Clips of a batch; by default 16 on a GPU and for the demo's victims, else 1."""
    repeats: options.Count = 3
    """Batches timed after the first one, which warms up; the best counts."""
    threads: options.Count | None = None
    """Threads that PyTorch and TensorFlow may each use on a CPU; by default what they take."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto is a GPU if there is one."""
    compile: Literal["auto", "on", "off"] = "off"
    """torch.compile."""


def create_random(name: str, classes: str, num_frames: int, size: int) -> VictimModel:
    if name.startswith("swin"):
        model = VideoModel(swin.FusedSwin(swin.create_swin(name, 400)), num_frames, size, swin.MEAN, swin.STD)
    else:
        model = VideoModel(movinet.MoViNet(name).eval().fuse(), num_frames, size)
    return VictimModel(model, KNOWN_CLASSES[classes](), name, "random")


MOVINETS = dict(a0=172, a1=172, a2=224)
CREATE: dict[str, Callable[[], VictimModel]] = {
    **{name: partial(load_model, name) for name in ("demo_swin", "demo_movinet") if VICTIMS[name][1].exists()},
    **{f"{name}_k400": partial(create_random, name, "k400", 32, 224) for name in ("swin_t", "swin_s", "swin_b")},
    **{f"movinet_{name}_k600": partial(create_random, name, "k600", 50, size) for name, size in MOVINETS.items()},
}


@torch.no_grad()
def time_batch(model: VictimModel, clips: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Seconds for the logits of a batch, and those."""
    begin = time.perf_counter()
    logits = model(clips)
    if clips.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin, logits


def time_victims(config: Config, device: torch.device) -> None:
    unknown = set(config.victims) - set(CREATE)
    if unknown:
        raise UserError(f"--victims {' '.join(sorted(unknown))}: there are {', '.join(CREATE)}")
    on_gpu = device.type == "cuda"
    for name in config.victims or CREATE:
        model = CREATE[name]()
        batch = config.batch_size or (16 if on_gpu or name.startswith("demo") else 1)
        length, size = model.model.num_frames, model.model.size
        clips = torch.rand(batch, 3, length, size, size, device=device)
        for precision in ("fp32", "bf16") if on_gpu else ("fp32",):
            choose_compute(config.device, precision, config.compile).prepare(model)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            time_batch(model, clips)
            seconds = min(time_batch(model, clips)[0] for _ in range(config.repeats))
            memory = f", at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if on_gpu else ""
            shape = f"{batch}x{length}x{size}x{size}"
            print(f"{name:16} {batch / seconds:9.2f} clips/s, {shape}, {precision}{memory}", flush=True)


def compare(folder: str, config: Config) -> None:
    """Ours and TensorFlow's in turn, with the same weights, so that a slow moment of the machine hits both."""
    try:
        import tensorflow as tf
    except ImportError as error:
        raise UserError(f"the comparison needs tensorflow ({error}): pip install -e '.[tensorflow]'") from None
    if config.threads:
        tf.config.threading.set_intra_op_parallelism_threads(config.threads)
        tf.config.threading.set_inter_op_parallelism_threads(config.threads)
    models = {"ours": load_model("movinet_a2_k600", folder), "SavedModel": load_model("movinet_a2_k600_tfhub", folder)}
    clips = torch.rand(config.batch_size or 1, 3, 50, 224, 224)
    best, logits = dict.fromkeys(models, float("inf")), {}
    for turn in range(1 + config.repeats):
        for name, model in models.items():
            seconds, logits[name] = time_batch(model, clips)
            if turn:  # the first one warms up: TensorFlow traces and compiles
                best[name] = min(best[name], seconds)
    for name, seconds in best.items():
        print(f"{name:12} {len(clips) / seconds:9.3f} clips/s, {len(clips)}x50x224x224 in {seconds:.2f} s")
    difference = (logits["ours"] - logits["SavedModel"]).abs().max()
    print(f"ours takes {best['ours'] / best['SavedModel']:.3f} of the SavedModel's time; ", end="")
    print(f"logits differ by at most {difference:.1e} (they spread by {logits['SavedModel'].std():.2f})")


def main(config: Config) -> None:
    options.check_options(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.saved_model:
        compare(config.saved_model, config)
    else:
        time_victims(config, choose_device(config.device))


if __name__ == "__main__":
    run_script(main, Config)
