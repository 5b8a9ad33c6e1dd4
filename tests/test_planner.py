"""What the planner says of one row, against closed forms and PyTorch's own counts; what it finds; how it is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from allyouneed.cli import main
from allyouneed.models import gpt2, llama, mixtral
from allyouneed.papers import alibi, catalogue
from allyouneed.train.mesh import Mesh, blocks, mesh_for
from allyouneed.train.planner import Machine, cost, plan
from allyouneed.train.ranks import BUCKET
from allyouneed.train.tracing import Share, Traced, trace, weights

SCALE = Path(__file__).parents[1] / "docs/scale.md"
CONTEXT = 48


def traced(config, context: int = CONTEXT, *, narrow: bool = False) -> Traced:
    def run(module: torch.nn.Module) -> None:
        module(torch.zeros(1, context, dtype=torch.long)).logits.float().exp().sum()

    return trace(config.build, run, context, narrow=narrow)


def test_arithmetic_is_the_closed_form():
    """2 operations for each weight and token, and QKᵀ and its product with V."""
    d, layers, h, v, t = 64, 3, 80, 100, CONTEXT
    config = llama.architecture(vocab_size=v, context=64, dim=d, num_layers=layers, num_heads=4, hidden_dim=h)
    found = traced(config)
    assert found.flops.of_one() == layers * (8 * d * d * t + 6 * d * h * t + 4 * t * t * d) + 2 * d * v * t
    assert found.flops.same == 2 * d * v * t  # the head, which tensor ranks do not share
    assert found.parameters == config.num_parameters()


def test_a_real_pass_keeps_what_a_fake_one_does():
    config = gpt2.architecture(vocab_size=100, context=64, dim=32, num_layers=2, num_heads=4)
    module, kept = config.build(), {}
    weights = {p.data_ptr() for p in module.parameters()}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logits = module(torch.zeros(1, CONTEXT, dtype=torch.long)).logits
        logits.float().exp().sum()
        total = sum(x.untyped_storage().nbytes() for x in kept.values())
    assert traced(config).kept.of_one() == pytest.approx(total, rel=0.01)


def test_every_way_of_sharing_takes_memory_from_a_rank():
    config = mixtral.architecture(vocab_size=64, context=64, dim=32, num_layers=2, num_heads=4, hidden_dim=64)
    counted, machine = traced_weights(config), Machine()
    sizes = {"data": 1, "expert": 1, "shard": 1, "tensor": 1}
    whole = cost(counted, sizes, 8, 1, machine, narrow=True)
    assert whole.weights == 4 * config.num_parameters() and whole.optimizer == 2 * whole.weights
    assert cost(counted, sizes | {"shard": 4}, 8, 1, machine, narrow=True).weights == whole.weights / 4
    spread = cost(counted, sizes | {"expert": 4}, 8, 1, machine, narrow=True)
    experts = 2 * 8 * 3 * 32 * 64
    assert spread.weights == 4 * (config.num_parameters() - experts * 3 / 4)
    tensor = cost(counted, sizes | {"tensor": 2}, 8, 1, machine, narrow=True)
    assert tensor.weights == 4 * (config.num_parameters() - 2 * 4 * 32 * 32 / 2)


def test_without_slices_nothing_is_gathered():
    """Then autocast keeps a copy of all weights in bfloat16, and gradients are copied to be sent, some at a time."""
    config = llama.architecture(vocab_size=32000, context=64, dim=512, num_layers=4, num_heads=4)
    counted, alone = traced_weights(config), {"data": 1, "expert": 1, "shard": 1, "tensor": 1}
    weights = config.num_parameters()

    def gathered(narrow: bool, **sizes: int) -> float:
        return cost(counted, alone | sizes, 8, 1, Machine(), narrow=narrow).gathered

    assert gathered(False) == 0 and gathered(True) == 2 * weights
    assert 4 * weights > BUCKET and gathered(False, data=8) == BUCKET
    assert gathered(True, data=8) == 2 * weights + BUCKET
    assert gathered(True, data=8, shard=2) == gathered(True, shard=2) < 2 * weights


def traced_weights(config) -> Traced:
    """A Mixtral cannot be traced, for its routing depends on its data; its weights can be counted."""
    with torch.device("meta"):
        module = config.build()
    none, shares = Share(), tuple(weights(module, blocks(module)))
    return Traced(CONTEXT, shares, none, none, none, 0.0, none, 0.0)


def test_the_fastest_plan_that_fits_is_found():
    config = llama.architecture(vocab_size=1000, context=256, dim=512, num_layers=8, num_heads=8)
    found = traced(config, 256)
    with torch.device("meta"):
        module = config.build()
    roomy, tight = Machine(), Machine(memory=2.5e8)
    plans = plan(found, 8, 64, module, roomy)
    assert [p.seconds for p in plans] == sorted(p.seconds for p in plans)
    assert all(p.memory <= 0.9 * 80e9 for p in plans) and not plans[0].recompute
    fitting = plan(found, 8, 64, module, tight)
    assert fitting and all(p.memory <= 0.9 * 2.5e8 for p in fitting) and fitting[0].seconds > plans[0].seconds
    assert all(p.mesh.sizes(8) for p in plans)
    assert plan(found, 8, 64, module, Machine(memory=1e6)) == []


def test_a_rule_of_thumb_for_presets():
    assert mesh_for(117e6) == Mesh()
    for parameters in (7e9, 13e9, 175e9, 1.6e12):
        mesh = mesh_for(parameters)
        assert 16 * parameters / (mesh.shard * mesh.tensor) <= 80e9 / 3


def test_a_plan_for_programs(capsys):
    assert main(["plan", "alibi", "--gpus", "8", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (model,) = told["models"]
    assert model["parameters"] == alibi.LARGE.num_parameters() and told["machine"]["memory"] == 80e9
    found = model["plan"]
    assert found["memory"] == sum(found[n] for n in ("weights", "gradients", "optimizer", "activations", "gathered"))


def test_a_plan_for_people(capsys):
    assert main(["plan", "alibi", "--gpus", "2", "--memory", "8"]) == 0
    assert "1.36 B parameters" in (said := capsys.readouterr().out) and "does not fit into 2 ranks of 8 GB; 4" in said
    assert main(["plan", "bert", "--gpus", "8"]) == 0
    assert "mesh data=8 shard=1 tensor=1 expert=1; 32 rows a rank at once, accumulate=1" in capsys.readouterr().out
    assert main(["plan", "alibi", "--gpus", "8", "--memory", "8"]) == 0
    assert "--set training.mesh.shard=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        *(
            (["gpt2", f"--{name}", value], f"--{name} {value}: it must be a number above 0")
            for name in ("gpus", "rows", "length", "node")
            for value in ("0", "-3")
        ),
        *(
            (["gpt2", f"--{name}", value], f"--{name} {value}: it must be a number above 0")
            for name in ("memory", "peak", "reached", "inside", "between")
            for value in ("0", "-3", "inf", "nan")
        ),
        (["gtp2"], "unknown paper 'gtp2'; did you mean 'gpt2'"),
        (["gpt2", "--size", "huge"], "unknown size 'huge'"),
    ],
)
def test_bad_questions(capsys, arguments, line):
    assert main(["plan", *arguments]) == 2
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("slug", catalogue.built())
def test_the_table_of_the_docs_is_the_planners(capsys, slug):
    """All its rows, by the command of which they are; and no paper is left out of it that trains a model."""
    rows = [line for line in SCALE.read_text().splitlines() if line.startswith(f"| {slug}, ")]
    code = main(["plan", slug, "--markdown"])
    assert code == (0 if rows else 2)
    told = capsys.readouterr()
    assert told.out.splitlines() == [row for row in rows if "| 64 |" in row]
    assert rows or "trains no model that can be planned" in told.err


def test_a_row_of_the_table_for_more_ranks(capsys):
    (row,) = [line for line in SCALE.read_text().splitlines() if "| 1024 |" in line]
    assert main(["plan", "gpt3", "--gpus", "1024", "--markdown"]) == 0
    assert capsys.readouterr().out.splitlines() == [row]
