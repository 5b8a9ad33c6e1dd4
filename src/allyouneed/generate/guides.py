"""Guides: which tokens may come next, so that a text follows a JSON schema, a regular expression, a list of choices or
a grammar. Built over `llguidance`; holds no grammar of its own.

A grammar speaks of bytes, a vocabulary of tokens: `data.spelling` says what each token writes. Special tokens are never
allowed but for an end token, where the text may end. Shapes: V the tokenizer's vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from allyouneed.core.errors import InputError, brief
from allyouneed.data.spelling import Spelling
from allyouneed.data.tokenizers import Tokenizer
from allyouneed.generate.schemas import Schema, ends
from allyouneed.generate.trial import refusal

if TYPE_CHECKING:
    from llguidance import LLMatcher

MOST_CHARACTERS = 1 << 18  # of a schema or grammar
KEPT = 64  # grammars that were compiled last stay so
SPACE = r"[ \n\r\t]{0,32}"  # between the tokens of JSON: without a bound, a model may write spaces without end


class GrammarGuide:
    """Guides one text through a compiled grammar (`requests.Guide`).

    >>> from allyouneed.data.tokenizers import byte_tokenizer
    >>> guide = Guides(byte_tokenizer()).regex("ab?")
    >>> guide.allowed().nonzero().tolist()
    [[97]]
    >>> guide.take(97)
    >>> guide.allowed().nonzero().tolist(), guide.finished
    ([[98], [256]], False)
    """

    def __init__(self, matcher: LLMatcher, size: int, end_ids: Collection[int]) -> None:
        self._matcher, self._size, self._ends = matcher, size, end_ids
        self._allowed = self._look()

    @property
    def finished(self) -> bool:
        """Whether the text is whole: nothing but an end token may follow."""
        return bool(self._matcher.is_stopped())

    def allowed(self) -> Tensor:
        """Which tokens may come next: (V,) bool, at least one of them true unless `finished`."""
        return self._allowed

    def take(self, token: int) -> None:
        """Go on past an allowed token, and find out which may follow.

        Raises:
            InputError: the token is not allowed, the grammar became too complex to go on, or the vocabulary cannot
                write what must follow. Nothing follows then.
        """
        if self.finished and token in self._ends:
            return
        self._matcher.consume_token(token)
        self._allowed = self._look()

    def copy(self) -> GrammarGuide:
        """Another guide at the same place, for another text or for guesses."""
        return GrammarGuide(self._matcher.deep_copy(), self._size, self._ends)

    def _look(self) -> Tensor:
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(mask, count=self._size, bitorder="little").view(bool)
        if self._matcher.is_error():
            reason = self._matcher.get_error().partition("\n")[0]
            raise InputError(f"the text cannot go on as the grammar demands: {reason[:200]}")
        if not self.finished and not allowed.any():
            raise InputError("the grammar demands what this vocabulary cannot write")
        return torch.from_numpy(allowed)


class Guides:
    """Makes guides for one vocabulary. Keep it: it holds the vocabulary in the form that grammars are matched with.

    Raises:
        InputError: the package `llguidance` is missing, or no grammar can be matched with this vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._spelling, self._name = tokenizer.spelling(), tokenizer.name
        self._library = _library()
        wrapper = _Wrapper(tokenizer, self._spelling)
        self._vocabulary = self._library.LLTokenizer(wrapper, eos_token=wrapper.ends)
        self._size, self._ends = tokenizer.vocab_size, frozenset(tokenizer.eos_ids)
        self._compiled = lru_cache(KEPT)(self._compile)

    def json_schema(self, schema: Schema | str) -> GrammarGuide:
        """A guide to JSON that satisfies `schema` (draft 2020-12), a JSON value or its text.

        Keywords that cannot be held to are refused, never passed over.

        Raises:
            InputError: no schema, one that nothing satisfies, or too large; names what is wrong.
        """
        with _schema_errors():
            text = schema if isinstance(schema, str) else json.dumps(schema)
        _check_length("schema", text)
        with _schema_errors():
            value = json.loads(text)
            if value is True:
                value = {}
            if not isinstance(value, dict):
                raise ValueError("an object or true is accepted")
            endless = not ends(value)
            grammar = self._library.LLMatcher.grammar_from_json_schema(
                json.dumps(value), overrides={"whitespace_pattern": SPACE}
            )
        if endless:
            raise InputError("schema: only values without end satisfy it; let one of the references be optional")
        return self._guide("schema", grammar)

    def json_object(self) -> GrammarGuide:
        """A guide to any JSON object."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> GrammarGuide:
        """A guide to texts that match `pattern` as a whole (the syntax of Rust's `regex`: no look-around).

        Raises:
            InputError: no pattern, one that nothing matches, or too large.
        """
        return self._guide("regex", self._library.LLMatcher.grammar_from_regex(pattern))

    def choice(self, texts: Sequence[str]) -> GrammarGuide:
        """A guide to one of `texts`.

        Raises:
            InputError: there are none, or the vocabulary can write one only in part.
        """
        if not texts:
            raise InputError("choice: there are no texts to choose from")
        for text in texts:
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise InputError(f"choice: {brief(text)} has half of a surrogate pair, which no text can hold")
            if not self._spelling.complete and not _writes(self._spelling, text):
                raise InputError(f"choice: {brief(text)} cannot be written with the tokens of {self._name}")
        written = [json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f") for text in texts]
        options = " | ".join(written)  # JSON leaves the one control character as it is that Lark's strings cannot hold
        return self._guide("choice", f"start: {options}", partial=True)

    def grammar(self, lark: str) -> GrammarGuide:
        """A guide to texts of a grammar in Lark's notation, as llguidance has it; its rule `start` is the text.

        Raises:
            InputError: no grammar, one that nothing fits, or too large.
        """
        return self._guide("grammar", self._library.LLMatcher.grammar_from_lark(lark))

    def _guide(self, what: str, grammar: str, *, partial: bool = False) -> GrammarGuide:
        """`partial`: will do with a vocabulary that cannot write every text."""
        if not partial and not self._spelling.complete:
            raise InputError(f"{what}: {self._name} has no token for every byte, so that not every text can be written")
        _check_length(what, grammar)
        return self._compiled(what, grammar).copy()

    def _compile(self, what: str, grammar: str) -> GrammarGuide:
        if reason := refusal(grammar, self._spelling.alphabet if self._spelling.complete else bytes(range(256))):
            raise InputError(f"{what}: {reason}")
        limits = self._library.LLParserLimits(verbose_errors=False)
        whole = _framed(grammar, " " if self._spelling.drops_space else "")
        matcher = self._library.LLMatcher(self._vocabulary, whole, log_level=0, limits=limits)
        return GrammarGuide(matcher, self._size, self._ends)


class _Wrapper:
    """A vocabulary in the form that llguidance wants."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, spelling: Spelling) -> None:
        self.tokens = [token or f"<{i}>".encode() for i, token in enumerate(spelling.writes)]
        self.special_token_ids = [i for i, token in enumerate(spelling.writes) if token is None]
        self.ends = list(tokenizer.eos_ids)
        if not self.ends:  # an id beyond the vocabulary, which is never given away
            self.ends = [len(self.tokens)]
            self.special_token_ids += self.ends
            self.tokens.append(b"<end>")
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, self.ends[0]
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        """The tokens of a text. Never asked for, since grammars are told to force none (`_framed`)."""
        return self._tokenizer.encode(text.decode(errors="replace") if isinstance(text, bytes) else text)


@contextmanager
def _schema_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, RecursionError, AttributeError) as error:
        raise InputError(f"schema: is no JSON schema that values satisfy: {brief(str(error))}") from None


