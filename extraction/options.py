"""The options that scripts share: a name, a default, a range and a line of help each, written once.

A script's `Config` inherits them, restates those that its experiment sets, and adds its own, so that its first lines are the
constants of the experiment. Only fields are inherited: nothing here runs an experiment.
"""

import ast
import dataclasses
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from extraction.data.cache import ClipCache
from extraction.data.clips import ClipOptions, Cut
from extraction.data.images import Layer
from extraction.errors import UserError


class Range(NamedTuple):
    """The values that a number may take, both ends included."""

    least: float
    most: float = float("inf")


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Rate = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
FrameRate = Annotated[float, Range(0.01, 1000)]
EDITED = "edited in the script, not on the command line"
Layers = Annotated[tuple[Layer, ...], EDITED]
# What some options were called before.
_OLD_FLAGS = {
    "--own": "--in-domain",
    "--own-list": "--in-domain-list",
    "--unrelated": "--aux",
    "--step": "--clip-interval",
    "--smoothing": "--epsilon",
}


@dataclass(frozen=True, kw_only=True)
class ComputeOptions:
    """How networks are run."""

    batch_size: Count = 16
    """Clips in a batch, of all processes together."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto is a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 on a GPU, else fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto compiles on a GPU in a long run."""
    num_workers: Natural = 8
    """Data loader workers, one per core at most."""


@dataclass(frozen=True, kw_only=True)
class Options(ComputeOptions):
    """Every experiment: a student, the held-out videos that score it, and the run."""

    student: str
    """The student's network: an unknown name lists them."""
    student_weights: str | None = None
    """Weight file that the student starts from, all but its head; None: from scratch."""
    val: str
    """Held-out videos that score the student: labelled in class folders, or unlabelled in one folder (agreement alone)."""
    val_list: str | None = None
    """Use only the videos of --val that this list names."""
    val_unlabelled: bool = False
    """Take the class folders of --val for no labels: score by agreement with the victim alone."""
    val_clips: Count = 1
    """Clips of each held-out video, spread evenly; agreement is counted per clip, top-1 on their mean probabilities."""
    num_frames: Count
    """Frames of a clip."""
    stride: Count = 1
    """Temporal stride: a clip takes every n-th frame of a video."""
    fps: FrameRate | None = None
    """Frames a second that clips take, instead of --stride: every n-th frame, n by each video's own frame rate."""
    size: Count
    """Height and width of a clip, in pixels."""
    seed: int = 0
    """Random seed: data order, augmentation and initial weights follow from it."""
    checkpoint_seconds: float = 300.0
    """Seconds between checkpoints."""
    out_dir: str | None = None
    """The run's folder; by default runs/<script>, with --demo runs/<script>_demo."""
    clip_cache: str | None = None
    """Folder of decoded clips, which runs share; by default clip_cache beside the run's folder."""
    cache_gb: Rate = 20.0
    """Keep at most this many GB of decoded clips in --clip-cache, each set of clips wholly or not at all; 0: none."""
    demo: bool = False
    """Run on the built-in demo set and victims: minutes on two CPU cores, no download."""

    @property
    def shape(self) -> ClipOptions:
        """Frames, temporal stride and size of a clip, and where decoded ones are kept, as `Clips` takes them."""
        return ClipOptions(num_frames=self.num_frames, stride=self.stride, size=self.size, fps=self.fps, cache=self.cache)

    @property
    def cache(self) -> ClipCache | None:
        """Where decoded clips are kept: nowhere by a run of one epoch, which would not come back to them."""
        if getattr(self, "epochs", None) == 1:
            return None
        beside = Path(self.out_dir).parent if self.out_dir else Path("runs")
        return ClipCache(Path(self.clip_cache) if self.clip_cache else beside / "clip_cache", self.cache_gb)


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """How the many runs of a table are handed out."""

    jobs: Count = 1
    """Runs at a time on this machine, each with its share of the cores, and a GPU in turn if there are some."""
    cluster: str | None = None
    """Address of a Dask scheduler (tcp://HOST:8786) whose nodes run them instead, over a shared folder."""


@dataclass(frozen=True, kw_only=True)
class VictimFileOptions:
    """The files that a victim is opened from."""

    victim_weights: str | None = None
    """The victim's weight file; by default its usual place under weights/."""
    victim_classes: str | None = None
    """The victim's class names in the order of its logits: k400, k600 or a text file with one a line; by default its own."""
    victim_about: str | None = None
    """JSON file that says how a tflite: or onnx: victim takes clips; by default FILE.json beside it, if there."""


