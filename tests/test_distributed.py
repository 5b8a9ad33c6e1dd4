"""Two ranks over gloo do what one process does. Run as a program, this file is what `torchrun` starts."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import At, batches, run, settings, tiny, untimed

from allyouneed.core.errors import InputError
from allyouneed.core.files import read_json
from allyouneed.core.metrics import read
from allyouneed.objectives.next_token import next_token
from allyouneed.train import checkpoints as saving
from allyouneed.train.checkpoints import Checkpoints
from allyouneed.train.gradients import differentiate
from allyouneed.train.interrupts import Stopped
from allyouneed.train.mesh import Mesh
from allyouneed.train.ranks import Ranks, join

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TRAINING = settings(steps=20, accumulate=2, ema=0.9)


def launch(what: str, folder: Path, program: str = __file__, *options: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*TORCHRUN, *options, program, what, str(folder)]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=-1, stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(launched: subprocess.Popen[str]) -> str:
    """What it printed; torchrun takes its ranks along when it is asked to end."""
    try:
        return launched.communicate(timeout=300)[0]
    except subprocess.TimeoutExpired:
        launched.terminate()
        return launched.communicate()[0]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """The folder in which two ranks did everything under "as a program" but wait."""
    folder = tmp_path_factory.mktemp("ranks")
    launched = launch("work", folder)
    output = finish(launched)
    assert launched.returncode == 0, output
    return folder


def test_loss_curve_and_weights_are_those_of_one_process(two_ranks):
    module = tiny(dropout=0.0)
    alone = run(module, training=TRAINING).history
    together = list(read(two_ranks / "plain/metrics.jsonl"))
    assert len(together) == len(alone) == 20
    for a, b in zip(untimed(alone), untimed(together), strict=True):
        assert b == pytest.approx(a, abs=1e-5)
    stored = saving.read(Checkpoints(two_ranks / "plain/checkpoints").newest())["model"]
    assert all(torch.allclose(stored[name], p, atol=1e-5) for name, p in module.named_parameters())


def test_the_gradient_is_that_of_one_process(two_ranks):
    module = tiny(dropout=0.0)
    next_token(module, next(batches())).mean.backward()
    for rank in (0, 1):
        for p, shared in zip(
            module.parameters(), json.loads((two_ranks / f"gradient-{rank}.json").read_text()), strict=True
        ):
            assert torch.allclose(p.grad, torch.tensor(shared), atol=1e-6, rtol=0)


def test_ranks_end_with_the_same_weights_though_they_began_apart_and_dropped_differently(two_ranks):
    digests = [json.loads((two_ranks / f"whole-{rank}.json").read_text()) for rank in (0, 1)]
    assert digests[0]["weights"] == digests[1]["weights"]
    assert digests[0]["next"] != digests[1]["next"]  # each rank's dropout is its own


def test_resuming_two_ranks_is_bit_for_bit(two_ranks):
    for rank in (0, 1):
        whole, resumed = (json.loads((two_ranks / f"{run}-{rank}.json").read_text()) for run in ("whole", "resumed"))
        assert whole == resumed
    curves = [untimed(list(read(two_ranks / f"{run}/metrics.jsonl"))) for run in ("whole", "resumed")]
    assert curves[0] == curves[1] and len(curves[0]) == 20


def test_a_signal_to_one_rank_stops_both_after_the_same_step(two_ranks):
    stops = [(two_ranks / f"stopped-{rank}.txt").read_text() for rank in (0, 1)]
    assert stops[0] == stops[1] and re.match(r"SIGTERM: stopped after step \d+ of 20", stops[0])


def test_one_process_takes_up_what_two_began(two_ranks):
    module = tiny(seed=3, dropout=0.0)
    assert run(module, two_ranks / "plain", TRAINING.replace(steps=22)).step == 22


def test_too_few_rows_for_the_ranks(two_ranks):
    for rank in (0, 1):
        assert "a batch of 1 rows (ids) cannot be split in 2" in (two_ranks / f"rows-{rank}.txt").read_text()


def test_ctrl_c_on_torchrun_finishes_the_step_and_saves(tmp_path):
    """It hands it on to its ranks, one after the other."""
    launched = launch("wait", tmp_path)
    while not list((tmp_path / "checkpoints").glob("step-*")):
        assert launched.poll() is None, launched.communicate()[0]
        time.sleep(0.02)
    os.killpg(launched.pid, signal.SIGINT)
    output = finish(launched)
    lines = [(tmp_path / f"stopped-{rank}.txt").read_text() for rank in (0, 1)]
    assert lines[0] == lines[1], output
    step = saving.read_plain(Checkpoints(tmp_path / "checkpoints").newest())["run"]["step"]
    assert f"after step {step} of" in lines[0]


def test_alone_nothing_is_sent(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks, x = join(), torch.ones(2)
    assert ranks == Ranks(rank=0, world=1)
    ranks.add([x])
    assert x.tolist() == [1, 1] and ranks.any(7) == 7 and ranks.gather(x)[0] is x
    assert not torch.distributed.is_initialized()


def test_gradients_are_added_up_without_a_second_copy_of_all(monkeypatch):
    """Small ones travel together in messages of a limited size, large ones as they lie."""
    sent: list[tuple[int, int]] = []

    def all_reduce(x: torch.Tensor, group: Any = None) -> None:
        sent.append((x.numel(), x.data_ptr()))
        x.mul_(2)  # two ranks with the same

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr("allyouneed.train.ranks.BUCKET", 4 * 10)
    tensors = [torch.randn(n) for n in (3, 4, 5, 11, 1)] + [torch.randn(6, 4).t()]
    wanted = [2 * x for x in tensors]
    Ranks(world=2).add(tensors)
    assert all(torch.equal(x, y) for x, y in zip(tensors, wanted, strict=True))
    assert [numel for numel, _ in sent] == [7, 5, 11, 1, 24]
    assert sent[2][1] == tensors[3].data_ptr()


@pytest.mark.parametrize("mesh", ["whole", "split"])
def test_kill_9_of_one_rank_ends_the_job_with_a_line(tmp_path, mesh):
    launched = launch(f"die {mesh}", tmp_path)
    output = finish(launched)
    assert launched.returncode != 0, output
    assert re.search(r"rank 0: another rank is gone \(.*\); the last checkpoint stands, the same call goes on", output)
    step = saving.read_plain(Checkpoints(tmp_path / "checkpoints").newest())["run"]["step"]
    assert step == 9 or (mesh == "split" and step == 6)  # slices of step 9 may still have been under way


def test_torchrun_starts_anew_from_the_last_checkpoint(tmp_path):
    launched = launch("die split", tmp_path, __file__, "--max-restarts", "1")
    output = finish(launched)
    assert launched.returncode == 0, output
    alone = run(tiny(dropout=0.0), training=TRAINING).history
    together = list(read(tmp_path / "metrics.jsonl"))
    assert [row["step"] for row in together] == list(range(1, 21))
    assert [row["loss"] for row in together] == pytest.approx([row["loss"] for row in alone], abs=1e-5)


def test_papers_are_written_by_the_first_rank_alone(tmp_path):
    command = [*TORCHRUN, "-m", "allyouneed", "run", "alibi", "--size", "smoke", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "alibi").iterdir()
    assert read_json(folder / "report.json")["slug"] == "alibi"
    assert done.stdout.count("95 % interval") == 1 and done.stderr.count("size smoke") == 1


def test_the_command_line_refuses_a_mesh_on_each_rank_with_code_2(tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"text {n} " * 40}) + "\n" for n in range(9)))
    command = [*TORCHRUN, "-m", "allyouneed", "train", "new:llama", str(tmp_path / "texts.jsonl"), "--vocab", "257"]
    sizes = ["--length", "16", "--dim", "24", "--heads", "3", "--out", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, *sizes, "--set", "mesh.tensor=2"], env=environment, capture_output=True, text=True, timeout=300
    )
    line = "error: mesh.tensor=2 does not divide num_heads=3 of blocks.0.mixer"
    assert line in done.stderr.splitlines() and "exitcode  : 2" in done.stderr, done.stderr


# As a program: one rank of two


def stopped(folder: Path, rank: int, name: str, **options: Any) -> None:
    try:
        run(tiny(), folder, **options)
    except (Stopped, InputError) as error:
        (folder.parent / f"{name}-{rank}.txt").write_text(str(error))


def work(folder: Path, rank: int) -> None:
    dropped = []

    def keep_last_dropout(module: torch.nn.Module, arguments: Any, output: torch.Tensor) -> None:
        dropped[:] = [output.eq(0).tolist()]

    def told(name: str, **options: Any) -> None:
        module = tiny(seed=rank)  # rank 1 begins elsewhere and follows
        module.dropout.register_forward_hook(keep_last_dropout)
        run(module, folder / name, TRAINING, **options)
        weights = [p.tolist() for p in module.parameters()]
        (folder / f"{name}-{rank}.json").write_text(json.dumps({"weights": weights, "next": dropped}))

    module = tiny(dropout=0.0)
    differentiate(module, next_token, next(batches()), join())
    (folder / f"gradient-{rank}.json").write_text(json.dumps([p.grad.tolist() for p in module.parameters()]))
    run(tiny(seed=rank, dropout=0.0), folder / "plain", TRAINING)
    told("whole")
    signalling = [At(7, lambda: os.kill(os.getpid(), signal.SIGTERM))]
    stopped(folder / "resumed", rank, "stopped", training=TRAINING, callbacks=signalling)
    told("resumed")
    stopped(folder / "rows", rank, "rows", data=batches(rows=1))


def wait(folder: Path, rank: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # outside of training; one rank may hear of it as the other has ended
    try:
        run(tiny(), folder, settings(steps=100_000))
    except Stopped as error:
        (folder / f"stopped-{rank}.txt").write_text(str(error))


def die(folder: Path, rank: int, mesh: Mesh) -> None:
    """Rank 1 kills itself at step 10, the first time."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, outside of training: the line is to be written
    calls = 0

    def objective(module: torch.nn.Module, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 * 10 and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return next_token(module, batch)

    run(tiny(dropout=0.0), folder, TRAINING.replace(mesh=mesh), objective=objective)


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, where, me = sys.argv[1], Path(sys.argv[2]), int(os.environ["RANK"])
    if what.startswith("die"):
        die(where, me, Mesh(shard=2 if what.endswith("split") else 1))
    else:
        {"work": work, "wait": wait}[what](where, me)
