"""Models that guess for a model: a smaller one with a cache of its own, or the model's own first layers.

Both draw drafts from their distribution under the request's own temperature, filters and guide; a greedy request's are
their likeliest tokens. Shapes: V vocabulary.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from allyouneed import core
from allyouneed.core.errors import InputError
from allyouneed.generate.reading import Continues, CurrentReader, Piece, Reader
from allyouneed.generate.sampling import draw
from allyouneed.generate.speculation import Asked, Drafts, Pace
from allyouneed.generate.tables import BlockTable, Tables
from allyouneed.models.decoder import Decoder
from allyouneed.nn.paged import Storage, bytes_per_block

NextPiece = Callable[["_Guess"], Piece]


@dataclass(frozen=True, kw_only=True)
class Length(core.Config):
    """How many drafts a model makes."""

    first: int = 2  # in the first pass, and after some were not kept
    most: int = 8  # in a pass
    most_rest: int = 256  # passes without drafts, after a series of failures: each costs passes of the guessing model
    least: float = 0.5  # share of them that must be kept, lest it is a failure

    def pace(self) -> Pace:
        """Of a new request."""
        return Pace(self.first, self.most, self.most_rest, self.least)

    def __post_init__(self) -> None:
        """Refuse lengths with which nothing is guessed."""
        if not 1 <= self.first <= self.most:
            raise InputError(f"{self}: 1 <= first <= most is needed")


class _Guess:
    """The drafts of one request while they are made."""

    def __init__(self, asked: Asked, source: random.Random) -> None:
        self.asked, self.sampler = asked, asked.sampler.fork(source)
        self.tokens: list[int] = []
        self.odds: list[Tensor] = []
        self.done = asked.count == 0

    def extend(self, logits: Tensor) -> None:
        """One draft more, from the guessing model's logits (V,)."""
        if self.sampler.greedy:
            token = self.sampler.choose(logits)
        else:
            self.odds.append(self.sampler.odds(logits))
            token = draw(self.odds[-1].log(), self.sampler.source)
        self.tokens.append(token)
        self.done = len(self.tokens) == self.asked.count or token in self.sampler.ends
        if not self.done:
            self._take(token)

    def _take(self, token: int) -> None:
        guide = self.sampler.guide
        try:
            self.sampler.take(token)
        except InputError:  # the model's own guide will find out, should the token be kept
            self.done = True
        else:
            self.done = guide is not None and guide.finished


class _Sources:
    """Where the draws of each request come from: a source of its own for drafts, which the request's seed decides."""

    def __init__(self) -> None:
        self._sources: dict[int, random.Random] = {}

    def guesses(self, asked: Sequence[Asked]) -> list[_Guess]:
        """Empty guesses."""
        return [_Guess(one, self._source(one)) for one in asked]

    def forget(self, number: int) -> None:
        """A request is over."""
        self._sources.pop(number, None)

    def _source(self, one: Asked) -> random.Random:
        seed = one.sampler.sampling.seed
        fresh = random.Random(None if seed is None else f"drafts of {seed}")
        return self._sources.setdefault(one.number, fresh)


def _guess(reader: Reader, guesses: Sequence[_Guess], piece: NextPiece) -> list[Drafts]:
    """Let a model guess for all at once, token by token; `piece` is what it reads next for one."""
    active = [guess for guess in guesses if not guess.done]
    while active:
        rows = reader.read([piece(guess) for guess in active])
        for guess, logits in zip(active, rows, strict=True):
            guess.extend(logits)
        active = [guess for guess in active if not guess.done]
    return [Drafts(guess.tokens, guess.odds) for guess in guesses]


class EarlyExit:
    """The model's first layers guess for all of them: its last norm and head read what they give (self-speculation;
    Elhoushi et al. 2024, sec. 4.3). Keys and values of these layers are the model's own, so that nothing is kept twice.

    Args:
        layers: how many.
    """

    def __init__(self, layers: int, length: Length | None = None) -> None:
        self.layers, self.length = layers, length or Length()
        self._sources = _Sources()
        self._reader: Reader | None = None

    def bytes_per_block(self, size: int) -> int:
        """Keys and values are the model's own."""
        return 0

    def attach(self, module: Continues, storage: Storage, chunk: int) -> None:
        """Guess for this model, whose keys and values are in `storage`.

        Raises:
            InputError: it has no more layers than guess, or is no decoder.
        """
        if not isinstance(module, Decoder):
            raise InputError(f"early exit: {type(module).__name__} is no decoder; guess with another model instead")
        if not 0 < self.layers < module.config.num_layers:
            raise InputError(f"early exit: layers={self.layers} of {module.config.num_layers}; it must be fewer")
        self._reader = CurrentReader(first_layers(module, self.layers), storage)

    def pace(self) -> Pace:
        """Of a new request."""
        return self.length.pace()

    def propose(self, asked: Sequence[Asked]) -> list[Drafts]:
        """What the first layers say follows."""
        assert self._reader is not None, "attach comes first"
        return _guess(self._reader, self._sources.guesses(asked), _own_piece)

    def forget(self, number: int) -> None:
        """A request is over."""
        self._sources.forget(number)


def first_layers(module: Decoder, layers: int) -> Decoder:
    """A decoder of the first layers of another, whose last norm, head and weights are its own."""
    shallow = copy.copy(module)
    shallow._modules = dict(module._modules) | {"blocks": nn.ModuleList(module.blocks[:layers])}
    shallow.config = module.config.replace(num_layers=layers)
    return shallow.train(module.training)


