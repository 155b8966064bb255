"""MoViNet A0, A1, A2 Base in PyTorch, and its published weights from TensorFlow or PyTorch files.

Source: MoViNets (Kondratyuk et al. 2021, arXiv 2103.11511); the reference implementation is `official/projects/movinet`
of tf-models-official, whose answers this module reproduces to float32 rounding, given the same weights.

    python -m extraction.victims.movinet SAVED_MODEL_OR_CHECKPOINT movinet_a2.safetensors

writes weights once in our own format; after that TensorFlow is not needed.
"""

import copy
import os
import re
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval
from torchvision import ops

from extraction.errors import UserError, printable, run_tool
from extraction.network import VideoModel
from extraction.victims.classes import kinetics600_classes
from extraction.weights import load_strictly, read_state, save_weights

K11, K13, K15, K33, K53 = (1, 1, 1), (1, 3, 3), (1, 5, 5), (3, 3, 3), (5, 3, 3)

# Stem channels; groups of (channels, spatial stride of the first block, [(expanded channels, kernel) of each block]);
# head channels; hidden channels of the classifier.
MODELS = {
    "a0": (
        8,
        [
            (8, 2, [(24, K15)]),
            (32, 2, [(80, K33), (80, K33), (80, K33)]),
            (56, 2, [(184, K53), (112, K33), (184, K33)]),
            (56, 1, [(184, K53), (184, K33), (184, K33), (184, K33)]),
            (104, 2, [(384, K53), (280, K15), (280, K15), (344, K15)]),
        ],
        480,
        2048,
    ),
    "a1": (
        16,
        [
            (16, 2, [(40, K15), (40, K33)]),
            (40, 2, [(96, K33), (120, K33), (96, K33), (96, K33)]),
            (64, 2, [(216, K53), (128, K33), (216, K33), (168, K33), (216, K33)]),
            (64, 1, [(216, K53), (216, K33), (216, K33), (128, K33), (128, K15), (216, K33)]),
            (136, 2, [(456, K53), (360, K15), (360, K15), (360, K15), (456, K15), (456, K33), (544, K13)]),
        ],
        600,
        2048,
    ),
    "a2": (
        16,
        [
            (16, 2, [(40, K15), (40, K33), (64, K33)]),
            (40, 2, [(96, K33), (120, K33), (96, K33), (96, K33), (120, K33)]),
            (72, 2, [(240, K53), (160, K33), (240, K33), (192, K33), (240, K33)]),
            (72, 1, [(240, K53), (240, K33), (240, K33), (240, K33), (144, K15), (240, K33)]),
            (144, 2, [(480, K53), (384, K15), (384, K15), (480, K15), (480, K15), (480, K33), (576, K13)]),
        ],
        640,
        2048,
    ),
    # Ours, for the demo: clips of about 16x48x48, minutes of training on a CPU.
    "demo": (
        12,
        [
            (16, 2, [(40, K15), (40, K33)]),
            (32, 2, [(96, K33), (96, K33)]),
            (56, 1, [(160, K53), (160, K33)]),
        ],
        128,
        128,
    ),
}


