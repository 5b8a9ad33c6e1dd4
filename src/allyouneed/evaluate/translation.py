"""How good translations are: BLEU as everyone computes it, and what can be asked of those into a generated language."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from allyouneed.core.errors import InputError
from allyouneed.data.languages import Languages
from allyouneed.data.pairs import Pair


def bleu(found: Sequence[str], references: Sequence[str], *, tokenize: str = "13a") -> float:
    """Corpus BLEU (Papineni et al. 2002) by `sacrebleu`, 0 to 100.

    Args:
        found: one translation each.
        references: the right one each.
        tokenize: sacrebleu's tokenizer; "none" where words are already apart.

    Raises:
        InputError: none, or not as many of the one as of the other; or `sacrebleu` is missing.

    >>> bleu(["the cat sat on the mat"], ["the cat sat on the mat"])
    100.0
    """
    if not found or len(found) != len(references):
        raise InputError(f"bleu: {len(found)} translations and {len(references)} references")
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise InputError("BLEU is computed by sacrebleu: pip install 'allyouneed[translate]'") from None
    return round(float(BLEU(tokenize=tokenize).corpus_score(list(found), [list(references)]).score), 6)


def bleu_of_ids(found: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> float:
    """BLEU where each id is a word.

    >>> bleu_of_ids([(3, 4, 5, 6)], [(3, 4, 5, 6)])
    100.0
    """
    said, right = ([" ".join(map(str, ids)) for ids in texts] for texts in (found, references))
    return bleu(said, right, tokenize="none")


def agreement(world: Languages, found: Sequence[Sequence[int]], pairs: Sequence[Pair]) -> dict[str, list[int]]:
    """How many endings agree, and of how many, by the words between them and their noun (as text, for JSON)."""
    right: dict[int, list[bool]] = {}
    for one, (source, target) in zip(found, pairs, strict=True):
        right.setdefault(world.distance(source), []).append(world.ending(one) == target[-1])
    return {str(distance): [sum(values), len(values)] for distance, values in sorted(right.items())}


def pooled(counts: Iterable[Mapping[str, Sequence[int]]], *, fewest: int) -> dict[int, float]:
    """Shares over all of several `agreement`s, where at least `fewest` were asked.

    >>> pooled([{"3": [1, 2], "5": [0, 1]}, {"3": [2, 2]}], fewest=2)
    {3: 0.75}
    """
    together: dict[int, list[int]] = {}
    for one in counts:
        for distance, (right, asked) in one.items():
            held = together.setdefault(int(distance), [0, 0])
            held[0] += right
            held[1] += asked
    return {d: right / asked for d, (right, asked) in sorted(together.items()) if asked >= fewest}
