"""How weights begin."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from allyouneed import core
from allyouneed.nn.attention import Attention
from allyouneed.nn.moe import StackedLinear
from allyouneed.nn.rwkv import ChannelMix, RWKVBlock, TimeMix


@dataclass(frozen=True, kw_only=True)
class Normal(core.Config):
    """N(0, std²) for matrices and embeddings, zero for biases; with `scale_residual`, the last matrix of each of the
    2·layers residual branches is scaled by 1/√(2·layers), so that the stream's variance does not grow with depth
    (Radford et al. 2019, sec. 2.3).
    """

    std: float = 0.02
    scale_residual: bool = True

    def apply(self, model: nn.Module, num_layers: int) -> None:
        """Initialise every linear layer and embedding of `model` in place, from torch's global generator."""
        shrink = (2 * num_layers) ** -0.5 if self.scale_residual else 1.0
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | StackedLinear | nn.Embedding):
                ends_branch = name.endswith(".out")
                nn.init.normal_(module.weight, std=self.std * (shrink if ends_branch else 1.0))
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


@dataclass(frozen=True, kw_only=True)
class Xavier(core.Config):
    """N(0, 2/(in + out)) for matrices (Glorot & Bengio 2010, eq. 12; Xiong et al. 2020, sec. 3.3), N(0, 1/dim) for
    embeddings, zero for biases.
    """

    def apply(self, model: nn.Module, num_layers: int) -> None:
        """Initialise every linear layer and embedding of `model` in place, from torch's global generator."""
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            if isinstance(module, StackedLinear):
                nn.init.normal_(module.weight, std=(2.0 / (module.in_features + module.out_features)) ** 0.5)
        for module in model.modules():  # last, so that a tied head is an embedding
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)


@dataclass(frozen=True, kw_only=True)
class FanIn(core.Config):
    """N(0, scale/inputs) for matrices, N(0, 1) for embeddings of tokens, zero for biases, as the authors' code of T5
    has it (Mesh TensorFlow; the paper does not say). Where attention does not divide its scores by √head_dim, the
    queries' matrix is divided by it instead. Learned biases of scores begin as N(0, 1/dim).
    """

    scale: float = 1.0  # Fedus et al. 2021, sec. 2.4: 0.1, without which sparse models often diverge

    def apply(self, model: nn.Module, num_layers: int) -> None:
        """Initialise every linear layer and embedding of `model` in place, from torch's global generator."""
        dim = next(m.embedding_dim for m in model.modules() if isinstance(m, nn.Embedding))
        for name, module in model.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=dim**-0.5 if name.endswith("positions.embedding") else 1.0)
            if isinstance(module, nn.Linear | StackedLinear):
                nn.init.normal_(module.weight, std=(self.scale / module.in_features) ** 0.5)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for module in model.modules():
            if isinstance(module, Attention) and module.scale == 1.0:
                with torch.no_grad():
                    module.q.weight /= module.head_dim**0.5


@dataclass(frozen=True, kw_only=True)
class RWKV4(core.Config):
    """RWKV-4's (Peng et al. 2023, app. E and the authors' code): decays, bonuses and mixtures by layer and channel, so
    that low channels and high layers look far back; matrices zero where a branch can begin as nothing, else orthogonal;
    embeddings within ±`embedding`, which their norm scales up at once, so that they move fast.
    """

    embedding: float = 1e-4

    def apply(self, model: nn.Module, num_layers: int) -> None:
        """Initialise `model` in place, from torch's global generator."""
        head = getattr(model, "head", None)
        if head is not None:
            nn.init.orthogonal_(head.weight, 0.5 * max(1.0, head.out_features / head.in_features) ** 0.5)
        for module in model.modules():  # after the head, which may share the embedding's tensor
            if isinstance(module, nn.Embedding):
                nn.init.uniform_(module.weight, -self.embedding, self.embedding)
        blocks = [module for module in model.modules() if isinstance(module, RWKVBlock)]
        with torch.no_grad():
            for layer, block in enumerate(blocks):
                self._time(block.mixer, layer / max(num_layers - 1, 1), 1 - layer / num_layers)
                self._channel(block.channel, 1 - layer / num_layers)

    @staticmethod
    def _time(part: TimeMix, height: float, depth: float) -> None:
        """`height` rises from 0 to 1 over the layers, `depth` falls from 1 to nearly 0."""
        dim = len(part.bonus)
        channel = torch.arange(dim, dtype=torch.float32)
        part.log_decay.copy_(-5 + 8 * (channel / max(dim - 1, 1)) ** (0.7 + 1.3 * height))
        part.bonus.copy_(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
        part.mix_k.copy_((channel / dim) ** depth)
        part.mix_v.copy_((channel / dim) ** depth + 0.3 * height)
        part.mix_r.copy_((channel / dim) ** (0.5 * depth))
        nn.init.orthogonal_(part.v.weight)
        for matrix in (part.r, part.k, part.out):
            nn.init.zeros_(matrix.weight)

    @staticmethod
    def _channel(part: ChannelMix, depth: float) -> None:
        dim = len(part.mix_k)
        for mix in (part.mix_k, part.mix_r):
            mix.copy_((torch.arange(dim) / dim) ** depth)
        nn.init.orthogonal_(part.k.weight, max(1.0, part.k.out_features / dim) ** 0.5)
        for matrix in (part.r, part.out):
            nn.init.zeros_(matrix.weight)


Initialise = Normal | Xavier | FanIn | RWKV4
