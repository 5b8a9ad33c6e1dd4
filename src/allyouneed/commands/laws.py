"""`laws`: how large a model and how much data a budget buys, by Kaplan et al. and by Hoffmann et al., side by side."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from allyouneed.core.errors import InputError

if TYPE_CHECKING:
    from allyouneed.evaluate.laws import Allocation, Law


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command("laws")(show_laws)


def show_laws(
    compute: Annotated[float | None, typer.Option(help="FLOPs of training, 1e21 for instance.")] = None,
    parameters: Annotated[float | None, typer.Option(help="N, the size of the model.")] = None,
    tokens: Annotated[float | None, typer.Option(help="D, the tokens of training.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """How to spend a budget of training: size and data by the scaling laws of 2020 and 2022, with predicted losses.

    Give one number and the others follow: the best size and data for a compute, the compute for which a size or an
    amount of data is best. Give two, and the third is what C = 6ND says, beside what the laws would have done.
    """
    from allyouneed.evaluate import laws

    given = {"compute": compute, "parameters": parameters, "tokens": tokens}
    known = {name: value for name, value in given.items() if value is not None}
    if len(known) not in (1, 2):
        raise InputError("laws: give one or two of --compute, --parameters and --tokens; the rest follows")
    asked = _completed(known) if len(known) == 2 else None
    best = {law.name: _best(law, asked, known) for law in laws.LAWS}
    rows = [_row(law, best[law.name]) for law in laws.LAWS]
    own = [] if asked is None else [_own(law, asked) for law in laws.LAWS if law.loss is not None]
    if as_json:
        print(json.dumps({"given": known, "laws": rows} | ({"yours": own} if own else {}), indent=1))
        return
    print(_table(rows))
    if own:
        named = [row | {"law": row["law"] + ", at convergence" * row["at_convergence"]} for row in own]
        print(f"\nYours, C = 6ND:\n{_table(named)}")
    print("\nLosses are nats a token of each paper's own corpus. 10× is what ten times the compute multiplies by.")


def _completed(known: dict[str, float]) -> Allocation:
    """The third of C, N and D."""
    from allyouneed.evaluate.laws import Allocation, training_flops

    for name, value in known.items():
        if not 0 < value < float("inf"):
            raise InputError(f"{name}={value:g}; it must be a finite number above 0")
    if "compute" not in known:
        whole = known | {"compute": training_flops(**known)}
    else:
        ((name, other),) = ((name, value) for name, value in known.items() if name != "compute")
        rest = "tokens" if name == "parameters" else "parameters"
        whole = known | {rest: known["compute"] / training_flops(other, 1)}
    if not all(0 < value < float("inf") for value in whole.values()):
        both = ", ".join(f"{name}={value:g}" for name, value in known.items())
        raise InputError(f"{both}: C = 6ND leaves no number for the third; give numbers nearer to what is trained")
    return Allocation(**whole)


def _best(law: Law, asked: Allocation | None, known: dict[str, float]) -> Allocation:
    if asked is not None:
        return law.of_compute(asked.compute)
    ((name, value),) = known.items()
    return {"compute": law.of_compute, "parameters": law.of_parameters, "tokens": law.of_tokens}[name](value)


def _row(law: Law, best: Allocation) -> dict[str, Any]:
    grown, fed = law.growth()
    return _facts(law, best, law.best_loss(best)) | {
        "parameters_10x": round(grown, 2),
        "tokens_10x": round(fed, 2),
        "source": law.source,
    }


def _own(law: Law, asked: Allocation) -> dict[str, Any]:
    """Any size and data, not the law's own: Kaplan's loss of these is of a run that goes on until nothing is gained."""
    assert law.loss is not None
    facts = _facts(law, asked, law.loss(asked.parameters, asked.tokens))
    return facts | {"at_convergence": law.efficient is not None}


def _facts(law: Law, spent: Allocation, loss: float | None) -> dict[str, Any]:
    return {
        "law": law.name,
        "compute": spent.compute,
        "parameters": spent.parameters,
        "tokens": spent.tokens,
        "tokens_per_parameter": round(spent.tokens_per_parameter, 2),
        "loss": None if loss is None else round(loss, 4),
    }


HEADS = {
    "law": "law",
    "compute": "FLOPs",
    "parameters": "parameters",
    "tokens": "tokens",
    "tokens_per_parameter": "tokens/parameter",
    "loss": "loss",
    "parameters_10x": "10×: parameters",
    "tokens_10x": "tokens",
}


UNITS = ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k"))


def _table(rows: list[dict[str, Any]]) -> str:
    """Aligned columns; the source of a law is for JSON."""
    names = [name for name in HEADS if name in rows[0]]
    cells = [[HEADS[name] for name in names], *([_cell(name, row[name]) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in cells
    )


def _cell(name: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or "–"
    if name == "compute":
        return f"{value:.3g}"
    if name in ("parameters", "tokens"):
        return _short(value)
    return f"{value:.2f}" if name.endswith("10x") or name == "loss" else f"{value:.3g}"


def _short(value: float) -> str:
    """Three digits and a unit.

    >>> _short(2.8603e9), _short(1.4e12), _short(12.0)
    ('2.86 B', '1.4 T', '12')
    """
    size, unit = next((pair for pair in UNITS if value >= pair[0]), (1.0, ""))
    return f"{value / size:.3g}{unit}"
