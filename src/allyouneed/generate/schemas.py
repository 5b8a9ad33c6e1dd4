"""JSON schemas before they become grammars: what makes no grammar that ends. Which keywords there are, and whether a
single value can satisfy them, is the grammar library's business.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Schema = dict[str, Any] | bool
SCALARS = {"string", "number", "integer", "boolean", "null"}


def ends(schema: Schema) -> bool:
    """Whether references leave room for a finite value: an object that must hold another of its own kind has none.

    Takes time in proportion to the schema.

    >>> ends({"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]})
    False
    >>> ends({"type": "object", "properties": {"next": {"$ref": "#"}}})
    True
    """
    needs = _Needs(schema)
    return needs.met() or not needs.met(needs.references.values())


class _Needs:
    """What parts of a schema need, so that a finite value satisfies them: nodes of which each needs some others."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.least: list[int] = []  # of each node: so many of those that it names must be met
        self.users: list[list[int]] = []  # of each node: those that name it
        self.references: dict[str, int] = {}
        self._nodes: dict[int, int] = {}  # of schemas, by identity: several references may lead to one
        self._unread: deque[str] = deque()
        self.root = self._of(schema)
        while self._unread:  # not by recursion: chains of references may be long
            ref = self._unread.popleft()
            target = _target(schema, ref)
            self.users[self._of(True if target is None else target)].append(self.references[ref])  # None: not ours

    def met(self, assumed: Iterable[int] = ()) -> bool:
        """Whether the schema's are, where those of some nodes are assumed to be."""
        missing, known = list(self.least), set(assumed)
        ready = [*known, *(node for node, least in enumerate(missing) if least == 0 and node not in known)]
        for node in ready:  # grows
            for user in self.users[node]:
                missing[user] -= 1
                if missing[user] == 0 and user not in known:
                    ready.append(user)
        return self.root in ready

    def _node(self, parts: Sequence[int], least: int) -> int:
        self.least.append(least)
        self.users.append([])
        for part in parts:
            self.users[part].append(len(self.least) - 1)
        return len(self.least) - 1

    def _all(self, schemas: Iterable[Any]) -> int:
        parts = [self._of(schema) for schema in schemas]
        return self._node(parts, len(parts))

    def _any(self, parts: Sequence[int]) -> int:
        return self._node(parts, 1)

    def _of(self, schema: Any) -> int:
        if not isinstance(schema, dict):
            return self._node((), int(schema is False))
        if id(schema) not in self._nodes:
            parts = list(self._parts(schema))
            self._nodes[id(schema)] = self._node(parts, len(parts))
        return self._nodes[id(schema)]

    def _parts(self, schema: dict[str, Any]) -> Iterator[int]:
        """All of these must be met."""
        if isinstance(schema.get("$ref"), str):
            yield self._reference(schema["$ref"])
        for key in ("anyOf", "oneOf"):
            if schema.get(key):
                yield self._any([self._of(part) for part in schema[key]])
        yield self._all(schema.get("allOf") or ())
        kinds = schema.get("type", "string")  # with no type at all, a string will do
        kinds = {kinds} if isinstance(kinds, str) else set(kinds)
        if not (kinds & SCALARS or "const" in schema or "enum" in schema):
            yield self._any([self._all(_held(schema, kind)) for kind in kinds & {"object", "array"}])

    def _reference(self, ref: str) -> int:
        if ref not in self.references:
            self.references[ref] = self._node((), 1)
            self._unread.append(ref)
        return self.references[ref]


def _held(schema: dict[str, Any], kind: str) -> Sequence[Any]:
    """The schemas of what an object or an array must hold."""
    if kind == "object":
        properties, others = schema.get("properties") or {}, schema.get("additionalProperties", True)
        return [properties.get(name, others) for name in schema.get("required") or ()]
    first, least = list(schema.get("prefixItems") or ()), schema.get("minItems", 0)
    return first[:least] + ([schema.get("items", True)] if least > len(first) else [])


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
