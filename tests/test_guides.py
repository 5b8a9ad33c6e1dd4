"""Guided texts always parse, whatever the model says; grammars that cannot be held to are refused at once."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence

import jsonschema
import pytest
import torch
from conftest import within
from test_tokenizers import sentencepiece_tokens, write_gguf
from typer.testing import CliRunner

from allyouneed.cli import app
from allyouneed.core.errors import InputError
from allyouneed.data import materials
from allyouneed.data.spelling import Spelling
from allyouneed.data.tokenizer_training import train_bpe, train_unigram, train_wordpiece
from allyouneed.data.tokenizers import Tokenizer, byte_tokenizer
from allyouneed.generate.engine import Engine
from allyouneed.generate.guides import GrammarGuide, Guides
from allyouneed.generate.language_model import Sampling
from allyouneed.generate.local import LocalModel
from allyouneed.generate.requests import Request
from allyouneed.generate.schemas import ends
from allyouneed.models import llama
from allyouneed.models.checkpoints.gguf import GGUF

SENTENCES = ["the quick brown fox and the lazy dogs were there then", '{"a": [1, 2.5, null, true]}', "é 中文 😀\n\tx"]


def sentencepiece(folder) -> Tokenizer:
    tokens, scores, kinds = sentencepiece_tokens()
    fields = {"token_scores": scores, "token_types": kinds, "bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0}
    return Tokenizer.from_gguf(GGUF.open(write_gguf(folder, "llama", tokens, **fields)))


VOCABULARIES: dict[str, Callable[..., Tokenizer]] = {
    "bytes": lambda folder: byte_tokenizer(["<|end|>", "<|other|>"]),
    "bpe": lambda folder: train_bpe(SENTENCES * 20, vocab_size=320),
    "sentencepiece": sentencepiece,
    "smollm2": lambda folder: Tokenizer.from_gguf(GGUF.open(materials.path("smollm2-135m-instruct"))),
}


@pytest.fixture(scope="module", params=VOCABULARIES)
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    return VOCABULARIES[request.param](tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def guides(tokenizer) -> Guides:
    return Guides(tokenizer)


@pytest.fixture(scope="module")
def spelling(tokenizer) -> Spelling:
    return tokenizer.spelling()


def test_spelling_is_what_decoding_gives(tokenizer, spelling):
    source = random.Random(0)
    written = [i for i, token in enumerate(spelling.writes) if token]
    rows = [tokenizer.encode(text) for text in SENTENCES] + [source.choices(written, k=12) for _ in range(200)]
    for ids in rows:
        data = b"".join(spelling.writes[i] or b"" for i in ids)
        if spelling.drops_space:
            data = data.removeprefix(b" ")
        try:
            text = data.decode()
        except UnicodeDecodeError:
            continue
        assert tokenizer.decode(ids) == text
    assert spelling.complete and all(spelling.writes[i] is None for i in tokenizer.eos_ids)


SCHEMAS: list[dict] = [
    {"type": "object"},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False},
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 4},
            "tags": {"type": "array", "items": {"enum": ["x", "y"]}},
        },
        "required": ["name", "tags"],
        "additionalProperties": False,
    },
    {
        "type": "array",
        "items": {"type": "number", "minimum": -1, "exclusiveMaximum": 2.5},
        "minItems": 1,
        "maxItems": 3,
    },
    {"type": "string", "pattern": "^[a-c]{2,5}-[0-9]+$"},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "integer", "minimum": 7, "maximum": 1234, "multipleOf": 7},
    {"enum": ["é", 'q"uo\\te', 3, None, [1, {"k": False}]]},
    {"const": {"deep": [{"er": None}]}},
    {"anyOf": [{"type": "null"}, {"type": "boolean"}, {"type": "array", "items": {"type": "null"}, "maxItems": 2}]},
    {
        "allOf": [
            {"type": "object", "required": ["p"]},
            {"properties": {"p": {"type": "boolean"}}, "additionalProperties": False},
        ]
    },
    {"oneOf": [{"type": "string", "maxLength": 3}, {"type": "integer", "minimum": 0, "maximum": 9}]},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}], "items": False, "minItems": 2},
    {"type": "object", "patternProperties": {"^x_": {"type": "integer"}}, "additionalProperties": False},
    {"type": "string", "format": "date"},
    {"type": ["string", "null"], "maxLength": 3},
    {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"left": {"$ref": "#/$defs/tree"}, "leaf": {"type": "boolean"}},
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/tree",
    },
    {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1, "maxProperties": 2},
    True,  # type: ignore[list-item]
]


def closing(
    guide: GrammarGuide, tokenizer: Tokenizer, writes: Sequence[bytes | None], ids: list[int], source: random.Random
) -> list[int]:
    """A text gone on with until it is whole, single characters that close something first."""
    single = {i: token for i, token in enumerate(writes) if token is not None and len(token) == 1}
    while not guide.finished and len(ids) < 400:
        allowed = {i: single.get(i, b"") for i in guide.allowed().nonzero()[:, 0].tolist()}
        if any(end in allowed for end in tokenizer.eos_ids):
            return ids
        within = b"@" in allowed.values() and b"%" in allowed.values()
        order = [b'"'] if within else [b"}", b"]", b'"', b":"]
        ready = [[i for i, token in allowed.items() if token == byte] for byte in order]
        chosen = next((found for found in ready if found), list(allowed))
        token = source.choice(chosen)
        guide.take(token)
        ids.append(token)
    assert guide.finished, tokenizer.decode(ids)
    return ids


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_json_always_parses_and_satisfies_its_schema(schema, tokenizer, spelling, guides):
    """Tokens drawn evenly from those allowed, as no model would: whole texts are valid, others begin valid ones."""
    whole, validator = 0, jsonschema.Draft202012Validator(schema)
    writes = spelling.writes
    special = {i for i, token in enumerate(writes) if token is None} - set(tokenizer.eos_ids)
    for seed in range(12):
        guide, source, ids = guides.json_schema(schema), random.Random(seed), list[int]()
        while not guide.finished and len(ids) < 40:
            allowed = guide.allowed().nonzero()[:, 0].tolist()
            assert allowed and not special.intersection(allowed)
            token = source.choice(allowed)
            guide.take(token)
            if token in tokenizer.eos_ids:
                break
            ids.append(token)
        else:
            ids = closing(guide, tokenizer, writes, ids, source) if not guide.finished else ids
        validator.validate(json.loads(tokenizer.decode(ids)))
        whole += 1
    assert whole == 12


@pytest.mark.parametrize("name", ["bytes", "sentencepiece"])
def test_random_models_write_valid_json_through_the_engine(name, tmp_path):
    """Many schemas in one batch, sampled at a high temperature by an untrained model that is pushed to end."""
    tokenizer = VOCABULARIES[name](tmp_path)
    torch.manual_seed(0)
    size = tokenizer.vocab_size + 3  # as padded vocabularies are
    module = llama.architecture(vocab_size=size, context=128, dim=16, num_layers=1, num_heads=2).build().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(6)
    guides, engine = Guides(tokenizer), Engine(module, tokenizer.eos_ids)
    writes = tokenizer.spelling().writes
    ending = [i for i, token in enumerate(writes) if token in (b'"', b"}", b"]")] + list(tokenizer.eos_ids)
    pushed = tuple((i, 4.0) for i in ending)
    schemas = {}
    for i in range(4 * len(SCHEMAS)):
        schema = SCHEMAS[i % len(SCHEMAS)]
        sampling = Sampling(max_new_tokens=60, temperature=1.5, seed=i, logit_bias=pushed, min_tokens=i % 3)
        schemas[engine.add(Request(ids=[5 + i % 7], sampling=sampling, guide=guides.json_schema(schema)))] = schema
    texts: dict[int, list[int]] = {number: [] for number in schemas}
    reasons = {}
    while not engine.idle:
        for step in engine.step():
            texts[step.request].append(step.token)
            reasons[step.request] = step.finish_reason
    for number, schema in schemas.items():
        if reasons[number] == "stop":
            jsonschema.validate(json.loads(tokenizer.decode(texts[number])), schema)
    counts = [list(reasons.values()).count(reason) for reason in ("stop", "length", "error")]
    assert counts[0] > 2 * len(SCHEMAS) and counts[2] == 0, counts


@pytest.mark.parametrize(
    "pattern", [r"ab?c*", r"(yes|no|maybe) [0-9]{1,3}", r" lead[a-z]{2}", r"[^a-z\n]{3}", r"", r"é{2}中?"]
)
def test_patterns_match_as_python_has_them(pattern, tokenizer, guides):
    for seed in range(15):
        guide, source, ids = guides.regex(pattern), random.Random(seed), list[int]()
        while not guide.finished and len(ids) < 200:
            token = source.choice(guide.allowed().nonzero()[:, 0].tolist())
            guide.take(token)
            ids += [] if token in tokenizer.eos_ids else [token]
            if token in tokenizer.eos_ids:
                break
        assert re.fullmatch(pattern, tokenizer.decode(ids)), (pattern, tokenizer.decode(ids))


def test_what_is_allowed_is_all_that_leads_to_a_choice(tokenizer, spelling, guides):
    """Against the slow and obvious way: every token after which some choice still begins with the text."""
    texts = ["yes", "yesterday", "no", " space", "é中", "the quick", "the lazy"]
    wanted = [(b" " if spelling.drops_space else b"") + text.encode() for text in texts]
    source = random.Random(0)
    for _ in range(7):
        guide, written = guides.choice(texts), b""
        while not guide.finished:
            starts = {
                i
                for i, token in enumerate(spelling.writes)
                if token and any(w.startswith(written + token) for w in wanted)
            }
            ending = set(tokenizer.eos_ids) if written in wanted else set()
            assert set(guide.allowed().nonzero()[:, 0].tolist()) == starts | ending
            token = source.choice(sorted(starts))
            guide.take(token)
            written += spelling.writes[token] or b""
        assert written in wanted


def test_every_character_can_be_chosen(of_bytes):
    texts = [*map(chr, range(0x100)), "\u2028", "\ufeff", "\uffff", "\U0001f600", "\U0010ffff", '"\\n\x7f\x00']
    guide = of_bytes.choice([text + "." for text in texts])
    for text in texts:
        copy = guide.copy()
        for byte in f"{text}.".encode():
            assert copy.allowed()[byte], ascii(text)
            copy.take(byte)
        assert copy.finished


def test_a_grammar_in_larks_notation(tokenizer, guides):
    guide, ids = guides.grammar('start: "[" item ("," item)* "]"\nitem: /[0-9]{2}/'), list[int]()
    guide, source = guide.copy(), random.Random(1)
    while not guide.finished:
        token = source.choice(guide.allowed().nonzero()[:, 0].tolist())
        guide.take(token)
        ids.append(token)
    assert re.fullmatch(r"\[[0-9]{2}(,[0-9]{2})*\]", tokenizer.decode(ids))


@pytest.mark.parametrize("train", [train_unigram, train_wordpiece])
def test_vocabularies_that_cannot_write_every_text_choose_among_what_they_can(train):
    tokenizer = train(["the cat sat on the mat"] * 9, vocab_size=130)
    guides, texts = Guides(tokenizer), ["the cat", "the mat", "sat"]
    for seed in range(10):
        guide, source, ids = guides.choice(texts), random.Random(seed), list[int]()
        while not guide.finished:
            ids.append(source.choice(guide.allowed().nonzero()[:, 0].tolist()))
            guide.take(ids[-1])
        assert tokenizer.decode(ids) in texts
    for ask, named in [
        (lambda: guides.choice(["zebra"]), "'zebra' cannot"),
        (guides.json_object, "no token for every"),
    ]:
        with pytest.raises(InputError, match=named):
            ask()


@pytest.fixture(scope="module")
def of_bytes() -> Guides:
    return Guides(byte_tokenizer())


def nested(depth: int) -> dict:
    schema: dict = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def alternatives(count: int) -> dict:
    return {"allOf": [{"anyOf": [{"required": [f"{i}{j}"]} for j in "ab"]} for i in range(count)]}


BAD: list[tuple[object, str]] = [
    (False, "satisfy"),
    ({"enum": []}, "empty"),
    ({"type": "string", "minLength": 5, "maxLength": 3}, "minLength"),
    ({"type": "string", "pattern": "^a$", "minLength": 3}, "Unsatisfiable"),
    ({"type": "object", "properties": {}, "required": ["a"], "additionalProperties": False}, "'a'"),
    ({"allOf": [{"type": "string"}, {"type": "null"}]}, "Unsatisfiable"),
    ({"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}, "without end"),
    ({"$ref": "#"}, "without end"),
    ({"$ref": "#/nowhere"}, "/nowhere"),
    ({"$ref": "http://example.org/schema"}, "example.org"),
    ({"not": {"type": "string"}}, '"not"'),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    ({"type": "strin"}, "strin"),
    ({"type": "string", "pattern": "(["}, "regex"),
    ({"type": "string", "pattern": "(?=a)b"}, "look"),
    ({"type": "string", "format": "no-such"}, "no-such"),
    ([1], "schema"),
    ("{", "schema"),
    (nested(300), "schema"),
    (nested(5000), "schema"),
    (alternatives(40), "too large"),
    ({"enum": [f"v{i}" for i in range(100_000)]}, "at most"),
    ({"type": "integer", "multipleOf": 7919 * 7907}, "too complex"),
    ({"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(6_000)}}, "too complex"),
]


@pytest.mark.parametrize(("schema", "named"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_schemas_that_cannot_be_held_to_are_refused_at_once(schema, named, of_bytes):
    with within(20), pytest.raises(InputError, match=named) as caught:  # a second of arithmetic at most
        of_bytes.json_schema(schema)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("ask", "named"),
    [
        (lambda guides: guides.regex("(["), "regex"),
        (lambda guides: guides.regex(r"[^\s\S]"), "regex"),
        (lambda guides: guides.regex("(a{1000}){1000}"), "too "),
        (lambda guides: guides.choice([]), "no texts"),
        (lambda guides: guides.choice(["a", "b\ud800"]), r"'b.+ud800' has half of a surrogate pair"),
        (lambda guides: guides.grammar("start: nope"), "nope"),
        (lambda guides: guides.grammar('start: "a" start'), "grammar"),
        (lambda guides: guides.grammar("start: <|endoftext|>"), "special token"),
        (lambda guides: guides.grammar("x" * (1 << 20)), "at most"),
    ],
)
def test_bad_grammars_are_refused(ask, named, of_bytes):
    with pytest.raises(InputError, match=named) as caught:
        ask(of_bytes)
    assert "\n" not in str(caught.value)


def test_without_the_package_its_name_is_told(monkeypatch):
    import builtins

    real = builtins.__import__

    def missing(name: str, *rest: object, **others: object) -> object:
        if name == "llguidance":
            raise ImportError(name)
        return real(name, *rest, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r"allyouneed\[guide\]"):
        Guides(byte_tokenizer())


@pytest.mark.parametrize(
    ("schema", "finite"),
    [
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, False),
        ({"type": "array", "items": {"$ref": "#"}}, True),
        ({"type": ["array", "null"], "items": {"$ref": "#"}, "minItems": 1}, True),
        (
            {"anyOf": [{"type": "object", "required": ["x"], "properties": {"x": {"$ref": "#"}}}, {"type": "null"}]},
            True,
        ),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, False),
        ({"type": "object", "required": ["x"], "additionalProperties": {"$ref": "#"}}, False),
        ({"required": ["x"], "properties": {"x": {"$ref": "#"}}}, True),
    ],
)
def test_whether_a_schema_ends(schema, finite):
    assert ends(schema) is finite


@pytest.mark.parametrize(("last", "finite"), [(True, True), ({"$ref": "#/$defs/0"}, False)])
def test_chained_references_take_time_in_proportion(last, finite):
    count = 6_000
    chain = {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(count)} | {str(count): last}
    with within(2):  # 0.05 seconds of arithmetic; all against all take eight
        assert ends({"$ref": "#/$defs/0", "$defs": chain}) is finite


def test_a_schema_of_many_characters_is_refused_before_it_is_read(of_bytes, monkeypatch):
    monkeypatch.setattr("allyouneed.generate.guides.ends", pytest.fail)
    for schema in ({"const": "x" * (1 << 18)}, '{"const": "' + "x" * (1 << 18)):
        with pytest.raises(InputError, match="at most 262144"):
            of_bytes.json_schema(schema)


def test_a_model_in_this_process_writes_what_was_asked_for():
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    module = llama.architecture(vocab_size=257, context=128, dim=16, num_layers=1, num_heads=2).build().eval()
    lm = LocalModel(module, tokenizer, "tiny")
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 22]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    texts = lm.generate(["x", "y", "z"], max_new_tokens=100, temperature=1.0, seed=1, json_schema=schema)
    assert all(json.loads(text)["a"] in (1, 22) for text in texts)
    sampling = Sampling(max_new_tokens=30, seed=2, regex="(yes|no) [0-9]{2}")
    text = "".join(lm.stream("x", sampling))
    assert re.fullmatch(sampling.regex, text) and lm.complete(["x"], sampling)[0].text == text
    assert lm.complete(["x"], sampling)[0].finish_reason == "stop"
    with pytest.raises(InputError, match="without json_schema"):
        sampling.replace(json_schema="{}")


def test_a_stream_that_its_guide_gives_up_says_so(monkeypatch):
    torch.manual_seed(0)
    module = llama.architecture(vocab_size=257, context=128, dim=16, num_layers=1, num_heads=2).build().eval()
    lm, sampling = LocalModel(module, byte_tokenizer(), "tiny"), Sampling(max_new_tokens=30, seed=2, regex="[a-z]{20}")
    taken, take = list[int](), GrammarGuide.take

    def give_up(self, token):
        taken.append(token)
        if len(taken) == 5:
            raise InputError("too complex")
        take(self, token)

    monkeypatch.setattr(GrammarGuide, "take", give_up)
    pieces = list[str]()
    with pytest.raises(InputError, match="tiny: the text could not go on"):
        pieces.extend(lm.stream("x", sampling))
    assert "".join(pieces) == bytes(taken[:4]).decode()
    monkeypatch.undo()
    assert len("".join(lm.stream("x", sampling))) == 20


def test_the_command_takes_a_schema_and_a_pattern(tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["Paris", "Rome"]}')
    ask = ["generate", "smollm2-135m-instruct", "The capital of France is", "--temperature", "0"]
    found = [
        CliRunner().invoke(app, [*ask, *how]) for how in (["--schema", str(schema)], ["--regex", "Par[a-z]s|Oslo"])
    ]
    assert [result.output.strip() for result in found] == ['"Paris"', "Paris"]
