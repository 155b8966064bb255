"""Tables, verdict and page, from cells that are made up: what is said follows from the rows."""

import dataclasses
import os
from pathlib import Path

import pytest

from extraction.audit import page, report
from extraction.audit.cells import Fit
from extraction.audit.plan import Cell

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
    owned = dict(row="clone", suspect="clone", triggers=16, repeated=0.6, null=0.2, p=1e-4, agreement=0.87)
    tables = dict(
        answers=report.tabulate_answers(cells, 20.0), defences=report.tabulate_defences(cells, fits),
        detectors=[detector, detector | dict(row="prada, one view a clip", attacker="one view a clip", queries_to_alarm=None)],
        false_alarms=[alarm], ownership=[owned],
    )  # fmt: skip
    about = dict(
        victim="demo <swin>", fingerprint="f", num_classes=12, victim_top1=0.97, num_val_videos=24, confidence_median=0.99,
        confidence_5=0.7, student="r2plus1d_tiny", wire="float", traffic=["mine"], seeds=[0, 1], price_per_1000=20.0,
        commit="c", scale="quick", command="python audit.py --demo",
    )  # fmt: skip
    made = dict(about=about, plan=dict(honest_accounts=40, honest_clips=900, budgets=list(BUDGETS)), tables=tables, cells=cells)
    made |= dict(innocent=dict(agreement=report.find_baseline(cells)), not_tested=report.NOT_TESTED)
    return made | dict(verdict=report.write_verdict(made, 20.0))


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
