"""The report of an audit as plain values: tables of cells, a verdict whose every sentence names its row, what is not tested."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from extraction.audit.curves import Reached, agreement_at, average_seeds, queries_to
from extraction.audit.plan import CONTROLS
from extraction.evaluation.plots import draw_budgets, draw_trade_off
from extraction.evaluation.results import percent
from extraction.weights import write_text

LEVELS = (0.5, 0.7, 0.9)
NOT_TESTED = (
    "other attacks that ask what follows from answers: DFME, DisGUIDE, conditional generators, embedding search (black_box/)",
    "recovery by a trained network (D-DAE), and recovery that does not know which defence it meets",
    "students of other architectures than --student, and students with published weights where --student-weights is None",
    "answers that change after an alarm for a thief with several accounts, or a diluted one: the detectors' table has alarms",
    "several accounts of a thief recognised as one",
    "matching on naturally conferrable clips, and dataset inference",
    "a victim trained anew (ensembles, misinformation with outlier exposure, entangled watermarks)",
)


def _spread(values: Sequence[float]) -> dict[str, float | int]:
    return dict(mean=mean(values), sd=stdev(values) if len(values) > 1 else 0.0, seeds=len(values))


def _score_of(cells: Sequence[dict], name: str) -> dict[str, float | int] | None:
    found = [cell["scores"][name] for cell in cells if cell["scores"].get(name) is not None]
    return _spread(found) if found else None


def find_curve(cells: Sequence[dict], row: str, group: str = "answers") -> dict[int, float]:
    """The mean agreement@1 of a row's students at each budget."""
    own = [cell for cell in cells if cell["row"] == row and cell["group"] == group and cell["scores"]]
    return average_seeds([(cell["budget"], cell["scores"]["agreement_at_1"]) for cell in own])


def find_baseline(cells: Sequence[dict]) -> float:
    """The agreement@1 of innocent students: what a thief has without a query."""
    return mean(cell["scores"]["agreement_at_1"] for cell in cells if cell["group"] == "innocent")


def make_agreement(cells: Sequence[dict]) -> Callable[[str, float], float]:
    """`agreement(row, queries)` of the clones of a row, of all views or one view a clip, as detectors' tables take it."""
    without = find_baseline(cells)

    def agreement(row: str, queries: float) -> float:
        curve = find_curve(cells, row) or find_curve(cells, row, "views")
        return agreement_at(curve, queries, without)

    return agreement


def _tell_queries(reached: Reached, price: float) -> dict[str, Any]:
    cost = None if reached.queries is None else reached.queries * price / 1000
    return dict(queries=None if reached.queries is None else round(reached.queries), bound=reached.bound, cost=cost)


def tabulate_answers(cells: Sequence[dict], price: float) -> list[dict]:
    """A row for each answer type, and for one view a clip: the clone at its largest budget, the queries to each agreement."""
    rows, without = [], find_baseline(cells)
    for row, group in dict.fromkeys((c["row"], c["group"]) for c in cells if c["group"] in ("answers", "views")):
        curve = find_curve(cells, row, group)
        largest = max(curve)
        own = [c for c in cells if c["row"] == row and c["group"] == group and c["budget"] == largest]
        agreement = _score_of(own, "agreement_at_1")
        assert agreement is not None
        reached = {f"to_{100 * level:.0f}": _tell_queries(queries_to(curve, level), price) for level in LEVELS}
        interval = own[0]["scores"]["intervals"].get("agreement_at_1") if len(own) == 1 else None
        rows.append(
            dict(
                row=row, budget=largest, agreement=agreement, interval=interval, top1=_score_of(own, "top1"),
                gain=agreement["mean"] - without, curve=[[budget, value] for budget, value in curve.items()],
                same_as=next((c["same_as"] for c in own if c.get("same_as")), None), **reached,
            )
        )  # fmt: skip
    return rows


