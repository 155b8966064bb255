"""C3D (Tran et al. 2015, arXiv 1412.0767): 16 frames of 112x112 through eight 3x3x3 convolutions and two wide layers."""

import torch.nn.functional as F
from torch import Tensor, nn

# The layout of the Sports-1M weights as ported by DavideA/c3d-pytorch; mmaction2's file has other names for the same.
RENAMES = ((r"^(?:backbone\.)?conv([12])a\.conv\.", r"conv\1."), (r"^(?:backbone\.)?conv([345][ab])\.conv\.", r"conv\1."),
           (r"^backbone\.", ""), (r"^cls_head\.fc_cls\.", "fc8."))  # fmt: skip


class C3D(nn.Module):
    """78 M weights; float (B, 3, 16, 112, 112), mean subtracted, 0..255 -> logits (B, num_classes)."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv3d(3, 64, 3, padding=1), nn.Conv3d(64, 128, 3, padding=1)
        self.conv3a, self.conv3b = nn.Conv3d(128, 256, 3, padding=1), nn.Conv3d(256, 256, 3, padding=1)
        self.conv4a, self.conv4b = nn.Conv3d(256, 512, 3, padding=1), nn.Conv3d(512, 512, 3, padding=1)
        self.conv5a, self.conv5b = nn.Conv3d(512, 512, 3, padding=1), nn.Conv3d(512, 512, 3, padding=1)
        self.fc6, self.fc7 = nn.Linear(8192, 4096), nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, num_classes)
        self.dropout = nn.Dropout(0.5)

    def forward(self, clips: Tensor) -> Tensor:
        x = F.max_pool3d(F.relu(self.conv1(clips)), (1, 2, 2))
        x = F.max_pool3d(F.relu(self.conv2(x)), 2)
        x = F.max_pool3d(F.relu(self.conv3b(F.relu(self.conv3a(x)))), 2)
        x = F.max_pool3d(F.relu(self.conv4b(F.relu(self.conv4a(x)))), 2)
        x = F.max_pool3d(F.relu(self.conv5b(F.relu(self.conv5a(x)))), 2, padding=(0, 1, 1))
        x = self.dropout(F.relu(self.fc6(x.flatten(1))))
        return self.fc8(self.dropout(F.relu(self.fc7(x))))


class TinyC3D(nn.Module):
    """A C3D of some 44 000 weights for the demo set, with batch norms because it starts from nothing."""

    def __init__(self, num_classes: int, widths: tuple[int, ...] = (16, 24, 48)):
        super().__init__()
        stages: list[nn.Module] = []
        width_in = 3
        for width in widths:
            stages += [nn.Conv3d(width_in, width, 3, padding=1, bias=False), nn.BatchNorm3d(width), nn.ReLU(inplace=True)]
            stages += [nn.MaxPool3d((1, 2, 2) if width_in == 3 else 2)]
            width_in = width
        self.stages = nn.Sequential(*stages)
        first = next(self.stages.parameters())  # without a mean over time, as in `TinyR2Plus1D`: what stands still is not seen
        first.data -= first.data.mean(2, keepdim=True)
        self.fc8 = nn.Linear(width_in, num_classes)

    def forward(self, clips: Tensor) -> Tensor:
        return self.fc8(self.stages(clips).mean((2, 3, 4)))


def create_c3d(num_classes: int) -> nn.Module:
    return C3D(num_classes)


def create_c3d_tiny(num_classes: int) -> nn.Module:
    return TinyC3D(num_classes)
