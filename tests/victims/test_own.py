"""Victims of one's own: a function in a Python file, and a module handed over from Python."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from extraction.network import VideoModel
from extraction.victims import zoo
from extraction.victims.zoo import add_victim, load_victim

FILE = '''
import torch
from torch import nn


class Net(nn.Module):
    """Means of the colours, times a matrix."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.head = nn.Linear(3, num_classes)
        nn.init.constant_(self.head.bias, 0.0)
        self.head.weight.data.copy_(torch.arange(3.0 * num_classes).view(num_classes, 3))

    def forward(self, clips):
        return self.head(clips.mean((2, 3, 4)))


def create():
    return Net(), ["run", "walk", "jump"], dict(frames=4, size=8, mean=0.5, std=(0.1, 0.2, 0.4))


def bare():
    return Net(), ("run", "walk", "jump")


def loaded(weights, num_classes=2):
    net = Net(num_classes)
    net.load_state_dict(torch.load(weights))
    return net, ["run", "walk"], dict(scale=255, mean=[100, 110, 120], std=50)


def optional(weights=None):
    return Net(), ["run", "walk", "jump"], {}


def nothing():
    pass


def two_classes():
    return Net(), ["run", "walk"]


def misspelt():
    return Net(), ["run", "walk", "jump"], dict(frame=4)


def sad():
    raise RuntimeError("no luck\\nat all")


def no_logits():
    return nn.Flatten(), ["run", "walk"], dict(frames=2, size=4)


def does_not_fit():
    return nn.Conv2d(3, 3, 3), ["run", "walk"]


def quits():
    raise SystemExit(3)
