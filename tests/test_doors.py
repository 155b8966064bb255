"""Victims made by others, behind the same door: files of MoViNet, TensorFlow, torchvision, mmaction2; and the preflight."""

import ast
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from extraction.ledger import Ledger

import train_victim
from extraction import victims
from extraction.data.clips import Clips
from extraction.data.folders import find_videos, normalise_class
from extraction.errors import BudgetExhausted, UserError
from extraction.evaluation import Evaluator, check_victim, predict_videos, score
from extraction.network import fit_clips
from extraction.victims import KNOWN_CLASSES, VICTIMS, create_network, load_model, load_victim, movinet
from extraction.weights import save_weights
from grey_box import eval_teacher

ROOT = Path(__file__).parent.parent


def random_clips(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def stop_line(name: str, weights=None) -> str:
    with pytest.raises(UserError) as caught:
        load_victim(name, weights)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- MoViNet ---------------------------------------------------------------------------------------------------------


def make_movinet(model_id: str, num_classes: int = 600) -> movinet.MoViNet:
    torch.manual_seed(0)
    net = movinet.MoViNet(model_id, num_classes).eval()
    for name, value in net.state_dict().items():  # nothing left at its default
        if name.endswith(("running_mean", "norm.bias", "hidden.bias", "classifier.bias")):
            value.normal_(std=0.1)
        elif name.endswith(("running_var", "norm.weight")):
            value.uniform_(0.5, 1.5)
        elif name.endswith("scale"):
            value.uniform_(0.1, 0.3)  # more, and float32 is off by percents after 26 blocks, fused or not
    return net


@pytest.mark.parametrize(("model_id", "size"), [("a0", 172), ("a2", 224)])
def test_movinet_answers_through_the_door_as_called_directly(tmp_path, model_id, size):
    net = make_movinet(model_id)
    save_weights(tmp_path / "movinet.safetensors", net.state_dict(), {})
    name = f"movinet_{model_id}_k600"
    model = load_model(name, tmp_path / "movinet.safetensors")
    assert (model.model.num_frames, model.model.size, len(model.classes)) == (50, size, 600)
    clips = random_clips(2, 3, 4, 48, 40)
    model.model.num_frames, model.model.size = 4, None  # 50 x 224 x 224 would take seconds
    with torch.no_grad():
        direct = net(clips)
        torch.testing.assert_close(model(clips), direct, atol=1e-3, rtol=1e-4)
    assert direct.std() > 0.1


def test_movinet_of_another_size_or_task_gets_one_line(tmp_path):
    save_weights(tmp_path / "a0.safetensors", make_movinet("a0").state_dict(), {})
    assert "not the weights of MoViNet-A2 Base" in stop_line("movinet_a2_k600", tmp_path / "a0.safetensors")
    save_weights(tmp_path / "seven.safetensors", make_movinet("a0", 7).state_dict(), {})
    line = stop_line("movinet_a0_k600", tmp_path / "seven.safetensors")
    assert "the head has 7 classes, movinet_a0_k600 has 600" in line
    assert "movinet_a2_base.tar.gz" in stop_line("movinet_a2_k600")


def test_a_trained_movinet_answers_through_the_door_as_called_directly(tmp_path):
    classes = [f"class {k}" for k in range(5)]
    model = create_network("movinet_demo", 5, 16, 48).eval()
    model.net.load_state_dict(make_movinet("demo", 5).state_dict())
    about = dict(architecture="movinet_demo", classes=classes, num_frames=16, size=48)
    save_weights(tmp_path / "victim.safetensors", model.net.state_dict(), about)
    clips = random_clips(2, 3, 24, 64, 64)
    victim = load_victim("trained", tmp_path / "victim.safetensors", "logits")
    assert victim.classes == tuple(classes)
    with torch.no_grad():
        torch.testing.assert_close(victim.query(clips), model.net(fit_clips(clips, 16, 48)), atol=1e-3, rtol=1e-4)
    with pytest.raises(UserError, match="no architecture is called 'lstm'"):
        create_network("lstm", 5, 16, 48)


def test_train_victim_makes_a_movinet_that_opens(demo_set, tmp_path):
    out = tmp_path / "run"
    config = train_victim.Config(
        str(demo_set / "train_5per"), val=str(demo_set / "val"), architecture="movinet_demo", epochs=1, batch_size=18,
        step=16, device="cpu", num_workers=0, out_dir=str(out),
    )  # fmt: skip
    train_victim.main(config)
    victim = load_victim("trained", out / "victim.safetensors", "label")
    assert victim.query(random_clips(2, 3, 16, 48, 48)).shape == (2,)
    assert (out / "victim.safetensors").stat().st_size < 2e6


def test_the_shipped_movinet_knows_its_classes(demo_set):
    model = load_model("demo_movinet")
    clips = Clips(find_videos(demo_set, model.classes, "val"), views=(1, 1), num_frames=16, size=48)
    said = predict_videos(model, clips, "cpu", 24)
    assert score(said.probs, said.labels)["top1"] > 0.75
    assert VICTIMS["demo_movinet"][1].stat().st_size < 2e6


def test_the_class_lists_of_kinetics():
    k400, k600 = (KNOWN_CLASSES[name]() for name in ("k400", "k600"))
    assert (len(k400), len(k600)) == (400, 600)
    assert k600 == sorted(k600)
    assert len({normalise_class(name) for name in k600}) == 600
    # Where others have them: class indices published with I3D and MoViNet.
    assert [k600[k] for k in (0, 17, 236, 307, 427, 599)] == [
        "abseiling", "backflip (human)", "jogging", "parkour", "running on treadmill", "zumba",
    ]  # fmt: skip


# --- TensorFlow ------------------------------------------------------------------------------------------------------


def test_without_tensorflow_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert "pip install -e '.[tensorflow]', or take movinet_a2_k600" in stop_line("movinet_a2_k600_tfhub", tmp_path)


@pytest.fixture(scope="module")
def tensorflow():
    pytest.importorskip("tensorflow_hub", reason="tensorflow-hub is not installed: pip install -e '.[tensorflow]'")
    return pytest.importorskip("tensorflow", reason="tensorflow is not installed: pip install -e '.[tensorflow]'")


@pytest.fixture(scope="module")
def saved_model(tensorflow, tmp_path_factory) -> Path:
    """A folder with the published signature: {'image': (B, T, H, W, 3)} -> (B, 600), and a kernel that tells axes apart."""
    tf = tensorflow

    class Model(tf.Module):
        def __init__(self):
            self.kernel = tf.Variable(tf.random.stateless_normal((3, 600), (1, 2)))

        @tf.function(input_signature=[{"image": tf.TensorSpec((None, None, None, None, 3), tf.float32)}])
        def __call__(self, inputs):
            image = inputs["image"]
            weights = [tf.range(1.0, 1.0 + tf.cast(tf.shape(image)[k], tf.float32)) for k in (1, 2, 3)]
            for weight in weights:  # time, height, width
                image = tf.einsum("bt...,t->b...", image, weight / tf.reduce_sum(weight))
            return image @ self.kernel

    folder = tmp_path_factory.mktemp("tfhub") / "movinet"
    tf.saved_model.save(Model(), str(folder))
    return folder


def test_tfhub_answers_as_tensorflow_called_directly(tensorflow, saved_model):
    clips = random_clips(2, 3, 50, 224, 224)
    direct = tensorflow.saved_model.load(str(saved_model))({"image": clips.permute(0, 2, 3, 4, 1).numpy()})
    victim = load_victim("movinet_a2_k600_tfhub", saved_model, "logits", query_budget=3)
    torch.testing.assert_close(victim.query(clips), torch.tensor(direct.numpy()), atol=0, rtol=0)
    assert (victim.num_queries, victim.num_classes, len(victim.fingerprint)) == (2, 600, 16)
    with pytest.raises(BudgetExhausted):
        victim.query(clips)
    assert victim.num_queries == 2
    assert tensorflow.config.get_visible_devices("GPU") == []


def test_other_saved_models_get_one_line(tensorflow, tmp_path):
    tf = tensorflow
    assert "holds no saved_model.pb" in stop_line("movinet_a2_k600_tfhub", tmp_path)
    plain = tf.Module()
    tf.saved_model.save(plain, str(tmp_path / "plain"))
    assert "not a SavedModel that takes" in stop_line("movinet_a2_k600_tfhub", tmp_path / "plain")
    few = tf.Module()
    few.__call__ = tf.function(
        lambda inputs: tf.reduce_mean(inputs["image"], [1, 2, 3]),
        input_signature=[{"image": tf.TensorSpec((None, None, None, None, 3), tf.float32)}],
    )
    tf.saved_model.save(few, str(tmp_path / "few"))
    assert "answers (1, 3) to one clip instead of (1, 600)" in stop_line("movinet_a2_k600_tfhub", tmp_path / "few")


# --- torchvision -----------------------------------------------------------------------------------------------------


def test_torchvision_models_bring_their_preprocessing_and_classes(tmp_path):
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
    assert "not the weights of torchvision's s3d" in stop_line("torchvision:s3d", tmp_path / "r3d.pth")
    assert "no video model 'resnet18'; there are mc3_18" in stop_line("torchvision:resnet18", tmp_path / "r3d.pth")
    assert "needs --victim-weights" in stop_line("torchvision:r3d_18")


# --- mmaction2 -------------------------------------------------------------------------------------------------------

# As its own configs are written, with narrow networks. The 3D one has its classes in the checkpoint, the 2D one beside it.
CONFIG = """
model = dict(
    type='{recognizer}',
    backbone={backbone},
    cls_head={head},
    data_preprocessor=dict(
        type='ActionDataPreprocessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], format_shape='{layout}'),
    train_cfg=None,
    test_cfg=dict(max_testing_views=4))
val_pipeline = [
    dict(type='DecordInit'),
    dict(type='SampleFrames', {sampling}, test_mode=True),
    dict(type='DecordDecode'),
    dict(type='Resize', scale=(-1, 64)),
    dict(type='CenterCrop', crop_size=48),
    dict(type='FormatShape', input_format='{layout}'),
    dict(type='PackActionInputs')]
"""
IN_2D = dict(
    recognizer="Recognizer2D",
    layout="NCHW",
    sampling="clip_len=1, frame_interval=1, num_clips=6",
    backbone="dict(type='ResNetTSM', depth=18, num_segments=6, shift_div=8, norm_eval=False)",
    head="dict(type='TSMHead', num_classes=7, in_channels=512, num_segments=6, is_shift=True, average_clips='score')",
)
IN_3D = dict(
    recognizer="Recognizer3D",
    layout="NCTHW",
    sampling="clip_len=8, frame_interval=2, num_clips=1",
    backbone="dict(type='ResNet3d', depth=18, pretrained=None, pretrained2d=False, base_channels=8, "
    "conv_cfg=dict(type='Conv3d'), inflate=(1, 1, 1, 1), norm_eval=False, zero_init_residual=False)",
    head="dict(type='I3DHead', num_classes=7, in_channels=64, spatial_type='avg', average_clips='score')",
)


@pytest.fixture(scope="module")
def mmaction():
    return pytest.importorskip("mmaction", reason="mmaction2 is not installed: pip install -e '.[mmaction2]'")


def write_recognizer(folder: Path, described: dict, meta: dict):
    """Write config and checkpoint as mmengine's runner saves it; returns the model and their paths."""
    import mmaction.models  # noqa: F401
    from mmaction.registry import MODELS
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    config = folder / "config.py"
    config.write_text(CONFIG.format(**described))
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmaction"):
        net = MODELS.build(Config.fromfile(str(config)).model).eval()
    for name, value in net.state_dict().items():
        if name.endswith(("running_var", "bn.weight")):
            value.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "bias")):
            value.normal_(std=0.1)
    checkpoint = folder / "epoch_30.pth"
    torch.save({"meta": {"epoch": 30, "iter": 9} | meta, "state_dict": net.state_dict()}, checkpoint)
    return net, f"mmaction2:{config}", checkpoint


