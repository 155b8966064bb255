"""Victims: frozen video classifiers behind a metered door that gives answers only.

`load_victim` opens the door an attacker gets. `load_model` is the evaluator's way in: the bare model, unmetered, for
scoring a victim against labels; no training code calls it.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from extraction.errors import BudgetExhausted, UserError
from extraction.network import VideoModel
from extraction.weights import fingerprint, load_strictly, read_metadata, read_state

ANSWERS = ("logits", "probs", "top5", "label")
_TOLERANCE = 1e-3  # beyond [0, 1]: rounding in half precision, not a wrong scale
_PACKAGE = Path(__file__).parent
_MOVINET_URL = "https://storage.googleapis.com/tf_model_garden/vision/movinet"
_TFHUB_URL = "https://tfhub.dev/tensorflow/movinet"
_SWIN_URL = "https://github.com/SwinTransformer/storage/releases/download/v1.0.4"


class VictimModel(nn.Module):
    """A victim's model with its preprocessing: float (B, 3, T, H, W) RGB in [0, 1] -> logits (B, num_classes).

    `classes` are the class names in the order of the logits, `fingerprint` says which weights these are. Raises UserError for
    clips outside [0, 1]: brightness from 0 to 255, or what was normalised already, would get answers that mean nothing.
    """

    def __init__(self, model: VideoModel, classes: list[str], name: str, fingerprint: str):
        super().__init__()
        self.model, self.classes, self.name, self.fingerprint = model, tuple(classes), name, fingerprint
        self.eval().requires_grad_(False)

    def forward(self, clips: Tensor) -> Tensor:
        extremes = torch.stack(clips.aminmax()) if len(clips) else clips.new_zeros(2)
        logits = self.model(clips)
        low, high = extremes.tolist()  # read after the model is launched, so that a GPU need not wait
        if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):  # NaN is refused too
            raise UserError(
                f"clips reach from {low:.4g} to {high:.4g}, a victim takes RGB in [0, 1]: divide 0..255 by 255, and leave "
                "normalising to the victim; nothing was billed"
            )
        return logits


def _kinetics400_classes() -> list[str]:
    from torchvision.models.video import Swin3D_T_Weights

    return list(Swin3D_T_Weights.KINETICS400_V1.meta["categories"])


def _kinetics600_classes() -> list[str]:
    """Alphabetical: the order of the published MoViNets, of their authors' label file and of I3D's Kinetics-600 models."""
    return (_PACKAGE / "k600_classes.txt").read_text().splitlines()


# The classes of published victims, in the order of their logits.
KNOWN_CLASSES: dict[str, Callable[[], list[str]]] = {"k400": _kinetics400_classes, "k600": _kinetics600_classes}


def _load_swin(architecture: str, weights: Path) -> tuple[VideoModel, list[str]]:
    from extraction.victims import swin  # here, because torchvision takes a second to import

    state = swin.to_torchvision_keys(read_state(weights))
    head = state.get("head.weight")
    classes = _kinetics400_classes()
    if head is not None and len(head) != len(classes):
        raise UserError(f"{weights}: the head has {len(head)} classes, {architecture}_k400 has {len(classes)}")
    net = swin.create_swin(architecture, len(classes))
    swin.load_state(net, state, weights, architecture)
    return VideoModel(swin.FusedSwin(net), 32, 224, swin.MEAN, swin.STD), classes


def create_network(architecture: str, num_classes: int, num_frames: int, size: int) -> VideoModel:
    """A victim's network with fresh weights and its preprocessing, for `train_victim.py` and for loading what it made.

    Raises UserError for an architecture that is not one of `swin.ARCHITECTURES` or movinet_demo.
    """
    from extraction.victims import movinet, swin

    if architecture == "movinet_demo":
        # The authors' regularisation and slow statistics are for long trainings; the demo's has a few hundred steps.
        net = movinet.MoViNet("demo", num_classes, dropout=0.0, stochastic_depth=0.0, norm_momentum=0.1)
        return VideoModel(net, num_frames, size)
    if architecture not in swin.ARCHITECTURES:
        raise UserError(f"no architecture is called {architecture!r}; there are {', '.join(swin.ARCHITECTURES)}, movinet_demo")
    return VideoModel(swin.create_swin(architecture, num_classes), num_frames, size, swin.MEAN, swin.STD)


def _load_trained(weights: Path) -> tuple[VideoModel, list[str]]:
    """A victim made by `train_victim.py`: its file says which architecture, classes and clip it has."""
    from extraction.victims import movinet, swin

    about = read_metadata(weights)
    if "classes" not in about or "architecture" not in about:
        raise UserError(f"{weights}: not a victim made by train_victim.py (no class names inside); pass --victim by its own name")
    model = create_network(about["architecture"], len(about["classes"]), about["num_frames"], about["size"])
    swin.load_state(model.net, read_state(weights), weights, about["architecture"])
    model.net = model.net.fuse() if isinstance(model.net, movinet.MoViNet) else swin.FusedSwin(model.net)
    return model, about["classes"]


def _load_movinet(model_id: str, size: int, weights: Path) -> tuple[VideoModel, list[str]]:
    from extraction.victims import movinet

    state, classes = movinet.load_movinet_state(weights, model_id), _kinetics600_classes()
    found = len(state["classifier.weight"])
    if found != len(classes):
        raise UserError(f"{weights}: the head has {found} classes, movinet_{model_id}_k600 has {len(classes)}")
    net = movinet.MoViNet(model_id, len(classes))
    net.load_state_dict(state)
    return VideoModel(net.fuse(), 50, size), classes


def _load_tfhub(size: int, weights: Path) -> tuple[VideoModel, list[str]]:
    from extraction.victims import tfhub

    classes = _kinetics600_classes()
    return VideoModel(tfhub.SavedModel(weights, len(classes)), 50, size), classes


def _load_torchvision(name: str, weights: Path) -> tuple[VideoModel, list[str]]:
    """One of torchvision's video models, with the normalisation and classes of its published weights."""
    from torchvision import models

    names = models.list_models(module=models.video)
    if name not in names:
        raise UserError(f"torchvision has no video model {name!r}; there are {', '.join(names)}")
    published = models.get_model_weights(name).DEFAULT
    shown, classes = published.transforms(), list(published.meta["categories"])
    net = models.get_model(name, weights=None, num_classes=len(classes))
    load_strictly(net, read_state(weights), weights, f"torchvision's {name}")
    # torchvision's documentation alone says how long the clips of the training were.
    num_frames = 128 if name == "s3d" else 32 if name.startswith("swin3d") else 16
    return VideoModel(net, num_frames, shown.crop_size[0], shown.mean, shown.std), classes


