"""Generation with SmolLM2 beside `transformers` (fp32, eager) reading the same file: one run, interleaved, medians.

    python benchmarks/decoding.py [--json FILE]

Limits: decoding reads every weight once a token, so it cannot be faster than file size / memory bandwidth; reading a
prompt is bound by arithmetic.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
import transformers
from turns import Case, turns

import allyouneed as ayn
from allyouneed.data import materials
from allyouneed.generate.engine import Engine
from allyouneed.generate.language_model import Sampling

NAME, NEW, ROUNDS = "smollm2-135m-instruct", 128, 5


def theirs() -> transformers.PreTrainedModel:
    path = materials.path(NAME)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def cases() -> dict[str, tuple[Case, Case, int]]:
    """Name -> (theirs, ours, tokens each)."""
    peer, module = theirs(), ayn.load_module(NAME, packed=True)
    engine, greedy = Engine(module), Sampling(max_new_tokens=NEW, temperature=0)
    unshared = Engine(module, config=Engine.Config(share_prefixes=False))
    prompt = torch.randint(10, 40000, (8,), generator=torch.Generator().manual_seed(0)).tolist()
    long = torch.randint(10, 40000, (512,), generator=torch.Generator().manual_seed(1)).tolist()

    def generate_theirs(rows: int) -> object:
        ids = torch.tensor([prompt] * rows)
        mask = torch.ones_like(ids)
        return peer.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0
        )

    def generate_ours(rows: int) -> object:
        return list(engine.steps([prompt] * rows, [greedy] * rows))

    @torch.inference_mode()
    def prefill_theirs() -> object:
        return peer(torch.tensor([long]), logits_to_keep=1, use_cache=True).logits

    def prefill_ours() -> object:
        return list(unshared.steps([long], [greedy.replace(max_new_tokens=1)]))

    return {
        "decode, batch 1, 128 tokens": (lambda: generate_theirs(1), lambda: generate_ours(1), NEW),
        "decode, batch 8, 128 tokens": (lambda: generate_theirs(8), lambda: generate_ours(8), 8 * NEW),
        "prefill, 512 tokens": (prefill_theirs, prefill_ours, len(long)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    rows = []
    for name, (their_case, our_case, tokens) in cases().items():
        found = turns(their_case, our_case, rounds=ROUNDS, warmup=1)
        peer, ours = (statistics.median(side.clock for side in sides) for sides in zip(*found, strict=True))
        rows.append(
            {"case": name, "transformers_tok_s": tokens / peer, "allyouneed_tok_s": tokens / ours, "ratio": peer / ours}
        )
        rates = f"transformers {tokens / peer:8.1f} tok/s   allyouneed {tokens / ours:8.1f} tok/s"
        print(f"{name:30} {rates}   x {peer / ours:.2f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