CLASSES = [f"class {k}" for k in range(7)]


@pytest.mark.parametrize(("described", "length"), [(IN_3D, 8), (IN_2D, 6)], ids=["3D", "2D"])
def test_mmaction2_answers_through_the_door_as_called_directly(mmaction, tmp_path, described, length):
    in_checkpoint = described is IN_3D
    net, name, path = write_recognizer(tmp_path, described, {"dataset_meta": {"classes": CLASSES}} if in_checkpoint else {})
    if not in_checkpoint:
        (tmp_path / "epoch_30.classes.txt").write_text("\n".join(CLASSES))
    victim = load_victim(name, path, "logits", query_budget=3)
    clips = (random_clips(2, 3, length, 48, 48) * 255).round() / 255
    # As mmaction2's own test loop does it: uint8 through the data preprocessor and predict.
    frames = (clips * 255).round().byte()
    inputs = [frame[None] if in_checkpoint else frame.transpose(0, 1) for frame in frames]
    from mmaction.structures import ActionDataSample

    samples = [ActionDataSample() for _ in inputs]
    net.test_cfg = None
    with torch.no_grad():
        said = net.test_step({"inputs": inputs, "data_samples": samples})
    direct = torch.stack([sample.pred_scores.item for sample in said])
    torch.testing.assert_close(victim.query(clips), direct, atol=1e-5, rtol=1e-4)
    assert (direct[0] - direct[1]).abs().max() > 1e-3
    assert (victim.num_queries, victim.classes) == (2, tuple(CLASSES))
    with pytest.raises(BudgetExhausted):
        victim.query(clips)


