"""Video Swin: the published checkpoints, and a fused network that answers as torchvision's does."""

import pytest
import torch
from torchvision.models.video.swin_transformer import SwinTransformer3d

from extraction.errors import UserError
from extraction.victims import swin
from extraction.victims.zoo import load_model
from extraction.weights import load_strictly, save_weights


def to_mmaction_keys(state: dict, last_norm: str) -> dict:
    """The inverse of `to_torchvision_keys`, written out by hand from mmaction's module names."""
    renamed = {}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "head":
            name = f"cls_head.fc_cls.{parts[1]}"
        elif parts[0] == "norm":
            name = f"backbone.{last_norm}.{parts[1]}"
        elif parts[0] == "patch_embed":
            name = f"backbone.{key}"
        elif int(parts[1]) % 2:
            name = f"backbone.layers.{int(parts[1]) // 2}.downsample." + ".".join(parts[2:])
        else:
            rest = ".".join(parts[2:]).replace("mlp.0", "mlp.fc1").replace("mlp.3", "mlp.fc2")
            name = f"backbone.layers.{int(parts[1]) // 2}.blocks.{rest}"
        if not name.endswith("relative_position_index"):
            renamed[name] = value
        else:
            renamed[name] = torch.zeros(1, dtype=torch.int64)  # derived: must not be taken from the file
    return renamed


