"""Llama 2 (Touvron et al. 2023, arXiv:2307.09288): LLaMA with twice the context, and grouped heads in its large sizes.

Its checkpoints are of LLaMA's family, which reads and writes them (`models.llama`).
"""

from __future__ import annotations

from allyouneed.core.errors import unknown
from allyouneed.models import llama
from allyouneed.models.decoder import Decoder

# layers, heads, kv heads, dim, hidden dim: grouped heads by table 1 and app. A.2.1, the rest as released; 34B as Code
# Llama's, which began as it, since it was never released itself
SIZES = {
    "7B": (32, 32, 32, 4096, 11008),
    "13B": (40, 40, 40, 5120, 13824),
    "34B": (48, 64, 8, 8192, 22016),
    "70B": (80, 64, 8, 8192, 28672),
}


def sized(name: str = "7B") -> Decoder.Config:
    """One of the four sizes of table 1.

    Raises:
        InputError: no such size.
    """
    if name not in SIZES:
        raise unknown("size of Llama 2", name, SIZES)
    num_layers, num_heads, num_kv_heads, dim, hidden_dim = SIZES[name]
    return llama.architecture(
        context=4096,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        hidden_dim=hidden_dim,
        eps=1e-5,
    )
