"""Fifty-one fundamental papers of language modelling as one working library.

This is the public face; each name is imported from its room at first use, so that `import allyouneed` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from allyouneed.generate.load import load as load
    from allyouneed.models.checkpoints.loading import load_module as load_module
    from allyouneed.models.checkpoints.loading import save as save
    from allyouneed.papers import papers as papers

_ROOMS = {
    "load": "allyouneed.generate.load",
    "load_module": "allyouneed.models.checkpoints.loading",
    "save": "allyouneed.models.checkpoints.loading",
    "papers": "allyouneed.papers",
}

__all__ = sorted(_ROOMS)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'allyouneed' has no attribute {name!r}; it has {', '.join(sorted(_ROOMS))}")
    return getattr(importlib.import_module(_ROOMS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS])
