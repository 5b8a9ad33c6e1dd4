"""GPT-3 (Brown et al. 2020): GPT-2 with dense and locally banded attention in turn."""

from __future__ import annotations

from allyouneed.core.errors import unknown
from allyouneed.models import gpt_neo
from allyouneed.models.decoder import Decoder

# layers, dim, heads (table 2.1); all see 2048 tokens
SIZES = {
    "125M": (12, 768, 12),
    "350M": (24, 1024, 16),
    "760M": (24, 1536, 16),
    "1.3B": (24, 2048, 16),  # printed as 24 heads of 128, which would be 1.5 B; 16 of them give 1.3 B
    "2.7B": (32, 2560, 32),
    "6.7B": (32, 4096, 32),
    "13B": (40, 5140, 40),
    "175B": (96, 12288, 96),
}
HEAD_DIMS = {"13B": 128}  # as printed, where it is not dim / heads


def sized(name: str = "175B") -> Decoder.Config:
    """One of the eight published sizes."""
    if name not in SIZES:
        raise unknown("size of GPT-3", name, SIZES)
    num_layers, dim, num_heads = SIZES[name]
    config = gpt_neo.architecture(context=2048, dim=dim, num_layers=num_layers, num_heads=num_heads)
    wide = [block.replace(mixer=block.mixer.replace(head_dim=HEAD_DIMS.get(name))) for block in config.blocks]
    return config.replace(blocks=tuple(wide))
