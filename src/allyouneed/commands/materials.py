"""`materials`: what real weights and data there are, and getting them."""

from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command("materials")(show)


def show(
    name: Annotated[str | None, typer.Argument(help="Get this one, if it is not here yet, and print its path.")] = None,
) -> None:
    """The real weights and data that experiments use, and whether they are on this machine."""
    from allyouneed.data import materials

    if name is not None:
        print(materials.path(name))
        return
    for listed in materials.listing():
        material = listed.material
        print(f"{material.name:<22}  {material.bytes / 1e6:>6.2f} MB  {listed.state:<14}  {material.licence}")
        print(f"{'':<22}  {material.real}")
