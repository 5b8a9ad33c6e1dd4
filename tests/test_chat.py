"""Chat templates: the text equals that of transformers; malformed messages and hostile templates get one line."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import transformers
from conftest import traced, within

from allyouneed.core.errors import InputError
from allyouneed.data import chat, materials, templates
from allyouneed.data.tokenizers import Tokenizer, byte_tokenizer
from allyouneed.models.checkpoints.gguf import GGUF

TOOLS = [{"type": "function", "function": {"name": "add", "description": 'a < b & "c"', "parameters": {"é": [1, 2.5]}}}]
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be <brief> & kind."}, {"role": "user", "content": " spaces \n\n and lines \n"}],
    [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "🙂 {{ 3 }}"},
    ],
    [{"role": role, "content": f"turn {i}"} for i in range(20) for role in ("user", "assistant")],
]
TEMPLATES = {
    "brackets": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
    {% set system = messages[0]['content'] | trim %}
    {% set turns = messages[1:] %}
{% else %}
    {% set system = '' %}
    {% set turns = messages %}
{% endif %}
{% for message in turns %}
    {% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate') }}
    {% endif %}
    {% if message.role == 'user' %}
        {% set text = '<<' ~ system ~ '>> ' ~ message.content if loop.first and system else message.content %}
{{ '[INST] ' + text | trim + ' [/INST]' }}
    {%- else -%}
{{ ' ' + message['content'] + ' ' + eos_token }}
    {% endif %}
{% endfor %}""",
    "tools": """{% macro field(name, value) %}<{{ name }}>{{ value | tojson(indent=2) }}</{{ name }}>
{% endmacro %}
{%- if tools %}{{ field('tools', tools) }}{{ tools | tojson }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if loop.index > 6 %}{% break %}{% endif %}
    {{- message | tojson }}|{{ message.content | upper | replace('I', 'i') | indent(4) }}|{{ message.name is defined }}
{% endfor %}
{{- messages | map(attribute='role') | unique | join(', ') }}
{%- if add_generation_prompt %}{% generation %}> {% endgeneration %}{% endif %}""",
    "namespace": """{% set ns = namespace(turns=0, seen=[], last='') %}
{%- for message in messages | selectattr('role', 'equalto', 'user') %}
{%- set ns.turns = ns.turns + 1 %}{% set ns.seen = ns.seen + [message.content | length] %}
{%- set ns.last = message.content.strip().split(' ')[-1] %}
{%- endfor %}
{{- '%s turns' % ns.turns }} {{ ns.seen }} {{ ns.last.startswith('H') }} {{ dict(a=1) | items | list }} {{ none ~ 1.0 }}
{{- "{} {}".format(ns.last, ns.turns * 2 ** 3) }} {{ documents is none }} {{ undefined_name }}{{ 'ab' * 3 }}
{%- for key, value in messages[0].items() | sort %}{{ key }}={{ value[:2] }};{% endfor %}""",
}


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("judge")
    byte_tokenizer(["<|endoftext|>"]).save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def smollm2_template() -> str:
    template = Tokenizer.from_gguf(GGUF.open(materials.path("smollm2-135m-instruct"))).chat_template
    assert template is not None
    return template


@pytest.mark.parametrize("name", [*TEMPLATES, "smollm2"])
def test_text_is_that_of_transformers(judge: Any, name: str) -> None:
    template = smollm2_template() if name == "smollm2" else TEMPLATES[name]
    special = {"bos_token": judge.bos_token, "eos_token": judge.eos_token}
    for messages in CONVERSATIONS:
        for prompt in (True, False):
            for tools in (None, TOOLS):
                theirs = judge.apply_chat_template(
                    messages, chat_template=template, tools=tools, add_generation_prompt=prompt, tokenize=False
                )
                ours = chat.render(
                    template, messages, add_generation_prompt=prompt, variables={"tools": tools}, **special
                )
                assert ours == theirs
                assert messages[0]["content"][:2] in ours or name == "tools"


