"""Calls read out of texts in each family's form, however the text is cut into pieces."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import tokenizer

from allyouneed.generate.guides import Guides
from allyouneed.serve.calling import call_schema, calling_grammar
from allyouneed.serve.schemas import Tool
from allyouneed.serve.tools import (
    BARE,
    GRANITE,
    HERMES,
    LLAMA,
    MISTRAL,
    PHI,
    Argued,
    Called,
    Form,
    Reader,
    Said,
    form_of,
)


def read(form: Form, pieces: list[str], forced: bool = False) -> tuple[str, list[list[str]], bool]:
    reader = Reader(form, forced=forced)
    events = [event for piece in pieces for event in reader.push(piece)] + list(reader.finish())
    said, calls = "", []
    for event in events:
        if isinstance(event, Said):
            said += event.text
        elif isinstance(event, Called):
            calls.append([event.name, ""])
        elif isinstance(event, Argued):
            calls[-1][1] += event.text
    return said, calls, reader.cut


CASES = [
    (HERMES, "plain <b>text</b>  ", "plain <b>text</b>  ", []),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": "}\\"{"}}\n</tool_call>', "", [["f", '{"a": "}\\"{"}']]),
    (HERMES, 'Well.\n<tool_call>{"arguments": {"b": 2}, "name": "g"}</tool_call>', "Well.", [["g", '{"b": 2}']]),
    (
        HERMES,
        '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>{"name": "g", "arguments": {}}</tool_call>',
        "",
        [["f", "{}"], ["g", "{}"]],
    ),
    (
        HERMES,
        '<tool_call>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]</tool_call>',
        "",
        [["f", "{}"], ["g", "{}"]],
    ),
    (HERMES, "<tool_call>oops</tool_call> x", "<tool_call>oops</tool_call> x", []),
    (HERMES, '<tool_call>{"name": "f"', '<tool_call>{"name": "f"', []),
    (PHI, 'So: <|tool_call|>{"name": "f", "arguments": {"a": 1}}<|/tool_call|>', "So:", [["f", '{"a": 1}']]),
    (
        PHI,
        '<|tool_call|>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]<|/tool_call|>',
        "",
        [["f", "{}"], ["g", "{}"]],
    ),
    (
        GRANITE,
        '<|tool_call|>[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
        "",
        [["f", '{"a": 1}'], ["g", "{}"]],
    ),
    (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {"q": 1}}]', "", [["f", '{"q": 1}']]),
    (
        MISTRAL,
        '[TOOL_CALLS]f[ARGS]{"q": 1}[TOOL_CALLS]g[CALL_ID]a1[ARGS]{"q": 2}',
        "",
        [["f", '{"q": 1}'], ["g", '{"q": 2}']],
    ),
    (LLAMA, '{"name": "f", "parameters": {"q": 1}}', "", [["f", '{"q": 1}']]),
    (
        LLAMA,
        '<|python_tag|>{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}',
        "",
        [["f", "{}"], ["g", "{}"]],
    ),
    (LLAMA, '{"answer": 3}', '{"answer": 3}', []),
    (BARE, ' {"type": "function", "function": {"name": "f", "parameters": {"q": 1}}}', "", [["f", '{"q": 1}']]),
    (BARE, 'Hello {"name": "f", "parameters": {"q": 1}}', 'Hello {"name": "f", "parameters": {"q": 1}}', []),
]


@pytest.mark.parametrize(("form", "text", "said", "calls"), CASES)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_forms(form, text, said, calls, size):
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert read(form, pieces) == (said, calls, False)


@pytest.mark.parametrize("form", [BARE, LLAMA, HERMES])
def test_an_object_that_is_no_call_is_told_as_it_comes(form):
    reader = Reader(form)
    pieces = ["<tool_call>"] if form is HERMES else []
    told = "".join(event.text for piece in [*pieces, '{"a": ', '"b', " c"] for event in reader.push(piece))
    assert told.endswith('{"a": "b c')


def test_long_objects_are_scanned_once():
    """What a piece costs does not grow with what came before: four times the pieces, about four times the time."""

    def seconds(count: int) -> float:
        reader, began = Reader(BARE), time.process_time()
        for piece in ['{"arguments": {"a": "', *["word"] * count, '"}, "name": "f"}']:
            events = list(reader.push(piece))
        assert [type(event) for event in events] == [Called, Argued]
        return time.process_time() - began

    assert min(seconds(8000) for _ in range(3)) < 9 * min(seconds(2000) for _ in range(3))


@pytest.mark.parametrize("end", range(30, 60))
def test_a_call_that_is_cut(end):
    text = 'So: <tool_call>{"name": "get", "arguments": {"city": "Rome"}}'
    said, calls, cut = read(HERMES, list(text[:end]))
    if calls:
        assert said == "So:" and cut and '{"city": "Rome"}'.startswith(calls[0][1]) and calls[0][0] == "get"
    else:  # nothing is lost
        assert said == text[:end] and not cut


def test_forced():
    assert read(HERMES, ['{"name": "f", "argu', 'ments": {"a": 1}}'], forced=True) == ("", [["f", '{"a": 1}']], False)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(["<tool_call>", "</tool_call>", "{", "}", '"name"', ": ", '"a\\"', ", ", "[", "x", " ", "\n"])
    )
)
def test_text_without_a_call_comes_back_as_it_is(pieces):
    said, calls, cut = read(HERMES, pieces)
    whole = read(HERMES, ["".join(pieces)])
    assert (said, calls, cut) == whole
    assert calls or said == "".join(pieces)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=4), st.recursive(st.text(max_size=6) | st.integers(), lambda s: st.lists(s, max_size=3))
    ),
    st.data(),
)
def test_arguments_come_back_whole(arguments, data):
    text = f"ok <tool_call>{json.dumps({'name': 'f', 'arguments': arguments})}</tool_call>"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    said, ((name, given_back),), cut = read(HERMES, pieces)
    assert (said, name, json.loads(given_back), cut) == ("ok", "f", arguments, False)


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{% if tools %}<tool_call>{% endif %}", HERMES),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", MISTRAL),
        ("{% if tools is not none %}<|python_tag|>", LLAMA),
        ("{{ tools | tojson }}", BARE),
        ("<tools>{{ tools | tojson }}</tools>", BARE),
        ("{% if tools %}<｜tool▁calls▁begin｜>{% endif %}", None),
        ("{% if tools %}<|tool_call|>{% endif %}", GRANITE),
        ("{% if tools %}<|tool_call|>{}<|/tool_call|>{% endif %}", PHI),
        ("{% if tools %}<function=example>{% endif %}", None),
        ("{% if tools %}<function_calls>{% endif %}", None),
        ("{{ messages }}", None),
        ("{{ toolshed }}", None),
        (None, None),
    ],
)
def test_templates_tell_their_form(template, form):
    assert form_of(template) == form


def test_definitions_move_with_their_references():
    def tool(name: str, kind: str) -> Tool:
        schema = {"type": "object", "properties": {"x": {"$ref": "#/$defs/X"}}, "$defs": {"X": {"type": kind}}}
        return Tool.model_validate({"type": "function", "function": {"name": name, "parameters": schema}})

    import jsonschema

    schema = call_schema([tool("f", "string"), tool("g", "integer")])
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid({"name": "f", "arguments": {"x": "a"}})
    assert validator.is_valid({"name": "g", "arguments": {"x": 1}})
    assert not validator.is_valid({"name": "g", "arguments": {"x": "a"}})


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("Hello <b>there. ", True),
        ("", True),
        ('Hi <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>', True),
        ('<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\nand so', True),
        ('<tool_call>{"name": "g", "arguments": {"y": "z"}}</tool_call>\n<tool_call>', False),
        ('<tool_call>{"name": "f", "arguments": {"x": "1"}}</tool_call>', False),
        ('<tool_call>{"name": "h", "arguments": {}}</tool_call>', False),
        ("<tool_call>oops</tool_call>", False),
        ('<tool_call>{"name": "f"', False),
    ],
)
def test_strict_tools_are_held_to_their_schema(text, allowed):
    schema = {
        "type": "object",
        "properties": {"x": {"type": "integer"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    strict = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    loose = {"type": "function", "function": {"name": "g", "parameters": schema}}
    grammar = calling_grammar([Tool.model_validate(strict), Tool.model_validate(loose)], HERMES)
    guide = Guides(tokenizer()).grammar(grammar)
    for token in tokenizer().encode(text):
        if not guide.allowed()[token]:
            assert not allowed
            return
        guide.take(token)
    assert bool(guide.allowed()[tokenizer().eos_ids[0]]) == allowed