def test_mmaction2_files_that_do_not_fit_get_one_line(mmaction, tmp_path):
    _, name, path = write_recognizer(tmp_path, IN_3D, {})
    assert "write epoch_30.classes.txt beside it" in stop_line(name, path)
    beside = tmp_path / "epoch_30.classes.txt"
    beside.write_text("k400")
    assert "400 class names for the 7 classes of" in stop_line(name, path)
    beside.write_text("\n".join(CLASSES))
    first, beside_other = load_victim(name, path), "\n".join(reversed(CLASSES))
    beside.write_text(beside_other)
    assert load_victim(name, path).fingerprint != first.fingerprint  # a ledger tells the two apart
    state = torch.load(path, weights_only=True)["state_dict"]
    torch.save({"state_dict": {key: state[key] for key in list(state)[3:]}}, path)
    assert "missing (backbone." in stop_line(name, path)
    config = Path(name.partition(":")[2])
    config.write_text("model = dict(type='Recognizer3D'")
    assert "cannot be read as a config" in stop_line(name, path)
    config.write_text("model = dict(type='Nothing', backbone=dict(), data_preprocessor=dict(type='ActionDataPreprocessor'))")
    assert "its model cannot be built" in stop_line(name, path)
    assert "config nowhere.py not found" in stop_line("mmaction2:nowhere.py", path)


