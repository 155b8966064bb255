"""Clips out of still images: every picture of a clip is moved along its own smooth random path, on the device.

A clip has one picture that fills the frame and, with more layers, cut-out patches of other pictures that move over it.
Its path is deterministic in the view's key, so that a view can be shown again, and every frame of it differs.
"""

import copy
import hashlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from extraction.data.cache import ClipCache, Source, open_cache
from extraction.data.decoding import Broken
from extraction.data.demo import locked
from extraction.data.folders import require_folder
from extraction.errors import UserError
from extraction.weights import fingerprint

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}
NUM_DRAWS = 20  # numbers in 0..1 that say how one layer moves


class Layer(NamedTuple):
    """How far one layer of a clip may move; 2022's constants are the defaults."""

    translation: float = 0.1  # of the frame's width, to either side
    rotation: float = 15.0  # degrees, to either side
    shear: float = 10.0  # degrees, to either side
    scale: float = 1.2  # largest magnification (and the inverse of the smallest)
    periods: float = 3.0  # most there-and-backs within a clip
    moving: float = 1.0  # share of these four motions that a clip has at once; none: translation alone
    radius: float = 0.0  # of the patch that is cut out, in frame widths; 0: the whole picture


class Motion(NamedTuple):
    """What a clip out of images is: its length, and its layers from the bottom to the top."""

    num_frames: int
    layers: tuple[Layer, ...] = (Layer(),)

    def __repr__(self) -> str:  # part of the keys under which ledgers keep answers: it stays, whatever the class is called
        return f"Paths(num_frames={self.num_frames}, layers={self.layers})"


# The demo's clips: a background that hardly moves, and a patch that does.
DEMO_LAYERS = (Layer(0.03, 1.0, 0.0, 1.02), Layer(0.35, 160.0, 10.0, 2.0, periods=4.0, moving=0.35, radius=0.17))


class ImageRef(NamedTuple):
    """A clip to be made: the unit that is asked about and answered."""

    path: Path  # of the bottom picture
    pictures: tuple[int, ...]  # one number for each layer, into `Images.files`
    key: str  # names the pictures' content
    label: int = -1


class Images(Dataset):
    """Pictures for clips out of any tree of images: `num_clips` clips of `num_layers` pictures each, `size` x `size` pixels.

    The bottom pictures go through all images, in an order drawn from `seed`, before one comes again (None: each once);
    those on top are drawn from `seed` too. `broken` lists the images that were left out, each with its reason. Raises UserError
    for a missing folder and for one without a readable image.
    """

    def __init__(
        self, root: str | Path, num_clips: int | None, num_layers: int, size: int, seed: int = 0, cache: ClipCache | None = None
    ):
        root = require_folder(root, "a tree of unrelated images")
        paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
        self.size, self.broken, self.files = size, [], []
        with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
            found = tqdm(pool.map(_look_at, paths), total=len(paths), desc="looking at images", leave=False, dynamic_ncols=True)
            for path, (mark, reason) in zip(paths, found, strict=True):
                if reason:
                    self.broken.append((path, reason))
                else:
                    self.files.append((path, mark))
        if not self.files:
            why = f" ({self.broken[0][0].name}: {self.broken[0][1]})" if self.broken else ""
            raise UserError(f"{root}: no readable image in it{why}; put images there (jpg, png, ...)")
        sources = [Source(f"{mark}:{size}", [path]) for path, mark in self.files]
        self.cache, self.kept = cache, open_cache(cache, sources, (size, size, 3))
        draw = np.random.default_rng(seed)
        self.refs: list[ImageRef] = []
        while len(self.refs) < (num_clips or len(self.files)):
            for bottom in draw.permutation(len(self.files)).tolist():
                pictures = (bottom, *draw.integers(len(self.files), size=num_layers - 1).tolist())
                self.refs.append(self.ref(pictures, f":{len(self.refs)}"))  # the same pictures may meet again
        self.refs = self.refs[: num_clips or len(self.files)]

    def ref(self, pictures: tuple[int, ...], name: str = "") -> ImageRef:
        """The clip of these pictures; `name` tells clips of the same pictures apart."""
        marks = "+".join(self.files[k][1] for k in pictures)
        return ImageRef(self.files[pictures[0]][0], pictures, f"{marks}:{self.size}{name}")

    def of(self, refs: Sequence[ImageRef]) -> "Images":
        """Other clips of the same images."""
        other = copy.copy(self)
        other.refs, other.broken = list(refs), []
        return other

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray | Broken]:
        """The pictures as uint8 (num_layers, H, W, 3), or the first file among them that can't be read."""
        pictures = []
        for k in self.refs[index].pictures:
            try:
                pictures.append(self._read(k))
            except _UNREADABLE as error:
                return index, Broken(self.files[k][0], _reason(error))
        return index, np.stack(pictures)

    def _read(self, number: int) -> np.ndarray:
        read = partial(read_image, self.files[number][0], self.size)
        return self.kept.get(number, read) if self.kept else read()


# What PIL raises for files that are damaged, not images, or too large to be meant.
_UNREADABLE = (
    OSError, ValueError, SyntaxError, TypeError, IndexError, KeyError, EOFError, MemoryError, Image.DecompressionBombError,
)  # fmt: skip


