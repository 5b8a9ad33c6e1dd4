"""The server among bad requests, strangers, slow and vanishing clients: each is told so, the others do not notice."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

import httpx
import openai
import pytest
import torch
from serving import CONTEXT, NAME, Scripted, scripted, serving, tiny, tokenizer

from allyouneed.core.errors import InputError
from allyouneed.serve.assembly import assemble
from allyouneed.serve.errors import ApiError
from allyouneed.serve.settings import Settings

ASK = [{"role": "user", "content": "Hi"}]
CHAT = {"messages": ASK, "max_tokens": 4}


@pytest.fixture(scope="module")
def server():
    with serving(max_body=1 << 20) as running:
        yield running
        assert running.settles()


def refused(answer: httpx.Response, param: str | None, status: int = 400) -> str:
    """The message of a refusal in OpenAI's shape."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["param"] == param, error
    assert param is None or param.split("[")[0].split(".")[0] in error["message"]
    return error["message"]


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(server, monkeypatch):
    long = "jump " * 100_000
    assert tokenizer().least(long) > CONTEXT

    def encode_batch(texts, **options):
        assert max(map(len, texts)) < len(long), "tokenised"
        return kept(texts, **options)

    kept = tokenizer().encode_batch
    monkeypatch.setattr(tokenizer(), "encode_batch", encode_batch)
    for path, sent, param in (
        ("/v1/completions", {"prompt": long}, "prompt"),
        ("/v1/completions", {"prompt": ["fox", long]}, "prompt[1]"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}, "messages"),
    ):
        answer = server.post(path, json=sent)
        assert "characters are" in refused(answer, param)
        assert answer.json()["error"]["code"] == "context_length_exceeded"
    monkeypatch.undo()
    counted = server.post("/tokenize", json={"prompt": long}).json()
    assert counted["count"] == len(tokenizer().encode(long))