@dataclass(frozen=True, kw_only=True)
class ScoredVictimOptions(VictimFileOptions):
    """The victim that the student is compared with."""

    victim: str
    """The model under attack: an unknown name lists them; torchvision:NAME, tflite:FILE, onnx:FILE, FILE.py:FUNCTION too."""
    victim_record: str | None = None
    """File where the victim's owner keeps logits by clip, for sweeps: a known clip is a query, but is not computed again."""
    min_victim_top1: float | None = None
    """Least top-1 of the victim on --val, else no query is made; default 3 x chance; 0: off, as the check without labels is."""


@dataclass(frozen=True, kw_only=True)
class VictimOptions(ScoredVictimOptions):
    """The victim, and what it answers to queries."""

    answers: Literal["logits", "probs", "top5", "label"] = "probs"
    """What the victim returns for a clip."""
    decimals: Annotated[int, Range(0, 9)] | None = None
    """Round the victim's numbers to this many decimals."""
    defence: (
        Literal[
            "noise", "reverse_sigmoid", "mad", "mad_argmax", "modelguard_w", "modelguard_s", "misinformation", "dawn",
            "label", "lie", "nothing",
        ]
        | None
    ) = None  # fmt: skip
    """What the victim does to its answers against extraction (docs/defences.md); None: nothing."""
    defence_strength: Annotated[float, Range(1e-6, 2)] | None = None
    """What the defence may cost honest users: the mean L1 distance of its answers to --val from the true ones, up to 2."""
    defence_after: str | None = None
    """Answer truly until this detector's alarm: quota:N, prada, prada:W, near_duplicates, confidence; None: from the start."""
    wire: str | None = None
    """How clips reach the victim: float, uint8, or h264 or h264:CRF, encoded and decoded again; None: as floats."""
    query_budget: Natural | None = None
    """Answer at most this many clips; when the budget ends the run, the student is saved and scored."""
    ledger: str | None = None
    """File of cached answers, to share between runs; by default ledger.sqlite in the run's folder."""
    answers_from: tuple[str, ...] = ()
    """Ledgers of other runs, read in place: what they have answered is no query here."""


@dataclass(frozen=True, kw_only=True)
class InDomainOptions:
    """What the attacker has of the victim's own task."""

    in_domain: str
    """Videos of the victim's task, in class folders."""
    in_domain_list: str | None = None
    """Use only the videos of --in-domain that this list names."""


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """How a student is trained on the answers there are (docs/recipe.md): no query depends on it."""

    schedule: Literal["own", "one_cycle"] = "own"
    """own: the script's learning rates; one_cycle: a warm-up over 5 % of all batches, then down to nearly zero at the last."""
    ema: Annotated[float, Range(0, 0.99999)] | None = None
    """Average the weights with this decay a step, score them too and save student_ema.safetensors; None: no average."""
    student_crop: Annotated[float, Range(0, 0.9)] = 0.0
    """Show the student random crops of an answered view, a side up to this fraction shorter; 0: the view itself."""
    student_erase: Annotated[float, Range(0, 0.9)] = 0.0
    """Erase a box of up to this fraction of the frame from what the student is shown, the same in all frames."""
    mixup: Annotated[float, Range(0.01, 100)] | None = None
    """Show the student mixtures of two clips, shares drawn from Beta(a, a), with their answers mixed; None: single clips."""
    pace: Literal["auto", "overlap", "turns"] = "auto"
    """On a CPU: victim and student at once on a share of the threads, or in turns on all; auto tries some batches of each."""

    @property
    def recipe(self) -> dict[str, Any]:
        """What `Training` takes of it."""
        varied = dict(crop=self.student_crop, erase=self.student_erase, mixup=self.mixup)
        return dict(use_one_cycle=self.schedule == "one_cycle", ema=self.ema, pace=self.pace, **varied)


@dataclass(frozen=True, kw_only=True)
class FootageOptions:
    """How videos are cut and augmented, how often a student sees them, and its learning rates."""

    clip_interval: Count
    """Frames from the start of a clip to the start of the next."""
    num_clips: Count | None = None
    """Use this many of the clips, drawn at random, at most; with --views-per-clip that makes a bill of any size."""
    hflip: Fraction = 0.5
    """Probability of a horizontal flip."""
    brightness: Fraction = 0.1
    """Brightness jitter: a factor drawn from 1 - b to 1 + b."""
    rotation: Rate = 15.0
    """Random rotation, in degrees, either way at most."""
    epochs: Count
    """Passes over all clips."""
    head_lr: Rate
    """Learning rate of the student's classification head (AdamW)."""
    body_lr: Rate
    """Learning rate of the layers below the head; 0: they stay as they are."""
    allow_overlap: bool = False
    """Go on when videos that score the student are trained on too."""

    @property
    def cut(self) -> Cut:
        """How videos are cut into the clips that a student is trained on, as `Clips` takes it."""
        return Cut(clip_interval=self.clip_interval, num_clips=self.num_clips, seed=getattr(self, "seed", 0))