def _check_length(what: str, text: str) -> None:
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"{what}: {len(text)} characters; at most {MOST_CHARACTERS} are accepted")


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise InputError(
            "guides need the package llguidance; install it with pip install 'allyouneed[guide]'"
        ) from None
    return llguidance


def _framed(grammar: str, before: str) -> str:
    """The grammar with a text before it, which vocabularies that drop a space need, and with nothing forced: where only
    one text can follow, llguidance would allow only the tokens that `__call__` cuts it into.
    """
    body = json.loads(grammar)["grammars"][0] if grammar.startswith("{") else {"lark_grammar": grammar}
    frame = f'%llguidance {{"no_forcing": true}}\nstart: {json.dumps(before)} @body'
    return json.dumps({"grammars": [{"lark_grammar": frame}, body | {"name": "body"}]})


def _writes(spelling: Spelling, text: str) -> bool:
    """Whether `text` can be written, and every beginning of it that can be written can be gone on with."""
    data = text.encode()
    data = b" " + data if spelling.drops_space else data
    tokens = {token for token in spelling.writes if token is not None}
    longest = max(map(len, tokens), default=0)
    steps = [
        [j for j in range(i + 1, min(len(data), i + longest) + 1) if data[i:j] in tokens] for i in range(len(data))
    ]
    whole = [False] * len(data) + [True]
    for i in reversed(range(len(data))):
        whole[i] = any(whole[j] for j in steps[i])
    reached = {0}
    for i in range(len(data)):
        reached |= set(steps[i]) if i in reached else set()
    return all(whole[i] for i in reached)