def make_divisible(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of `divisor`, but at least `divisor` and not below 0.9 x `channels`."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


def swish(x: Tensor) -> Tensor:
    """x * sigmoid(x); overwrites x where no gradient can ask for it."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ConvNorm(nn.Module):
    """SAME-padded convolution without bias, then batch norm: (B, T, C, H, W) -> (B, T, out, H/stride, W/stride).

    Without an extent in time it runs as a 2D convolution over the B * T frames.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel=K11, stride: int = 1, groups: int = 1):
        super().__init__()
        self.in_3d = kernel[0] > 1
        create: Any = nn.Conv3d if self.in_3d else nn.Conv2d
        strides = (1, stride, stride) if self.in_3d else stride
        kernel = kernel if self.in_3d else kernel[1:]
        padding = tuple(k // 2 for k in kernel)
        self.conv: Any = create(in_channels, out_channels, kernel, strides, padding, groups=groups, bias=False)
        self.norm: Any = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        batch, conv = len(x), self.conv
        x = x.transpose(1, 2) if self.in_3d else x.flatten(0, 1)
        if conv.stride[-1] == 1:
            x = conv(x)
        else:
            # SAME at stride 2 is symmetric on an odd axis, and one zero less before an even one. There, one zero more
            # on both sides and the first output dropped is the same, and spares a padded copy of the input.
            even = [1 - size % 2 for size in x.shape[-2:]]
            padding = (*conv.padding[:-2], conv.padding[-2] + even[0], conv.padding[-1] + even[1])
            convolve = F.conv3d if self.in_3d else F.conv2d
            x = convolve(x, conv.weight, conv.bias, conv.stride, padding, groups=conv.groups)
            x = x[..., even[0] :, even[1] :]
        x = x.transpose(1, 2).flatten(0, 1) if self.in_3d else x
        return self.norm(x).unflatten(0, (batch, -1))


def halve(x: Tensor) -> Tensor:
    """SAME 3x3 average of real pixels at stride 2: (B, T, C, H, W) -> (B, T, C, H/2, W/2), rounded up."""
    # SAME at stride 2 pads (0, 1) on an even axis: what ceil_mode leaves over; and (1, 1) on an odd one.
    padding = (x.shape[3] % 2, x.shape[4] % 2)
    frames = F.avg_pool2d(x.flatten(0, 1), 3, 2, padding, ceil_mode=True, count_include_pad=False)
    return frames.unflatten(0, x.shape[:2])


class Skip(nn.Module):
    """The way around a block that changes shape: average of pixels (strided only), 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.project = ConvNorm(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(halve(x) if self.stride > 1 else x)


class SqueezeExcite(nn.Module):
    """Multiply each channel by a gate in (0, 1) made of the channels' means over time and space."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = make_divisible(channels / 4)
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.expand(swish(self.reduce(x.mean((1, 3, 4))))).sigmoid()[:, None, :, None, None]
        return x * gate if torch.is_grad_enabled() else x.mul_(gate)


class Block(nn.Module):
    """Inverted bottleneck with squeeze and excitation, its branch weighted by one learned scalar."""

    def __init__(self, in_channels: int, expanded: int, out_channels: int, kernel, stride: int, drop_rate: float):
        super().__init__()
        self.expand = ConvNorm(in_channels, expanded)
        self.depthwise = ConvNorm(expanded, expanded, kernel, stride, groups=expanded)
        self.se = SqueezeExcite(expanded)
        self.project = ConvNorm(expanded, out_channels)
        same = stride == 1 and in_channels == out_channels
        self.skip = nn.Identity() if same else Skip(in_channels, out_channels, stride)
        # The authors start it at 0. The demo model is then still at chance after 200 steps; from 1 it is at 54 %.
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.drop_rate = drop_rate

    def forward(self, x: Tensor) -> Tensor:
        branch = self.project(self.se(swish(self.depthwise(swish(self.expand(x))))))
        if self.scale is not None:
            branch = self.scale * branch
        return self.skip(x) + ops.stochastic_depth(branch, self.drop_rate, "row", self.training)


def create_blocks(model_id: str, create: Callable[..., nn.Module], stochastic_depth: float = 0.0) -> nn.Sequential:
    """The groups of blocks of an architecture: `create` makes each, of the arguments of `Block`."""
    channels, groups, _, _ = MODELS[model_id]
    num_blocks = sum(len(blocks) for _, _, blocks in groups)
    drop_rates = iter(stochastic_depth * (i + 1) / num_blocks for i in range(num_blocks))
    created = nn.Sequential()
    for out_channels, stride, blocks in groups:
        widths = [channels] + [out_channels] * len(blocks)
        strides = [stride] + [1] * (len(blocks) - 1)
        created.append(nn.Sequential(*(
            create(c_in, expanded, c_out, kernel, s, next(drop_rates))
            for (c_in, c_out), (expanded, kernel), s in zip(pairwise(widths), blocks, strides, strict=True)
        )))  # fmt: skip
        channels = out_channels
    return created


class MoViNet(nn.Module):
    """Clips, float (B, 3, T, H, W) RGB in [0, 1], any T, H, W -> logits (B, num_classes).

    There is no normalisation inside or expected outside. The published A2 was trained on 50 frames of 224x224 at 5
    frames a second; A0 and A1 on 172x172. The last three arguments act in training only, with the authors' values;
    a training of a few hundred steps wants a `norm_momentum` of 0.1, or its running statistics lag behind.
    """

    block: type[Block] = Block

    def __init__(
        self,
        model_id: str = "a2",
        num_classes: int = 600,
        dropout: float = 0.5,
        stochastic_depth: float = 0.2,
        norm_momentum: float = 0.01,
    ):
        super().__init__()
        channels, groups, head, hidden = MODELS[model_id]
        self.stem = ConvNorm(3, channels, K13, stride=2)
        self.blocks = create_blocks(model_id, self.block, stochastic_depth)
        self.head = ConvNorm(groups[-1][0], head)
        self.hidden = nn.Linear(head, hidden)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden, num_classes)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = norm_momentum
            elif isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear" if module is self.classifier else "relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, clips: Tensor) -> Tensor:
        # On a CPU depthwise convolutions run 5 to 18 times faster with the channels last, as `VideoModel` brings them.
        x = clips.transpose(1, 2)
        x = self.blocks(swish(self.stem(x)))
        x = swish(self.head(x)).mean((1, 3, 4))
        return self.classifier(self.dropout(swish(self.hidden(x))))

    def fuse(self) -> Self:
        """A frozen copy that answers faster: batch norms and block scales folded into the convolutions before them.

        Its logits are this model's in eval mode, to float32 rounding. It cannot be trained, and its state dict is
        its own; load weights first, fuse last.
        """
        fused = copy.deepcopy(self).eval().requires_grad_(False)
        for module in fused.modules():
            if isinstance(module, ConvNorm):
                module.conv, module.norm = fuse_conv_bn_eval(module.conv, module.norm), nn.Identity()
        for module in fused.modules():
            if isinstance(module, Block):
                module.project.conv.weight.mul_(module.scale)
                module.project.conv.bias.mul_(module.scale)
                module.scale = None  # type: ignore[assignment]
        return fused


