"""The audit, at a tiny scale: queries as planned, resumed after a kill to the same report, and one line for what is wrong."""

import copy
import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

import audit
from extraction import experiment
from extraction.audit import cells, live, recording
from extraction.audit.page import to_html
from extraction.audit.plan import CONTROLS, SCALES, Scale
from extraction.data import demo
from extraction.errors import UserError
from extraction.victims.query_interface import Victim
from tests.metered import put_meter, read_meter

HOME, END, RIGHT = "\ue011", "\ue010", "\ue014"  # keys, as WebDriver writes them
TINY = Scale(("logits", "probs", "label"), ("noise", "reverse_sigmoid"), (0.3,), 2, 0.5, 0.1, 1, 3, 2, (8, 16), 64)


@pytest.fixture(scope="module")
def make_config(demo_set, tmp_path_factory):
    root = tmp_path_factory.mktemp("traffic")
    folders = demo.write_traffic(root, {"traffic": (1, 48), "cameras": (2, 64)}, processes=1)

    def make(out_dir: Path, **changed) -> audit.Config:
        options = audit.DEMO | dict(
            demo=False, quick=True, in_domain=str(demo_set / "train_5per"), aux=(str(demo_set / "unrelated_b"),),
            val=str(demo_set / "val"), traffic=tuple(map(str, folders)), batch_size=8, epochs=1, num_workers=0, device="cpu",
            views_per_clip=2, out_dir=str(out_dir), clip_cache=str(root / "clips"), cache_gb=1.0,
        )  # fmt: skip
        return audit.Config(**options | changed)

    return make


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(SCALES, "quick", TINY)
    monkeypatch.setattr(cells, "DAWN_RATE", 0.2)
    monkeypatch.setattr(live, "SLOPE_DIRECTIONS", 1)
    monkeypatch.setattr(recording, "CHUNK", 16)  # a chunk is what a kill can cost; how it is batched decides the last bits


@pytest.fixture(scope="module")
def finished(make_config, tmp_path_factory):
    """A whole audit, its folder, and how many clips an independent meter at the victim counted."""
    patch = pytest.MonkeyPatch()
    patch.setitem(SCALES, "quick", TINY)
    patch.setattr(cells, "DAWN_RATE", 0.2)
    patch.setattr(live, "SLOPE_DIRECTIONS", 1)
    patch.setattr(recording, "CHUNK", 16)
    folder = tmp_path_factory.mktemp("audit")
    patch.setattr(Victim, "query", Victim.query)
    put_meter(folder / "meter")
    result = audit.main(make_config(folder / "run"))
    patch.undo()
    return result, folder / "run", read_meter(folder / "meter")


def without_times(text: str, folder: Path) -> dict:
    found = json.loads(text.replace(str(folder), "FOLDER"))
    del found["times"]
    return found


def count_unalarmed(result: dict) -> int:
    """Students of answers after an alarm that were planned, and that no alarm made another than the undefended one."""
    return sum(cell["group"] == "alarms" and cell["same_as"] is not None for cell in result["cells"])


def test_queries_are_as_planned(finished):
    result, _, metered = finished
    plan = result["plan"]
    assert plan["queries"] == plan["queries_answered"]
    attacks = [cell for cell in result["cells"] if cell["group"] == "live"]
    assert sum(cell["num_queries"] for cell in attacks) == plan["live_queries"]
    assert {cell["attacker"] for cell in attacks} == {*CONTROLS, *CONTROLS.values()}
    looks = 4 * 8 * (1 + 1) * sum("slopes" in cell for cell in attacks)  # the owner's, of a batch each
    owners = plan["honest_clips"] + result["about"]["num_val_videos"] + looks
    assert metered == plan["queries"] + plan["live_queries"] + owners
    assert max(plan["budgets"]) <= plan["queries"]
    assert plan["cells"] == len(result["cells"])
    trained = sum(cell.get("same_as") is None for cell in result["cells"]) - len(attacks)
    assert plan["students"] == trained + count_unalarmed(result)


