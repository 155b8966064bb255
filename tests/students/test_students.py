"""Students: the published layouts, fresh heads, parameter groups."""

import copy
import re

import pytest
import timm
import torch
import torchvision

from extraction.errors import UserError
from extraction.network.c3d import C3D
from extraction.network.r2plus1d import FlatConv3d, create_r2plus1d_34
from extraction.network.spec import split_windows
from extraction.students import create_student, load_student
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
    with pytest.raises(UserError, match="not the weights of r3d_18"):
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
    with pytest.raises(UserError, match="holds a r2plus1d_tiny, not a r3d_18"):
        load_student("r3d_18", tmp_path / "s.safetensors")


def test_windows_show_every_frame_and_the_logits_are_their_mean():
    numbers = torch.arange(20.0).view(1, 1, 20, 1, 1)
    windows = split_windows(numbers, 16).flatten(1)
    assert windows.tolist() == [list(range(16)), list(range(4, 20))]
    assert split_windows(torch.arange(32.0).view(1, 1, 32, 1, 1), 16).flatten().tolist() == list(range(32))
    assert split_windows(torch.arange(5.0).view(1, 1, 5, 1, 1), 10).shape == (1, 1, 10, 1, 1)
    torch.manual_seed(0)
    student = create_student("c3d_tiny", 12).eval()
    clips = torch.rand(2, 3, 16, 32, 32)
    halves = [student(clips[:, :, :8]), student(clips[:, :, 8:])]
    assert torch.allclose(student(clips), (halves[0] + halves[1]) / 2, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_demo", "resnet_demo"])
def test_frame_students_average_over_frames_whatever_their_order(name):
    torch.manual_seed(0)
    student = create_student(name, 12).eval()
    clips = torch.rand(2, 3, 6, 32, 32)
    triplets = [student(clips[:, :, t : t + 3]) for t in range(4)]
    assert torch.allclose(student(clips), sum(triplets) / 4, atol=1e-5)
    assert (student(clips) - student(clips.flip(2))).abs().max() > 1e-3  # three frames in a row do tell the direction


@pytest.mark.parametrize("layout", ["c3d-pytorch", "mmaction2"])
def test_c3d_takes_sports1m_weights_in_both_layouts(layout, tmp_path):
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in C3D(487).state_dict().items()}
    if layout == "mmaction2":  # its file has no head
        shapes = {key: shape for key, shape in shapes.items() if not key.startswith("fc8")}
        shapes = {re.sub(r"^conv([12])\.", r"conv\1a.", key): shape for key, shape in shapes.items()}
        shapes = {re.sub(r"^(conv\d[ab])\.", r"\1.conv.", key): shape for key, shape in shapes.items()}
    state = {key: torch.full((1,), 0.25).expand(shape) for key, shape in shapes.items()}
    torch.save({"state_dict": state}, tmp_path / "c3d.pth")
    student = create_student("c3d", 12, tmp_path / "c3d.pth")
    body = {key: value for key, value in student.net.state_dict().items() if not key.startswith("fc8")}
    assert all((value == 0.25).all() for value in body.values())
    assert student.head.weight.shape == (12, 4096)
    assert (student.head.weight != 0.25).all()


@pytest.mark.slow
def test_c3d_judges_32_frames_by_two_halves():
    torch.manual_seed(0)
    student = create_student("c3d", 12).eval()
    clips = torch.rand(1, 3, 32, 112, 112)
    halves = [student(clips[:, :, :16]), student(clips[:, :, 16:])]
    assert torch.allclose(student(clips), (halves[0] + halves[1]) / 2, atol=1e-5)


def test_imagenet_weights_load_in_the_layouts_they_are_published_in(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=1000)
    save_weights(tmp_path / "vit.safetensors", vit.state_dict(), {})
    student = create_student("vit_tiny", 12, tmp_path / "vit.safetensors")
    assert torch.equal(student.net.blocks[3].mlp.fc1.weight, vit.blocks[3].mlp.fc1.weight)
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "resnet.pth")
    assert create_student("resnet50", 12, tmp_path / "resnet.pth").head.out_features == 12


FLAT = [  # widths in and out, kernel, stride, padding
    (3, 45, (1, 7, 7), (1, 2, 2), (0, 3, 3)),
    (45, 64, (3, 1, 1), (1, 1, 1), (1, 0, 0)),
    (16, 21, (3, 1, 1), (2, 1, 1), (1, 0, 0)),
    (16, 32, (1, 1, 1), (1, 2, 2), (0, 0, 0)),
    (16, 16, (1, 3, 3), (1, 1, 1), (0, 1, 1)),
]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("layer", FLAT, ids=str)
def test_a_flat_convolution_is_the_same_convolution(layer, compiled):
    torch.manual_seed(0)
    conv = torch.nn.Conv3d(*layer, bias=False).double()
    conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last_3d)
    flat = copy.deepcopy(conv)
    flat.__class__ = FlatConv3d
    clips = torch.rand(2, layer[0], 5, 9, 8, dtype=torch.float64).contiguous(memory_format=torch.channels_last_3d)
    widths = []

    def convolve(x):
        y = flat.convolve_flat(x, flat.weight)
        widths.append(y.untyped_storage().nbytes() // (8 * y[:, 0].numel()))
        return y

    run = torch.compile(convolve, backend="eager") if compiled else convolve
    gradients = []
    for net, call in ((conv, conv), (flat, run)):
        x = clips.clone(memory_format=torch.preserve_format).requires_grad_()
        y = call(x)
        y.square().sum().backward()
        gradients.append((y.detach(), x.grad, net.weight.grad))
    for wanted, got in zip(*gradients, strict=True):
        assert torch.allclose(wanted, got, atol=1e-10)
    if not compiled:
        assert y.is_contiguous(memory_format=torch.channels_last_3d)  # no copy on the way to the next layer
    assert widths[-1] == (-(-layer[1] // 8) * 8 if compiled else layer[1])


@pytest.mark.parametrize("name", ["r2plus1d_34", "r2plus1d_18", "r2plus1d_tiny"])
def test_all_convolutions_of_a_2plus1d_network_are_flat(name):
    with torch.device("meta"):
        net = create_student(name, 12).net
    convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv3d)]
    others = [m for m in convolutions if not isinstance(m, FlatConv3d)]
    assert len(convolutions) > len(others)
    assert {(m.kernel_size, m.stride) for m in others} <= {((1, 1, 1), (2, 2, 2))}
