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


def test_a_fine_tuned_model_has_classes_of_its_own(load_error, error_line, random_clips, tmp_path):
    from torchvision.models.video import r3d_18

    torch.manual_seed(0)
    net = r3d_18(num_classes=3).eval()
    torch.save(net.state_dict(), tmp_path / "r3d.pth")
    (tmp_path / "names.txt").write_text("run\nwalk\n\njump\n")
    victim = load_victim("torchvision:r3d_18", tmp_path / "r3d.pth", classes=tmp_path / "names.txt")
    assert victim.classes == ("run", "walk", "jump")
    assert victim.query(random_clips(1, 3, 16, 112, 112)).shape == (1, 3)
    assert "2 of another shape (fc.weight, fc.bias)" in load_error("torchvision:r3d_18", tmp_path / "r3d.pth")
    (tmp_path / "two.txt").write_text("run\nwalk\n")
    line = error_line(load_victim, "torchvision:r3d_18", tmp_path / "r3d.pth", classes=tmp_path / "two.txt")
    assert "2 of another shape (fc.weight, fc.bias)" in line