class TestBodies:
    @pytest.mark.parametrize(
        ("body", "said"),
        [
            (b"", "JSON object"),
            (b"{", "is no JSON"),
            (b'{"messages": [}', "is no JSON"),
            (b"[]", "JSON object"),
            (b"null", "JSON object"),
            (b'"text"', "JSON object"),
            (b'{"messages": "\xff\xfe"}', "no UTF-8"),
            (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
            (b'{"messages": ' + b"[" * 100_000, "nested too deeply"),
            (b'{"seed": ' + b"1" * 10_000 + b"}", "number too long"),
        ],
    )
    def test_no_json(self, server, body, said):
        answer = server.post("/v1/chat/completions", content=body, **{})
        assert answer.status_code == 400
        answer = httpx.post(
            f"{server.url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
        )
        assert said in refused(answer, None)

    def test_other_kinds_of_content(self, server):
        answer = httpx.post(f"{server.url}/v1/chat/completions", data={"messages": "x"})
        assert "Content-Type: application/json" in refused(answer, None)

    def test_huge(self, server):
        answer = server.post("/v1/chat/completions", content=b" " * (2 << 20))
        refused(answer, None, 413)
        pieces = (b" " * 65536 for _ in range(64))  # no length is told
        refused(httpx.post(f"{server.url}/v1/chat/completions", content=pieces), None, 413)

    @pytest.mark.parametrize(
        ("sent", "param"),
        [
            ({}, "messages"),
            ({"messages": []}, "messages"),
            ({"messages": "Hi"}, "messages"),
            ({"messages": [1]}, "messages[0]"),
            ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
            ({"messages": [{"role": "user"}]}, "messages[0].content"),
            ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
            ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
            ({"messages": [{"role": "user", "content": "x " * 2000}]}, "messages"),
            ({"messages": ASK, "model": 3}, "model"),
            ({"messages": ASK, "temperature": "hot"}, "temperature"),
            ({"messages": ASK, "temperature": -1}, "temperature"),
            ({"messages": ASK, "temperature": 3}, "temperature"),
            ({"messages": ASK, "top_p": 2}, "top_p"),
            ({"messages": ASK, "n": 0}, "n"),
            ({"messages": ASK, "n": 1.5}, "n"),
            ({"messages": ASK, "n": True}, "n"),
            ({"messages": ASK, "n": 10**6}, "n"),
            ({"messages": ASK, "max_tokens": 0}, "max_tokens"),
            ({"messages": ASK, "max_tokens": 10**9}, "max_tokens"),
            ({"messages": ASK, "max_tokens": 10**30}, "max_tokens"),
            ({"messages": ASK, "max_completion_tokens": 5000}, "max_completion_tokens"),
            ({"messages": ASK, "max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
            ({"messages": ASK, "seed": 2**70}, "seed"),
            ({"messages": ASK, "stop": ["x"] * 5000}, "stop"),
            ({"messages": ASK, "stop": [""]}, "stop[0]"),
            ({"messages": ASK, "stop": ["x" * 1000]}, "stop[0]"),
            ({"messages": ASK, "stop": ["a", 3]}, "stop[1]"),
            ({"messages": ASK, "stream": "yes"}, "stream"),
            ({"messages": ASK, "stream_options": {"include_usage": True}}, "stream_options"),
            ({"messages": ASK, "stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
            ({"messages": ASK, "logit_bias": {"fox": 1}}, "logit_bias"),
            ({"messages": ASK, "logit_bias": {"99999999": 1}}, "logit_bias"),
            ({"messages": ASK, "logit_bias": {"5": 101}}, "logit_bias.5"),
            ({"messages": ASK, "logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias"),
            ({"messages": ASK, "top_logprobs": 2}, "top_logprobs"),
            ({"messages": ASK, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
            ({"messages": ASK, "frequency_penalty": 3}, "frequency_penalty"),
            ({"messages": ASK, "min_tokens": 9, "max_tokens": 4}, "min_tokens"),
            ({"messages": ASK, "tools": [{"type": "search"}]}, "tools[0].type"),
            ({"messages": ASK, "tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
            ({"messages": ASK, "tool_choice": "required"}, "tool_choice"),
            ({"messages": ASK, "tool_choice": "perhaps"}, "tool_choice"),
            ({"messages": ASK, "response_format": {"type": "xml"}}, "response_format.type"),
            ({"messages": ASK, "response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
            ({"messages": ASK, "functions": [{"name": "f"}]}, "functions"),
            ({"messages": ASK, "audio": {"voice": "alto"}}, "audio"),
            ({"messages": ASK, "store": True}, "store"),
            ({"messages": ASK, "reasoning_effort": "high"}, "reasoning_effort"),
            ({"messages": ASK, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
            ({"messages": ASK, "best_of": 2}, "best_of"),
            ({"messages": ASK, "echo": True}, "echo"),
            ({"messages": ASK, "prompt": "x"}, "prompt"),
            ({"messages": ASK, "allowed_token_ids": [1]}, "allowed_token_ids"),
            ({"messages": ASK, "include_stop_str_in_output": True}, "include_stop_str_in_output"),
            ({"messages": [ASK[0] | {"function_call": {"name": "f"}}]}, "messages[0].function_call"),
            ({"messages": [ASK[0], ASK[0] | {"audio": {"id": "a"}}]}, "messages[1].audio"),
            (
                {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "image_url": {"url": "u"}}]}]},
                "messages[0].content[0].image_url",
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_chats(self, server, sent, param):
        refused(server.post("/v1/chat/completions", json=sent), param)

    @pytest.mark.parametrize(
        ("sent", "param"),
        [
            ({}, "prompt"),
            ({"prompt": 3}, "prompt"),
            ({"prompt": []}, "prompt"),
            ({"prompt": [[]]}, "prompt"),
            ({"prompt": [1, "a"]}, "prompt[1]"),
            ({"prompt": [-1]}, "prompt[0]"),
            ({"prompt": [10**6]}, "prompt"),
            ({"prompt": ["x"] * 1000}, "prompt"),
            ({"prompt": ["x"] * 500, "n": 8}, "n"),
            ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
            ({"prompt": "x", "max_tokens": 512}, "max_tokens"),
            ({"prompt": "x", "best_of": 1, "n": 2}, "best_of"),
            ({"prompt": "x", "best_of": 2, "stream": True}, "best_of"),
            ({"prompt": "x", "logprobs": 30}, "logprobs"),
            ({"prompt": [[1] * 400] * 64, "echo": True, "logprobs": 20, "max_tokens": 1}, "logprobs"),
            ({"prompt": "x", "suffix": "y"}, "suffix"),
            ({"prompt": "x", "max_completion_tokens": 3}, "max_completion_tokens"),
            ({"prompt": "x", "tools": [{"type": "function"}]}, "tools"),
            ({"prompt": "x", "add_special_tokens": False}, "add_special_tokens"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_completions(self, server, sent, param):
        refused(server.post("/v1/completions", json=sent), param)

    @pytest.mark.parametrize(
        ("sent", "param"),
        [
            ({"prompt": {"id": "p"}}, "prompt"),
            ({"stop": ["x"]}, "stop"),
            ({"seed": 0}, "seed"),
            ({"n": 2}, "n"),
            ({"logit_bias": {"1": 1}}, "logit_bias"),
            ({"max_tokens": 3}, "max_tokens"),
            ({"frequency_penalty": 1.0}, "frequency_penalty"),
            ({"reasoning": {"effort": "high"}}, "reasoning"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_responses(self, server, sent, param):
        refused(server.post("/v1/responses", json={"input": "x", **sent}), param)

    def test_what_asks_for_nothing_is_taken(self, server):
        nothing = {"n": 1, "stop": [], "frequency_penalty": 0, "echo": False, "logit_bias": {}, "metadata": {"a": "b"}}
        nothing |= {"reasoning": {"effort": None, "summary": None}, "stream_options": {"include_obfuscation": False}}
        answer = server.post("/v1/responses", json={"input": "x", "max_output_tokens": 1, **nothing})
        assert answer.is_success, answer.text
        answer = server.post("/v1/chat/completions", json=CHAT | {"metadata": {"a": "b"}, "best_of": 1})
        assert answer.is_success and "metadata" in answer.headers["X-Ignored-Fields"]

    @pytest.mark.parametrize("given", ["", [], [""], [[]], [["x"]], "x " * 2000, [10**6], ["x"] * 3000])
    def test_embeddings(self, server, given):
        answer = server.post("/v1/embeddings", json={"input": given})
        assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("input")

    def test_an_embedding_s_text_that_cannot_fit_is_refused_before_it_is_tokenised(self, server):
        error = server.post("/v1/embeddings", json={"input": ["x", "x " * 20_000]}).json()["error"]
        assert "input[1]: 40000 characters are" in error["message"] and error["code"] == "context_length_exceeded"

    def test_routes(self, server):
        refused(httpx.get(f"{server.url}/v1/nothing"), None, 404)
        refused(httpx.get(f"{server.url}/v1/chat/completions"), None, 405)
        refused(httpx.get(f"{server.url}/v1/models/x%20y"), "model", 404)

    def test_schemas_that_explode(self, server):
        nested: dict = {"type": "string"}
        for _ in range(60):
            nested = {"anyOf": [nested, nested]} if len(json.dumps(nested)) < 50_000 else {"items": nested}
        bad = [
            nested,
            {"type": "string", "pattern": "(((a{1,99}){1,99}){1,99}){1,99}"},
            {"$ref": "#"},
            {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
        ]
        began = time.monotonic()
        for schema in bad:
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            answer = server.post("/v1/chat/completions", json=CHAT | {"response_format": form})
            assert answer.status_code in (200, 400), answer.text
            assert answer.is_success or answer.json()["error"]["param"] == "response_format"
        assert time.monotonic() - began < 20


def part(**more) -> dict:
    return {"type": "text", "text": "x", **more}


LARGE = {
    "biases that are none": (
        "chat/completions",
        {"messages": ASK, "logit_bias": {str(i): "x" for i in range(200_000)}},
    ),
    "many biases": ("chat/completions", {"messages": ASK, "logit_bias": {"0" * 30 + str(i): "x" for i in range(4000)}}),
    "parts": ("chat/completions", {"messages": [{"role": "user", "content": [part()] * 120_000}]}),
    "odd parts": ("chat/completions", {"messages": [{"role": "user", "content": [part(odd=1)] * 80_000}]}),
    "fewer odd parts": ("responses", {"input": [{"role": "user", "content": [part(odd=1)] * 8000}]}),
    "messages": ("chat/completions", {"messages": [{"role": "user", "content": [part()]}] * 4000}),
    "items": ("responses", {"input": [{"role": "user", "content": [part()] * 3}] * 30_000}),
    "ids": ("completions", {"prompt": [1] * 1_900_000}),
    "rows of ids": ("completions", {"prompt": [[1] * 4000] * 400}),
    "wrong ids": ("embeddings", {"input": [[1] * 100] * 2000 + [["x"]] * 40}),
    "texts": ("completions", {"prompt": ["The quick brown " * 250] * 500, "max_tokens": 1, "n": 128}),
    "tools": (
        "chat/completions",
        {
            "messages": ASK,
            "tools": [
                {"type": "function", "function": {"name": "f", "description": "x " * 4000, "parameters": {"a": "b"}}}
            ]
            * 120,
        },
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_bodies_do_not_hold_up_others(name):
    """While one is refused, others are answered at once, or as soon as JSON that large can be read.

    In one of five tries, on a machine that others use.
    """
    path, sent = LARGE[name]
    body = json.dumps(sent, separators=(",", ":")).encode()
    assert 100_000 < len(body) < 4 << 20
    began = time.monotonic()
    json.loads(body)
    most = max(0.3, 5 * (time.monotonic() - began))
    with serving() as server:
        pauses = []
        while len(pauses) < 5 and min(pauses, default=most) >= most:
            done = threading.Event()
            answers: list[httpx.Response] = []

            def ask(done=done, answers=answers) -> None:
                headers = {"Content-Type": "application/json"}
                answers.append(httpx.post(f"{server.url}/v1/{path}", content=body, headers=headers, timeout=60))
                done.set()

            asking, worst = threading.Thread(target=ask), 0.0
            with httpx.Client(base_url=server.url, timeout=60) as other:
                assert other.get("/health").is_success
                asking.start()
                while not done.is_set():
                    began = time.monotonic()
                    assert other.get("/health").is_success
                    worst = max(worst, time.monotonic() - began)
            asking.join()
            assert answers[0].status_code == 400, answers[0].text
            pauses.append(worst)
        assert min(pauses) < most, pauses


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
@pytest.mark.parametrize("path", ["chat/completions", "responses"])
def test_numbers_that_are_none(server, path, number):
    tool = f'{{"type": "function", "name": "f", "parameters": {{"minimum": {number}}}}}'
    if path == "chat/completions":
        tool = f'{{"type": "function", "function": {{"name": "f", "parameters": {{"minimum": {number}}}}}}}'
    body = f'{{"input": "Hi", "messages": [{{"role": "user", "content": "Hi"}}], "tools": [{tool}]}}'
    answer = server.post(f"/v1/{path}", content=body.encode())
    assert answer.status_code == 400
    answer = httpx.post(f"{server.url}/v1/{path}", content=body, headers={"Content-Type": "application/json"})
    assert f"{number}, which is no finite number" in refused(answer, None)


def test_other_streams_do_not_notice():
    """A stream goes on with the same tokens, and without long pauses, while all kinds of garbage arrive."""
    with serving() as server:
        fields = {
            "model": NAME,
            "prompt": "The quick",
            "max_tokens": 400,
            "temperature": 0,
            "extra_body": {"ignore_eos": True},
        }
        expected = server.client.completions.create(**fields).choices[0].text
        done = threading.Event()

        def pester() -> None:
            while not done.is_set():
                server.post("/v1/chat/completions", content=b"{" * 1000)
                server.post("/v1/completions", json={"prompt": "x " * 50_000})
                server.post("/v1/chat/completions", json={"messages": ASK, "stop": ["x"] * 5000})

        pestering = threading.Thread(target=pester)
        pestering.start()
        try:
            text, pauses, last = "", [], time.monotonic()
            for chunk in server.client.completions.create(stream=True, **fields):
                text += chunk.choices[0].text
                pauses.append(time.monotonic() - last)
                last = time.monotonic()
        finally:
            done.set()
            pestering.join()
        assert text == expected and max(pauses) < 10


def test_fewer_blocks_than_a_context():
    """Answers without a limit fill what the blocks hold; what asks for more is told of the field."""
    with serving(tiny(blocks=4)) as server:
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["max_model_len"] == 64
        answer = server.post("/v1/chat/completions", json={"messages": ASK, "ignore_eos": True})
        assert answer.is_success and answer.json()["usage"]["total_tokens"] == 64
        refused(server.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 64}), "max_tokens")
    assert tiny(blocks=1000).engine.room == CONTEXT
    with pytest.raises(InputError, match="--context 100: the blocks of the cache hold 64 tokens; raise --blocks"):
        assemble(tiny(blocks=4), Settings(context=100))


def test_the_server_asks_as_the_model_in_process_does(server):
    parts = [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]
    messages = [{"role": "developer", "content": parts}, {"role": "user", "content": "Hi"}]
    ids = server.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert ids == server.lm.prompt_ids(messages)


@pytest.mark.parametrize("name", ["self", "template", "variables", "args", "tools_", "add", "x y"])
def test_variables_of_any_name(server, name):
    answer = server.post("/v1/chat/completions", json=CHAT | {"chat_template_kwargs": {name: 1}})
    assert answer.status_code in (200, 400), answer.text


class TestKeys:
    KEY = "sk-secret"

    def test_every_route_but_health(self):
        with serving(api_key=self.KEY) as server:
            assert httpx.get(f"{server.url}/health").is_success
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
                refused(httpx.get(server.url + path), None, 401)
                refused(httpx.get(server.url + path, headers={"Authorization": "Bearer wrong"}), None, 401)
            refused(httpx.post(f"{server.url}/v1/chat/completions", json=CHAT), None, 401)
            assert server.client.models.list().data
            with pytest.raises(openai.AuthenticationError):
                openai.OpenAI(base_url=f"{server.url}/v1", api_key="other", max_retries=0).models.list()

    def test_a_public_address_needs_one(self):
        for host in ("0.0.0.0", "::", "192.168.1.1", "example.org"):
            with pytest.raises(InputError, match=r"--host .* is open to other machines; set --api-key"):
                Settings(host=host)
            assert Settings(host=host, api_key=self.KEY).host == host
        for host in ("127.0.0.1", "localhost", "::1"):
            Settings(host=host)

    def test_without_one_strangers_names_are_refused(self, server):
        port = server.url.rpartition(":")[2]
        for name in ("localhost", "LOCALHOST", "127.0.0.1", "127.0.0.2", "[::1]"):
            assert httpx.get(f"{server.url}/v1/models", headers={"Host": f"{name}:{port}"}).is_success
        for name in ("evil.example", "localhost.evil.example", "192.168.1.1", "[::", "127.0.0.1@evil.example", "a b"):
            for path in ("/v1/models", "/health", "/nothing"):
                refused(httpx.get(server.url + path, headers={"Host": f"{name}:{port}"}), None, 403)
        with serving(api_key=self.KEY) as keyed:
            headers = {"Host": "public.example", "Authorization": f"Bearer {self.KEY}"}
            assert httpx.get(f"{keyed.url}/v1/models", headers=headers).is_success

    def test_it_is_shown_nowhere(self):
        assert self.KEY not in repr(Settings(api_key=self.KEY))


class TestCrowds:
    def test_too_many_are_sent_away(self):
        with serving(scripted("The quick brown fox " * 20, seconds=0.2), max_requests=2) as server:
            streams = [server.client.completions.create(model=NAME, prompt="x", stream=True) for _ in range(2)]
            answer = server.post("/v1/completions", json={"prompt": "x"})
            assert answer.headers["Retry-After"] == "1"
            refused(answer, None, 429)
            server.lm.engine.seconds = 0.0
            assert httpx.get(f"{server.url}/health").is_success and httpx.get(f"{server.url}/metrics").is_success
            for stream in streams:
                assert list(stream)
            assert server.post("/v1/completions", json={"prompt": "x"}).is_success

    def test_answers_are_counted_not_requests(self):
        with serving(scripted("The quick brown fox " * 20, seconds=0.2), max_requests=4) as server:
            several = server.client.completions.create(model=NAME, prompt=["x", "y"], n=2, stream=True)
            next(several)
            assert "4 answers are under way" in refused(server.post("/v1/completions", json={"prompt": "x"}), None, 429)
            server.lm.engine.seconds = 0.0
            assert list(several)
            assert server.post("/v1/completions", json={"prompt": "x"}).is_success

    def test_the_official_client_waits(self):
        with serving(scripted("The", seconds=0.2), max_requests=1) as server:
            patient = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=5)
            found: list[str] = []

            def ask() -> None:
                found.append(patient.completions.create(model=NAME, prompt="x").choices[0].text)

            threads = [threading.Thread(target=ask) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert found == ["The", "The"]


@contextmanager
def connection(url: str, sent: bytes):
    """A bare connection on which something was sent."""
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), timeout=10) as opened:
        opened.sendall(sent)
        yield opened


def head(path: str, length: int) -> bytes:
    """The head of a request with a body of JSON."""
    fields = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}"
    return f"POST /v1/{path} HTTP/1.1\r\n{fields}\r\n\r\n".encode()


def closed_after(began: float, opened: socket.socket, drip: bytes = b"") -> float:
    """Seconds until the server closes a connection, on which something more is sent now and then."""
    opened.settimeout(0.1)
    while time.monotonic() < began + 10:
        try:
            if drip:
                opened.sendall(drip)
            if not opened.recv(4096):
                break
        except TimeoutError:
            continue
        except OSError:
            break
    return time.monotonic() - began


class TestSlowClients:
    @pytest.fixture(scope="class")
    def impatient(self):
        with serving(header_seconds=0.6, body_seconds=0.6) as running:
            yield running

    @pytest.mark.parametrize("sent", [b"", b"POST /v1/compl", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"])
    def test_heads(self, impatient, sent):
        began = time.monotonic()
        with connection(impatient.url, sent) as opened:
            assert 0.4 < closed_after(began, opened, b"X" if sent else b"") < 10

    def test_heads_after_an_answer(self, impatient):
        began = time.monotonic()
        with connection(impatient.url, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /he") as opened:
            assert closed_after(began, opened, b"a") < 10

    def test_bodies(self, impatient):
        with connection(impatient.url, head("completions", 1000) + b'{"prompt":') as opened:
            time.sleep(0.3)
            opened.sendall(b" ")
            answer = b"".join(iter(lambda: opened.recv(4096), b""))
            assert answer.startswith(b"HTTP/1.1 408") and b'"code":"timeout"' in answer

    def test_slow_bodies_take_no_place_of_others(self):
        with serving(max_requests=4, max_receiving=8, body_seconds=20.0) as server, ExitStack() as held:
            slow = head("completions", 1000) + b'{"prompt":'
            for _ in range(7):
                held.enter_context(connection(server.url, slow))
            time.sleep(0.3)
            assert server.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).is_success
            held.enter_context(connection(server.url, slow))
            time.sleep(0.3)
            refused(server.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}), None, 429)

    def test_many_at_once_do_not_hold_up_others(self, impatient):
        place = urlsplit(impatient.url)
        held = [socket.create_connection((place.hostname, place.port)) for _ in range(200)]
        try:
            for opened in held:
                opened.sendall(b"POST / HTTP/1.1\r\n")
            assert impatient.client.completions.create(model=NAME, prompt="x", max_tokens=3).usage.completion_tokens
        finally:
            for opened in held:
                opened.close()


class TestHangUps:
    @pytest.mark.parametrize("stream", [True, False])
    @pytest.mark.parametrize("path", ["completions", "chat/completions", "responses"])
    def test_blocks_are_free_at_once(self, server, path, stream):
        limits = {
            "responses": {"input": "Hi", "max_output_tokens": 480},
            "completions": {"prompt": "Hi", "max_tokens": 480},
        }
        sent = {"stream": stream, **limits.get(path, {"messages": ASK, "max_tokens": 480})}
        if path != "responses":
            sent |= {"ignore_eos": True, "n": 3}
        body = json.dumps(sent).encode()
        made = server.lm.engine.statistics().made
        with connection(server.url, head(path, len(body)) + body):
            end = time.monotonic() + 10
            while server.lm.engine.statistics().made < made + 3 and time.monotonic() < end:
                time.sleep(0.005)
        assert server.settles()
        assert server.lm.engine.statistics().made - made < 480 * sent.get("n", 1)

    def test_before_anything_was_read(self, server):
        for _ in range(20):
            with connection(
                server.url, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{"
            ):
                pass
        assert server.settles()


class Failing(Scripted):
    """Fails at the third pass."""

    passes = 0

    def step(self):
        self.passes += 1
        if self.passes == 3:
            raise RuntimeError("out of luck")
        return super().step()


class TestFailures:
    def test_mid_stream_errors_have_the_same_shape(self):
        lm = tiny()
        lm.engine = Failing(tokenizer().encode("The quick brown fox"))
        with serving(lm) as server:
            answer = server.post("/v1/completions", json={"prompt": "x", "stream": True})
            events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
            error = json.loads(events[-2])["error"]
            assert events[-1] == "[DONE]" and error["code"] == "engine_failed" and error["type"] == "server_error"
            lm.engine.passes = 0
            with pytest.raises(openai.APIError, match="the engine failed"):
                list(server.client.chat.completions.create(model=NAME, messages=ASK, stream=True))
            lm.engine.passes = 0
            refused(server.post("/v1/completions", json={"prompt": "x"}), None, 500)
            assert server.post("/v1/completions", json={"prompt": "x"}).is_success  # it goes on

    @pytest.mark.parametrize("at", ["push", "finish"])
    def test_a_text_that_cannot_be_made_ends_its_own_request_alone(self, at):
        class Broken:
            def push(self, token):
                if at == "push":
                    raise KeyError(token)
                return "x"

            def finish(self):
                raise KeyError("finish")

        def broken(generation):
            for job in generation.jobs:
                job.text.pieces = Broken()
            return generation

        with serving() as server:
            fields = {"model": NAME, "prompt": "The", "max_tokens": 200, "temperature": 0}
            expected = server.client.completions.create(**fields).choices[0].text
            stream = server.client.completions.create(stream=True, **fields)
            text = next(stream).choices[0].text
            served = server.server.service.models[NAME]
            made = served.generation
            served.generation = lambda *args, **others: broken(made(*args, **others))
            answer = server.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
            assert answer.status_code == 500 and answer.json()["error"]["code"] == "text_failed"
            assert text + "".join(chunk.choices[0].text for chunk in stream) == expected
            assert server.settles()

    def test_an_engine_that_cannot_go_on_is_told(self):
        class Dead(Scripted):
            def step(self):
                raise RuntimeError("out of luck")

            def cancel(self, number):
                raise RuntimeError("once more")

        lm = tiny()
        lm.engine = Dead([])
        with serving(lm) as server:
            assert httpx.get(f"{server.url}/health").is_success
            refused(server.post("/v1/completions", json={"prompt": "x"}), None, 500)
            end = time.monotonic() + 5
            while httpx.get(f"{server.url}/health").is_success and time.monotonic() < end:
                time.sleep(0.01)
            refused(httpx.get(f"{server.url}/health"), None, 503)
            refused(server.post("/v1/completions", json={"prompt": "x"}), None, 503)

    @pytest.mark.parametrize("stream", [True, False])
    def test_answers_that_take_too_long(self, stream):
        with serving(scripted("The quick brown fox jumps " * 8, seconds=0.1), timeout=2) as server:
            answer = server.post("/v1/completions", json={"prompt": "x", "stream": stream, "max_tokens": 100})
            assert answer.status_code == (200 if stream else 504) and '"code":"timeout"' in answer.text
            assert server.settles(2)

    @pytest.mark.parametrize("at, code, status", [("take", "format", 400), ("allowed", "engine_failed", 500)])
    def test_a_guide_that_fails_ends_its_own_request_alone(self, at, code, status):
        class Broken:
            finished = False

            def allowed(self):
                if at == "allowed":
                    raise RuntimeError("out of luck")
                return torch.ones(tokenizer().vocab_size, dtype=torch.bool)

            def take(self, token):
                raise InputError("the grammar became too complex")

            def copy(self):
                return self

        with serving() as server:
            guides = type("Guides", (), {"json_object": lambda self: Broken()})()
            server.lm._guides = lambda: guides
            fields = {"model": NAME, "messages": ASK, "max_tokens": 300, "temperature": 0}
            expected = server.client.chat.completions.create(**fields).choices[0].message.content
            stream = server.client.chat.completions.create(stream=True, **fields)
            text = next(stream).choices[0].delta.content
            for sent in ({"stream": True}, {}):
                answer = server.post(
                    "/v1/chat/completions", json=CHAT | sent | {"response_format": {"type": "json_object"}}
                )
                assert f'"code":"{code}"' in answer.text and answer.status_code == (200 if sent else status)
            assert text + "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected


class TestEnds:
    def test_answers_under_way_are_finished(self):
        with serving(scripted("The quick brown fox jumps over", seconds=0.1)) as server:
            stream = server.client.completions.create(model=NAME, prompt="x", stream=True, max_tokens=50)
            text = next(stream).choices[0].text
            server.server.should_exit = True
            with pytest.raises(openai.APIConnectionError):
                for _ in range(1000):  # it looks ten times a second whether it is to end
                    server.client.models.list()
                    time.sleep(0.01)
            assert text + "".join(chunk.choices[0].text for chunk in stream) == "The quick brown fox jumps over"

    def test_what_takes_too_long_is_told(self):
        with serving(scripted("The quick brown fox jumps over " * 8, seconds=0.1), drain=0.5) as server:
            stream = server.client.completions.create(model=NAME, prompt="x", stream=True, max_tokens=400)
            next(stream)
            server.server.should_exit = True
            with pytest.raises(openai.APIError, match="shutting down"):
                list(stream)


def test_errors_are_short_and_encodable():
    body = ApiError("x" * 10_000 + "\ud800", param="\ud800").body()
    assert len(body["error"]["message"]) <= 600
    json.dumps(body, ensure_ascii=False).encode()
