"""Resident memory of a model beside the size of its file: after loading, and after a first answer.

    python benchmarks/resident.py [MODEL]

PyTorch and our code are loaded before the first reading, and do not count. Pages of a mapped file count once they were
read: all of them after an answer.
"""

from __future__ import annotations

import argparse

import psutil
import torch

import allyouneed as ayn
from allyouneed.data import materials, tokenizers
from allyouneed.generate import load, local
from allyouneed.generate.local import LocalModel
from allyouneed.models.checkpoints import loading
from allyouneed.nn import native
from allyouneed.nn.paged import bytes_per_block

CODE = (load, local, loading, tokenizers)


def resident() -> float:
    """MiB."""
    return psutil.Process().memory_info().rss / 2**20


def cache(lm: LocalModel, tokens: int) -> float:
    """MiB of the blocks that so many tokens take."""
    size = lm.engine.config.block_size
    return -(-tokens // size) * bytes_per_block(lm.module.new_cache(1, 0), size) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()
    native.library()
    _ = torch.randn(4, 4) @ torch.randn(4, 4)
    file = materials.path(arguments.model).stat().st_size / 2**20
    before = resident()
    lm = ayn.load(arguments.model)
    loaded = resident() - before
    prompt = "Once upon a time"
    lm.generate([prompt], max_new_tokens=arguments.tokens, temperature=0.0)
    answered, kept = resident() - before, cache(lm, arguments.tokens + len(lm.tokenizer.encode(prompt)))
    print(f"file {file:.1f} MiB; resident once loaded {loaded:.1f}, once answered {answered:.1f}")
    print(f"{(answered - kept) / file:.2f} times the file, and {kept:.1f} MiB of keys and values")


if __name__ == "__main__":
    main()
