"""Two processes on one machine do what one does: the same losses, as many queries, and a line when one of them is gone."""

import json
import signal
import socket
import time
from pathlib import Path

import accelerate  # noqa: F401 (here for all forks at once: each takes seconds)
import pytest
import torch
import torchvision  # noqa: F401

from extraction.distributed import SyncBatchNorm
from extraction.victims import ledger
from extraction.weights import read_checkpoint, read_state
from tests.forked import Forked

ROOT = Path(__file__).parents[1]
KD, MAZE = "grey_box/swin_to_r21_kd.py", "black_box/attack_video_swin.py"


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(script: str, out_dir: Path, flags: list, num_processes: int = 2) -> list[Forked]:
    """What torchrun does, so that each process can be watched and killed."""
    command = [script, "--demo", "--device", "cpu", "--out-dir", out_dir, *flags]
    place = dict(WORLD_SIZE=num_processes, LOCAL_WORLD_SIZE=num_processes, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    ranks = [place | dict(RANK=rank, LOCAL_RANK=rank) for rank in range(num_processes)]
    return [Forked(*command, env={name: str(value) for name, value in own.items()}, merged=True) for own in ranks]


def finish(processes: list[Forked], status: int = 0) -> list[str]:
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [status] * len(processes), "\n".join(outputs)[-3000:]
    return outputs


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture
def kd_flags(demo_set):
    """The demo's constants on 76 clips, 5 batches an epoch, the last of 12."""
    aux = ["--aux", demo_set / "unrelated_a", demo_set / "unrelated_b"]
    return ["--in-domain", demo_set / "train_5per", "--val", demo_set / "val", *aux, "--num-workers", 0]


@pytest.mark.parametrize("steps", [15, pytest.param(50, marks=pytest.mark.slow)])
def test_two_processes_follow_one_and_use_as_many_queries(steps, kd_flags, tmp_path):
    # The body at its published learning rate. At the demo's, 500 times that, the rounding of another order of sums grows
    # from 2e-7 in the first loss to some 1e-2 in the fiftieth, as it does between one thread and two.
    flags = [*kd_flags, "--epochs", steps // 5, "--views-per-clip", 2, "--head-lr", 1e-3, "--body-lr", 3e-6]
    for count in (1, 2):
        outputs = finish(start(KD, tmp_path / str(count), flags, count))
    one, two = tmp_path / "1", tmp_path / "2"
    losses = [torch.tensor(read_checkpoint(folder / "state.pt")["recent"]) for folder in (one, two)]
    assert len(losses[0]) == steps
    assert len(losses[0].unique()) == steps  # they are not the same for having stood still
    if steps == 50:  # from the first epoch to the last they went somewhere together
        assert losses[0][:5].mean() > losses[0][-5:].mean() + 0.1
    print(f"largest difference {(losses[0] - losses[1]).abs().max():.1e}; losses {losses[0][0]:.3f} to {losses[0][-1]:.3f}")
    assert (losses[0] - losses[1]).abs().max() < 1e-4
    assert results_of(one)["num_queries"] == results_of(two)["num_queries"] == 2 * 76
    assert results_of(two)["num_processes"] == 2
    assert results_of(one)["victim_top1"] == results_of(two)["victim_top1"]
    kept = [dict(ledger.Ledger(folder / "ledger.sqlite", lambda _: None, "probs")) for folder in (one, two)]
    assert kept[0].keys() == kept[1].keys()
    students = [read_state(folder / "student.safetensors") for folder in (one, two)]
    assert students[0].keys() == students[1].keys()
    assert "agreement@1" in outputs[0]
    assert outputs[1] == ""  # the first speaks for both


def test_a_global_budget_is_never_passed_and_a_larger_one_goes_on_with_another_number_of_processes(kd_flags, tmp_path):
    flags = [*kd_flags, "--epochs", 2, "--head-lr", 3e-5, "--body-lr", 3e-6]
    outputs = finish(start(KD, tmp_path / "run", [*flags, "--query-budget", 101]))
    assert "".join(outputs).count("query budget exhausted: 101 of 101 queries used") == 1
    assert "Traceback" not in "".join(outputs)
    assert (results_of(tmp_path / "run")["num_queries"], results_of(tmp_path / "run")["stopped"]) == (101, "query budget")
    assert ledger.count(str(tmp_path / "run" / "ledger.sqlite")) == 101
    finish(start(KD, tmp_path / "run", flags, 1))
    finish(start(KD, tmp_path / "whole", flags, 1))
    assert results_of(tmp_path / "run")["num_queries"] == 2 * 76
    losses = [torch.tensor(read_checkpoint(tmp_path / name / "state.pt")["recent"]) for name in ("run", "whole")]
    assert torch.allclose(*losses, atol=1e-4)


@pytest.mark.slow  # among the faults of tests/chaos
@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_is_killed_the_other_stops_with_one_line_and_the_run_goes_on(killed, kd_flags, tmp_path):
    flags = [*kd_flags, "--epochs", 8, "--views-per-clip", 1, "--checkpoint-seconds", 0.2]
    both = start(KD, tmp_path / "run", flags)
    while not (tmp_path / "run" / "state.pt").exists():
        assert all(process.poll() is None for process in both), both[0].communicate()[0][-3000:]
        time.sleep(0.05)
    both[killed].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    output, _ = both[1 - killed].communicate(timeout=60)
    assert time.monotonic() - begin < 60
    assert both[1 - killed].returncode == 3
    both[killed].communicate()
    lines = [line for line in output.splitlines() if line.startswith("swin_to_r21_kd.py: ")]
    assert len(lines) == 1
    assert "another of the 2 processes of this run ended" in lines[0]
    assert "Traceback" not in output
    outputs = finish(start(KD, tmp_path / "run", [*flags[:-1], 100]))
    assert "resuming" in outputs[0]
    # A batch that was counted when its process was killed is counted again.
    assert 76 <= results_of(tmp_path / "run")["num_queries"] <= 76 + 16
    assert ledger.count(str(tmp_path / "run" / "ledger.sqlite")) == 76
    ledger.verify(str(tmp_path / "run" / "ledger.sqlite"))


@pytest.mark.slow
def test_a_data_free_attack_in_two_processes_follows_one(demo_set, tmp_path):
    flags = ["--val", demo_set / "val", "--iterations", 6, "--batch-size", 8, "--replay-clips", 64, "--score-every", 100]
    flags += ["--student-lr", 2e-5, "--generator-lr", 3e-6]  # see above
    for count in (1, 2):
        finish(start(MAZE, tmp_path / str(count), [*flags, "--generator", "layered"], count))
    one, two = (results_of(tmp_path / str(count)) for count in (1, 2))
    assert one["num_queries"] == two["num_queries"] == 6 * 8 * (3 + 5)
    for point, other in zip(one["history"], two["history"], strict=True):
        for name in ("loss", "answer_entropy", "mean_answer_entropy", "conditional_accuracy"):
            assert point[name] == pytest.approx(other[name], abs=2e-4), name
    outputs = finish(start(MAZE, tmp_path / "odd", [*flags, "--batch-size", 9]), 1)
    assert "--batch-size 9: it must be a multiple of the 2 processes" in "".join(outputs)


@pytest.mark.slow
def test_a_budget_ends_a_data_free_attack_in_all_processes(demo_set, tmp_path):
    flags = ["--val", demo_set / "val", "--iterations", 2, "--batch-size", 4, "--replay-clips", 16, "--query-budget", 45]
    outputs = finish(start(MAZE, tmp_path / "run", flags))
    results = results_of(tmp_path / "run")
    assert (results["num_queries"], results["stopped"]) == (44, "query budget")  # whole batches of 4
    assert "44 of 45 queries used; run again with a larger --query-budget" in "".join(outputs)


def test_bad_input_is_reported_once(kd_flags, tmp_path, monkeypatch):
    outputs = finish(start(KD, tmp_path / "run", [*kd_flags, "--epochs", 0]), 1)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    outputs += finish(start(KD, tmp_path / "run", [*kd_flags, "--victim", "nobody"]), 1)
    why = json.loads((tmp_path / "error.json").read_text())["message"]  # as torchrun reads it, and prints it last
    assert why["extraInfo"]["py_callstack"].startswith("swin_to_r21_kd.py: no victim is called 'nobody'; there are")
    assert int(why["extraInfo"]["timestamp"]) <= time.time()
    assert "Traceback" not in "".join(outputs)
    assert "".join(outputs[:2]).count("--epochs 0: it must be at least 1") in (1, 2)
    assert "".join(outputs[2:]).count("no victim is called 'nobody'") in (1, 2)


def test_sync_batch_norm_alone_is_batch_norm():
    """In one process, with the collectives standing still: values, statistics and gradients are PyTorch's."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        x = torch.randn(4, 3, 2, 5, 5)
        theirs, ours = torch.nn.BatchNorm3d(3, momentum=0.3), SyncBatchNorm(3, momentum=0.3)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        for norm, value in zip((theirs, ours), inputs, strict=True):
            (norm(value) ** 3).sum().backward()
        assert torch.allclose(inputs[0].grad, inputs[1].grad, atol=1e-4)
        assert torch.allclose(theirs.running_mean, ours.running_mean, atol=1e-6)
        assert torch.allclose(theirs.running_var, ours.running_var, atol=1e-6)
        assert torch.allclose(theirs.eval()(x), ours.eval()(x), atol=1e-6)
        expected, half = theirs.train()(x), torch.compile(ours.train(), fullgraph=True, backend="eager")(x.bfloat16())
        assert half.dtype == torch.bfloat16
        assert torch.allclose(half.float(), expected, atol=0.05)
        assert ours.running_mean.dtype == torch.float32
    finally:
        dist.destroy_process_group()