def test_smollm2_says_what_it_was_tuned_on() -> None:
    assert chat.render(smollm2_template(), CONVERSATIONS[0]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_refuses_in_its_own_words() -> None:
    with pytest.raises(InputError, match="chat template: roles must alternate"):
        chat.render(TEMPLATES["brackets"], [{"role": "assistant", "content": "x"}])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "text": "x"}], r"messages\[0\]: has the key 'text'; accepted keys: role, content, name"),
        ([{"role": "user", "content": "x"}, {"content": "x"}], r"messages\[1\]: role is None"),
        ([{"role": 1, "content": "x"}], r"messages\[0\]: role is 1"),
        ([{"role": "user"}], r"messages\[0\]: content is None; text or a list of parts"),
        ([{"role": "user", "content": 5}], r"messages\[0\]: content is 5"),
        (["hello"], r"messages\[0\]: is 'hello'; an object is accepted, with keys role, content"),
        ("hello", "a list of messages is accepted, not one str"),
        ({"role": "user", "content": "x"}, "a list of messages is accepted, not one dict"),
        ([{"role": "user", "content": [b"raw"]}], "hold what JSON has no form for"),
    ],
)
def test_malformed_messages_are_named(messages: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        chat.render("{{ messages }}", messages)


def test_what_a_tool_call_needs() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    parts = {"role": "user", "content": [{"type": "text", "text": "x"}]}
    template = "{{ messages[0].tool_calls[0].function.name }} {{ messages[1].content[0].text }}"
    assert chat.render(template, [call, parts]) == "add x"


def test_one_conversation_is_one_prompt_however_it_is_spelled() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    spelled = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be"}, {"type": "text", "text": "brief."}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    same = [
        {"role": "system", "content": "Be\nbrief."},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{**call, "function": {"name": "add", "arguments": {"a": 1}}}],
        },
    ]
    assert chat.plain(spelled) == chat.plain(same) == same
    template = smollm2_template()
    assert chat.render(template, chat.plain(spelled)) == chat.render(template, same)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"content": [{"type": "image_url"}]}, r"messages\[0\].content\[0\]: a part of type 'image_url'; only text"),
        ({"content": ["Hi"]}, r"messages\[0\].content\[0\]: a part of type 'Hi'"),
        ({"content": "", "tool_calls": ["x"]}, r"tool_calls\[0\]: is 'x'; an object with a function is needed"),
        ({"content": "", "tool_calls": [{"function": {"arguments": "{"}}]}, r"function.arguments: is no JSON"),
    ],
)
def test_what_is_no_text_is_named(message: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        chat.plain([{"role": "assistant", **message}])


def test_variables_may_have_any_name() -> None:
    names = dict.fromkeys(("self", "template", "messages", "variables", "bos_token"), "x")
    text = chat.render(
        "{{ self }}{{ template }}{{ variables }}{{ messages | length }}", CONVERSATIONS[0], variables=names
    )
    assert text.endswith(f"xx{len(CONVERSATIONS[0])}")


GROW = "{% set ns = namespace(x=START) %}{% for i in range(100) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x SHOW }}"


def grow(start: str, step: str, show: str = "") -> str:
    return GROW.replace("START", start).replace("STEP", step).replace("SHOW", show)


HOSTILE = {
    "long range": ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    "loops": ("{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3, "took longer"),
    "busy loop": ("{% for i in range(99999) %}{% set x = range(99999) | list %}{% endfor %}", "took longer"),
    "calls": ("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}", "took longer"),
    "calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "too deeply"),
    "loops itself": ("{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "too deeply"),
    "output": ("{% for i in range(99999) %}" + "a" * 8000 + "{% endfor %}", "writes more than"),
    "long text": ("{{ 'a' * 10**10 }}", "too large"),
    "long list": ("{% set x = [1] * 10**10 %}", "too large"),
    "power": ("{{ 9 ** (9 ** 9) }}", "too large"),
    "squares": (grow("9", "ns.x * ns.x"), "too large"),
    "doubled by +": (grow("'aa'", "ns.x + ns.x"), "too large"),
    "doubled by ~": (grow("'aa'", "ns.x ~ ns.x"), "makes a text or list of"),
    "doubled list": (grow("[1]", "ns.x + ns.x"), "too large"),
    "doubled by join": (grow("'aa'", "ns.x.join([ns.x, ns.x])"), "too large"),
    "nested list": (grow("[1]", "[ns.x, ns.x]"), "too large"),
    "nested to text": (grow("[1]", "[ns.x, ns.x]", "| string"), "too large"),
    "nested to JSON": (grow("[1]", "[ns.x, ns.x]", "| tojson"), "too large"),
    "nested and compared": (grow("[[1], [1]]", "[[ns.x[0]] * 2, [ns.x[1]] * 2]", "[0] == ns.x[1]"), "too large"),
    "nested and sorted": (grow("[[1], [1]]", "[[ns.x[0]] * 2, [ns.x[1]] * 2]", "| sort"), "too large"),
    "replaced": ("{% set x = 'a' * 10**6 %}{{ x | replace('a', x) }}", "too large"),
    "replaced by method": ("{% set x = 'a' * 10**6 %}{{ x.replace('', x) }}", "too large"),
    "joined": ("{% set x = 'a' * 10**6 %}{{ x | join(x) }}", "too large"),
    "indented": ("{{ 'a\nb' | indent(10**10) }}", "indents by 10000000000"),
    "indented JSON": ("{{ messages | tojson(indent=10**9) }}", "indents by 1000000000"),
    "centred": ("{{ 'a'.center(10**10) }}", "unsafe"),
    "format": ("{{ '{:1000000000}'.format(1) }}", "with a width"),
    "format of format": ("{{ '{:{}}'.format(1, 10**9) }}", "with a width"),
    "percent": ("{{ '%1000000000d' % 1 }}", "with a width"),
    "lorem": ("{{ lipsum(10**9) }}", "undefined"),
    "class": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "class by namespace": ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "begin with '_'"),
    "changing": ("{{ messages.append(1) }}", "unsafe"),
    "other files": ("{% include '/etc/passwd' %}", "no loader"),
    "syntax": ("a\n{% for %}", "line 2"),
    "undefined": ("{{ a.b.c }}", "'a' is undefined"),
    "wrong types": ("{{ 'a' + 1 }}", "can only concatenate"),
    "lines": ("{{ raise_exception('two\nlines') }}", "two lines"),
    "nested code": ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "too deeply"),
    "long": ("{{ a }}" * 10000, "at most 65536"),
}


def test_a_halt_that_is_not_the_templates_own_is_not_held_against_it(monkeypatch):
    """A garbage collection of a second, say; what takes long step by step is refused."""

    def seconds(step: float):
        times = itertools.count(step=step)
        return lambda: next(times)

    short, long = "{{ 12 | string }}", "{% for one in range(9) %}{{ one }}{% endfor %}"
    monkeypatch.setattr(templates.time, "thread_time", seconds(1.0))
    assert templates.run(short, {}, "template") == "12"
    with pytest.raises(InputError, match=r"took longer than 0\.5 s"):
        templates.run(long, {}, "template")
    monkeypatch.setattr(templates.time, "thread_time", seconds(0.01))
    assert templates.run(long, {}, "template") == "012345678"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_get_one_line(name: str) -> None:
    template, message = HOSTILE[name]
    with traced() as peak, within(2), pytest.raises(InputError, match=message) as error:
        chat.render(template, CONVERSATIONS[2])
    assert peak[0] < 200 << 20
    assert str(error.value).startswith("chat template: ")
    assert "\n" not in str(error.value)


def test_the_template_cannot_reach_python() -> None:
    for expression in ("messages | attr('__class__')", "''['__class__']", "messages[0].__init__", "cycler"):
        assert chat.render("{{ " + expression + " }}", CONVERSATIONS[0]) == ""


def test_threads_do_not_share_their_time() -> None:
    slow = HOSTILE["loops"][0]

    def render(template: str) -> str:
        try:
            return chat.render(template, CONVERSATIONS[3])
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(render, [slow, TEMPLATES["brackets"]] * 2))
    assert found[0] == found[2] == f"chat template: took longer than {templates.MOST_SECONDS:g} s"
    assert found[1] == found[3] == chat.render(TEMPLATES["brackets"], CONVERSATIONS[3])
