"""What holds a model to calls of its tools: the JSON schema of a call, and the grammar of a text with calls in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from allyouneed.serve.schemas import Tool
from allyouneed.serve.tools import Form

DEFINITIONS = ("$defs", "definitions")


def calling_grammar(tools: Sequence[Tool], form: Form) -> str:
    """A text in which calls may stand, in Lark's notation as llguidance has it: arguments of strict tools keep to their
    schema, those of others are any object.
    """
    loose = {"type": "object"}
    kept = [
        tool if tool.function.strict else tool.model_copy(update={"function": _with_parameters(tool, loose)})
        for tool in tools
    ]
    opening, closing = json.dumps(form.opening), str(form.closing).replace("/", r"\/")
    return "\n".join(
        (
            "start: (opened SPACE? object closing)* TEXT",
            r"SPACE: /[ \n]{1,4}/",
            f"opened[suffix={opening}]: /(?s:.*)/",
            f"object: %json {json.dumps(call_schema(kept))}",
            f"closing: /[ \\n]{{0,4}}{closing}/",
            f"TEXT: /(?s:.*)/ & ~/(?s:.*{form.opening}.*)/",
        )
    )


def _with_parameters(tool: Tool, parameters: dict[str, Any]) -> Any:
    return tool.function.model_copy(update={"parameters": parameters})


def call_schema(tools: Sequence[Tool]) -> dict[str, Any]:
    """The JSON schema of one call of one of `tools`, as a guide takes it. Definitions move to its root."""
    calls: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for i, tool in enumerate(tools):
        parameters = dict(tool.function.parameters or {"type": "object"})
        for place in DEFINITIONS:
            own = parameters.pop(place, {})
            definitions |= {f"{i}.{name}": _moved(schema, i) for name, schema in dict(own).items()}
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "arguments": _moved(parameters, i)},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return (calls[0] if len(calls) == 1 else {"anyOf": calls}) | ({"$defs": definitions} if definitions else {})


def _moved(schema: Any, i: int) -> Any:
    """A schema of tool `i` whose references lead to where its definitions are now."""
    if isinstance(schema, list):
        return [_moved(one, i) for one in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, i) for key, value in schema.items()}
    place = str(schema.get("$ref", ""))
    for start in (f"#/{name}/" for name in DEFINITIONS):
        if place.startswith(start):
            moved["$ref"] = f"#/$defs/{i}.{place.removeprefix(start)}"
    return moved
