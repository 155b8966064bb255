"""Students: the published layouts, fresh heads, parameter groups."""

import pytest
import torch

from extraction.errors import Stop
from extraction.students import create_student, load_student
from extraction.students.r2plus1d import create_r2plus1d_34
from extraction.weights import save_weights


def test_r2plus1d_34_has_the_release_s_shapes():
    net = create_r2plus1d_34(359)
    assert sum(parameter.numel() for parameter in net.parameters()) == 63_676_142
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    assert shapes["layer2.0.conv2.0.0.weight"] == (288, 128, 1, 3, 3)  # where it leaves torchvision's rule
    assert shapes["layer2.0.conv1.0.0.weight"] == (230, 64, 1, 3, 3)
    assert shapes["layer4.0.conv2.0.0.weight"] == (1152, 512, 1, 3, 3)
    assert {m.eps for m in net.modules() if isinstance(m, torch.nn.BatchNorm3d)} == {1e-3}


def test_a_head_of_another_task_is_replaced_and_the_body_kept(tmp_path):
    released = create_student("r2plus1d_tiny", 359)
    torch.save(released.net.state_dict(), tmp_path / "released.pth")
    student = create_student("r2plus1d_tiny", 12, tmp_path / "released.pth")
    assert student.head.weight.shape == (12, 64)
    assert torch.equal(student.net.stages[0].weight, released.net.stages[0].weight)
    same_task = create_student("r2plus1d_tiny", 359, tmp_path / "released.pth")
    assert not torch.equal(same_task.head.weight, released.head.weight)  # an attacker never starts with a trained head
    with pytest.raises(Stop, match="not the weights of r3d_18"):
        create_student("r3d_18", 12, tmp_path / "released.pth")


def test_head_and_body_are_separate_groups():
    student = create_student("r2plus1d_tiny", 12)
    head, body = student.parameter_groups(3e-5, 3e-6)
    assert (head["lr"], body["lr"]) == (3e-5, 3e-6)
    assert {id(p) for p in head["params"]} == {id(student.net.fc.weight), id(student.net.fc.bias)}
    assert len(head["params"]) + len(body["params"]) == len(list(student.parameters()))


@pytest.mark.parametrize("name", ["r2plus1d_18", "r3d_18", "r2plus1d_tiny"])
def test_any_clip_fits(name):
    student = create_student(name, 7).eval()
    with torch.no_grad():
        assert student(torch.rand(1, 3, 8, 60, 60)).shape == (1, 7)


def test_a_saved_student_comes_back_whole(tmp_path):
    student = create_student("r2plus1d_tiny", 12).eval()
    save_weights(tmp_path / "s.safetensors", student.net.state_dict(), {"student": "r2plus1d_tiny", "classes": ["a"] * 12})
    loaded, about = load_student("r2plus1d_tiny", tmp_path / "s.safetensors")
    clips = torch.rand(2, 3, 16, 48, 48)
    with torch.no_grad():
        assert torch.equal(loaded(clips), student(clips))
    assert len(about["classes"]) == 12
    with pytest.raises(Stop, match="holds a r2plus1d_tiny, not a r3d_18"):
        load_student("r3d_18", tmp_path / "s.safetensors")
