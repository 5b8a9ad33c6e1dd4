"""Sentence embeddings with all-MiniLM-L6-v2 beside `sentence-transformers`: one run, interleaved, medians.

    python benchmarks/embedding.py [--json FILE]

The same texts and batch sizes for both; vectors are compared before anything is timed. Limits: arithmetic, some 21
MFLOP a token; what can be won is padding, masks and what is done around the model.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import sentence_transformers
import torch
from turns import Case, turns

import allyouneed as ayn
from allyouneed.data import materials

NAME, ROUNDS = "all-minilm-l6-v2", 5


def sentences(count: int) -> list[str]:
    """Of the language reference, 20 characters or more, as they come."""
    found = [part.strip() for text in topics.values() for part in text.split(". ")]
    return [sentence for sentence in found if len(sentence) >= 20][:count]


def cases() -> dict[str, tuple[Case, Case, int]]:
    """Name -> (theirs, ours, texts each)."""
    peer = sentence_transformers.SentenceTransformer(str(materials.path(NAME)), device="cpu")
    lm = ayn.load(NAME)
    short = ["What is a coroutine?", "The bridge was built in 1901.", "Mix flour, eggs and a little milk."] * 86
    kinds = {"sentences, batch 1": (sentences(64), 1)}
    kinds |= {f"sentences, batch {n}": (sentences(256), n) for n in (8, 32)}
    kinds |= {
        "questions, batch 32": (short[:256], 32),
        "paragraphs, batch 16": ([t[:1500] for t in topics.values()][:48], 16),
    }

    def ours(texts: list[str], batch: int) -> np.ndarray:
        lm.batch = batch
        return lm.embed(texts)

    for texts, batch in kinds.values():
        assert (ours(texts, batch) * peer.encode(texts, batch_size=batch)).sum(1).min() > 0.9999
    return {
        name: (lambda t=texts, n=batch: peer.encode(t, batch_size=n), lambda t=texts, n=batch: ours(t, n), len(texts))
        for name, (texts, batch) in kinds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name, (their_case, our_case, texts) in cases().items():
        times = [(*theirs, *mine) for theirs, mine in turns(their_case, our_case, rounds=ROUNDS)]
        peer, peer_busy, ours, busy = (statistics.median(column) for column in zip(*times, strict=True))
        rows.append(
            {
                "case": name,
                "sentence_transformers_texts_s": texts / peer,
                "allyouneed_texts_s": texts / ours,
                "ratio": peer / ours,
                "ratio_of_processor_time": peer_busy / busy,
            }
        )
        rates = f"sentence-transformers {texts / peer:7.1f} texts/s   allyouneed {texts / ours:7.1f} texts/s"
        print(f"{name:22} {rates}   x {peer / ours:.2f} (processor time x {peer_busy / busy:.2f})", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"threads": torch.get_num_threads(), "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
