"""Many experiments, one after the other or several at a time, and the table of what came out, as Markdown and as a picture."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from torch import Tensor

from extraction.compute import Compute, choose_compute
from extraction.data.clips import Clips, ClipShape
from extraction.data.demo import write_demo_set
from extraction.data.folders import find_videos
from extraction.errors import UserError, printable
from extraction.evaluation.plots import draw_bars
from extraction.evaluation.results import SCORES, UNSEEN_SCORES, count_queries, describe_difference, percent, read_run
from extraction.evaluation.scoring import name_clips, predict_videos, score
from extraction.evaluation.sweep import Step, run_cells
from extraction.students import load_student
from extraction.victims.zoo import load_model
from extraction.weights import read_state, save_weights, write_text

PROJECT = Path(__file__).parents[2]
UNSEEN = Path("datasets/demo_unseen")  # 1 200 demo videos that no experiment's constants were settled on
TUNE = Path("datasets/demo_tune")  # 600 others, which are there for that; no table shows them

# The columns of a table: with labels, and where students are scored by agreement alone.
_LABELLED = UNSEEN_SCORES | {name: SCORES[name] for name in ("top1", "top5", "agreement_at_1")}
_UNLABELLED = {"agreement_at_1": "agreement@1", "agreement_at_5": "agreement@5", "mean_kl": "mean KL, nats"}


class Experiment(NamedTuple):
    """A row of the table: a script of the project and its flags, where `{runs}` stands for the folder of this seed's runs."""

    name: str  # of its run folder
    script: str
    published: str  # top-5 / top-1 in percent, as published; "-": none
    flags: tuple[str, ...] = ()


def write_unseen_set() -> Path:
    """Draw the unseen demo videos, unless they are there."""
    return write_demo_set(UNSEEN, {"val": 100}, seed=1)


def write_tune_set() -> Path:
    """Draw the demo videos on which constants are chosen, unless they are there."""
    return write_demo_set(TUNE, {"val": 50}, seed=2)


def run_all(
    experiments: Sequence[Experiment],
    out_dir: str | Path,
    demo: bool,
    seeds: Sequence[int],
    only: Sequence[str] = (),
    document: str | None = None,
    against: str | None = None,
    jobs: int = 1,
    cluster: str | None = None,
) -> str:
    """Run every experiment with every seed, each in a process and a run folder of its own: `out_dir/seed_0/name`.

    What is finished is not run again; what was interrupted, or ended by its query budget, goes on. In the demo each student is
    scored on the unseen videos too. Writes and prints the table, and returns it; `document` names a script between whose
    markers docs/results.md gets the table. `only` names the experiments to take, `against` the one that the table compares the
    others with. `jobs` and `cluster` are those of `run_cells`: a cell is an experiment and what builds on it, of one seed. The
    clips that the runs decode are kept in `out_dir/clip_cache` until none has failed.
    Raises UserError for a name that is none, and at the end, with their names, when experiments failed; the others
    are in the table all the same.
    """
    if not seeds:
        raise UserError("--seeds: name at least one")
    unknown = {*only, *([against] if against else [])} - {experiment.name for experiment in experiments}
    if unknown:
        raise UserError(f"no experiment is called {min(unknown)}; there are {', '.join(e.name for e in experiments)}")
    experiments = [experiment for experiment in experiments if not only or experiment.name in only]
    chains, alone = _chain(experiments), jobs == 1 and cluster is None
    cache = Path(out_dir) / "clip_cache"  # of all seeds
    numbers = {experiment.name: number for number, experiment in enumerate(experiments, 1)}

    def plan_step(seed: int, experiment: Experiment) -> Step:
        name, script, _, flags = experiment
        runs = Path(out_dir) / f"seed_{seed}"
        about = f"{script} {printable(' '.join(flags))}" if alone else name
        given = [*(["--demo"] if demo else []), *(flag.replace("{runs}", str(runs)) for flag in flags)]
        command = [PROJECT / script, "--out-dir", runs / name, "--seed", seed, "--clip-cache", cache, *given]
        title = f"[seed {seed}, {numbers[name]} of {len(experiments)}] {about}"
        return Step(f"{name} (seed {seed})", title, str(runs / name), tuple(str(part) for part in command))

    cells = [
        [plan_step(seed, e) for e in chain if not _is_done(Path(out_dir) / f"seed_{seed}" / e.name)]
        for seed in seeds
        for chain in chains
    ]
    failed = run_cells([cell for cell in cells if cell], jobs, cluster)
    if demo:
        for seed in seeds:
            for experiment in experiments:
                score_unseen(Path(out_dir) / f"seed_{seed}" / experiment.name)
    failure = f"failed: {', '.join(failed)}; run the same again to try these once more"
    try:
        table = write_table(experiments, out_dir, seeds, against)
    except UserError as error:
        raise UserError(f"{error}; {failure}" if failed else str(error)) from None
    print(f"\n{table}\nin {printable(out_dir)}/table.md and table.png")
    if document:
        write_between_markers(PROJECT / "docs/results.md", document, table)
    if failed:
        raise UserError(failure)
    shutil.rmtree(cache, ignore_errors=True)  # gigabytes that no run waits for
    return table


