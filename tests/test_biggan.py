"""The frozen generator, its weight files, and the search for embeddings that a victim names."""

import importlib
import json
import sys
import types

import numpy as np
import pytest
import torch
from extraction.biggan import PUBLISHED, BigGAN, Shape, create_demo_biggan, fold_spectral_norm, load_biggan
from extraction.embeddings import Codes, Sampling, code_size, find_codes, sample_clips
from torch import nn

from black_box import biggan_with_movinet, biggan_with_swin
from extraction import biggan, ledger
from extraction.data.images import Layer, Motion
from extraction.errors import BudgetExhausted, UserError
from extraction.weights import save_weights

SMALL = Shape(16, 16, 10, ((True, 16, 8), (True, 8, 4), (True, 4, 2), (False, 2, 1)), attention=2)
KEYS = [bytes([k]) * 16 for k in range(12)]
PATHS = Motion(8, (Layer(),))


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


# --- generator -------------------------------------------------------------------------------------------------------


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
    with pytest.raises(UserError, match=r"part.bin: not the weights of BigGAN-deep: keys 2 missing \(generator.layers.1.conv_1"):
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


# --- codes -----------------------------------------------------------------------------------------------------------


def test_a_clip_is_its_code_and_its_key_alone():
    generator, sampling = create_demo_biggan(), Sampling(PATHS, 0.1)
    codes = torch.randn(len(KEYS), code_size(generator, 1))
    clips = sample_clips(generator, codes, KEYS, sampling)
    assert clips.shape == (len(KEYS), 3, 8, 32, 32)
    assert 0 <= clips.min() <= clips.max() <= 1
    order = torch.randperm(len(KEYS))
    permuted = sample_clips(generator, codes[order], [KEYS[k] for k in order], sampling)
    torch.testing.assert_close(permuted, clips[order], rtol=0, atol=1e-4)
    other = sample_clips(generator, codes, KEYS[::-1], sampling)
    assert (other - clips).abs().amax((1, 2, 3, 4)).min() > 0.05
    assert (clips[:, :, 1:] - clips[:, :, :-1]).abs().amax((1, 3, 4)).min() > 1e-3


def test_codes_come_in_turn_and_keep_their_names():
    first, second, third = np.zeros((3, 4), np.float32) + np.arange(3, dtype=np.float32)[:, None]
    clips = Codes("g", ["a", "b", "c"], [[first, second], [], [third]], 3)
    assert [clips[k][1][0] for k in range(len(clips))] == [0, 1, 0, 2, 2, 2]
    assert len({window.key for window in clips.refs}) == 6
    assert [window.key for window in Codes("other", ["a"], [[first]], 1).refs] != [clips.refs[0].key]


class Oracle:
    """A victim of three classes that looks at the first two entries of a code; the third class it never names."""

    answers, num_classes, classes, query_budget = "probs", 3, ("near", "far", "never"), None

    def __init__(self, left: int = 10**9):
        self.left, self.kept = left, {}

    @property
    def num_queries(self) -> int:
        return len(self.kept)

    def find(self, keys) -> dict:
        return {key: self.kept[key] for key in keys if key in self.kept}

    def count_affordable(self, keys) -> int:
        assert len(set(keys)) == len(keys)
        return min(len(keys), self.left)

    def query(self, clips, keys):
        if len(clips):
            assert not self.find(keys)
            self.left -= len(keys)
            self.kept |= dict(zip(keys, answer(clips), strict=True))
        return torch.stack([self.kept[key] for key in keys])


def answer(codes: torch.Tensor) -> torch.Tensor:
    return torch.stack([2.0 - 4.0 * codes[:, 0], 4.0 * codes[:, 0] - 14.0, -codes[:, 1].abs() - 4.0], 1).softmax(1)


def search(victim: Oracle, **changes):
    constants = dict(num_random=20, population=10, num_steps=6, step=0.5, confidence=0.9, codes_per_class=3, seed=0)
    return find_codes(
        victim, lambda codes, keys, sampling: codes, "g", 2, Sampling(PATHS), torch.device("cpu"), **constants | changes
    )


