"""`allyouneed serve` as a process: what it refuses before a model is loaded, what it prints, and how it ends."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from serving import module, tiny, tokenizer

import allyouneed as ayn
from allyouneed import cli
from allyouneed.commands.serving import _tell_room
from allyouneed.serve.assembly import assemble
from allyouneed.serve.settings import Settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    ayn.save(module(), folder, tokenizer())
    return folder


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 is open to other machines; set --api-key, or listen on 127.0.0.1"),
        (["--port", "70000"], "--port 70000: it must be between 0"),
        (["--host", "203.0.113.7", "--api-key", "k"], "--host 203.0.113.7 --port 8000"),
        (["--context", "0"], "--context 0: it must be above 0"),
        (["--timeout", "0"], "--timeout 0.0: it must be above 0"),
        (["--max-batch", "0"], "max_batch=0; at least 1 is needed"),
        (["--api-key", ""], "--api-key holds"),
        (["--lookup", "--early-exit", "2"], "choose one of them"),
    ],
)
def test_refused_before_anything_is_loaded(capsys, arguments, said):
    assert cli.main(["serve", "no-such-model", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_refused_with_the_model(capsys, folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert cli.main(["serve", str(folder), "--port", str(taken.getsockname()[1])]) == 2
        assert "Address already in use; choose another" in capsys.readouterr().err
    assert cli.main(["serve", str(folder), "--port", "0", "--context", "5000"]) == 2
    assert "--context 5000: " in capsys.readouterr().err
    assert cli.main(["serve", str(folder), "--port", "0", "--context", "400", "--blocks", "8"]) == 2
    assert "--context 400: the blocks of the cache hold 128 tokens; raise --blocks" in capsys.readouterr().err


def test_fewer_blocks_than_a_context_are_told(capsys):
    _tell_room(assemble(tiny(blocks=4), Settings()))
    assert "tiny: a request has 64 tokens at most, as many as all blocks hold, of 512" in capsys.readouterr().err
    _tell_room(assemble(tiny(), Settings()))
    _tell_room(assemble(tiny(blocks=4), Settings(context=60)))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 0)])
def test_told_to_stop_it_finishes_what_is_under_way(folder, sent, code):
    command = [sys.executable, "-m", "allyouneed", "serve", str(folder), "--port", "0", "--name", "small", "--lookup"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        said = process.stdout.readline()
        assert said.startswith("small answers at http://127.0.0.1:")
        url = said.split()[3]
        body = {"prompt": "The", "max_tokens": 500, "stream": True, "ignore_eos": True, "temperature": 0}
        with httpx.stream("POST", f"{url}/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(sent)
            events = [line[6:] for line in lines if line.startswith("data: ")]
        assert events[-1] == "[DONE]" and json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
        assert process.wait(20) == code
        assert "Traceback" not in process.stderr.read()