def write_table(
    experiments: Sequence[Experiment], out_dir: str | Path, seeds: Sequence[int], against: str | None = None
) -> str:
    """Write `table.md` and `table.png` into `out_dir` from the results there are. Returns the Markdown.

    With several seeds a figure is their mean and standard deviation. Averaged weights (`--ema`) have a row of their own, below
    their run's. `against` names an experiment: a column more has the paired differences to it in the table's first score, with
    their standard error. Raises UserError when there are no results at all.
    """
    out_dir = Path(out_dir)

    def read_runs(name: str) -> dict[int, dict]:
        return {seed: results for seed in seeds if (results := read_run(out_dir / f"seed_{seed}" / name))}

    by_seed = {experiment.name: read_runs(experiment.name) for experiment in experiments}
    found = {name: list(runs.values()) for name, runs in by_seed.items()}
    some = next((results[0] for results in found.values() if results), None)
    if some is None:
        raise UserError(f"{out_dir}: no experiment has left results there")
    labelled = any(r.get("top1") is not None for results in found.values() for r in results)
    metrics = _LABELLED if labelled else _UNLABELLED
    published = labelled or any(experiment.published != "-" for experiment in experiments)
    first_score = next((name for name in metrics if any(r.get(name) is not None for runs in found.values() for r in runs)), "")
    reference = _pick_score(read_runs(against), first_score) if against else {}
    difference = [f"{metrics[first_score]}: difference to {against}"] if against and first_score else []
    head = ["experiment", "victim", "student", "queries", *metrics.values(), *difference, "seconds"]
    head += ["published top-5 / top-1"] * published
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    rows: list[tuple[str, Experiment, dict[int, dict]]] = []
    for experiment in experiments:
        runs = by_seed[experiment.name]
        rows.append((experiment.name, experiment, runs))
        if any("agreement_at_1_ema" in r or "top1_ema" in r for r in runs.values()):
            rows.append((f"{experiment.name}, averaged", experiment, {seed: _averaged(r) for seed, r in runs.items()}))
    for name, experiment, runs in rows:
        results = list(runs.values())
        if not results:
            cells = [name, *["-"] * (len(head) - 1 - published), *[experiment.published] * published]
            lines.append(f"| {' | '.join(cells)} |")
            continue
        first = results[0]
        victim = "-"
        if first["victim"]:
            victim = re.sub(r"(^|:)[^:]*/", r"\1", first["victim"])  # a file's, without its folder
            victim += f" {percent(first['victim_top1'])}" if labelled else ""
        scores = [_describe_metric(results, metric) for metric in metrics]
        queries = describe_spread([float(count_queries(r)) for r in results], 0)
        seconds = describe_spread([r["seconds"] for r in results], 0)
        if difference:
            own = {} if name == against else _pick_score(runs, first_score)
            scores.append(describe_difference(own, reference, 2 if first_score == "mean_kl" else 1))
        cells = [name, victim, first["student"], queries, *scores, seconds, *[experiment.published] * published]
        lines.append(f"| {' | '.join(cells)} |")
    commits = sorted({r["commit"] for results in found.values() for r in results})
    unseen = next((r["num_unseen_videos"] for results in found.values() for r in results if "num_unseen_videos" in r), None)
    others = f" (unseen: on {unseen} others, drawn for this alone)" if unseen else ""
    text = "\n".join(lines) + (
        f"\n\nPercent on {some['num_val_videos']} held-out videos{others}, chance {100 * some['chance_top1']:.1f}"
        f"{'' if labelled or len(seeds) > 1 else ', with 95 % intervals by video'}; "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(str(s) for s in seeds)}; commit {', '.join(commits)}."
        f"{' Differences: mean ± standard error, paired by seed.' if difference else ''}\n"
    )
    write_text(out_dir / "table.md", text)
    bars = {
        name: {s: mean(known) for s in ("top1", "agreement_at_1") if (known := [r[s] for r in results if r.get(s) is not None])}
        for name, results in found.items()
        if results
    }
    draw_bars(out_dir / "table.png", bars, some["chance_top1"])
    return text


def _averaged(results: dict) -> dict:
    """The results of a run with the scores of its averaged weights (`--ema`) in the place of the student's own."""
    scores = {name.removesuffix("_ema"): value for name, value in results.items() if name.endswith("_ema")}
    return results | dict(intervals={}, mean_kl=None) | scores