def test_the_search_climbs_bills_exactly_and_says_what_it_did_not_reach():
    victim = Oracle()
    codes, report, cut = search(victim, num_steps=60)
    assert cut is None
    assert [entry["reached"] for entry in report] == [True, True, False]
    assert victim.num_queries == 20 + 10 * sum(entry["steps"] for entry in report)
    assert [entry["num_queries"] for entry in report] == [10 * entry["steps"] for entry in report]
    assert report[1]["steps"] > 1  # no random code is as far out as this class asks for
    assert report[2]["steps"] == 60
    assert [len(own) for own in codes] == [3, 3, 1]
    for label in (0, 1):
        for code in codes[label]:
            assert answer(torch.from_numpy(code)[None])[0, label] > 0.9
    assert report[2]["confidence"] < 0.9


def test_the_search_repeats_and_stops_at_the_budget():
    whole = search(Oracle())
    assert [entry["confidence"] for entry in whole[1]] == [entry["confidence"] for entry in search(Oracle())[1]]
    for left in (0, 7, 20, 33):
        victim = Oracle(left)
        codes, report, cut = search(victim)
        assert victim.num_queries == left
        assert "query budget exhausted" in cut
        assert len(report) == 3
        assert all(codes) == (left > 0)


# --- scripts ---------------------------------------------------------------------------------------------------------


def small(script, demo_set, out_dir, **changes):
    constants = script.DEMO | dict(
        demo=False, victim="demo_swin", val=str(demo_set / "val"), num_random=40, population=6, num_steps=2, codes_per_class=2,
        clips_per_class=2, epochs=3, views_per_clip=2, out_dir=str(out_dir),
    )  # fmt: skip
    return script.Config(**constants | changes)


@pytest.mark.parametrize("script", [biggan_with_swin, biggan_with_movinet])
def test_scripts_bill_as_their_docstring_says(script, demo_set, tmp_path):
    results = script.main(small(script, demo_set, tmp_path / "run"))
    steps = sum(entry["steps"] for entry in results["search"])
    assert 0 < steps <= 12 * 2
    assert results["search_queries"] == 40 + 6 * steps
    assert results["num_queries"] == 40 + 6 * steps + 12 * 2 * 2 == ledger.count(str(tmp_path / "run" / "ledger.sqlite"))
    assert results["unreached"] == [entry["class"] for entry in results["search"] if entry["confidence"] <= 0.9]
    assert len(results["unreached"]) < 12


def test_a_budget_that_ends_in_the_search_leaves_a_student_and_says_that_it_is_untrained(demo_set, tmp_path):
    config = small(biggan_with_swin, demo_set, tmp_path / "run", query_budget=20)
    for _ in range(2):
        with pytest.raises(BudgetExhausted, match=r"20 of 20 queries spent in the search for embeddings.*untrained"):
            biggan_with_swin.main(config)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["num_queries"], results["history"][0]["loss"]) == (20, None)


def test_weights_of_another_network_are_found_before_the_search_is_paid(demo_set, tmp_path):
    save_weights(tmp_path / "other.safetensors", {"a": torch.zeros(1)}, {})
    config = small(biggan_with_swin, demo_set, tmp_path / "run", student_weights=str(tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match=r"other\.safetensors"):
        biggan_with_swin.main(config)
    assert ledger.count(str(tmp_path / "run" / "ledger.sqlite")) == 0


@pytest.mark.slow
def test_a_budget_that_ends_in_search_or_distillation_is_not_passed(demo_set, tmp_path):
    free = biggan_with_swin.main(small(biggan_with_swin, demo_set, tmp_path / "free", num_steps=1))
    searched, bill = free["search_queries"], free["num_queries"]
    for budget, line in ((searched - 1, "in the search for embeddings|in epoch 1 of 3"), (bill - 1, "in epoch 2 of 3")):
        config = small(biggan_with_swin, demo_set, tmp_path / "short", query_budget=budget, num_steps=1)
        with pytest.raises(BudgetExhausted, match=line):
            biggan_with_swin.main(config)
        assert json.loads((tmp_path / "short" / "results.json").read_text())["num_queries"] == budget
    again = biggan_with_swin.main(small(biggan_with_swin, demo_set, tmp_path / "short", num_steps=1))
    assert again["num_queries"] == bill
    students = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("free", "short")]
    assert students[0] == students[1]