@dataclass(frozen=True, kw_only=True)
class VideoOptions(FootageOptions, RecipeOptions):
    """Videos, and how a student is trained on them."""


@dataclass(frozen=True, kw_only=True)
class TransferOptions:
    """What is sent beside the in-domain videos, and how often."""

    aux: tuple[str, ...] = ()
    """Unrelated videos: ucf101, hmdb51, moments_in_time, or any folders."""
    views_per_clip: Count | None = None
    """Cycle through this many views of a clip instead of a new one each epoch, which bounds the queries."""


@dataclass(frozen=True, kw_only=True)
class QueryOptions(TransferOptions):
    """What is sent, and how the answers are matched."""

    matching: Literal["kl", "logits"] = "kl"
    """kl: KL(victim || student); logits: squared differences of log-probabilities and logits, each about its mean."""
    temperature: Annotated[float, Range(0.1, 1000)] = 1.0
    """Soften the victim's answers and the student's by this temperature in the KL; labels are matched as they are."""


@dataclass(frozen=True, kw_only=True)
class ImageOptions(RecipeOptions):
    """Clips of moving pictures, and how a student is trained on them."""

    layers: Layers = (Layer(),)
    """How each picture of a clip moves, from the bottom to the top."""
    epochs: Count
    """Passes over all clips."""
    lr: Rate = 1e-3
    """Learning rate of the student (Adam, cosine)."""
    body_lr: Rate | None = None
    """That of the layers below its head; by default the same, 0: they stay as they are."""

    @property
    def rates(self) -> tuple[float, float]:
        """The learning rates of the head and of the layers below it."""
        return self.lr, self.lr if self.body_lr is None else self.body_lr


