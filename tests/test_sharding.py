"""A module split over two ranks does what it does on one. Run as a program, this file is what `torchrun` starts."""

from __future__ import annotations

import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sharded_run import BALANCED, FAMILIES, MESHES, batch_of, batches, built, run, settings, sparse
from test_distributed import finish, launch
from tiny_run import counting
from torch import nn
from torch.distributed.tensor import DTensor

from allyouneed.core.errors import InputError, RankLostError
from allyouneed.core.metrics import read
from allyouneed.core.modes import evaluating
from allyouneed.data.batches import Epochs
from allyouneed.models import gpt2
from allyouneed.models.checkpoints.loading import load_module, save
from allyouneed.objectives.next_token import next_token
from allyouneed.train import checkpoints as saving
from allyouneed.train import sharding
from allyouneed.train.checkpoints import Checkpoints
from allyouneed.train.gradients import Objective, differentiate
from allyouneed.train.loop import train
from allyouneed.train.mesh import Mesh
from allyouneed.train.optimizers import Adafactor, AdamW
from allyouneed.train.planner import Machine, cost
from allyouneed.train.ranks import Ranks, join
from allyouneed.train.schedules import Constant
from allyouneed.train.suite import Snapshots
from allyouneed.train.tracing import trace

ALONE = Ranks()
SHORT = 12  # steps, where fifty would show no more
CROSSED = {
    "shard by tensor": Mesh(shard=2, tensor=2),
    "data by shard": Mesh(data=2, shard=2),
    "data by tensor": Mesh(tensor=2),
    "expert by shard": Mesh(expert=2, shard=2),
    "expert by tensor": Mesh(expert=2, tensor=2),
    "data by expert": Mesh(data=2, expert=2),
}
COPIES = {"data": Mesh(data=2)}
FULL = {  # mesh, and after how many steps there is something to log
    "log of copies": (Mesh(data=2), 1),
    "checkpoint of copies": (Mesh(data=2), 50),
    "log of slices": (Mesh(shard=2), 1),
}
WIDER: dict[str, Any] = {"dim": 32, "vocab_size": 64, "hidden_dim": 64}


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, Any]:
    """One process: the dense model and the one with experts, fifty steps each, saved on the way."""
    folder = tmp_path_factory.mktemp("alone")
    modules = {"dense": built(), "sparse": sparse()}
    for name, module in modules.items():
        run(module, folder / name, settings(ema=0.9))
    return {"folder": folder, **modules}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, alone) -> Path:
    """The folder in which two ranks trained."""
    folder = tmp_path_factory.mktemp("trained")
    half_way(alone["folder"] / "dense", folder / "alone to shard")
    return done_by_ranks("train", folder)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """The folder in which two ranks wrote what single steps gave."""
    return done_by_ranks("measure", tmp_path_factory.mktemp("measured"))


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory) -> Path:
    """The folder in which four ranks, on grids of two dimensions, wrote what they found."""
    return done_by_ranks("cross", tmp_path_factory.mktemp("four"), "--nproc-per-node", "4")


def done_by_ranks(what: str, folder: Path, *options: str) -> Path:
    launched = launch(what, folder, __file__, *options)
    output = finish(launched)
    assert launched.returncode == 0, output
    return folder


def rows_of_ten(chosen: list[int]) -> dict[str, torch.Tensor]:
    rows = counting(torch.Generator().manual_seed(1), rows=10, length=8)
    return {"ids": rows["ids"][chosen], "targets": rows["targets"][chosen], "row": torch.tensor(chosen)}


def half_way(done: Path, folder: Path) -> Path:
    """A copy of a finished run as it was at step 25."""
    shutil.copytree(done, folder)
    shutil.rmtree(folder / "checkpoints/step-00000050")
    return folder


