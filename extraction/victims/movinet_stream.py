"""MoViNet A0, A1, A2 Stream in PyTorch: clips frame by frame or whole, with the same logits, and their published weights.

Source: MoViNets (Kondratyuk et al. 2021, arXiv 2103.11511); the reference implementation is `official/projects/movinet` of
tf-models-official, with `causal=True, conv_type="2plus1d", se_type="2plus3d", activation="hard_swish",
gating_activation="hard_sigmoid"` and a classifier head of `activation="swish"`. This module reproduces its answers to float32
rounding, given the same weights.

    python -m extraction.victims.movinet_stream CHECKPOINT movinet_a0_stream.safetensors

writes weights once in our own format; after that TensorFlow is not needed. A .tflite file of the int8 model is read and
converted too: `extraction.victims.movinet_int8`.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torchvision import ops

from extraction.errors import UserError, run_tool
from extraction.network import VideoModel
from extraction.victims.movinet import (
    KERAS_NAMES,
    MODELS,
    Block,
    ConvNorm,
    MoViNet,
    fit_state,
    make_divisible,
    name_classes,
    read_by_our_names,
    swish,
)
from extraction.weights import read_metadata, save_weights

# What layers keep of the frames so far, by the layer's name, and "frames", how many those were. {} before the first.
States = dict[str, Any]


def hard_swish(x: Tensor) -> Tensor:
    """x * relu6(x + 3) / 6; overwrites x where no gradient can ask for it."""
    return F.hardswish(x, inplace=not torch.is_grad_enabled())


def hard_sigmoid(x: Tensor) -> Tensor:
    """relu6(x + 3) * 0.16667: the authors' constant, a little above 1/6."""
    return F.relu6(x + 3) * 0.16667


class CausalConv(ConvNorm):
    """Depthwise convolution of each pixel over its own and the frames before, then batch norm: (B, T, C, H, W) -> the same.

    Before the first frame there are zeros. It runs as a 2D convolution over pictures of T rows and H * W columns, on a CPU 3
    to 15 times as fast as a 3D one.
    """

    name = ""  # of its entry in the states; the network says it

    def __init__(self, channels: int, kernel: int):
        super().__init__(channels, channels, (1, kernel, 1), groups=channels)
        self.conv.padding = (0, 0)

    def forward(self, x: Tensor, states: States | None = None) -> Tensor:
        before = self.conv.kernel_size[0] - 1
        rows = F.pad(x.flatten(3).transpose(1, 2), (0, 0, before, 0))  # (B, C, before + T, H * W)
        if states is not None:
            if self.name in states:
                rows[:, :, :before] = states[self.name]
            states[self.name] = rows[:, :, -before:].clone()
        return self.norm(self.conv(rows)).transpose(1, 2).unflatten(3, x.shape[3:])


class CausalSqueezeExcite(nn.Module):
    """Multiply each channel of a frame by a gate in [0, 1] made of the channels' means in it, and in it and all before."""

    name = ""

    def __init__(self, channels: int):
        super().__init__()
        hidden = make_divisible(channels / 2)
        self.reduce = nn.Linear(2 * channels, hidden)
        self.expand = nn.Linear(hidden, channels)

    def forward(self, x: Tensor, states: States | None = None) -> Tensor:
        means = x.mean((3, 4))  # (B, T, C)
        so_far = _mean_so_far(means, self.name, states)
        gate = hard_sigmoid(self.expand(hard_swish(self.reduce(torch.cat([so_far, means], 2)))))[..., None, None]
        return x * gate if torch.is_grad_enabled() else x.mul_(gate)


def _mean_so_far(means: Tensor, name: str, states: States | None) -> Tensor:
    """The cumulative mean over time of (B, T, C), with that of the frames before; keeps their sum."""
    total, frames = means.cumsum(1), 0
    if states is not None:
        frames = states.get("frames", 0)
        total = total + states[name] if name in states else total
        states[name] = total[:, -1:].clone()
    return total / torch.arange(frames + 1, frames + 1 + means.shape[1], device=means.device)[:, None]


def name_layers(net: nn.Module) -> None:
    """Tell each layer that keeps something of the frames so far its own name, to keep it under."""
    for name, module in net.named_modules():
        if isinstance(module, CausalConv | CausalSqueezeExcite):
            module.name = name


class StreamBlock(Block):
    """A block that sees no later frame: its depthwise convolution is one over space, then one over time."""

    def __init__(self, in_channels: int, expanded: int, out_channels: int, kernel, stride: int, drop_rate: float):
        super().__init__(in_channels, expanded, out_channels, (1, *kernel[1:]), stride, drop_rate)
        self.temporal = CausalConv(expanded, kernel[0]) if kernel[0] > 1 else None
        self.se: Any = CausalSqueezeExcite(expanded)

    def forward(self, x: Tensor, states: States | None = None) -> Tensor:
        branch = hard_swish(self.depthwise(hard_swish(self.expand(x))))
        if self.temporal is not None:
            branch = hard_swish(self.temporal(branch, states))
        branch = self.project(self.se(branch, states))
        if self.scale is not None:
            branch = self.scale * branch
        return self.skip(x) + ops.stochastic_depth(branch, self.drop_rate, "row", self.training)