# What others call our parameters, as (pattern, replacement), applied in order. Keras, in both generations of names:
# `block0_layer1/...` in the code since autumn 2021, `b0/l1/...` in the files published before.
KERAS_NAMES = [
    (r":0$", ""),
    (r"^b(?:lock)?(\d+)[_/]l(?:ayer)?(\d+)/(?:bneck/)?", r"blocks.\1.\2."),
    (r"^stem/stem/", "stem."),
    (r"^head/project/", "head."),
    (r"^classifier_head(?:_\d+)?/head/conv3d/", "hidden."),
    (r"^classifier_head(?:_\d+)?/classifier/conv3d/", "classifier."),
    (r"\bexpansion/", "expand."),
    (r"\bfeature/", "depthwise."),
    (r"\bse/se_(reduce|expand)/conv3d/", r"se.\1."),
    (r"\bprojection/", "project."),
    (r"\bskip/skip_project/", "skip.project."),
    (r"\bconv3d/kernel$", "conv.weight"),
    (r"\bbn/gamma$", "norm.weight"),
    (r"\bbn/beta$", "norm.bias"),
    (r"\bbn/moving_mean$", "norm.running_mean"),
    (r"\bbn/moving_variance$", "norm.running_var"),
    (r"kernel$", "weight"),
]
# The state dicts `modelA*_statedict_v3` of Atze00/MoViNet-pytorch.
COMMUNITY_NAMES = [
    (r"^blocks\.b(\d+)_l(\d+)\.", r"blocks.\1.\2."),
    (r"^conv1\.", "stem."),
    (r"^conv7\.", "head."),
    (r"^classifier\.0\.conv_1\.conv3d\.", "hidden."),
    (r"^classifier\.3\.conv_1\.conv3d\.", "classifier."),
    (r"\.se\.fc1\.conv_1\.conv3d\.", ".se.reduce."),
    (r"\.se\.fc2\.conv_1\.conv3d\.", ".se.expand."),
    (r"\.deep\.", ".depthwise."),
    (r"\.res\.[01]\.", ".skip.project."),
    (r"\.alpha$", ".scale"),
    (r"\.conv_1\.conv3d\.", ".conv."),
    (r"\.conv_1\.norm\.", ".norm."),
]


