"""The owner's audit of a video classifier: what stops a thief, and what that costs honest users.

    python audit.py --demo --quick
    python audit.py --victim onnx:model.onnx --in-domain mine/train --aux ucf101 --val mine/val --traffic mine/uploads

Trains clones of the victim on what it would answer: each answer type at several budgets, each defence at equal honest cost
under attackers who know it, detectors on honest accounts and on thefts, a watermark beside innocent students. The plan, its
minutes and its price are printed first. The victim's answers are recorded once and replayed; a cell that is done is not run
again, so that the same command goes on after any interruption. Writes report.html, report.md, report.json, CSVs and PNGs.

The thief's recipe is that of grey_box/swin_to_r21_kd.py. docs/audit.md says how to read the report.
"""

import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
from torch import Tensor

from extraction import distributed, options
from extraction.audit import page, report, traffic
from extraction.audit.alarms import (
    find_alarms,
    fit_detectors,
    list_thefts,
    report_false_alarms,
    report_responses,
    report_thefts,
)
from extraction.audit.cells import Bench, Fit, fit_to_honest, read_cell, replay
from extraction.audit.live import Estimate, Live
from extraction.audit.plan import SCALES, Cell, Plan, Prices, Scale, estimate_seconds, list_live_wires, plan_cells
from extraction.audit.recording import Recording, Views, record
from extraction.audit.students import Recipe
from extraction.compute import Compute
from extraction.data.augment import Augmentation
from extraction.data.clips import Clips
from extraction.data.folders import find_aux_videos, find_videos, require_folder
from extraction.data.queries import QuerySet
from extraction.errors import UserError, printable
from extraction.evaluation.sweep import Step, run_cells
from extraction.experiment import PROJECT, experiment, open_audit, run_script
from extraction.generators import create_generator
from extraction.runs import Run, current_commit
from extraction.students import Student, create_student
from extraction.victims.detectors import Stream
from extraction.victims.ownership import verify
from extraction.victims.query_interface import Victim, VictimModel
from extraction.victims.wire import name_wire, send
from extraction.weights import write_text

# More than run at a time, so that the last one does not run alone for long.
_SHARES_PER_JOB, _SHARES = 4, 32


@dataclass(frozen=True, kw_only=True)
class Config(
    options.Options, options.InDomainOptions, options.FootageOptions, options.TransferOptions, options.ScoredVictimOptions,
    options.GeneratorOptions, options.SweepOptions,
):  # fmt: skip
    victim: str = "swin_b_k400"
    student: str = "r2plus1d_34"
    student_weights: str | None = "weights/r2plus1d_34_clip32_ig65m_from_scratch-449a7af9.pth"
    in_domain: str = "datasets/kinetics400_5per"
    aux: tuple[str, ...] = ("ucf101", "hmdb51")
    val: str = "datasets/kinetics400_val"
    traffic: tuple[str, ...] = ()
    """Folders of your honest users' videos, longer than a clip: of these their accounts are made."""
    quick: bool = False
    """A first look: fewer answer types, defences, budgets and accounts, half the queries."""
    thorough: bool = False
    """More budgets, seeds, accounts and innocent students, and students trained three times as long."""
    price_per_1000: options.Rate = 16.7
    """Price of 1 000 queries, for the report; 16.7: 10 s of video each at 0.10 a minute (whole minutes: 100)."""
    answers: tuple[str, ...] = ()
    """Answer types to test: logits, probs, top5, "2 decimals", "1 decimal", label; by default the scale's."""
    defences: tuple[str, ...] = ()
    """Defences to test (docs/defences.md); by default the scale's."""
    accounts: Annotated[int, options.Range(2)] | None = None
    """Honest accounts of each profile; by default the scale's."""
    query_budget: options.Natural | None = None
    """The thief's largest budget; by default the scale's share of all views."""
    live_budget: options.Natural | None = None
    """The most queries of each data-free or crafted attack, which run live; by default the scale's; 0: none is run."""
    wire: str | None = None
    """How clips reach the victim: float, uint8, or h264 or h264:CRF, encoded and decoded again; None: as floats."""
    views_per_clip: options.Count | None = 4
    num_frames: int = 32
    clip_interval: int = 32
    size: int = 224
    epochs: int = 10
    head_lr: float = 3e-5
    body_lr: float = 3e-6
    label_weight: options.Rate = 10.0
    """Weight of the true-label loss next to the victim's, per clip."""
    num_directions: options.Count = 10
    """Random directions per gradient estimate (m) of the data-free attack."""
    generator_lr: options.Rate = 1e-5
    share: tuple[int, ...] = ()
    """What --jobs starts: run these cells, by number, of the audit two folders above --out-dir, and write no report."""


