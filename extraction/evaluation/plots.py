"""Pictures of a run: curves, bars, sheets of clips. Matplotlib and nothing else."""

import functools
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from extraction import distributed
from extraction.errors import printable


def draw_curve(path: str | Path, history: Sequence[dict], victim_top1: float | None, chance: float, title: str) -> None:
    """Draw accuracy and agreement along the epochs or iterations of a run, the queries used by then on a second axis above.

    Not against the queries: once answers come round again these stand still while the student learns on, and a student in
    mid-training is not the student that a budget of those queries gives (`draw_budgets` shows that). An epoch that the query
    budget cut short stands where it would have ended.
    """
    axis = "epoch" if "epoch" in history[0] else "iteration"
    figure, axes = _pyplot().subplots(figsize=(7, 4.5), layout="constrained")
    along = [point[axis] for point in history]
    for name, label in (
        ("agreement_at_1", "agreement@1 with the victim"),
        ("top1", "student top-1"),
        ("top5", "student top-5"),
    ):
        if name in history[0]:
            axes.plot(along, [100 * point[name] for point in history], marker="o", markersize=3, label=label)
    if victim_top1 is not None:
        axes.axhline(100 * victim_top1, color="black", linestyle="--", linewidth=1, label="victim top-1")
    axes.axhline(100 * chance, color="grey", linestyle=":", linewidth=1, label="chance top-1")
    axes.set(xlabel=axis, ylabel="%", ylim=(0, 102), title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _mark_queries(axes, {point[axis]: point["num_queries"] for point in history})
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=8)
    _save(figure, path, 120)


def draw_curves(path: str | Path, runs: Mapping[str, Sequence[dict]], chance: float, title: str) -> None:
    """Draw top-1 of several runs, along epochs: `runs` maps a name to a history. Without labels in one, agreement@1.

    The queries stand on a second axis where all the runs had used the same number at each epoch.
    """
    metric = "top1" if all("top1" in point for points in runs.values() for point in points) else "agreement_at_1"
    figure, axes = _pyplot().subplots(figsize=(7, 4.5), layout="constrained")
    for name, history in runs.items():
        shown = [point for point in history if metric in point]
        axes.plot([p["epoch"] for p in shown], [100 * p[metric] for p in shown], marker="o", markersize=3, label=name)
    axes.axhline(100 * chance, color="grey", linestyle=":", linewidth=1, label="chance")
    axes.set(xlabel="epoch", ylabel=f"{metric}, %", ylim=(0, 102), title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    used = {(point["epoch"], point["num_queries"]) for history in runs.values() for point in history}
    if len({epoch for epoch, _ in used}) == len(used):
        _mark_queries(axes, dict(sorted(used)))
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=8)
    _save(figure, path, 120)