def _load_mmaction(config: str, weights: Path) -> tuple[VideoModel, list[str]]:
    from extraction.victims import mmaction

    return mmaction.load_recognizer(config, weights)


def _load_pytorchvideo(name: str, weights: Path) -> tuple[VideoModel, list[str]]:
    from extraction.victims import pytorchvideo

    return pytorchvideo.load_hub_model(name, weights)


def _published_swin(size: str) -> tuple[Callable, Path, str]:
    name = f"swin_{size}_patch244_window877_kinetics400_1k.pth"
    return lambda path: _load_swin(f"swin_{size[0]}", path), Path("weights") / name, f"{_SWIN_URL}/{name}"


# What the published MoViNets were trained on: 50 frames of so many pixels a side.
_MOVINETS = {"movinet_a0_k600": 172, "movinet_a1_k600": 172, "movinet_a2_k600": 224}


def _published_movinet(model_id: str, size: int) -> tuple[Callable, Path, str]:
    source = f"{_MOVINET_URL}/movinet_{model_id}_base.tar.gz (unpacked)"
    return partial(_load_movinet, model_id, size), Path("weights") / f"movinet_{model_id}_base", source


# name -> (loader of a weight file, its usual place, where it comes from)
VICTIMS: dict[str, tuple[Callable, Path | None, str]] = {
    "swin_t_k400": _published_swin("tiny"),
    "swin_s_k400": _published_swin("small"),
    "swin_b_k400": _published_swin("base"),
    **{name: _published_movinet(name[8:10], size) for name, size in _MOVINETS.items()},
    "movinet_a2_k600_tfhub": (
        partial(_load_tfhub, 224),
        Path("weights/movinet_a2_base_kinetics-600_classification_3"),
        f"{_TFHUB_URL}/a2/base/kinetics-600/classification/3 (unpacked)",
    ),
    "demo_swin": (_load_trained, _PACKAGE / "demo_swin.safetensors", "train_victim.py --demo"),
    "demo_movinet": (
        _load_trained,
        _PACKAGE / "demo_movinet.safetensors",
        "train_victim.py --demo --architecture movinet_demo",
    ),
    "trained": (_load_trained, None, "train_victim.py"),
}


# Families of victims, named `family:member` -> (loader of a member's weight file, where those come from)
FAMILIES: dict[str, tuple[Callable, str]] = {
    "torchvision": (_load_torchvision, "torchvision's weights of that model"),
    "mmaction2": (_load_mmaction, "the checkpoint that belongs to that config file"),
    "pytorchvideo": (_load_pytorchvideo, "pytorchvideo's model zoo, Kinetics-400"),
}


def _find_victim(name: str) -> tuple[Callable, Path | None, str]:
    family, _, member = name.partition(":")
    if member and family in FAMILIES:
        load, source = FAMILIES[family]
        return partial(load, member), None, source
    if name not in VICTIMS:
        known = [*VICTIMS, "torchvision:<name>", "mmaction2:<config file>", "pytorchvideo:<hub name>"]
        raise UserError(f"no victim is called {name!r}; there are {', '.join(known)}")
    return VICTIMS[name]


