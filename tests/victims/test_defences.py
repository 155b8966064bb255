"""Defences: each against a slow reference, what they promise, and what they remember."""

import itertools
import json
import math
import multiprocessing
import os
import signal
import sqlite3
import typing

import numpy as np
import pytest
import torch
from torch import nn

from extraction import options
from extraction.errors import UserError
from extraction.victims import defences, ledger
from extraction.victims.defences import DEFENCES, Defence, Quantiser, check_defence, draw, fit_defence, mark, measure
from extraction.victims.detectors import thumbnail
from extraction.victims.ledger import Ledger, decode_answers, encode_answers
from extraction.victims.query_interface import Victim, VictimModel, defend

KEY = bytes(range(32))


@pytest.fixture(scope="module")
def answers() -> torch.Tensor:
    """200 answers for 12 classes, from nearly even to nearly certain."""
    torch.manual_seed(0)
    sure = [torch.distributions.Dirichlet(torch.full((12,), a)).sample((50,)) for a in (0.02, 0.1, 0.5, 5.0)]
    return torch.cat(sure).clamp(min=1e-9) / torch.cat(sure).clamp(min=1e-9).sum(1, keepdim=True)


@pytest.fixture(scope="module")
def draws(answers) -> torch.Tensor:
    return draw(KEY, [b"%d" % number for number in range(len(answers))])


