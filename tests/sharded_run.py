"""What two ranks do for `test_sharding.py`: models small enough for milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tiny_run import counting
from torch import Tensor, nn

from allyouneed.data.batches import Generated
from allyouneed.models import bert, bloom, gpt, gpt2, gpt_neo, gpt_neox, llama, marian, mixtral, t5, transformer
from allyouneed.objectives.balanced import balanced
from allyouneed.objectives.masked import masked
from allyouneed.objectives.next_token import next_token
from allyouneed.objectives.translation import target_given_source
from allyouneed.train.gradients import Objective
from allyouneed.train.loop import Trained, Training, train
from allyouneed.train.mesh import Mesh, spread
from allyouneed.train.optimizers import AdamW
from allyouneed.train.schedules import Cosine

VOCABULARY = 11
MESHES = {"shard": Mesh(shard=2), "tensor": Mesh(tensor=2), "expert": Mesh(expert=2)}
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "context": 32, "dim": 16, "num_layers": 2, "num_heads": 4}
BOTH: dict[str, Any] = SIZES | {"hidden_dim": 24}
BALANCED = balanced(next_token, importance=0.1, switch=0.01, z=0.001)
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


def built(seed: int = 0, **changes: Any) -> nn.Module:
    """A LLaMA with grouped heads and a tied head."""
    torch.manual_seed(seed)
    module: nn.Module = llama.architecture(**BOTH | {"num_kv_heads": 2, "tied": True} | changes).build()
    return module


def sparse(seed: int = 0) -> nn.Module:
    """A Mixtral."""
    torch.manual_seed(seed)
    module: nn.Module = FAMILIES["mixtral"][0].build()
    return module


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


def run(
    module: nn.Module,
    folder: Path | None = None,
    training: Training | None = None,
    objective: Objective | None = None,
    **options: Any,
) -> Trained:
    """Experts are balanced, unless another objective is given."""
    objective = objective or (BALANCED if any(spread(module)) else next_token)
    return train(module, objective, batches(), training or settings(), folder=folder, quiet=True, **options)