def _mark_queries(axes, used: Mapping[float, int]) -> None:
    """A second x axis with the queries used at some of the points: `used` maps a place to a count. No axis without queries."""
    if not any(used.values()):
        return
    places = list(used)
    shown = places[:: -(-len(places) // 6)]  # six at most: they would run into one another
    above = axes.secondary_xaxis("top")
    above.set_xticks(shown, [str(used[place]) for place in shown])
    above.set_xlabel("queries used")


def draw_budgets(path: str | Path, curves: Mapping[str, Mapping[int, Sequence[float]]], metric: str) -> None:
    """Draw a score, 0 to 1, against queries: separate students, some for each budget, their mean with its least and most."""
    figure, axes = _pyplot().subplots(figsize=(7, 4.5), layout="constrained")
    for name, points in curves.items():
        budgets = sorted(points)
        shown = [[100 * score for score in points[budget]] for budget in budgets]
        means = [sum(scores) / len(scores) for scores in shown]
        reach = [
            [m - min(s) for m, s in zip(means, shown, strict=True)],
            [max(s) - m for m, s in zip(means, shown, strict=True)],
        ]
        axes.errorbar(budgets, means, reach, marker="o", markersize=3, capsize=2, label=name)
    axes.set_xscale("log")
    budgets = sorted({budget for points in curves.values() for budget in points})
    axes.set_xticks([b for b, after in pairwise([*budgets, math.inf]) if after > 1.2 * b])  # near ones would be on each other
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.minorticks_off()
    axes.set(xlabel="queries", ylabel=f"{metric}, %")
    least = min(100 * score for points in curves.values() for scores in points.values() for score in scores)
    axes.set_ylim(bottom=max(0, 10 * (least // 10) - 10))
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=8)
    _save(figure, path, 120)


def draw_trade_off(
    path: str | Path, points: Sequence[tuple[str, float, float]], lines: Mapping[str, float], xlabel: str, ylabel: str,
    log: bool = False,
) -> None:  # fmt: skip
    """Draw points (series, x, y) and level lines; y and levels are 0 to 1. A series is joined where x is not `log`."""
    figure, axes = _pyplot().subplots(figsize=(7, 4.5), layout="constrained")
    for place, name in enumerate(dict.fromkeys(series for series, _, _ in points)):
        own = sorted((x, 100 * y) for series, x, y in points if series == name)
        marker = "osD^vPX*"[place % 8]
        joined = "" if log else "-"
        axes.plot([x for x, _ in own], [y for _, y in own], joined, marker=marker, linewidth=1, alpha=0.8, label=name)
    for (name, level), style in zip(lines.items(), ("-", "--", ":", "-."), strict=False):
        axes.axhline(100 * level, color="grey", linestyle=style, linewidth=1, label=name)
    if log:
        axes.set_xscale("log", subs=(2, 5))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.xaxis.set_minor_formatter("{x:.0f}")
    axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 102))
    axes.grid(alpha=0.3)
    axes.legend(loc="best", fontsize=8)
    _save(figure, path, 120)


def draw_bars(path: str | Path, scores: Mapping[str, Mapping[str, float]], chance: float) -> None:
    """Draw top-1 and agreement@1 of several experiments as bars, beside chance; one that none has is left out."""
    figure, axes = _pyplot().subplots(figsize=(8, 0.8 + 0.45 * len(scores)), layout="constrained")
    named = {"agreement_at_1": "agreement@1", "top1": "top-1"}
    shown = {metric: label for metric, label in named.items() if any(metric in own for own in scores.values())}
    for number, (metric, label) in enumerate(shown.items()):
        places = [k + 0.4 * (number - (len(shown) - 1) / 2) for k in range(len(scores))]
        axes.barh(places, [100 * own.get(metric, 0.0) for own in scores.values()], height=0.38, label=label)
    axes.set_yticks(range(len(scores)), list(scores))
    axes.invert_yaxis()
    axes.axvline(100 * chance, color="grey", linestyle=":", linewidth=1, label="chance")
    axes.set(xlabel="% on held-out videos", xlim=(0, 102))
    axes.legend(loc="best", fontsize=8)
    _save(figure, path, 120)


def draw_clips(path: str | Path, clips: Tensor, captions: Sequence[str], num_frames: int = 8) -> None:
    """Draw a contact sheet of float (B, C, T, H, W) clips in [0, 1]: a row a clip, its caption above it."""
    clips = clips.detach().float().cpu()
    rows, length = len(clips), clips.shape[2]
    shown = [round(k * (length - 1) / max(1, num_frames - 1)) for k in range(min(num_frames, length))]
    figure, axes = _pyplot().subplots(rows, len(shown), figsize=(1.25 * len(shown), 1.5 * rows), squeeze=False)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - 0.25 / (1.5 * rows), wspace=0.04, hspace=0.25)
    for row, (clip, caption) in enumerate(zip(clips, make_drawable(captions), strict=True)):
        for column, frame in enumerate(shown):
            axes[row, column].imshow(clip[:, frame].permute(1, 2, 0).numpy(), interpolation="nearest")
            axes[row, column].axis("off")
        axes[row, 0].set_title(caption, fontsize=8, loc="left")
    _save(figure, path, 110)


def draw_queries(path: str | Path, views: Tensor, targets: Tensor, sources: Sequence[str], classes: Sequence[str]) -> None:
    """Draw the first clips that the victim saw, each under the name of its folder and the victim's top answer.

    The answer's number among the classes stands before a name that no font here draws.
    """
    confidence, top = targets.max(1)
    captions = [
        f"{source}: the victim says {_name_class(classes, label)} ({100 * share:.0f} %)"
        for source, label, share in zip(sources, top.tolist(), confidence.tolist(), strict=False)
    ]
    draw_clips(path, views[:8], captions[:8])


def _name_class(classes: Sequence[str], label: int) -> str:
    return classes[label] if make_drawable([classes[label]])[0] == classes[label] else f"class {label}, {classes[label]}"


def make_drawable(texts: Sequence[str]) -> list[str]:
    """The texts in one line each, with `\\u4e2d` for what no font here draws: Matplotlib would draw boxes, and warn of each."""
    return ["".join(c if _find_font(ord(c)) else ascii(c)[1:-1] for c in printable(text)) for text in texts]


@functools.cache
def _find_font(code: int) -> str | None:
    """The name of a font that draws a character, which from then on Matplotlib uses too; None, said once, if there is none."""
    pyplot = _pyplot()
    if code < 128:
        return pyplot.rcParams["font.family"][0]
    from matplotlib.font_manager import fontManager

    # Not those that draw boxes for everything, and TeX's, whose codes are their own.
    unfit = ("Last Resort", "STIX", "cm")
    fonts = {f.fname: f.name for f in fontManager.ttflist if f.style == "normal" and not f.name.startswith(unfit)}
    used = pyplot.rcParams["font.family"]
    default = {name for family in used for name in pyplot.rcParams.get(f"font.{family}", [family])}
    # Those in use come first: what they draw needs no other.
    for path, name in sorted(fonts.items(), key=lambda font: font[1] not in default):
        if code in _read_charmap(path):
            if name not in default:
                pyplot.rcParams["font.family"] = [*used, name]
            return name
    _say_undrawable()
    return None


@functools.cache
def _read_charmap(path: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):  # a font file that cannot be read
        return frozenset()


@functools.cache
def _say_undrawable() -> None:
    if distributed.is_main_process():
        print("some names are written with escapes in the pictures: no font here draws them (Noto's fonts would)")


def _save(figure, path: str | Path, dpi: int) -> None:
    if distributed.is_main_process():
        figure.savefig(path, dpi=dpi)
    _pyplot().close(figure)


def _pyplot():
    import matplotlib  # here, because it takes long to import and only the end of a run needs it

    matplotlib.use("Agg")
    import matplotlib.pyplot

    matplotlib.rcParams["text.parse_math"] = False  # names may have dollars in them
    return matplotlib.pyplot
