"""What a script does around its experiment: options, run folder, seed; the victim and the evaluator; the command line."""

import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from extraction import distributed
from extraction.compute import Compute, choose_compute
from extraction.data.clips import Clips
from extraction.data.demo import ATTACK_SPLITS, write_demo_set, write_traffic
from extraction.data.folders import AUX, Video, find_aux_folders, find_videos, require_folder
from extraction.data.images import write_demo_images
from extraction.errors import UserError, command_line, printable
from extraction.evaluation.honest import fit_detector
from extraction.evaluation.results import QUERY_BUDGET, print_results, say_how_to_go_on
from extraction.evaluation.scoring import Evaluator
from extraction.evaluation.suite import UNSEEN, write_unseen_set
from extraction.options import Options, ScoredVictimOptions, VictimOptions, check_options, parse_options
from extraction.runs import Run
from extraction.students import find_weights as find_student_weights
from extraction.students import require_student
from extraction.victims.defences import check_defence, derive_key, fit_defence
from extraction.victims.ledger import Ledger
from extraction.victims.query_interface import Victim, VictimModel
from extraction.victims.record import Record
from extraction.victims.wire import name_wire
from extraction.victims.zoo import find_weights, load_model

PROJECT = Path(__file__).parents[1]


def experiment(main: Callable[[Any, Run], dict]) -> Callable[[Any], dict]:
    """Make `main(config, run)` an experiment: `main(config) -> results`.

    Bad options and missing files end it before any work, with UserError. The demo set is drawn if --demo wants it. A run that
    is finished prints its results again. PyTorch's seed is set.
    """

    @functools.wraps(main)
    def run_experiment(config: Any) -> dict:
        script = Path(inspect.getfile(main)).stem
        check_options(config)
        _require_student(config)
        if isinstance(config, VictimOptions):
            _name_defence(config)
            name_wire(config.wire)
        if config.demo:
            _write_demo_data(config)
        _require_folders(config)
        run = Run(script, config.out_dir or f"runs/{script}{'_demo' * config.demo}", config, config.checkpoint_seconds)
        with run.locked():
            if run.finished:
                return repeat_results(run.finished)
            torch.manual_seed(config.seed)
            return main(config, run)

    return run_experiment


def _name_defence(config: VictimOptions) -> str | None:
    return check_defence(config.defence, config.defence_strength, config.defence_after, config.answers)


def _write_demo_data(config: Any) -> None:
    """Draw what the run reads of the demo's folders: nothing where flags name others."""
    aux = [AUX[name][1] if name in AUX else name for name in getattr(config, "aux", ())]
    named = [getattr(config, name, None) for name in ("in_domain", "val", "images")]
    used = {Path(folder) for folder in (*aux, *getattr(config, "traffic", ()), *named) if folder is not None}
    if Path("datasets/demo/images") in used:
        write_demo_images("datasets/demo/images")
    if used & {Path("datasets/demo"), *(Path(f"datasets/demo/{split}") for split in ATTACK_SPLITS)}:
        with_videos = hasattr(config, "in_domain") or hasattr(config, "aux")
        write_demo_set("datasets/demo", ATTACK_SPLITS if with_videos else {"val": ATTACK_SPLITS["val"]})
    if used & {Path(f"datasets/demo/{folder}") for folder in ("traffic", "cameras")}:
        write_traffic("datasets/demo")
    if UNSEEN / "val" in used:
        write_unseen_set()


def _require_student(config: Any) -> None:
    """Raise UserError for a student that is none, and for weights that are missing."""
    require_student(config.student)
    if config.student_weights is not None and not find_student_weights(config.student, config.student_weights).is_file():
        raise UserError(f"student weights {config.student_weights} not found: {_say_whence(config)}")


def _require_folders(config: Any) -> None:
    """Raise UserError for videos and images that are missing."""
    if getattr(config, "in_domain", None) is not None:
        require_folder(config.in_domain, "videos of the victim's task, in class folders,")
    find_aux_folders(getattr(config, "aux", ()), config.demo)
    if hasattr(config, "images"):
        require_folder(config.images, "a tree of unrelated images")
    require_folder(config.val, "held-out videos of the victim's task, in class folders (without labels: in one folder),")


