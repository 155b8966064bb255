"""What the tests share: a small demo set, drawn once, and one thread, so that they run alike everywhere."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the scripts that tests start: a worker a core

from pathlib import Path

import pytest
import torch

from extraction.data.demo import write_demo_set


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_set(tmp_path_factory) -> Path:
    """The demo set's folders with a handful of 16-frame videos of 64x64 per class."""
    splits = {"train_5per": 3, "val": 2, "unrelated_a": 3, "unrelated_b": 2}
    return write_demo_set(tmp_path_factory.mktemp("demo"), splits, processes=1)


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=3, help="how often the fault harness kills each script")
    parser.addoption("--whole-demo", action="store_true", help="the fault harness runs the scripts' whole --demo")
    parser.addoption("--mutations", type=int, default=200, help="how many damaged videos the decoder is fed")


def pytest_collection_modifyitems(items: list) -> None:
    """The file that takes longest goes first: at the end one core would wait for it."""
    items.sort(key=lambda item: "test_distributed" not in item.nodeid)