def load_movinet_state(path: str | Path, model_id: str = "a2") -> dict[str, Tensor]:
    """Read a state dict for `MoViNet(model_id, num_classes)`, float32 on the CPU; the file says how many classes.

    `path` is one of: our own .safetensors; an .npz of TensorFlow arrays by Keras name; a SavedModel folder (TF-Hub's);
    a TensorFlow checkpoint, as a folder or a prefix; a state dict of Atze00/MoViNet-pytorch. SavedModel and
    checkpoint need tensorflow installed; neither is run, their arrays are read.

    Raises UserError, in one line, if the file cannot be read or does not hold this model's weights.
    """
    if model_id not in MODELS:
        raise UserError(f"no MoViNet is called {model_id!r}; there are {', '.join(MODELS)}")
    state = read_by_our_names(Path(path), KERAS_NAMES)
    return fit_state(MoViNet, state, path, model_id, f"MoViNet-{model_id.upper()} Base")


def read_by_our_names(path: Path, keras_names: list[tuple[str, str]]) -> dict[str, Tensor]:
    """The tensors of a file of any format above, float32, by our names, with PyTorch's order of axes. Raises UserError."""
    prefix = _tensorflow_prefix(path)
    if prefix or path.suffix == ".npz":
        arrays = _read_tensorflow(path, prefix) if prefix else _read_npz(path)
        tensors = {name: _order_axes(name, torch.from_numpy(np.array(array))) for name, array in arrays.items()}
        names = keras_names
    else:
        tensors, names = read_state(path), COMMUNITY_NAMES
    state = {_rename(name, names): tensor.float() for name, tensor in tensors.items()}
    if len(state) < len(tensors):
        raise UserError(f"{path}: {len(tensors) - len(state)} weights are there twice, by two names; keep one set")
    return state


def fit_state(
    create: Callable[..., nn.Module], state: dict[str, Tensor], path: str | Path, model_id: str, wanted: str
) -> dict[str, Tensor]:
    """The state dict of `create(model_id, num_classes)` with these tensors, whose kernels may have axes of 1 too many.

    Raises UserError, in one line, if they are not its weights: `wanted` is what the line calls it.
    """
    with torch.random.fork_rng(devices=[]):  # what is drawn here is replaced: leave the caller's seed alone
        model = create(model_id, len(state.get("classifier.weight", range(600))))
    for key, own in model.state_dict().items():
        if key.endswith("num_batches_tracked"):  # a count PyTorch keeps and TensorFlow does not
            state.setdefault(key, torch.zeros(()))
        if key in state and _without_ones(state[key]) == _without_ones(own):
            state[key] = state[key].reshape(own.shape)  # others keep every kernel in 3D
    try:
        load_strictly(model, state, path, wanted)
    except UserError as stop:
        raise UserError(f"{stop}; get the file again, or give the model_id it belongs to ({', '.join(MODELS)})") from None
    return model.state_dict()


def name_classes(state: dict[str, Tensor], path: Path, name: str) -> list[str]:
    """The classes of Kinetics-600. Raises UserError when the head has not as many."""
    classes, found = kinetics600_classes(), len(state["classifier.weight"])
    if found != len(classes):
        raise UserError(f"{path}: the head has {found} classes, {name} has {len(classes)}")
    return classes


