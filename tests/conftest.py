"""What the tests share: a small demo set, drawn once, and one thread, so that they run alike everywhere."""

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the scripts that tests start: a worker a core
# For them too: this checkout's package, whichever one the environment has.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))

import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch

from extraction.data.demo import write_demo_set, write_video
from extraction.errors import UserError


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_set(tmp_path_factory) -> Path:
    """The demo set's folders with a handful of 16-frame videos of 64x64 per class."""
    splits = {"train_5per": 3, "val": 2, "unrelated_a": 3, "unrelated_b": 2}
    return write_demo_set(tmp_path_factory.mktemp("demo"), splits, processes=1)


@pytest.fixture(scope="session")
def error_line() -> Callable[..., str]:
    """`error_line(function, *args, **options)`: the one line of the UserError that the call raises."""

    def find_line(function: Callable, *args, **options) -> str:
        with pytest.raises(UserError) as caught:
            function(*args, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return find_line


@pytest.fixture(scope="session")
def random_clips() -> Callable[..., torch.Tensor]:
    """`random_clips(2, 3, 16, 48, 48)`: clips in [0, 1], the same ones each time."""
    return lambda *shape: torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def write_counting_video() -> Callable[..., Path]:
    """`write_counting_video(path, num_frames, width, height)`: frame k is grey, as bright as 4 k."""

    def write(path: Path, num_frames: int = 60, width: int = 64, height: int = 48) -> Path:
        write_video(path, np.stack([np.full((height, width, 3), 4 * k, np.uint8) for k in range(num_frames)]))
        return path

    return write


@pytest.fixture(scope="session")
def rotate_video() -> Callable[[Path, Path], None]:
    """`rotate_video(path, source)`: a copy of an mp4 with its track's display matrix turned by 90 degrees, as phones do."""

    def rotate(path: Path, source: Path) -> None:
        content = bytearray(source.read_bytes())
        at = content.index(b"tkhd") + 4 + 40  # bytes 40 to 76 of the box's body
        content[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 64 << 16, 0, 1 << 30)
        path.write_bytes(content)

    return rotate


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=3, help="how often the fault harness kills each script")
    parser.addoption("--whole-demo", action="store_true", help="the fault harness runs the scripts' whole --demo")
    parser.addoption("--mutations", type=int, default=200, help="how many damaged videos the decoder is fed")


def pytest_collection_modifyitems(items: list) -> None:
    """The files that take longest go first: at the end one core would wait for them."""
    longest = ("test_chaos", "test_distributed", "test_faults", "test_grey_box")
    items.sort(key=lambda item: next((place for place, name in enumerate(longest) if name in item.nodeid), len(longest)))
