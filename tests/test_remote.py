"""`RemoteModel` against a server on this machine that behaves well or badly as told."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from allyouneed import cli
from allyouneed.core.errors import InputError, RemoteError
from allyouneed.generate.endpoint import events
from allyouneed.generate.language_model import AccessError, LanguageModel, LateError, Sampling
from allyouneed.generate.remote import RemoteModel

KEY = "sk-very-secret"
GREEDY = Sampling(temperature=0.0, max_new_tokens=5)


@dataclass
class Reply:
    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    chunks: list[bytes] | None = None  # sent one by one instead of the body
    cut: bool = False  # promise more than is sent


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.answer(None)

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body: Any) -> None:
        with self.server.lock:
            self.server.requests.append((self.path, body, dict(self.headers)))
            self.server.under_way += 1
            self.server.most = max(self.server.most, self.server.under_way)
        try:
            reply = self.server.behave(self.path, body)
        finally:
            with self.server.lock:
                self.server.under_way -= 1
        if reply is None:
            self.close_connection = True
            return
        text = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body, ensure_ascii=False).encode()
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if reply.chunks is None:
            self.send_header("Content-Length", str(len(text) + 9 * reply.cut))
            self.end_headers()
            self.wfile.write(text)
            self.close_connection = reply.cut
            return
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for chunk in reply.chunks:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            self.wfile.flush()
        if reply.cut:
            self.close_connection = True
        else:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    """`behave(path, body)` gives each reply; None closes the connection without one."""

    daemon_threads = True

    def __init__(self, behave: Callable[[str, Any], Reply | None]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.lock = behave, threading.Lock()
        self.requests: list[tuple[str, Any, dict[str, str]]] = []
        self.under_way = self.most = 0
        self.url = f"http://127.0.0.1:{self.server_port}"

    def bodies(self, path: str = "/v1/completions") -> list[Any]:
        return [body for at, body, _ in self.requests if at == path]


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@contextmanager
def serving(behave: Callable[[str, Any], Reply | None]) -> Iterator[Server]:
    server = Server(behave)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def asking(behave: Callable[[str, Any], Reply | None], **options: Any) -> Iterator[tuple[RemoteModel, Server]]:
    """A model whose every request `behave` answers; its pauses are recorded in `server.pauses` and not waited for."""
    with serving(behave) as server:
        server.pauses = []
        lm = RemoteModel(server.url, **({"model": "m", "sleep": server.pauses.append} | options))
        try:
            yield lm, server
        finally:
            lm.close()


def completion(text: str, **more: Any) -> Reply:
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    return Reply({"choices": [{"text": text, "finish_reason": "length", "index": 0}], "usage": usage} | more)


def sequence(*replies: Reply | None) -> Callable[[str, Any], Reply | None]:
    """These replies, one after the other."""
    left = iter(replies)
    return lambda path, body: next(left)


def stream(*events: str | dict[str, Any], size: int | None = None, **more: Any) -> Reply:
    """Server-sent events, cut into chunks of `size` bytes wherever that falls."""
    lines = [f"data: {e if isinstance(e, str) else json.dumps(e, ensure_ascii=False)}\n\n" for e in events]
    whole = "".join(lines).encode()
    size = size or len(whole)
    chunks = [whole[i : i + size] for i in range(0, len(whole), size)]
    return Reply(None, headers={"Content-Type": "text/event-stream"}, chunks=chunks, **more)


def delta(text: str | None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"role": "assistant"} if text is None else {"content": text}}]}


class TestCompletions:
    def test_protocol_and_first_model(self):
        models = Reply({"data": [{"id": "first"}, {"id": "second"}]})
        with asking(lambda path, body: models, model=None) as (lm, server):
            assert isinstance(lm, LanguageModel)
            assert lm.name == "first"
            assert server.requests[0][0] == "/v1/models"

    def test_order_and_limit_under_concurrency(self):
        together = threading.Barrier(5, timeout=20)  # none is answered before five are under way

        def slow(path, body):
            together.wait()
            time.sleep(0.001 * (int(body["prompt"]) * 37 % 11))
            return completion(f"<{body['prompt']}>")

        with asking(slow, concurrency=5) as (lm, server):
            texts = lm.generate([str(i) for i in range(60)], max_new_tokens=1)
            assert texts == [f"<{i}>" for i in range(60)]
            assert server.most == 5

    def test_limit_holds_for_several_callers(self):
        together = threading.Barrier(3, timeout=20)

        def slow(path, body):
            together.wait()
            time.sleep(0.005)
            return completion("")

        with asking(slow, concurrency=3) as (lm, server):
            callers = [threading.Thread(target=lm.complete, args=(["a"] * 8, GREEDY)) for _ in range(3)]
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.join()
            assert len(server.requests) == 24
            assert server.most == 3

    def test_one_bad_sampling_of_many_is_found_before_any_is_asked(self):
        with asking(lambda path, body: completion("")) as (lm, server):
            with pytest.raises(InputError, match=r"^request 2: regex: endpoints have no common field for it"):
                lm.complete(["a"] * 4, [GREEDY, GREEDY, GREEDY.replace(regex="a+"), GREEDY])
            assert server.requests == []

    def test_completion(self):
        with asking(lambda path, body: completion("x")) as (lm, _):
            (found,) = lm.complete(["p"], GREEDY)
            assert (found.text, found.finish_reason, found.prompt_tokens, found.completion_tokens) == (
                "x",
                "length",
                3,
                2,
            )

    def test_nothing_asked(self):
        with asking(sequence()) as (lm, server):
            assert lm.complete([], GREEDY) == []
            assert lm.score([], []) == []
            assert lm.embed([]).shape == (0, 0)
            assert server.requests == []

    def test_sampling_fields(self):
        with asking(lambda path, body: completion("")) as (lm, server):
            lm.complete(["a", "b"], Sampling(max_new_tokens=7, temperature=0.5, top_p=0.9, seed=40, stop=("\n",)))
            lm.complete(["c"], Sampling(top_k=4, min_p=0.1, repetition_penalty=1.2, ignore_eos=True))
            lm.complete(["d"], Sampling(logit_bias=((7, -1.5),), min_tokens=2, presence_penalty=0.5))
            lm.complete(["e"], Sampling(json_schema='{"type": "null"}'))
            with pytest.raises(InputError, match="regex"):
                lm.complete(["f"], Sampling(regex="a"))
            bodies = {body["prompt"]: body for body in server.bodies()}
        usual = {"model": "m", "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "stop": ["\n"]}
        assert bodies["a"] == usual | {"prompt": "a", "seed": 40}
        assert bodies["b"] == usual | {"prompt": "b", "seed": 41}
        extras = {"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True}
        plain = {"model": "m", "prompt": "c", "max_tokens": 128, "temperature": 1.0, "top_p": 1.0}
        assert bodies["c"] == plain | extras
        assert bodies["d"] == plain | {
            "prompt": "d",
            "logit_bias": {"7": -1.5},
            "min_tokens": 2,
            "presence_penalty": 0.5,
        }
        asked = {"name": "answer", "schema": {"type": "null"}, "strict": True}
        assert bodies["e"]["response_format"] == {"type": "json_schema", "json_schema": asked}

    def test_chat(self):
        messages = [{"role": "user", "content": "Grüß dich 🙂"}]
        answer = Reply({"choices": [{"message": {"role": "assistant", "content": "Hallo"}}], "error": None})
        with asking(lambda path, body: answer) as (lm, server):
            assert lm.chat(messages, temperature=0.0) == "Hallo"
            assert server.bodies("/v1/chat/completions")[0]["messages"] == messages

    def test_embed(self):
        def embeddings(path, body):
            entries = [{"index": i, "embedding": [3.0 * len(t), 4.0 * len(t)]} for i, t in enumerate(body["input"])]
            return Reply({"data": entries[::-1]})

        texts = ["x" * (i + 1) for i in range(130)]
        with asking(embeddings) as (lm, server):
            vectors = lm.embed(texts)
            assert vectors.shape == (130, 2) and vectors.dtype == np.float32
            np.testing.assert_allclose(vectors, np.tile([0.6, 0.8], (130, 1)), rtol=1e-6)
            assert sorted(len(body["input"]) for body in server.bodies("/v1/embeddings")) == [2, 64, 64]

    def test_embed_keeps_the_order(self):
        def embeddings(path, body):
            entries = [{"index": i, "embedding": [float(t), 1.0]} for i, t in enumerate(body["input"])]
            return Reply({"data": entries[::-1]})

        with asking(embeddings) as (lm, _):
            vectors = lm.embed([str(i) for i in range(100)])
            np.testing.assert_allclose(vectors[:, 0] / vectors[:, 1], np.arange(100), rtol=1e-5)


class TestRetries:
    @pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503])
    def test_passing_failures(self, status):
        busy = Reply({"error": {"message": "busy"}}, status)
        with asking(sequence(busy, busy, completion("at last"))) as (lm, server):
            assert lm.generate(["p"]) == ["at last"]
            assert len(server.pauses) == 2
            assert 0.25 <= server.pauses[0] <= 0.5 <= server.pauses[1] <= 1.0

    def test_lost_connections(self):
        cut = Reply({"choices": []}, cut=True)
        with asking(sequence(None, cut, completion("at last"))) as (lm, server):
            assert lm.generate(["p"]) == ["at last"]
            assert len(server.pauses) == 2

    def test_a_long_answer_is_not_paid_for_twice(self):
        over = threading.Event()

        def slow(path, body):
            if path != "/v1/models":
                over.wait(20)
            return Reply({"data": []})

        with asking(slow, timeout=2.0) as (lm, server):
            with pytest.raises(RemoteError, match=r"no answer within 2 s, though the server is well; ask for fewer"):
                lm.generate(["p"])
            assert len(server.bodies()) == 1 and not server.pauses
            with pytest.raises(LateError):
                next(lm.stream("p", GREEDY))
            assert len(server.bodies()) == 2 and not server.pauses
            over.set()

    @pytest.mark.parametrize("command", [["generate"], ["chat"]])
    def test_the_command_line_waits_as_long_as_it_is_told(self, command, capsys, monkeypatch):
        over = threading.Event()

        def slow(path, body):
            if path != "/v1/models":
                over.wait(20)
            return Reply({"data": [{"id": "m"}]})

        read, write = os.pipe()
        os.write(write, b"Hello\n")
        os.close(write)
        monkeypatch.setattr("sys.stdin", os.fdopen(read))
        with serving(slow) as server:
            given = [*command, server.url, *(["p"] if command == ["generate"] else []), "--timeout", "0.3"]
            began = time.monotonic()
            cli.main(given)
            assert time.monotonic() - began < 10
            over.set()
        assert "no answer within 0.3 s, though the server is well" in capsys.readouterr().err

    @pytest.mark.parametrize("seconds", ["0", "-1", "inf"])
    def test_no_time_at_all_is_refused(self, seconds, capsys):
        assert cli.main(["generate", "http://127.0.0.1:9", "p", "--timeout", seconds]) == 2
        assert "seconds above 0 are needed" in capsys.readouterr().err

    def test_a_model_of_this_machine_has_no_timeout(self, capsys):
        assert cli.main(["generate", "smollm2-135m-instruct", "p", "--timeout", "5"]) == 2
        assert "a timeout is for endpoints" in capsys.readouterr().err

    def test_a_server_that_is_silent_altogether_is_asked_again(self):
        silent, over = threading.Event(), threading.Event()

        def hangs(path, body):
            if path == "/v1/models":
                silent.set()
            if path == "/v1/models" or not silent.is_set():
                over.wait(20)
            return completion("in time")

        with asking(hangs, timeout=2.0) as (lm, server):
            assert lm.generate(["p"]) == ["in time"]
            assert len(server.pauses) == 1 and len(server.bodies()) == 2
            over.set()

    def test_nobody_listens(self):
        with serving(sequence()) as server:
            url = server.url
        pauses: list[float] = []
        with pytest.raises(RemoteError, match=r"127\.0\.0\.1:\d+/v1: ConnectError") as caught:
            RemoteModel(url, retries=3, sleep=pauses.append)
        assert len(pauses) == 3 and "\n" not in str(caught.value)

    @pytest.mark.parametrize("status", [400, 403, 404, 413, 422])
    def test_lasting_failures_are_not_tried_again(self, status):
        def refuse(path, body):
            return Reply({"data": [{"id": "m"}]}) if path == "/v1/models" else Reply({"detail": "too long"}, status)

        with asking(refuse) as (lm, server):
            with pytest.raises(RemoteError, match=f"{status} too long") as caught:
                lm.generate(["p"])
            assert caught.value.status == status
            assert server.pauses == [] and len(server.bodies()) == 1

    def test_gives_up(self):
        with asking(lambda path, body: Reply(b"<h1>Bad\ngateway</h1>", 502), retries=2) as (lm, server):
            with pytest.raises(RemoteError, match="502 <h1>Bad gateway</h1>"):
                lm.generate(["p"])
            assert len(server.requests) == 3

    def test_pauses_grow_and_repeat(self):
        recorded = []
        for _ in range(2):
            with asking(lambda path, body: Reply({}, 500), retries=10) as (lm, server):
                with pytest.raises(RemoteError):
                    lm.generate(["p"])
                recorded.append(server.pauses)
        assert recorded[0] == recorded[1]
        bounds = [min(120.0, 0.5 * 2**i) for i in range(10)]
        assert all(bound / 2 <= pause <= bound for pause, bound in zip(recorded[0], bounds, strict=True))

    def test_retry_after(self):
        def busy(value: str) -> Reply:
            return Reply({"error": "slow down"}, 429, {"Retry-After": value})

        replies = [busy("7"), busy(formatdate(time.time() + 30, usegmt=True)), busy("soon"), completion("x")]
        with asking(sequence(*replies)) as (lm, server):
            assert lm.generate(["p"]) == ["x"]
            assert server.pauses[0] == 7.0
            assert 20 < server.pauses[1] <= 30
            assert server.pauses[2] <= 2.0

    def test_a_wait_of_hours_is_refused(self):
        with asking(lambda path, body: Reply({"error": "quota"}, 429, {"Retry-After": "7200"})) as (lm, server):
            with pytest.raises(RemoteError, match=r"429 quota \(asks to wait 7200 s\)"):
                lm.generate(["p"])
            assert server.pauses == []

    def test_one_of_many_fails(self):
        def one_bad(path, body):
            if body["prompt"] == "5":
                return Reply({"error": {"message": "poison"}}, 400)
            time.sleep(0.05 * (int(body["prompt"]) > 5))
            return completion(f"<{body['prompt']}>")

        with asking(one_bad, concurrency=2) as (lm, server):
            with pytest.raises(RemoteError, match=r"^request 5: .*400 poison$") as caught:
                lm.generate([str(i) for i in range(500)])
            done = caught.value.done
            assert 5 not in done and set(range(5)) <= set(done)
            assert all(found.text == f"<{i}>" for i, found in done.items())
            assert len(server.requests) < 500

    def test_an_interrupt_drops_what_was_not_begun(self, monkeypatch):
        from allyouneed.generate import caller

        def interrupted(*args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        gate = threading.Event()

        def held(path, body):
            gate.wait(20)
            return completion("")

        with asking(held, concurrency=1) as (lm, server):
            monkeypatch.setattr(caller, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                lm.generate(["p"] * 50)
            gate.set()
            lm.close()
            assert len(server.requests) <= 1


class TestErrors:
    @pytest.mark.parametrize(
        "url",
        ["localhost:8000", "ftp://host/v1", "http://", "http://h:99999/v1", "", "http://a..b", "http://host/v1?key=k"],
    )
    def test_bad_addresses(self, url):
        with pytest.raises(InputError, match="is no address; write http://host:port/v1"):
            RemoteModel(url, "m")
        with pytest.raises(InputError) as caught:
            RemoteModel(f"htp://me:{KEY}@host/v1?key={KEY}", "m")
        assert KEY not in str(caught.value)

    @pytest.mark.parametrize("tail", ["", "/", "/v1", "/v1/"])
    def test_addresses(self, tail):
        with serving(lambda path, body: completion("x")) as server:
            lm = RemoteModel(server.url + tail, "m")
            assert lm.generate(["p"]) == ["x"]
            assert server.requests[0][0] == "/v1/completions"
            lm.close()

    def test_another_path(self):
        with serving(lambda path, body: completion("x")) as server:
            lm = RemoteModel(server.url + "/api/v1", "m")
            lm.generate(["p"])
            assert server.requests[0][0] == "/api/v1/completions"
            lm.close()

    def test_key(self, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", "from-outside\n")
        with asking(lambda path, body: completion("x")) as (lm, server):
            lm.generate(["p"])
            assert server.requests[0][2]["Authorization"] == "Bearer from-outside"
        with asking(lambda path, body: completion("x"), api_key=KEY) as (lm, server):
            lm.generate(["p"])
            assert server.requests[0][2]["Authorization"] == f"Bearer {KEY}"
        with asking(lambda path, body: completion("x"), api_key="") as (lm, server):
            lm.generate(["p"])
            assert "Authorization" not in server.requests[0][2]

    @pytest.mark.parametrize("status", [400, 401, 500])
    def test_the_key_is_shown_nowhere(self, status, caplog, capsys):
        caplog.set_level(logging.DEBUG)
        echo = Reply({"error": {"message": f"Incorrect key {KEY}."}}, status)
        with asking(lambda path, body: echo, api_key=KEY, retries=1) as (lm, _):
            with pytest.raises((InputError, RemoteError), match=r"Incorrect key \[key\]\.") as caught:
                lm.generate(["p"])
            said = [str(caught.value), repr(caught.value), caplog.text, repr(lm), repr(lm.caller)]
            said += [*capsys.readouterr(), str(caught.value.__cause__)]
            assert not any(KEY in text for text in said)
            assert type(caught.value) is (AccessError if status == 401 else RemoteError)

    def test_a_key_no_header_can_hold(self):
        with pytest.raises(InputError, match="no HTTP header may") as caught:
            RemoteModel("http://localhost:1", "m", api_key=f"{KEY}\n{KEY}")
        assert KEY not in str(caught.value)

    def test_a_password_in_the_address_is_sent_and_not_shown(self, caplog):
        caplog.set_level(logging.DEBUG)
        with serving(lambda path, body: Reply({"error": "no"}, 400)) as server:
            lm = RemoteModel(server.url.replace("//", f"//me:{KEY}@"), "m")
            with pytest.raises(RemoteError) as caught:
                lm.generate(["p"])
            assert KEY not in str(caught.value) and server.url in str(caught.value)
            assert server.requests[0][2]["Authorization"] == "Basic " + b64encode(f"me:{KEY}".encode()).decode()
            assert "/v1/completions" in caplog.text and KEY not in caplog.text
            lm.close()

    def test_refused_key(self):
        with (
            asking(lambda path, body: Reply({"error": {"message": "who?"}}, 401)) as (lm, server),
            pytest.raises(AccessError, match=r"401 who\?.*OPENAI_API_KEY"),
        ):
            lm.generate(["p"])
        assert server.pauses == []

    @pytest.mark.parametrize("ask", [lambda lm: lm.generate(["p"]), lambda lm: list(lm.stream("p", GREEDY))])
    def test_unknown_model(self, ask):
        def strict(path, body):
            if path == "/v1/models":
                return Reply({"data": [{"id": "smollm2-135m"}, {"id": "other"}]})
            return Reply({"error": {"message": "no such model"}}, 404)

        with (
            asking(strict, model="smollm-135m") as (lm, _),
            pytest.raises(AccessError, match="unknown model 'smollm-135m'; did you mean 'smollm2-135m'"),
        ):
            ask(lm)

    def test_no_such_endpoint(self):
        with (
            asking(lambda path, body: Reply(b"Not Found", 404)) as (lm, _),
            pytest.raises(RemoteError, match="404 Not Found"),
        ):
            lm.embed(["text"])

    def test_no_models(self):
        with serving(lambda path, body: Reply({"data": []})) as server, pytest.raises(InputError, match="name one"):
            RemoteModel(server.url)

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            (b"<html>\nwelcome</html>", "no JSON: '<html> welcome</html>'"),
            (b"", "no JSON"),
            (b'{"choices": [', "no JSON"),
            (b"[" * 100_000, "no JSON"),
            (b"\xff\xfe", "no JSON"),
            (b"[]", "lacks what was asked for"),
            (b"null", "lacks what was asked for"),
            (b'{"choices": []}', "lacks what was asked for"),
            (b'{"choices": [{"finish_reason": "stop"}]}', "lacks what was asked for"),
            (b'{"choices": "none"}', "lacks what was asked for"),
            (b'{"error": {"message": "out of\\nmemory"}}', "out of memory"),
        ],
    )
    def test_bad_answers(self, body, message):
        with asking(lambda path, asked: Reply(body)) as (lm, server):
            with pytest.raises(RemoteError, match=message) as caught:
                lm.generate(["p"])
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
            assert server.pauses == []

    def test_bad_vectors(self):
        ragged = {"data": [{"index": 0, "embedding": [1.0]}, {"index": 1, "embedding": [1.0, 2.0]}]}
        with (
            asking(lambda path, body: Reply(ragged)) as (lm, _),
            pytest.raises(RemoteError, match="lacks what was asked for"),
        ):
            lm.embed(["a", "b"])


class TestStreams:
    @pytest.mark.parametrize("size", [1, 2, 3, 7, None])
    def test_characters_split_between_chunks(self, size):
        pieces = ["Grüße", " 🙂👩‍🚀", " 東京", "\u2028\x85", "\n\n", "data: x"]
        events = [delta(None), *map(delta, pieces), {"choices": [], "usage": {"prompt_tokens": 1}}, "[DONE]"]
        with asking(lambda path, body: stream(*events, size=size)) as (lm, server):
            assert list(lm.chat_stream([{"role": "user", "content": "hi"}], GREEDY)) == pieces
            (body,) = server.bodies("/v1/chat/completions")
            assert body["stream"] is True and body["max_tokens"] == 5

    def test_completions(self):
        events = [{"choices": [{"text": text}]} for text in ("a", "", "b")]
        with asking(lambda path, body: stream(*events, "[DONE]")) as (lm, server):
            assert list(lm.stream("p", GREEDY)) == ["a", "b"]
            assert server.bodies()[0]["prompt"] == "p"

    def test_pieces_come_before_the_end(self):
        with serving(sequence()) as server:
            gate = threading.Event()

            class Gated(list):
                def __iter__(self):
                    yield f"data: {json.dumps(delta('first'))}\n\n".encode()
                    assert gate.wait(10)
                    yield b"data: [DONE]\n\n"

            server.behave = lambda path, body: Reply(None, chunks=Gated())
            lm = RemoteModel(server.url, "m")
            pieces = lm.chat_stream([], GREEDY)
            assert next(pieces) == "first"
            gate.set()
            assert list(pieces) == []
            lm.close()

    def test_error_in_the_middle(self):
        broken = stream(delta("so far"), {"error": {"message": "worker\ndied", "code": 500}}, "[DONE]")
        with asking(lambda path, body: broken) as (lm, _):
            pieces = lm.chat_stream([], GREEDY)
            assert next(pieces) == "so far"
            with pytest.raises(RemoteError, match="worker died"):
                next(pieces)

    @pytest.mark.parametrize(
        ("reply", "message"),
        [
            (stream(delta("so far")), r"ended without \[DONE\]"),
            (stream(delta("so far"), cut=True), "the stream broke off"),
            (stream(delta("so far"), '{"choices": [{"del'), "no JSON"),
            (stream(delta("so far"), {"choices": [{}]}, "[DONE]"), "lacks what was asked for"),
        ],
    )
    def test_bad_ends(self, reply, message):
        with asking(lambda path, body: reply) as (lm, server):
            pieces = lm.chat_stream([], GREEDY)
            assert next(pieces) == "so far"
            with pytest.raises(RemoteError, match=message):
                next(pieces)
            assert len(server.requests) == 1

    def test_the_opening_is_tried_again(self):
        with asking(sequence(Reply({}, 503), None, stream(delta("x"), "[DONE]"))) as (lm, server):
            assert list(lm.chat_stream([], GREEDY)) == ["x"]
            assert len(server.pauses) == 2

    def test_events(self):
        raw = b": hello\r\nevent: message\r\ndata: a\r\n\r\n\r\ndata:b\ndata:  c\n\nid: 4\n\ndata: last"
        for size in (1, 2, 5, len(raw)):
            chunks = [raw[i : i + size] for i in range(0, len(raw), size)]
            assert list(events(chunks)) == ["a", "b\n c", "last"]


def tokens_of(text: str) -> list[str]:
    """A begin token, then words with the space before them; what is no ASCII letter is a token per byte."""
    pieces: list[str] = ["<begin>"]
    for letter in text:
        if not letter.isascii():
            pieces += ["�"] * len(letter.encode())
        elif letter.isalpha() and len(pieces) > 1 and (pieces[-1] + "a").strip().isalpha():
            pieces[-1] += letter
        else:
            pieces.append(letter)
    return pieces


def logprob(tokens: list[str], i: int) -> float:
    return -((sum(map(ord, "".join(tokens[: i + 1]))) * 31 + i) % 97) / 10


def vllm(path: str, body: Any) -> Reply:
    """Answers as vLLM does: offsets are running sums of the lengths of decoded tokens, a begin token's included."""
    tokens = tokens_of(body["prompt"])
    usage = {"prompt_tokens": len(tokens), "completion_tokens": body["max_tokens"]}
    choice: dict[str, Any] = {"text": "!", "finish_reason": "length", "logprobs": None}
    if body.get("echo"):
        shown = [*tokens, "!"]
        offsets = [sum(map(len, shown[:i])) for i in range(len(shown))]
        logprobs = [None, *(logprob(tokens, i) for i in range(1, len(tokens))), -0.5]
        choice["text"] = body["prompt"] + "!"
        choice["logprobs"] = {"tokens": shown, "token_logprobs": logprobs, "text_offset": offsets}
    return Reply({"choices": [choice], "usage": usage})