@pytest.mark.parametrize(("family", "mesh"), [*itertools.product(FAMILIES, ("shard", "tensor")), ("mixtral", "expert")])
def test_the_gradient_is_that_of_one_process(measured, family, mesh):
    found = json.loads((measured / "gradients.json").read_text())[f"{family}, {mesh}"]
    assert found["largest"] > 1e-3 and found["apart"] < 1e-5 * found["largest"] and found["norm"] < 1e-5


@pytest.mark.parametrize("mesh", CROSSED)
def test_so_it_is_on_grids_of_two_dimensions(four_ranks, mesh):
    found = json.loads((four_ranks / "gradients.json").read_text())[f"mixtral, {mesh}"]
    assert found["largest"] > 1e-3 and found["apart"] < 1e-5 * found["largest"] and found["norm"] < 1e-5


@pytest.mark.parametrize("mesh", CROSSED)
def test_slices_of_slices_are_put_together(four_ranks, mesh):
    """As one process reads them, as the ranks gather them, and as ranks on another grid read them."""
    stored = saving.read(four_ranks / mesh / "checkpoints/step-00000003")["model"]
    for name in ("gathered", "moved"):
        exported = load_file(four_ranks / f"{mesh} {name}.safetensors")
        assert stored.keys() == exported.keys() and all(torch.equal(stored[key], x) for key, x in exported.items())


@pytest.mark.parametrize("mesh", MESHES)
def test_the_loss_curve_is_that_of_one_process(two_ranks, alone, mesh):
    here, there = losses(alone["folder"] / ("sparse" if mesh == "expert" else "dense")), losses(two_ranks / mesh)
    assert len(here) == len(there) == 50 and here[-1] < here[0] - 0.5
    assert there == pytest.approx(here, abs=1e-4)


@pytest.mark.parametrize("name", ["importance_loss", "switch_loss", "z_loss", "busiest"])
def test_experts_are_balanced_as_one_process_balances_them(two_ranks, alone, name):
    """Over all tokens of the batch: no rank's own are."""
    here, there = (
        [row[name] for row in read(folder / "metrics.jsonl")]
        for folder in (alone["folder"] / "sparse", two_ranks / "expert")
    )
    assert len(here) == 50 and there == pytest.approx(here, abs=1e-4)


@pytest.mark.parametrize(
    "name", ["recomputed", "sliced", "deferred", "alone to shard", "shard to tensor", "tensor to shard"]
)
def test_so_is_that_of_a_run_that(two_ranks, alone, name):
    here, there = losses(alone["folder"] / "dense"), losses(two_ranks / name)
    assert len(there) == (50 if " to " in name else SHORT) and there == pytest.approx(here[: len(there)], abs=1e-4)


@pytest.mark.parametrize("mesh", MESHES)
def test_one_process_takes_up_what_two_saved(two_ranks, alone, tmp_path, mesh):
    name = "sparse" if mesh == "expert" else "dense"
    module = sparse(seed=5) if mesh == "expert" else built(seed=5)
    folder = half_way(two_ranks / mesh, tmp_path / "run")
    run(module, folder, settings(ema=0.9))
    assert losses(folder) == pytest.approx(losses(alone["folder"] / name), abs=1e-4)
    for key, p in alone[name].named_parameters():
        assert torch.allclose(module.get_parameter(key), p, atol=1e-4), key


@pytest.mark.parametrize("mesh", MESHES)
def test_a_checkpoint_of_slices_holds_the_whole_state(two_ranks, alone, mesh):
    here, there = (
        saving.read(folder / "checkpoints/step-00000025")
        for folder in (alone["folder"] / ("sparse" if mesh == "expert" else "dense"), two_ranks / mesh)
    )
    for part in ("model", "averages", "optimizer", "batches"):
        a, b = ({}, {})
        saving.take_tensors(here[part], "", a)
        saving.take_tensors(there[part], "", b)
        assert a.keys() == b.keys()
        for name, x in a.items():
            assert torch.allclose(x.double(), b[name].double(), atol=1e-4), (part, name)


