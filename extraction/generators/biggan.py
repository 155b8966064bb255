"""BigGAN-deep (Brock et al. 2019, arXiv 1809.11096), frozen: images out of noise and a class embedding.

The generator alone, in the key layout of the published PyTorch port (pytorch-pretrained-biggan, unmaintained since 2019 and
not importable without an AWS client), spectral normalisation folded into the weights as they are read.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extraction.errors import UserError
from extraction.weights import fingerprint, load_strictly, read_state

WEIGHTS = "weights/biggan-deep-128-pytorch_model.bin"
_SOURCE = "https://s3.amazonaws.com/models.huggingface.co/biggan/biggan-deep-128-pytorch_model.bin"


class Shape(NamedTuple):
    """A generator's architecture; widths are multiples of `width`. The defaults are the published 128-pixel model's."""

    dim: int = 128  # of the noise, and of a class embedding
    width: int = 128
    num_classes: int = 1000
    # (doubles the size?, width in, width out) of each block; the first gets 4x4
    blocks: tuple[tuple[bool, int, int], ...] = (
        (False, 16, 16), (True, 16, 16), (False, 16, 16), (True, 16, 8), (False, 8, 8),
        (True, 8, 4), (False, 4, 4), (True, 4, 2), (False, 2, 2), (True, 2, 1),
    )  # fmt: skip
    attention: int = 8  # self-attention comes before this block
    num_stats: int = 51  # truncations for which normalisation statistics are kept: 0, 0.02, ..., 1
    eps: float = 1e-4


PUBLISHED = Shape()
DEMO_SHAPE = Shape(16, 8, 24, ((True, 16, 8), (True, 8, 4), (True, 4, 2), (False, 2, 1)), attention=3, num_stats=2)


class _Norm(nn.Module):
    """Normalisation by the statistics of a truncation; scale and offset from the condition, or fixed without one."""

    running_means: Tensor
    running_vars: Tensor

    def __init__(self, channels: int, condition: int | None, shape: Shape):
        super().__init__()
        self.eps = shape.eps
        self.register_buffer("running_means", torch.zeros(shape.num_stats, channels))
        self.register_buffer("running_vars", torch.ones(shape.num_stats, channels))
        if condition is None:
            self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        else:
            self.scale = nn.Linear(condition, channels, bias=False)
            self.offset = nn.Linear(condition, channels, bias=False)

    def forward(self, x: Tensor, row: int, condition: Tensor | None) -> Tensor:
        mean, rate = self.running_means[row], (self.running_vars[row] + self.eps).rsqrt()
        if condition is None:
            gain, offset = self.weight[None], self.bias[None]
        else:
            gain, offset = 1.0 + self.scale(condition), self.offset(condition)
        gain = gain * rate
        return x * gain[..., None, None] + (offset - mean * gain)[..., None, None]


class _Block(nn.Module):
    """A bottleneck with a skip that drops channels and repeats pixels."""

    def __init__(self, doubles: bool, width_in: int, width_out: int, condition: int, shape: Shape):
        super().__init__()
        middle, self.doubles, self.width_out = width_in // 4, doubles, width_out
        self.bn_0, self.conv_0 = _Norm(width_in, condition, shape), nn.Conv2d(width_in, middle, 1)
        self.bn_1, self.conv_1 = _Norm(middle, condition, shape), nn.Conv2d(middle, middle, 3, padding=1)
        self.bn_2, self.conv_2 = _Norm(middle, condition, shape), nn.Conv2d(middle, middle, 3, padding=1)
        self.bn_3, self.conv_3 = _Norm(middle, condition, shape), nn.Conv2d(middle, width_out, 1)

    def forward(self, x: Tensor, row: int, condition: Tensor) -> Tensor:
        y = self.conv_0(self.bn_0(x, row, condition).relu())
        y = self.bn_1(y, row, condition).relu()
        if self.doubles:
            y, x = F.interpolate(y, scale_factor=2), F.interpolate(x, scale_factor=2)
        y = self.conv_2(self.bn_2(self.conv_1(y), row, condition).relu())
        return self.conv_3(self.bn_3(y, row, condition).relu()) + x[:, : self.width_out]


class _Attention(nn.Module):
    """Self-attention (Zhang et al. 2019, arXiv 1805.08318): every place looks at a quarter of the places."""

    def __init__(self, width: int):
        super().__init__()
        self.snconv1x1_theta = nn.Conv2d(width, width // 8, 1, bias=False)
        self.snconv1x1_phi = nn.Conv2d(width, width // 8, 1, bias=False)
        self.snconv1x1_g = nn.Conv2d(width, width // 2, 1, bias=False)
        self.snconv1x1_o_conv = nn.Conv2d(width // 2, width, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        query = self.snconv1x1_theta(x).flatten(2).transpose(1, 2)
        key = F.max_pool2d(self.snconv1x1_phi(x), 2).flatten(2)
        value = F.max_pool2d(self.snconv1x1_g(x), 2).flatten(2)
        seen = value @ (query @ key).softmax(2).transpose(1, 2)
        return x + self.gamma * self.snconv1x1_o_conv(seen.unflatten(2, x.shape[2:]))


class _Generator(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        condition, width = 2 * shape.dim, shape.width
        first = width * shape.blocks[0][1]
        self.first, self.attention = first, shape.attention
        self.gen_z = nn.Linear(condition, 16 * first)
        layers: list[nn.Module] = [_Block(doubles, width * a, width * b, condition, shape) for doubles, a, b in shape.blocks]
        layers.insert(shape.attention, _Attention(width * shape.blocks[shape.attention][1]))
        self.layers = nn.ModuleList(layers)
        self.bn = _Norm(width * shape.blocks[-1][2], None, shape)
        self.conv_to_rgb = nn.Conv2d(width, width, 3, padding=1)  # of its outputs three are colours, as published

    def forward(self, condition: Tensor, row: int) -> Tensor:
        x = self.gen_z(condition).view(-1, 4, 4, self.first).permute(0, 3, 1, 2)
        for layer in self.layers:
            x = layer(x) if isinstance(layer, _Attention) else layer(x, row, condition)
        return self.conv_to_rgb(self.bn(x, row, None).relu())[:, :3].tanh()


class BigGAN(nn.Module):
    """Noise (B, dim) and class embeddings (B, dim) -> float images (B, 3, H, W) in [0, 1].

    `truncation` in 0..1 scales the noise and picks the normalisation statistics. `embeddings.weight` (dim, num_classes)
    holds the embeddings of the classes it was trained on.
    """

    def __init__(self, shape: Shape = PUBLISHED, truncation: float = 1.0):
        super().__init__()
        if not 0.0 < truncation <= 1.0:
            raise UserError(f"truncation {truncation}: it must be above 0 and at most 1")
        self.shape, self.truncation = shape, truncation
        self.embeddings = nn.Linear(shape.num_classes, shape.dim, bias=False)
        self.generator = _Generator(shape)
        self.eval().requires_grad_(False)

    def forward(self, noise: Tensor, embedding: Tensor) -> Tensor:
        row = round(self.truncation * (self.shape.num_stats - 1))
        return 0.5 + 0.5 * self.generator(torch.cat([self.truncation * noise, embedding], 1), row)


def fold_spectral_norm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace each `weight_orig`, `weight_u`, `weight_v` by the weight that they stand for."""
    folded = {key: value for key, value in state.items() if not key.endswith(("weight_orig", "weight_u", "weight_v"))}
    for key, weight in state.items():
        if key.endswith("weight_orig"):
            name = key.removesuffix("_orig")
            if f"{name}_u" not in state:
                continue  # the missing weight is named when the state is loaded
            matrix, u = weight.flatten(1), state[f"{name}_u"]
            v = state.get(f"{name}_v")
            v = F.normalize(u @ matrix, dim=0) if v is None else v
            folded[name] = weight / (u @ matrix @ v)
    return folded


