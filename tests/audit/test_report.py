"""Tables, verdict and page, from cells that are made up: what is said follows from the rows."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from extraction.audit import page, report
from extraction.audit.cells import Fit
from extraction.audit.plan import AT_REST, CRAFTED, DATA_FREE, OWN_VIEWS, Cell

AGREEMENTS = {"probs": (0.3, 0.6, 0.88), "label": (0.25, 0.5, 0.74)}
BUDGETS = (100, 400, 1600)


def finish(cell: Cell, agreement: float, **more) -> dict:
    scores = dict(agreement_at_1=agreement, top1=agreement - 0.02, intervals={"agreement_at_1": [agreement - 0.03, agreement]})
    return cell.to_dict() | dict(status="done", scores=scores) | more


@pytest.fixture(scope="module")
def cells() -> list[dict]:
    found = [
        finish(Cell(group="answers", answers=kind, budget=budget, seed=seed), value + 0.02 * seed)
        for kind, values in AGREEMENTS.items()
        for budget, value in zip(BUDGETS, values, strict=True)
        for seed in (0, 1)
    ]
    defence = Cell(group="defences", defence="reverse_sigmoid", strength=0.3, budget=1600)
    for attacker, agreement in {"naive": 0.2, "top-1": 0.74, "recovery": 0.86}.items():
        found.append(finish(dataclasses.replace(defence, attacker=attacker), agreement))
    found.append(
        dataclasses.replace(defence, strength=0.6).to_dict() | dict(status="not possible", reason="it costs less", scores={})
    )
    found.append(finish(Cell(group="views", views="one", budget=500), 0.65))
    slopes = [dict(epsilon=0.03, kept=0.25), dict(epsilon=0.3, kept=0.75)]
    for attacker, agreement in {DATA_FREE: 0.3, AT_REST: 0.22, CRAFTED: 0.5, OWN_VIEWS: 0.55}.items():
        cell = Cell(group="live", attacker=attacker, wire="uint8", budget=640)
        found.append(finish(cell, agreement, num_queries=640, slopes=slopes if attacker in (DATA_FREE, AT_REST) else []))
    return [*found, finish(Cell(group="innocent", answers="label", seed=1000), 0.2)]


@pytest.fixture(scope="module")
def made(cells) -> dict:
    cost = dict(l1=0.31, l1_95=0.4, flips=0.01, decisions=0.5, top1=0.97, top1_lost=0.0, ms=0.1)
    fits = {("reverse_sigmoid", 0.3): Fit(0.04, cost), ("reverse_sigmoid", 0.6): Fit(None, {}, "it costs less")}
    detector = dict(
        row="prada, naive", detector="prada", attacker="naive", queries_to_alarm=400, orders_alarmed=3, orders=3,
        queries_watched=1600, useful_queries=400, agreement_at_alarm=0.6, accounts_burnt=4, queries_in_all=1600,
    )  # fmt: skip
    alarm = dict(row="prada, all profiles", detector="prada", profile="all profiles", alarmed=1, accounts=20, upper=0.22,
                 first_alarm=90, queries=4000)  # fmt: skip
    response = dict(
        row="prada, label", detector="prada", response="label", queries_to_alarm=400, clone=0.7, before=0.6, worst=0.7,
        alarmed=1, accounts=20, changed=0.02, flips=0.0, l1=0.01,
    )  # fmt: skip
    owned = dict(row="clone", suspect="clone", triggers=16, repeated=0.6, null=0.2, p=1e-4, agreement=0.87)
    tables = dict(
        answers=report.tabulate_answers(cells, 20.0), defences=report.tabulate_defences(cells, fits),
        detectors=[detector, detector | dict(row="prada, one view a clip", attacker="one view a clip", queries_to_alarm=None)],
        false_alarms=[alarm], ownership=[owned], live=report.tabulate_live(cells), responses=[response], conferred=[],
    )  # fmt: skip
    about = dict(
        victim="demo <swin>", fingerprint="f", num_classes=12, victim_top1=0.97, num_val_videos=24, confidence_median=0.99,
        confidence_5=0.7, student="r2plus1d_tiny", wire="float", traffic=["mine"], seeds=[0, 1], price_per_1000=20.0,
        commit="c", scale="quick", command="python audit.py --demo",
    )  # fmt: skip
    made = dict(about=about, plan=dict(honest_accounts=40, honest_clips=900, budgets=list(BUDGETS)), tables=tables, cells=cells)
    made |= dict(innocent=dict(agreement=report.find_baseline(cells)), not_tested=report.NOT_TESTED)
    return made | dict(verdict=report.write_verdict(made, 20.0), review=report.review(made))


def test_answers_are_averaged_over_seeds_and_priced(made):
    row = made["tables"]["answers"][0]
    assert (row["row"], row["budget"], row["agreement"]["seeds"]) == ("probs", 1600, 2)
    assert row["agreement"]["mean"] == pytest.approx(0.89)
    assert row["gain"] == pytest.approx(0.69)
    assert row["to_90"] == dict(queries=None, bound="not reached", cost=None)
    assert 100 < row["to_50"]["queries"] < 400
    assert row["to_50"]["cost"] == pytest.approx(row["to_50"]["queries"] * 0.02, abs=0.02)


def test_a_defence_is_its_worst_attacker_and_what_cannot_be_is_a_row_too(made):
    first, second = made["tables"]["defences"]
    assert (first["worst_attacker"], first["worst"], first["label"]) == ("recovery", 0.86, pytest.approx(0.75))
    assert (second["row"], second["worst"], second["reason"]) == ("reverse_sigmoid 0.6", None, "it costs less")


def test_the_verdict_names_rows_that_are_there(made):
    assert [sentence["table"] for sentence in made["verdict"]] == ["answers", "answers", "defences", "detectors", "ownership"]
    for sentence in made["verdict"]:
        assert sentence["row"] in [row["row"] for row in made["tables"][sentence["table"]]]
        assert sentence["text"].endswith(".")
    assert "86.0 % under its worst attacker (recovery; 20.0 % under a naive one)" in made["verdict"][2]["text"]
    assert "no less than the label alone" in made["verdict"][2]["text"]


def test_an_agreement_after_some_queries_is_read_off_the_curve(cells):
    agreement = report.make_agreement(cells)
    assert agreement("probs", 0) == pytest.approx(0.2)
    assert agreement("probs", 400) == pytest.approx(0.61)
    assert agreement("probs, one view a clip", 10**6) == pytest.approx(0.65)


def test_a_live_attack_gains_over_its_own_control(made):
    rows = {row["attack"]: row for row in made["tables"]["live"]}
    assert rows[DATA_FREE]["gain"] == pytest.approx(0.08)
    assert rows[CRAFTED]["gain"] == pytest.approx(-0.05)
    assert rows[AT_REST]["gain"] is rows[OWN_VIEWS]["gain"] is None


def test_a_reviewer_is_told_what_rows_say_and_nothing_where_there_are_none(made):
    found = {row["row"]: row for row in made["review"]}
    for row in made["review"]:
        assert row["rests_on"] in [each["row"] for each in made["tables"][row["table"]]]
    assert "labels alone the clone has 75.0 %, 14.0 points less" in found["What does it help to show less?"]["answer"]
    assert "cosine of 0.25, 0.75 with steps" in found["Do the wire and rounding stop zeroth-order attacks?"]["answer"]
    assert "At most -5.0 points" in found["Do crafted queries get more than a thief's own clips?"]["answer"]
    assert "prada, label leaves a clone of 70.0 %" in found["Does an alarm lead to something that helps?"]["answer"]
    assert "1 of 1 tests of clones claim one, and 0 of 0" in found["Can a copy be told by a watermark?"]["answer"]
    assert "Can a copy be told by conferred clips?" not in found
    bare = made | dict(tables={name: rows if name == "answers" else [] for name, rows in made["tables"].items()})
    assert [row["references"] for row in report.review(bare)][1:] == ["AISVS 11.3.2"]


def test_conferred_clips_are_chosen_by_one_seed_and_half_of_the_innocent_and_reported_on_the_others():
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(12, (400,), generator=rng)
    victim = torch.where(torch.rand(400, generator=rng) < 0.7, labels, (labels + 1) % 12)  # wrong on 3 of 10

    def guess(of: torch.Tensor, rate: float) -> list[int]:
        return torch.where(torch.rand(400, generator=rng) < rate, of, torch.randint(12, (400,), generator=rng)).tolist()

    cells = [finish(Cell(group="answers", budget=9), 0.9, on_val=guess(victim, 0.9))]
    cells += [finish(Cell(group="suspects", budget=9, seed=1), 0.9, on_val=guess(victim, 0.9))]
    cells += [finish(Cell(group="innocent", seed=1000 + k), 0.4, on_val=guess(labels, 0.5)) for k in range(6)]
    rows, reasons = report.tabulate_conferred(cells, victim, labels, torch.arange(400))
    assert not reasons
    for kind in ("all clips", "the victim's mistakes"):
        clone, *innocent = [row for row in rows if row["kind"] == kind]
        assert (clone["suspect"], clone["repeated"] > 0.8, clone["p"] < 1e-3) == ("clone of probs", True, True)
        assert [row["suspect"] for row in innocent] == [f"innocent student {k}" for k in (3, 4, 5)]
        assert {(row["false_claims"], row["innocents"]) for row in innocent} == {(0, 3)}
        assert clone["upper"] == pytest.approx(1 - 0.05 ** (1 / 3))
    one_video = report.tabulate_conferred(cells, victim, labels, torch.arange(400) // 4)[0]
    assert one_video[0]["clips"] < rows[0]["clips"]
    assert "a clone at least and two models" in report.tabulate_conferred(cells[:3], victim, labels, torch.arange(400))[1][0]


@pytest.fixture(scope="module")
def written(made, cells, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    pictures = report.draw_figures(folder, made, cells)
    assert set(pictures) == {"answers.png", "defences.png", "detectors.png"}
    path = folder / "report.html"
    path.write_text(page.to_html(made, pictures, folder))
    return path


def test_the_page_stands_alone_and_says_what_its_pictures_show(written):
    text = written.read_text()
    assert text.count("<img alt=") == 3
    assert "http" not in text
    assert "demo &lt;swin&gt;" in text
    assert text.count("<caption>") == text.count("<table>")
    assert "scope=col" in text


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_moves_the_slider_and_nothing_overflows(written, made, width):
    """With Playwright's own Chromium, or the one that the variable CHROMIUM names."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=os.environ.get("CHROMIUM"), args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium: {error.message.splitlines()[0]}")
        tab = browser.new_page(viewport=dict(width=width, height=800))
        wrong: list[str] = []
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", lambda request: None if request.url.startswith(("file:", "data:")) else wrong.append(request.url))
        tab.goto(written.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        cell = tab.locator("td.moving[data-row=probs]")
        before = cell.inner_text()
        tab.focus("#level")
        for _ in range(80):
            tab.keyboard.press("ArrowLeft")
        assert tab.inner_text("#level_shown") == "10 %"
        assert cell.inner_text() == "≤ 100 queries, 2.00"
        found = made["tables"]["answers"][0]["to_70"]  # Python's interpolation and JavaScript's are one
        assert before == f"{found['queries']} queries, {found['cost']:.2f}"
        tab.focus("#price")
        tab.keyboard.press("Home")
        assert cell.inner_text() == "≤ 100 queries, 0.00"
        assert not wrong
        browser.close()