@dataclass(frozen=True, kw_only=True)
class DataFreeOptions:
    """An attack without data: a generator makes the clips."""

    iterations: Count
    """Iterations of the attack."""
    student_steps: Count
    """Student steps on fresh clips in an iteration."""
    replay_steps: Natural | None
    """Student steps on replayed clips in an iteration; they cost no query."""
    replay_clips: Count = 8192
    """Answered clips kept for replay, 3 * T * H * W bytes each."""
    student_crop: Annotated[float, Range(0, 0.9)] = 0.0
    """Replay random crops of kept clips, a side up to this fraction shorter; 0: the clips themselves."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """adam, or sgd with momentum 0.9 (as MAZE and DFME train students of small images)."""
    student_lr: Rate
    """Initial learning rate of the student."""
    weight_decay: Rate = 5e-4
    """Weight decay of all optimisers."""
    score_every: Count = 100_000
    """Queries between two scores of the student."""


@dataclass(frozen=True, kw_only=True)
class GeneratorOptions:
    """A generator that learns from answers alone, its gradient estimated by finite differences."""

    generator: Literal["dvdgan", "deconv", "layered", "dvdgan_small", "deconv_small"] = "dvdgan"
    """dvdgan: DVD-GAN-style; deconv: 3D deconvolutions; layered: a patch before a background; _small: fewer channels."""
    num_directions: Count | None
    """Random directions per gradient estimate (m)."""
    epsilon: Annotated[float, Range(1e-6)] = 1e-3
    """Finite-difference step, before the sigmoid: published for small images; 0.1 suffers less from float32 rounding."""
    generator_lr: Rate
    """Initial learning rate of the generator."""


# What the demos have in common; those that read videos; and those with in-domain videos among them.
DEMO: dict[str, Any] = dict(
    demo=True,
    student_weights=None,
    val="datasets/demo/val",
    num_frames=16,
    stride=1,
    size=48,
    num_workers=1,
    checkpoint_seconds=10.0,
)
VIDEO_DEMO = DEMO | dict(clip_interval=16, hflip=0.0, rotation=3.0)
IN_DOMAIN_DEMO = VIDEO_DEMO | dict(in_domain="datasets/demo/train_5per")


def check_options(config: Any) -> None:
    """Raise UserError for the first option of a dataclass that is out of its range, and for a list that is missing."""
    for name, hint in find_annotations(type(config)).items():
        value, flag = getattr(config, name), f"--{name.replace('_', '-')}"
        for bound in _find_ranges(hint):
            if value is not None and not bound.least <= value <= bound.most:  # NaN is in no range
                limit = f"at least {bound.least}" if not value >= bound.least else f"at most {bound.most}"
                raise UserError(f"{flag} {value}: it must be {limit}")
        choices = next((typing.get_args(part) for part in (hint, *typing.get_args(hint)) if _is_choice(part)), None)
        wrong = [v for v in (value if isinstance(value, tuple) else (value,)) if choices and v is not None and v not in choices]
        if wrong and choices:  # on the command line, tyro says so first
            raise UserError(f"{flag} {wrong[0]}: it must be one of {', '.join(map(str, choices))}")
        # HMDB51's folder of lists has a number after it, as in splits:2.
        if name.endswith("_list") and value is not None and not Path(re.sub(r":\d+$", "", value)).exists():
            raise UserError(f"list {value} not found: {flag} names the videos to use")


def to_flags(config: Any) -> list[str]:
    """The flags that give a script these constants, all of them, whatever its defaults are."""
    flags = []
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), field.name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            flags += [f"--{flag}", *map(str, value)]
        else:
            flags.append(f"--{flag}={value}")
    return flags


def find_annotations(config_class: type) -> dict[str, Any]:
    """The annotation of each option: that of the class which introduces it, whose range and aliases hold below it too."""
    hints: dict[str, Any] = {}
    for owner in reversed(config_class.__mro__):
        own = typing.get_type_hints(owner, include_extras=True) if dataclasses.is_dataclass(owner) else {}
        for name in inspect.get_annotations(owner):
            narrowed = any(_is_choice(part) for part in (own[name], *typing.get_args(own[name])))  # fewer choices than above
            hints[name] = own[name] if narrowed or name not in hints else hints[name]
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def _find_ranges(hint: Any) -> list[Range]:
    own = [extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Range)]
    return own + [bound for part in typing.get_args(hint) for bound in _find_ranges(part)]


def _is_choice(hint: Any) -> bool:
    return typing.get_origin(hint) is Literal


def find_help(config_class: type) -> dict[str, str]:
    """The line under each option, in the class or in the one it inherits from."""
    lines: dict[str, str] = {}
    for owner in reversed([base for base in config_class.__mro__ if dataclasses.is_dataclass(base)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                lines[field.target.id] = inspect.cleandoc(ast.literal_eval(below.value))
    return lines


def parse_options(config_class: type, default: Any, description: str, args: Sequence[str] | None = None) -> Any:
    """Read the command line into a `config_class`. `--help` shows the script's own constants first, then those it inherits."""
    hints, lines = find_annotations(config_class), find_help(config_class)
    groups: dict[str, type] = {}
    seen: set[str] = set()
    edited = {name for name, hint in hints.items() if EDITED in getattr(hint, "__metadata__", ())}
    for owner in config_class.__mro__:
        names = [name for name in inspect.get_annotations(owner) if name in hints and name not in seen | edited]
        seen.update(names)
        fields: list[tuple[str, Any, Any]] = [
            (name, Annotated[hints[name], tyro.conf.arg(help=lines.get(name, ""))], getattr(default, name)) for name in names
        ]
        if fields:
            title = "experiment" if owner is config_class else _name_group(owner)
            group = dataclasses.make_dataclass(title, fields, frozen=True, kw_only=True)
            group.__doc__ = "The constants of this script." if owner is config_class else owner.__doc__
            groups[title] = group
    parts: list[tuple[str, Any, Any]] = [
        (name, group, dataclasses.field(default_factory=group)) for name, group in groups.items()
    ]
    view = dataclasses.make_dataclass("View", parts, frozen=True)
    args = [re.sub(r"^--[\w-]+", _translate, arg) for arg in (sys.argv[1:] if args is None else args)]
    parsed: Any = tyro.cli(view, description=description, args=args, config=(tyro.conf.OmitArgPrefixes,))
    values = {name: value for group in groups for name, value in vars(getattr(parsed, group)).items()}
    return config_class(**values, **{name: getattr(default, name) for name in edited})


def _name_group(owner: type) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", owner.__name__.removesuffix("Options")).lower() or "run"


def _translate(flag: re.Match[str]) -> str:
    return _OLD_FLAGS.get(flag[0], flag[0])