def load_biggan(weights: str | Path = WEIGHTS, shape: Shape = PUBLISHED, truncation: float = 1.0) -> BigGAN:
    """The frozen generator with the published weights. Raises UserError when they are missing or another model's."""
    path = Path(weights)
    if not path.is_file():
        raise UserError(f"BigGAN weights {path} not found: {_SOURCE} belongs there; or try --demo")
    net = BigGAN(shape, truncation)
    load_strictly(net, fold_spectral_norm(read_state(path)), path, "BigGAN-deep")
    return net


def open_biggan(weights: str | None, truncation: float) -> tuple[BigGAN, str]:
    """The generator of a weight file, or the demo's small untrained one for None; and a mark that names it in keys."""
    if weights is None:
        return create_demo_biggan(), "demo"
    return load_biggan(weights, truncation=truncation), f"{fingerprint(weights)}@{truncation}"


def create_demo_biggan(seed: int = 0) -> BigGAN:
    """A small untrained BigGAN of 32x32 pixels for the demo: its pictures are coloured textures, a function of `seed`."""
    draw = torch.Generator().manual_seed(seed)
    net = BigGAN(DEMO_SHAPE)
    for name, weight in net.named_parameters():
        if weight.ndim > 1:
            gain = 2.0 if name.endswith(("scale.weight", "conv_to_rgb.weight")) else 1.4
            weight.copy_(torch.randn(weight.shape, generator=draw) * gain / math.sqrt(weight[0].numel()))
        elif name.endswith("bias"):
            weight.zero_()
    net.embeddings.weight.copy_(torch.randn(net.embeddings.weight.shape, generator=draw))
    # Statistics as training would have left them, each layer's from what the layers before it give.
    hooks = [module.register_forward_pre_hook(_measure) for module in net.modules() if isinstance(module, _Norm)]
    noise, embedding = torch.randn(2, 256, DEMO_SHAPE.dim, generator=draw)
    net(noise, embedding)
    for hook in hooks:
        hook.remove()
    return net


def _measure(norm: _Norm, inputs: tuple) -> None:
    variance, mean = torch.var_mean(inputs[0], (0, 2, 3))
    norm.running_means.copy_(mean.expand_as(norm.running_means))
    norm.running_vars.copy_(variance.expand_as(norm.running_vars))