def test_without_mmaction2_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mmengine.config", None)
    for name in ("config.py", "weights.pth"):
        (tmp_path / name).touch()
    assert "pip install -e '.[mmaction2]'" in stop_line(f"mmaction2:{tmp_path / 'config.py'}", tmp_path / "weights.pth")


# --- pytorchvideo ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub():
    return pytest.importorskip(
        "pytorchvideo.models.hub", reason="pytorchvideo is not installed: pip install -e '.[pytorchvideo]'"
    )


def write_hub_model(hub, name: str, path: Path) -> torch.nn.Module:
    """Random weights that make answers differ, in a checkpoint as the model zoo has them; returns the hub's own model."""
    torch.manual_seed(0)
    net = getattr(hub, name)(pretrained=False).eval()
    for key, value in net.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif key.endswith("bias") or key.endswith("running_mean"):
            value.normal_(std=0.1)
        elif key.endswith("proj.weight"):
            value.normal_(std=0.3)
    torch.save({"epoch": 196, "model_state": net.state_dict(), "optimizer_state": {"state": {}}, "cfg": "ARCH: x3d"}, path)
    return net


def test_pytorchvideo_x3d_answers_through_the_door_as_called_directly(hub, tmp_path):
    net = write_hub_model(hub, "x3d_xs", tmp_path / "X3D_XS.pyth")
    clips = random_clips(2, 3, 4, 182, 182)
    with torch.no_grad():
        direct = net((clips - 0.45) / 0.225)
    torch.testing.assert_close(direct.sum(1), torch.ones(2))  # the hub's own answers are probabilities
    assert (direct[0] - direct[1]).abs().max() > 1e-3
    victim = load_victim("pytorchvideo:x3d_xs", tmp_path / "X3D_XS.pyth", "probs", query_budget=3)
    torch.testing.assert_close(victim.query(clips), direct, atol=1e-5, rtol=1e-3)
    longer = clips.repeat_interleave(12, dim=2)  # the clip as filmed: every 12th frame is looked at
    torch.testing.assert_close(victim.query(longer[:1]), direct[:1], atol=1e-5, rtol=1e-3)
    assert (victim.num_queries, victim.num_classes) == (3, 400)
    with pytest.raises(BudgetExhausted):
        victim.query(clips)
    # Where PySlowFast's published class indices of Kinetics-400 have them.
    at = {0: "abseiling", 115: "eating ice cream", 212: "petting animal (not cat)", 290: "sharpening knives", 399: "zumba"}
    assert {k: victim.classes[k] for k in at} == at


