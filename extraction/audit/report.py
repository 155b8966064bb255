"""The report of an audit as plain values: tables of cells, a verdict whose every sentence names its row, what is not tested."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from extraction.audit.curves import Reached, agreement_at, average_seeds, queries_to
from extraction.audit.plan import CONTROLS, CRAFTED
from extraction.errors import UserError
from extraction.evaluation.plots import draw_budgets, draw_trade_off
from extraction.evaluation.results import percent
from extraction.victims.detectors import bound_share
from extraction.victims.ownership import fit_conferred, verify_conferred
from extraction.weights import write_text

LEVELS = (0.5, 0.7, 0.9)
CLAIM = 1e-3  # the p below which a suspect is claimed
NOT_TESTED = (
    "other attacks that ask what follows from answers: DFME, DisGUIDE, conditional generators, embedding search (black_box/)",
    "recovery by a trained network (D-DAE), and recovery that does not know which defence it meets",
    "students of other architectures than --student, and students with published weights where --student-weights is None",
    "answers that change after an alarm for a thief with several accounts, or a diluted one: the detectors' table has alarms",
    "several accounts of a thief recognised as one",
    "ownership against innocent models better than --student makes of the thief's labels, adversarial fingerprints, and "
    "dataset inference",
    "a victim trained anew (ensembles, misinformation with outlier exposure, entangled watermarks)",
)


def _spread(values: Sequence[float]) -> dict[str, float | int]:
    return dict(mean=mean(values), sd=stdev(values) if len(values) > 1 else 0.0, seeds=len(values))


def _score_of(cells: Sequence[dict], name: str) -> dict[str, float | int] | None:
    found = [cell["scores"][name] for cell in cells if cell["scores"].get(name) is not None]
    return _spread(found) if found else None


def find_curve(cells: Sequence[dict], row: str, group: str = "answers") -> dict[int, float]:
    """The mean agreement@1 of a row's students at each budget, from innocent students on, at 0."""
    own = [cell for cell in cells if cell["row"] == row and cell["group"] == group and cell["scores"]]
    curve = average_seeds([(cell["budget"], cell["scores"]["agreement_at_1"]) for cell in own])
    return {0: find_baseline(cells)} | curve if curve else {}


def find_baseline(cells: Sequence[dict]) -> float:
    """The agreement@1 of innocent students: what a thief has without a query."""
    return mean(cell["scores"]["agreement_at_1"] for cell in cells if cell["group"] == "innocent")


def make_agreement(cells: Sequence[dict]) -> Callable[[str, float], float]:
    """`agreement(row, queries)` of the clones of a row, of all views or one view a clip, as detectors' tables take it."""

    def agreement(row: str, queries: float) -> float:
        return agreement_at(find_curve(cells, row) or find_curve(cells, row, "views"), queries)

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


