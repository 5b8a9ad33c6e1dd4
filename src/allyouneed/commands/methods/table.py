"""The methods of `finetune` by name. A new one is a file beside this and a line here."""

from __future__ import annotations

from allyouneed.commands.methods.base import Method


def methods() -> dict[str, Method]:
    """All of them; imported when they are asked for, since they need torch."""
    from allyouneed.commands.methods import labelled, policy, preference, reward, sft

    return sft.METHODS | labelled.METHODS | reward.METHODS | preference.METHODS | policy.METHODS
