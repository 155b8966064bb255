"""R(2+1)D and R3D (Tran et al. 2018, arXiv 1711.11248), from torchvision's `VideoResNet` parts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, R2Plus1dStem, VideoResNet, r3d_18


class FlatConv3d(nn.Conv3d):
    """A convolution over space alone, or over time alone: float (B, C, T, H, W) -> the same, C, T, H, W its own.

    On a GPU it runs in two dimensions over the same memory (channels last): cuDNN's best kernels are there, and 3D ones in
    bf16 have come in slow and in wrong releases (pytorch/pytorch issues 163539 and 166122). Compiled in half precision it
    also fills channels up to multiples of 8, what tensor cores load at once, with zeros: R(2+1)D's middle widths are such as
    45 and 921. The compiler makes that part of the passes that are there anyway.
    """

    @staticmethod
    def can_replace(conv: nn.Conv3d) -> bool:
        in_space = conv.kernel_size[0] == conv.stride[0] == 1
        return in_space or conv.kernel_size[1:] == conv.stride[1:] == (1, 1)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.convolve_flat(x, weight, bias) if x.is_cuda else super()._conv_forward(x, weight, bias)

    def convolve_flat(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        width_out, width_in = weight.shape[:2]
        fill_out, fill_in = -width_out % 8, -width_in % 8 if width_in > 4 else 0  # pictures have kernels of their own
        half = x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type)
        if not (torch.compiler.is_compiling() and half and bias is None and (fill_out or fill_in)):
            return self._convolve(x, weight, bias)
        x = F.pad(x, (0,) * 7 + (fill_in,)) if fill_in else x
        weight = F.pad(weight, (0,) * 7 + (fill_in, 0, fill_out))
        return self._convolve(x, weight, None)[:, :width_out]

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        batch, _, _, height, _ = x.shape
        if self.kernel_size[0] == 1:
            frames = x.transpose(1, 2).flatten(0, 1)
            y = F.conv2d(frames, weight.squeeze(2), bias, self.stride[1:], self.padding[1:])
            return y.unflatten(0, (batch, -1)).transpose(1, 2)
        padding = (int(self.padding[0]), 0)
        y = F.conv2d(x.flatten(3), weight.squeeze(4), bias, (self.stride[0], 1), padding)
        return y.unflatten(3, (height, -1))


def _flatten(net: nn.Module) -> nn.Module:
    """Let the convolutions of `net` that can be flat be so. Parameters and state dict stay what they are."""
    for module in net.modules():
        if type(module) is nn.Conv3d and FlatConv3d.can_replace(module):
            module.__class__ = FlatConv3d
    return net


def create_r3d_18(num_classes: int) -> nn.Module:
    """33.2 M weights; float (B, 3, T, H, W), normalised, 112x112 -> logits."""
    return _flatten(r3d_18(num_classes=num_classes))


def create_r2plus1d_18(num_classes: int) -> nn.Module:
    """31.3 M weights, torchvision's key layout."""
    return _flatten(VideoResNet(BasicBlock, [Conv2Plus1D] * 4, [2, 2, 2, 2], R2Plus1dStem, num_classes=num_classes))


def create_r2plus1d_34(num_classes: int) -> nn.Module:
    """R(2+1)D-34 in the layout of the IG65M release (Ghadiyaram et al. 2019, arXiv 1905.00561), 63.6 M weights.

    The release differs from torchvision's rule for the middle width in the first block of each later stage, and in its
    batch normalisation's epsilon and momentum.
    """
    net = VideoResNet(BasicBlock, [Conv2Plus1D] * 4, [3, 4, 6, 3], R2Plus1dStem, num_classes=num_classes)
    for layer, width in ((net.layer2, 128), (net.layer3, 256), (net.layer4, 512)):
        layer[0].conv2[0] = Conv2Plus1D(width, width, width * 9 // 4)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.eps, module.momentum = 1e-3, 0.9
        elif isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return _flatten(net)


class TinyR2Plus1D(nn.Module):
    """A (2+1)D network of some 70 000 weights for the demo set: float (B, 3, T, H, W), normalised -> logits."""

    def __init__(
        self, num_classes: int, widths: tuple[int, ...] = (16, 32, 64, 64), time_strides: tuple[int, ...] = (1, 2, 2, 1)
    ):
        super().__init__()
        stages, width_in = [], 3
        for width, stride in zip(widths, time_strides, strict=True):
            stages += [
                nn.Conv3d(width_in, width, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), bias=False),
                nn.BatchNorm3d(width),
                nn.ReLU(inplace=True),
                nn.Conv3d(width, width, (3, 1, 1), stride=(stride, 1, 1), padding=(1, 0, 0), bias=False),
                nn.BatchNorm3d(width),
                nn.ReLU(inplace=True),
            ]
            width_in = width
        self.stages = nn.Sequential(*stages)
        # The first filters over time start without a mean, so that what stands still is not seen. Otherwise the
        # background hides the motion, and a student that learns from soft answers stays at chance for many epochs.
        first = self.stages.get_parameter("3.weight")
        first.data -= first.data.mean(2, keepdim=True)
        self.fc = nn.Linear(width_in, num_classes)

    def forward(self, clips: Tensor) -> Tensor:
        return self.fc(self.stages(clips).mean((2, 3, 4)))


def create_r2plus1d_tiny(num_classes: int) -> nn.Module:
    return _flatten(TinyR2Plus1D(num_classes))