'''


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "my_model.py"
    path.write_text(FILE)
    return path


def expect(clips: torch.Tensor, num_classes: int = 3) -> torch.Tensor:
    return clips.mean((2, 3, 4)) @ torch.arange(3.0 * num_classes).view(num_classes, 3).T


def test_a_function_of_a_file_makes_the_victim(file, random_clips):
    clips = random_clips(2, 3, 4, 8, 8)
    victim = load_victim(f"{file}:create", answers="logits", query_budget=3)
    std = torch.tensor([0.1, 0.2, 0.4]).view(3, 1, 1, 1)
    torch.testing.assert_close(victim.query(clips), expect((clips - 0.5) / std))
    assert (victim.classes, victim.num_queries, victim.queries_left) == (("run", "walk", "jump"), 2, 1)
    model = zoo.load_model(f"{file}:create").model
    assert (model.num_frames, model.size) == (4, 8)
    torch.testing.assert_close(load_victim(f"{file}:bare", answers="logits").query(clips), expect(clips))


def test_weights_are_passed_to_a_function_that_takes_them(file, random_clips, tmp_path, load_error):
    weights, clips = tmp_path / "weights.pth", random_clips(1, 3, 4, 8, 8)
    state = {"head.weight": torch.arange(6.0).view(2, 3), "head.bias": torch.ones(2)}
    torch.save(state, weights)
    victim = load_victim(f"{file}:loaded", weights, answers="logits")
    mean = torch.tensor([100.0, 110, 120]).view(3, 1, 1, 1)
    torch.testing.assert_close(victim.query(clips), expect((clips * 255 - mean) / 50, 2) + 1)
    assert load_victim(f"{file}:optional").num_classes == 3
    assert "takes an argument; pass --victim-weights" in load_error(f"{file}:loaded")
    assert "takes no argument; leave --victim-weights away" in load_error(f"{file}:create", weights)
    assert "nowhere.pth not found" in load_error(f"{file}:loaded", "nowhere.pth")


def test_the_fingerprint_is_of_code_weights_and_classes(file, tmp_path):
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    name = f"{file}:create"
    marks = [load_victim(name).fingerprint, load_victim(name, classes=tmp_path / "names.txt").fingerprint]
    assert load_victim(name).fingerprint == marks[0]
    file.write_text(FILE.replace("arange(3.0 *", "arange(1.0, 1 + 3.0 *"))
    marks.append(load_victim(name).fingerprint)
    file.write_text(FILE.replace("clips.mean(", "-clips.mean("))
    marks.append(load_victim(name).fingerprint)
    assert len(set(marks)) == 4


def test_a_file_may_import_what_lies_beside_it(file, tmp_path):
    (tmp_path / "my_layers_beside.py").write_text("names = ['left', 'right', 'up']\n")
    file.write_text(FILE + "\n\ndef create():\n    import my_layers_beside\n    return Net(), my_layers_beside.names\n")
    assert load_victim(f"{file}:create").classes == ("left", "right", "up")


@pytest.mark.parametrize(
    ("function", "line"),
    [
        ("absent", "has no function 'absent'"),
        ("nothing", "nothing: returned 'None'; it must return its module, its class names and its clip"),
        ("two_classes", "has 3 outputs, but 2 class names are given"),
        ("misspelt", "says 'frame'; it may say frames, size, scale, mean, std"),
        ("sad", "sad: failed in line 50 (RuntimeError: no luck)"),
        ("no_logits", "has 96 outputs, but 2 class names"),
        ("does_not_fit", "does_not_fit: failed (RuntimeError: "),
        ("quits", "quits: failed in line 62 (SystemExit: 3)"),
    ],
)
def test_what_goes_wrong_in_the_file_is_one_line(file, load_error, function, line):
    assert line in load_error(f"{file}:{function}")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("def create(:\n", "failed in line 1 (SyntaxError: "),
        ("x = 1\nimport nowhere_at_all\n", "failed in line 2 (ModuleNotFoundError: No module named 'nowhere_at_all')"),
        ("x = '\0'", "(SyntaxError: source code string cannot contain null bytes"),
    ],
)
def test_a_file_that_cannot_be_run_is_one_line(file, load_error, content, line):
    file.write_text(content)
    assert line in load_error(f"{file}:create")


def test_a_file_that_is_not_there_is_one_line(tmp_path, load_error):
    assert "nowhere.py: not found" in load_error(f"{tmp_path / 'nowhere.py'}:create")
    assert "<file>.py:<function>" in load_error("create")


# --- from Python -------------------------------------------------------------------------------------------------------


@pytest.fixture
def free_name() -> Callable:
    yield "mine"
    zoo.VICTIMS.pop("mine", None)


def create_net(num_classes: int = 12) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(24, num_classes))


def test_a_module_is_a_victim_by_a_name_and_stays_as_it_is(free_name, random_clips, load_error):
    net, clips = create_net(2).train(), random_clips(2, 3, 4, 8, 8)
    add_victim(free_name, net, ["run", "walk"], frames=4, size=8, mean=0.5, std=0.5)
    victim = load_victim(free_name, answers="logits")
    torch.testing.assert_close(victim.query(clips), net((clips - 0.5) / 0.5).detach())
    assert net.training
    assert all(weight.requires_grad for weight in net.parameters())
    marks = [victim.fingerprint, load_victim(free_name).fingerprint]
    assert marks[0] == marks[1]
    with torch.no_grad():
        net[2].bias += 1  # not the victim's
    torch.testing.assert_close(load_victim(free_name, answers="logits").query(clips), victim.query(clips))
    add_victim(free_name, net, ["run", "walk"], frames=4, size=8, mean=0.5, std=0.5)
    assert load_victim(free_name).fingerprint != marks[0]
    add_victim(free_name, VideoModel(net, 4, 8), ["run", "walk"])
    torch.testing.assert_close(load_victim(free_name, answers="logits").query(clips), net(clips).detach())
    assert "takes no weight file; leave --victim-weights away" in load_error(free_name, "w.pth")


def test_a_module_that_does_not_fit_is_one_line(free_name, error_line):
    assert "victim 'mine': has 12 outputs, but 2 class names" in error_line(add_victim, "mine", create_net(), ["a", "b"])
    assert "cannot answer a clip (RuntimeError" in error_line(add_victim, "mine", nn.Conv2d(3, 3, 3), ["a", "b"])
    assert "says 'fps'; it may say frames" in error_line(add_victim, "mine", create_net(), ["a"] * 12, fps=3)
    assert "cannot be called 'demo_swin'" in error_line(add_victim, "demo_swin", create_net(), ["a", "b"])
    assert free_name not in zoo.VICTIMS
