"""Translations, ids in and ids out, by a module that reads a source and writes a target: greedy, or with beams.

Holds no words: what ids stand for is the tokenizer's business.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from allyouneed.data.pairs import apart
from allyouneed.generate.beams import Penalty, beam_search, gnmt
from allyouneed.generate.engine import Engine
from allyouneed.generate.language_model import Sampling
from allyouneed.models import encoder_decoder, recurrent_translator
from allyouneed.models.encoder_decoder import EncoderDecoder
from allyouneed.models.recurrent_translator import RecurrentTranslator
from allyouneed.nn.sight import Memory

BATCH = 256  # translations under way at once

Sources = Sequence[Sequence[int]]


def greedy(module: nn.Module, sources: Sources, *, start: int, end: int, most: int) -> list[list[int]]:
    """The likeliest next token again and again, for all sources at once, until `end` or `most` tokens; without `end`.

    Raises:
        InputError: `most` tokens after `start` do not fit the context.
    """
    written: list[list[int]] = [[] for _ in sources]
    sampling = Sampling(max_new_tokens=most, temperature=0.0)
    steps = _engine(module, end).steps(
        [[start]] * len(sources), [sampling] * len(sources), memory=_read(module, sources, start, end)
    )
    for step in steps:
        if step.token != end:
            written[step.request].append(step.token)
    return written


def with_beams(
    module: nn.Module,
    sources: Sources,
    *,
    start: int,
    end: int,
    most: int,
    beams: int = 4,
    penalty: Penalty | None = None,
) -> list[list[int]]:
    """The best translation of each source, one after another, by beam search; 4 beams and α = 0.6 are those of Vaswani
    et al. 2017 (sec. 6.1). Without `end`.

    Raises:
        InputError: `most` tokens after `start` do not fit the context.
    """
    engine, written = _engine(module, end), []
    for source in sources:
        found = beam_search(
            engine,
            [start],
            beams=beams,
            max_new_tokens=most,
            penalty=penalty or gnmt(0.6),
            memory=_read(module, [source], start, end),
        )
        written.append([token for token in found[0].tokens if token != end])
    return written


def _engine(module: nn.Module, end: int) -> Engine:
    if isinstance(module, EncoderDecoder):
        return Engine(encoder_decoder.Answering(module), [end], Engine.Config(max_batch=BATCH))
    assert isinstance(module, RecurrentTranslator)
    return Engine(recurrent_translator.Answering(module), [end], Engine.Config(max_batch=BATCH))


@torch.inference_mode()
def _read(module: nn.Module, sources: Sources, start: int, end: int) -> Memory:
    """What the sources are to the writer, a row each."""
    batch = apart([(source, [end]) for source in sources], start=start)  # only what is read of it counts
    device = next(module.parameters()).device
    remembered: Memory = module.remember(batch["source"].to(device), batch["source_segments"].to(device))  # type: ignore[operator]
    return remembered
