"""What weights in few bits cost in quality: SmolLM2's perplexity on the Python reference, plain and packed.

    python benchmarks/packing.py [--tokens N] [--kinds KIND …] [--json FILE]

Its file is quantised already, on grids of 32 numbers that Q4_1 hits again. So the same model is packed a second time
after a change of units that leaves what it computes as it is: gains of norms go into the weights behind them, and each
layer's values are turned, as is the matrix that reads them. Then only the last matrix of each layer lies on a grid.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch

import allyouneed as ayn
from allyouneed.adapt.packing import pack
from allyouneed.adapt.quantise import Quantise, quantise, resident
from allyouneed.data.corpora import corpus
from allyouneed.evaluate.perplexity import perplexity
from allyouneed.models.checkpoints.loading import load_tokenizer
from allyouneed.models.decoder import Decoder

NAME = "smollm2-135m-instruct"
CONTEXT = 512


@torch.no_grad()
def off_grid(module: Decoder) -> Decoder:
    """The same model in other units."""
    draw = torch.Generator().manual_seed(0)
    for block in module.blocks:
        mixer, channel = block.mixer, block.channel
        before = (block.mixer_norm, (mixer.q, mixer.k, mixer.v)), (block.channel_norm, (channel.gate, channel.up))
        for norm, layers in before:
            for layer in layers:
                layer.weight *= norm.weight
            norm.weight.fill_(1.0)
        turn, _ = torch.linalg.qr(torch.randn(mixer.head_dim, mixer.head_dim, generator=draw))
        for weight, like in ((mixer.v.weight, "hd,hk->dk"), (mixer.out.weight.t(), "hd,hk->dk")):
            heads = weight.unflatten(0, (-1, mixer.head_dim))
            weight.copy_(torch.stack([torch.einsum(like, turn, head) for head in heads]).flatten(0, 1))
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--kinds", nargs="+", default=["float32", "int8", "int4", "nf4"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(NAME)
    text = "\n\n".join(document.text for document in corpus("python-reference").valid)
    text = tokenizer.decode(tokenizer.encode(text)[: arguments.tokens])
    plain = ayn.load_module(NAME)
    assert isinstance(plain, Decoder)
    rows = []
    for grid, module in (("its file's grid", plain), ("no grid", off_grid(copy.deepcopy(plain)))):
        for kind in arguments.kinds:
            packed = copy.deepcopy(module)
            if kind == "nf4":
                quantise(packed, Quantise.Config())
            elif kind != "float32":
                pack(packed, kind)
            (loss,) = perplexity(packed, tokenizer, [text], context=CONTEXT)
            rows.append({"weights": grid, "kind": kind, "perplexity": loss.perplexity, "bytes": resident(packed)})
            print(
                f"{grid:16} {kind:8} perplexity {loss.perplexity:.4f}, {resident(packed) / 2**20:.0f} MiB", flush=True
            )
            del packed
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