def test_pytorchvideo_slowfast_gets_both_pathways(hub, tmp_path):
    write_hub_model(hub, "slowfast_r50", tmp_path / "SLOWFAST_8x8_R50.pyth")
    model = load_model("pytorchvideo:slowfast_r50", tmp_path / "SLOWFAST_8x8_R50.pyth")
    assert (model.model.num_frames, model.model.size) == (32, 256)
    model.model.size = 224  # cheaper
    seen = []
    model.model.net.net.register_forward_pre_hook(lambda net, inputs: seen.extend(inputs[0]))
    model.model.net.net.register_forward_hook(lambda net, inputs, output: seen.append(output))
    clips = random_clips(1, 3, 32, 224, 224)
    logits = model(clips)
    slow, fast, output = seen
    torch.testing.assert_close(fast, (clips - 0.45) / 0.225)
    assert torch.equal(slow, fast[:, :, [0, 4, 8, 13, 17, 22, 26, 31]])
    assert torch.equal(logits, output)
    assert logits.shape == (1, 400)
    assert logits.std() > 1e-3


def test_pytorchvideo_names_and_files_that_do_not_fit_get_one_line(hub, tmp_path):
    from extraction.victims.pytorchvideo import MODELS

    assert all(callable(getattr(hub, name)) for name in MODELS)
    path = tmp_path / "X3D_XS.pyth"
    write_hub_model(hub, "x3d_xs", path)
    assert "no Kinetics-400 model 'x3d_xxl'; there are c2d_r50, i3d_r50" in stop_line("pytorchvideo:x3d_xxl", path)
    assert "not the weights of pytorchvideo's slow_r50: keys" in stop_line("pytorchvideo:slow_r50", path)
    assert "needs --victim-weights: a file from pytorchvideo's model zoo" in stop_line("pytorchvideo:x3d_xs")


def test_without_pytorchvideo_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorchvideo.models", None)
    (tmp_path / "weights.pyth").touch()
    assert "pip install -e '.[pytorchvideo]'" in stop_line("pytorchvideo:slow_r50", tmp_path / "weights.pyth")


# --- the preflight ---------------------------------------------------------------------------------------------------


def open_referee(demo_set, folder, classes, open_model, **options) -> Evaluator:
    folder.mkdir(exist_ok=True)
    clips = Clips(find_videos(demo_set, classes, "val"), views=(1, 1), num_frames=16, size=48)
    ledger = Ledger(folder / "ledger.sqlite", lambda spent: load_victim("demo_swin", num_queries=spent), "probs")
    try:
        return Evaluator(clips, classes, torch.device("cpu"), 24, 0, ledger, open_model, **options)
    finally:
        assert ledger.num_queries == 0
        ledger.close()


