"""How well a head tells labels: accuracy and F1 of classes, exact match and F1 of spans.

Shapes: B rows, L answers a row, C classes.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from allyouneed.data.labelled import Example, Span, collate
from allyouneed.data.packing import IGNORED


@torch.inference_mode()
def logits(module: Any, examples: Sequence[Example], *, batch: int = 32) -> Iterator[Tensor]:
    """What `module` in evaluation mode makes of each example, (L, C), those of like length computed together."""
    device = next(module.eval().parameters()).device
    order = sorted(range(len(examples)), key=lambda i: examples[i].longest)
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        made = collate([examples[i] for i in chosen])
        found |= dict(zip(chosen, module({name: x.to(device) for name, x in made.items()}), strict=True))
    return (found[i] for i in range(len(examples)))


def classes(module: Any, examples: Sequence[Example], *, batch: int = 32) -> dict[str, float]:
    """`accuracy`, the macro-averaged `f1` of all classes that occur, and `majority`, the accuracy of always guessing
    the commonest: over all labels, several a row where there are.
    """
    told, asked = [], []
    for example, one in zip(examples, logits(module, examples, batch=batch), strict=True):
        best = one.argmax(-1).tolist()
        for guess, label in zip(best, example.labels, strict=False):
            if label != IGNORED:
                told.append(guess)
                asked.append(label)
    right = Counter(a for a, b in zip(asked, told, strict=True) if a == b)
    truly, said = Counter(asked), Counter(told)
    each = [2 * right[c] / (truly[c] + said[c]) for c in {*truly, *said}]
    return {
        "accuracy": sum(right.values()) / len(asked),
        "f1": sum(each) / len(each),
        "majority": max(truly.values()) / len(asked),
    }


def spans(module: Any, asked: Sequence[Span], *, batch: int = 32, longest: int = 30) -> dict[str, float]:
    """SQuAD's `exact_match` and `f1` of the likeliest span of up to `longest` tokens, each against the best of an
    example's answers (Rajpurkar et al. 2016, sec. 6.1).
    """
    exact = f1 = 0.0
    rows = logits(module, [span.example for span in asked], batch=batch)
    for span, one in zip(asked, rows, strict=True):
        told = best_span(one, span, longest)
        exact += max(_normal(told) == _normal(answer) for answer in span.answers)
        f1 += max(_f1(_normal(told).split(), _normal(answer).split()) for answer in span.answers)
    return {"exact_match": exact / len(asked), "f1": f1 / len(asked)}


def best_span(logits: Tensor, span: Span, longest: int = 30) -> str:
    """The passage whose first and last token have the largest sum of logits (2, T), both standing for characters of
    the context.
    """
    length = len(span.places)
    readable = torch.tensor([place is not None and place[0] < place[1] for place in span.places])
    begin, end = (side[:length].masked_fill(~readable, float("-inf")) for side in logits.cpu())
    scores = begin[:, None] + end[None]
    ordered = torch.ones(length, length, dtype=torch.bool).triu().tril(longest - 1)
    first, last = divmod(int(scores.masked_fill(~ordered, float("-inf")).argmax()), length)
    left, right = span.places[first], span.places[last]
    return span.context[left[0] : right[1]] if left and right else ""


def _normal(text: str) -> str:
    """Without case, punctuation, articles and needless spaces, as SQuAD's own scorer compares."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _f1(told: list[str], asked: list[str]) -> float:
    if not told or not asked:
        return float(told == asked)
    shared = sum((Counter(told) & Counter(asked)).values())
    return 2 * shared / (len(told) + len(asked))
