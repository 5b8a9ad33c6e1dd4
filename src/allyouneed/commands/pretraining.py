"""What `train` makes of a text, which the kind of model decides: next tokens, masked tokens and pairs, or spans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from allyouneed.core.errors import InputError, about, unknown
from allyouneed.core.files import replacing
from allyouneed.core.seeds import derive
from allyouneed.data.batches import Epochs
from allyouneed.data.corpora import Corpus, Document
from allyouneed.data.masked import MaskedPairs, sentences
from allyouneed.data.packing import chop, document, take
from allyouneed.data.pairs import apart
from allyouneed.data.spans import Spans
from allyouneed.data.tokenizer_training import train_bpe, train_unigram, train_wordpiece
from allyouneed.data.tokenizers import Tokenizer, byte_tokenizer
from allyouneed.evaluate.perplexity import perplexity, sum_losses
from allyouneed.models import bert, bloom, gpt2, llama, t5
from allyouneed.models.decoder import Decoder
from allyouneed.models.encoder import MaskedModel
from allyouneed.models.encoder_decoder import EncoderDecoder
from allyouneed.objectives.masked import masked_and_pairs
from allyouneed.objectives.next_token import next_token
from allyouneed.objectives.span import target_given_source
from allyouneed.train.gradients import Objective
from allyouneed.train.loop import Batches
from allyouneed.train.ranks import join

Evaluate = Callable[[nn.Module], Mapping[str, float]]
HELD_OUT = 4  # batches of masked tokens or of spans
SENTINEL = "<extra_id_{}>"


@dataclass(frozen=True)
class Lessons:
    """What a model reads, what is minimised on it, and what is measured on held-out text."""

    objective: Objective
    batches: Batches
    evaluate: Evaluate
    read: str  # how much there is


def new(
    family: str, texts: Sequence[str], *, vocab: int, context: int, dim: int, layers: int, heads: int, folder: Path
) -> tuple[Any, Tokenizer]:
    """A model of random weights and the tokenizer of its family, learned from `texts`; `folder` is that of the run.

    Raises:
        InputError: no such family, or sizes that do not fit together.
    """
    if family not in NEW:
        raise unknown("architecture", family, NEW)
    learned, architecture = NEW[family]
    tokenizer = learned(texts, vocab, folder)
    sizes = {"dim": dim, "num_layers": layers, "num_heads": heads, "context": context}
    return architecture(vocab_size=tokenizer.vocab_size, **sizes).build(), tokenizer


def _bpe(texts: Sequence[str], vocab: int, folder: Path) -> Tokenizer:
    return byte_tokenizer() if vocab == 257 else train_bpe(texts, vocab)


def _word_pieces(texts: Sequence[str], vocab: int, folder: Path) -> Tokenizer:
    return train_wordpiece(texts, vocab)


def _unigram(texts: Sequence[str], vocab: int, folder: Path) -> Tokenizer:
    """Kept in `folder`, because the same texts give another one each time, and a run that goes on needs its own."""
    if join().world > 1:
        raise InputError(
            "new:t5: each rank would learn another vocabulary; begin with one, then train OUT/model on all"
        )
    kept = folder / f"vocabulary-{derive(vocab, *texts):x}"
    if not kept.is_dir():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as temporary:
            train_unigram(texts, vocab).save(temporary)
    return Tokenizer.from_folder(kept)


def _t5(*, dim: int, num_heads: int, **sizes: Any) -> EncoderDecoder.Config:
    return t5.architecture(dim=dim, num_heads=num_heads, head_dim=dim // max(1, num_heads), hidden_dim=4 * dim, **sizes)


NEW: dict[str, tuple[Callable[..., Tokenizer], Callable[..., Any]]] = {
    "gpt2": (_bpe, gpt2.architecture),
    "llama": (_bpe, llama.architecture),
    "bloom": (_bpe, bloom.architecture),
    "bert": (_word_pieces, bert.architecture),
    "t5": (_unigram, _t5),
}


def lessons(module: nn.Module, tokenizer: Tokenizer, text: Corpus, *, rows: int, length: int, seed: int) -> Lessons:
    """What a module of this kind learns from `text`, in batches of `rows` rows of `length` tokens.

    Raises:
        InputError: a kind that learns from labels only, or too little text.
    """
    for kind, made in KINDS.items():
        if isinstance(module, kind):
            return made(module, tokenizer, text, rows, length, seed)
    raise InputError(
        "train: an encoder without its heads of pre-training, or a model for labels; "
        "`allyouneed finetune` teaches these"
    )


def _next_tokens(module: Any, tokenizer: Tokenizer, text: Corpus, rows: int, length: int, seed: int) -> Lessons:
    """Documents one after another, cut into rows of one length."""
    end, held_out = tokenizer.eos_ids[:1], [d.text for d in text.valid][:8]
    cut = chop((document([*tokenizer.encode(d.text), *end]) for d in text.train), length)
    count = len(cut["ids"])

    def evaluate(trained: nn.Module) -> dict[str, float]:
        loss = sum_losses(perplexity(trained, tokenizer, held_out, context=length))
        return {"valid_nats_per_token": loss.nats_per_token, "valid_bits_per_byte": loss.bits_per_byte}

    batches = Epochs(range(count), batch_size=rows, collate=lambda chosen: take(cut, chosen), seed=seed)
    return Lessons(next_token, batches, evaluate, f"{count} rows of {length} tokens")


def _masked(module: Any, tokenizer: Tokenizer, text: Corpus, rows: int, length: int, seed: int) -> Lessons:
    """BERT's: some tokens hidden in two parts of a text, the second of which may be another text's."""

    def pairs(documents: Sequence[Document], seed: int) -> MaskedPairs:
        ids = [[one for one in tokenizer.encode_batch(sentences(d.text)) if one] for d in documents]
        return MaskedPairs(ids, tokenizer, batch_size=rows, length=length, seed=seed)

    learned = pairs(text.train, seed)
    with about("held-out text"):
        held_out = pairs(text.valid, derive(seed, "valid"))
    count = sum(map(len, learned.documents))
    read = f"{count} sentences in {len(learned.documents)} documents"
    return Lessons(masked_and_pairs, learned, _mean(masked_and_pairs, held_out), read)


def _spans(module: Any, tokenizer: Tokenizer, text: Corpus, rows: int, length: int, seed: int) -> Lessons:
    """T5's: spans cut out of windows of all documents one after another."""
    highest, count = tokenizer.token_id(SENTINEL.format(0)), 0
    if highest is None or tokenizer.pad_id is None or not tokenizer.eos_ids:
        raise InputError(
            f"{tokenizer.name}: spans need {SENTINEL.format(0)}, padding and an end, as T5's vocabulary has"
        )
    while tokenizer.token_id(SENTINEL.format(count)) == highest - count:
        count += 1
    end, collate = tokenizer.eos_ids[0], partial(apart, start=tokenizer.pad_id)

    def spans(documents: Sequence[Document], seed: int) -> Spans:
        rows_of_ids = tokenizer.encode_batch([d.text for d in documents])
        tokens = torch.tensor([token for ids in rows_of_ids for token in (*ids, end)])
        shape: dict[str, Any] = {"batch_size": rows, "length": length, "collate": collate, "seed": seed}
        return Spans(tokens, sentinel=highest, sentinels=count, end=end, **shape)

    learned = spans(text.train, seed)
    with about("held-out text"):
        held_out = spans(text.valid, derive(seed, "valid"))
    read = f"{len(learned.tokens)} tokens"
    return Lessons(target_given_source, learned, _mean(target_given_source, held_out), read)


def _mean(objective: Objective, batches: Batches) -> Evaluate:
    """The loss on a few batches, always the same."""
    drawn = [batches.__next__() for _ in range(HELD_OUT)]

    def evaluate(module: nn.Module) -> dict[str, float]:
        device = next(module.parameters()).device
        losses = [objective(module, {name: x.to(device) for name, x in batch.items()}) for batch in drawn]
        return {"valid_loss": sum(loss.total.item() for loss in losses) / sum(loss.weight.item() for loss in losses)}

    return evaluate


KINDS: dict[type[nn.Module], Callable[..., Lessons]] = {
    Decoder: _next_tokens,
    MaskedModel: _masked,
    EncoderDecoder: _spans,
}