def test_each_rank_writes_its_slices_and_nobody_a_pickle(two_ranks):
    names = {path.name for path in (two_ranks / "shard/checkpoints/step-00000050").iterdir()}
    assert {"model-00000.safetensors", "model-00001.safetensors", "state.json", "SHA256SUMS"} <= names
    assert all(name.endswith((".safetensors", ".json", "SHA256SUMS")) for name in names)
    sizes = [
        sum(f.stat().st_size for f in (two_ranks / "shard/checkpoints/step-00000050").glob(f"optimizer-0000{rank}*"))
        for rank in (0, 1)
    ]
    assert 0.8 < sizes[0] / sizes[1] < 1.25


@pytest.mark.parametrize("spoil", [lambda p: os.truncate(p, 100), lambda p: os.truncate(p, 0), lambda p: p.unlink()])
@pytest.mark.parametrize("name", ["model-00001.safetensors", "optimizer-00000.safetensors", "state.json", "SHA256SUMS"])
def test_a_broken_slice_is_named_and_passed_over(two_ranks, tmp_path, capsys, name, spoil):
    shutil.copytree(two_ranks / "shard", tmp_path, dirs_exist_ok=True)
    spoil(tmp_path / "checkpoints/step-00000050" / name)
    assert Checkpoints(tmp_path / "checkpoints").newest() == tmp_path / "checkpoints/step-00000025"
    (line,) = capsys.readouterr().err.splitlines()
    assert "step-00000050" in line and line.endswith("; passing over this checkpoint")


def test_ranks_agree_on_passing_over_a_broken_one(two_ranks):
    assert losses(two_ranks / "broken") == losses(two_ranks / "shard")


def test_a_disk_that_is_full_for_one_rank_stops_both_with_one_line(two_ranks, alone, tmp_path):
    lines = [(two_ranks / f"full-{rank}.txt").read_text() for rank in (0, 1)]
    assert lines[0] == lines[1] and "\n" not in lines[0]
    assert re.search(r"step-00000010: cannot be written: .*File too large.*; the last checkpoint stands", lines[0])
    folder = shutil.copytree(two_ranks / "full", tmp_path / "full")
    assert Checkpoints(folder / "checkpoints").paths() == [folder / "checkpoints/step-00000005"]
    run(built(seed=5), folder, settings(steps=SHORT))
    assert losses(folder) == pytest.approx(losses(alone["folder"] / "dense")[:SHORT], abs=1e-4)
    assert not list((folder / "checkpoints").glob(".*"))  # what was half-written is gone


@pytest.mark.parametrize("case", FULL)
def test_a_disk_that_is_full_for_the_first_rank_stops_both_with_one_line(two_ranks, case):
    """Who only hears of it says what the first says, log or checkpoint, slices or none."""
    lines = [(two_ranks / f"full for the first, {case}-{rank}.txt").read_text() for rank in (0, 1)]
    assert lines[0] == lines[1] and "\n" not in lines[0]
    name = "metrics.jsonl" if "log" in case else "step-00000010"
    assert re.search(rf"{name}: cannot be written: .*File too large.*; the last checkpoint stands", lines[0])
    folder = two_ranks / f"full for the first, {case}"
    assert Checkpoints(folder / "checkpoints").newest() == folder / "checkpoints/step-00000005"


def test_a_run_that_fails_ends_when_its_last_checkpoint_is_on_disk(measured):
    """So that one that goes on in the same process does not remove as half-written what is still being written."""
    for rank in (0, 1):
        assert json.loads((measured / f"failed-{rank}.json").read_text()) == ["step-00000002"]


