"""How good translations are: BLEU as everyone computes it."""

from __future__ import annotations

from collections.abc import Sequence

from allyouneed.core.errors import InputError


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
