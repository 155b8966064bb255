"""Recognizers of mmaction2 as victims: config file and checkpoint, as its own runner writes them."""

import sys
from pathlib import Path

import pytest
import torch

from extraction.errors import BudgetExhausted
from extraction.victims.zoo import load_victim

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


CLASSES = [f"class {k}" for k in range(7)]


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


@pytest.mark.parametrize(("described", "length"), [(IN_3D, 8), (IN_2D, 6)], ids=["3D", "2D"])
def test_mmaction2_answers_queries_as_the_model_called_directly(random_clips, mmaction, tmp_path, described, length):
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
        outputs = net.test_step({"inputs": inputs, "data_samples": samples})
    direct = torch.stack([sample.pred_scores.item for sample in outputs])
    torch.testing.assert_close(victim.query(clips), direct, atol=1e-5, rtol=1e-4)
    assert (direct[0] - direct[1]).abs().max() > 1e-3
    assert (victim.num_queries, victim.classes) == (2, tuple(CLASSES))
    with pytest.raises(BudgetExhausted):
        victim.query(clips)


def test_mmaction2_files_that_do_not_fit_get_one_line(load_error, mmaction, tmp_path):
    _, name, path = write_recognizer(tmp_path, IN_3D, {})
    assert "write epoch_30.classes.txt beside it" in load_error(name, path)
    beside = tmp_path / "epoch_30.classes.txt"
    beside.write_text("k400")
    assert "400 class names for the 7 classes of" in load_error(name, path)
    beside.write_text("\n".join(CLASSES))
    first, beside_other = load_victim(name, path), "\n".join(reversed(CLASSES))
    beside.write_text(beside_other)
    assert load_victim(name, path).fingerprint != first.fingerprint  # a ledger tells the two apart
    state = torch.load(path, weights_only=True)["state_dict"]
    torch.save({"state_dict": {key: state[key] for key in list(state)[3:]}}, path)
    assert "missing (backbone." in load_error(name, path)
    config = Path(name.partition(":")[2])
    config.write_text("model = dict(type='Recognizer3D'")
    assert "cannot be read as a config" in load_error(name, path)
    config.write_text("model = dict(type='Nothing', backbone=dict(), data_preprocessor=dict(type='ActionDataPreprocessor'))")
    assert "its model cannot be built" in load_error(name, path)
    assert "config nowhere.py not found" in load_error("mmaction2:nowhere.py", path)


def test_given_classes_come_before_the_checkpoints_and_size_the_head(mmaction, tmp_path, error_line, random_clips):
    described = IN_3D | {"head": IN_3D["head"].replace("num_classes=7", "num_classes=3")}
    _, name, path = write_recognizer(tmp_path, described, {"dataset_meta": {"classes": CLASSES[:3]}})
    config = Path(name.partition(":")[2])
    config.write_text(config.read_text().replace("num_classes=3", "num_classes=400"))  # as the published config has it
    (tmp_path / "names.txt").write_text("run\nwalk\njump")
    victim = load_victim(name, path, classes=tmp_path / "names.txt")
    assert victim.classes == ("run", "walk", "jump")
    assert victim.query(random_clips(1, 3, 8, 48, 48)).shape == (1, 3)
    assert "of another shape (cls_head" in error_line(load_victim, name, path, classes="k600")


def test_without_mmaction2_one_line_says_what_to_do(load_error, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mmengine.config", None)
    for name in ("config.py", "weights.pth"):
        (tmp_path / name).touch()
    assert "pip install -e '.[mmaction2]'" in load_error(f"mmaction2:{tmp_path / 'config.py'}", tmp_path / "weights.pth")