def _chain(experiments: Sequence[Experiment]) -> list[list[Experiment]]:
    """The experiments in chains: what needs a file of another one's run comes after it, in the same chain."""
    chains: list[list[Experiment]] = []
    for experiment in experiments:
        needed = set(re.findall(r"{runs}/([^/]+)", " ".join(experiment.flags)))
        before = [chain for chain in chains if needed & {other.name for other in chain}]
        chains = [chain for chain in chains if chain not in before] + [[*(e for chain in before for e in chain), experiment]]
    return chains


def _is_done(folder: Path) -> bool:
    results = read_run(folder)
    return results is not None and results["stopped"] in ("epochs", "iterations")


def score_unseen(folder: Path) -> None:
    """Write `unseen.json` beside the results of a finished demo run, unless it is there: top-1 and agreement@1.

    With averaged weights also theirs, `unseen_top1_ema` and `unseen_agreement_at_1_ema`.
    """
    results = read_run(folder)
    if results is None or ("unseen_top1" in results and (results["victim"] is None or "unseen_agreement_at_1" in results)):
        return
    kept: dict[str, float] = {}
    for suffix in ("", "_ema"):
        weights = folder / f"student{suffix}.safetensors"
        if suffix and not weights.is_file():
            continue
        student, about = load_student(results["student"], weights)
        if missing := {"num_frames", "stride", "size", "classes"} - set(about):
            raise UserError(f"{weights}: does not say its {min(missing)}; delete {folder} and run it again")
        shape = ClipShape(num_frames=about["num_frames"], stride=about["stride"], size=about["size"], fps=about.get("fps"))
        clips = Clips(find_videos(write_unseen_set(), about["classes"], "val"), views=(1, 1), **shape)
        compute = choose_compute()
        of_victim = None if results["victim"] is None else _answer_unseen(results, clips, compute)
        desc = f"unseen videos, {printable(folder.name)}"
        predictions = predict_videos(compute.prepare(student), clips, compute.device, desc=desc)
        scores = score(predictions.probs, predictions.labels, of_victim)
        kept |= {f"unseen_{name}{suffix}": scores[name] for name in ("top1", "agreement_at_1") if name in scores}
    write_text(folder / "unseen.json", json.dumps(kept | dict(num_unseen_videos=clips.num_videos)))


def _answer_unseen(results: dict[str, Any], clips: Clips, compute: Compute) -> Tensor:
    """The probabilities (V, num_classes) that a run's victim gives the unseen videos: the evaluator's, unmetered.

    Kept beside the videos, so that each victim is asked once. Raises UserError when the victim's weights are others by now.
    """
    path = UNSEEN / "victims" / f"{results['victim_fingerprint']}-{name_clips(UNSEEN, clips)}.safetensors"
    if not path.is_file():
        name, options = results["victim"], results["config"]
        files = dict(classes=options.get("victim_classes"), about=options.get("victim_about"))
        victim = load_model(name, options.get("victim_weights"), **files)
        if victim.fingerprint != results["victim_fingerprint"]:
            raise UserError(f"victim {name} is {victim.fingerprint} now, this run's was {results['victim_fingerprint']}")
        path.parent.mkdir(parents=True, exist_ok=True)
        probs = predict_videos(compute.prepare(victim), clips, compute.device, desc=f"unseen videos, {name}").probs
        save_weights(path, dict(probs=probs), dict(victim=name))
    return read_state(path)["probs"]


def write_between_markers(path: Path, name: str, text: str) -> None:
    """Replace what is between `<!-- name -->` and `<!-- end -->` in a Markdown file. Raises UserError without these lines."""
    old = path.read_text() if path.is_file() else ""
    before, start, rest = old.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not end:
        raise UserError(f"{path}: no lines <!-- {name} --> and <!-- end --> in it, between which the table belongs")
    write_text(path, f"{before}{start}\n{text}\n{end}{after}")


def _pick_score(runs: Mapping[int, dict], name: str) -> dict[int, float]:
    """A score of each seed that has it, in the table's unit."""
    return {seed: (1 if name == "mean_kl" else 100) * r[name] for seed, r in runs.items() if r.get(name) is not None}


def _describe_metric(results: Sequence[dict], metric: str) -> str:
    """The mean of several runs and how they differ; of a single one without labels the score with its interval by video."""
    scale = 1 if metric == "mean_kl" else 100
    digits = 2 if metric == "mean_kl" else 1
    shown = describe_spread([scale * r[metric] for r in results if r.get(metric) is not None], digits)
    if metric in _UNLABELLED and len(results) == 1 and results[0].get("top1") is None and metric in results[0]["intervals"]:
        low, high = results[0]["intervals"][metric]
        shown += f" ({scale * low:.{digits}f}-{scale * high:.{digits}f})"
    return shown


def describe_spread(values: Sequence[float], digits: int = 1) -> str:
    if not values:
        return "-"
    shown = f"{mean(values):.{digits}f}"
    varied = len(values) > 1 and len(set(values)) > 1
    return f"{shown} ± {stdev(values):.{digits}f}" if varied else shown