PAIRS = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " Rome, of course"),
    ("東京 🙂 is", " far"),
    ("Grüße", " 👩‍🚀 aus 東京"),
    ("The capital of France is", " Paris"),
    ("ends with spaces  \n", "word"),
    ("a", ""),
]


class TestScore:
    def test_sums_over_the_continuation(self):
        with asking(vllm) as (lm, server):
            found = lm.score([p for p, _ in PAIRS], [c for _, c in PAIRS])
            bodies = server.bodies()
        for (prompt, continuation), score in zip(PAIRS, found, strict=True):
            whole, head = tokens_of(prompt + continuation), tokens_of(prompt.rstrip())
            assert whole[: len(head)] == head
            assert score == pytest.approx(sum(logprob(whole, i) for i in range(len(head), len(whole))))
        echoed = [body["prompt"] for body in bodies if body.get("echo")]
        plain = [body["prompt"] for body in bodies if not body.get("echo")]
        assert len(echoed) == len(set(echoed)) == len(set(PAIRS))
        assert sorted(plain) == sorted({prompt.rstrip() for prompt, _ in PAIRS})

    def test_generated_tokens_do_not_count(self):
        def generous(path, body):
            reply = vllm(path, body)
            if body.get("echo"):
                reply.body["choices"][0]["logprobs"]["token_logprobs"] += [-50.0] * 4
            return reply

        with asking(vllm) as (lm, _), asking(generous) as (other, _):
            assert lm.score(["one two"], [" three"]) == other.score(["one two"], [" three"])

    @pytest.mark.parametrize("status", [400, 422, 500])
    def test_servers_that_refuse(self, status):
        def refuse(path, body):
            return Reply({"error": {"message": "Only no echo"}}, status) if body.get("echo") else vllm(path, body)

        with (
            asking(refuse, retries=1) as (lm, _),
            pytest.raises(RemoteError, match=rf"^request 0: this endpoint cannot score, .*{status} Only no echo$"),
        ):
            lm.score(["a"], [" b"])

    @pytest.mark.parametrize(
        "logprobs", [None, {}, {"token_logprobs": [-0.5]}, {"token_logprobs": [None, -1.0, None, -1.0, -1.0]}]
    )
    def test_servers_that_pass_over_echo(self, logprobs):
        def deaf(path, body):
            reply = vllm(path, body)
            reply.body["choices"][0]["logprobs"] = logprobs
            return reply

        with asking(deaf) as (lm, server), pytest.raises(RemoteError, match="this endpoint cannot score"):
            lm.score(["a b"], [" c"])
        assert server.pauses == []

    def test_bad_pairs(self):
        with asking(vllm) as (lm, _):
            with pytest.raises(InputError, match="2 prompts but 1 continuations"):
                lm.score(["a", "b"], ["c"])
            with pytest.raises(InputError, match="prompt 1 is empty"):
                lm.score(["a", " "], ["c", "d"])
