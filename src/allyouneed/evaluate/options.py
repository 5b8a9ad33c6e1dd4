"""Questions with options, scored by likelihood as in GPT-3 (Brown et al. 2020, sec. 2.4), and few-shot prompts.

Knows no task and no model: questions come from the caller, any `LanguageModel` answers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from allyouneed.core.errors import InputError
from allyouneed.core.seeds import derive
from allyouneed.evaluate.statistics import Interval, wilson
from allyouneed.generate.language_model import CountsTokens, LanguageModel

ANSWER_CONTEXT = "Answer:"  # prompts that an answer follows, and is otherwise generic (sec. 2.4)

ENCLOSING = ".,;:!?\"'()“”‘’"


@dataclass(frozen=True)
class Question:
    """A context, what may follow it, and which option is right. A question to be answered freely has one option.

    >>> Question("2 + 2 =", ("4", "5"), answer=0).solved
    '2 + 2 = 4'

    Raises:
        InputError: no options, an empty one, or an answer that is none of them.
    """

    context: str
    options: tuple[str, ...]
    answer: int
    joint: str = " "  # stands between context and option; scored with the option, not counted in its length

    def __post_init__(self) -> None:
        if not self.options or not all(self.options):
            raise InputError(f"question {self.context[-40:]!r} has an empty option or none: {self.options!r}")
        if not 0 <= self.answer < len(self.options):
            raise InputError(f"question {self.context[-40:]!r}: answer {self.answer} of {len(self.options)} options")

    @property
    def continuations(self) -> list[str]:
        """What a model is asked for, per option."""
        return [self.joint + option for option in self.options]

    @property
    def solved(self) -> str:
        """The question as a demonstration shows it."""
        return self.context + self.joint + self.options[self.answer]


@dataclass(frozen=True)
class Scores:
    """One score per option under each normalisation; the largest is the model's choice."""

    raw: tuple[float, ...]  # log P(option | context)
    per_character: tuple[float, ...]  # acc_norm of lm-evaluation-harness
    per_byte: tuple[float, ...]  # of UTF-8; its acc_bytes
    answer_context: tuple[float, ...] | None = None  # log P(option | context) / P(option | answer context)
    per_token: tuple[float, ...] | None = None  # GPT-3's usual; None: the model does not count tokens

    def choice(self, normalisation: str) -> int:
        """The option that scores best; of equals the first."""
        return int(np.argmax(getattr(self, normalisation)))

    def normalisations(self) -> list[str]:
        """Those that there are."""
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]


def score_options(
    lm: LanguageModel, questions: Sequence[Question], *, answer_context: str | None = ANSWER_CONTEXT
) -> list[Scores]:
    """The scores of each question's options. All are asked for in one call, equal pairs once.

    `answer_context` None: leave out that normalisation, which asks about every option once more.
    """
    conditional = [(q.context, c) for q in questions for c in q.continuations]
    unconditional = [] if answer_context is None else [(answer_context, c) for _, c in conditional]
    pairs = list(dict.fromkeys(conditional + unconditional))
    found = dict(zip(pairs, lm.score([p for p, _ in pairs], [c for _, c in pairs]), strict=True))
    texts = list(dict.fromkeys(c for _, c in pairs))
    tokens = dict(zip(texts, lm.count_tokens(texts), strict=True)) if isinstance(lm, CountsTokens) else None
    return [_scores(question, found, tokens, answer_context) for question in questions]


def _scores(
    question: Question,
    found: Mapping[tuple[str, str], float],
    tokens: Mapping[str, int] | None,
    answer_context: str | None,
) -> Scores:
    raw = [found[question.context, c] for c in question.continuations]
    return Scores(
        raw=tuple(raw),
        per_character=tuple(r / len(option) for r, option in zip(raw, question.options, strict=True)),
        per_byte=tuple(r / len(option.encode()) for r, option in zip(raw, question.options, strict=True)),
        answer_context=None
        if answer_context is None
        else tuple(r - found[answer_context, c] for r, c in zip(raw, question.continuations, strict=True)),
        per_token=None
        if tokens is None
        else tuple(r / tokens[c] for r, c in zip(raw, question.continuations, strict=True)),
    )