def _say_whence(config: Any) -> str:
    """Where a missing weight file comes from: the script that makes it, for a stage of several; else the user."""
    stage = re.fullmatch(r"(\w+?)(_demo)?", Path(config.student_weights).parent.name)
    maker = next(PROJECT.glob(f"*_box/{stage[1]}.py"), None) if stage else None
    if maker is not None and stage is not None:
        command = f"python {maker.relative_to(PROJECT)}{' --demo' if stage[2] else ''}"
        return f"this stage goes on from what `{command}` saves; run that first" + ("" if config.demo else ", or try --demo")
    return "put them there, pass --student-weights None to start from scratch, or try --demo"


def repeat_results(results: dict) -> dict:
    """Print the table of a run that has ended, and how one that its query budget ended goes on."""
    print_results(results)
    if results["stopped"] == QUERY_BUDGET:
        print(say_how_to_go_on(results["num_queries"], results["query_budget"]))
    return results


def find_val_videos(config: Options, classes: Sequence[str]) -> list[Video]:
    """The held-out videos, labelled by class folders or not at all."""
    named = None if config.val_unlabelled else classes
    return find_videos(config.val, named, "val", config.val_list, unlabelled_flag="--val-unlabelled")


class Attack(NamedTuple):
    """What an attack starts from."""

    compute: Compute
    victim: Ledger
    evaluator: Evaluator


def open_attack(config: Any, run: Run, *, exact: bool = False) -> Attack:
    """The device and precision, the metered victim, and what scores students on held-out videos.

    `config` has `Options` and `VictimOptions` (with `ScoredVictimOptions` alone the victim answers nothing). A student is
    scored on `val_clips` clips of each video (1: its middle). `exact` keeps all digits of the answers, for attacks that take
    differences of them. Raises UserError, before the first query, for missing weights and for a victim whose answers to the
    held-out videos show that it is set up wrongly (`check_victim`, `check_answers`).
    """
    return _open(config, run, exact)[0]


def open_audit(config: Any, run: Run) -> tuple[Attack, VictimModel, bytes]:
    """As `open_attack`, for the victim's owner: the bare model too, and the secret key that keyed defences take."""
    attack, load = _open(config, run, False)
    model = load()
    return attack, model, derive_key(find_weights(config.victim, config.victim_weights) or model.state_dict())


def _open(config: Any, run: Run, exact: bool) -> tuple[Attack, Callable[[], VictimModel]]:
    assert isinstance(config, Options)
    assert isinstance(config, ScoredVictimOptions)
    compute = choose_compute(config.device, config.precision, config.compile)

    @functools.cache
    def load() -> VictimModel:  # once, for the query interface and for the evaluator's own answers
        bare = load_model(config.victim, config.victim_weights, classes=config.victim_classes, about=config.victim_about)
        if config.victim_record is not None:
            bare.record = Record(config.victim_record, bare.fingerprint)
        return compute.prepare(bare)

    if isinstance(config, VictimOptions):
        answers, budget, decimals, wire = config.answers, config.query_budget, config.decimals, config.wire
        defence = _name_defence(config)
    else:
        answers, budget, decimals, wire, defence = "label", 0, None, None, None

    def open_interface(num_queries: int) -> Victim:
        return Victim(load(), answers, budget, decimals, num_queries, wire)

    path, sources = run.folder / "ledger.sqlite", ()
    if isinstance(config, VictimOptions):
        path, sources = Path(config.ledger or path), config.answers_from
    shared = path.parent != run.folder
    victim = Ledger(path, open_interface, answers, decimals, exact, sources, shared, defence, wire)
    if not shared and budget is not None and victim.num_queries > budget:
        victim.close()
        raise UserError(
            f"{path} counts {victim.num_queries} queries, --query-budget {budget} is less; choose another --out-dir"
        )
    val = Clips(find_val_videos(config, victim.classes), views=(config.val_clips, 1), **config.shape)
    evaluator = Evaluator(
        val, victim.classes, compute.device, config.batch_size, config.num_workers, victim, load, config.min_victim_top1,
        getattr(config, "allow_overlap", False),
    )  # fmt: skip
    if isinstance(config, VictimOptions) and config.defence is not None:
        _defend(victim, evaluator, config, load)
    torch.manual_seed(config.seed)  # building a victim draws random numbers
    return Attack(compute, victim, evaluator), load