def tabulate_defences(cells: Sequence[dict], fits: Mapping[tuple[str, float], Any]) -> list[dict]:
    """A row for each defence and strength: its honest cost, and the clone under each attacker, the worst and the label row."""
    label = next(row for row in tabulate_answers(cells, 0.0) if row["row"] == "label")["agreement"]["mean"]
    rows = []
    for (defence, strength), fit in fits.items():
        own = [c for c in cells if c["group"] == "defences" and (c["defence"], c["strength"]) == (defence, strength)]
        if not own:
            continue
        clones = {c["attacker"]: c["scores"]["agreement_at_1"] for c in own if c["scores"]}
        worst = max(clones, key=lambda attacker: clones[attacker]) if clones else None
        rows.append(
            dict(
                row=f"{defence} {strength:g}", defence=defence, strength=strength, parameter=fit.parameter, reason=fit.reason,
                honest={name: value for name, value in fit.cost.items() if name != "ms"}, clones=clones, worst_attacker=worst,
                worst=clones[worst] if worst else None, label=label,
            )
        )  # fmt: skip
    return rows


def tabulate_live(cells: Sequence[dict]) -> list[dict]:
    """A row for each live attack: its clone, the gain over its control, and what is left of finite differences."""
    rows, own = [], [cell for cell in cells if cell["group"] == "live"]
    without = {cell["attacker"]: cell["scores"]["agreement_at_1"] for cell in own if cell["attacker"] in CONTROLS.values()}
    for cell in own:
        agreement, control = cell["scores"].get("agreement_at_1"), without.get(CONTROLS.get(cell["attacker"], ""))
        rows.append(
            dict(
                row=cell["row"], attack=cell["attacker"], wire=cell["wire"], answers=cell["answers"], defence=cell["defence"],
                strength=cell["strength"], queries=cell.get("num_queries"), budget=cell["budget"], agreement=agreement,
                interval=cell["scores"].get("intervals", {}).get("agreement_at_1"), top1=cell["scores"].get("top1"),
                gain=None if agreement is None or control is None else agreement - control, slopes=cell.get("slopes", []),
                reason=cell.get("reason", ""),
            )
        )  # fmt: skip
    return rows


def write_verdict(report: Mapping[str, Any], price: float) -> list[dict[str, str]]:
    """At most five sentences, each with the table and the row that it rests on."""
    sentences = []
    answers = report["tables"]["answers"]
    full = next((row for row in answers if row["row"] == "probs"), answers[0])
    found = full["to_70"]
    reached = (
        f"70 % takes {'at most ' if found['bound'] == 'at most' else 'about '}{found['queries']} queries ({found['cost']:.2f} "
        f"at {price:g} per 1 000)" if found["queries"] is not None else f"70 % is not reached by {full['budget']} queries"
    )  # fmt: skip
    sentences.append(
        dict(
            table="answers", row=full["row"],
            text=f"Undefended, {full['budget']} answers of type {full['row']} make a clone that agrees with the victim on "
            f"{percent(full['agreement']['mean'])} % of held-out clips, {percent(full['gain'])} points more than the thief's "
            f"own labels do; {reached}.",
        )
    )  # fmt: skip
    label = next(row for row in answers if row["row"] == "label")
    sentences.append(
        dict(
            table="answers", row="label",
            text=f"Answering with the label alone leaves {percent(label['agreement']['mean'])} %, which bounds what any "
            "defence that keeps the top class can do.",
        )
    )  # fmt: skip
    defences = [row for row in report["tables"]["defences"] if row["worst"] is not None]
    if defences:
        best = min(defences, key=lambda row: row["worst"])
        naive = best["clones"].get("naive", best["worst"])
        text = (
            f"Of the defences {best['row']} leaves least: {percent(best['worst'])} % under its worst attacker "
            f"({best['worst_attacker']}; {percent(naive)} % under a naive one), for an honest L1 of {best['honest']['l1']:.2f} "
            f"and {percent(best['honest']['flips'])} % of honest top classes changed"
        )
        text += "; that is no less than the label alone." if best["worst"] >= label["agreement"]["mean"] else "."
        sentences.append(dict(table="defences", row=best["row"], text=text))
    naive_rows = [row for row in report["tables"]["detectors"] if row["attacker"] == "naive"]
    stopped = [row for row in naive_rows if row["queries_to_alarm"] is not None]
    if stopped:
        best = min(stopped, key=lambda row: row["agreement_at_alarm"])
        others = [row for row in report["tables"]["detectors"] if row["detector"] == best["detector"]]
        evaded = max(others, key=lambda row: row["agreement_at_alarm"])
        alarms = next(
            row
            for row in report["tables"]["false_alarms"]
            if (row["detector"], row["profile"]) == (best["detector"], "all profiles")
        )
        first = "Of the detectors the quota, the control, stops a naive thief first" if best["detector"] == "quota" else (
            f"Of the detectors {best['detector']} stops a naive thief first"
        )  # fmt: skip
        text = (
            f"{first}, at {best['queries_to_alarm']} queries and {percent(best['agreement_at_alarm'])} % agreement, with false "
            f"alarms in {alarms['alarmed']} of {alarms['accounts']} honest accounts; of all thieves it leaves the one called "
            f"{evaded['attacker']} most, {percent(evaded['agreement_at_alarm'])} %."
        )
        sentences.append(dict(table="detectors", row=best["row"], text=text))
    elif naive_rows:
        text = f"No detector stops a naive thief within {naive_rows[0]['queries_watched']} queries."
        sentences.append(dict(table="detectors", row=naive_rows[0]["row"], text=text))
    owned = [row for row in report["tables"]["ownership"] if row["suspect"] == "clone"]
    if owned:
        row = owned[0]
        text = (
            f"A watermark in {row['triggers']} answers is repeated by the clone in {percent(row['repeated'])} % of them, "
            f"beside at most {percent(row['null'])} % by innocent students: p = {row['p']:.2g}."
        )
        sentences.append(dict(table="ownership", row=row["row"], text=text))
    return sentences[:5]


