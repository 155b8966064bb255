"""The embedded demo set: small action videos, drawn from a seed, that no single frame gives away.

Every action class comes with its time-reversed or otherwise-timed twin (left and right, clockwise and anticlockwise,
growing and shrinking, slow and quick), over varied sprites, backgrounds, camera shake and noise. Two further sets,
with other sprites and other motions, stand in for the unrelated public video of the grey-box setting.

All drawing is integer arithmetic on values rounded from the standard library's `math`, so that a seed gives the same
pixels on every machine. Videos are then written as ordinary H.264 mp4 files in class folders.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from tqdm import tqdm

from extraction.data.decoding import EXACT_COLOURS

VERSION = 1  # part of the folder's stamp, and of what is drawn: raise it when the pictures change
ENCODING = 2  # of the stamp alone: raise it when the same pictures are encoded in another way
FPS = 16
Pose = tuple[float, float, float, float]  # x, y (in frame widths, from the centre), angle (turns), scale
Motion = Callable[[random.Random], Callable[[float], Pose]]


def _wave(u: float) -> float:
    return math.sin(2 * math.pi * u)


def _straight(turn: float) -> Motion:
    """Cross the frame in the direction `turn` (0 right, 0.25 down)."""

    def create(rng: random.Random):
        length, x, y = rng.uniform(0.45, 0.75), rng.uniform(-0.12, 0.12), rng.uniform(-0.12, 0.12)
        cos, sin, tilt = _wave(turn + 0.25), _wave(turn), rng.random()
        return lambda u: (x + cos * length * (u - 0.5), y + sin * length * (u - 0.5), tilt, 1.0)

    return create


def _spin(direction: int) -> Motion:
    def create(rng: random.Random):
        x, y, start, turns = rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2), rng.random(), rng.uniform(0.5, 0.9)
        return lambda u: (x, y, start + direction * turns * u, 1.15)

    return create


def _zoom(direction: int) -> Motion:
    def create(rng: random.Random):
        x, y, reach, tilt = rng.uniform(-0.15, 0.15), rng.uniform(-0.15, 0.15), rng.uniform(1.0, 1.5), rng.random()
        return lambda u: (x, y, tilt, 2.0 ** (direction * reach * (u - 0.5)))

    return create


def _circle(direction: int) -> Motion:
    def create(rng: random.Random):
        x, y, start, turns = rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.1), rng.random(), rng.uniform(0.8, 1.2)
        radius, tilt = rng.uniform(0.17, 0.24), rng.random()

        def pose(u: float) -> Pose:
            angle = start + direction * turns * u
            return x + radius * _wave(angle + 0.25), y + radius * _wave(angle), tilt, 1.0

        return pose

    return create


def _shake(periods: float) -> Motion:
    def create(rng: random.Random):
        x, y, phase, turn = rng.uniform(-0.15, 0.15), rng.uniform(-0.15, 0.15), rng.random(), rng.random()
        reach, count = rng.uniform(0.13, 0.18), periods * rng.uniform(0.9, 1.1)
        cos, sin, tilt = _wave(turn + 0.25), _wave(turn), rng.random()

        def pose(u: float) -> Pose:
            swing = reach * _wave(phase + count * u)
            return x + cos * swing, y + sin * swing, tilt, 1.0

        return pose

    return create


def _path(x=None, y=None, angle=None, scale=None) -> Motion:
    """A motion from up to four functions of (time in 0..1, three random numbers in 0..1)."""

    def create(rng: random.Random):
        r = (rng.random(), rng.random(), rng.random())
        at = (rng.uniform(-0.12, 0.12), rng.uniform(-0.12, 0.12), rng.random())
        return lambda u: (
            at[0] + (x(u, r) if x else 0.0),
            at[1] + (y(u, r) if y else 0.0),
            at[2] + (angle(u, r) if angle else 0.0),
            scale(u, r) if scale else 1.0,
        )

    return create


ACTIONS: dict[str, Motion] = {
    "moving left": _straight(0.5),
    "moving right": _straight(0.0),
    "moving up": _straight(0.75),
    "moving down": _straight(0.25),
    "spinning clockwise": _spin(1),
    "spinning anticlockwise": _spin(-1),
    "growing": _zoom(1),
    "shrinking": _zoom(-1),
    "circling clockwise": _circle(1),
    "circling anticlockwise": _circle(-1),
    "shaking slowly": _shake(1.0),
    "shaking quickly": _shake(3.0),
}


def _side(r: float) -> int:
    return 1 if r < 0.5 else -1


# Stand-ins for UCF101 and HMDB51: other motions than the actions above, which share their elements.
UNRELATED_A: dict[str, Motion] = {
    "diagonal dash": _path(lambda u, r: 0.6 * _side(r[0]) * (u - 0.5), lambda u, r: 0.6 * _side(r[1]) * (u - 0.5)),
    "rolling": _path(lambda u, r: 0.6 * _side(r[0]) * (u - 0.5), None, lambda u, r: 0.8 * _side(r[0]) * u),
    "climbing and swelling": _path(
        None, lambda u, r: 0.5 * _side(r[0]) * (u - 0.5), None, lambda u, r: 2.0 ** (1.2 * _side(r[1]) * (u - 0.5))
    ),
    "pendulum": _path(
        lambda u, r: 0.22 * _wave(r[0] + (0.5 + r[1]) * u), None, lambda u, r: 0.08 * _wave(r[0] + (0.5 + r[1]) * u)
    ),
    "long arc": _path(
        lambda u, r: 0.3 * _wave(r[0] + 0.4 * _side(r[1]) * u), lambda u, r: 0.3 * _wave(r[0] + 0.25 + 0.4 * _side(r[1]) * u)
    ),
    "turning and shrinking": _path(
        None, None, lambda u, r: (0.4 + 0.4 * r[2]) * _side(r[0]) * u, lambda u, r: 2.0 ** (1.2 * _side(r[1]) * (u - 0.5))
    ),
    "bouncing": _path(
        lambda u, r: 0.5 * _side(r[0]) * (u - 0.5), lambda u, r: 0.15 - 0.3 * abs(_wave(r[1] + (0.5 + r[2]) * u))
    ),
    "zigzag": _path(lambda u, r: 0.6 * _side(r[0]) * (u - 0.5), lambda u, r: 0.12 * _wave(r[1] + (1 + 2 * r[2]) * u)),
}
UNRELATED_B: dict[str, Motion] = {
    "slanting glide": _path(
        lambda u, r: 0.6 * _wave(0.08 + 0.09 * r[0] + 0.25 * int(4 * r[1])) * (u - 0.5),
        lambda u, r: 0.6 * _wave(0.33 + 0.09 * r[0] + 0.25 * int(4 * r[1])) * (u - 0.5),
    ),
    "somersault": _path(None, lambda u, r: 0.5 * _side(r[0]) * (u - 0.5), lambda u, r: (0.4 + 0.4 * r[2]) * _side(r[1]) * u),
    "rushing past": _path(
        lambda u, r: 0.5 * _side(r[0]) * (u - 0.5), None, None, lambda u, r: 2.0 ** (1.2 * _side(r[1]) * (u - 0.5))
    ),
    "spiral": _path(
        lambda u, r: 0.3 * (u if r[2] < 0.5 else 1 - u) * _wave(r[0] + 1.3 * _side(r[1]) * u),
        lambda u, r: 0.3 * (u if r[2] < 0.5 else 1 - u) * _wave(r[0] + 0.75 + 1.3 * _side(r[1]) * u),
    ),
    "oval lap": _path(
        lambda u, r: 0.28 * _wave(r[0] + (0.7 + 0.5 * r[2]) * _side(r[1]) * u),
        lambda u, r: 0.12 * _wave(r[0] + 0.25 + (0.7 + 0.5 * r[2]) * _side(r[1]) * u),
    ),
    "trembling": _path(
        lambda u, r: 0.12 * _wave(r[0] + (1 + 2.5 * r[2]) * u), lambda u, r: 0.12 * _wave(r[1] + (1 + 2.5 * r[2]) * u)
    ),
    "wobbling": _path(None, None, lambda u, r: 0.15 * _wave(r[0] + (0.7 + 2 * r[1]) * u)),
    "turning back": _path(lambda u, r: 0.9 * _side(r[0]) * abs(u - 0.3 - 0.4 * r[2]), lambda u, r: 0.3 * (r[1] - 0.5) * u),
}

# Shapes as tests on integer coordinates in -128..128 (sprite space); the unrelated sets use others.
SHAPES = {
    "square": lambda x, y: (abs(x) < 100) & (abs(y) < 100),
    "disc": lambda x, y: x * x + y * y < 118 * 118,
    "triangle": lambda x, y: (y < 90) & (2 * abs(x) < y + 125),
    "cross": lambda x, y: ((abs(x) < 42) | (abs(y) < 42)) & (abs(x) < 120) & (abs(y) < 120),
    "bar": lambda x, y: (abs(x) < 120) & (abs(y) < 60),
    "ell": lambda x, y: (abs(x) < 105) & (abs(y) < 105) & ((x < -20) | (y > 20)),
    "half disc": lambda x, y: (x * x + y * y < 122 * 122) & (y > -30),
}
UNRELATED_SHAPES = {
    "ring": lambda x, y: (x * x + y * y < 120 * 120) & (x * x + y * y > 55 * 55),
    "diamond": lambda x, y: abs(x) + abs(y) < 124,
    "arrow": lambda x, y: ((abs(y) < 40) & (abs(x) < 110)) | ((x > 0) & (abs(y) < 115 - x)),
    "bow": lambda x, y: (abs(y) < abs(x) + 12) & (abs(x) < 112),
    "ess": lambda x, y: ((abs(x - 30) < 75) & (abs(y + 50) < 48)) | ((abs(x + 30) < 75) & (abs(y - 50) < 48)),
    "hexagon": lambda x, y: (abs(y) < 100) & (2 * abs(x) + abs(y) < 220),
}


def _colour(rng: random.Random, low: int = 0, high: int = 255) -> np.ndarray:
    return np.array([rng.randint(low, high) for _ in range(3)], np.int32)


def _smooth_field(noise: np.random.PCG64, cells: int, size: int) -> np.ndarray:
    """(size, size) int32 in 0..255: a coarse random grid, bilinearly enlarged in integers."""
    grid = (noise.random_raw((cells + 1) ** 2) >> np.uint64(56)).astype(np.int32).reshape(cells + 1, cells + 1)
    position = np.arange(size, dtype=np.int32) * (cells * 256) // size
    at, part = position >> 8, position & 255
    rows = (grid[at] * (256 - part)[:, None] + grid[at + 1] * part[:, None]) >> 8
    return (rows[:, at] * (256 - part) + rows[:, at + 1] * part) >> 8


def _background(rng: random.Random, noise: np.random.PCG64, size: int) -> np.ndarray:
    """(size, size, 3) int32 in 0..255: blotches, stripes or checks between two muted colours."""
    y, x = np.mgrid[0:size, 0:size].astype(np.int32)
    pattern = rng.randrange(4)
    if pattern < 2:
        blend = (2 * _smooth_field(noise, 3, size) + _smooth_field(noise, rng.randint(6, 10), size)) // 3
    else:
        a, b, width = rng.randint(-4, 4), rng.randint(1, 4), max(2, size * rng.randint(8, 20) // 100)
        band = ((a * x + b * y) // (4 * width)) & 1
        if pattern == 3:
            band ^= ((b * x - a * y) // (4 * width)) & 1
        blend = 60 + 120 * band + _smooth_field(noise, 4, size) // 4
    first, second = _colour(rng, 20, 200), _colour(rng, 60, 235)
    return (first * (255 - blend)[..., None] + second * blend[..., None]) // 255


def _sprite(rng: random.Random, shapes: dict) -> tuple[np.ndarray, np.ndarray]:
    """A 64x64 picture (int32 RGB) and its mask (int32, 0 or 256). The paint is lopsided, so that a turn shows."""
    y, x = (8 * np.mgrid[-16:16, -16:16] + 4).astype(np.int32)
    mask = np.where(rng.choice(sorted(shapes.items()))[1](x, y), 256, 0).astype(np.int32)
    bright, dark = _colour(rng, 130, 255), _colour(rng, 0, 110)
    a, b, offset = rng.randint(-3, 3), rng.randint(1, 3), rng.randint(-60, 60)
    paint = rng.randrange(3)
    if paint == 0:
        choose = a * x + b * y > offset
    elif paint == 1:
        choose = (((a * x + b * y) // 130) & 1) == 0
    else:
        choose = (x - offset) ** 2 + (y - 30) ** 2 > 70 * 70
    picture = np.where(choose[..., None], bright, dark)
    picture[(y > 60) & (x > 0) & (x + y < 150)] = _colour(rng)
    return picture.astype(np.int32), mask


def _draw_sprite(frames: np.ndarray, picture: np.ndarray, mask: np.ndarray, poses: list[Pose], radius: float) -> None:
    """Blend the sprite into (T, H, W, 3) int32 frames, in place, by inverse mapping in 16.16 fixed point."""
    size = frames.shape[1]
    half = len(mask) // 2
    for frame, (px, py, angle, scale) in zip(frames, poses, strict=True):
        reach = radius * scale
        cx, cy = round((0.5 + px) * size * 256), round((0.5 + py) * size * 256)
        step = half / (reach * size)
        cos, sin = round(step * _wave(angle + 0.25) * 65536), round(step * _wave(angle) * 65536)
        around = math.ceil(1.5 * reach * size) + 2
        x0, x1 = max(0, (cx >> 8) - around), min(size, (cx >> 8) + around)
        y0, y1 = max(0, (cy >> 8) - around), min(size, (cy >> 8) + around)
        if x0 >= x1 or y0 >= y1:
            continue
        dx = (np.arange(x0, x1, dtype=np.int64) * 256 + 128 - cx)[None, :]
        dy = (np.arange(y0, y1, dtype=np.int64) * 256 + 128 - cy)[:, None]
        u = ((cos * dx + sin * dy) >> 16) + (half << 8) - 128
        v = ((cos * dy - sin * dx) >> 16) + (half << 8) - 128
        ui, vi, uf, vf = u >> 8, v >> 8, u & 255, v & 255
        cover = np.zeros(u.shape, np.int64)
        paint = np.zeros((*u.shape, 3), np.int64)
        for du, dv, weight in (
            (0, 0, (256 - uf) * (256 - vf)),
            (1, 0, uf * (256 - vf)),
            (0, 1, (256 - uf) * vf),
            (1, 1, uf * vf),
        ):
            uu, vv = ui + du, vi + dv
            inside = (uu >= 0) & (uu < len(mask)) & (vv >= 0) & (vv < len(mask))
            uu, vv = uu * inside, vv * inside
            share = weight * mask[vv, uu] * inside
            cover += share
            paint += share[..., None] * picture[vv, uu]
        patch = frame[y0:y1, x0:x1]
        patch[...] = (paint + ((256 << 16) - cover)[..., None] * patch) >> 24


def create_clip(
    motions: list[Motion], shapes: dict, seed: int | str, num_frames: int = 16, size: int = 64, scenes: int = 1
) -> np.ndarray:
    """Draw one clip: `motions` in sprites on a shaken, noisy background.

    With several `scenes`, of equal length, sprites and background stay, and each scene draws the motions anew. Returns uint8
    (num_frames, size, size, 3). The same arguments give the same bytes on every machine.
    """
    digest = hashlib.blake2b(str(seed).encode(), digest_size=16).digest()
    rng = random.Random(int.from_bytes(digest[:8], "little"))
    noise = np.random.PCG64(int.from_bytes(digest[8:], "little"))
    margin = max(2, size // 16)
    background = _background(rng, noise, size + 2 * margin)
    # A hand-held camera: a bounded random walk, the same for sprites and background.
    shake, camera = rng.randint(0, max(1, size // 48)), [(0, 0)]
    for _ in range(num_frames - 1):
        last = camera[-1]
        x, y = (max(-margin, min(margin, c + rng.randint(-shake, shake))) for c in last)
        camera.append((x, y))
    frames = np.stack([background[margin + y : margin + y + size, margin + x : margin + x + size] for x, y in camera]).astype(
        np.int32
    )
    for motion in motions:
        radius = rng.uniform(0.13, 0.2) if len(motions) == 1 else rng.uniform(0.1, 0.15)
        picture, mask = _sprite(rng, shapes)
        moves, length = [motion(rng) for _ in range(scenes)], num_frames // scenes
        poses = []
        for t, (x, y) in enumerate(camera):
            scene = min(t // length, scenes - 1)
            px, py, angle, scale = moves[scene]((t - scene * length) / max(1, length - 1))
            poses.append((px - x / size, py - y / size, angle, scale))
        _draw_sprite(frames, picture, mask, poses, radius)
    strength = rng.randint(0, 12)
    grain = (noise.random_raw(frames.size // 8 + 1).view(np.uint8)[: frames.size] & 31).astype(np.int32) - 16
    frames += (grain.reshape(frames.shape) * strength) >> 4
    gain = rng.randint(200, 300)
    return np.clip((frames * gain) >> 8, 0, 255).astype(np.uint8)


def list_classes(num_classes: int = 12) -> dict[str, list[Motion]]:
    """The first `num_classes` action classes: one moving sprite, then pairs, then triples (1884 in all)."""
    names = list(ACTIONS)
    classes = {name: [ACTIONS[name]] for name in names}
    for count in (2, 3):
        for code in range(len(names) ** count):
            if len(classes) >= num_classes:
                break
            picks = [names[code // len(names) ** k % len(names)] for k in range(count)]
            classes[" then ".join(picks)] = [ACTIONS[name] for name in picks]
    if not 2 <= num_classes <= len(classes):
        raise ValueError(f"the demo set has 2 to 1884 classes, not {num_classes}")
    return dict(list(classes.items())[:num_classes])


def write_video(path: Path, frames: np.ndarray, fps: int = FPS, crf: int = 16) -> None:
    """Write uint8 (T, H, W, 3) frames, even height and width, as an H.264 mp4: the same frames give the same bytes.

    Atomic: a partial file has another name.
    """
    partial_path, converter = path.with_suffix(".partial.mp4"), VideoReformatter()
    # Without assembly: with it x264 reads beyond its buffers, and small videos differ by what lay there.
    options = {"crf": str(crf), "preset": "veryfast", "x264-params": "asm=0"}
    height, width = frames.shape[1:3]
    with av.open(str(partial_path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.thread_count = 1  # with several threads x264 may split a frame differently
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture = converter.reformat(picture, width, height, "yuv420p", interpolation=EXACT_COLOURS, threads=1)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    partial_path.replace(path)


def _any_action(rng: random.Random) -> Callable[[float], Pose]:
    return rng.choice(list(ACTIONS.values()))(rng)


def _write_one(job: tuple[Path, str, str, int], num_classes: int, seed: int, num_frames: int, size: int) -> None:
    path, split, name, index = job
    sets = {"unrelated_a": (UNRELATED_A, UNRELATED_SHAPES), "unrelated_b": (UNRELATED_B, UNRELATED_SHAPES), "cameras": CAMERAS}
    if split in sets:
        motions, shapes = [sets[split][0][name]], sets[split][1]
    else:
        motions, shapes = list_classes(num_classes)[name], SHAPES
    scenes = max(1, num_frames // SCENE) if split in TRAFFIC_SPLITS else 1
    write_video(path, create_clip(motions, shapes, f"{VERSION}/{seed}/{split}/{name}/{index}", num_frames, size, scenes))


# Videos per class of each split that an attack needs. `train` is the victim's own training set, which no attacker sees.
ATTACK_SPLITS = {"train_5per": 20, "val": 20, "unrelated_a": 150, "unrelated_b": 150}
# What honest users send: videos per class of `traffic`, longer than a clip, and cameras that stay where they are, with their
# frames. Every `SCENE` frames the action begins anew; before a camera it is another one.
TRAFFIC_SPLITS = {"traffic": (20, 64), "cameras": (12, 800)}
SCENE = 16
CAMERAS: tuple[dict[str, Motion], dict] = ({"camera": _any_action}, SHAPES)


def write_traffic(
    root: str | Path, splits: dict[str, tuple[int, int]] | None = None, processes: int | None = None
) -> list[Path]:
    """Write the videos of honest users below `root`, unless they are there. Returns their folders.

    `splits` maps a split of `TRAFFIC_SPLITS` to its number of videos per class and their number of frames.
    """
    splits = splits or TRAFFIC_SPLITS
    for split, (count, num_frames) in splits.items():
        write_demo_set(root, {split: count}, num_frames=num_frames, processes=processes)
    return [Path(root) / split for split in splits]


def write_demo_set(
    root: str | Path,
    splits: dict[str, int] | None = None,
    num_classes: int = 12,
    num_frames: int = 16,
    size: int = 64,
    seed: int = 0,
    processes: int | None = None,
) -> Path:
    """Write the demo set below `root` as `root/split/class/*.mp4`, unless it is there already, and return `root`.

    `splits` maps a split to its number of videos per class. `processes` draw, by default one a core; 1: this one alone. A stamp
    per split makes a second call, or a call after an interrupted one, write only what is missing.
    """
    root, splits = Path(root), splits or ATTACK_SPLITS
    with locked(root):
        _write_splits(root, splits, num_classes, num_frames, size, seed, processes)
    return root


@contextlib.contextmanager
def locked(root: Path):
    """Make a folder, and have it alone: of two scripts that want to draw, the second waits, and finds it drawn."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write_splits(
    root: Path, splits: dict[str, int], num_classes: int, num_frames: int, size: int, seed: int, processes: int | None
) -> None:
    # A process that is started imports PyTorch, which takes longer than drawing a few videos.
    pool = None if processes == 1 else ProcessPoolExecutor(processes or os.cpu_count(), mp_context=get_context("spawn"))
    with pool or contextlib.nullcontext():
        for split, count in splits.items():
            folder, stamp = root / split, root / f".{split}.json"
            wanted = json.dumps([VERSION, ENCODING, count, num_classes, num_frames, size, seed])
            if stamp.exists() and stamp.read_text() == wanted:
                continue
            shutil.rmtree(folder, ignore_errors=True)
            others = {"unrelated_a": UNRELATED_A, "unrelated_b": UNRELATED_B, "cameras": CAMERAS[0]}
            names = others.get(split) or list_classes(num_classes)
            jobs = [(folder / name / f"{i:05d}.mp4", split, name, i) for name in names for i in range(count)]
            for name in names:
                (folder / name).mkdir(parents=True)
            write = partial(_write_one, num_classes=num_classes, seed=seed, num_frames=num_frames, size=size)
            done = map(write, jobs) if pool is None else pool.map(write, jobs, chunksize=16)
            for _ in tqdm(done, total=len(jobs), desc=f"drawing demo {split}", unit="video", dynamic_ncols=True):
                pass
            stamp.write_text(wanted)