def _defend(ledger: Ledger, evaluator: Evaluator, config: VictimOptions, load: Callable[[], VictimModel]) -> None:
    """Put a defence before the victim's answers, fitted to what its owner has: the answers to held-out videos."""
    assert evaluator.victim_probs is not None
    assert config.defence is not None
    honest, name, after = evaluator.victim_probs, config.defence, config.defence_after

    def fit(key: bytes) -> dict[str, Any]:
        defence = fit_defence(name, config.defence_strength, honest[honest.sum(1) > 0], key)
        return dict(defence=defence, detector=None if after is None else fit_detector(after, evaluator.clips, honest))

    def find_key() -> bytes:  # of an exported graph the file alone has the weights, of a user's own loader the model may
        return derive_key(find_weights(config.victim, config.victim_weights) or load().state_dict())

    constants = ledger.defend(find_key, fit)
    if constants is not None:
        cost = constants["defence"]
        changed = f"L1 {cost['l1']:.3g}, {100 * cost['flips']:.1f} % of top classes changed"
        when = "" if after is None else f", after an alarm of {after}"
        print(f"defence {name}, on the victim's answers to held-out videos: mean {changed}{when}", flush=True)


def run_script(main: Callable[[Any], Any], config_class: type, demo: dict | None = None) -> None:
    """The command line of a script: `config_class` turned into flags, its defaults those of `demo` under --demo.

    Exit statuses: 0 for a run that came to its end, its query budget's too; 1 for UserError, which becomes its one line; 130
    after Ctrl-C; 3 when another process of the run was lost; 141 when nobody reads its output. (2 is a wrong flag.)
    """
    with command_line(distributed.exit_process):
        default = config_class(**demo) if demo and "--demo" in sys.argv[1:] else config_class()
        doc = (sys.modules[main.__module__].__doc__ or "").strip()
        try:
            refuse_other_checkout(Path(sys.modules[main.__module__].__file__ or ""))
            config = parse_options(config_class, default, doc)
            # Batches in huge pages: on a CPU the kernel's handing out of small ones takes longer than making views does.
            os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch reads it at its first tensor
            if "OMP_NUM_THREADS" not in os.environ:  # threads beside the loader's workers, not against them: that halves it
                threads, workers = torch.get_num_threads(), getattr(config, "num_workers", 0)
                if isinstance(workers, int):  # benchmarks/loader.py has several numbers
                    torch.set_num_threads(max(1, threads - min(workers, threads // 2)))
            distributed.start(getattr(config, "device", "auto"))
            main(config)
            distributed.end()
        except (UserError, PermissionError) as error:  # the latter names its file
            _end(1, f"{Path(sys.argv[0]).name}: {error}")
        except distributed.Ended as ended:
            distributed.exit_process(1, f"{Path(sys.argv[0]).name}: {ended}")
        except RuntimeError as error:
            lost = distributed.describe_lost_process(error)
            if lost is None:
                raise
            _end(3, f"{Path(sys.argv[0]).name}: {lost}")
        except KeyboardInterrupt as error:
            _end(130, str(error) or "interrupted")


def _end(status: int, line: str) -> NoReturn:
    """Say in one line why the script ends, once for all its processes, and end this one."""
    if distributed.should_print("lost" if status == 3 else line):
        print(printable(line), file=sys.stderr)
    distributed.exit_process(status, line)


def refuse_other_checkout(script: Path) -> None:
    """Raise UserError for a script of another checkout than this package: an editable install comes before the script's own."""
    roots = [folder for folder in script.resolve().parents[:2] if (folder / "extraction" / "__init__.py").is_file()]
    if roots and roots[0] != PROJECT.resolve():
        raise UserError(
            f"{script} is of another checkout than the package that Python finds, {PROJECT / 'extraction'}: "
            f"pip install -e {roots[0]}, or set PYTHONPATH={roots[0]}"
        )
