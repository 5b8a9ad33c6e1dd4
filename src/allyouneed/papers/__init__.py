"""The papers' own experiments, one module per slug, on a common frame; `allyouneed.papers()` lists them all.

Importing this imports no paper and nothing heavy.
"""

from __future__ import annotations

import sys
from types import ModuleType

from allyouneed.papers.catalogue import Entry as Entry
from allyouneed.papers.catalogue import papers as papers


class _CallableModule(ModuleType):
    """`allyouneed.papers` names both this room and the public function; importing the room must not hide the other."""

    def __call__(self) -> list[Entry]:
        return papers()


sys.modules[__name__].__class__ = _CallableModule
