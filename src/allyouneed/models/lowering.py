"""A decoder's pass as a program for the native library, where all its parts have a lowering."""

from __future__ import annotations

import allyouneed.adapt.lowering  # noqa: F401  # how adapted layers are lowered
from allyouneed.models.decoder import Decoder
from allyouneed.nn import native
from allyouneed.nn.lowering import Frame, lower, weights
from allyouneed.nn.program import NotLowered, Program


def lowered(module: object) -> Program | None:
    """From token ids to the logits of the wanted rows; None where a part, the device or the machine has no native path.

    >>> from allyouneed.models import llama
    >>> len(lowered(llama.EXAMPLE.build().eval()).layers)
    2
    """
    if type(module) is not Decoder or module.training or native.library() is None:
        return None
    try:
        return _decoder(module)
    except NotLowered:
        return None


def _decoder(module: Decoder) -> Program:
    program = Program()
    frame = Frame(program, module.positions)
    (table,) = weights(module.embedding)
    x = program.embed(table, module.config.embedding_scale)
    places = lower(module.positions)
    if places is not None:
        program.place(x, places)
    x = lower(module.embedding_norm, frame, x)
    for block in module.blocks:
        x = lower(block, frame, x)
    normed = lower(module.norm, frame, program.pick(x))
    program.end(program.multiply(normed, weights(module.head)))
    return program
