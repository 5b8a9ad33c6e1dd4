"""The translator before the Transformer: an LSTM reads both ways, another writes and looks back by additive attention.

It is the model of Bahdanau et al. 2015 (arXiv:1409.0473) with LSTMs in place of its gated units, and is called and
asked as `EncoderDecoder` is. Shapes: B rows, M source tokens, T target tokens, V = vocab_size, H = hidden_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allyouneed import core
from allyouneed.models.decoder import Output


@dataclass
class State:
    """What the writer remembers, (B, H) each, and what it reads: `read` (B, M, 2·H), `keys` (B, M, H), `padding`."""

    hidden: Tensor
    cell: Tensor
    read: Tensor
    keys: Tensor
    padding: Tensor  # (B, M), true where there is nothing

    def select(self, rows: Tensor) -> None:
        """Keep only `rows` (n,), in that order, possibly repeated."""
        self.hidden, self.cell = self.hidden[rows], self.cell[rows]
        self.read, self.keys, self.padding = self.read[rows], self.keys[rows], self.padding[rows]


class RecurrentTranslator(core.Configured, nn.Module):
    """p(target | source) by two LSTMs and additive attention (Bahdanau et al. 2015, sec. 3)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """`hidden_dim` is the size of each LSTM's state and of the attention's hidden layer."""

        vocab_size: int
        context: int
        dim: int
        hidden_dim: int
        dropout: float = 0.0  # of embeddings and of what the head sees

        def num_parameters(self) -> int:
            """Counted on the meta device."""
            with torch.device("meta"):
                return sum(p.numel() for p in self.build().parameters())

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        dim, hidden = config.dim, config.hidden_dim
        self.embedding = nn.Embedding(config.vocab_size, dim)
        self.reader = nn.LSTM(dim, hidden, batch_first=True, bidirectional=True)
        self.begin = nn.Linear(hidden, hidden)  # of the state that read backwards (app. A.2.2)
        self.writer = nn.LSTMCell(dim + 2 * hidden, hidden)
        self.query, self.key = nn.Linear(hidden, hidden, bias=False), nn.Linear(2 * hidden, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)
        self.out = nn.Linear(3 * hidden + dim, dim)
        self.head = nn.Linear(dim, config.vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)

    def forward(
        self, source: Tensor, ids: Tensor, source_segments: Tensor | None = None, segments: Tensor | None = None
    ) -> Output:
        """Source ids (B, M) and target ids (B, T) -> logits (B, T, V) of each next target token."""
        return Output(self.head(self.write(ids, self.remember(source, source_segments))))

    def remember(self, source: Tensor, segments: Tensor | None = None) -> State:
        """Read a source (B, M), padded on the right where `segments` is 0."""
        padding = torch.zeros_like(source, dtype=torch.bool) if segments is None else segments == 0
        embedded = F.dropout(self.embedding(source), self.config.dropout, self.training)
        packed = nn.utils.rnn.pack_padded_sequence(
            embedded, (~padding).sum(1).cpu(), batch_first=True, enforce_sorted=False
        )
        states, (last, _) = self.reader(packed)
        read, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True, total_length=source.shape[1])
        hidden = torch.tanh(self.begin(last[1]))
        return State(hidden, torch.zeros_like(hidden), read, self.key(read), padding)

    def write(self, ids: Tensor, state: State) -> Tensor:
        """Target ids (B, T), each after those before it -> what the head sees, (B, T, dim); `state` moves on."""
        embedded = F.dropout(self.embedding(ids), self.config.dropout, self.training)
        seen = []
        for x in embedded.unbind(1):
            energies = self.score(torch.tanh(self.query(state.hidden)[:, None] + state.keys))[..., 0]
            weights = energies.masked_fill(state.padding, float("-inf")).softmax(-1)
            context = (weights[:, None] @ state.read)[:, 0]
            state.hidden, state.cell = self.writer(torch.cat((x, context), -1), (state.hidden, state.cell))
            seen.append(torch.cat((state.hidden, context, x), -1))
        found = torch.tanh(self.out(torch.stack(seen, 1)))
        return F.dropout(found, self.config.dropout, self.training)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device


class Answering:
    """A translator that has read its sources, as what the engine generates with: a module that continues ids."""

    def __init__(self, model: RecurrentTranslator, source: Tensor, segments: Tensor | None = None) -> None:
        self.model, self.config, self.device, self.head = model, model.config, model.device, model.head
        self.limit = model.config.context
        with torch.inference_mode():
            self.state = model.remember(source.to(self.device), segments)

    def new_cache(self, batch: int, capacity: int) -> State:
        """The state before the first target token."""
        assert batch == len(self.state.read), f"{batch} targets of {len(self.state.read)} sources"
        return State(**vars(self.state))

    def hidden(
        self,
        ids: Tensor,
        segments: Tensor | None = None,
        cache: State | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """(B, T) -> (B, T, dim)."""
        assert cache is not None and segments is None
        assert counts is None or bool((counts == ids.shape[1]).all()), "targets begin alike"
        return self.model.write(ids, cache)


EXAMPLE = RecurrentTranslator.Config(vocab_size=53, context=48, dim=20, hidden_dim=24)