class MoViNetStream(MoViNet):
    """Clips, float (B, 3, T, H, W) RGB in [0, 1], any T, H, W -> logits (B, num_classes) after the last frame.

    With `states`, a dictionary that is empty before the first frame, it goes on from the frames before and updates it:

        states = {}
        for frame in clips.split(1, dim=2):
            logits = net(frame, states)

    ends with the logits of `net(clips)`. Preprocessing, training and `fuse` are as in `MoViNet`.
    """

    block = StreamBlock

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        name_layers(self)

    def forward(self, clips: Tensor, states: States | None = None) -> Tensor:
        x = hard_swish(self.stem(clips.transpose(1, 2)))
        for block in self.blocks.children():
            for layer in block.children():
                x = layer(x, states)
        x = _mean_so_far(hard_swish(self.head(x)).mean((3, 4)), "head", states)[:, -1]
        if states is not None:
            states["frames"] = states.get("frames", 0) + clips.shape[2]
        return self.classifier(self.dropout(swish(self.hidden(x))))


# Keras's names of 2D layers ("2plus1d", published) and of 3D ones ("3d_2plus1d", as trained) become those of the Base models.
STREAM_NAMES = [
    (r"conv2d/bn/", "bn/"),
    (r"conv2d_temporal/bn_temporal/", "bn_temporal/"),
    (r"conv2d(_temporal)?/(?:depthwise_)?conv2d(?:_\d+)?/(?:depthwise_)?", r"conv3d\1/"),
    (r"feature/(bn|conv3d)_temporal/", r"temporal/\1/"),
    *KERAS_NAMES,
    (r"\btemporal/", "temporal."),
    (r"\btemporal\.conv3d/weight$", "temporal.conv.weight"),
]


def load_stream_state(path: str | Path, model_id: str = "a0") -> dict[str, Tensor]:
    """Read a state dict for `MoViNetStream(model_id, num_classes)`, float32 on the CPU, from the formats of Base models.

    Raises UserError, in one line, if the file cannot be read or does not hold this model's weights.
    """
    if model_id not in MODELS:
        raise UserError(f"no MoViNet is called {model_id!r}; there are {', '.join(MODELS)}")
    state = read_by_our_names(Path(path), STREAM_NAMES)
    return fit_state(MoViNetStream, state, path, model_id, f"MoViNet-{model_id.upper()} Stream")


def is_int8(path: Path) -> bool:
    """Whether a weight file is that of an int8 model: a .tflite file, or what was converted from one."""
    return path.suffix == ".tflite" or str(read_metadata(path).get("architecture")).endswith("_int8")


def load_stream(model_id: str, size: int, weights: Path) -> tuple[VideoModel, list[str]]:
    """A published Kinetics-600 model of frames of `size` pixels a side, of any number: float32, or int8 from a .tflite file."""
    name = f"movinet_{model_id}_stream_k600"
    if is_int8(weights):
        from extraction.victims.movinet_int8 import create_int8, load_int8_state

        state = load_int8_state(weights, model_id)
        classes = name_classes(state, weights, name)
        return VideoModel(create_int8(model_id, state), None, size), classes
    state = load_stream_state(weights, model_id)
    classes = name_classes(state, weights, name)
    net = MoViNetStream(model_id, len(classes))
    net.load_state_dict(state)
    return VideoModel(net.fuse(), None, size), classes


def convert(
    source: Annotated[Path, tyro.conf.arg(metavar="SOURCE")],
    out: Annotated[Path, tyro.conf.arg(metavar="OUT")],
    /,
    model_id: Literal["a0", "a1", "a2"] = "a0",
) -> None:
    """Write MoViNet Stream weights, from wherever they are, as safetensors.

    Args:
        source: A checkpoint, SavedModel folder, .npz or PyTorch state dict, or a .tflite file of the int8 model.
        out: The file to write, OUT.safetensors.
        model_id: Which MoViNet they are of.
    """
    kind = ""
    if is_int8(source):
        from extraction.victims.movinet_int8 import load_int8_state

        state, kind = load_int8_state(source, model_id), "_int8"
    else:
        state = load_stream_state(source, model_id)
    save_weights(out, state, {"architecture": f"movinet_{model_id}_stream{kind}"})
    count = sum(tensor.numel() for tensor in state.values())
    what = f"MoViNet-{model_id.upper()} Stream{kind.replace('_', ' in ')}"
    print(f"{out}: {count} weights of {what}, in {len(state)} tensors, from {source}")


if __name__ == "__main__":
    run_tool(lambda: tyro.cli(convert, prog="python -m extraction.victims.movinet_stream"))