def draw_figures(folder: str | Path, report: Mapping[str, Any], cells: Sequence[dict]) -> dict[str, str]:
    """Draw the pictures of a report. Returns what each shows, by file name: the text for who cannot see it."""
    folder, tables = Path(folder), report["tables"]
    curves: dict[str, dict[int, list[float]]] = {}
    for cell in cells:
        if cell["group"] == "answers" and cell["scores"] and not cell.get("same_as"):
            curves.setdefault(cell["row"], {}).setdefault(cell["budget"], []).append(cell["scores"]["agreement_at_1"])
    draw_budgets(folder / "answers.png", curves, "agreement@1")
    label = next(row for row in tables["answers"] if row["row"] == "label")["agreement"]["mean"]
    pictures = {
        "answers.png": "Agreement at 1 of the clone against queries, a line for each answer type: "
        + "; ".join(f"{row['row']} {percent(row['agreement']['mean'])} % at {row['budget']}" for row in tables["answers"])
    }
    points = [(r["defence"], r["honest"]["l1"], r["worst"]) for r in tables["defences"] if r["worst"] is not None]
    if points:
        undefended = next((row for row in tables["answers"] if row["row"] == "probs"), tables["answers"][0])
        lines = {
            "undefended": undefended["agreement"]["mean"], "label alone": label, "no query": report["innocent"]["agreement"],
        }  # fmt: skip
        draw_trade_off(
            folder / "defences.png", points, lines, "mean L1 to honest answers", "agreement@1 of the worst attacker, %"
        )
        shown = "; ".join(f"{name} at L1 {l1:.2f}: {percent(worst)} %" for name, l1, worst in points)
        pictures["defences.png"] = f"Agreement at 1 under the worst attacker against the honest cost of each defence: {shown}"
    stopped = [r for r in tables["detectors"] if r["queries_to_alarm"] is not None]
    if stopped:
        points = [(r["detector"], float(r["queries_to_alarm"]), r["agreement_at_alarm"]) for r in stopped]
        draw_trade_off(
            folder / "detectors.png", points, {"no query": report["innocent"]["agreement"]}, "queries to the alarm",
            "agreement@1 by then, %", log=True,
        )  # fmt: skip
        shown = "; ".join(f"{r['row']}: {r['queries_to_alarm']} queries, {percent(r['agreement_at_alarm'])} %" for r in stopped)
        pictures["detectors.png"] = f"Agreement at 1 that a thief has by the alarm against queries to it: {shown}"
    return pictures


def write_tables(folder: str | Path, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write each table as a CSV file, nested values in JSON."""
    for name, rows in tables.items():
        text = io.StringIO()
        if rows:
            writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            for row in rows:
                writer.writerow({k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in row.items()})
        write_text(Path(folder) / f"{name}.csv", text.getvalue())