DEMO = options.IN_DOMAIN_DEMO | dict(
    victim="demo_swin", student="r2plus1d_tiny", epochs=9, head_lr=3e-3, body_lr=3e-3, label_weight=1.0,
    val="datasets/demo_unseen/val", traffic=("datasets/demo/traffic", "datasets/demo/cameras"),
    generator="layered", num_directions=2, epsilon=0.03, generator_lr=3e-4,
)  # fmt: skip


def choose_scale(config: Config) -> tuple[str, Scale]:
    """The name and the constants of the scale that the flags ask for. Raises UserError for two at once."""
    if config.quick and config.thorough:
        raise UserError("--quick and --thorough: choose one")
    name = "quick" if config.quick else "thorough" if config.thorough else "default"
    scale = SCALES[name]
    scale = scale if config.accounts is None else scale._replace(num_accounts=config.accounts)
    return name, scale if config.live_budget is None else scale._replace(live_budget=config.live_budget)


def open_generator(compute: Compute, config: Config, num_classes: int) -> Any:
    return create_generator(config.generator, num_classes, config.num_frames, config.size).to(compute.device)


def measure_prices(compute: Compute, model: VictimModel, config: Config, num_classes: int, live: bool) -> Prices:
    """Seconds of what `Prices` has, a clip each: the median of three after a first. `live`: of live attacks too."""
    count = min(config.batch_size, 16)
    clips = torch.rand(count, 3, config.num_frames, config.size, config.size, device=compute.device)
    student = compute.prepare(create_student(config.student, num_classes))

    def step() -> None:
        student.train()(clips).log_softmax(1).mean().backward()

    @torch.no_grad()
    def predict() -> None:
        student.eval()(clips).sum().item()

    works: list[Callable[[], object]] = [step, predict, lambda: model.model(clips).sum().item()]
    if live:
        generator = open_generator(compute, config, num_classes)
        classes = torch.arange(count, device=compute.device) % num_classes

        @torch.no_grad()
        def generate() -> Tensor:
            return generator.render(generator(torch.randn(count, generator.noise_dim, device=compute.device), classes))

        def craft() -> None:
            wanted = clips.clone().requires_grad_(True)
            torch.autograd.grad(student.eval()(wanted).sum(), wanted)[0].sum().item()

        sent = generate()
        works += [
            lambda: generate().sum().item(), craft, lambda: send(sent, list_live_wires(name_wire(config.wire))[-1])
        ]  # fmt: skip
    found = []
    for work in works:
        times = []
        for _ in range(4):
            begin = time.perf_counter()
            work()
            times.append((time.perf_counter() - begin) / count)
        found.append(median(times[1:]))
    return Prices(*found)


def print_plan(
    plan: Plan, scale: str, num_asked: int, num_honest: int, num_accounts: int, seconds: float, price: float
) -> None:
    groups = {group: sum(cell.group == group for cell in plan.cells) for group in dict.fromkeys(c.group for c in plan.cells)}
    print(f"plan ({scale}): {len(plan.cells)} cells, {plan.num_students} students of {plan.recipe_clips} clips each")
    print("  " + ", ".join(f"{group} {count}" for group, count in groups.items()))
    print(f"  budgets {', '.join(map(str, plan.budgets))}; {num_asked} queries are answered, once, for all cells")
    if plan.live_queries:
        print(f"  {plan.live_queries} queries more of attacks that run live, each with its own meter")
    print(f"  {num_honest} clips of {num_accounts} honest accounts, and the held-out videos: the owner's own, no queries")
    print(f"  a thief pays {plan.budgets[-1] * price / 1000:.2f} for the largest budget, at {price:g} per 1 000 queries")
    print(f"  about {max(1, round(seconds / 60))} minutes on this machine, one cell at a time", flush=True)


def hand_out(config: Config, run: Run, cells: list[Cell]) -> None:
    """Run an audit's cells in shares, by processes of their own. Raises UserError when some failed."""
    # What may be the student of another cell comes after it.
    for part in ([cell.same_as is None for cell in cells], [cell.same_as is not None for cell in cells]):
        left = [n for n, cell in enumerate(cells) if part[n] and read_cell(run.folder / "cells", cell) is None]
        count = min(len(left), _SHARES if config.cluster else _SHARES_PER_JOB * config.jobs)
        steps = []
        for number in range(count):
            share = tuple(left[number::count])
            folder, title = run.folder / "shares" / str(share[0]), f"cells {', '.join(map(str, share))}"
            flags = options.to_flags(replace(config, share=share, out_dir=str(folder), jobs=1, cluster=None))
            steps.append([Step(title, title, str(folder), (str(PROJECT / "audit.py"), *flags))])
        if failed := run_cells(steps, config.jobs, config.cluster):
            raise UserError(f"failed: {'; '.join(failed)}; run the same again to try these once more")