@pytest.mark.parametrize("last_norm", ["norm", "norm3"])
def test_published_key_layout_loads_to_the_same_network(tmp_path, last_norm):
    net = swin.create_swin("swin_t", 400)
    path = tmp_path / "swin_tiny.pth"
    torch.save({"meta": {"epoch": 30}, "state_dict": to_mmaction_keys(net.state_dict(), last_norm)}, path)
    model = load_model("swin_t_k400", path)
    clips = torch.rand(1, 3, 32, 224, 224)[:, :, :8, :112, :112]
    normalised = (clips - torch.tensor(swin.MEAN).view(1, 3, 1, 1, 1)) / torch.tensor(swin.STD).view(1, 3, 1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(model.model.net(normalised), net.eval()(normalised), atol=1e-5, rtol=1e-5)
    assert model.classes[0] == "abseiling"
    assert len(model.classes) == 400


def test_torchvision_and_own_files_load_too(tmp_path):
    net = swin.create_swin("swin_t", 400)
    torch.save(net.state_dict(), tmp_path / "tv.pth")
    save_weights(tmp_path / "own.safetensors", net.state_dict(), {})
    first, second = (load_model("swin_t_k400", tmp_path / name) for name in ("tv.pth", "own.safetensors"))
    assert torch.equal(first.model.net.head.weight, second.model.net.head.weight)


def test_wrong_and_truncated_checkpoints_name_the_keys(tmp_path):
    state = swin.create_swin("swin_t", 400).state_dict()
    del state["features.0.0.attn.qkv.weight"]
    state["patch_embed.extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match=r"1 missing \(features.0.0.attn.qkv.weight\); 1 unknown \(patch_embed.extra\)"):
        load_model("swin_t_k400", tmp_path / "wrong.pth")
    whole = (tmp_path / "wrong.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut.pth: not a readable weight file, truncated"):
        load_model("swin_t_k400", tmp_path / "cut.pth")
    small = swin.create_swin("swin_t", 12).state_dict()
    torch.save(small, tmp_path / "classes.pth")
    with pytest.raises(UserError, match="the head has 12 classes, swin_t_k400 has 400"):
        load_model("swin_t_k400", tmp_path / "classes.pth")
    with pytest.raises(UserError, match="not the weights of swin_s"):
        load_strictly(swin.create_swin("swin_s", 12), small, "classes.pth", "swin_s")


@pytest.mark.parametrize(("num_frames", "size"), [(32, 224), (16, 224), (8, 112)])
@pytest.mark.slow
def test_equals_mmaction2(tmp_path, num_frames, size):
    recognizer = pytest.importorskip(
        "mmaction.models", reason="mmaction2 is not installed (pip install -r requirements-test.txt)"
    )
    torch.manual_seed(0)
    backbone = recognizer.SwinTransformer3D(
        "tiny", pretrained=None, pretrained2d=False, window_size=(8, 7, 7), drop_path_rate=0.0
    )
    head = recognizer.I3DHead(num_classes=400, in_channels=768, spatial_type="avg")
    for parameter in [*backbone.parameters(), *head.parameters()]:
        torch.nn.init.normal_(parameter, std=0.05)
    state = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
    state |= {f"cls_head.{k}": v for k, v in head.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "swin.pth")
    clips = torch.rand(1, 3, num_frames, size, size)
    backbone.eval()
    head.eval()
    with torch.no_grad():
        expected = head(backbone(clips))
        found = load_model("swin_t_k400", tmp_path / "swin.pth").model.net(clips)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def create_wild_swin(architecture: str) -> SwinTransformer3d:
    """A small Swin in which each bias, mask and pad shows in the logits: nothing is zero, nothing is small."""
    torch.manual_seed(0)
    if architecture == "demo":
        net = swin.create_swin("swin_demo", 12)
    else:  # the published windows
        net = SwinTransformer3d([2, 4, 4], 24, depths=[2, 2], num_heads=[2, 4], window_size=[8, 7, 7], num_classes=12)
    for name, parameter in net.named_parameters():
        std = 1.0 if parameter.ndim == 1 or name.endswith("bias_table") else 1.4 / parameter[0].numel() ** 0.5
        torch.nn.init.normal_(parameter, std=std)
    return net.eval().requires_grad_(False)


SIZES = [
    pytest.param("demo", (16, 48, 48), id="demo"),
    pytest.param("demo", (40, 90, 54), id="demo-padded-shifted-in-time"),
    pytest.param("published", (32, 56, 28), id="shifted"),
    pytest.param("published", (8, 56, 56), id="shorter-than-a-window"),
    pytest.param("published", (18, 33, 50), id="padded"),  # patches, windows and merging all need pads
    pytest.param("published", (6, 20, 20), id="smaller-than-a-window"),
]


@pytest.mark.parametrize(("architecture", "size"), SIZES)
def test_fused_swin_equals_torchvision(architecture, size):
    net, clips = create_wild_swin(architecture), torch.randn(3, 3, *size)
    keys, fused = list(net.state_dict()), swin.FusedSwin(net)
    expected, found = net(clips), fused(clips)
    atol = 1e-5 * expected.std().item()
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)
    torch.testing.assert_close(torch.cat([fused(clip[None]) for clip in clips]), found, atol=atol, rtol=0)
    torch.testing.assert_close(fused.embed_flat(clips), net.patch_embed(clips), atol=1e-5, rtol=1e-5)  # a GPU's way
    assert list(fused.state_dict()) == keys


def test_fused_swin_keeps_what_serves_every_mode_and_precision():
    net = create_wild_swin("demo").requires_grad_(True)
    fused, clips = swin.FusedSwin(net), torch.randn(4, 3, 16, 48, 48)
    with torch.inference_mode():
        expected = fused(clips)
    kept = fused.plans[0]
    # A mask with a gradient would keep PyTorch from its fused attention.
    assert not any(buffer.requires_grad for buffer in fused.buffers())
    fused(clips.requires_grad_(True)).sum().backward()
    assert clips.grad.abs().max() > 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for swift in (fused(clips), net(clips)):
            assert (swift.float() - expected).std() < 0.01 * expected.std()
    assert [plan.steps[0].mask.dtype for plan in fused.plans] == [torch.float32, torch.bfloat16]
    assert fused.plans[0] is kept
    fused(torch.randn(1, 3, 16, 72, 48))  # another size replaces them
    assert [plan.size for plan in fused.plans] == [(4, 12, 8)]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_fused_swin_compiles_to_one_graph(backend, precision):
    fused, clips = swin.FusedSwin(create_wild_swin("demo")), torch.randn(4, 3, 16, 48, 48)
    compiled = torch.compile(fused.prepare(16, 48, 48, precision), fullgraph=True, backend=backend)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        for part in (clips, clips[:3]):  # the last batch of a set is smaller
            expected = fused(part).float()
            tolerance = 1e-5 if precision == torch.float32 else 0.02
            assert (compiled(part).float() - expected).abs().max() < tolerance * expected.std()
