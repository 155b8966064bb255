"""The options of every script: what `--help` shows, what may be restated, old names, and one line for what is wrong."""

import dataclasses
import inspect
import re
import types
import typing
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

import train_victim
from extraction import experiment, options
from extraction.errors import UserError
from grey_box import swin_to_r21_kd

ROOT = Path(__file__).parents[2]
FOLDERS = ("grey_box", "black_box")
SCRIPTS = [f"{folder}.{path.stem}" for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
EXPERIMENTS = [name for name in SCRIPTS if name.partition(".")[2] not in ("run_all", "eval_teacher")]
SCRIPTS += ["audit", "eval_only", "train_victim"]


def open_script(name: str) -> types.ModuleType:
    script = import_module(name)
    assert dataclasses.is_dataclass(script.Config), name
    return script


def flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


# --- help --------------------------------------------------------------------------------------------------------------


def find_parts(hint: object) -> set:
    """The members of a union, each value of a Literal for itself, without metadata."""
    if typing.get_origin(hint) is typing.Annotated:
        return find_parts(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return set().union(*(find_parts(part) for part in typing.get_args(hint)))
    return {("literal", value) for value in typing.get_args(hint)} if typing.get_origin(hint) is typing.Literal else {hint}


def squash(text: str) -> str:
    """Without blanks and the frames around groups, at which long lines are broken."""
    return re.sub(r"[\s│|]", "", text)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_has_a_line_for_every_option_and_the_scripts_own_first(name, capsys):
    script = open_script(name)
    with pytest.raises(SystemExit) as caught:
        options.parse_options(script.Config, script.Config(), script.__doc__, ["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    groups = re.findall(r"^(?:╭─)? ([\w-]+) options  ?", out, re.MULTILINE)
    assert groups[0] == "experiment"
    assert len(set(groups)) == len(groups)
    lines, text = options.find_help(script.Config), squash(out)
    hints = typing.get_type_hints(script.Config, include_extras=True)
    for field in dataclasses.fields(script.Config):
        line = lines.get(field.name, "")
        assert line.strip(), f"{field.name} has no line of help"
        if options.EDITED in getattr(hints[field.name], "__metadata__", ()):
            continue
        assert squash(line) in text, field.name
        choices = {str(part[1]) for part in find_parts(hints[field.name]) if isinstance(part, tuple)}
        if choices:  # shown as {a,b}, or {None}{a,b}
            shown = re.search(rf"{flag(field.name)}((?:\{{[\w,]+\}})+)", text)
            assert shown, field.name
            assert choices <= set(re.findall(r"\w+", shown[1])), field.name


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_restated_option_is_of_the_type_it_is_inherited_with(name):
    config = open_script(name).Config
    hints = {owner: typing.get_type_hints(owner) for owner in config.__mro__ if dataclasses.is_dataclass(owner)}
    for field in inspect.get_annotations(config):
        for base in config.__mro__[1:]:
            if field in inspect.get_annotations(base):
                own, inherited = find_parts(hints[config][field]), find_parts(hints[base][field])
                assert own <= inherited, f"{field}: {own} here, {inherited} in {base.__name__}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_demo_is_made_of_options(name):
    script = open_script(name)
    assert script.Config(**script.DEMO).demo
    assert not script.Config().demo


OLD = {  # what is given, the option it sets, and to what
    "--own": ("videos", "in_domain", "videos"),
    "--own-list": ("list.txt", "in_domain_list", "list.txt"),
    "--unrelated": ("folder", "aux", ("folder",)),
    "--step": ("7", "clip_interval", 7),
    "--smoothing": ("0.25", "epsilon", 0.25),
}


def test_flags_by_their_old_names_set_the_new_options():
    found = set()
    for script in map(open_script, SCRIPTS):
        default = script.Config()
        old = [name for name, (_, option, _) in OLD.items() if hasattr(default, option)]
        wanted = replace(default, **{OLD[name][1]: OLD[name][2] for name in old})
        for given in ([part for name in old for part in (name, OLD[name][0])], [f"{name}={OLD[name][0]}" for name in old]):
            assert options.parse_options(script.Config, default, "", given) == wanted, script.__name__
        found |= set(old)
    assert found == OLD.keys()


# --- what is wrong -------------------------------------------------------------------------------------------------------

MISSING = dict(student="nonsense", student_weights="a.pth", in_domain_list="own.txt", val_list="val.txt", generator="gan")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_missing_name_or_file_is_found_before_anything_is_made_or_asked(name, tmp_path, monkeypatch):
    script = open_script(name)
    monkeypatch.chdir(tmp_path)
    fields = [field for field in MISSING if hasattr(script.Config(), field)]
    assert {"student", "student_weights", "val_list"} <= set(fields)
    for field in fields:
        constants = script.DEMO | {"student_weights": __file__, field: MISSING[field], "out_dir": "run"}
        with pytest.raises(UserError, match=MISSING[field]) as caught:
            script.main(script.Config(**constants))
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []


WRONG = dict(
    batch_size=0, size=0, num_workers=-1, head_lr=-1.0, body_lr=-1.0, lr=-1.0, student_lr=float("nan"), generator_lr=-1.0,
    weight_decay=-1.0, hflip=3.0, brightness=3.0, rotation=-1.0,
)  # fmt: skip


@pytest.mark.parametrize("name", [*EXPERIMENTS, "grey_box.eval_teacher", "eval_only", "train_victim"])
def test_constants_out_of_their_range_get_one_line(name, tmp_path, monkeypatch):
    script = open_script(name)
    monkeypatch.chdir(tmp_path)
    config = script.Config(**script.DEMO)
    for field in WRONG.keys() & vars(config).keys():
        line = f"{flag(field)} {WRONG[field]}: it must be at {'most 1' if WRONG[field] == 3 else 'least'}"
        with pytest.raises(UserError, match=line):
            script.main(replace(config, **{field: WRONG[field]}))
    assert list(tmp_path.iterdir()) == []


def test_an_architecture_that_is_none_is_found_before_videos_are_looked_at(demo_set, tmp_path, monkeypatch):
    monkeypatch.setattr(train_victim, "Clips", None)
    config = train_victim.Config(data=str(demo_set / "val"), architecture="nonsense", device="cpu", out_dir=str(tmp_path))
    with pytest.raises(UserError, match="nonsense"):
        train_victim.main(config)
    with pytest.raises(UserError, match=r"list nothere\.txt not found: --data-list"):
        train_victim.main(replace(config, architecture="swin_demo", data_list="nothere.txt"))


@pytest.mark.parametrize(
    ("changes", "drawn"),
    [
        ({}, ["datasets/demo"]),
        (dict(in_domain="mine", aux=("theirs",)), ["datasets/demo"]),
        (dict(in_domain="mine", aux=("theirs",), val="held_out"), []),
        (dict(in_domain="mine", aux=("ucf101",), val="held_out"), ["datasets/demo"]),
    ],
)
def test_a_demo_draws_the_folders_that_it_reads(changes, drawn, monkeypatch):
    """2 880 videos are a minute's work, in vain for who brings other folders."""
    found = []
    monkeypatch.setattr(experiment, "write_demo_set", lambda root, splits: found.append(root))
    experiment._write_demo_data(swin_to_r21_kd.Config(**swin_to_r21_kd.DEMO | changes))
    assert found == drawn