def test_preflight_passes_the_right_victim(demo_set, tmp_path):
    model = load_model("demo_swin")
    assert open_referee(demo_set, tmp_path, model.classes, lambda: model).victim_scores["top1"] > 0.9


def shuffle_classes(model):
    return [model.classes[(k * 5 + 3) % 12] for k in range(12)], model


def normalise_for_0_to_255(model):
    """Mean and standard deviation meant for the other scale. Bare x255 this victim forgives: layer norm divides it out."""
    model.model.mean, model.model.std = 255 * model.model.mean, 255 * model.model.std
    return model.classes, model


def forget_the_weights(model):
    model.model.net = create_network("swin_demo", 12, 16, 48).net.eval()
    return model.classes, model


@pytest.mark.parametrize("spoil", [shuffle_classes, normalise_for_0_to_255, forget_the_weights])
def test_preflight_refuses(demo_set, tmp_path, spoil):
    torch.manual_seed(0)
    classes, model = spoil(load_model("demo_swin"))
    with pytest.raises(UserError, match="wrong weights, wrong class order, wrong preprocessing") as caught:
        open_referee(demo_set, tmp_path, classes, lambda: model)
    assert "\n" not in str(caught.value)
    assert open_referee(demo_set, tmp_path, classes, lambda: model, min_victim_top1=0).victim_scores["top1"] < 0.25


@pytest.mark.parametrize(("num_classes", "least"), [(2, 0.75), (12, 0.25), (400, 3 / 400)])
def test_the_least_that_passes(num_classes, least):
    check_victim({"top1": least + 1e-6}, num_classes)
    with pytest.raises(UserError):
        check_victim({"top1": least - 1e-6}, num_classes)
    check_victim({"top1": 0.0}, num_classes, 0)
    with pytest.raises(UserError):
        check_victim({"top1": 0.79}, num_classes, 0.8)


WRONG_SCALES = {
    "0 to 255": (lambda clips: 255 * clips, "clips reach from 0 to 255"),
    "normalised": (lambda clips: (clips - 0.45) / 0.225, "clips reach from -2 to 2.44"),
    "not a number": (lambda clips: clips / clips.new_tensor(0.0), "clips reach from nan to nan"),
}