def say_ownership(bench: Bench, cells: list[dict]) -> list[dict]:
    """A row for each suspect, and one for every innocent student beside the others."""
    _, labels = bench.triggers()
    innocent = [torch.tensor(cell["on_triggers"]) for cell in cells if cell["group"] == "innocent"]
    agreements = [cell["scores"]["agreement_at_1"] for cell in cells if cell["group"] == "innocent"]
    suspects = {"naive": "clone", "top-1": "clone of labels", "agreeing views": "cleaned clone"}
    found = [
        (suspects[cell["attacker"]], torch.tensor(cell["on_triggers"]), innocent, cell["scores"]["agreement_at_1"])
        for cell in cells
        if cell["group"] == "ownership"
    ]
    for number, own in enumerate(innocent):
        others = [other for other in innocent if other is not own]
        found.append((f"innocent student {number}", own, others, agreements[number]))
    rows = []
    for suspect, predictions, nulls, agreement in found:
        if len(labels) and nulls:
            claim = verify(predictions, nulls, labels)
            rows.append(dict(row=suspect, suspect=suspect, triggers=len(labels), agreement=agreement, **claim._asdict()))
    return rows


@experiment
def main(config: Config, run: Run) -> dict:
    distributed.require_one_process("an audit")
    scale_name, scale = choose_scale(config)
    wire = name_wire(config.wire)
    folders = [require_folder(folder, "videos of your honest users") for folder in traffic.list_folders(config.traffic)]
    attack, model, key = open_audit(config, run)
    compute, evaluator = attack.compute, attack.evaluator
    if not evaluator.victim_scores.get("top1"):
        print("no labels in --val: honest top-1 is left out, agreement with the victim is not")

    # What a thief may send, what honest users send, what is held out.
    videos = find_videos(config.in_domain, model.classes, "train", config.in_domain_list)
    clips = Clips(videos + find_aux_videos(config.aux, config.demo), **config.cut, **config.shape)
    evaluator.refuse_overlap(clips)
    augmentation = Augmentation(config.hflip, config.brightness, config.rotation)
    queries = QuerySet(clips, augmentation, config.views_per_clip or 1, config.seed)
    estimate = Estimate(config.num_directions, config.epsilon, config.generator_lr)
    plan = plan_cells(
        scale, len(clips), config.views_per_clip or 1, config.query_budget, config.batch_size, config.epochs, config.answers,
        config.defences, wire, estimate.num_directions,
    )  # fmt: skip
    span = ((config.num_frames - 1) * config.stride + 1) // 4
    windows = Clips(
        [video for folder in folders for video in find_videos(folder, None)], clip_interval=max(1, span), **config.shape
    )
    accounts = traffic.draw_accounts(traffic.group_windows(windows), scale.num_accounts, scale.account_queries, config.seed)
    honest = traffic.list_distinct(accounts)
    views = Views(queries, config.batch_size, config.num_workers, compute.device)
    shuffle = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(views), generator=shuffle)[: plan.budgets[-1]].tolist()
    one_order = torch.randperm(len(clips), generator=shuffle)[: plan.one_view_budget].tolist()
    asked = list(dict.fromkeys(order + one_order))
    held_out = [(place, "") for place in range(len(evaluator.clips))]

    base, to_run, seconds = run.folder, plan.cells, 0.0
    if config.share:
        base, to_run = run.folder.parents[1], [plan.cells[number] for number in config.share]
    else:
        prices = measure_prices(compute, model, config, len(model.classes), plan.live_queries > 0)
        seconds = estimate_seconds(plan, prices, len(asked), len(honest) + len(held_out), len(held_out))
        print_plan(plan, scale_name, len(asked), len(honest), len(accounts), seconds, config.price_per_1000)
    run.begin()

    # The owner records; the meter stands at exactly what was planned.
    def ask(name: str, keys: list[bytes], load: traffic.Loader, desc: str) -> tuple[Recording, int]:
        victim = Victim(model, "logits", len(keys), wire=wire)
        return record(base / "recorded", name, keys, load, victim, desc), victim.num_queries

    thefts, num_queries = ask("thief", [views.key(view) for view in asked], views.loader(asked), "recording the thief's views")
    open_loader = partial(
        traffic.open_loader, batch_size=config.batch_size, num_workers=config.num_workers, device=compute.device
    )
    footage, _ = ask("honest", traffic.name_clips(windows, honest), open_loader(windows, honest), "recording honest users")
    val, _ = ask(
        "val", traffic.name_clips(evaluator.clips, held_out), open_loader(evaluator.clips, held_out), "recording --val"
    )
    streams = traffic.make_streams(accounts, honest, footage)
    place = {clip: k for k, clip in enumerate(honest)}

    def clips_of(late: bool) -> list[int]:
        chosen = {place[q.window, q.change] for account in accounts if account.held_out == late for q in account.queries}
        return sorted(k for k in chosen if footage.decoded[k])

    to_fit, others = footage.take(clips_of(False)), footage.take(clips_of(True))
    labels = torch.tensor([ref.label for ref in evaluator.clips.refs])
    fits: dict[tuple[str, float], Fit] = {}
    for cell in to_run:
        if cell.defence and cell.strength and (cell.defence, cell.strength) not in fits:
            fit = fit_to_honest(cell.defence, cell.strength, to_fit, others, val, labels, key)
            fits[cell.defence, cell.strength] = fit
            cost = f"not possible: {fit.reason}" if fit.reason else f"honest L1 {fit.cost['l1']:.3f} measured"
            print(f"{cell.defence} at {cell.strength:g}: {cost}", flush=True)

    # Detectors.
    fitted = fit_detectors(accounts, streams)
    asked_place = {view: k for k, view in enumerate(asked)}
    all_places, one_places = ([asked_place[view] for view in chosen] for chosen in (order, one_order))
    naive = Stream(thefts.thumbnails[all_places], thefts.probs[all_places])

    # The cells.
    folder = base / "cells"
    folder.mkdir(exist_ok=True)
    if config.jobs > 1 or config.cluster:
        hand_out(config, run, plan.cells)

    def create() -> Student:
        return compute.prepare(create_student(config.student, len(model.classes), config.student_weights))

    recipe = Recipe(plan.recipe_clips, config.head_lr, config.body_lr, config.label_weight)
    live = Live(
        open_run=lambda cell: Run(cell.row, base / "live" / cell.name, cell, config.checkpoint_seconds), model=model,
        key=key, parameters={name: fit.parameter for name, fit in fits.items()}, create=create,
        create_generator=lambda: open_generator(compute, config, len(model.classes)),
        queries=QuerySet(Clips(videos, **config.cut, **config.shape), augmentation, None, config.seed),
        clip_shape=(3, config.num_frames, config.size, config.size), batch_size=config.batch_size,
        num_workers=config.num_workers, recipe=recipe, estimate=estimate, evaluator=evaluator,
    )  # fmt: skip
    bench = Bench(
        folder=folder, views=views, asked=asked, recording=thefts, order=order, one_order=one_order, fits=fits, create=create,
        recipe=recipe, evaluator=evaluator, key=key, live=live, alarms=find_alarms(fitted, naive),
        checkpoint_seconds=config.checkpoint_seconds, stop_asked=lambda: run.stop_asked,
    )  # fmt: skip
    done = {cell.name: kept for cell in plan.cells if (kept := read_cell(folder, cell)) is not None}
    with run.interruptible():
        for number, cell in enumerate(to_run, 1):
            done[cell.name] = bench.run(cell, done, f"cell {number} of {len(to_run)}")
            say_cell(number, len(to_run), cell, done[cell.name])
            if run.stop_asked:
                raise KeyboardInterrupt(f"{number} cells are in {base}; run the same command again to continue")
    if config.share:
        return {}
    cells = [done[cell.name] for cell in plan.cells]

    # The report.
    unlike = [k for k in clips_of(True) if k not in set(clips_of(False))]
    similar = Stream(footage.thumbnails[unlike], footage.probs[unlike])
    rows = {"all": next(c.row for c in plan.cells if c.group == "answers" and c.answers == plan_answers(plan)), "one": ""}
    rows["one"] = next(cell.row for cell in plan.cells if cell.group == "views")
    watched = list_thefts(thefts.thumbnails, thefts.probs, all_places, one_places, similar, rows)

    def respond(name: str, stream: Stream) -> torch.Tensor:
        fit = next((fit for (defence, _), fit in fits.items() if defence == name), None)
        return replay(name, 0.0 if fit is None else fit.parameter or 0.0, stream, key)

    refs = evaluator.clips.refs
    conferred, unconferred = report.tabulate_conferred(
        cells, val.logits.argmax(1), labels, torch.tensor([ref.video for ref in refs])
    )
    tables = dict(
        answers=report.tabulate_answers(cells, config.price_per_1000),
        defences=report.tabulate_defences(cells, fits),
        live=report.tabulate_live(cells),
        detectors=report_thefts(fitted, watched, report.make_agreement(cells), plan.budgets[-1]),
        responses=report_responses(cells, fitted, accounts, streams, bench.alarms, respond),
        false_alarms=report_false_alarms(fitted, accounts, streams),
        ownership=say_ownership(bench, cells),
        conferred=conferred,
    )
    confidence = footage.probs[footage.decoded].amax(1)
    about = dict(
        victim=config.victim, fingerprint=model.fingerprint, num_classes=len(model.classes), student=config.student, wire=wire,
        num_val_videos=evaluator.clips.num_videos, victim_top1=evaluator.victim_scores.get("top1"),
        confidence_median=confidence.median().item(), confidence_5=confidence.quantile(0.05).item(),
        traffic=[str(folder) for folder in folders], seeds=sorted({cell.seed for cell in plan.cells}), commit=current_commit(),
        price_per_1000=config.price_per_1000, scale=scale_name, command=shlex.join(["python", *sys.argv]), config=run.config,
    )  # fmt: skip
    planned = dict(
        cells=len(plan.cells), students=plan.num_students, clips_per_student=plan.recipe_clips, queries=len(asked),
        queries_answered=int(thefts.decoded.sum()), live_queries=plan.live_queries,
        budgets=plan.budgets, honest_clips=len(honest), honest_accounts=len(accounts),
    )  # fmt: skip
    result: dict = dict(about=about, plan=planned, innocent=dict(agreement=report.find_baseline(cells)), tables=tables)
    result["not_tested"] = [
        *(f"{d.name}: {d.reason}" for d in fitted if d.constants is None), *list_untested(scale, plan),
        *([] if tables["ownership"] else [f"ownership: none of {len(order)} answers was chosen to carry a watermark"]),
        *unconferred, *report.NOT_TESTED,
    ]  # fmt: skip
    result["verdict"] = report.write_verdict(result, config.price_per_1000)
    result["review"] = report.review(result)
    result["cells"] = [{name: value for name, value in cell.items() if name not in ("seconds", "on_val")} for cell in cells]
    result["times"] = dict(
        seconds_since_last_start=round(run.seconds, 1), planned=round(seconds, 1),
        cells={cell["name"]: cell["seconds"] for cell in cells if cell["scores"]},
        defence_ms={f"{name} {strength:g}": fit.cost.get("ms") for (name, strength), fit in fits.items()},
        queries_asked_now=num_queries,
    )  # fmt: skip
    write_report(run.folder, result, cells)
    return result