def _reason(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return "not an image" if "cannot identify" in line else getattr(error, "strerror", None) or line or type(error).__name__


def _look_at(path: Path) -> tuple[str, str]:
    """The mark of an image's content and "", or "" and the reason why it cannot be read."""
    try:
        with Image.open(path) as image:
            if min(image.size) < 1:
                return "", "no pixels"
        return fingerprint(path), ""
    except _UNREADABLE as error:
        return "", _reason(error)


def read_image(path: str | Path, size: int) -> np.ndarray:
    """Read an image as uint8 (size, size, 3) RGB: short side scaled to `size`, the centre cut out. Raises what PIL does."""
    with Image.open(path) as file:
        file.draft("RGB", (2 * size, 2 * size))  # a JPEG can be decoded smaller, which is quicker
        image = file.convert("RGB")
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


# --- paths -----------------------------------------------------------------------------------------------------------


def draw_uniform(keys: Sequence[bytes], count: int) -> np.ndarray:
    """(B, count) float64 in 0..1, each row deterministic in its key."""
    seeds = [int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "little") for key in keys]
    raw = np.stack([np.random.PCG64(seed).random_raw(count) for seed in seeds])
    return (raw >> np.uint64(11)).astype(np.float64) / 2.0**53


def create_clips(pictures: Tensor, keys: Sequence[bytes], motion: Motion) -> Tensor:
    """Turn uint8 (B, L, H, W, 3) pictures into the clips that `keys` name: float (B, 3, T, H, W) in [0, 1], same device."""
    draws = torch.from_numpy(draw_uniform(keys, NUM_DRAWS * len(motion.layers)))
    return move_pictures(pictures.permute(0, 1, 4, 2, 3).float().div_(255.0), draws, motion)


def move_pictures(pictures: Tensor, draws: Tensor, motion: Motion) -> Tensor:
    """Move float (B, L, 3, H, W) pictures in [0, 1] along the paths that `draws` (B, L * NUM_DRAWS) in 0..1 describe.

    Returns float (B, 3, T, H, W) in [0, 1]. What a path uncovers is filled by reflection, so that no corner is black.
    """
    batch, _, _, height, width = pictures.shape
    draws = draws.to(torch.float64).view(batch, len(motion.layers), NUM_DRAWS).to(pictures.device, non_blocking=True)
    clips = pictures.new_zeros(())
    for number, layer in enumerate(motion.layers):
        draw = draws[:, number].unbind(1)
        matrix = _poses(draw, layer, motion.num_frames).float()  # (B, T, 2, 3): from the frame to the picture
        flat = [batch * motion.num_frames, 3, height, width]
        # One tall grid a clip: all frames are sampled from one picture, without a copy of it for each frame.
        grid = F.affine_grid(matrix.flatten(0, 1), flat, align_corners=False).view(batch, -1, width, 2)
        shown = F.grid_sample(pictures[:, number], grid, "bilinear", "reflection", align_corners=False)
        shown = shown.view(batch, 3, motion.num_frames, height, width)
        if not layer.radius:
            clips = shown
            continue
        cover = _cut_out(grid, draw, layer, width).view(batch, 1, motion.num_frames, height, width)
        clips = shown * cover + (1.0 - cover) * clips
    return clips.clamp_(0.0, 1.0)


def _poses(draw: Sequence[Tensor], layer: Layer, num_frames: int) -> Tensor:
    """The inverse affine matrices (B, T, 2, 3) of one layer, in the units of `affine_grid`: the frame is -1..1.

    Three families: a straight way from one affine to another, swinging there and back, and going round.
    """
    (family, direction, reach, phase, speed, sense, *rest) = (value[:, None] for value in draw[:17])
    moves, (turn, zoom, slant, x, y, tilt, near) = rest[:4], rest[4:]
    time = torch.linspace(0.0, 1.0, num_frames, dtype=torch.float64, device=family.device)[None]
    angle = 2 * math.pi * (phase + 0.5 * (2 * layer.periods) ** speed * time)  # 0.5 to `periods` periods
    straight, round_ = family < 1 / 3, family >= 2 / 3
    drift = 2 * time - 1
    # The drift keeps a swing from showing the same frame twice.
    along = torch.where(straight, drift, angle.sin() + 0.05 * drift)
    across = torch.where(round_, torch.where(sense < 0.5, -1.0, 1.0) * angle.cos(), torch.zeros_like(angle))

    on = [(value < layer.moving).double() for value in moves]
    on[0] = torch.maximum(on[0], 1.0 - torch.stack(on).amax(0))
    reach = 2 * layer.translation * (0.4 + 0.6 * reach) * on[0]
    cos, sin = (2 * math.pi * direction).cos(), (2 * math.pi * direction).sin()
    spread = 0.3 if layer.radius else 0.0
    shift_x = spread * (2 * x - 1) + reach * (along * cos - across * sin)
    shift_y = spread * (2 * y - 1) + reach * (along * sin + across * cos)
    turned = math.radians(layer.rotation) * _signed(turn) * along * on[1] + (2 * math.pi * tilt if layer.radius else 0.0)
    scale = layer.scale ** (_signed(zoom) * along * on[2] + (0.3 * (2 * near - 1) if layer.radius else 0.0))
    slant = math.radians(layer.shear) * _signed(slant) * along * on[3]

    cos, sin, slant = turned.cos() / scale, turned.sin() / scale, slant.tan()
    a, b, c, d = cos - slant * sin, sin + slant * cos, -sin, cos  # shear after rotation, of the frame relative to the patch
    return torch.stack(
        [
            torch.stack([a, b, -(a * shift_x + b * shift_y)], 2),
            torch.stack([c, d, -(c * shift_x + d * shift_y)], 2),
        ],
        2,
    )


