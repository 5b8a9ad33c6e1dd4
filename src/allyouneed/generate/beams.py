"""Beam search with a length penalty (Wu et al. 2016, sec. 7, eq. 14; Vaswani et al. 2017, sec. 6.1).

Shapes: K beams, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from allyouneed.core.errors import InputError
from allyouneed.generate.engine import Engine
from allyouneed.nn.sight import Memory

Penalty = Callable[[int], float]  # length in tokens -> what the summed log-probability is divided by


def power(alpha: float = 1.0) -> Penalty:
    """length^α, as `transformers` has it."""
    return lambda length: length**alpha


def gnmt(alpha: float = 0.6) -> Penalty:
    """((5 + length)/6)^α, the paper's."""
    return lambda length: ((5 + length) / 6) ** alpha


@dataclass(frozen=True)
class Hypothesis:
    """A finished or running candidate: its new tokens, their summed log-probability and that over the penalty."""

    tokens: tuple[int, ...]
    logprob: float
    score: float


class _Beams:
    """The running beams of one prompt: block tables that share what they have in common."""

    def __init__(self, engine: Engine, prompt: Sequence[int], memory: Memory | None) -> None:
        self.engine, self.tables = engine, engine.tables
        self.rows = [list(prompt)]
        self.held = [engine.tables.open(memory)]

    def read(self) -> Tensor:
        """The logits after each beam, (K, V)."""
        while True:
            pieces = []
            for table, row in zip(self.held, self.rows, strict=True):
                ids = row[table.length : table.length + self.engine.config.chunk]
                if not self.tables.reserve(table, len(ids)):
                    raise InputError(f"beam search: all {self.tables.pool.total} blocks are in use; raise blocks")
                pieces.append(self.tables.piece(table, ids, wanted=int(table.length + len(ids) == len(row))))
            logits = self.engine.reader.read(pieces)
            for table, row, piece in zip(self.held, self.rows, pieces, strict=True):
                self.tables.commit(table, row, table.length + len(piece.ids))
            if len(logits):
                return logits

    def select(self, parents: Sequence[int], tokens: Sequence[int]) -> None:
        """Go on from some of the beams, each with a token more."""
        forks = [self.tables.fork(self.held[parent]) for parent in parents]
        self.rows = [[*self.rows[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        self.close()
        self.held = forks

    def close(self) -> None:
        """Hold nothing any more."""
        for table in self.held:
            self.tables.close(table)
        self.held = []


@torch.inference_mode()
def beam_search(
    engine: Engine,
    prompt: Sequence[int],
    *,
    beams: int = 4,
    max_new_tokens: int = 128,
    penalty: Penalty | None = None,
    memory: Memory | None = None,
) -> list[Hypothesis]:
    """The best `beams` continuations of one prompt, best first.

    The search ends when no running beam can still beat the worst finished one at its present length, or at
    `max_new_tokens`. `memory` is what was read of another model, for encoder–decoders.

    Raises:
        InputError: the prompt is empty, or too long for the context together with `max_new_tokens`; or the engine has
            too few free blocks.
    """
    if max_new_tokens < 1 or beams < 1:
        raise InputError(f"beam search: beams={beams}, max_new_tokens={max_new_tokens}; both must be 1 or more")
    engine.check(prompt, max_new_tokens)
    running = _Beams(engine, prompt, memory)
    try:
        return _search(running, beams, max_new_tokens, penalty or gnmt())
    finally:
        running.close()


def _search(running: _Beams, beams: int, max_new_tokens: int, penalty: Penalty) -> list[Hypothesis]:
    begin = len(running.rows[0])
    totals = torch.zeros(1)
    finished: list[Hypothesis] = []
    for length in range(1, max_new_tokens + 1):
        parents, tokens, totals, ended = _extend(running.read(), totals, running.engine.eos_ids, beams)
        finished += [
            _hypothesis((*running.rows[parent][begin:], token), total, penalty) for parent, token, total in ended
        ]
        finished = sorted(finished, key=lambda h: -h.score)[:beams]
        running.select(parents, tokens)
        if len(finished) == beams and finished[-1].score >= float(totals.max()) / penalty(length):
            return finished
    rows = [tuple(row[begin:]) for row in running.rows]
    finished += [_hypothesis(row, float(total), penalty) for row, total in zip(rows, totals, strict=True)]
    return sorted(finished, key=lambda h: -h.score)[:beams]


def _extend(
    logits: Tensor, totals: Tensor, eos_ids: frozenset[int], beams: int
) -> tuple[list[int], list[int], Tensor, list[tuple[int, int, float]]]:
    """The best continuations of the running beams, and those among the best that ended."""
    vocab_size = logits.shape[1]
    candidates = (totals[:, None] + logits.log_softmax(-1)).flatten()
    wanted = min(beams * (1 + max(1, len(eos_ids))), len(candidates))  # enough that `beams` of them go on
    best, places = candidates.topk(wanted)
    parents: list[int] = []
    tokens: list[int] = []
    kept: list[float] = []
    ended: list[tuple[int, int, float]] = []
    for rank, (total, place) in enumerate(zip(best.tolist(), places.tolist(), strict=True)):
        parent, token = divmod(place, vocab_size)
        if token in eos_ids:
            if rank < beams:
                ended.append((parent, token, total))
        elif len(parents) < beams:
            parents.append(parent)
            tokens.append(token)
            kept.append(total)
    return parents, tokens, torch.tensor(kept), ended


def _hypothesis(tokens: tuple[int, ...], total: float, penalty: Penalty) -> Hypothesis:
    return Hypothesis(tokens, total, total / penalty(len(tokens)))
