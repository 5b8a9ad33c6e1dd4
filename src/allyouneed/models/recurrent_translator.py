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
from allyouneed.core.outline import outlined
from allyouneed.models.decoder import Output
from allyouneed.nn.caches import Cache, Recalled, RecurrentState, Rows
from allyouneed.nn.sight import Memory

State = tuple[Tensor, Tensor]  # what the writer remembers: hidden and cell, (B, H) each


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
            with outlined():
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
        memory = self.remember(source, source_segments)
        return Output(self.head(self.write(ids, memory, self.first(memory), self.project(memory))[0]))

    def remember(self, source: Tensor, segments: Tensor | None = None) -> Memory:
        """Read a source (B, M), padded on the right where `segments` is 0; states are (B, M, 2·H)."""
        length = source.shape[1]
        known = torch.full((len(source),), length) if segments is None else (segments != 0).sum(1).cpu()
        embedded = F.dropout(self.embedding(source), self.config.dropout, self.training)
        packed = nn.utils.rnn.pack_padded_sequence(embedded, known, batch_first=True, enforce_sorted=False)
        read, _ = nn.utils.rnn.pad_packed_sequence(self.reader(packed)[0], batch_first=True, total_length=length)
        return Memory(read, segments)

    def first(self, memory: Memory) -> State:
        """The writer's state before the first target token, from where reading backwards ended."""
        hidden = torch.tanh(self.begin(memory.states[:, 0, self.config.hidden_dim :]))
        return hidden, torch.zeros_like(hidden)

    def project(self, memory: Memory) -> Recalled:
        """What attention compares the writer's state with, (B, M, H), and what it gives of each place."""
        return self.key(memory.states), memory.states

    def write(
        self, ids: Tensor, memory: Memory, state: State, projected: Recalled, counts: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Target ids (B, T), each after those before it -> what the head sees, (B, T, dim), and the state after
        `counts` (B) of them, None: all.
        """
        embedded = F.dropout(self.embedding(ids), self.config.dropout, self.training)
        (hidden, cell), kept, seen = state, state, []
        for t, x in enumerate(embedded.unbind(1)):
            context = self._look(hidden, memory, projected)
            hidden, cell = self.writer(torch.cat((x, context), -1), (hidden, cell))
            if counts is not None:
                read = (t < counts)[:, None]
                kept = (torch.where(read, hidden, kept[0]), torch.where(read, cell, kept[1]))
            seen.append(torch.cat((hidden, context, x), -1))
        found = torch.tanh(self.out(torch.stack(seen, 1)))
        return F.dropout(found, self.config.dropout, self.training), (hidden, cell) if counts is None else kept

    def _look(self, hidden: Tensor, memory: Memory, projected: Recalled) -> Tensor:
        """What the writer sees of the source from its state (B, H): (B, 2·H)."""
        keys, values = projected
        energies = self.score(torch.tanh(self.query(hidden)[:, None] + keys))[..., 0]
        if memory.segments is not None:
            energies = energies.masked_fill(memory.segments == 0, float("-inf"))
        return (energies.softmax(-1)[:, None] @ values)[:, 0]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device


class Answering:
    """The writer of a translator, as what the engine generates with: what was read is each request's memory."""

    answers = True

    def __init__(self, model: RecurrentTranslator) -> None:
        self.model, self.config, self.device, self.head = model, model.config, model.device, model.head
        self.limit = model.config.context

    def new_cache(self, batch: int, capacity: int, memory: Memory | None = None) -> Cache:
        """The state before the first target token of each row of the memory."""
        rows, hidden = Rows(batch, self.device), self.model.config.hidden_dim
        nothing = torch.zeros(batch, hidden, device=self.device, dtype=self.model.embedding.weight.dtype)
        state = (nothing, nothing) if memory is None else self.model.first(memory)
        return Cache(rows, [RecurrentState(rows, *state)], memory=memory)

    def hidden(
        self,
        ids: Tensor,
        segments: Tensor | None = None,
        cache: Cache | None = None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """(B, T) -> (B, T, dim)."""
        assert cache is not None and cache.memory is not None and segments is None
        (layer,), memory = cache.layers, cache.memory
        assert isinstance(layer, RecurrentState)
        hidden, cell = layer.before
        projected = layer.recall(lambda: self.model.project(memory))
        seen, after = self.model.write(ids, memory, (hidden, cell), projected, counts)
        layer.leave(*after)
        cache.advance(ids.shape[1] if counts is None else counts)
        return seen


EXAMPLE = RecurrentTranslator.Config(vocab_size=53, context=48, dim=20, hidden_dim=24)