def test_a_split_model_is_exported_and_shown_whole(two_ranks, alone):
    for mesh in ("shard", "tensor"):
        ids = batch_of(next_token)["ids"]
        exported = load_module(two_ranks / f"{mesh}-exported")
        assert torch.allclose(exported(ids).logits, alone["dense"].eval()(ids).logits, atol=1e-3)
    assert (two_ranks / "snapshots/step0/model.safetensors").exists()
    assert torch.equal(
        load_module(two_ranks / "snapshots", step=50).embedding.weight,
        load_module(two_ranks / "shard-exported").embedding.weight,
    )


def test_evaluation_of_a_split_module_sees_the_average(two_ranks, alone):
    seen = json.loads((two_ranks / "evaluated.json").read_text())
    module = alone["dense"].eval()
    average = saving.read(alone["folder"] / "dense/checkpoints/step-00000050")["averages"]
    with torch.no_grad():
        of_average = torch.func.functional_call(module, average, (batch_of(next_token)["ids"],)).logits
    assert seen == pytest.approx(of_average.sum().item(), rel=1e-3)


def test_each_row_is_seen_once_an_epoch_whatever_the_ranks(two_ranks, tmp_path):
    """Five steps on two ranks with rows of their own, three on two with the same, two on one: four epochs of ten."""
    apart, same = (
        [json.loads((two_ranks / f"rows-{n}-{r}.json").read_text()) for r in (0, 1)] for n in ("apart", "same")
    )
    assert same[0] == same[1] and len(apart[0]) == len(apart[1]) == 10
    shutil.copytree(two_ranks / "epochs", tmp_path / "epochs")
    last: list[int] = []

    def objective(module: nn.Module, batch: Any) -> Any:
        last.extend(batch["row"].tolist())
        return next_token(module, batch)

    data = Epochs(range(10), batch_size=4, collate=rows_of_ten, seed=0)
    train(built(), objective, data, settings(steps=10, schedule=Constant()), folder=tmp_path / "epochs", quiet=True)
    steps = [row for pair in zip(apart[0], apart[1], strict=True) for row in pair]  # ranks take rows in turn
    order = [*steps, *same[0], *last]
    assert [sorted(order[n : n + 10]) for n in range(0, 40, 10)] == [list(range(10))] * 4


def test_each_rank_holds_half_of_what_is_sharded(two_ranks):
    held = [int((two_ranks / f"held-{rank}.txt").read_text()) for rank in (0, 1)]
    row = built().embedding.weight[0].nbytes  # of which there are eleven
    assert sum(held) == sum(p.nbytes for p in built().parameters()) and held[0] - held[1] == row


def test_gradients_travel_once_a_step_however_often_they_are_accumulated(measured):
    once, four, sliced = json.loads((measured / "reductions.json").read_text())
    assert once == four == 3 and sliced == 12  # two blocks and the rest


@pytest.mark.parametrize("mesh", ["data", "shard", "tensor"])
def test_the_planner_foresees_the_memory_of_a_rank(measured, mesh):
    """Weights, gradients and moments to 1 %, for rows that do not divide by two; what is kept to 3 %."""
    found = json.loads((measured / "memory.json").read_text())[mesh]
    batch = batch_of(next_token)
    rows, context = batch["ids"].shape

    def row(module: nn.Module) -> None:
        ids = torch.zeros(1, context, dtype=torch.long)
        next_token(module, {"ids": ids, "targets": ids})

    traced = trace(lambda: built(**WIDER), row, context, narrow=False)
    each = rows // (1 if mesh == "tensor" else 2)
    planned = cost(traced, (MESHES | COPIES)[mesh].sizes(2), rows, each, Machine(), narrow=False)
    assert found["weights"] == pytest.approx(planned.weights, rel=0.01)
    assert found["gradients"] == pytest.approx(planned.gradients, rel=0.01)
    assert found["optimizer"] == pytest.approx(planned.optimizer, rel=0.01)
    assert found["activations"] == pytest.approx(planned.activations, rel=0.03)
    if mesh == "data":
        assert found["copied"] == pytest.approx(planned.gathered, rel=0.01)


