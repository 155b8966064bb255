"""How networks are run: on which device, in which precision, compiled or not."""

from typing import NamedTuple, TypeVar

import torch
from torch import nn

from extraction import distributed
from extraction.errors import UserError
from extraction.network import LAYOUTS, VideoModel

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# After this many batches a network has cost about what compiling it costs, so that a run never takes much longer for a
# wrong guess. Estimated from published figures: Swin-B in bf16 on an H200 goes from 110 clips/s to 163.5 compiled,
# 47 ms a batch of 16, and compiling to take a minute or more.
COMPILE_AFTER = 1000


Model = TypeVar("Model", bound=nn.Module)


class Compute(NamedTuple):
    """What `choose_compute` chose."""

    device: torch.device
    precision: torch.dtype
    compile_after: int | None  # batches of one shape, after which a network is compiled; None: never

    def prepare(self, model: Model) -> Model:
        """Move a model to the device and let every network in it run as chosen. Its weights stay float32."""
        model = model.to(self.device)
        for weight in model.parameters():  # channels last: convolutions are faster so, on a CPU too
            if weight.ndim in LAYOUTS:
                weight.data = weight.data.contiguous(memory_format=LAYOUTS[weight.ndim])
        for part in model.modules():
            if isinstance(part, VideoModel) and next(part.parameters(), None) is not None:  # else PyTorch does not run it
                part.precision, part.compile_after = self.precision, self.compile_after
        return model


def choose_device(name: str) -> torch.device:
    """`auto` (CUDA if there is one), or the device asked for. Raises UserError when that is not there.

    With several processes each has its own.
    """
    shared = distributed.local_device()
    if shared is not None:
        return shared
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r}: write auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name}: PyTorch sees {torch.cuda.device_count()} GPUs here; use --device cpu")
    if device.type == "cuda" and device.index:
        torch.cuda.set_device(device)  # what asks for no device, such as waiting or pinning memory, means this one
    return device


def choose_compute(device: str = "auto", precision: str = "auto", compile: str = "auto") -> Compute:
    """`precision` is fp32, bf16 (autocast), or auto: bf16 on a GPU that has it, else fp32. `compile` is on, off, or auto: on
    a GPU, once a network has had `COMPILE_AFTER` batches of one shape. Raises UserError for other words.
    """
    place = choose_device(device)
    on_gpu = place.type == "cuda"
    torch.backends.cudnn.benchmark = on_gpu  # a run has few shapes: the fastest kernel of each is worth trying for
    if precision == "auto":
        precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision}: write auto, {' or '.join(PRECISIONS)}")
    # float32 in convolutions too, where PyTorch would take TF32: its rounding swamps finite-difference estimates.
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    # The first batch is never compiled: a Swin then looks up what it keeps, which would be a second graph.
    choices = {"auto": COMPILE_AFTER if on_gpu else None, "on": 1, "off": None}
    if compile not in choices:
        raise UserError(f"--compile {compile}: write auto, on or off")
    return Compute(place, PRECISIONS[precision], choices[compile])
