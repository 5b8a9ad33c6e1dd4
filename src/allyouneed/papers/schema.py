"""What a report must be to be kept, shown and published: one JSON object with these fields, consistent in itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from allyouneed.core.errors import InputError, brief
from allyouneed.papers import checks
from allyouneed.papers.base import EVIDENCE, SIZES

VERDICTS = ("holds", "fails", "inconclusive")


def validate(report: Any) -> None:
    """Accept a well-formed report.

    Raises:
        InputError: naming the field, what was found and what belongs there.
    """
    _fields("", report, _REPORT)
    for i, check in enumerate(report["checks"]):
        _fields(f"checks[{i}].", check, _CHECK)
        _outcome(f"checks[{i}].", check)
    for i, curve in enumerate(report["curves"]):
        _fields(f"curves[{i}].", curve, _CURVE)
        if any(len(y) != len(curve["x"]) for y in curve["ys"]):
            raise InputError(f"report: curves[{i}].ys: a line is not as long as x ({len(curve['x'])})")
    for i, figure in enumerate(report["figures"]):
        _fields(f"figures[{i}].", figure, _FIGURE)
    found = checks.verdict(checks.Check.from_json(check) for check in report["checks"])
    if report["verdict"] != found:
        raise InputError(f"report: verdict: {report['verdict']!r}, but the checks say {found!r}")


Rule = tuple[Callable[[Any], bool], str]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _list_of(rule: Callable[[Any], bool], least: int = 0) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) >= least and all(map(rule, value))


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_bound(value: Any) -> bool:
    ends = list(value.values()) if isinstance(value, dict) and set(value) == {"above", "below"} else []
    return any(_is_number(end) for end in ends) and all(end is None or _is_number(end) for end in ends)


def _is_interval(value: Any) -> bool:
    return value is None or (_list_of(_is_number)(value) and len(value) == 2 and value[0] <= value[1])


_WORDS: Rule = (lambda v: isinstance(v, str) and bool(v.strip()), "words")
_STRING: Rule = (lambda v: isinstance(v, str), "a string")
_NUMBER: Rule = (_is_number, "a number")
_OBJECT: Rule = (_is_object, "an object")
_OBJECTS: Rule = (_list_of(_is_object), "a list of objects")
_NUMBERS: Rule = (_list_of(_is_number), "a list of numbers")

_REPORT: dict[str, Rule] = {
    "slug": _WORDS,
    "size": (lambda v: v in SIZES, f"one of {', '.join(SIZES)}"),
    "claim": _WORDS,
    "config": _OBJECT,
    "seeds": (_list_of(lambda v: type(v) is int, least=1), "a list of at least one integer"),
    "arms": (lambda v: _is_object(v) and all(map(_is_object, v.values())), "an object of objects"),
    "checks": (_list_of(_is_object, least=1), "a list of at least one object"),
    "verdict": (lambda v: v in VERDICTS, f"one of {', '.join(VERDICTS)}"),
    "evidence": (lambda v: v in EVIDENCE, f"one of {', '.join(EVIDENCE)}"),
    "commit": _WORDS,
    "versions": _OBJECT,
    "machine": _OBJECT,
    "seconds": _NUMBER,
    "sittings": (lambda v: type(v) is int and v > 0, "a positive integer"),
    "curves": _OBJECTS,
    "tables": _OBJECTS,
    "figures": (_list_of(_is_object, least=1), "a list of at least one object"),
    "notes": (_list_of(_STRING[0]), "a list of strings"),
}
_CHECK: dict[str, Rule] = {
    "name": _WORDS,
    "value": _NUMBER,
    "interval": (_is_interval, "null or [low, high]"),
    "method": _WORDS,
    "bound": (_is_bound, '{"above": ..., "below": ...}, at least one of them a number'),
    "passed": (lambda v: v is None or isinstance(v, bool), "true, false or null"),
}
_CURVE: dict[str, Rule] = {
    "name": _WORDS,
    "x_label": _STRING,
    "y_label": _STRING,
    "x": _NUMBERS,
    "ys": (_list_of(_NUMBERS[0], least=1), "a list of lists of numbers"),
}
_FIGURE: dict[str, Rule] = {"name": _WORDS, "caption": _STRING, "svg": _WORDS, "png": _WORDS}


def _fields(where: str, value: Any, rules: dict[str, Rule]) -> None:
    """`value` is an object with exactly the fields of `rules`, each as its rule says."""
    if not isinstance(value, dict):
        raise InputError(f"report: {where or 'the whole'}: expected an object, got {brief(value)}")
    for name, (fits, wanted) in rules.items():
        if name not in value:
            raise InputError(f"report: {where}{name} is missing; expected {wanted}")
        if not fits(value[name]):
            raise InputError(f"report: {where}{name}: expected {wanted}, got {brief(value[name])}")
    for name in value:
        if name not in rules:
            raise InputError(f"report: {where}{name} is no field of a report")


def _outcome(where: str, check: dict[str, Any]) -> None:
    passed = checks.Check.from_json(check).passed
    if check["passed"] is not passed:
        raise InputError(f"report: {where}passed: {check['passed']}, but interval and bound say {passed}")
