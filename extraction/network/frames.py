"""Students that look at single frames: ViT (Dosovitskiy et al. 2021, timm's) and ResNet (He et al. 2016, torchvision's).

float (N, 3, H, W), normalised -> logits (N, num_classes); `Student` averages the logits over a clip's frames.
"""

import math
from typing import Any

from torch import nn


def create_vit_tiny(num_classes: int) -> nn.Module:
    """ViT-Tiny/16 at 224x224, 5.5 M weights, in the key layout of timm's `vit_tiny_patch16_224`."""
    import timm  # here, because it takes seconds to import

    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=num_classes)


def create_resnet50(num_classes: int) -> nn.Module:
    """23.5 M weights below the head, torchvision's key layout."""
    from torchvision.models import resnet50

    return resnet50(num_classes=num_classes)


def _ignore_stills(first: nn.Conv2d) -> None:
    """Give first filters over three frames in a row no mean over them: as in `TinyR2Plus1D`, what stands still is not seen."""
    first.weight.data -= first.weight.data.mean(1, keepdim=True)


def create_vit_demo(num_classes: int) -> nn.Module:
    """A ViT of some 80 000 weights at 32x32 for the demo set, its weights spread for a start from nothing."""
    from timm.models.vision_transformer import VisionTransformer

    net = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, mlp_ratio=2.0, num_classes=num_classes, global_pool="avg"
    )
    for module in net.blocks.modules():
        if isinstance(module, nn.Linear):  # timm's 0.02 leaves so small a network nearly linear, at chance for epochs
            nn.init.normal_(module.weight, std=1.4 / math.sqrt(module.in_features))
    first: Any = net.patch_embed.proj
    nn.init.normal_(first.weight, std=2.0 / math.sqrt(first.weight[0].numel()))
    _ignore_stills(first)
    return net


def create_resnet_demo(num_classes: int) -> nn.Module:
    """A ResNet of some 170 000 weights at 32x32 for the demo set."""
    from timm.models.resnet import BasicBlock, ResNet

    block: Any = BasicBlock
    net: Any = ResNet(block, (1, 1, 1, 1), num_classes=num_classes, stem_width=16, channels=(16, 32, 64, 64))
    _ignore_stills(net.conv1)
    return net