def test_the_report_has_every_cell_and_its_verdict_names_rows_that_are_there(finished):
    result, folder, _ = finished
    markdown, html = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    for cell in result["cells"]:
        assert (folder / "cells" / f"{cell['name']}.json").is_file()
        assert f"| {cell['row']} | {cell['attacker']} | {cell['budget']} | {cell['seed']} |" in markdown
    assert html.count("<tr>") >= len(result["cells"]) + sum(len(rows) for rows in result["tables"].values())
    assert 1 <= len(result["verdict"]) <= 5
    for sentence in result["verdict"]:
        assert sentence["row"] in [row["row"] for row in result["tables"][sentence["table"]]]
        assert sentence["text"] in markdown
    for row in result["review"]:
        assert row["rests_on"] in [each["row"] for each in result["tables"][row["table"]]]
        assert row["answer"] in markdown
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", html)
    assert [row["row"] for row in result["tables"]["ownership"]][:3] == ["clone", "clone of labels", "cleaned clone"]
    for name in result["tables"]:
        assert len((folder / f"{name}.csv").read_text().splitlines()) == len(result["tables"][name]) + 1


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("no chromedriver; Debian's packages: chromium, chromium-driver")
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as opened:
        yield opened


def test_the_page_fits_its_window_its_sliders_work_and_it_is_accessible(finished, browser, tmp_path):
    axe = pytest.importorskip("axe_selenium_python").Axe(browser)
    result = copy.deepcopy(finished[0])
    result["tables"]["answers"][0] |= dict(row="probs", curve=[[16, 0.2], [64, 0.8]])
    pictures = {path.name: "a picture" for path in finished[1].glob("*.png")}
    page = tmp_path / "report.html"
    page.write_text(to_html(result, pictures, finished[1]))
    for width in (1280, 390):
        metrics = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(page.as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    level, price = (browser.find_element("id", name) for name in ("level", "price"))
    moving = browser.find_element("css selector", '.moving[data-row="probs"]')
    price.send_keys(END)
    most = float(price.get_attribute("max"))
    level.send_keys(HOME)  # 10 %, which the smallest budget has
    assert moving.text == f"≤ 16 queries, {16 * most / 1000:.2f}"
    level.send_keys(RIGHT * 40)  # half-way from 20 to 80 %, in logarithms
    assert moving.text == f"32 queries, {32 * most / 1000:.2f}"
    price.send_keys(HOME)
    assert moving.text == "32 queries, 0.00"
    level.send_keys(END)
    assert moving.text == "not reached (> 64)"
    axe.inject()
    assert [problem["id"] for problem in axe.run()["violations"] if problem["impact"] in ("serious", "critical")] == []


@pytest.mark.slow  # a student that is killed: tests/audit/test_students.py; an attack that runs live: test_live.py
def test_a_killed_audit_goes_on_to_the_same_report(finished, make_config, tmp_path, monkeypatch):
    result, folder, _ = finished
    written: list[Path] = []
    for module, name, most in ((recording, "save_weights", 3), (cells, "write_text", 4)):
        written.clear()
        write = getattr(module, name)

        def die(path, *content, limit=most, write=write):
            if len(written) == limit:
                raise KeyboardInterrupt
            written.append(path)
            write(path, *content)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, die)
            with pytest.raises(KeyboardInterrupt):
                audit.main(make_config(tmp_path / "run"))
    trained = []
    real = cells.train_student
    monkeypatch.setattr(cells, "train_student", lambda *args: trained.append(args) or real(*args))
    audit.main(make_config(tmp_path / "run"))
    already = [path for path in written if not json.loads(path.read_text())["same_as"]]
    assert len(trained) == result["plan"]["students"] - count_unalarmed(result) - len(already)
    ours, theirs = (without_times((where / "report.json").read_text(), where) for where in (tmp_path / "run", folder))
    assert ours == theirs
    before = (tmp_path / "run" / "report.json").read_text()
    trained.clear()
    again = audit.main(make_config(tmp_path / "run", price_per_1000=33.0))  # no cell twice, also at another price
    assert not trained
    assert again["about"]["price_per_1000"] == 33.0
    assert json.loads(before)["cells"] == again["cells"]