def correct(questions: Sequence[Question], scores: Sequence[Scores], normalisation: str) -> np.ndarray:
    """Which questions are answered rightly: (n,) of 0.0 and 1.0, the items for a paired bootstrap between arms."""
    right = [s.choice(normalisation) == q.answer for q, s in zip(questions, scores, strict=True)]
    return np.array(right, dtype=np.float64)


def accuracy(
    questions: Sequence[Question], scores: Sequence[Scores], *, confidence: float = 0.95
) -> dict[str, Interval]:
    """The share of right answers under each normalisation, with Wilson's interval.

    >>> question = Question("2 + 2 =", ("4", "four hundred"), answer=0)
    >>> scores = Scores(raw=(-2.0, -9.0), per_character=(-2.0, -0.8), per_byte=(-2.0, -0.8), answer_context=(3.0, 1.0))
    >>> {name: interval.estimate for name, interval in accuracy([question], [scores]).items()}
    {'raw': 1.0, 'per_character': 0.0, 'per_byte': 0.0, 'answer_context': 1.0}

    Raises:
        InputError: no questions.
    """
    if not questions:
        raise InputError("accuracy: there are no questions")
    return {
        name: wilson(int(correct(questions, scores, name).sum()), len(questions), confidence=confidence)
        for name in scores[0].normalisations()
    }


def with_demonstrations(
    question: Question, demonstrations: Sequence[Question], *, separator: str = "\n\n", description: str = ""
) -> Question:
    """`question` after a description, which brings its own line ends, and solved examples.

    >>> with_demonstrations(Question("3 + 3 =", ("6",), 0), [Question("2 + 2 =", ("4",), 0)], separator="; ").context
    '2 + 2 = 4; 3 + 3 ='
    """
    shown = "".join(example.solved + separator for example in demonstrations)
    return replace(question, context=description + shown + question.context)


def fewshot(
    examples: Sequence[Question],
    question: Question,
    k: int,
    seed: int,
    *,
    separator: str = "\n\n",
    description: str = "",
) -> Question:
    """`question` after `k` of the examples, drawn anew for each question (sec. 2.4).

    The draw depends on the seed, the question's context and the number of examples only: every model and arm sees the
    same demonstrations, those for a smaller `k` are the first of those for a larger, and examples given other labels
    (`relabelled`) take the places of the right ones. An example with the question's own context is never drawn.

    Raises:
        InputError: fewer than `k` other examples.
    """
    order = np.random.default_rng(derive(seed, "fewshot", question.context)).permutation(len(examples))
    others = [examples[i] for i in order if examples[i].context != question.context]
    if len(others) < k:
        raise InputError(f"fewshot: {k} demonstrations asked for, but there are {len(others)} other examples")
    return with_demonstrations(question, others[:k], separator=separator, description=description)


def relabelled(example: Question, seed: int) -> Question:
    """The example with one of its options, drawn evenly whether right or wrong, given as the answer (Min et al. 2022,
    arXiv:2202.12837, sec. 4): a control for what demonstrations teach by their form, topic and labels alone.
    """
    return replace(example, answer=derive(seed, "relabelled", example.context) % len(example.options))


def exact_match(generated: str, answers: Sequence[str]) -> bool:
    """Whether a generated answer is one of `answers`, but for case, spaces, enclosing punctuation and an article.

    >>> exact_match(' The "Eiffel  Tower".', ["eiffel tower"]), exact_match("-5", ["5"])
    (True, False)
    """
    return _plain(generated) in map(_plain, answers)


def _plain(text: str) -> str:
    words = [word.strip(ENCLOSING) for word in text.casefold().split()]
    plain = re.sub(r"^(a|an|the) (?=.)", "", " ".join(filter(None, words)))
    return plain or text.strip()  # an answer may be nothing but punctuation
