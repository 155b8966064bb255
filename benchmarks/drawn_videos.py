"""Videos to decode in benchmarks, drawn so that they cost what camera footage costs."""

from pathlib import Path

import numpy as np

from extraction.data.demo import write_video


def draw_videos(folder: Path, width: int, height: int, count: int = 4, num_frames: int = 300) -> None:
    """A camera that pans over a blotchy plane, with discs moving before it. x264's ordinary 250 frames between key frames."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        rng = np.random.default_rng(number)
        octaves = [rng.random((-(-2 * height // s), -(-2 * width // s), 3)).repeat(s, 0).repeat(s, 1) for s in (4, 16, 64)]
        plane = (85 * sum(octave[: 2 * height, : 2 * width] for octave in octaves)).astype(np.uint8)
        y, x = np.mgrid[:height, :width]
        frames = np.empty((num_frames, height, width, 3), np.uint8)
        for t, frame in enumerate(frames):
            top, left = (int(side * (0.5 + 0.45 * np.sin(t / 50 + number + side))) for side in (height, width))
            frame[:] = plane[top : top + height, left : left + width]
            for k in range(4):
                cy, cx = height * (0.5 + 0.3 * np.sin(t / 15 + k)), width * (0.5 + 0.3 * np.cos(t / 20 + 2 * k))
                frame[(y - cy) ** 2 + (x - cx) ** 2 < (height / 10) ** 2] = (60 * k, 255 - 50 * k, 128)
        write_video(folder / f"{number}.mp4", frames, fps=30, crf=23)