def test_sixteen_bits_are_sent_and_summed_in_thirty_two(two_ranks):
    alone = [row["loss"] for row in run(built(), training=settings(steps=SHORT, precision="bf16")).history]
    for mesh in ("shard", "tensor"):
        assert losses(two_ranks / f"{mesh}-bf16") == pytest.approx(alone, abs=5e-2)
        stored = saving.read(two_ranks / f"{mesh}-bf16/checkpoints/step-00000012")["model"]
        assert {x.dtype for x in stored.values()} == {torch.float32}


def test_whoever_trains_alone_pays_for_none_of_it():
    module = built()
    sharding.begin(module, ALONE)
    assert not sharding.is_split(module) and sharding.whole(module) is module
    assert Mesh().lay(ALONE, module) is ALONE


def test_whoever_trains_alone_imports_none_of_it():
    program = "import sys; from tiny_run import run, tiny; run(tiny()); print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=60, check=True)
    loaded = done.stdout.split()
    assert "allyouneed.train.mesh" in loaded
    assert not {"allyouneed.train.splitting", "allyouneed.train.slices"} & {*loaded}


def test_recomputing_blocks_changes_no_bit():
    plain, recomputed = built(), built()
    a, b = run(plain, training=settings(steps=5)), run(recomputed, training=settings(steps=5, recompute=True))
    assert [row["loss"] for row in a.history] == [row["loss"] for row in b.history]
    assert all(torch.equal(x, y) for x, y in zip(plain.parameters(), recomputed.parameters(), strict=True))
    assert "forward" not in vars(recomputed.blocks[0])  # as it was


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_keeps_less_and_gives_the_same_gradient(family):
    config, objective = FAMILIES[family]
    gradients, kept = [], []
    for asked in (False, True):
        torch.manual_seed(0)
        module, total = config.build().train(), 0

        def count(x: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += x.nbytes
            return x

        with sharding.recomputed(module, asked), torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            differentiate(module, objective, batch_of(objective), ALONE)
        gradients.append([p.grad for p in module.parameters()])
        kept.append(total)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_recomputing_drops_nothing_where_nothing_was_dropped():
    """The gradient is computed after the mode of the forward pass was left."""
    gradients = []
    for asked in (False, True):
        torch.manual_seed(0)
        module = gpt2.architecture(vocab_size=20, context=16, dim=16, num_layers=2, num_heads=2, dropout=0.5).build()
        with sharding.recomputed(module.train(), asked):
            with evaluating(module):
                total = module(torch.arange(16)[None]).logits.square().sum()
            total.backward()
        gradients.append([p.grad for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# Meshes that do not fit


REFUSED = {
    "mesh: data=1 x shard=3 wants a multiple of 3 ranks, and there are 2": Mesh(shard=3),
    "mesh: data=2 x shard=2 wants 4 ranks, and there are 2": Mesh(data=2, shard=2),
    "mesh.shard=0; it must be 1 or more": Mesh(shard=0),
    "mesh.tensor=2 does not divide num_kv_heads=1 of blocks.0.mixer": Mesh(tensor=2),
    "mesh.expert=2: Decoder has no experts": Mesh(expert=2),
}


def odd(mesh: Mesh) -> nn.Module:
    return built(num_kv_heads=1) if mesh.tensor > 1 else built()


@pytest.mark.parametrize("line", REFUSED)
def test_a_mesh_that_does_not_fit_is_one_line_on_each_rank(measured, line):
    lines = [json.loads((measured / f"refused-{rank}.json").read_text()) for rank in (0, 1)]
    assert lines[0] == lines[1]
    assert any(said.startswith(line.replace("data=1 x ", "")) for said in lines[0]), lines[0]


def test_what_cannot_be_split():
    with pytest.raises(InputError, match=r"mesh\.tensor=2 does not divide hidden_dim=33 of blocks\.0\.channel"):
        Mesh(tensor=2).check(built(hidden_dim=33))
    with pytest.raises(InputError, match=r"mesh\.tensor=2: no part of Linear can be split among ranks"):
        Mesh(tensor=2).check(nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"mesh\.expert=3 does not divide num_experts=4 of blocks\.0\.channel"):
        Mesh(expert=3).check(sparse())
    with pytest.raises(InputError, match="Adafactor cannot step slices of a tensor; choose AdamW"):
        run(built(), training=settings(optimizer=Adafactor.Config(), mesh=Mesh(shard=2)))
    with (
        pytest.raises(InputError, match="recompute=True: Linear has no blocks"),
        sharding.recomputed(nn.Linear(2, 2), True),
    ):
        pass


# As a program: one rank of two


def gradients(folder: Path, rank: int) -> None:
    experts = ["expert"]
    names = {family: ["shard", "tensor", *(experts if family == "mixtral" else [])] for family in FAMILIES}
    compare(folder, rank, names, MESHES)


def compare(
    folder: Path, rank: int, names: dict[str, list[str]], meshes: dict[str, Mesh], given: Objective | None = None
) -> None:
    """Gradients of families on meshes with those of one process; of their own objectives, or the `given` one."""
    found = {}
    for family in names:
        config, objective = FAMILIES[family]
        objective = given or objective
        batch = batch_of(objective)
        for name in names[family]:
            torch.manual_seed(0)
            reference = config.build()
            torch.manual_seed(rank)
            module = config.build()
            ranks = meshes[name].lay(join(), module)
            alone = differentiate(reference, objective, batch, ALONE)
            torch.manual_seed(0)
            if rank == 0:
                module = config.build()
            sharding.begin(module, ranks)
            together = differentiate(module, objective, batch, ranks, accumulate=2 if name == "shard" else 1)
            apart, largest = 0.0, 0.0
            for (_, p), (_, q) in zip(module.named_parameters(), reference.named_parameters(), strict=True):
                gradient = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                apart = max(apart, (gradient - q.grad).abs().max().item())
                largest = max(largest, q.grad.abs().max().item())
            found[f"{family}, {name}"] = {
                "apart": apart,
                "largest": largest,
                "norm": abs(together.norm / alone.norm - 1) + abs(together.means["loss"] - alone.means["loss"]),
            }
    if rank == 0:
        (folder / "gradients.json").write_text(json.dumps(found))


def cross(folder: Path, rank: int) -> None:
    compare(folder, rank, {"mixtral": list(CROSSED)}, CROSSED, BALANCED)
    others = [*list(CROSSED)[1:], next(iter(CROSSED))]
    for name, other in zip(CROSSED, others, strict=True):
        for mesh, to in ((CROSSED[name], "gathered"), (CROSSED[other], "moved")):
            torch.manual_seed(rank)
            module = FAMILIES["mixtral"][0].build()
            run(module, folder / name, settings(steps=3, mesh=mesh))
            gathered = sharding.whole(module)
            if rank == 0:
                save_file(dict(gathered.named_parameters()), folder / f"{name} {to}.safetensors")


def curves(folder: Path, rank: int) -> None:
    for name, mesh in MESHES.items():
        module = sparse(seed=rank) if name == "expert" else built(seed=rank)
        run(module, folder / name, settings(ema=0.9, mesh=mesh))
        if name != "expert":
            exported = sharding.whole(module)
            if rank == 0:
                save(exported, folder / f"{name}-exported")
    run(
        built(seed=rank),
        folder / "recomputed",
        settings(steps=SHORT, mesh=MESHES["shard"], recompute=True, accumulate=2),
    )
    for name in ("shard", "tensor"):
        run(built(seed=rank), folder / f"{name}-bf16", settings(steps=SHORT, mesh=MESHES[name], precision="bf16"))
    sliced = MESHES["shard"].replace(slice_gradients=True)
    run(built(seed=rank), folder / "sliced", settings(steps=SHORT, mesh=sliced, accumulate=4))
    run(sharding.deferred(built), folder / "deferred", settings(steps=SHORT, mesh=MESHES["shard"]))


def epochs(folder: Path, rank: int) -> None:
    """Ten rows an epoch, four a step: as many steps as make four epochs, half of them by each mesh."""

    def seen(name: str, mesh: Mesh, steps: int) -> None:
        rows: list[int] = []

        def objective(module: nn.Module, batch: Any) -> Any:
            rows.extend(batch["row"].tolist())
            return next_token(module, batch)

        data = Epochs(range(10), batch_size=4, collate=rows_of_ten, seed=0)
        training = settings(steps=steps, mesh=mesh, schedule=Constant())
        train(built(), objective, data, training, folder=folder / "epochs", quiet=True)
        (folder / f"rows-{name}-{rank}.json").write_text(json.dumps(rows))

    seen("apart", MESHES["shard"], 5)
    seen("same", MESHES["tensor"], 8)


def moved(folder: Path, rank: int) -> None:
    """From one mesh to another, in the middle of a run."""

    def half(name: str, to: str) -> Path:
        if rank == 0:
            half_way(folder / name, folder / to)
        torch.distributed.barrier()
        return folder / to

    run(built(seed=7), folder / "alone to shard", settings(ema=0.9, mesh=MESHES["shard"]))
    run(built(seed=7), half("shard", "shard to tensor"), settings(ema=0.9, mesh=MESHES["tensor"]))
    run(built(seed=7), half("tensor", "tensor to shard"), settings(ema=0.9, mesh=MESHES["shard"]))
    if rank == 0:
        shutil.copytree(folder / "shard", folder / "broken")
        os.truncate(folder / "broken/checkpoints/step-00000050/model-00001.safetensors", 99)
    torch.distributed.barrier()
    run(built(seed=7), folder / "broken", settings(ema=0.9, mesh=MESHES["shard"]))


def full(folder: Path, rank: int) -> None:
    fill(folder / "full", rank, 1, MESHES["shard"], 1)
    for case, (mesh, log_every) in FULL.items():
        fill(folder / f"full for the first, {case}", rank, 0, mesh, log_every)


def fill(folder: Path, rank: int, filled: int, mesh: Mesh, log_every: int) -> None:
    """From the eighth step on the rank `filled` cannot write."""
    calls, limits = 0, resource.getrlimit(resource.RLIMIT_FSIZE)

    def objective(module: nn.Module, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 8 and rank == filled:
            until(folder / "checkpoints/step-00000005")  # slices are written in the background
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        return next_token(module, batch)

    try:
        training = settings(mesh=mesh, save_every=5, log_every=log_every)
        train(built(), objective, batches(), training, folder=folder, quiet=True)
    except (InputError, RankLostError) as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        folder.with_name(f"{folder.name}-{rank}.txt").write_text(str(error))


def until(path: Path, seconds: float = 30.0) -> None:
    """Wait for a file or folder to appear."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.01)


def failed(folder: Path, rank: int) -> None:
    """What is there when a run on a slow disk fails a step after it saved."""
    seal = saving.seal

    def slowly(*given: Any) -> None:
        time.sleep(1.0)
        seal(*given)

    def objective(module: nn.Module, batch: Any) -> Any:
        objective.calls += 1
        if objective.calls == 3:
            raise InputError("no more")
        return next_token(module, batch)

    objective.calls, saving.seal = 0, slowly
    with pytest.raises(InputError, match="no more"):
        training = settings(mesh=MESHES["shard"], save_every=2)
        train(built(), objective, batches(), training, folder=folder / "failed", quiet=True)
    saving.seal = seal
    names = sorted(path.name for path in (folder / "failed/checkpoints").iterdir())
    (folder / f"failed-{rank}.json").write_text(json.dumps(names))


def looked_at(folder: Path, rank: int) -> None:
    module, seen, ids = built(), [], batch_of(next_token)["ids"]

    def evaluate(trained: nn.Module) -> dict[str, float]:
        seen.append(trained(ids).logits.sum().item())
        return {"sum": seen[-1]}

    training = settings(ema=0.9, mesh=MESHES["shard"], evaluate_every=20)
    run(module, training=training, evaluate=evaluate, snapshot=Snapshots(folder / "snapshots", {0, 50}, save))
    (folder / f"held-{rank}.txt").write_text(str(sum(sharding.local(p).nbytes for p in module.parameters())))
    if rank == 0:
        (folder / "evaluated.json").write_text(json.dumps(seen[-1]))


def reductions(folder: Path, rank: int) -> None:
    """How often gradients are reduced in one step."""
    counts, reduce = [], torch.distributed.reduce_scatter_single
    for accumulate, slices in ((1, False), (4, False), (4, True)):
        module, calls = built(), []

        def counted(*given: Any, calls: list[int] = calls, **further: Any) -> Any:
            calls.append(1)
            return reduce(*given, **further)

        ranks = MESHES["shard"].replace(slice_gradients=slices).lay(join(), module)
        sharding.begin(module, ranks)
        torch.distributed.reduce_scatter_single = counted
        differentiate(module, next_token, batch_of(next_token), ranks, accumulate=accumulate)
        torch.distributed.reduce_scatter_single = reduce
        counts.append(len(calls))
    if rank == 0:
        (folder / "reductions.json").write_text(json.dumps(counts))


def memory(folder: Path, rank: int) -> None:
    """What a rank holds after a step, and what its forward pass kept."""
    found, copied, all_reduce = {}, 0, torch.distributed.all_reduce

    def counted(x: torch.Tensor, **how: Any) -> Any:
        nonlocal copied
        copied = max(copied, x.nbytes)
        return all_reduce(x, **how)

    torch.distributed.all_reduce = counted
    for name in ("shard", "tensor", "data"):
        module, kept, copied = built(**WIDER), {}, 0
        ranks = (MESHES | COPIES)[name].lay(join(), module)
        sharding.begin(module, ranks)

        def keep(x: torch.Tensor, kept: dict[int, torch.Tensor] = kept) -> torch.Tensor:
            origin = x if x._base is None else x._base
            if not (origin.is_leaf and origin.requires_grad):  # no weight
                kept[sharding.local(x).untyped_storage().data_ptr()] = sharding.local(x)
            return x

        optimizer = AdamW.Config().build(module)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            differentiate(module, next_token, batch_of(next_token), ranks)
        optimizer.step()
        moments = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
        found[name] = {
            "weights": sum(sharding.local(p).nbytes for p in module.parameters()),
            "gradients": sum(sharding.local(p.grad).nbytes for p in module.parameters()),
            "optimizer": sum(sharding.local(x).nbytes for x in moments),
            "activations": sum(x.untyped_storage().nbytes() for x in kept.values()),
            "copied": copied,  # in one message
        }
    torch.distributed.all_reduce = all_reduce
    if rank == 0:
        (folder / "memory.json").write_text(json.dumps(found))


def refused(folder: Path, rank: int) -> None:
    lines = []
    for mesh in REFUSED.values():
        try:
            run(odd(mesh), training=settings(mesh=mesh))
        except InputError as error:
            lines.append(str(error))
    (folder / f"refused-{rank}.json").write_text(json.dumps(lines))


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, me = Path(sys.argv[2]), int(os.environ["RANK"])
    programs: dict[str, Any] = {
        "measure": (refused, gradients, reductions, memory, failed),
        "cross": (cross,),
        "train": (curves, epochs, moved, full, looked_at),
    }
    for work in programs[sys.argv[1]]:
        work(where, me)
