"""Batch jobs: order, rows that are wrong, kills, and models at both ends of a wire."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fleet import fleet_of
from test_remote import Reply, asking, nothing_from_outside

import allyouneed as ayn
from allyouneed.cli import main
from allyouneed.core.errors import InputError, RemoteError
from allyouneed.data import jsonl
from allyouneed.data.tokenizers import byte_tokenizer
from allyouneed.generate import job
from allyouneed.generate.in_order import InOrder
from allyouneed.generate.language_model import AccessError, Completion, Sampling, Turns
from allyouneed.generate.local import LocalModel
from allyouneed.generate.rows import LARGEST, Row, read
from allyouneed.models import llama

__all__ = ["nothing_from_outside"]  # the fixture holds here too
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
SAMPLING = Sampling(max_new_tokens=4, seed=10)
HELLO = [{"role": "user", "content": "hé"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a chat template, on disk."""
    torch.manual_seed(0)
    module = llama.architecture(vocab_size=257, context=96, dim=16, num_layers=1, num_heads=2, tied=True).build()
    folder = tmp_path_factory.mktemp("models") / "tiny"
    ayn.save(module, folder)
    tokenizer = byte_tokenizer()
    tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def lm(folder: Path) -> LocalModel:
    found = ayn.load(folder)
    assert isinstance(found, LocalModel)
    return found


def written(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(lm: Any, folder: Path, rows: Sequence[Any], **options: Any) -> list[dict[str, Any]]:
    source, target = written(folder / "in.jsonl", rows), folder / "out.jsonl"
    target.unlink(missing_ok=True)
    job.run(lm, source, target, SAMPLING, **({"quiet": True} | options))
    assert not (folder / "out.jsonl.partial").exists()
    return lines(target)


MIXED: list[Any] = [
    {"prompt": "a"},
    {"messages": HELLO, "id": "x"},
    {"prompt": "b", "max_tokens": 2, "temperature": 0, "metadata": {"k": [1]}},
    {"prompt": HELLO, "stop": "q", "seed": 5},
    {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"model": "?", "prompt": "a", "n": 1}},
    {"custom_id": "d", "body": {"messages": HELLO, "max_completion_tokens": 3, "seed": None, "stop": ["1", "2"]}},
    {"prompt": "a", "logit_bias": {"65": 1e4}, "max_tokens": 3},
]


def test_each_row_is_answered_as_it_would_be_alone(lm: LocalModel, tmp_path: Path) -> None:
    found = answers(lm, tmp_path, MIXED)
    said = [Sampling(max_new_tokens=4, seed=10 + i) for i in range(7)]
    said[2] = said[2].replace(max_new_tokens=2, temperature=0.0)
    said[3] = said[3].replace(stop=("q",), seed=5)
    said[6] = said[6].replace(max_new_tokens=3, logit_bias=((65, 1e4),))
    said[5] = said[5].replace(max_new_tokens=3, stop=("1", "2"))
    asked: list[Turns] = ["a", HELLO, "b", HELLO, "a", HELLO, "a"]
    alone = [lm.complete([turns], sampling)[0] for turns, sampling in zip(asked, said, strict=True)]
    counted = [
        {"finish_reason": one.finish_reason, "prompt_tokens": one.prompt_tokens}
        | {"completion_tokens": one.completion_tokens}
        for one in alone
    ]
    assert found[6]["completion"] == "AAA"
    assert found[0] == {"prompt": "a", "completion": alone[0].text} | counted[0]
    spoken = {"role": "assistant", "content": alone[1].text}
    assert found[1] == {"id": "x", "messages": [*HELLO, spoken]} | counted[1]
    assert found[2] == {"prompt": "b", "completion": alone[2].text, "metadata": {"k": [1]}} | counted[2]
    assert found[3] == {"prompt": HELLO, "completion": alone[3].text} | counted[3]
    (choice,) = found[4]["response"]["body"]["choices"]
    assert choice == {"index": 0, "text": alone[4].text, "finish_reason": alone[4].finish_reason}
    (choice,) = found[5]["response"]["body"]["choices"]
    assert choice["message"] == {"role": "assistant", "content": alone[5].text} and found[5]["custom_id"] == "d"
    usage = found[5]["response"]["body"]["usage"]
    assert usage["total_tokens"] == alone[5].prompt_tokens + alone[5].completion_tokens
    template_tokens = len(lm.tokenizer.encode("<user>hé<assistant>"))
    assert usage["prompt_tokens"] == template_tokens


