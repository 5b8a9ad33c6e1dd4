"""The recurrent language model (Mikolov et al. 2010): embedding, layers of cells, head.

Shapes: B rows, T tokens, V = vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from allyouneed import core
from allyouneed.models.decoder import Output
from allyouneed.nn import recurrent
from allyouneed.nn.sight import last


class RecurrentModel(core.Configured, nn.Module):
    """A causal language model that remembers what came before in its cells' states.

    >>> from allyouneed.nn.recurrent import LSTM, Recurrent
    >>> config = RecurrentModel.Config(vocab_size=11, dim=8, layers=Recurrent.Config(cell=LSTM.Config()))
    >>> config.build()(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 11])
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """The sizes and the layers; `tied`: the head is the transposed embedding (Press & Wolf 2017)."""

        vocab_size: int
        dim: int
        layers: recurrent.Recurrent.Config
        tied: bool = False

        def num_parameters(self) -> int:
            """Counted on the meta device, so that any size can be asked for."""
            with torch.device("meta"):
                return sum(p.numel() for p in self.build().parameters())

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.layers = config.layers.build(config.dim)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        for matrix in (self.embedding.weight, self.head.weight):
            nn.init.normal_(matrix, std=config.dim**-0.5)
        self.retie()

    def retie(self) -> None:
        """Make the head share the embedding's tensor, also after either was replaced."""
        if self.config.tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, segments: Tensor | None = None) -> Output:
        """Token ids (B, T) -> logits. `segments` (B, T) numbers the documents of a row, each of which begins anew; 0 is
        padding. None: each row is one document.
        """
        return Output(self.head(self.hidden(ids, segments)))

    def hidden(self, ids: Tensor, segments: Tensor | None = None) -> Tensor:
        """What the head sees: (B, T) -> (B, T, dim)."""
        begins = None
        if segments is not None:
            begins = torch.ones_like(segments, dtype=torch.bool)
            begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
        return self.read(ids, begins=begins)[0]

    def summary(self, hidden: Tensor, segments: Tensor) -> Tensor:
        """One vector of each row, that of its last token: (B, T, dim) -> (B, dim)."""
        return last(hidden, segments)

    def read(
        self, ids: Tensor, states: list[recurrent.State] | None = None, begins: Tensor | None = None
    ) -> tuple[Tensor, list[recurrent.State]]:
        """What the head sees, (B, T, dim), and the states to go on from; arguments as of `nn.recurrent.Recurrent`."""
        hidden: Tensor
        hidden, after = self.layers(self.embedding(ids), states, begins)
        return hidden, after


EXAMPLE = RecurrentModel.Config(
    vocab_size=53, dim=24, layers=recurrent.Recurrent.Config(cell=recurrent.LSTM.Config(), num_layers=2)
)
