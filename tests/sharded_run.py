"""What two ranks do for `test_sharding.py`: models small enough for milliseconds, and a part with experts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_run import Output, counting
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.placement_types import Shard

from allyouneed.data.batches import Generated
from allyouneed.models import bert, bloom, gpt, gpt2, gpt_neo, gpt_neox, llama, marian, mixtral, t5, transformer
from allyouneed.objectives.masked import masked
from allyouneed.objectives.next_token import next_token
from allyouneed.objectives.translation import target_given_source
from allyouneed.train.gradients import Objective
from allyouneed.train.loop import Trained, Training, train
from allyouneed.train.mesh import Mesh
from allyouneed.train.optimizers import AdamW
from allyouneed.train.schedules import Cosine

VOCABULARY = 11
MESHES = {"shard": Mesh(shard=2), "tensor": Mesh(tensor=2), "expert": Mesh(expert=2)}
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "context": 32, "dim": 16, "num_layers": 2, "num_heads": 4}
BOTH: dict[str, Any] = SIZES | {"hidden_dim": 24}
FAMILIES: dict[str, tuple[Any, Objective]] = {
    "gpt": (gpt.architecture(**SIZES), next_token),
    "gpt2": (gpt2.architecture(**SIZES), next_token),
    "gpt_neo": (gpt_neo.architecture(window=3, scale=1.0, **SIZES), next_token),
    "gpt_neox": (gpt_neox.architecture(**SIZES | {"dim": 32}), next_token),
    "llama": (llama.architecture(num_kv_heads=2, **BOTH), next_token),
    "mixtral": (mixtral.architecture(num_kv_heads=2, num_experts=4, **BOTH), next_token),
    "bloom": (bloom.architecture(**SIZES), next_token),
    "bert": (bert.architecture(**SIZES), masked),
    "t5": (t5.architecture(head_dim=4, **BOTH), target_given_source),
    "t5 1.1": (t5.architecture(head_dim=4, gated=True, tied=False, **BOTH), target_given_source),
    "marian": (marian.architecture(**BOTH), target_given_source),
    "transformer": (transformer.architecture(**BOTH), target_given_source),
}


class Experts(nn.Module):
    """Token i of a pass belongs to expert i mod E: x + tanh(x W). No routing, so that only the exchange is tested."""

    def __init__(self, num_experts: int, dim: int) -> None:
        super().__init__()
        self.num_experts, self.mesh = num_experts, None
        self.weight = nn.Parameter(torch.randn(num_experts, dim, dim) / dim**0.5)

    def spread(self, mesh: DeviceMesh) -> None:
        self.weight = nn.Parameter(distribute_tensor(self.weight.detach(), mesh, [Shard(0)]))
        self.mesh = mesh

    def forward(self, x: Tensor) -> Tensor:
        by_expert = x.view(-1, self.num_experts, x.shape[-1]).transpose(0, 1)  # (E, N/E, dim)
        if self.mesh is None:
            done = by_expert @ self.weight
        else:
            weight = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
            ranks = self.mesh.size()
            arrived = Exchange.apply(by_expert.contiguous(), self.mesh.get_group())
            mine = arrived.unflatten(0, (ranks, -1)).transpose(0, 1).flatten(1, 2)  # (E/ranks, N·ranks/E, dim)
            back = (mine @ weight).unflatten(1, (ranks, -1)).transpose(0, 1).flatten(0, 1)
            done = Exchange.apply(back.contiguous(), self.mesh.get_group())
        return x + done.tanh().transpose(0, 1).reshape_as(x)


class Exchange(torch.autograd.Function):
    """All-to-all, whose gradient is the same the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, y = group, torch.empty_like(x)
        dist.all_to_all_single(y, x, group=group)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return Exchange.apply(gradient.contiguous(), ctx.group), None


class Sparse(nn.Module):
    """Embedding, two blocks of experts, a norm, a tied head."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, dim)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(dim, dim), Experts(4, dim)) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, segments: Tensor | None = None) -> Output:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return Output(self.head(self.norm(x)))


def built(seed: int = 0, **changes: Any) -> nn.Module:
    """A LLaMA with grouped heads and a tied head."""
    torch.manual_seed(seed)
    module: nn.Module = llama.architecture(**BOTH | {"num_kv_heads": 2, "tied": True} | changes).build()
    return module


def sparse(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Sparse()


def batches() -> Generated:
    return Generated(lambda generator: counting(generator, length=8), seed=0)


def batch_of(objective: Objective) -> Mapping[str, Tensor]:
    batch = counting(torch.Generator().manual_seed(0), length=8)
    segments = torch.ones_like(batch["ids"])
    segments[::2, 5:] = 0
    if objective is target_given_source:
        source = (batch["ids"] + 3) % VOCABULARY
        return batch | {"source": source, "source_segments": segments, "segments": segments}
    return batch | {"segments": segments, "types": torch.zeros_like(segments)}


def settings(**changes: Any) -> Training:
    """Fifty steps, fast enough to learn, saved in the middle and at the end."""
    given: dict[str, Any] = {"steps": 50, "optimizer": AdamW.Config(lr=3e-3), "schedule": Cosine(warmup=5, until=50)}
    return Training(**given | {"log_every": 1, "save_every": 25, "keep": 9} | changes)


def run(module: nn.Module, folder: Path | None = None, training: Training | None = None, **options: Any) -> Trained:
    return train(module, next_token, batches(), training or settings(), folder=folder, quiet=True, **options)
