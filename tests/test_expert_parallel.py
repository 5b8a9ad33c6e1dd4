"""Experts spread over two ranks do what one process does. Run as a program, this file is what `torchrun` starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from allyouneed.core.errors import InputError
from allyouneed.models import mixtral
from allyouneed.nn.capacity import Factor
from allyouneed.nn.moe import Experts, GatedExperts, MoE
from allyouneed.nn.routers import Top1, TopK
from allyouneed.objectives.balanced import balanced
from allyouneed.objectives.next_token import next_token

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TOLERANCE = 1e-5
LAYERS = {
    "two of four": MoE.Config(router=TopK.Config(), experts=GatedExperts.Config(num_experts=4, hidden_dim=20)),
    "half the room": MoE.Config(
        router=Top1.Config(capacity=Factor(factor=0.5), jitter=0.0),
        experts=Experts.Config(num_experts=6, hidden_dim=20),
    ),
}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> list[dict]:
    """What the two ranks found under "as a program"."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*TORCHRUN, __file__, str(folder)], env=environment, text=True, capture_output=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def built(config: MoE.Config) -> MoE:
    """Random, the same in every process; in float32."""
    torch.manual_seed(0)
    module = config.build(16)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def tokens(rank: int) -> torch.Tensor:
    """Each rank has tokens of its own, of unequal number."""
    return torch.randn(1, 40 + 13 * rank, 16, generator=torch.Generator().manual_seed(rank))


def told(shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_those_of_one_process(two_ranks, name):
    module = built(LAYERS[name])
    inputs = [tokens(rank).requires_grad_() for rank in (0, 1)]
    outputs = [module(x) for x in inputs]
    sum((y * told(y.shape)).sum() for y in outputs).backward()
    for rank, found in enumerate(two_ranks):
        near(found[name]["output"], outputs[rank])
        near(found[name]["to_input"], inputs[rank].grad)
        half = module.experts.num_experts // 2
        for part, gradient in found[name]["to_experts"].items():
            near(gradient, module.experts.get_parameter(part).grad[rank * half : (rank + 1) * half])
    near(sum(found[name]["to_router"] for found in two_ranks), module.router.weight.grad)


def test_each_rank_keeps_its_experts_alone(two_ranks):
    for found in two_ranks:
        assert found["placed"] == {"gate.weight": [2, 20, 16], "up.weight": [2, 20, 16], "out.weight": [2, 16, 20]}


def test_losses_of_balance_are_those_of_one_process(two_ranks):
    """Each rank its rows: the losses of their sums, not the mean of each rank's own."""
    model, ids = balance_model(), balance_ids()
    loss = balanced(next_token, importance=0.3, switch=0.2, z=0.1)(model, {"ids": ids[:, :-1], "targets": ids[:, 1:]})
    loss.total.backward()
    for found in two_ranks:
        assert abs(found["loss"] - loss.mean.item()) > 1e-3  # a rank's own text is another
        for name, value in found["metrics"].items():
            if name == "objective":
                continue  # of the rank's own rows, as is all that an objective sums
            assert abs(value - loss.metrics[name].item() / loss.weight.item()) <= TOLERANCE, name
    for name, parameter in model.named_parameters():
        near(sum(found["gradients"][name] for found in two_ranks) / loss.weight, parameter.grad / loss.weight)


def test_what_is_wrong_is_said_on_every_rank(two_ranks):
    lines = [found["broken"] for found in two_ranks]
    assert lines[0] == lines[1] and "not finite for 3 tokens" in lines[0]
    lines = [found["uneven"] for found in two_ranks]
    assert lines[0] == lines[1] and "num_experts=5 cannot be spread over 2 ranks" in lines[0]


def near(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max().item() <= TOLERANCE


def balance_model() -> nn.Module:
    torch.manual_seed(0)
    model = mixtral.EXAMPLE.build()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def balance_ids() -> torch.Tensor:
    return torch.randint(53, (4, 12), generator=torch.Generator().manual_seed(0))


# As a program: one rank of two


def refused(work) -> str:
    try:
        work()
    except InputError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, mesh, found = dist.get_rank(), init_device_mesh("cpu", (2,)), {}
    for name, config in LAYERS.items():
        module, x = built(config), tokens(rank).requires_grad_()
        module.experts.spread(mesh)
        y = module(x)
        (y * told(y.shape)).sum().backward()
        gradients = {n: p.grad.to_local() for n, p in module.experts.named_parameters() if isinstance(p, DTensor)}
        found[name] = {"output": y.detach(), "to_input": x.grad, "to_experts": gradients}
        found[name]["to_router"] = module.router.weight.grad
    module = built(LAYERS["two of four"])
    module.experts.spread(mesh)
    found["placed"] = {name: list(p.to_local().shape) for name, p in module.experts.named_parameters()}
    broken = tokens(rank)
    broken[0, : 1 + rank] = float("nan")
    found["broken"] = refused(lambda: module(broken))
    uneven = Experts.Config(num_experts=5, hidden_dim=4).build(8)
    found["uneven"] = refused(lambda: uneven.spread(mesh))
    model, ids = balance_model(), balance_ids()[rank::2]
    loss = balanced(next_token, importance=0.3, switch=0.2, z=0.1)(model, {"ids": ids[:, :-1], "targets": ids[:, 1:]})
    loss.total.backward()
    found["loss"] = loss.mean.item()
    found["metrics"] = {name: value.item() / loss.weight.item() for name, value in loss.metrics.items()}
    found["gradients"] = {name: p.grad for name, p in model.named_parameters()}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