def find_weights(name: str, weights: str | Path | None = None) -> Path:
    """The weight file (or folder) of a victim: `weights`, or its usual place.

    Raises UserError when there is no victim of that name, or no file: the line says which path and where to get it.
    """
    _, usual, source = _find_victim(name)
    if name.endswith("_tfhub") and "://" in str(weights):
        from extraction.victims import tfhub

        return tfhub.download(str(weights))
    path = Path(weights) if weights else usual
    if path is None:
        raise UserError(f"victim {name!r} needs --victim-weights: a file from {source}")
    if not path.exists():
        instead = "" if name.startswith("demo_") else "; or try --demo"
        raise UserError(f"victim weights {path} not found: {name} from {source} belongs there{instead}")
    return path


def load_model(name: str, weights: str | Path | None = None, device: str | torch.device = "cpu") -> VictimModel:
    """The bare victim, for the evaluator alone: unmetered, in evaluation mode, without gradients."""
    path = find_weights(name, weights)
    model, classes = _find_victim(name)[0](path)
    mark = fingerprint(path)
    if ":" in name:  # here more than the weights makes the answers, and it can be edited
        shown = [model.num_frames, model.size, model.mean.flatten().tolist(), model.std.flatten().tolist()]
        mark += "-" + hashlib.blake2b(repr([classes, shown]).encode(), digest_size=4).hexdigest()
    return VictimModel(model, classes, name, mark).to(device)


_answerers: "WeakKeyDictionary[Victim, Callable[[Tensor], Tensor]]" = WeakKeyDictionary()


class Victim:
    """The door: `query(clips) -> answers` and the meter, nothing else. Made by `load_victim`.

    No attribute leads to the model: the door knows it through a table of this module, so that attack code cannot reach
    weights, features or gradients by accident.
    """

    __slots__ = ("__weakref__", "_num_queries", "answers", "classes", "decimals", "fingerprint", "name", "query_budget")

    def __init__(
        self,
        model: VictimModel,
        answers: str = "probs",
        query_budget: int | None = None,
        decimals: int | None = None,
        num_queries: int = 0,
    ):
        if answers not in ANSWERS:
            raise UserError(f"no answers are called {answers!r}; there are {', '.join(ANSWERS)}")
        if decimals is not None and not 0 <= decimals <= 9:
            raise UserError(f"--decimals {decimals}: it must be from 0 to 9")
        if query_budget is not None and query_budget < 0:
            raise UserError(f"query budget {query_budget}: it must be 0 or more")
        self.name, self.fingerprint, self.classes = model.name, model.fingerprint, model.classes
        self.answers, self.decimals = answers, decimals
        self.query_budget, self._num_queries = query_budget, num_queries
        _answerers[self] = model

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def num_queries(self) -> int:
        """Clips answered and billed so far."""
        return self._num_queries

    @property
    def queries_left(self) -> int | None:
        """Clips that the budget still allows; None without a budget."""
        return None if self.query_budget is None else self.query_budget - self._num_queries

    @torch.no_grad()
    def query(self, clips: Tensor) -> Tensor:
        """Answer float (B, 3, T, H, W) RGB clips in [0, 1] and bill B queries.

        Returns (B, num_classes) for `logits`, `probs` and `top5` (probabilities, all but the best five zero), and (B,)
        int64 for `label`. Raises BudgetExhausted, before anything is answered, when B is more than the budget has left.
        """
        if clips.ndim != 5 or clips.shape[1] != 3 or not clips.is_floating_point():
            raise ValueError(f"clips must be float (B, 3, T, H, W), not {clips.dtype} {tuple(clips.shape)}")
        if self.query_budget is not None and len(clips) > self.queries_left:
            raise BudgetExhausted(
                f"query budget exhausted: {self.num_queries} of {self.query_budget} queries spent, "
                f"{len(clips)} more asked for; raise --query-budget to go on"
            )
        answers = shape_answers(_answerers[self](clips), self.answers, self.decimals)
        self._num_queries += len(clips)
        return answers


def shape_answers(logits: Tensor, answers: str, decimals: int | None = None) -> Tensor:
    """What a surface shows of (B, num_classes) logits; see `Victim.query`. `decimals` rounds all but labels."""
    if answers == "label":
        return logits.argmax(1)
    shown = logits if answers == "logits" else logits.softmax(1)
    if answers == "top5":
        best = shown.topk(min(5, shown.shape[1]), dim=1)
        shown = torch.zeros_like(shown).scatter(1, best.indices, best.values)
    return shown if decimals is None else shown.round(decimals=decimals)


def load_victim(
    name: str,
    weights: str | Path | None = None,
    answers: str = "probs",
    query_budget: int | None = None,
    device: str | torch.device = "cpu",
    decimals: int | None = None,
    num_queries: int = 0,
) -> Victim:
    """Open a victim's door.

    `name` is one of `VICTIMS` or `family:member` of `FAMILIES`, `answers` the surface it shows (`logits`, `probs`,
    `top5`, `label`), `query_budget` the clips it will answer at most, `decimals` rounds what it shows, and `num_queries`
    is what an earlier life of the run has spent already. Raises UserError when the weights are missing or not this victim's.
    """
    return Victim(load_model(name, weights, device), answers, query_budget, decimals, num_queries)