def test_answers_are_data_to_learn_from(lm: LocalModel, tmp_path: Path) -> None:
    answers(lm, tmp_path, MIXED[:4])
    kinds = [type(record).__name__ for record in jsonl.read(tmp_path / "out.jsonl")]
    assert kinds == ["Completion", "Chat", "Completion", "Completion"]


@pytest.mark.parametrize("ahead", [1, 2, 3, 64])
def test_order_and_texts_do_not_depend_on_how_many_are_asked_at_once(
    lm: LocalModel, tmp_path: Path, ahead: int
) -> None:
    rows = [*MIXED, "nonsense", *MIXED, {"prompt": "x" * 95}, *MIXED]
    found = answers(lm, tmp_path, rows, ahead=ahead)
    assert found == answers(lm, tmp_path, rows, ahead=5)
    assert [i for i, line in enumerate(found) if line.get("error")] == [7, 15]
    assert "exceed the context of 96 by 3" in found[15]["error"] and found[15]["row"] == 16


def test_the_engine_is_full_until_the_last_rows(
    lm: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row of eight is long: windows of 64 rows, which `complete` is asked for one after another, thin out."""
    rows = [{"prompt": "a", "max_tokens": 64 if i % 8 == 0 else 2, "ignore_eos": True} for i in range(320)]
    passes, read = [0], lm.engine.reader.read

    def counted(pieces: Any) -> Any:
        passes[-1] += 1
        return read(pieces)

    monkeypatch.setattr(lm.engine.reader, "read", counted)
    found = answers(lm, tmp_path, rows)
    passes.append(0)
    for start in range(0, 320, 64):
        window = [SAMPLING.replace(max_new_tokens=row["max_tokens"], ignore_eos=True) for row in rows[start:][:64]]
        lm.complete(["a"] * 64, window)
    assert sum(line["completion_tokens"] for line in found) == 40 * 64 + 280 * 2
    needed = (40 * 64 + 280 * 2) / lm.engine.config.max_batch
    assert passes[0] < min(1.5 * needed, 0.8 * passes[1]), (passes, needed)


def rows_of(count: int) -> Iterator[Row]:
    for i in range(count):
        row = read(i + 1, json.dumps({"prompt": str(i)}).encode(), SAMPLING)
        assert not isinstance(row, dict)
        yield row


def test_no_more_is_kept_for_a_row_that_takes_long_than_was_said() -> None:
    class Stubborn(Counting):
        """Answers the first row when nothing else is left to answer."""

        def answers(self) -> dict[int, Completion]:
            number = max(self.waiting, default=None)
            return {} if number is None else {number: self.waiting.pop(number)}

    queue = Stubborn(width=2)
    pieces = InOrder(queue, rows_of(100), ahead=20).finished()
    first = next(pieces)
    assert len(queue.asked) == 20 == len(first)
    outcomes = [place.outcome for piece in (first, *pieces) for place in piece]
    assert [one.text for one in outcomes if isinstance(one, Completion)] == [f"<{i} 10>" for i in range(100)]


def test_rows_before_one_that_ends_the_job_are_told_of() -> None:
    class Failing(Counting):
        """Refuses the fifth row, and answers the others that it has begun only then."""

        def answers(self) -> dict[int, Any]:
            if 4 in self.waiting:
                return {4: self.waiting.pop(4) and RemoteError("gone", 503)}
            return super().answers()

        def stop(self) -> None:
            self.waiting = {number: one for number, one in self.waiting.items() if number < 4}

    kept: list[Any] = []
    with pytest.raises(RemoteError, match="gone; what was answered before is kept: run it again to go on") as caught:
        for places in InOrder(Failing(width=8), rows_of(50)).finished():
            kept += places
    assert [place.outcome.text for place in kept] == [f"<{i} 10>" for i in range(4)]
    assert caught.value.status == 503


def test_a_queue_has_the_engine_to_itself(lm: LocalModel, tmp_path: Path) -> None:
    pieces = lm.stream("a", Sampling(max_new_tokens=8, temperature=0.0, ignore_eos=True))
    next(pieces)
    with pytest.raises(InputError, match="other prompts are being answered; end them first"):
        lm.queue()
    pieces.close()
    queue = lm.queue()
    queue.ask(0, "a", Sampling(max_new_tokens=8))
    queue.stop()
    assert lm.engine.idle and queue.answers() == {}


def test_a_row_that_asks_for_no_tokens_gets_none(lm: LocalModel, tmp_path: Path) -> None:
    found = answers(lm, tmp_path, [{"prompt": "a", "max_tokens": 0}, {"prompt": "b"}])
    assert (found[0]["completion"], found[0]["completion_tokens"], found[0]["prompt_tokens"]) == ("", 0, 1)
    assert found[1]["completion_tokens"] > 0


BAD: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "row 3: not JSON"),
    "no object": ("[1]", "row 3: of type list; accepted: an object"),
    "twice": ('{"prompt": "a", "prompt": "b"}', "row 3: not JSON that can be read: key 'prompt' twice"),
    "no UTF-8": ('{"prompt": "\udcff"}', "row 3: byte 13 is not UTF-8"),
    "deep": ("[" * 100_000, "row 3: not JSON"),
    "deep value": ('{"prompt": "a", "seed": ' + "[" * 900 + "]" * 900 + "}", "row 3: "),
    "nothing": ({}, "row 3: keys none; accepted: prompt or messages, and max_new_tokens, "),
    "misspelt": ({"prompt": "a", "temprature": 1}, "row 3: keys 'temprature'; accepted: prompt or messages"),
    "both": ({"prompt": "a", "messages": HELLO}, "row 3: keys 'prompt', 'messages'; accepted"),
    "prompt": ({"prompt": 5}, "row 3: prompt is 5; a list of messages"),
    "null": ({"prompt": None}, "row 3: prompt is None; a list of messages"),
    "no messages": ({"messages": []}, "row 3: messages is []; a list of messages"),
    "text for messages": ({"messages": "hi"}, "row 3: messages is 'hi'; a list of messages"),
    "message": ({"messages": [{"role": "user", "text": "x"}]}, "row 3: messages[0]: has the key 'text'"),
    "type": ({"prompt": "a", "temperature": "hot"}, "row 3: sampling: temperature is 'hot'; expected float"),
    "truth": ({"prompt": "a", "top_k": True}, "row 3: sampling: top_k is True; expected int"),
    "range": ({"prompt": "a", "top_p": 2}, "row 3: sampling: top_p=2; it must be above 0"),
    "large": ({"prompt": "a", "temperature": LARGEST + 1}, "row 3: temperature is 9223372036854775808; a number of at"),
    "object": ({"prompt": "a", "stop": {"type": "core.config:Config"}}, "row 3: stop is {"),
    "biases": ({"prompt": "a", "logit_bias": {"x": 1}}, "row 3: sampling: logit_bias is (('x', 1),); expected"),
    "stops": ({"prompt": "a", "stop": ["b", 1]}, "row 3: sampling: stop is ('b', 1); expected"),
    "two limits": ({"prompt": "a", "max_tokens": 1, "max_new_tokens": 1}, "row 3: the same is said twice: max_new"),
    "not a number": ('{"prompt": "a", "top_p": NaN}', "row 3: holds NaN or Infinity"),
    "surrogate": ('{"prompt": "a", "id": "\\ud800"}', "row 3: holds half a surrogate pair"),
    "envelope": (
        {"custom_id": "a", "body": {"prompt": "a"}, "prompt": "b"},
        "row 3: keys 'prompt'; accepted: custom_id",
    ),
    "no name": ({"body": {"prompt": "a"}}, "row 3: custom_id is None, body {'prompt': 'a'}; text and an object"),
    "no body": ({"custom_id": "a", "body": "b"}, "row 3: custom_id is 'a', body 'b'; text and an object"),
    "tools": ({"custom_id": "a", "body": {"messages": HELLO, "tools": []}}, "row 3: keys 'tools'; accepted: prompt or"),
    "another route": (
        {"custom_id": "a", "url": "/v1/embeddings", "body": {"prompt": "a"}},
        "row 3: url is '/v1/embeddings'; accepted: /v1/chat/completions, /v1/completions",
    ),
    "no route": ({"custom_id": "a", "url": ["x"], "body": {"prompt": "a"}}, "row 3: url is ['x']; accepted"),
    "other route": (
        {"custom_id": "a", "url": "/v1/chat/completions", "body": {"prompt": "a"}},
        "row 3: url is /v1/chat/completions, which asks with messages; body has none",
    ),
    "method": ({"custom_id": "a", "method": "GET", "body": {"prompt": "a"}}, "row 3: method is 'GET'; only POST"),
    "format": (
        {"custom_id": "a", "body": {"prompt": "a", "response_format": {"type": "json_schema"}}},
        "row 3: response_format is {'type': 'json_schema'}; accepted: {",
    ),
    "no format": (
        {"custom_id": "a", "body": {"prompt": "a", "response_format": 5}},
        "row 3: response_format is 5; acc",
    ),
    "format and regex": (
        {"custom_id": "a", "body": {"prompt": "a", "response_format": {"type": "json_object"}, "regex": "a"}},
        "row 3: sampling: regex='a'; it must be alone",
    ),
    "several": ({"custom_id": "a", "body": {"prompt": "a", "n": 2}}, "row 3: body.n is 2; only 1 is accepted"),
    "empty": ({"prompt": "a" * 90, "max_tokens": 50}, "row 3: prompt of 90 tokens and max_new_tokens=50 exceed"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_gets_one_line_and_the_others_their_answers(lm: LocalModel, tmp_path: Path, name: str) -> None:
    row, message = BAD[name]
    (tmp_path / "in.jsonl").write_bytes(
        b'{"prompt": "a"}\n\n%b\n{"prompt": "b"}\n'
        % (row if isinstance(row, str) else json.dumps(row)).encode("utf-8", "surrogateescape")
    )
    done = job.run(lm, tmp_path / "in.jsonl", tmp_path / "out.jsonl", SAMPLING, quiet=True)
    first, bad, last = lines(tmp_path / "out.jsonl")
    assert (done.rows, done.errors) == (3, 1) and first["prompt"] == "a" and last["prompt"] == "b"
    said = bad["error"]["message"] if "custom_id" in bad else bad["error"]
    assert said.startswith(message) and "\n" not in said and len(said) < 500
    assert bad.get("row", 3) == 3 and bad.get("custom_id", "a") == "a" and bad.get("response") is None


def test_a_body_says_what_openais_says(lm: LocalModel, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"k": {"const": 1}}, "required": ["k"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "k", "strict": True, "schema": schema}}
    asked = {"messages": HELLO, "response_format": form, "user": "me", "store": False, "max_tokens": 60}
    plain = {"prompt": "a", "response_format": {"type": "text"}}
    rows = [
        {"custom_id": "a", "url": "/v1/chat/completions", "method": "POST", "body": asked},
        {"custom_id": "b", "url": "/v1/completions", "body": plain},
    ]
    held, free = answers(lm, tmp_path, rows)
    (choice,) = held["response"]["body"]["choices"]
    assert json.loads(choice["message"]["content"]) == {"k": 1}
    assert free["response"]["body"]["choices"][0]["text"] == lm.complete(["a"], SAMPLING.replace(seed=11))[0].text
    row = read(
        1,
        json.dumps({"custom_id": "c", "body": plain | {"response_format": {"type": "json_object"}}}).encode(),
        SAMPLING,
    )
    assert not isinstance(row, dict) and json.loads(row.sampling.json_schema) == {"type": "object"}
    for held_all in (SAMPLING.replace(json_schema="{}"), SAMPLING.replace(regex="a")):  # what a row says goes before
        row = read(1, json.dumps({"custom_id": "c", "body": plain}).encode(), held_all)
        assert not isinstance(row, dict) and row.sampling == SAMPLING


def test_a_line_of_many_megabytes_is_refused_alone(lm: LocalModel, tmp_path: Path) -> None:
    long = '{"prompt": "' + "x" * jsonl.LONGEST + '"}'
    found = answers(lm, tmp_path, [{"prompt": "a"}, long, {"prompt": "b"}])
    assert [line.get("prompt") for line in found] == ["a", None, "b"]
    assert found[1]["error"] == f"row 2: longer than {jsonl.LONGEST} bytes"


def test_rows_that_nobody_wrote_are_answered_or_refused_in_one_line() -> None:
    source = random.Random(0)
    good = json.dumps(MIXED[2]).encode()
    for _ in range(2000):
        damaged = bytearray(good)
        for _ in range(source.randint(1, 4)):
            damaged[source.randrange(len(damaged))] = source.randrange(256)
        row = read(1, bytes(damaged), SAMPLING)
        if isinstance(row, dict):
            assert json.dumps(row, ensure_ascii=False).encode() and "\n" not in row["error"]


class Counting:
    """A model, and its queue, that answers with what it was asked, and stops being well after so many answers."""

    name = "counting"

    def __init__(self, answers: int | None = None, width: int = 4) -> None:
        self.asked: list[Turns] = []
        self.left, self.width = answers, width
        self.waiting: dict[int, Completion] = {}

    def queue(self) -> Counting:
        return self

    def ask(self, number: int, prompt: Turns, sampling: Sampling) -> None:
        self.asked.append(prompt)
        self.waiting[number] = Completion(f"<{prompt} {sampling.seed}>", "stop", 1, 1)

    def answers(self) -> dict[int, Completion]:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left = None if self.left is None else self.left - 1
        return dict([self.waiting.popitem()]) if self.waiting else {}

    def stop(self) -> None:
        self.waiting = {}


def test_a_job_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    source, target = written(tmp_path / "in.jsonl", [{"prompt": str(i)} for i in range(50)]), tmp_path / "out.jsonl"
    whole = answers(Counting(), tmp_path, [{"prompt": str(i)} for i in range(50)])
    target.unlink()
    stopped = Counting(answers=24, width=1)
    with pytest.raises(KeyboardInterrupt):
        job.run(stopped, source, target, SAMPLING, ahead=1, quiet=True)
    assert not target.exists() and len(lines(tmp_path / "out.jsonl.partial" / "answers.jsonl")) == 24
    later = Counting()
    done = job.run(later, source, target, SAMPLING, quiet=True)
    assert (done.resumed, done.rows, done.completion_tokens) == (24, 50, 26)
    assert later.asked == [str(i) for i in range(24, 50)] and lines(target) == whole
    assert whole[7]["completion"] == "<7 17>"


def test_half_a_line_that_a_kill_left_is_dropped_wherever_it_was_cut(tmp_path: Path) -> None:
    rows = [{"prompt": "é" * i} if i % 5 else "bad" for i in range(1, 12)]
    whole = answers(Counting(), tmp_path, rows)
    data = (tmp_path / "out.jsonl").read_bytes()
    for cut in range(0, len(data), 23):
        (tmp_path / "out.jsonl").unlink()
        with pytest.raises(KeyboardInterrupt):
            job.run(Counting(answers=0), tmp_path / "in.jsonl", tmp_path / "out.jsonl", SAMPLING, quiet=True)
        (tmp_path / "out.jsonl.partial" / "answers.jsonl").write_bytes(data[:cut])
        done = job.run(Counting(), tmp_path / "in.jsonl", tmp_path / "out.jsonl", SAMPLING, quiet=True)
        assert (tmp_path / "out.jsonl").read_bytes() == data
        assert done.resumed == data[:cut].count(b"\n")
        assert done.errors == sum("error" in line for line in whole) == 2


def test_another_job_does_not_go_on_with_this_ones_answers(tmp_path: Path) -> None:
    source, target = written(tmp_path / "in.jsonl", [{"prompt": "a"}]), tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        job.run(Counting(answers=0), source, target, SAMPLING, quiet=True)
    with pytest.raises(InputError, match="is of a job with another sampling; remove it"):
        job.run(Counting(), source, target, SAMPLING.replace(seed=11), quiet=True)
    written(source, [{"prompt": "b"}])
    with pytest.raises(InputError, match="is of a job with another input; remove it"):
        job.run(Counting(), source, target, SAMPLING, quiet=True)
    written(source, [{"prompt": "a"}])
    job.run(Counting(), source, target, SAMPLING, quiet=True)
    with pytest.raises(InputError, match=r"out\.jsonl is there already; remove it, or name another file"):
        job.run(Counting(), source, target, SAMPLING, quiet=True)
    with pytest.raises(InputError, match=r"missing\.jsonl: No such file"):
        job.run(Counting(), tmp_path / "missing.jsonl", tmp_path / "new.jsonl", SAMPLING, quiet=True)


def test_two_processes_do_not_work_at_one_job(tmp_path: Path) -> None:
    class Nested(Counting):
        def queue(self) -> Counting:
            script = (
                "import sys; from test_job import Counting, Path, SAMPLING, job\n"
                "job.run(Counting(), Path(sys.argv[1]), Path(sys.argv[2]), SAMPLING, quiet=True)"
            )
            command = [sys.executable, "-c", script, str(source), str(target)]
            self.other = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
            return self

    source, target = written(tmp_path / "in.jsonl", [{"prompt": "a"}]), tmp_path / "out.jsonl"
    lm = Nested()
    job.run(lm, source, target, SAMPLING, quiet=True)
    assert "another process is at this job" in lm.other.stderr and len(lines(target)) == 1


def test_killed_again_and_again_it_leaves_what_one_run_would(folder: Path, tmp_path: Path) -> None:
    """kill -9 while rows are answered, twice; then this process goes on."""
    rows = [{"prompt": f"row {i}", "max_tokens": 1 + i % 8} if i % 50 else "bad" for i in range(1500)]
    source, target = written(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    slow = (
        "import time; from allyouneed import cli; from allyouneed.generate.local_queue import LocalQueue\n"
        "quick = LocalQueue.answers\n"
        "LocalQueue.answers = lambda self: time.sleep(0.03) or quick(self)\n"
        "cli.main()"
    )
    command = [sys.executable, "-c", slow, "generate", str(folder), str(source), str(target), "--seed", "3"]
    partial = tmp_path / "out.jsonl.partial" / "answers.jsonl"
    for _ in range(2):
        before = partial.stat().st_size if partial.exists() else 0
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (partial.exists() and partial.stat().st_size > before + 8000):
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not target.exists() and partial.stat().st_size > before
    lm, sampling = ayn.load(str(folder)), Sampling(temperature=0.7, seed=3)
    done = job.run(lm, source, target, sampling, quiet=True)
    assert done.rows == 1500 and done.errors == 30 and done.resumed >= 128
    job.run(lm, source, tmp_path / "whole.jsonl", sampling, quiet=True)
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def echo(path: str, body: Any) -> Reply:
    usage = {"prompt_tokens": 1, "completion_tokens": body["max_tokens"]}
    asked = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
    if asked == "poison":
        return Reply({"error": {"message": "flagged"}}, 400)
    said = {"text": asked.upper()} if "prompt" in body else {"message": {"content": asked.upper()}}
    return Reply({"choices": [said | {"finish_reason": "length"}], "usage": usage})


def test_a_remote_model_is_asked_once_for_each_row_bad_ones_too(tmp_path: Path) -> None:
    rows = [{"prompt": "poison" if i in (3, 40) else f"p{i}"} for i in range(60)]
    rows[7] = {"messages": [{"role": "user", "content": "m7"}]}
    rows[9] = {"prompt": "p9", "regex": "a+"}
    with asking(echo) as (lm, server):
        found = answers(lm, tmp_path, rows)
        asked = [body["prompt"] for body in server.bodies()]
    assert [line.get("completion") for line in found[8:12]] == ["P8", None, "P10", "P11"]
    assert found[7]["messages"][-1] == {"role": "assistant", "content": "M7"}
    assert found[9].pop("error").startswith("row 10: regex: endpoints have no common field for it")
    assert [line["error"] for line in found if "error" in line] == [
        f"row {n}: http://127.0.0.1:{server.server_port}/v1: 400 flagged" for n in (4, 41)
    ]
    assert sorted(asked) == sorted([f"p{i}" for i in range(60) if i not in (3, 7, 9, 40)] + ["poison"] * 2)


def test_a_row_that_takes_too_long_is_refused_alone(tmp_path: Path) -> None:
    over = threading.Event()

    def slow(path: str, body: Any) -> Reply:
        if path != "/v1/models" and body["prompt"] == "long":
            over.wait(20)
        return echo(path, body) if path != "/v1/models" else Reply({"data": []})

    with asking(slow, timeout=2.0) as (lm, server):
        found = answers(lm, tmp_path, [{"prompt": "a"}, {"prompt": "long"}, {"prompt": "b"}])
        assert [line.get("completion") for line in found] == ["A", None, "B"]
        assert "no answer within 2 s, though the server is well" in found[1]["error"]
        assert sum(body["prompt"] == "long" for body in server.bodies()) == 1
        over.set()


def test_a_fleet_works_at_a_job(tmp_path: Path) -> None:
    with fleet_of(echo, lambda path, body: None, echo) as (lm, servers, _):
        found = answers(lm, tmp_path, [{"prompt": f"p{i}"} for i in range(100)])
        assert [line["completion"] for line in found] == [f"P{i}" for i in range(100)]
        assert len(servers[0].bodies()) >= 8 and len(servers[2].bodies()) >= 8  # as many as go to each at once


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (401, AccessError, "set OPENAI_API_KEY"),
        (500, RemoteError, "what was answered before is kept: run it again to go on"),
        (403, RemoteError, "what was answered before is kept: run it again to go on"),
    ],
)
def test_what_is_no_rows_fault_ends_the_job(tmp_path: Path, status: int, kind: type[Exception], message: str) -> None:
    well = [True]

    def failing(path: str, body: Any) -> Reply:
        return echo(path, body) if well[0] or body["prompt"] < "p10" else Reply({"error": "no"}, status)

    source, target = written(tmp_path / "in.jsonl", [{"prompt": f"p{i}"} for i in range(30)]), tmp_path / "out.jsonl"
    with asking(failing, retries=1) as (lm, _):
        well[0] = False
        with pytest.raises(kind, match=message):
            job.run(lm, source, target, SAMPLING, ahead=2, quiet=True)
        assert len(lines(tmp_path / "out.jsonl.partial" / "answers.jsonl")) == 2
        well[0] = True
        assert job.run(lm, source, target, SAMPLING, quiet=True).resumed == 2
    assert [line["completion"] for line in lines(target)] == [f"P{i}" for i in range(30)]


def test_the_command_tells_files_from_prompts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "in.jsonl", [{"prompt": "a"}, "bad"])
    assert main(["generate", str(folder), "in.jsonl", "out.jsonl", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("out.jsonl: 2 rows, 1 with an error; 2 tokens in ")
    for arguments in (["in.jsonl"], ["in.jsonl", "tell me"], ["a", "in.jsonl", "out.jsonl"]):
        assert main(["generate", str(folder), *arguments]) == 2
        assert (
            capsys.readouterr().err
            == "error: in.jsonl is a file: write IN.jsonl OUT.jsonl, the rows and where their answers go\n"
        )
    assert main(["generate", str(folder), "read data.jsonl", "--max-new-tokens", "2"]) == 0
    assert main(["generate", str(folder), "a", "b", "--max-new-tokens", "2"]) == 0
    assert main(["generate", str(folder), "in.jsonl", "out.jsonl"]) == 2
    assert "out.jsonl is there already" in capsys.readouterr().err
