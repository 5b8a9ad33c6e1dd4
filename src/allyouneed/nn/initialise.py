"""How weights begin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from allyouneed import core
from allyouneed.nn.attention import Attention
from allyouneed.nn.moe import StackedLinear


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


Initialise = Normal | Xavier | FanIn