class Tiny(nn.Module):
    """A model of 12 classes that answers at once."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(24, 12)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return 60 * self.linear(nn.functional.adaptive_avg_pool3d(clips - 0.5, 2).flatten(1))


def open_tiny(answers="probs", num_queries=0, wire=None) -> Victim:
    model = VictimModel(Tiny(), [f"class {k}" for k in range(12)], "tiny", "abc")  # type: ignore[arg-type]
    return Victim(model, answers, num_queries=num_queries, wire=wire)


def smooth_clips(count: int, seed: int = 0) -> torch.Tensor:
    coarse = torch.rand(count, 3, 2, 2, 2, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, (8, 24, 24), mode="trilinear")


# --- what all of them promise ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEFENCES)
@pytest.mark.parametrize("parameter", [0.01, 0.4, 1.0])
def test_answers_stay_probabilities_and_follow_from_the_clip_and_the_key(name, parameter, answers, draws):
    kind = DEFENCES[name]
    found = kind.defend(answers, draws, KEY, parameter)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(1), torch.ones(len(answers)), atol=1e-5, rtol=0)
    assert found.min() >= 0
    assert torch.equal(found, kind.defend(answers, draws, KEY, parameter))
    assert torch.equal(answers.argmax(1), found.argmax(1)) or kind.lies or name == "reverse_sigmoid"


@pytest.mark.parametrize("name", ["mad_argmax", "modelguard_w", "modelguard_s", "label"])
def test_the_top_class_survives_the_ledgers_16_bits(name, answers, draws):
    packed = decode_answers(encode_answers(answers, "probs"), "probs")  # of which some are even then
    clear = packed.topk(2).values.diff()[:, 0] < 0
    found = DEFENCES[name].defend(answers[clear], draws[clear], KEY, 0.8)
    assert torch.equal(decode_answers(encode_answers(found, "probs"), "probs").argmax(1), answers[clear].argmax(1))


@pytest.mark.parametrize("name", ["noise", "mad", "mad_argmax", "modelguard_w", "modelguard_s"])
def test_no_answer_goes_further_than_epsilon(name, answers, draws):
    for epsilon in (0.05, 0.5, 1.5):
        distances = (DEFENCES[name].defend(answers, draws, KEY, epsilon) - answers).abs().sum(1)
        assert distances.max() <= epsilon + (2.1e-3 if name == "mad_argmax" else 1e-5)  # its top class gets a margin more


@pytest.mark.parametrize("name", [name for name, kind in DEFENCES.items() if kind.most is not None])
def test_strength_is_the_cost_that_is_measured(name, answers):
    constants = fit_defence(name, 0.1, answers, KEY)
    assert constants["l1"] == pytest.approx(0.1, rel=0.2 if name in ("dawn", "misinformation", "modelguard_s") else 0.01)
    honest = draw(KEY, [b"honest %d" % number for number in range(len(answers))])
    found = measure(answers, DEFENCES[name].defend(answers, honest, KEY, constants["parameter"]))
    assert (found.l1, found.flips) == (constants["l1"], constants["flips"])


def test_a_strength_out_of_reach_gets_one_line(answers, error_line):
    line = error_line(fit_defence, "reverse_sigmoid", 1.99, answers, KEY)
    assert line.startswith("the defence costs at most L1 ")
    assert line.endswith("not 1.99; lower its strength")


# --- each against a reference -----------------------------------------------------------------------------------------


def test_noise_moves_half_of_epsilon_to_one_class_drawn_from_key_and_clip(answers, draws):
    found = defences.noise(answers, draws, 0.6)
    added = found - 0.7 * answers
    onto = added.argmax(1)
    torch.testing.assert_close(added, 0.3 * torch.eye(12)[onto], atol=1e-6, rtol=0)
    assert not (onto == answers.argmax(1)).any()
    steps = ((onto - answers.argmax(1)) % 12).bincount(minlength=12)
    assert steps[0] == 0
    assert steps[1:].min() > 0  # 200 draws of 11 classes
    other = defences.noise(answers, draw(bytes(32), [b"%d" % k for k in range(200)]), 0.6)
    assert (other != found).any(1).float().mean() > 0.8


def test_reverse_sigmoid_is_its_formula(answers):
    found = defences.reverse_sigmoid(answers, 0.3, 0.2)
    for row, expected in zip(answers[::20].double().tolist(), found[::20], strict=True):
        moved = [p - 0.3 * (1 / (1 + math.exp(-0.2 * math.log(max(p, 1e-9) / (1 - min(p, 1 - 1e-9))))) - 0.5) for p in row]
        moved = [min(max(p, 0), 1) for p in moved]
        torch.testing.assert_close(torch.tensor(moved) / sum(moved), expected, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_reverse_sigmoid_equals_arts(answers):
    art = pytest.importorskip("art.defences.postprocessor", exc_type=ImportError)
    for beta, gamma in ((1.0, 0.1), (0.2, 0.2)):
        expected = art.ReverseSigmoid(beta=beta, gamma=gamma)(answers.double().numpy())
        np.testing.assert_allclose(defences.reverse_sigmoid(answers, beta, gamma).numpy(), expected, atol=1e-6)


def jacobian_objective(candidates: torch.Tensor, y: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """MAD's objective of each candidate (N, K), from the Jacobian of a last linear layer's log-likelihoods."""
    features = torch.linspace(-1, 1, 5, dtype=torch.float64)
    weights = torch.outer(logits, features) / (features @ features)  # so that the layer gives these logits
    jacobian = torch.autograd.functional.jacobian(lambda w: (w @ features).log_softmax(0), weights).flatten(1)

    def direct(answer: torch.Tensor) -> torch.Tensor:
        gradient = answer @ jacobian
        return gradient / gradient.norm(dim=-1, keepdim=True)

    return (direct(candidates) - direct(y)).square().sum(-1)


def test_mad_finds_the_vertex_that_the_jacobian_says():
    torch.manual_seed(1)
    for y in torch.distributions.Dirichlet(torch.full((7,), 0.3, dtype=torch.float64)).sample((20,)):
        logits = 0.1 * torch.randn(7, dtype=torch.float64)
        vertices = torch.eye(7, dtype=torch.float64)
        best = vertices[jacobian_objective(vertices, y, logits).argmax()]
        alpha = min(1.0, 0.4 / (best - y).abs().sum().item())
        torch.testing.assert_close(defences.mad(y[None], 0.4, logits.softmax(0))[0], (1 - alpha) * y + alpha * best)


def test_mad_argmax_finds_the_corner_that_trying_all_of_them_finds():
    torch.manual_seed(2)
    eye, logits = torch.eye(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    for y in torch.distributions.Dirichlet(torch.full((7,), 0.3, dtype=torch.float64)).sample((20,)):
        top = int(y.argmax())
        others = [k for k in range(7) if k != top]
        sets = [(top, *chosen) for size in range(6) for chosen in itertools.combinations(others, size)]
        corners = torch.stack([eye[list(each)].mean(0) for each in sets])
        best = jacobian_objective(corners, y, logits).max()
        moved = defences.mad_argmax(y[None], 2.0)[0]  # the corner itself, and the margin
        found = jacobian_objective((moved * 1.001 - 1e-3 * eye[top]).clamp(min=0)[None], y, logits)[0]
        assert found.item() == pytest.approx(best.item(), abs=1e-6)


def solve_linear_program(y: np.ndarray, epsilon: float, margin: float) -> float:
    """ModelGuard-W's optimum by scipy: the answer a, and u >= |a - y|."""
    from scipy.optimize import linprog

    num_classes, top = len(y), int(y.argmax())
    eye, zero = np.eye(num_classes), np.zeros((num_classes, num_classes))
    ahead = np.delete(eye, top, 0)
    ahead[:, top] = -1
    rows = np.vstack([np.hstack([eye, -eye]), np.hstack([-eye, -eye]), np.hstack([ahead, zero[1:]])])
    budget = np.concatenate([np.zeros(num_classes), np.ones(num_classes)])
    limits = np.concatenate([y, -y, np.full(num_classes - 1, -margin), [epsilon]])
    found = linprog(
        np.concatenate([np.log(y + 1e-6), np.zeros(num_classes)]), np.vstack([rows, budget]), limits,
        np.concatenate([np.ones(num_classes), np.zeros(num_classes)])[None], [1], bounds=(0, None),
    )  # fmt: skip
    assert found.success
    return found.fun


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_modelguard_w_reaches_the_linear_programs_optimum(count):
    torch.manual_seed(3)
    shapes = [torch.full((12,), a, dtype=torch.float64) for a in (0.05, 0.3, 1.0, 10.0)]
    answers = torch.cat([torch.distributions.Dirichlet(shape).sample((count // 4,)) for shape in shapes])
    for epsilon, part in zip((0.1, 0.5, 1.0, 1.6), answers[torch.randperm(count)].split(count // 4), strict=True):
        found = defences.modelguard_w(part, epsilon, margin=1e-4)
        costs = ((part + 1e-6).log() * found).sum(1)
        best = torch.tensor([solve_linear_program(y.numpy(), epsilon, 1e-4) for y in part], dtype=torch.float64)
        torch.testing.assert_close(costs, best, atol=1e-6, rtol=0)
        top = found.gather(1, part.argmax(1, keepdim=True))
        assert ((found >= top - 0.99e-4).sum(1) == 1).all()


def test_modelguard_w_leaves_an_answer_alone_that_no_other_may_replace():
    even = torch.full((1, 12), 1 / 12)
    assert torch.equal(defences.modelguard_w(even, 1e-5), even)  # no room for the margin
    assert defences.modelguard_w(even, 0.5).argmax() == 0


def test_modelguard_s_gives_the_first_stored_answer_that_is_near():
    quantiser = Quantiser()
    rows = torch.tensor([[0.8, 0.2, 0.0], [0.7, 0.3, 0.0], [0.55, 0.45, 0.0], [0.2, 0.8, 0.0], [0.68, 0.3, 0.02]])
    replies, stored = quantiser(rows, 0.3)
    # The third is 0.5 from the first; the fourth has another top class; the last is near both of the first class.
    assert torch.equal(replies, rows[[0, 0, 2, 3, 0]])
    assert stored.tolist() == [True, False, True, True, False]
    assert len(quantiser) == 3


def test_misinformation_lies_where_the_victim_is_unsure(answers, draws):
    threshold = defences.threshold_for_share(answers, 0.3)
    found = defences.misinform(answers, draws, threshold)
    unsure = answers.amax(1) < threshold
    assert unsure.float().mean() == pytest.approx(0.3, abs=0.01)
    clear = (answers.amax(1) - threshold).abs() > 0.02  # the sigmoid is 1 or 0 to 1e-8 there
    torch.testing.assert_close(found[unsure & clear], defences.swap(answers, draws)[unsure & clear], atol=1e-6, rtol=0)
    torch.testing.assert_close(found[~unsure & clear], answers[~unsure & clear], atol=1e-6, rtol=0)
    near = int((answers.amax(1) - threshold).abs().argmin())
    share = 1 / (1 + math.exp(-1000 * (threshold - answers[near].max().item())))
    expected = (1 - share) * answers[near] + share * defences.swap(answers, draws)[near]
    torch.testing.assert_close(found[near], expected, atol=1e-3, rtol=0)


def test_a_lie_is_the_same_numbers_with_another_top_class(answers, draws):
    found = defences.swap(answers, draws)
    assert torch.equal(found.sort(1).values, answers.sort(1).values)
    assert (found.argmax(1) != answers.argmax(1)).all()
    assert ((found != answers).sum(1) <= 2).all()


def test_dawn_marks_the_share_that_it_says_and_leaves_the_rest(answers):
    many = answers.repeat(50, 1)
    draws = draw(KEY, [b"%d" % number for number in range(len(many))])
    found, chosen = defences.watermark(many, draws, 0.02)
    assert int(chosen.sum()) == pytest.approx(200, abs=4 * 14)  # binomial, n 10 000
    assert torch.equal(found[~chosen], many[~chosen])
    assert torch.equal(found[chosen], defences.swap(many, draws)[chosen])


# --- draws -------------------------------------------------------------------------------------------------------------


def test_nearly_equal_clips_have_one_mark_and_others_have_others():
    clips = smooth_clips(60)
    probs = Tiny()(clips).softmax(1)
    marks = mark(thumbnail(clips), probs)
    near = (clips + (torch.rand(clips.shape, generator=torch.Generator().manual_seed(9)) - 0.5) / 255).clamp(0, 1)
    same = [a == b for a, b in zip(marks, mark(thumbnail(near), probs), strict=True)]
    assert sum(same) >= 58
    assert len(set(marks)) > 50


def test_keyed_noise_is_not_averaged_away_by_asking_again():
    clips = smooth_clips(20)
    true = open_tiny().query(clips)
    victim = defend(open_tiny(), Defence(dict(name="noise", parameter=0.5), KEY))
    first = victim.query(clips)
    repeats = torch.stack([victim.query(clips.flip(0)).flip(0) for _ in range(8)])
    torch.testing.assert_close(repeats, first.expand_as(repeats), atol=1e-6, rtol=0)
    generator = torch.Generator().manual_seed(1)
    views = [(clips + (torch.rand(clips.shape, generator=generator) - 0.5) / 255).clamp(0, 1) for _ in range(8)]
    averaged = torch.stack([victim.query(view) for view in views]).mean(0)
    left = (averaged - true).abs().sum(1).mean() / (first - true).abs().sum(1).mean()
    assert left > 0.9  # independent noise on a random class would leave about half


# --- behind the query interface ------------------------------------------------------------------------------------------


def test_answers_of_every_type_are_those_of_the_defended_probabilities():
    clips, lie = smooth_clips(10), Defence(dict(name="lie", parameter=None), KEY)
    shown = {kind: defend(open_tiny(kind), lie).query(clips) for kind in ("probs", "label", "top5", "logits")}
    true = open_tiny().query(clips)
    assert (shown["label"] != true.argmax(1)).all()
    torch.testing.assert_close(shown["probs"].sort(1).values, true.sort(1).values, atol=1e-6, rtol=1e-4)
    assert torch.equal(shown["probs"].argmax(1), shown["label"])
    assert torch.equal(shown["top5"].argmax(1), shown["label"])
    torch.testing.assert_close(shown["logits"].softmax(1), shown["probs"])


def test_no_attribute_of_a_defended_victim_leads_to_the_key():
    victim = defend(open_tiny(), Defence(dict(name="noise", parameter=0.5), KEY))
    values = [getattr(victim, name) for name in dir(victim) if not name.startswith("__")]
    assert not any(isinstance(value, bytes | Defence | torch.Tensor | nn.Module) for value in values)
    assert not hasattr(victim, "__dict__")


@pytest.mark.parametrize(("consequence", "changed"), [("label", 0.0), ("lie", 1.0), ("nothing", 11 / 12)])
def test_answers_change_from_the_alarm_on(consequence, changed):
    clips = smooth_clips(60)
    true = open_tiny().query(clips)
    victim = defend(open_tiny(), Defence(dict(name=consequence, parameter=None), KEY, ("quota", dict(limit=25))))
    found = torch.cat([victim.query(part) for part in clips.split(7)])
    torch.testing.assert_close(found[:25], true[:25], atol=1e-6, rtol=1e-4)
    assert ((found[25:] - true[25:]).abs().sum(1) > 1e-3).float().mean() > 0.5
    assert (found[25:].argmax(1) != true[25:].argmax(1)).float().mean() == pytest.approx(changed, abs=0.15)
    if consequence == "label":
        torch.testing.assert_close(found[25:], torch.eye(12)[true[25:].argmax(1)], atol=1e-6, rtol=0)


# --- in a ledger -----------------------------------------------------------------------------------------------------------

QUANTISED = dict(defence=dict(name="modelguard_s", parameter=0.4), detector=None)
ALARMED = dict(
    defence=dict(name="lie", parameter=None), detector=("near_duplicates", dict(radius=0.2, scales=[200.0, 0.5], hits=5))
)
MARKED = dict(defence=dict(name="dawn", parameter=0.2), detector=None)


def open_ledger(path, constants, key=KEY, name="asked for", wire=None, shared=False) -> Ledger:
    opened = Ledger(
        path, lambda num_queries: open_tiny("probs", num_queries, wire), "probs", defence=name, wire=wire, shared=shared
    )
    if name is not None:
        opened.defend(lambda: key, lambda key: constants)
    return opened


def many_queries() -> tuple[torch.Tensor, list[bytes]]:
    clips = torch.cat([smooth_clips(40), smooth_clips(12) + 1e-4, smooth_clips(28, seed=1)]).clamp(0, 1)
    return clips, [b"%015d " % number for number in range(80)]


def query_all(opened: Ledger, first: int = 0) -> torch.Tensor:
    clips, keys = many_queries()
    return torch.cat([opened.query(clips[i : i + 10], keys[i : i + 10]) for i in range(first, 80, 10)])


def query_and_die(path, constants, at) -> None:
    """Be killed after the victim has answered batch `at`, before anything of it is written."""
    torch.set_num_threads(1)
    opened, batches = open_ledger(path, constants), itertools.count()
    keep = opened._keep

    def keep_or_die(rows):
        if next(batches) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return keep(rows)

    opened._keep = keep_or_die
    query_all(opened)


@pytest.mark.parametrize("constants", [QUANTISED, ALARMED, MARKED], ids=["modelguard_s", "alarm", "dawn"])
def test_a_kill_changes_no_later_answer(constants, tmp_path):
    whole = query_all(open_ledger(tmp_path / "whole.sqlite", constants))
    undefended = query_all(open_ledger(tmp_path / "plain.sqlite", None, name=None))
    assert (whole - undefended).abs().max() > 0.1
    for at in (1, 4, 5):
        path = tmp_path / f"killed_{at}.sqlite"
        run = multiprocessing.get_context("fork").Process(target=query_and_die, args=(path, constants, at))
        run.start()
        run.join(60)
        assert run.exitcode == -signal.SIGKILL
        again = open_ledger(path, constants)
        assert (len(again), again.num_queries) == (10 * at, 10 * at + 10)
        assert torch.equal(query_all(again), whole)
        records = [ledger.read_records(sqlite3.connect(file)) for file in (path, tmp_path / "whole.sqlite")]
        assert records[0] == records[1] != []


def test_a_ledger_serves_only_the_defence_the_wire_and_the_key_it_was_filled_with(tmp_path, error_line):
    path = tmp_path / "l.sqlite"
    query_all(open_ledger(path, MARKED, name="dawn 0.2"))
    assert "keeps defence dawn 0.2, this run wants None" in error_line(open_ledger, path, None, name=None)
    assert "keeps defence dawn 0.2, this run wants noise 0.3" in error_line(open_ledger, path, MARKED, name="noise 0.3")
    assert "keeps wire float, this run wants uint8" in error_line(open_ledger, path, MARKED, name="dawn 0.2", wire="uint8")
    assert "defended with another key" in error_line(open_ledger, path, MARKED, key=bytes(32), name="dawn 0.2")
    about = dict(sqlite3.connect(path).execute("SELECT name, value FROM about"))
    assert json.loads(about["defence_constants"]) == MARKED
    assert about["defence_key"] == defences.hash_key(KEY)
    assert KEY not in path.read_bytes()
    plain = tmp_path / "plain.sqlite"
    query_all(open_ledger(plain, None, name=None))
    with sqlite3.connect(plain) as database:  # as ledgers were before there were defences
        database.execute("DELETE FROM about WHERE name IN ('defence', 'wire')")
        database.execute("DROP TABLE defence")
    assert len(open_ledger(plain, None, name=None)) == 80
    assert "keeps defence None" in error_line(open_ledger, plain, MARKED)


def test_constants_stay_those_of_the_first_query(tmp_path):
    noise = dict(defence=dict(name="noise", parameter=0.5), detector=None)
    first = open_ledger(tmp_path / "l.sqlite", noise)
    clips, keys = many_queries()
    before = first.query(clips[:10], keys[:10])
    first.close()
    other = dict(defence=dict(name="noise", parameter=1.5), detector=None)
    again = open_ledger(tmp_path / "l.sqlite", other)
    after = again.query(clips[:10], [b"x" + key for key in keys[:10]])  # as new clips, that is
    assert torch.equal(after, before)


def test_an_order_of_queries_is_neither_shared_nor_merged(tmp_path, error_line):
    first, second = tmp_path / "a.sqlite", tmp_path / "b.sqlite"
    assert "has a ledger of its own" in error_line(open_ledger, first, QUANTISED, shared=True)
    for path in (first, second):
        query_all(open_ledger(path, QUANTISED))
    assert "follows one order of queries; they stay apart" in error_line(ledger.merge, str(first), str(second))


def test_nothing_is_answered_before_the_defence_is_there(tmp_path):
    opened = Ledger(tmp_path / "l.sqlite", lambda num_queries: open_tiny(), "probs", defence="noise 0.3")
    with pytest.raises(AssertionError, match="defend comes before"):
        opened.query(smooth_clips(1), [b"key"])
    assert opened.num_queries == 0


# --- what is asked for -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        (("nonsense", 0.3, None, "probs"), "--defence nonsense: there are noise, reverse_sigmoid, "),
        (("mad_argmax", 0.3, None, "label"), "--defence mad_argmax keeps the top class, of which --answers label shows"),
        (("noise", None, None, "probs"), "--defence noise needs --defence-strength"),
        (("lie", 0.3, None, "probs"), "--defence lie has no strength"),
        ((None, 0.3, None, "probs"), "--defence-strength 0.3 needs a defence"),
        ((None, None, "prada", "probs"), "--defence-after prada needs a defence"),
        (("lie", None, "quota", "probs"), "--defence-after quota: there are quota:N (queries), prada"),
        (("lie", None, "prada:3", "probs"), "--defence-after prada:3: there are quota:N"),
        (("lie", None, "nonsense", "probs"), "--defence-after nonsense: there are quota:N"),
    ],
)
def test_what_cannot_be_gets_one_line(asked, line, error_line):
    assert error_line(check_defence, *asked).startswith(line)


def test_a_defence_is_named_with_all_that_was_asked_for():
    assert check_defence(None, None, None, "label") is None
    assert check_defence("noise", 0.3, "quota:50", "label") == "noise 0.3 after quota:50"
    assert check_defence("label", None, "prada", "probs") == "label after prada"


def test_a_detector_is_fitted_or_given_its_constant():
    assert defences.parse_detector("quota:500") == ("quota", dict(limit=500))
    assert defences.parse_detector("prada:0.9") == ("prada", dict(delta=0.9))
    assert defences.parse_detector("near_duplicates") == ("near_duplicates", None)


def test_the_option_has_every_defence():
    hint = options.find_annotations(options.VictimOptions)["defence"]
    assert typing.get_args(typing.get_args(hint)[0]) == tuple(DEFENCES)


def test_the_key_follows_from_the_weights_and_not_from_their_fingerprint(tmp_path):
    from extraction.weights import fingerprint

    (tmp_path / "a").write_bytes(b"weights")
    (tmp_path / "b").write_bytes(b"weights!")
    key = defences.derive_key(tmp_path / "a")
    assert key == defences.derive_key(tmp_path / "a") != defences.derive_key(tmp_path / "b")
    assert fingerprint(tmp_path / "a") not in key.hex()


def test_a_defence_costs_what_is_measured_on_a_thousand_of_many_answers(answers):
    many = answers.repeat(10, 1)
    with pytest.raises(UserError, match="at most"):
        fit_defence("modelguard_w", 1.99, many, KEY)
    assert fit_defence("label", None, many, KEY)["parameter"] is None