@pytest.mark.parametrize("spoil", WRONG_SCALES.values(), ids=WRONG_SCALES)
def test_clips_of_another_scale_are_refused_and_not_billed(demo_set, tmp_path, spoil):
    change, line = spoil
    clips = random_clips(2, 3, 16, 48, 48)
    clips[0, 0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    victim = load_victim("demo_swin", query_budget=4)
    ledger = Ledger(tmp_path / "l.sqlite", lambda spent: victim, "probs")
    for ask in (victim.query, lambda wrong: ledger.query(wrong, [bytes(16), bytes([1]) * 16])):
        with pytest.raises(UserError, match=line) as caught:
            ask(change(clips))
        assert "\n" not in str(caught.value)
    assert (victim.num_queries, ledger.num_queries, len(ledger)) == (0, 0, 0)
    victim.query((clips + 5e-4).half().float())  # rounding is let through
    assert victim.num_queries == 2
    ledger.close()
    # The evaluator's way in: whatever stands between the clips and the model is found before anything is paid or kept.
    model = load_model("demo_swin")
    with pytest.raises(UserError, match="a victim takes RGB in"):
        open_referee(demo_set, tmp_path / "r", model.classes, lambda: lambda clips: model(change(clips)))
    with closing(sqlite3.connect(tmp_path / "r" / "ledger.sqlite")) as kept:
        assert kept.execute("SELECT (SELECT count(*) FROM evaluator) + (SELECT count(*) FROM answers)").fetchone() == (0,)


# --- the scripts -----------------------------------------------------------------------------------------------------


def test_eval_teacher_scores_the_demo_victim(demo_set, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(victims.VICTIMS, "swin_b_k400", victims.VICTIMS["demo_swin"])
    config = eval_teacher.Config("swin", data=str(demo_set), stride=1, num_workers=0, device="cpu", out_dir=str(tmp_path))
    results = eval_teacher.main(config)
    assert results["top1"] > 0.9
    assert results["clips_per_second"] > 0
    table = (tmp_path / "swin_b_k400.classes.csv").read_text().splitlines()
    assert (len(table), table[0]) == (13, "class,num_videos,top1,top5")
    assert "24 videos of" in capsys.readouterr().out


def test_eval_teacher_stops_in_one_line_without_weights():
    done = subprocess.run(
        [sys.executable, "grey_box/eval_teacher.py", "--victim", "movinet"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("eval_teacher.py: victim weights weights/movinet_a2_base not found")
    assert done.stderr.count("\n") == 1


EXPERIMENTS = [
    f"{folder}.{path.stem}"
    for folder in ("grey_box", "black_box")
    for path in sorted((ROOT / folder).glob("*.py"))
    if path.stem not in ("__init__", "run_all", "eval_teacher")
]
MISSING = dict(student="nonsense", student_weights="a.pth", own_list="own.txt", val_list="val.txt", generator="gan")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_missing_name_or_file_is_found_before_anything_is_made_or_asked(name, tmp_path, monkeypatch):
    script = import_module(name)
    monkeypatch.chdir(tmp_path)
    fields = [field for field in MISSING if hasattr(script.Config, field)]
    assert {"student", "student_weights", "val_list"} <= set(fields)
    for field in fields:
        constants = script.DEMO | {"student_weights": __file__, field: MISSING[field], "out_dir": "run"}
        with pytest.raises(UserError, match=MISSING[field]) as caught:
            script.main(script.Config(**constants))
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []


WRONG = dict(
    batch_size=0, size=0, num_workers=-1, head_lr=-1.0, body_lr=-1.0, lr=-1.0, student_lr=float("nan"), generator_lr=-1.0,
    weight_decay=-1.0, hflip=3.0, brightness=3.0, rotation=-1.0,
)  # fmt: skip


@pytest.mark.parametrize("name", [*EXPERIMENTS, "grey_box.eval_teacher", "eval_only", "train_victim"])
def test_constants_out_of_their_range_get_one_line(name, tmp_path, monkeypatch):
    script = import_module(name)
    monkeypatch.chdir(tmp_path)
    config = script.Config(**script.DEMO)
    for field in WRONG.keys() & vars(config).keys():
        line = f"--{field.replace('_', '-')} {WRONG[field]}: it must be at {'most 1' if WRONG[field] == 3 else 'least'}"
        with pytest.raises(UserError, match=line):
            script.main(replace(config, **{field: WRONG[field]}))
    assert list(tmp_path.iterdir()) == []


def test_an_architecture_that_is_none_is_found_before_videos_are_looked_at(demo_set, tmp_path, monkeypatch):
    monkeypatch.setattr(train_victim, "Clips", None)
    config = train_victim.Config(str(demo_set / "val"), architecture="nonsense", device="cpu", out_dir=str(tmp_path))
    with pytest.raises(UserError, match="no architecture is called 'nonsense'"):
        train_victim.main(config)
    with pytest.raises(UserError, match=r"list nothere\.txt not found: --data-list"):
        train_victim.main(replace(config, data_list="nothere.txt"))


BLACK_BOX = ("conditional_gan_with", "stacked_images_with", "biggan_with")
STAGES = ("auxiliary", "finetune", "ticket")
SIBLINGS = [
    ("grey_box/swin_to_r21_kd.py", "grey_box/movinet_to_r21.py"),
    *((f"grey_box/swin_to_vit_{stage}.py", f"grey_box/movinet_to_r50_{stage}.py") for stage in STAGES),
    ("black_box/attack_video_swin.py", "black_box/attack_video_movinet.py"),
    *((f"black_box/{name}_swin.py", f"black_box/{name}_movinet.py") for name in BLACK_BOX),
]


@pytest.mark.parametrize(("swin", "movinet"), SIBLINGS)
def test_the_movinet_scripts_are_their_siblings_but_for_constants(swin, movinet):
    def blank(path: str) -> str:
        tree = ast.parse((ROOT / path).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant):
                node.value = 0
        return ast.dump(tree)

    assert blank(swin) == blank(movinet)
