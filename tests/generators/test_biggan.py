"""BigGAN: the published architecture and files, truncation, and the demo's small one."""

import importlib
import sys
import types

import pytest
import torch
from torch import nn

from extraction.errors import UserError
from extraction.generators import biggan
from extraction.generators.biggan import PUBLISHED, BigGAN, Shape, create_demo_biggan, fold_spectral_norm, load_biggan

SMALL = Shape(16, 16, 10, ((True, 16, 8), (True, 8, 4), (True, 4, 2), (False, 2, 1)), attention=2)


def published_layout(net: BigGAN) -> dict[str, torch.Tensor]:
    """The state of `net` as the published files have it: every weight with spectral normalisation, of a random norm."""
    state = {}
    for name, value in net.state_dict().items():
        normalised = name.endswith("weight") and value.ndim > 1 and not name.startswith("embeddings")
        if not normalised:
            state[name] = value
            continue
        left, _, right = torch.linalg.svd(value.flatten(1), full_matrices=False)
        norm = torch.linalg.matrix_norm(value.flatten(1), 2)
        # 3 w is divided by u (3 w) v, which is 3: the file stands for w.
        state[f"{name}_orig"] = 3.0 * value
        state[f"{name}_u"], state[f"{name}_v"] = left[:, 0] / norm, right[0]
    return state


def random_net(shape: Shape, seed: int = 0) -> BigGAN:
    draw = torch.Generator().manual_seed(seed)
    net = BigGAN(shape)
    for name, value in net.state_dict().items():
        value.copy_(torch.randn(value.shape, generator=draw) * (0.3 if value.ndim < 2 else 1.0 / value[0].numel() ** 0.5))
        if name.endswith("running_vars"):
            value.copy_(torch.rand(value.shape, generator=draw) + 0.5)
        elif name.endswith("running_means"):
            value.mul_(0.1)
    return net


def test_the_published_architecture():
    with torch.device("meta"):
        state = BigGAN(PUBLISHED).state_dict()
    weights = {name: tuple(value.shape) for name, value in state.items()}
    assert weights["embeddings.weight"] == (128, 1000)
    assert weights["generator.gen_z.weight"] == (4 * 4 * 2048, 256)
    assert weights["generator.layers.0.bn_0.running_means"] == (51, 2048)
    assert weights["generator.layers.3.conv_3.weight"] == (1024, 512, 1, 1)
    assert weights["generator.layers.8.snconv1x1_theta.weight"] == (32, 256, 1, 1)
    assert weights["generator.layers.10.conv_3.weight"] == (128, 64, 1, 1)
    assert weights["generator.conv_to_rgb.weight"] == (128, 128, 3, 3)
    assert len({name.split(".")[2] for name in weights if ".layers." in name}) == 11


def test_spectral_norm_is_folded_as_pytorch_applies_it():
    torch.manual_seed(0)
    linear = nn.utils.spectral_norm(nn.Linear(6, 9), eps=1e-4)
    for _ in range(3):
        linear(torch.randn(4, 6))
    x, state = torch.randn(4, 6), {k: v.clone() for k, v in linear.eval().state_dict().items()}
    folded = fold_spectral_norm(state)
    assert set(folded) == {"weight", "bias"}
    torch.testing.assert_close(x @ folded["weight"].T + folded["bias"], linear(x))
    del state["weight_v"]  # one step of power iteration from u gives a v; u has converged here
    for _ in range(200):
        state["weight_u"] = nn.functional.normalize(state["weight_orig"] @ (state["weight_orig"].T @ state["weight_u"]), dim=0)
    norm = torch.linalg.matrix_norm(state["weight_orig"], 2)
    torch.testing.assert_close(fold_spectral_norm(state)["weight"], state["weight_orig"] / norm)


