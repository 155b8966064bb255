"""Pictures: names of every script, and what no font draws."""

import warnings

import numpy as np
import pytest
import torch
from matplotlib import font_manager, pyplot
from matplotlib.font_manager import FontEntry
from PIL import Image

from extraction.evaluation import plots


@pytest.fixture(autouse=True)
def _only_the_fonts_of_matplotlib(monkeypatch):
    """Whatever else this machine has; and nothing is known of an earlier test."""
    own = [font for font in font_manager.fontManager.ttflist if "matplotlib" in font.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    for cached in (plots._find_font, plots._say_undrawable):
        cached.cache_clear()
    with pyplot.rc_context():
        yield
    for cached in (plots._find_font, plots._say_undrawable):
        cached.cache_clear()


def draw(path, classes: list[str], source: str = "aux") -> np.ndarray:
    """A sheet of a clip for each class, named by the victim."""
    clips = torch.zeros(len(classes), 3, 2, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.draw_queries(path, clips, torch.eye(len(classes)), [source] * len(classes), classes)
    return np.asarray(Image.open(path))


def test_what_a_font_draws_stays_and_the_rest_is_escaped_and_said_once(tmp_path, capsys):
    drawn = ["бег", "ركض", "swim ü", "€ 5 to $9 $x^$"]
    assert plots.make_drawable(drawn) == drawn
    draw(tmp_path / "a.png", drawn)
    assert capsys.readouterr().out == ""
    assert plots.make_drawable(["跑步 jogging", "two\nlines"]) == ["\\u8dd1\\u6b65 jogging", "two\\nlines"]
    draw(tmp_path / "b.png", ["跑步", "游泳", *drawn] * 3, "来源")
    assert capsys.readouterr().out.splitlines() == [
        "some names are written with escapes in the pictures: no font here draws them (Noto's fonts would)"
    ]


def test_a_class_that_no_font_draws_has_its_number(tmp_path, monkeypatch):
    captions = []
    monkeypatch.setattr(plots, "draw_clips", lambda path, views, names: captions.extend(names))
    draw_queries = plots.draw_queries
    draw_queries(tmp_path / "a.png", torch.zeros(2, 3, 1, 4, 4), torch.eye(2), ["aux", "aux"], ["run", "跑步"])
    assert captions == ["aux: the victim says run (100 %)", "aux: the victim says class 1, 跑步 (100 %)"]


def test_plain_names_are_drawn_as_they_always_were(tmp_path):
    pyplot.rcParams["text.parse_math"] = True
    plots._find_font(ord("a"))
    assert pyplot.rcParams["font.family"] == ["sans-serif"]
    assert plots.make_drawable(["agreement@1, 88.5 ± 2.1 %"]) == ["agreement@1, 88.5 ± 2.1 %"]
    assert pyplot.rcParams["font.family"] == ["sans-serif"]


def test_a_font_of_the_system_is_used_where_the_default_has_no_letter(tmp_path, monkeypatch, capsys):
    """U+10330, Gothic, which a font that stands for the system's is said to draw."""
    path = next(font.fname for font in font_manager.fontManager.ttflist if font.name == "DejaVu Serif")
    system = FontEntry(
        fname=path, name="A Gothic Font", style="normal", variant="normal", weight=400, stretch="normal", size="scalable"
    )
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [*font_manager.fontManager.ttflist, system])
    read = plots._read_charmap
    monkeypatch.setattr(plots, "_read_charmap", lambda name: read(name) | ({0x10330} if name == path else set()))
    assert plots.make_drawable(["\U00010330"]) == ["\U00010330"]
    assert pyplot.rcParams["font.family"][0] == "sans-serif"
    assert len(pyplot.rcParams["font.family"]) == 2
    assert capsys.readouterr().out == ""


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures that are drawn, before they are closed."""
    drawn: list = []
    monkeypatch.setattr(plots, "_save", lambda figure, path, dpi: (figure.canvas.draw(), drawn.append(figure)))
    return drawn


def read_above(figure) -> list[tuple[float, str]]:
    """The places and the labels of the second x axis."""
    (above,) = figure.axes[0].child_axes or [None]
    return (
        []
        if above is None
        else [(tick, text.get_text()) for tick, text in zip(above.get_xticks(), above.get_xticklabels(), strict=True)]
    )


def test_a_curve_goes_along_the_epochs_and_the_queries_stand_above(tmp_path, figures):
    """Answers come round again after two epochs: the points of later epochs must not stand over one another."""
    queries = [100, 200, 200, 200]
    history = [dict(epoch=k + 1, num_queries=n, top1=0.1 * k, agreement_at_1=0.2 * k) for k, n in enumerate(queries)]
    plots.draw_curve(tmp_path / "c.png", history, 0.9, 0.1, "run")
    lines = figures[0].axes[0].lines
    assert [list(line.get_xdata()) for line in lines[:2]] == [[1, 2, 3, 4]] * 2
    assert list(lines[1].get_ydata()) == pytest.approx([0, 10, 20, 30])
    assert figures[0].axes[0].get_xlabel() == "epoch"
    assert read_above(figures[0]) == [(1, "100"), (2, "200"), (3, "200"), (4, "200")]
    assert figures[0].axes[0].child_axes[0].get_xlabel() == "queries used"


def test_a_curve_of_a_generator_goes_along_its_iterations(tmp_path, figures):
    history = [dict(iteration=10 * k, num_queries=160 * k, top1=0.1) for k in range(1, 13)]
    plots.draw_curve(tmp_path / "c.png", history, None, 0.1, "run")
    assert list(figures[0].axes[0].lines[0].get_xdata()) == [10 * k for k in range(1, 13)]
    assert read_above(figures[0]) == [(10 * k, str(160 * k)) for k in (1, 3, 5, 7, 9, 11)]


def test_without_queries_there_is_no_second_axis(tmp_path, figures):
    plots.draw_curve(tmp_path / "c.png", [dict(epoch=k, num_queries=0, top1=0.1) for k in (1, 2)], None, 0.1, "run")
    assert read_above(figures[0]) == []


@pytest.mark.parametrize(("second", "above"), [(5, [(1, "5"), (2, "10")]), (6, [])])
def test_curves_of_several_runs_have_queries_above_where_they_are_the_same(tmp_path, figures, second, above):
    runs = {
        name: [dict(epoch=k, num_queries=k * each, top1=0.1) for k in range(1, 3)] for name, each in dict(a=5, b=second).items()
    }
    plots.draw_curves(tmp_path / "c.png", runs, 0.1, "two")
    assert [list(line.get_xdata()) for line in figures[0].axes[0].lines[:2]] == [[1, 2]] * 2
    assert read_above(figures[0]) == above