def plan_answers(plan: Plan) -> str:
    """The answer type behind which defences and detectors stand."""
    return next(cell.answers for cell in plan.cells if cell.group == "views")


def list_untested(scale: Scale, plan: Plan) -> list[str]:
    """What a thorough audit has and this one has not."""
    most = SCALES["thorough"]
    answers = [kind for kind in most.answers if kind not in {cell.answers for cell in plan.cells}]
    defences = [name for name in most.defences if name not in {cell.defence for cell in plan.cells}]
    strengths = [f"{s:g}" for s in most.strengths if s not in scale.strengths]
    found = {"answer types": answers, "defences": defences, "honest L1 of defences": strengths}
    lines = [f"{what}: {', '.join(names)}" for what, names in found.items() if names]
    return lines + ([] if plan.live_queries else ["data-free attacks and crafted queries (--live-budget)"])


def say_cell(number: int, total: int, cell: Cell, result: dict) -> None:
    told = result.get("reason") or f"agreement@1 {100 * result['scores']['agreement_at_1']:.1f} %"
    same = f" (as {result['same_as']})" if result.get("same_as") else ""
    print(
        printable(f"[{number}/{total}] {cell.group}: {cell.row}, {cell.budget} queries, seed {cell.seed}: {told}{same}"),
        flush=True,
    )


def write_report(folder: Path, result: dict, cells: list[dict]) -> None:
    """Write all files of the report, report.json last."""
    pictures = report.draw_figures(folder, result, cells)
    report.write_tables(folder, result["tables"] | {"cells": result["cells"], "review": result["review"]})
    files = {
        "report.md": page.to_markdown(result, pictures),
        "report.html": page.to_html(result, pictures, folder),
        "report.json": json.dumps(result, indent=1) + "\n",
    }
    for name, text in files.items():
        write_text(folder / name, text)
    print("\n" + "\n".join(f"- {sentence['text']}" for sentence in result["verdict"]))
    print(f"\nthe report is {printable(folder / 'report.html')}")


if __name__ == "__main__":
    run_script(main, Config, DEMO)