def test_published_files_are_loaded_strictly(tmp_path):
    net = random_net(SMALL)
    state = published_layout(net)
    noise, embedding = torch.randn(2, 3, SMALL.dim)
    torch.save(state, tmp_path / "net.bin")
    loaded = load_biggan(tmp_path / "net.bin", SMALL)
    torch.testing.assert_close(loaded(noise, embedding), net(noise, embedding), rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())

    torch.save({k: v for k, v in state.items() if not k.startswith("generator.layers.1.conv_1")}, tmp_path / "part.bin")
    with pytest.raises(
        UserError, match=r"part.bin: not the weights of BigGAN-deep: keys 2 missing \(generator.layers.1.conv_1"
    ):
        load_biggan(tmp_path / "part.bin", SMALL)
    torch.save(state | {"extra": torch.zeros(1)}, tmp_path / "more.bin")
    with pytest.raises(UserError, match=r"1 unknown \(extra\)"):
        load_biggan(tmp_path / "more.bin", SMALL)
    with pytest.raises(UserError, match="of another shape"):
        load_biggan(tmp_path / "net.bin", SMALL._replace(num_classes=11))
    (tmp_path / "cut.bin").write_bytes((tmp_path / "net.bin").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"cut.bin: not a readable weight file"):
        load_biggan(tmp_path / "cut.bin", SMALL)
    with pytest.raises(UserError, match=r"nowhere.bin not found: https://.*biggan-deep-128-pytorch_model.bin belongs there"):
        load_biggan(tmp_path / "nowhere.bin")
    with pytest.raises(UserError, match="truncation 0"):
        BigGAN(SMALL, truncation=0.0)


def test_truncation_picks_its_statistics_and_scales_the_noise():
    net, half = random_net(SMALL), BigGAN(SMALL, truncation=0.5)
    half.load_state_dict(net.state_dict())
    noise, embedding = torch.randn(2, 3, SMALL.dim)
    before = half(noise, embedding)
    for module in half.modules():
        if isinstance(module, biggan._Norm):
            module.running_means[:25], module.running_means[26:] = 9.0, 9.0  # the others are not looked at
    assert torch.equal(half(noise, embedding), before)
    for module in net.modules():
        if isinstance(module, biggan._Norm):
            module.running_means[50], module.running_vars[50] = module.running_means[25], module.running_vars[25]
    torch.testing.assert_close(net(0.5 * noise, embedding), before)


def test_equals_the_published_port(tmp_path, monkeypatch):
    theirs = import_port(monkeypatch)
    config = theirs["config"].BigGANConfig()
    config.z_dim, config.channel_width, config.num_classes = SMALL.dim, SMALL.width, SMALL.num_classes
    config.layers, config.attention_layer_position = [list(block) for block in SMALL.blocks], SMALL.attention
    torch.manual_seed(0)
    reference = theirs["model"].BigGAN(config)
    for name, value in [*reference.named_parameters(), *reference.named_buffers()]:
        if name.endswith("running_vars"):
            value.uniform_(20, 60)
        elif (value.ndim == 1 and not name.endswith(("_u", "_v"))) or name.endswith("running_means"):
            value.data.normal_(0, 0.1)
    labels = torch.eye(SMALL.num_classes)[[3, 7, 1]]
    for _ in range(5):  # spectral normalisation finds its vectors while training
        reference.train()(torch.randn(3, SMALL.dim), labels, 0.4)
    torch.save(reference.eval().state_dict(), tmp_path / "port.bin")
    noise = torch.randn(3, SMALL.dim)
    with torch.no_grad():
        wanted = reference(0.4 * noise, labels, 0.4)
    net = load_biggan(tmp_path / "port.bin", SMALL, truncation=0.4)
    got = 2 * net(noise, net.embeddings(labels)) - 1
    assert wanted.std() > 0.01
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def import_port(monkeypatch) -> dict:
    """pytorch-pretrained-biggan's modules; its downloader's imports, which are not needed, are stood in for."""
    for name in ("boto3", "requests", "botocore", "botocore.exceptions", "scipy", "scipy.stats"):
        try:
            importlib.import_module(name)
        except ImportError:
            module = types.ModuleType(name)
            module.ClientError, module.truncnorm = Exception, None
            monkeypatch.setitem(sys.modules, name, module)
    pytest.importorskip("pytorch_pretrained_biggan")
    return {name: importlib.import_module(f"pytorch_pretrained_biggan.{name}") for name in ("model", "config")}


def test_the_demos_generator_repeats_and_varies():
    noise, embedding = torch.randn(2, 6, 16)
    pictures = create_demo_biggan()(noise, embedding)
    assert pictures.shape == (6, 3, 32, 32)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    assert torch.equal(create_demo_biggan()(noise, embedding), pictures)
    assert not torch.equal(create_demo_biggan(1)(noise, embedding), pictures)
    assert pictures.std((1, 2, 3)).min() > 0.05
    apart = torch.cdist(pictures.flatten(1), pictures.flatten(1)) + 99 * torch.eye(6)
    assert apart.min() > 3