@pytest.mark.slow
def test_shares_make_the_same_report(finished, make_config, tmp_path, monkeypatch):
    result, _, _ = finished
    config, parts = make_config(tmp_path / "shared", jobs=2), []

    def run_here(steps, jobs, cluster):
        """As processes would be started, one after the other."""
        parts.append([number for (step,) in steps for number in map(int, step.title.removeprefix("cells ").split(", "))])
        for (step,) in steps:
            monkeypatch.setattr(sys, "argv", list(step.command))
            share = experiment.parse_options(audit.Config, config, "")
            assert share.out_dir == step.folder
            assert audit.main(dataclasses.replace(share, jobs=1)) == {}
            assert not (Path(step.folder) / "report.json").exists()
        return []

    monkeypatch.setattr(audit, "run_cells", run_here)
    monkeypatch.setattr(audit, "_SHARES_PER_JOB", 1000)  # a cell each: none may lean on another in its share
    found = audit.main(config)
    assert sorted(parts[0] + parts[1]) == list(range(result["plan"]["cells"]))
    assert parts[1]
    unlike = ("times", "about")
    assert {k: v for k, v in found.items() if k not in unlike} == {k: v for k, v in result.items() if k not in unlike}


def test_a_full_disk_is_a_line_and_nothing_is_lost(finished, make_config, tmp_path, monkeypatch):
    def fail(path, text):
        raise UserError(f"cannot write {path}: No space left on device; make room, then run the same again")

    with monkeypatch.context() as patch:
        patch.setattr(cells, "write_text", fail)
        with pytest.raises(UserError, match="No space left"):
            audit.main(make_config(tmp_path / "run"))
    assert list((tmp_path / "run" / "recorded").glob("thief-*"))
    assert not (tmp_path / "run" / "report.json").exists()
    with pytest.raises(UserError, match="other constants"):
        audit.main(make_config(tmp_path / "run", epochs=2))


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        (dict(traffic=()), "no honest traffic: name folders of your users' videos"),
        (dict(traffic=("nowhere",)), "folder nowhere not found: videos of your honest users belongs there"),
        (dict(thorough=True), "--quick and --thorough: choose one"),
        (dict(accounts=1), "--accounts 1: it must be at least 2"),
        (dict(wire="vp9"), "--wire vp9: there are float, uint8"),
        (dict(query_budget=5), "a budget of 5 queries is too small"),
        (dict(answers=("label",), defences=("reverse_sigmoid",)), "--defence reverse_sigmoid keeps the top class"),
    ],
)
def test_bad_input_is_a_line_before_any_query(changed, line, make_config, tmp_path, error_line):
    assert error_line(audit.main, make_config(tmp_path / "run", **changed)).startswith(line)
    assert not (tmp_path / "run" / "recorded").exists()


@pytest.mark.slow
def test_without_labels_agreement_is_audited_alone(make_config, tmp_path, capsys):
    result = audit.main(make_config(tmp_path / "run", val_unlabelled=True, defences=("noise",), answers=("probs",)))
    assert "no labels in --val: honest top-1 is left out" in capsys.readouterr().out
    assert result["tables"]["answers"][0]["top1"] is None
    assert result["tables"]["defences"][0]["honest"]["top1"] is None
    assert "| - |" in (tmp_path / "run" / "report.md").read_text()


def test_the_demo_is_drawn_before_its_folders_are_looked_for(tmp_path, monkeypatch, error_line):
    monkeypatch.chdir(tmp_path)
    drawn = []

    def draw(*folders: str):
        return lambda *args, **options: drawn.extend(folders) or [Path(folder).mkdir(parents=True) for folder in folders]

    monkeypatch.setattr(experiment, "write_demo_set", draw(*(f"datasets/demo/{s}" for s in demo.ATTACK_SPLITS)))
    monkeypatch.setattr(experiment, "write_traffic", draw(*(f"datasets/demo/{s}" for s in demo.TRAFFIC_SPLITS)))
    monkeypatch.setattr(experiment, "write_unseen_set", draw("datasets/demo_unseen/val"))
    config = audit.Config(**audit.DEMO, quick=True, thorough=True)
    assert error_line(audit.main, config) == "--quick and --thorough: choose one"
    assert {config.val, config.in_domain, *config.traffic} <= set(drawn)
