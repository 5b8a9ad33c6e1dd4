"""`python -m allyouneed` is `allyouneed`."""

from __future__ import annotations

import sys

from allyouneed.cli import main

if __name__ == "__main__":
    sys.exit(main())