def tabulate_conferred(cells: Sequence[dict], victim: Tensor, labels: Tensor, videos: Tensor) -> tuple[list[dict], list[str]]:
    """A row for each suspect on clips that the victim confers, and why there is none.

    `victim` (N,), `labels` (N,; -1: none) and `videos` (N,) are of the held-out clips, of which one a video is taken. Clips are
    chosen by the clones of the first seed and half of the innocent students, whose rate is measured on every second clip;
    suspects are clones of another seed and the other half, on the other clips. Two kinds of clips: all, and those that the
    victim itself gets wrong, on which a suspect that is merely good at the task has no reason to agree.
    """
    last_first = {video: number for number, video in reversed(list(enumerate(videos.tolist())))}
    first = torch.tensor(sorted(last_first.values()))
    victim, labels = victim[first], labels[first]

    def find(group: str, keep: Callable[[dict], bool] = lambda cell: True) -> list[tuple[dict, Tensor]]:
        own = [cell for cell in cells if cell["group"] == group and cell.get("on_val") and keep(cell)]
        return [(cell, torch.tensor(cell["on_val"])[first]) for cell in own]

    clones = find("answers", lambda cell: cell["seed"] == 0 and not cell.get("same_as"))
    innocent, suspects = find("innocent"), find("suspects")
    half = -(-len(innocent) // 2)
    to_fit, late = innocent[:half], innocent[half:]
    rows, reasons = [], []
    kinds = {
        "all clips": torch.ones(len(victim), dtype=torch.bool),
        "the victim's mistakes": (labels >= 0) & (labels != victim),
    }
    for kind, taken in kinds.items():
        told = torch.where(taken, victim, -2)  # no model's class
        try:
            every_second = torch.arange(len(victim)) % 2 == 0
            chosen = fit_conferred(told, [seen for _, seen in clones], [seen for _, seen in to_fit], every_second)
        except UserError as error:
            reasons.append(f"ownership on {kind}: {error}")
            continue
        tested = [(f"clone of {cell['answers']}", cell, seen) for cell, seen in suspects]
        tested += [(f"innocent student {half + number}", cell, seen) for number, (cell, seen) in enumerate(late)]
        claims = [(suspect, cell, verify_conferred(seen, told, chosen)) for suspect, cell, seen in tested]
        false = sum(claim.p < CLAIM for _, cell, claim in claims if cell["group"] == "innocent")
        rows += [
            dict(
                row=f"{kind}, {suspect}", kind=kind, suspect=suspect, innocent=cell["group"] == "innocent",
                clips=len(chosen.places), agreement=cell["scores"]["agreement_at_1"], false_claims=false, innocents=len(late),
                upper=bound_share(false, len(late)), **claim._asdict(),
            )
            for suspect, cell, claim in claims
        ]  # fmt: skip
    return rows, reasons


def _compare(gain: float) -> str:
    return f"{percent(abs(gain))} points {'more' if gain >= 0 else 'less'}"


def write_verdict(report: Mapping[str, Any], price: float) -> list[dict[str, str]]:
    """At most five sentences, each with the table and the row that it rests on."""
    sentences = []
    answers = report["tables"]["answers"]
    full = next((row for row in answers if row["row"] == "probs"), answers[0])
    # The first level that the thief's own labels do not have already.
    level = next((level for level in LEVELS if report["innocent"]["agreement"] < level), LEVELS[-1])
    found = full[f"to_{100 * level:.0f}"]
    reached = f"{100 * level:.0f} % " + (
        f"is not reached by {full['budget']} queries" if found["queries"] is None
        else "takes no query" if found["bound"] == "none"
        else f"takes about {found['queries']} queries ({found['cost']:.2f} at {price:g} per 1 000)"
    )  # fmt: skip
    sentences.append(
        dict(
            table="answers", row=full["row"],
            text=f"Undefended, {full['budget']} answers of type {full['row']} make a clone that agrees with the victim on "
            f"{percent(full['agreement']['mean'])} % of held-out clips, {_compare(full['gain'])} than the thief's own "
            f"labels do; {reached}.",
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


def review(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """What this run's numbers say to what a security reviewer asks, a row a question: its references, the answer, its rows.

    References: OWASP AISVS 1.0 (C11), MITRE ATLAS, NIST AI 100-2. No grade is given: how much is too much is the owner's.
    """
    tables, rows = report["tables"], list[dict[str, str]]()

    def say(references: str, question: str, answer: str, table: str, row: str) -> None:
        rows.append(dict(row=question, references=references, answer=answer, table=table, rests_on=row))

    answers = tables["answers"]
    full = next((row for row in answers if row["row"] == "probs"), answers[0])
    label = next(row for row in answers if row["row"] == "label")
    kept, less = full["agreement"]["mean"], label["agreement"]["mean"]
    say(
        "ATLAS AML.T0024.002; NIST AI 100-2, model extraction", "Can queries alone copy the model?",
        f"{full['budget']} answers of type {full['row']} make a clone of {percent(kept)} % agreement, "
        f"{_compare(full['gain'])} than innocent students have.", "answers", full["row"],
    )  # fmt: skip
    if label is not full:
        say(
            "AISVS 11.3.2", "What does it help to show less?",
            f"With labels alone the clone has {percent(less)} %, {percent(kept - less)} points less.", "answers", "label",
        )  # fmt: skip
    defended = [row for row in tables["defences"] if row["worst"] is not None]
    if defended:
        best = min(defended, key=lambda row: row["worst"])
        beaten = "less" if best["worst"] < less else "no less"
        say(
            "AISVS 11.3.2", "What do changed answers help, and what do honest users pay?",
            f"Of {len(defended)} defences {best['row']} leaves least, {percent(best['worst'])} % under its worst attacker, "
            f"{beaten} than labels alone; honest answers are {best['honest']['l1']:.2f} in L1 from the true ones and "
            f"{percent(best['honest']['flips'])} % of their top classes change.", "defences", best["row"],
        )  # fmt: skip
    live = [row for row in tables["live"] if row["slopes"] and row["defence"] is None]
    if live:
        least, most = (choose(live, key=lambda row: row["slopes"][0]["kept"]) for choose in (min, max))
        say(
            "ATLAS AML.T0024.002; NIST AI 100-2, model extraction", "Do the wire and rounding stop zeroth-order attacks?",
            f"Of finite differences {least['row']} leaves a cosine of {least['slopes'][0]['kept']:.2f}, "
            f"{least['slopes'][1]['kept']:.2f} with steps ten times as large; {most['row']} leaves "
            f"{most['slopes'][0]['kept']:.2f}.", "live", least["row"],
        )  # fmt: skip
    crafted = [row for row in tables["live"] if row["attack"] == CRAFTED and row["gain"] is not None]
    if crafted:
        best = max(crafted, key=lambda row: row["gain"])
        say(
            "ATLAS AML.T0024.002", "Do crafted queries get more than a thief's own clips?",
            f"At most {percent(best['gain'])} points over as many own views, of {len(crafted)} tries ({best['row']}).", "live",
            best["row"],
        )  # fmt: skip
    watched = [row for row in tables["detectors"] if row["detector"] != "quota"]
    if watched:
        seen = [row for row in watched if row["queries_to_alarm"] is not None]
        evaded = max(watched, key=lambda row: row["agreement_at_alarm"])
        alarms = next(
            row for row in tables["false_alarms"] if (row["detector"], row["profile"]) == (evaded["detector"], "all profiles")
        )
        say(
            "AISVS 11.3.1", "Does the pattern of queries give a theft away?",
            f"In {len(seen)} of {len(watched)} pairs of detector and thief there is an alarm. Most is left by {evaded['row']}: "
            f"{percent(evaded['agreement_at_alarm'])} % agreement; that detector alarms {alarms['alarmed']} of "
            f"{alarms['accounts']} honest accounts (at most {percent(alarms['upper'])} % of such accounts).", "detectors",
            evaded["row"],
        )  # fmt: skip
    answered = [row for row in tables["responses"] if row["queries_to_alarm"] is not None]
    if answered:
        best = min(answered, key=lambda row: row["worst"])
        say(
            "AISVS 11.3.4", "Does an alarm lead to something that helps?",
            f"{best['row']} leaves a clone of {percent(best['worst'])} % where {percent(kept)} % is had undefended, and "
            f"changes {percent(best['changed'])} % of honest answers.", "responses", best["row"],
        )  # fmt: skip
    quota = [row for row in tables["detectors"] if row["detector"] == "quota" and row["accounts_burnt"] is not None]
    if quota:
        row = max(quota, key=lambda row: row["agreement_at_alarm"])
        say(
            "AISVS 11.2.2", "What do limits for an account cost a thief?",
            f"A limit that no honest account that was fitted to exceeds leaves {percent(row['agreement_at_alarm'])} % to one "
            f"account ({row['attacker']}); the whole theft takes {row['accounts_burnt']}.", "detectors", row["row"],
        )  # fmt: skip
    for name, what in (("ownership", "a watermark"), ("conferred", "conferred clips")):
        own = tables[name]
        innocent = [row for row in own if row["suspect"].startswith("innocent")]
        suspects = [row for row in own if row not in innocent]
        if suspects:
            claimed, false = ([row for row in part if row["p"] < CLAIM] for part in (suspects, innocent))
            say(
                "AISVS 11.3.3", f"Can a copy be told by {what}?",
                f"{len(claimed)} of {len(suspects)} tests of clones claim one, and {len(false)} of {len(innocent)} of innocent "
                f"students (p below {CLAIM:g}).", name, suspects[0]["row"],
            )  # fmt: skip
    return rows


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
