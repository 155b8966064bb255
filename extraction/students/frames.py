"""Students that look at single frames: ViT (Dosovitskiy et al. 2021, timm's) and ResNet (He et al. 2016, torchvision's).

float (N, 3, H, W), normalised -> logits (N, num_classes); `Student` averages the logits over a clip's frames.
"""

from torch import nn


def create_vit_tiny(num_classes: int) -> nn.Module:
    """ViT-Tiny/16 at 224x224, 5.5 M weights, in the key layout of timm's `vit_tiny_patch16_224`."""
    import timm  # here, because it takes seconds to import

    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=num_classes)


def create_resnet50(num_classes: int) -> nn.Module:
    """23.5 M weights below the head, torchvision's key layout."""
    from torchvision.models import resnet50

    return resnet50(num_classes=num_classes)


def create_vit_demo(num_classes: int) -> nn.Module:
    """A ViT of some 0.1 M weights at 32x32 for the demo set."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, mlp_ratio=2.0, num_classes=num_classes, global_pool="avg"
    )


def create_resnet_demo(num_classes: int) -> nn.Module:
    """A ResNet of some 0.1 M weights at 32x32 for the demo set."""
    from timm.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=num_classes, stem_width=16, channels=(16, 32, 64, 64))
