"""The rooms of the package: who imports whom, read from the code."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "extraction"
SCRIPTS = sorted([*ROOT.glob("*.py"), *ROOT.glob("grey_box/*.py"), *ROOT.glob("black_box/*.py"), *ROOT.glob("benchmarks/*.py")])
# Rooms that know nothing of one another: a victim, a student, a generator and the data are what an attack brings together.
APART = {
    "students": {"generators", "data", "victims"},
    "generators": {"students", "data", "victims"},
    "data": {"students", "generators", "victims"},
    "victims": {"students", "generators", "data"},
}


def find_imports(path: Path) -> Iterator[str]:
    """The dotted names that a file imports, inside functions too, and by `import_module` of a name written out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            name = node.args[0]
            yield str(ast.literal_eval(name)) if isinstance(name, ast.Constant) else ast.unparse(name).removeprefix("f'")


def name_room(path: Path) -> str:
    """The folder of extraction/ that a module is in, or the module itself if it is in none."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def find_arrows() -> set[tuple[str, str]]:
    """(importing room, imported room) for every two rooms of extraction/."""
    arrows = set()
    for path in PACKAGE.rglob("*.py"):
        for name in find_imports(path):
            package, _, rest = name.partition(".")
            room = rest.partition(".")[0]
            if package == "extraction" and room and room != name_room(path):
                assert (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").is_file(), f"{path} imports {name}"
                arrows.add((name_room(path), room))
    return arrows


def test_the_package_imports_nothing_that_stands_on_it():
    above = {"grey_box", "black_box", "benchmarks", "tests", *(path.stem for path in SCRIPTS)}
    found = {str(path.relative_to(ROOT)): {n.partition(".")[0] for n in find_imports(path)} for path in PACKAGE.rglob("*.py")}
    assert not {path: names & above for path, names in found.items() if names & above}


def test_the_rooms_have_no_import_cycle():
    arrows = find_arrows()
    left = {room for arrow in arrows for room in arrow}
    while floor := {room for room in left if not any(a == room and b in left for a, b in arrows)}:
        left -= floor
    cycle = sorted((a, b) for a, b in arrows if a in left and b in left)
    assert not cycle, f"of {len(arrows)} arrows these are in a cycle or above one: {cycle}"


def test_the_package_is_small_at_its_top():
    entries = {path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py")))}
    assert len(entries) <= 16, sorted(entries)
    arrows = find_arrows()
    assert len(arrows) < 57, f"{len(arrows)} arrows: {sorted(arrows)}"


def test_the_audit_stands_on_the_other_rooms_and_nothing_but_its_script_on_it():
    assert not {room for room, other in find_arrows() if other == "audit"}


def test_students_generators_data_and_victims_know_nothing_of_one_another():
    arrows = find_arrows()
    wrong = sorted((room, other) for room, others in APART.items() for other in others if (room, other) in arrows)
    assert not wrong, f"of {len(arrows)} arrows these should not be: {wrong}"


def test_no_script_imports_another():
    names = {path.stem for path in SCRIPTS if "__main__" in path.read_text()} | {"grey_box", "black_box", "benchmarks"}
    found = {str(path.relative_to(ROOT)): {name.partition(".")[0] for name in find_imports(path)} & names for path in SCRIPTS}
    assert not {path: imported for path, imported in found.items() if imported}
