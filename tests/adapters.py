"""Small models with several adapters, and the same models with some of them merged, for the tests of both."""

from __future__ import annotations

import copy

import torch
from torch import nn

from allyouneed.adapt.layers import Lora
from allyouneed.adapt.lora import adapt, merge, unload, use
from allyouneed.adapt.rows import Mix
from allyouneed.models.decoder import Decoder
from allyouneed.nn.packed import PackedEmbedding, PackedLinear

CONFIGS = {  # of different ranks, on different layers
    "narrow": Lora.Config(rank=1, alpha=2.0, targets=("q", "v")),
    "everywhere": Lora.Config(rank=4, targets="all-linear"),
    "deep": Lora.Config(rank=40, alpha=30.0, rslora=True, targets=("mixer.out", "up")),
}
MIXES: tuple[Mix, ...] = (
    (),
    (("narrow", 1.0),),
    (("everywhere", 1.0),),
    (("deep", 1.0),),
    (("everywhere", 0.5), ("deep", -1.5)),
)


def with_adapters(module: Decoder, configs: dict[str, Lora.Config] = CONFIGS) -> Decoder:
    """`module` with adapters that change what it says, none of which is in use."""
    torch.manual_seed(1)
    for name, config in configs.items():
        adapt(module, config, name)
    for part in module.modules():
        if isinstance(part, Lora):
            nn.init.normal_(part.B, std=0.3 * part.config.rank**-0.5)
    use(module, {})
    return module


def merged(module: Decoder, mix: Mix) -> Decoder:
    """A copy of the module with plain weights, into which a mix of its adapters is merged."""
    found = copy.deepcopy(module)
    for name, part in list(found.named_modules()):
        if isinstance(part, PackedLinear):
            plain = nn.Linear(part.in_features, part.out_features, bias=part.bias is not None)
            plain.weight.data = part.dequantised()
            if part.bias is not None:
                plain.bias.data = part.bias
            found.set_submodule(name, plain)
        elif isinstance(part, PackedEmbedding):
            table = torch.arange(part.num_embeddings)
            found.set_submodule(name, nn.Embedding.from_pretrained(part(table)))
    use(found, dict(mix))
    merge(found)
    unload(found)
    return found
