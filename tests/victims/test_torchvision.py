"""torchvision's video models as victims."""

import torch

from extraction.victims.zoo import load_victim


def test_torchvision_models_bring_their_preprocessing_and_classes(load_error, random_clips, tmp_path):
    from torchvision.models.video import R3D_18_Weights, r3d_18

    torch.manual_seed(0)
    net = r3d_18(num_classes=400).eval()
    torch.save(net.state_dict(), tmp_path / "r3d.pth")
    clips = random_clips(1, 3, 16, 112, 112)
    victim = load_victim("torchvision:r3d_18", tmp_path / "r3d.pth", "logits")
    shown = R3D_18_Weights.KINETICS400_V1.transforms()
    with torch.no_grad():
        direct = net((clips - torch.tensor(shown.mean).view(3, 1, 1, 1)) / torch.tensor(shown.std).view(3, 1, 1, 1))
    torch.testing.assert_close(victim.query(clips), direct, atol=1e-4, rtol=1e-4)
    assert victim.classes[:2] == ("abseiling", "air drumming")
    assert "not the weights of torchvision's s3d" in load_error("torchvision:s3d", tmp_path / "r3d.pth")
    assert "no video model 'resnet18'; there are mc3_18" in load_error("torchvision:resnet18", tmp_path / "r3d.pth")
    assert "needs --victim-weights" in load_error("torchvision:r3d_18")
