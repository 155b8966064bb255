"""The door: metered, answers only; and the published checkpoints behind it."""

import gc
import types

import pytest
import torch
from torchvision.models.video.swin_transformer import SwinTransformer3d

from extraction.errors import BudgetExhausted, UserError
from extraction.victims import ANSWERS, load_model, load_victim, shape_answers, swin
from extraction.weights import load_strictly, read_state, save_weights


@pytest.fixture
def clips() -> torch.Tensor:
    return torch.rand(6, 3, 16, 48, 48, generator=torch.Generator().manual_seed(0))


def test_counts_each_clip_and_stops_before_the_budget_is_passed(clips):
    victim = load_victim("demo_swin", query_budget=8)
    victim.query(clips)
    assert (victim.num_queries, victim.queries_left) == (6, 2)
    with pytest.raises(BudgetExhausted, match="6 of 8 queries spent, 3 more"):
        victim.query(clips[:3])
    assert victim.num_queries == 6  # the refused clips were not billed
    victim.query(clips[:2])
    assert victim.queries_left == 0


def test_surfaces_show_what_they_say(clips):
    logits = load_model("demo_swin")(clips)
    said = {surface: load_victim("demo_swin", answers=surface).query(clips) for surface in ANSWERS}
    torch.testing.assert_close(said["logits"], logits)
    torch.testing.assert_close(said["probs"], logits.softmax(1))
    assert torch.equal(said["label"], logits.argmax(1))
    assert said["label"].dtype == torch.int64
    assert ((said["top5"] > 0).sum(1) == 5).all()
    assert torch.equal(said["top5"].max(1).values, said["probs"].max(1).values)


def test_rounding_hides_digits(clips):
    said = load_victim("demo_swin", decimals=2).query(clips)
    torch.testing.assert_close(said * 100, (said * 100).round(), atol=1e-4, rtol=0)
    assert torch.equal(shape_answers(torch.tensor([[0.0, 3.0]]), "probs", 1), torch.tensor([[0.0, 1.0]]))


def test_no_gradient_comes_through_the_door(clips):
    clips.requires_grad_(True)
    assert not load_victim("demo_swin").query(clips).requires_grad


def test_no_attribute_of_the_door_leads_to_the_model():
    victim = load_victim("demo_swin")
    seen, todo = set(), [victim]
    while todo:  # every object reachable through attributes and containers
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, (type, types.ModuleType, types.FunctionType)):
            continue
        seen.add(id(thing))
        assert not isinstance(thing, (torch.nn.Module, torch.Tensor)), thing
        if isinstance(thing, types.MethodType):
            todo.append(thing.__self__)
        elif isinstance(thing, (list, tuple, set, dict)):
            todo += list(thing.values()) if isinstance(thing, dict) else list(thing)
        elif not isinstance(thing, (str, int, float, type(None))):
            names = [name for name in dir(thing) if not name.startswith("__")]
            todo += [getattr(thing, name) for name in names]
    gc.collect()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (dict(name="swin_x"), "no victim is called 'swin_x'"),
        (dict(answers="everything"), "no answers are called 'everything'"),
        (dict(query_budget=-1), "query budget -1"),
        (dict(name="swin_t_k400"), "swin_tiny_patch244_window877_kinetics400_1k.pth"),
        (dict(name="trained"), "--victim-weights"),
    ],
)
def test_bad_arguments_get_one_line(change, line):
    with pytest.raises(UserError, match=line) as caught:
        load_victim(**(dict(name="demo_swin") | change))
    assert "\n" not in str(caught.value)


# --- the published checkpoints -------------------------------------------------------------------------------------


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


class _Bomb:
    def __reduce__(self):
        return (open, ("/tmp/extraction-pickle-ran", "w"))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    from pathlib import Path

    Path("/tmp/extraction-pickle-ran").unlink(missing_ok=True)
    torch.save({"model": _Bomb()}, tmp_path / "bomb.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    for name in ("bomb.pth", "module.pth"):
        with pytest.raises(UserError, match="convert it once in a throw-away environment"):
            read_state(tmp_path / name)
    assert not Path("/tmp/extraction-pickle-ran").exists()


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


# --- the fused Video Swin ------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("compute", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_fused_swin_compiles_to_one_graph(compute, precision):
    fused, clips = swin.FusedSwin(create_wild_swin("demo")), torch.randn(4, 3, 16, 48, 48)
    compiled = torch.compile(fused.prepare(16, 48, 48, precision), fullgraph=True, compute=compute)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        for part in (clips, clips[:3]):  # the last batch of a set is smaller
            expected = fused(part).float()
            tolerance = 1e-5 if precision == torch.float32 else 0.02
            assert (compiled(part).float() - expected).abs().max() < tolerance * expected.std()
