"""The recurrent language model (Mikolov et al. 2010): embedding, layers of cells, head.

Shapes: B rows, T tokens, V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from allyouneed import core
from allyouneed.core.errors import unknown
from allyouneed.models.decoder import Output
from allyouneed.nn import recurrent
from allyouneed.nn.caches import Cache, RecurrentState, Rows
from allyouneed.nn.moe import Experts, MoE
from allyouneed.nn.noisy_routers import Hierarchical, NoisyTopK
from allyouneed.nn.sandwich import Sandwich
from allyouneed.nn.sight import Memory, last

# experts, groups of a hierarchical router (None: one level), dim, hidden dim, dropout (table 7, app. C.1 and C.2)
MIXTURES = {
    "MoE-4": (4, None, 512, 1024, 0.1),
    "MoE-32": (32, None, 512, 1024, 0.1),
    "MoE-256": (256, None, 512, 1024, 0.1),
    "MoE-256-h": (256, 16, 512, 1024, 0.1),
    "MoE-1024-h": (1024, 16, 512, 1024, 0.2),
    "MoE-4096-h": (4096, 16, 512, 1024, 0.2),
    "MoE-34M": (1024, 16, 1024, 2048, 0.3),
}


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
        layers: recurrent.Recurrent.Config | Sandwich.Config
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

    def forward(
        self,
        ids: Tensor,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        counts: Tensor | None = None,
    ) -> Output:
        """Token ids (B, T) -> logits. `segments` (B, T) numbers the documents of a row, each of which begins anew; 0 is
        padding. None: each row is one document. `cache` and `counts` are as a decoder has them.
        """
        return Output(self.head(self.hidden(ids, segments, cache, counts)))

    def hidden(
        self,
        ids: Tensor,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """What the head sees: (B, T) -> (B, T, dim)."""
        begins = None
        if segments is not None:
            begins = torch.ones_like(segments, dtype=torch.bool)
            begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
        if cache is None:
            return self.read(ids, begins=begins)[0]
        states = [layer.before for layer in cache.layers if isinstance(layer, RecurrentState)]
        hidden, after = self.read(ids, states, begins, counts)
        if segments is None:
            for layer, state in zip(cache.layers, after, strict=True):
                assert isinstance(layer, RecurrentState)
                layer.leave(*state)
            cache.advance(ids.shape[1] if counts is None else counts)
        return hidden

    def new_cache(self, batch: int, capacity: int, memory: Memory | None = None) -> Cache:
        """The states of `batch` rows of which nothing was read; of one size, whatever the `capacity`."""
        rows = Rows(batch, self.device)
        return Cache(rows, [RecurrentState(rows, *state) for state in self.layers.begin(batch)], memory=memory)

    limit = None  # it continues texts of any length
    answers = False  # what it writes follows from no memory

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    def summary(self, hidden: Tensor, segments: Tensor) -> Tensor:
        """One vector of each row, that of its last token: (B, T, dim) -> (B, dim)."""
        return last(hidden, segments)

    def read(
        self,
        ids: Tensor,
        states: Sequence[recurrent.State] | None = None,
        begins: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> tuple[Tensor, list[recurrent.State]]:
        """What the head sees, (B, T, dim), and the states to go on from; arguments as of `nn.recurrent.Recurrent`."""
        hidden: Tensor
        hidden, after = self.layers(self.embedding(ids), states, begins, counts)
        return hidden, after


EXAMPLE = RecurrentModel.Config(
    vocab_size=53, dim=24, layers=recurrent.Recurrent.Config(cell=recurrent.LSTM.Config(), num_layers=2)
)


def mixture(name: str = "MoE-256") -> RecurrentModel.Config:
    """One of the language models of Shazeer et al. 2017, of 793,471 words: LSTM, mixture of experts, LSTM. Each token
    passes four experts. MoE-143M is not among them: its cells have projections (Sak et al. 2014), which ours have not.
    """
    if name not in MIXTURES:
        raise unknown("mixture of experts of 2017", name, MIXTURES)
    num_experts, groups, dim, hidden_dim, dropout = MIXTURES[name]
    router = NoisyTopK.Config(k=4) if groups is None else Hierarchical.Config(k=2, groups=groups)
    between = MoE.Config(router=router, experts=Experts.Config(num_experts=num_experts, hidden_dim=hidden_dim))
    layers = Sandwich.Config(cell=recurrent.LSTM.Config(), between=between, dropout=dropout)
    return RecurrentModel.Config(vocab_size=793_471, dim=dim, layers=layers)
