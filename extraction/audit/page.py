"""The report of an audit for reading: Markdown, and one HTML page that needs no network."""

import base64
import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from extraction.audit.report import CLAIM, LEVELS
from extraction.evaluation.results import percent, percent_range

Column = tuple[str, Callable[[Mapping[str, Any]], str]]


class Table(NamedTuple):
    """How a table is shown."""

    title: str
    caption: str
    columns: list[Column]


def _spread(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "-"
    return percent(value["mean"]) + (f" ± {100 * value['sd']:.1f}" if value["seeds"] > 1 else "")


def _queries(found: Mapping[str, Any], largest: int) -> str:
    if found["queries"] is None:
        return f"not reached (> {largest})"
    return "none" if found["bound"] == "none" else f"{found['queries']} ({found['cost']:.2f})"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _clone(attacker: str) -> Column:
    return attacker, lambda row: percent(row["clones"].get(attacker))


def _accounts(row: Mapping[str, Any]) -> str:
    if row["accounts_burnt"] is not None:
        return str(row["accounts_burnt"])
    return "1" if row["queries_watched"] >= row["queries_in_all"] else f"1 for the {row['queries_watched']} watched"


def _reach(level: float) -> Column:
    name = f"{100 * level:.0f}"
    return f"queries to {name} % (cost)", lambda row: _queries(row[f"to_{name}"], row["budget"])


TABLES: dict[str, Table] = {
    "answers": Table(
        "Answer types",
        "The clone by what the victim answers; separate students, one a budget. All have the thief's own labelled clips "
        "too. Gain: over innocent students, who have these and no answers. The cost is that of the queries at the price below.",
        [
            ("answers", lambda row: row["row"]),
            ("agreement@1, %", lambda row: _spread(row["agreement"])),
            ("top-1, %", lambda row: _spread(row["top1"])),
            ("95 % interval by video", lambda row: percent_range(row["interval"])),
            ("gain, points", lambda row: percent(row["gain"])),
            ("at queries", lambda row: str(row["budget"])),
            *(_reach(level) for level in LEVELS),
        ],
    ),
    "defences": Table(
        "Defences at equal honest cost",
        "Agreement@1 of the clone under each attacker, who knows the defence and not its key. The honest cost is measured on "
        "honest clips that the defence was not fitted to, top-1 on the labelled videos. Beside it the clone of label-only "
        "answers: a defence that keeps the top class protects no more than these.",
        [
            ("defence", lambda row: row["row"]),
            ("honest L1, mean", lambda row: _number(row["honest"].get("l1"), 3)),
            ("95 % of L1 below", lambda row: _number(row["honest"].get("l1_95"))),
            ("top classes changed, %", lambda row: percent(row["honest"].get("flips"))),
            ("decisions at 0.9 changed, %", lambda row: percent(row["honest"].get("decisions"))),
            ("honest top-1, %", lambda row: percent(row["honest"].get("top1"))),
            *(_clone(name) for name in ("naive", "top-1", "recovery", "sure answers", "averaged views")),
            ("worst, %", lambda row: percent(row["worst"]) + (f" ({row['worst_attacker']})" if row["worst_attacker"] else "")),
            ("label alone, %", lambda row: percent(row["label"])),
            ("remark", lambda row: row["reason"] or "-"),
        ],
    ),
    "live": Table(
        "Attacks that make their queries",
        "Run live against the query interface, each with a meter of its own. Data-free: a generator makes the clips and "
        "follows finite differences of the answers. Crafted: own views, and as many moved along the student's gradients. Gain: "
        "over as many queries from a generator that never learns, or of own views alone. Slopes kept: the cosine of finite "
        "differences with exact ones, at the attack's step and at ten times that; 1 is all, 0 nothing.",
        [
            ("wire, answers, attack", lambda row: row["row"]),
            ("queries", lambda row: "-" if row["queries"] is None else str(row["queries"])),
            ("agreement@1, %", lambda row: percent(row["agreement"])),
            ("95 % interval by video", lambda row: percent_range(row["interval"])),
            ("top-1, %", lambda row: percent(row["top1"])),
            ("gain over the control, points", lambda row: percent(row["gain"])),
            ("slopes kept", lambda row: _number(row["slopes"][0]["kept"] if row["slopes"] else None)),
            ("with steps ten times as large", lambda row: _number(row["slopes"][1]["kept"] if row["slopes"] else None)),
            ("remark", lambda row: row["reason"] or "-"),
        ],
    ),
    "detectors": Table(
        "Detectors against thieves",
        "One account of a thief. Queries to the alarm: the median of random orders. Agreement by then is read off the clone's "
        "curve. Accounts: those that a theft of the largest budget burns, each closed at its alarm; diluted ones "
        "are watched for as long as there are honest clips to dilute them with.",
        [
            ("detector, thief", lambda row: row["row"]),
            (
                "queries to the alarm",
                lambda row: "no alarm" if row["queries_to_alarm"] is None else str(row["queries_to_alarm"]),
            ),
            ("orders alarmed", lambda row: f"{row['orders_alarmed']} of {row['orders']}"),
            ("queries watched", lambda row: str(row["queries_watched"])),
            ("agreement@1 by then, %", lambda row: percent(row["agreement_at_alarm"])),
            ("accounts", _accounts),
            ("queries in all", lambda row: str(row["queries_in_all"])),
        ],
    ),
    "responses": Table(
        "Answers after an alarm",
        "One account of a naive thief: true answers before the alarm, changed ones from it. He may train on all, or on those "
        "before the alarm alone, the better of which is the worst for the owner. Honest users pay by false alarms: shares of "
        "all queries of the honest accounts that no threshold was fitted to; a query without an answer has lost its top class.",
        [
            ("detector, response", lambda row: row["row"]),
            (
                "queries to the alarm",
                lambda row: "no alarm" if row["queries_to_alarm"] is None else str(row["queries_to_alarm"]),
            ),
            ("clone of all answers, %", lambda row: percent(row["clone"])),
            ("of those before, %", lambda row: percent(row["before"])),
            ("worst, %", lambda row: percent(row["worst"])),
            ("honest accounts alarmed", lambda row: f"{row['alarmed']} of {row['accounts']}"),
            ("honest answers changed, %", lambda row: percent(row["changed"])),
            ("honest top classes lost, %", lambda row: percent(row["flips"])),
            ("honest L1, mean", lambda row: _number(row["l1"], 3)),
        ],
    ),
    "false_alarms": Table(
        "False alarms",
        "Honest accounts that no threshold was fitted to. Upper bound: 95 %, one-sided (Clopper and Pearson), for accounts "
        "like these; accounts of a profile share footage.",
        [
            ("detector, profile", lambda row: row["row"]),
            ("accounts alarmed", lambda row: f"{row['alarmed']} of {row['accounts']}"),
            ("upper bound, %", lambda row: percent(row["upper"])),
            ("earliest alarm at query", lambda row: "-" if row["first_alarm"] is None else str(row["first_alarm"])),
            ("queries", lambda row: str(row["queries"])),
        ],
    ),
    "ownership": Table(
        "Ownership",
        "DAWN's watermark: how many of its answers a suspect repeats, beside innocent students, which bound the chance.",
        [
            ("suspect", lambda row: row["row"]),
            ("triggers", lambda row: str(row["triggers"])),
            ("repeated, %", lambda row: percent(row["repeated"])),
            ("innocent students, at most, %", lambda row: percent(row["null"])),
            ("p", lambda row: f"{row['p']:.2g}"),
            ("claimed at 0.001", lambda row: "yes" if row["p"] < CLAIM else "no"),
            ("agreement@1, %", lambda row: percent(row["agreement"])),
        ],
    ),
    "conferred": Table(
        "Ownership without a watermark",
        "Held-out clips, one a video, on which clones answer as the victim does and innocent students do not. They are chosen "
        "by clones of one seed and half of the innocent students, what innocent ones repeat is measured on every second clip, "
        "and suspects are a clone of another seed and the other students on the other clips. Where the victim is right, a "
        "suspect that is merely better at the task agrees too: its mistakes say more. False claims: of the innocent students "
        "tested, with the upper 95 % bound (Clopper and Pearson).",
        [
            ("clips, suspect", lambda row: row["row"]),
            ("clips", lambda row: str(row["clips"])),
            ("as the victim, %", lambda row: percent(row["repeated"])),
            ("innocent students, at most, %", lambda row: percent(row["null"])),
            ("p", lambda row: f"{row['p']:.2g}"),
            ("claimed at 0.001", lambda row: "yes" if row["p"] < CLAIM else "no"),
            ("false claims", lambda row: f"{row['false_claims']} of {row['innocents']} (≤ {percent(row['upper'])} %)"),
            ("agreement@1, %", lambda row: percent(row["agreement"])),
        ],
    ),
}

REVIEW = Table(
    "What a security reviewer asks",
    "The findings of this run by the requirements that they speak to: OWASP AISVS 1.0 (11.2.2 limits, 11.3.1 detection, 11.3.2 "
    "outputs, 11.3.3 watermarks and fingerprints, 11.3.4 response), MITRE ATLAS and NIST AI 100-2. A question that this run "
    "has no numbers for is left out; whether an answer is good enough is the owner's to say.",
    [
        ("question", lambda row: row["row"]),
        ("reference", lambda row: row["references"]),
        ("what the numbers say", lambda row: row["answer"]),
        ("rests on", lambda row: f"{TABLES[row['table']].title}: {row['rests_on']}"),
    ],
)


def _list_cells(report: Mapping[str, Any]) -> Table:
    return Table(
        "Every cell",
        f"All {len(report['cells'])} cells: one student each, or that of the cell named last.",
        [
            ("table", lambda row: row["group"]),
            ("row", lambda row: row["row"]),
            ("attacker", lambda row: row["attacker"]),
            ("budget", lambda row: str(row["budget"])),
            ("seed", lambda row: str(row["seed"])),
            ("status", lambda row: row["status"]),
            ("agreement@1, %", lambda row: percent(row["scores"].get("agreement_at_1"))),
            ("top-1, %", lambda row: percent(row["scores"].get("top1"))),
            ("as", lambda row: row.get("same_as") or "-"),
        ],
    )


def _list_facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    about, plan = report["about"], report["plan"]
    return [
        ("victim", f"{about['victim']} ({about['fingerprint']}), {about['num_classes']} classes"),
        ("victim's top-1", f"{percent(about['victim_top1'])} % on {about['num_val_videos']} held-out videos"),
        ("victim's confidence", f"median {about['confidence_median']:.4f}, 5 % below {about['confidence_5']:.4f}"),
        ("student", about["student"]),
        ("wire", about["wire"]),
        (
            "honest traffic",
            f"{plan['honest_accounts']} accounts, {plan['honest_clips']} clips of {', '.join(about['traffic'])}",
        ),
        ("budgets", ", ".join(map(str, plan["budgets"]))),
        ("seeds", ", ".join(map(str, about["seeds"]))),
        ("price", f"{about['price_per_1000']:g} per 1 000 queries"),
        ("commit", about["commit"]),
        ("scale", about["scale"]),
    ]


def to_markdown(report: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The report as Markdown."""
    lines = [f"# Extraction audit of {report['about']['victim']}", ""]
    for sentence in report["verdict"]:
        lines.append(f"- {sentence['text']} [{TABLES[sentence['table']].title}: {sentence['row']}]")
    lines += ["", "| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in _list_facts(report)), ""]
    tables = [(TABLES[name], rows) for name, rows in report["tables"].items()]
    for table, rows in [(REVIEW, report["review"]), *tables, (_list_cells(report), report["cells"])]:
        lines += [f"## {table.title}", "", table.caption, ""]
        if not rows:
            lines += ["No row.", ""]
            continue
        lines += [f"| {' | '.join(head for head, _ in table.columns)} |", f"|{' --- |' * len(table.columns)}"]
        for row in rows:
            cells = (show(row).replace("|", "\\|") for _, show in table.columns)
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines += [f"![{text}]({name})\n" for name, text in pictures.items()]
    lines += ["## Not tested", "", *(f"- {line}" for line in report["not_tested"]), ""]
    lines += ["## Command", "", f"    {report['about']['command']}", ""]
    return "\n".join(lines)


def to_html(report: Mapping[str, Any], pictures: Mapping[str, str], folder: str | Path) -> str:
    """The report as one page: pictures inside, no network; two sliders change the column of queries and money."""
    about, escape = report["about"], html.escape
    verdict = "".join(
        f'<li>{escape(s["text"])} <a href="#{s["table"]}">{escape(TABLES[s["table"]].title)}: {escape(s["row"])}</a></li>'
        for s in report["verdict"]
    )
    facts = "".join(
        f"<tr><th scope=row>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in _list_facts(report)
    )
    sections = []
    of_table = {"answers": "answers.png", "defences": "defences.png", "detectors": "detectors.png"}
    for name, rows in report["tables"].items():
        body = _to_html_table(name, TABLES[name], rows)
        if name == "answers":
            body = _sliders(report) + body
        picture = of_table.get(name, "")
        if picture in pictures:
            data = base64.b64encode((Path(folder) / picture).read_bytes()).decode()
            image = f'<img alt="{escape(pictures[picture])}" src="data:image/png;base64,{data}">'
            body += f'<figure tabindex="0">{image}</figure>'
        sections.append(f'<section id="{name}"><h2>{escape(TABLES[name].title)}</h2>{body}</section>')
    cells = _to_html_table("cells", _list_cells(report), report["cells"])
    missing = "".join(f"<li>{escape(line)}</li>" for line in report["not_tested"])
    curves = {row["row"]: row["curve"] for row in report["tables"]["answers"]}
    embedded = json.dumps(curves).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Extraction audit of {escape(about["victim"])}</title><style>{_STYLE}</style></head><body>
<header><h1>Extraction audit of {escape(about["victim"])}</h1></header><main>
<section id="verdict"><h2>Verdict</h2><ul>{verdict}</ul></section>
<section id="about"><h2>What was audited</h2><div class="scroll" tabindex="0" role="region" aria-label="What was audited">
<table><caption><p>Victim, traffic and settings</p></caption>{facts}</table></div></section>
<section id="review"><h2>{REVIEW.title}</h2>{_to_html_table("review", REVIEW, report["review"])}</section>
{"".join(sections)}
<section id="appendix"><h2>Appendix</h2><h3>Not tested</h3><ul>{missing}</ul>
<h3>Command</h3><pre tabindex="0">{escape(about["command"])}</pre>
<h3>Every cell</h3>{cells}</section></main>
<script type="application/json" id="curves">{embedded}</script><script>{_SCRIPT}</script></body></html>
"""


def _to_html_table(name: str, table: Table, rows: Sequence[Mapping[str, Any]]) -> str:
    escape, title = html.escape, html.escape(table.title)
    if not rows:
        return f"<p>{escape(table.caption)}</p><p>No row.</p>"
    columns = [head for head, _ in table.columns]
    moving = ["queries and money at the sliders"] if name == "answers" else []
    head = "".join(f"<th scope=col>{escape(column)}</th>" for column in columns + moving)
    body = []
    for row in rows:
        first, *others = (escape(show(row)) for _, show in table.columns)
        cells = "".join(f"<td>{cell}</td>" for cell in others)
        cells += f'<td class="moving" data-row="{escape(row["row"])}">-</td>' if moving else ""
        body.append(f"<tr><th scope=row>{first}</th>{cells}</tr>")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{title}">'
        f"<table><caption><p>{escape(table.caption)}</p></caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _sliders(report: Mapping[str, Any]) -> str:
    price = report["about"]["price_per_1000"]
    most = max(100.0, 4 * price)
    return (
        '<form class="sliders" onsubmit="return false"><label for="price">Price of 1 000 queries</label>'
        f'<input type="range" id="price" min="0" max="{most:g}" step="0.1" value="{price:g}">'
        '<output id="price_shown" for="price"></output><label for="level">Agreement that counts as stolen, %</label>'
        '<input type="range" id="level" min="10" max="99" step="1" value="70">'
        '<output id="level_shown" for="level"></output></form>'
    )


_STYLE = """
:root{color-scheme:light dark;--ink:#1a1a1a;--paper:#fff;--line:#767676;--shade:#f2f2f2;--link:#0b57d0}
@media(prefers-color-scheme:dark){:root{--ink:#e8e8e8;--paper:#161616;--line:#8c8c8c;--shade:#242424;--link:#8ab4f8}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
header,main{max-width:72rem;margin:0 auto;padding:0 1rem}
a{color:var(--link)}
.scroll{overflow-x:auto;max-width:100%;border:1px solid var(--line)}
:focus-visible{outline:3px solid var(--link);outline-offset:2px}
table{border-collapse:collapse;font-size:.875rem;overflow-wrap:normal;width:100%}
caption{text-align:left;padding:.5rem;caption-side:top}
caption p{margin:0;position:sticky;left:.5rem;max-width:calc(min(100vw,72rem) - 4rem)}
th,td{padding:.3rem .5rem;text-align:left;vertical-align:top;border-top:1px solid var(--line)}
thead th{background:var(--shade)}
td{font-variant-numeric:tabular-nums}
tbody th{font-weight:600;min-width:9rem}
figure{margin:1rem 0;overflow-x:auto}
img{min-width:34rem;max-width:100%;height:auto;background:#fff}
pre{overflow-x:auto;padding:.5rem;background:var(--shade)}
.sliders{display:grid;grid-template-columns:minmax(10rem,auto) 1fr 5rem;gap:.5rem;align-items:center;margin:1rem 0}
.sliders input{width:100%;min-width:0}
@media(max-width:40rem){.sliders{grid-template-columns:1fr 4.5rem}.sliders label{grid-column:1/-1}}
@media print{:root{--ink:#000;--paper:#fff;--line:#888;--shade:#eee;--link:#000}
 .scroll{overflow:visible;border:0}table{font-size:7pt}.sliders{display:none}section{break-before:auto}
 thead{display:table-header-group}tr,figure{break-inside:avoid}
 img,caption p{min-width:0;max-width:100%}body{font-size:10pt}th,td{padding:1pt 3pt}tbody th{min-width:0}}
"""

# The same interpolation as curves.queries_to.
_SCRIPT = """
'use strict';
const curves = JSON.parse(document.getElementById('curves').textContent);
const price = document.getElementById('price'), level = document.getElementById('level');
function queriesTo(curve, wanted) {
  if (curve[0][1] >= wanted) return 0;
  for (let k = 1; k < curve.length; k++) {
    const [low, below] = curve[k - 1], [high, above] = curve[k];
    if (above >= wanted) {
      const share = (wanted - below) / (above - below);
      return low ? low * Math.pow(high / low, share) : share * high;
    }
  }
  return null;
}
function update() {
  document.getElementById('price_shown').textContent = Number(price.value).toFixed(2);
  document.getElementById('level_shown').textContent = level.value + ' %';
  for (const cell of document.querySelectorAll('td.moving')) {
    const curve = curves[cell.dataset.row], found = queriesTo(curve, level.value / 100);
    cell.textContent = found === null ? 'not reached (> ' + curve[curve.length - 1][0] + ')'
      : found === 0 ? 'none' : Math.round(found) + ' queries, ' + (found * price.value / 1000).toFixed(2);
  }
}
price.addEventListener('input', update);
level.addEventListener('input', update);
update();
"""