def load_movinet(model_id: str, size: int, weights: Path) -> tuple[VideoModel, list[str]]:
    """A published Kinetics-600 model of 50 frames of `size` pixels a side, in whatever file format."""
    state = load_movinet_state(weights, model_id)
    classes = name_classes(state, weights, f"movinet_{model_id}_k600")
    net = MoViNet(model_id, len(classes))
    net.load_state_dict(state)
    return VideoModel(net.fuse(), 50, size), classes


def _without_ones(tensor: Tensor) -> list[int]:
    return [side for side in tensor.shape if side > 1]


def _order_axes(name: str, tensor: Tensor) -> Tensor:
    """TensorFlow keeps ([T,] H, W, in, out); depthwise kernels (T, H, W, 1, channels), but of 2D layers (H, W, channels, 1)."""
    if tensor.ndim < 4:
        return tensor
    first = (-2, -1) if "depthwise_kernel" in name else (-1, -2)
    return tensor.permute(*first, *range(tensor.ndim - 2))


def _rename(name: str, names: list[tuple[str, str]]) -> str:
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name)
    return name


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: array.astype(np.float32) for name, array in file.items()}
    except FileNotFoundError:
        raise UserError(f"weights {path} not found") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a readable .npz, truncated perhaps ({error}); get the file again") from None


def _tensorflow_prefix(path: Path) -> Path | None:
    """Where TensorFlow's variables are, as the start of their files' names; None if `path` is something else."""
    if (path / "saved_model.pb").exists():
        return path / "variables" / "variables"
    if path.is_dir():
        found = sorted(path.glob("*.index"))
        if len(found) != 1:
            raise UserError(f"{path}: holds no saved_model.pb and {len(found)} checkpoints (*.index); give the one to read")
        return found[0].with_suffix("")
    if path.suffix == ".index":
        return path.with_suffix("")
    return path if path.with_name(path.name + ".index").exists() else None


def _read_tensorflow(path: Path, prefix: Path) -> dict[str, np.ndarray]:
    """The model's variables by Keras name. The graph of objects is only asked for names; nothing in it is run."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tensorflow as tf
        from tensorflow.core.protobuf.trackable_object_graph_pb2 import TrackableObjectGraph
    except ImportError:
        raise UserError(
            f"{path}: reading TensorFlow's files needs tensorflow: pip install tensorflow, or convert once elsewhere: "
            f"python -m extraction.victims.movinet {path} movinet.safetensors"
        ) from None
    try:
        reader = tf.train.load_checkpoint(str(prefix))
        graph = TrackableObjectGraph.FromString(reader.get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH"))
        names = {a.checkpoint_key: a.full_name for node in graph.nodes for a in node.attributes}
        not_the_model = re.compile(r"optimizer|keras_api/|save_counter|.*\.OPTIMIZER_SLOT")
        names = {key: name for key, name in names.items() if not not_the_model.match(key)}
        if len(set(names.values())) < len(names):
            raise ValueError("two variables of one name")
        return {name: reader.get_tensor(key) for key, name in names.items()}
    except (tf.errors.OpError, LookupError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a readable TensorFlow checkpoint ({reason}); get its files again") from None


def convert(
    source: Annotated[Path, tyro.conf.arg(metavar="SOURCE")],
    out: Annotated[Path, tyro.conf.arg(metavar="OUT")],
    /,
    model_id: Literal["a0", "a1", "a2", "demo"] = "a2",
) -> None:
    """Write MoViNet weights, from wherever they are, as safetensors.

    Args:
        source: A SavedModel folder, checkpoint, .npz or PyTorch state dict.
        out: The file to write, OUT.safetensors.
        model_id: Which MoViNet they are of.
    """
    state = load_movinet_state(source, model_id)
    save_weights(out, state, {"architecture": f"movinet_{model_id}"})
    count = sum(tensor.numel() for tensor in state.values())
    print(printable(f"{out}: {count} weights of MoViNet-{model_id.upper()}, in {len(state)} tensors, from {source}"))


if __name__ == "__main__":
    run_tool(lambda: tyro.cli(convert, prog="python -m extraction.victims.movinet"))