def _signed(value: Tensor) -> Tensor:
    """0..1 to -1..-0.4 and 0.4..1: a motion that is there is seen."""
    value = 2 * value - 1
    return torch.where(value < 0, -1.0, 1.0) * (0.4 + 0.6 * value.abs())


def _cut_out(grid: Tensor, draw: Sequence[Tensor], layer: Layer, width: int) -> Tensor:
    """How much of a patch covers each place of (B, N, W, 2) picture coordinates: a superellipse with a soft edge."""
    size, aspect, power = (value.float()[:, None, None] for value in draw[17:20])
    radius = 2 * layer.radius * (0.7 + 0.6 * size)
    stretch = 2.0 ** (aspect - 0.5)
    power = 2.0 + 6.0 * power
    x, y = grid.abs().unbind(-1)
    distance = ((x / (radius * stretch)) ** power + (y * stretch / radius) ** power) ** (1 / power)
    return ((1.0 - distance) * radius * width / 2 + 0.5).clamp_(0.0, 1.0)


# --- the demo's images -----------------------------------------------------------------------------------------------


def write_demo_images(root: str | Path = "datasets/demo/images", num_images: int = 300, size: int = 96, seed: int = 0) -> Path:
    """Write textured images that have nothing to do with the demo set's sprites below `root`, unless they are there.

    The same arguments give the same pictures. Returns `root`.
    """
    root = Path(root)
    stamp, wanted = root / ".images", f"1 {num_images} {size} {seed}"
    with locked(root):
        if stamp.exists() and stamp.read_text() == wanted:
            return root
        for number in range(num_images):
            Image.fromarray(draw_texture(np.random.default_rng([seed, number]), size)).save(root / f"{number:04d}.png")
        stamp.write_text(wanted)
    return root


def draw_texture(draw: np.random.Generator, size: int) -> np.ndarray:
    """One picture, uint8 (size, size, 3): clouds, cells, waves or strokes in a few colours."""
    y, x = np.mgrid[0:size, 0:size] / size
    kind = draw.integers(4)
    if kind == 0:  # clouds
        field = _clouds(draw, 3, size) + _clouds(draw, 7, size) / 2 + _clouds(draw, 15, size) / 3
    elif kind == 1:  # cells around random points
        points = draw.random((int(draw.integers(8, 40)), 2))
        distances = np.sort(np.hypot(x[..., None] - points[:, 0], y[..., None] - points[:, 1]), axis=2)
        field = distances[..., 1] - distances[..., 0] if draw.random() < 0.5 else distances[..., 0]
    elif kind == 2:  # waves that cross
        waves = [(draw.normal(0, 14, 2), draw.random() * 6.3) for _ in range(4)]
        field = sum(np.sin(a * x + b * y + phase + 2 * _clouds(draw, 3, size)) for (a, b), phase in waves)
    else:  # strokes, one over the other
        field = _clouds(draw, 3, size)
        for _ in range(int(draw.integers(6, 20))):
            (a, b), (u, v), length, thick = draw.random(2), draw.normal(size=2), draw.uniform(0.1, 0.5), draw.uniform(0.02, 0.1)
            u, v = u / np.hypot(u, v), v / np.hypot(u, v)
            along, across = (x - a) * u + (y - b) * v, (x - a) * v - (y - b) * u
            bend = draw.normal(0, 1.5)
            field = np.where((abs(along) < length) & (abs(across - bend * along**2) < thick), draw.random(), field)
    field = (field - field.min()) / max(np.ptp(field), 1e-9)
    colours = draw.integers(0, 256, (int(draw.integers(3, 6)), 3))
    stops = np.linspace(0, 1, len(colours))
    picture = np.stack([np.interp(field, stops, colours[:, channel]) for channel in range(3)], 2)
    picture += draw.normal(0, draw.uniform(0, 10), picture.shape)
    return np.clip(picture, 0, 255).astype(np.uint8)


def _clouds(draw: np.random.Generator, cells: int, size: int) -> np.ndarray:
    """(size, size) in 0..1: a coarse random grid, smoothly enlarged."""
    grid = draw.random((cells + 1, cells + 1))
    position = np.arange(size) * cells / size
    at, part = position.astype(int), position % 1
    part = part * part * (3 - 2 * part)
    rows = grid[at] * (1 - part)[:, None] + grid[at + 1] * part[:, None]
    return rows[:, at] * (1 - part) + rows[:, at + 1] * part
