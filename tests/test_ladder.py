"""Ladders: the runs they are made of, what one measures, that a stopped one goes on, that Ray does the same jobs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import ray
import torch

import allyouneed
from allyouneed.core import workers
from allyouneed.core.errors import InputError
from allyouneed.data.batches import Windows
from allyouneed.models import gpt2
from allyouneed.objectives.next_token import next_token
from allyouneed.papers.base import Report
from allyouneed.train import ladder
from allyouneed.train.loop import Training
from allyouneed.train.schedules import Cosine
from allyouneed.train.suite import Member

BATCH = 4 * 8


def member(dim: int) -> Member:
    model = gpt2.architecture(vocab_size=11, context=8, dim=dim, num_layers=1, num_heads=1)
    return Member(model=model, training=Training(steps=100, schedule=Cosine(warmup=10)))


SIZES = {"small": member(8), "large": member(16)}


def climb(one: Member, seed: int, folder: Path | None) -> dict[str, list[float]]:
    batches = Windows(torch.arange(500) % 11, batch_size=4, length=8, seed=seed)
    held_out = next(Windows(torch.arange(500) % 11, batch_size=4, length=8, seed=99))

    def evaluate(module: torch.nn.Module) -> float:
        return next_token(module, held_out).mean.item()

    done = ladder.climb(
        one, next_token, batches, evaluate, batch_tokens=BATCH, seed=seed, folder=folder, points=4, quiet=True
    )
    return vars(done)


def test_a_grid_has_every_size_on_every_budget_each_with_its_own_schedule():
    runs = ladder.grid(SIZES, [640, 6400], batch_tokens=BATCH)
    assert list(runs) == ["small, 640 tokens", "large, 640 tokens", "small, 6.4k tokens", "large, 6.4k tokens"]
    assert [run.training.steps for run in runs.values()] == [20, 20, 200, 200]
    assert [run.training.schedule.warmup for run in runs.values()] == [2, 2, 20, 20]
    ends = [run.training.schedule(run.training.steps, run.training.steps) for run in runs.values()]
    assert ends == pytest.approx([0.1] * 4)  # each cosine comes to its floor where its run ends


def test_isoflops_spend_the_same_on_every_size():
    def cost(model: gpt2.Decoder.Config) -> float:
        return 3 * model.flops(1, 8) / 8

    runs = ladder.isoflops(SIZES, [3e8, 3e9], cost, batch_tokens=BATCH)
    assert list(runs) == ["300MFLOP, small", "300MFLOP, large", "3GFLOP, small", "3GFLOP, large"]
    for name, run in runs.items():
        spent = run.training.steps * BATCH * cost(run.model)
        assert 0.97 < spent / (3e8 if name.startswith("300M") else 3e9) <= 1  # but for the last, unfinished batch
    few = ladder.isoflops(SIZES, [2.5e5], cost, batch_tokens=BATCH)
    assert list(few) == ["250kFLOP, small"]  # no batch of the large one


def test_budgets_too_small_are_refused_in_one_line():
    with pytest.raises(InputError, match=r"compute=1000: one batch of the smallest model, small, takes 1.28e.05 FLOPs"):
        ladder.isoflops(SIZES, [1e3], lambda model: 4e3 * model.dim / 8, batch_tokens=BATCH)
    with pytest.raises(InputError, match="tokens=31: less than one batch of 32 tokens"):
        ladder.grid(SIZES, [31], batch_tokens=BATCH)


def test_two_budgets_of_one_name_are_refused_in_one_line():
    with pytest.raises(InputError, match=r"^ladder: two runs are called 'small, 120k tokens'; names keep three digits"):
        ladder.grid(SIZES, [1.2e5, 1.204e5], batch_tokens=BATCH)
    with pytest.raises(InputError, match=r"^ladder: two runs are called '120GFLOP, small'; names keep three digits"):
        ladder.isoflops(SIZES, [1.2e11, 1.204e11], lambda model: 1e4 * model.dim, batch_tokens=BATCH)


def test_a_run_is_measured_along_its_training_and_goes_on_bit_for_bit(tmp_path):
    run = ladder.ending(SIZES["small"], 640, batch_tokens=BATCH)
    whole = climb(run, 0, None)
    assert whole["tokens"] == [160, 320, 480, 640] and whole["losses"][-1] < whole["losses"][0]
    assert climb(run, 1, None) != whole
    assert climb(run, 0, tmp_path) == whole
    newest = sorted(tmp_path.glob("checkpoints/*"))[-1]
    assert newest.exists() and climb(run, 0, tmp_path) == whole  # from the last checkpoint, nothing left to do


# many at once


def report(folder: Path, **given) -> Report:
    return Report(slug="fake", seeds=[0, 1], folder=folder, evidence="small world", quiet=True, **given)


@pytest.mark.parametrize(
    ("address", "message"),
    [("127.0.0.1:1", r"^ray: nobody answers at '127\.0\.0\.1:1'"), ("there", "^ray: 'there' is no address")],
)
def test_no_cluster_where_one_was_promised(address: str, message: str):
    with pytest.raises(InputError, match=message):
        list(workers.over_ray(address)(print, [("nothing",)]))


@pytest.mark.parametrize("address", ["local", "auto"])
def test_local_is_this_machine_whatever_the_environment_says(address: str, monkeypatch):
    asked: list[str | None] = []

    def init(address: str | None = None, **options) -> None:
        asked.append(address)
        raise ConnectionError("no cluster")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(InputError, match=rf"^ray: there is no cluster at '{address}'; start one, or write local$"):
        list(workers.over_ray(address)(print, [("nothing",)]))
    assert asked == [address]  # None would be RAY_ADDRESS, where there is one


@pytest.fixture(scope="module")
def cluster():
    """A local Ray whose workers see this file."""
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(Path(__file__).parent), str(Path(allyouneed.__file__).parents[1])]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")  # else it kills where other tests have the memory
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


def test_ray_does_the_same_jobs_with_the_same_results(cluster, tmp_path):
    runs = ladder.grid(SIZES, [320], batch_tokens=BATCH)
    one, many = report(tmp_path / "one"), report(tmp_path / "many", workers=workers.over_ray("local"))
    assert one.repeat(runs, climb) == many.repeat(runs, climb)
    files = [{path.relative_to(folder) for path in folder.rglob("seed?.json")} for folder in (one.folder, many.folder)]
    assert files[0] == files[1] and len(files[0]) == many.jobs_done == many.jobs_planned == 4


def test_ray_does_nothing_twice_and_passes_errors_on(cluster, tmp_path):
    def work(arm: str, seed: int, folder: Path) -> str:
        if arm == "broken":
            raise InputError(f"seed {seed} is at fault")
        folder.joinpath("done").touch(exist_ok=False)
        return arm * seed

    spread = workers.over_ray("local")
    for _ in range(2):
        assert report(tmp_path, workers=spread).repeat({"a": "a", "b": "b"}, work) == {"a": ["", "a"], "b": ["", "b"]}
    with pytest.raises(InputError, match=r"^seed \d is at fault$"):
        report(tmp_path, workers=spread).repeat({"broken": "broken"}, work)


def test_a_worker_that_dies_is_told_in_one_line(cluster):
    with pytest.raises(
        InputError, match=r"^ray: a worker or its machine was lost \(WorkerCrashedError\); run it again"
    ):
        list(workers.over_ray("local")(os._exit, [(1,)]))
