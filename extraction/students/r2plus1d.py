"""R(2+1)D and R3D (Tran et al. 2018, arXiv 1711.11248), from torchvision's `VideoResNet` parts."""

from torch import Tensor, nn
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, R2Plus1dStem, VideoResNet, r3d_18


def create_r3d_18(num_classes: int) -> nn.Module:
    """33.2 M weights; float (B, 3, T, H, W), normalised, 112x112 -> logits."""
    return r3d_18(num_classes=num_classes)


def create_r2plus1d_18(num_classes: int) -> nn.Module:
    """31.3 M weights, torchvision's key layout."""
    return VideoResNet(BasicBlock, [Conv2Plus1D] * 4, [2, 2, 2, 2], R2Plus1dStem, num_classes=num_classes)


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
    return net


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
        # background drowns the motion, and a student that learns from soft answers stays at chance for many epochs.
        first = self.stages[3].weight
        first.data -= first.data.mean(2, keepdim=True)
        self.fc = nn.Linear(width_in, num_classes)

    def forward(self, clips: Tensor) -> Tensor:
        return self.fc(self.stages(clips).mean((2, 3, 4)))


def create_r2plus1d_tiny(num_classes: int) -> nn.Module:
    return TinyR2Plus1D(num_classes)
