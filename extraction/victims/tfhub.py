"""Google's own MoViNet behind the same query interface: a SavedModel, queried through `tensorflow_hub.load`.

It proves the PyTorch port and is 20 times slower on a CPU; for work take `movinet_a2_k600`, which reads the same file.
A SavedModel is a program, not only weights: its graph may read and write files. Open those whose source you trust.
"""

import contextlib
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from extraction.errors import UserError
from extraction.network import VideoModel
from extraction.victims.classes import kinetics600_classes


def _import():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tensorflow as tf
        import tensorflow_hub as hub
    except ImportError as error:
        raise UserError(
            f"a victim in TensorFlow needs tensorflow and tensorflow-hub ({error}): pip install -e '.[tensorflow]', "
            "or take movinet_a2_k600, which answers the same without them"
        ) from None
    # All GPU memory is PyTorch's: TensorFlow would take it whole. Letting it grow would still cost a CUDA context and never
    # give anything back, for a victim whose port runs on the GPU anyway. It fails where TensorFlow was in use before.
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")
    return tf, hub


def download(handle: str) -> Path:
    """The folder of a hub handle (https://...), fetched into tensorflow_hub's cache on its first use. Raises UserError."""
    _, hub = _import()
    try:
        return Path(hub.resolve(handle))
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{handle}: cannot be fetched ({str(error).splitlines()[0]}); pass an unpacked folder instead"
        ) from None


class SavedModel(nn.Module):
    """A SavedModel of the published signature: float (B, 3, T, H, W) in [0, 1] -> float32 logits (B, num_classes).

    It has no parameters and runs on the CPU; answers come back to the device of the clips. Raises UserError when the folder
    is not such a model, before the first query.
    """

    def __init__(self, folder: Path, num_classes: int):
        super().__init__()
        self.tf, hub = _import()
        if not (folder / "saved_model.pb").is_file():
            raise UserError(f"{folder}: holds no saved_model.pb; give the unpacked folder of a TensorFlow SavedModel")
        try:
            self.program = hub.load(str(folder))
            found = tuple(self(torch.zeros(1, 3, 2, 32, 32)).shape)
        except (self.tf.errors.OpError, OSError, ValueError, TypeError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{folder}: not a SavedModel that takes {{'image': clips}} ({reason})") from None
        if found != (1, num_classes):
            raise UserError(f"{folder}: answers {found} to one clip instead of (1, {num_classes}): another model's folder?")

    def forward(self, clips: Tensor) -> Tensor:
        image = clips.permute(0, 2, 3, 4, 1).float().cpu().contiguous()  # TensorFlow's order: time, height, width, colour
        with self.tf.device("/CPU:0"):
            logits = self.program({"image": self.tf.constant(image.numpy())})
        return torch.tensor(logits.numpy(), device=clips.device)


def load_tfhub(size: int, weights: Path) -> tuple[VideoModel, list[str]]:
    classes = kinetics600_classes()
    return VideoModel(SavedModel(weights, len(classes)), 50, size), classes
