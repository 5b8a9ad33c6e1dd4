"""JSON schemas before they become grammars: what makes no grammar that ends. Which keywords there are, and whether a
single value can satisfy them, is the grammar library's business.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

Schema = dict[str, Any] | bool
SCALARS = {"string", "number", "integer", "boolean", "null"}


def ends(schema: Schema) -> bool:
    """Whether references leave room for a finite value: an object that must hold another of its own kind has none.

    >>> ends({"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]})
    False
    >>> ends({"type": "object", "properties": {"next": {"$ref": "#"}}})
    True
    """
    pending = {ref: _target(schema, ref) for ref in _references(schema)}
    known = {ref for ref, target in pending.items() if target is None}  # not ours to follow
    while found := {ref for ref in pending.keys() - known if _ends(pending[ref], known)}:
        known |= found
    return _ends(schema, known) or not _ends(schema, pending.keys())


def _references(value: Any) -> Iterator[str]:
    """Every `$ref` within a schema."""
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for part in value.values():
            yield from _references(part)
    elif isinstance(value, list):
        for part in value:
            yield from _references(part)


def _target(schema: Schema, ref: str) -> Any:
    """What a JSON pointer into the same schema leads to; None where it is another kind of reference, or broken."""
    if ref != "#" and not ref.startswith("#/"):
        return None
    found: Any = schema
    for part in ref.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, dict) and name in found:
            found = found[name]
        else:
            return None
    return found


def _ends(schema: Any, known: Collection[str]) -> bool:
    """The same, where of references only those `known` end."""
    if not isinstance(schema, dict):
        return schema is not False
    if isinstance(schema.get("$ref"), str) and schema["$ref"] not in known:
        return False
    for key in ("anyOf", "oneOf"):
        if schema.get(key) and not any(_ends(part, known) for part in schema[key]):
            return False
    if not all(_ends(part, known) for part in schema.get("allOf") or ()):
        return False
    kinds = schema.get("type", "string")  # with no type at all, a string will do
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    if kinds & SCALARS or "const" in schema or "enum" in schema:
        return True
    return ("object" in kinds and _object_ends(schema, known)) or ("array" in kinds and _array_ends(schema, known))


def _object_ends(schema: dict[str, Any], known: Collection[str]) -> bool:
    properties, others = schema.get("properties") or {}, schema.get("additionalProperties", True)
    return all(_ends(properties.get(name, others), known) for name in schema.get("required") or ())


def _array_ends(schema: dict[str, Any], known: Collection[str]) -> bool:
    first, least = list(schema.get("prefixItems") or ()), schema.get("minItems", 0)
    needed = first[:least] + ([schema.get("items", True)] if least > len(first) else [])
    return all(_ends(part, known) for part in needed)
