"""Any RGB recogniser of mmaction2 1.x as a victim: its config file, its checkpoint, its preprocessing and its classes.

The weights are read without running anything. The config is another matter: mmengine runs a config file in Python as a
program. Use those whose source you trust, or write them as .json or .yaml, which are only read.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from extraction.errors import UserError
from extraction.network import VideoModel
from extraction.victims.classes import KNOWN_CLASSES, read_classes
from extraction.weights import load_strictly, read_checkpoint, read_metadata, read_state


class Recognizer(nn.Module):
    """One view through a recogniser, as mmaction2 tests it: normalised (B, 3, T, H, W) -> logits (B, num_classes)."""

    def __init__(self, net: nn.Module, num_classes: int, frames_first: bool):
        super().__init__()
        self.net: Any = net
        self.num_classes, self.frames_first = num_classes, frames_first

    def forward(self, clips: Tensor) -> Tensor:
        # 3D networks take (B, views, 3, T, H, W), those on frames (B, T, 3, H, W).
        views = clips.transpose(1, 2).contiguous() if self.frames_first else clips[:, None].contiguous()
        try:
            features, options = self.net.extract_feat(views, test_mode=True)
        except ImportError as error:
            raise UserError(f"this model needs more than mmcv-lite has ({_first_line(error)}): pip install mmcv") from None
        logits = self.net.cls_head(features, **options)
        if not isinstance(logits, Tensor) or logits.shape != (len(clips), self.num_classes):
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(f"the config's head answers {shape} to {len(clips)} clips, not one row of logits for each")
        return logits


def load_recognizer(config: str | Path, weights: Path, classes: list[str] | None = None) -> tuple[VideoModel, list[str]]:
    """Build the model of an mmaction2 config and load its checkpoint.

    Its classes are `classes`, for which the head is built, else those in the checkpoint's meta or, failing that, in
    `NAME.classes.txt` beside the checkpoint `NAME.pth`: one name per line in the order of the logits, or the single word k400
    or k600. Mean and standard deviation are the config's `data_preprocessor`, length and size of a clip those of its
    validation pipeline.

    Raises UserError, in one line, for a config or checkpoint that is not such a model's, and when the classes are unknown.
    """
    if not Path(config).is_file():
        raise UserError(f"config {config} not found: mmaction2:<config file> names a config of mmaction2 1.x")
    described = _read_config(config)
    if classes is not None and "num_classes" in (described.model.get("cls_head") or {}):
        described.model.cls_head.num_classes = len(classes)
    net = _build(config, described.model)
    normaliser: Any = net.data_preprocessor
    head = getattr(net, "cls_head", None)
    layout = getattr(normaliser, "format_shape", None)
    if head is None or layout not in ("NCTHW", "NCHW") or not hasattr(net, "extract_feat"):
        raise UserError(f"{config}: not a recogniser of RGB clips (it needs a cls_head and frames laid out as NCTHW or NCHW)")
    classes = classes or _find_classes(weights)
    if len(classes) != head.num_classes:
        raise UserError(f"{weights}: {len(classes)} class names for the {head.num_classes} classes of {config}")
    state = {key: value for key, value in read_state(weights).items() if not key.startswith("data_preprocessor.")}
    load_strictly(net, state, weights, str(config))
    # mmaction2 counts brightness from 0 to 255. Its to_rgb is about decoders that give BGR: our clips are RGB already.
    normalised = getattr(normaliser, "mean", None) is not None
    mean = [m / 255 for m in normaliser.mean.flatten().tolist()] if normalised else [0.0] * 3
    std = [s / 255 for s in normaliser.std.flatten().tolist()] if normalised else [1 / 255] * 3
    num_frames, size = _find_clip(described)
    return VideoModel(Recognizer(net, len(classes), layout == "NCHW"), num_frames, size, mean, std), classes


def _read_config(config: str | Path) -> Any:
    try:
        from mmengine.config import Config
    except ImportError as error:
        raise _missing(error) from None
    try:
        described = Config.fromfile(str(config))
    except Exception as error:  # the file is a program: anything can come out of it
        raise UserError(f"{config}: cannot be read as a config ({type(error).__name__}: {_first_line(error)})") from None
    if "model" not in described or not {"backbone", "data_preprocessor"} <= set(described.model):
        raise UserError(f"{config}: not a config of mmaction2 1.x (it has no model with a backbone and a data_preprocessor)")
    return described


def _build(config: str | Path, model: Any) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what mmcv-lite leaves out
            import mmaction.models  # noqa: F401  registers them
            from mmaction.registry import MODELS
            from mmengine.logging import MMLogger
            from mmengine.registry import DefaultScope
    except ImportError as error:
        raise _missing(error) from None
    MMLogger.get_current_instance().setLevel("WARNING")  # else a page about weights that are replaced here
    if model.get("test_cfg"):
        model.test_cfg.pop("max_testing_views", None)  # would insist on one clip at a time
    if model.backbone.get("pretrained"):
        model.backbone.pretrained = None  # some fetch and load it while they are built, only to be overwritten here
    try:
        with DefaultScope.overwrite_default_scope("mmaction"):
            return MODELS.build(model)
    except Exception as error:  # constructors of others: anything can come out of them
        raise UserError(f"{config}: its model cannot be built ({type(error).__name__}: {_first_line(error)})") from None


def _missing(error: ImportError) -> UserError:
    return UserError(f"a victim of mmaction2 needs it ({_first_line(error)}): pip install -e '.[mmaction2]'")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:120]


def _find_classes(weights: Path) -> list[str]:
    if weights.suffix == ".safetensors":
        classes = read_metadata(weights).get("classes")
    else:
        kept = read_checkpoint(weights)
        meta = kept.get("meta") if isinstance(kept, Mapping) else None
        meta = meta if isinstance(meta, Mapping) else {}
        about = meta.get("dataset_meta") or {}
        classes = about.get("classes") or meta.get("CLASSES")
    if classes:
        return [str(name) for name in classes]
    beside = weights.with_suffix(".classes.txt")
    if not beside.is_file():
        raise UserError(
            f"{weights}: does not say its classes; write {beside.name} beside it, a name per line in the order of the "
            f"logits, or the one word {' or '.join(KNOWN_CLASSES)}"
        )
    word = beside.read_text().strip()
    return read_classes(word if word in KNOWN_CLASSES else beside)


def _find_clip(described: Any) -> tuple[int | None, int | None]:
    """Number of frames and pixels a side in the validation pipeline; None for what it does not say."""
    loader = described.get("val_dataloader") or described.get("test_dataloader") or {}
    steps = described.get("val_pipeline") or (loader.get("dataset") or {}).get("pipeline") or []
    num_frames = size = None
    for step in steps:
        if "Sample" in step["type"] and "clip_len" in step:
            # A network on frames is trained on several samples of one frame, the others on one sample of several.
            num_frames = step["clip_len"] if step["clip_len"] > 1 else step.get("num_clips", 1)
        elif step["type"] in ("CenterCrop", "ThreeCrop", "TenCrop"):
            size = step["crop_size"] if isinstance(step["crop_size"], int) else step["crop_size"][0]
    return num_frames, size