def _own_piece(guess: _Guess) -> Piece:
    """The last token of a text, or of its drafts, behind what the model holds of it."""
    table, drafts = guess.asked.table, guess.tokens
    last = drafts[-1] if drafts else guess.asked.tokens[-1]
    length = table.length + len(drafts)
    return Piece([last], table.blocks, length, wanted=1, slot=table.slot, adapters=table.adapters)


@dataclass(eq=False)
class _Held:
    """What a draft model holds of a text: `tokens`, of which the first `sure` ones were compared with the text."""

    table: BlockTable
    tokens: list[int] = field(default_factory=list)
    sure: int = 0

    def rewind(self, tokens: Sequence[int]) -> None:
        """Hold no more than the text has, which grew to `tokens`, but for its last one."""
        length = min(self.sure, len(tokens) - 1)
        while length < min(len(self.tokens), len(tokens) - 1) and self.tokens[length] == tokens[length]:
            length += 1
        del self.tokens[length:]
        self.table.length = self.sure = length  # what it will read of the text may never come to be read


class Draft:
    """A smaller model with the same vocabulary guesses, with a paged cache of its own.

    A text waits for its drafts where they decide which tokens a seed gives: while the model catches up with it, a
    chunk in a pass, and while older texts take the cache. So its tokens do not depend on what else runs. Other texts
    go on without drafts meanwhile.

    Args:
        module: a decoder.
    """

    def __init__(self, module: Decoder, length: Length | None = None) -> None:
        self.module, self.length = module, length or Length()
        self._sources = _Sources()
        self._held: dict[int, _Held] = {}

    def bytes_per_block(self, size: int) -> int:
        """Of its own cache, which has as many blocks as the model's."""
        return bytes_per_block(self.module.new_cache(1, 0), size)

    def attach(self, module: Continues, storage: Storage, chunk: int) -> None:
        """Guess for this model; the cache has room for as many tokens as the model's own `storage`.

        Raises:
            InputError: the vocabularies differ in size, or drafts could not be taken back.
        """
        sizes = self.module.config.vocab_size, module.config.vocab_size
        if sizes[0] != sizes[1]:
            raise InputError(
                f"draft: its vocabulary has {sizes[0]} tokens, the model's {sizes[1]}; they must be the same"
            )
        own = Storage(self.module.new_cache(1, 0), storage.blocks, storage.size)
        if own.states or self.module.answers:
            raise InputError("draft: a model with a state, or one that answers another text, cannot take drafts back")
        self._tables, self._reader = Tables(self.module, own, share=False), CurrentReader(self.module, own)
        self._chunk = chunk

    def pace(self) -> Pace:
        """Of a new request."""
        return self.length.pace()

    def propose(self, asked: Sequence[Asked]) -> list[Drafts | None]:
        """What the smaller model says follows; nothing for texts beyond its context."""
        fitting = [one for one in asked if self.module.limit is None or _total(one) <= self.module.limit]
        places = {one.number: place for place, one in enumerate(fitting)}
        roomy = [one for one in fitting if self._prepare(one, places)]
        found: dict[Asked, Drafts | None] = {one: None if _bound(one) else Drafts() for one in fitting}
        try:
            able = self._catch_up(roomy)
            found |= zip(able, _guess(self._reader, self._sources.guesses(able), self._piece), strict=True)
        except BaseException:  # nobody knows what was read
            for number in list(self._held):
                self._drop(number)
            raise
        return [found.get(one, Drafts()) for one in asked]

    def forget(self, number: int) -> None:
        """A request is over."""
        self._sources.forget(number)
        self._drop(number)

    def _drop(self, number: int) -> None:
        if number in self._held:
            self._tables.close(self._held.pop(number).table)

    def _prepare(self, one: Asked, places: Mapping[int, int]) -> bool:
        """Hold no token that the text has not, and have room for the drafts; False where those before it in `places`
        leave none. The first has it always: the model's own cache would hold its text, too.
        """
        held = self._held.get(one.number)
        if held is None:
            held = self._held[one.number] = _Held(self._tables.open())
        held.rewind(one.tokens)
        while not self._tables.reserve(held.table, _total(one) - held.table.length):
            last = max(self._held, key=lambda number: places.get(number, len(places)))
            if places.get(last, len(places)) <= places[one.number]:
                return False
            self._drop(last)
        return True

    def _catch_up(self, asked: Sequence[Asked]) -> list[Asked]:
        """Those that drafts can be made for in this pass, all of them together reading no more than a chunk besides the
        last two tokens of each, as many as come where all drafts were kept; the first of the others reads the rest.
        """
        budget, able = self._chunk, list[Asked]()
        for one in asked:
            held = self._held[one.number]
            length = held.table.length
            behind = max(0, len(one.tokens) - length - 2)
            if behind <= budget:  # it is read with the first draft
                able.append(one)
            elif budget:
                self._reader.read([self._read(held, one.tokens[length : length + budget], wanted=0)])
            budget -= min(behind, budget)
        return able

    def _piece(self, guess: _Guess) -> Piece:
        """The tokens of a text and its drafts that were not read."""
        held, text = self._held[guess.asked.number], guess.asked.tokens
        length = held.table.length
        return self._read(held, [*text[length:], *guess.tokens[max(0, length - len(text)) :]], wanted=1)

    def _read(self, held: _Held, ids: Sequence[int], wanted: int) -> Piece:
        piece = self._tables.piece(held.table, ids, wanted)
        held.tokens += ids
        held.table.length += len(ids)
        return piece


def _total(one: Asked) -> int:
    """Tokens of a text with its drafts."""
    return len(one.tokens) + one.count


def _bound(one: Asked) -> bool:
    """Whether drafts decide which tokens the text's seed gives."""
    return one.sampler.sampling.seed is not None and not one.sampler.greedy
