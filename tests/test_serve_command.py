"""`allyouneed serve` as a process: what it refuses before a model is loaded, what it prints, and how it ends."""

from __future__ import annotations

import copy
import json
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from adapters import with_adapters
from serving import module, tiny, tokenizer

import allyouneed as ayn
from allyouneed import cli
from allyouneed.commands.serving import _tell_room
from allyouneed.models import llama
from allyouneed.models.checkpoints.adapters import save_adapter
from allyouneed.serve.assembly import assemble
from allyouneed.serve.settings import Settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    ayn.save(module(), folder, tokenizer())
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, folder):
    """Two adapters of the small model in PEFT's layout."""
    made = with_adapters(copy.deepcopy(module()))
    found = {name: tmp_path_factory.mktemp(name) for name in ("narrow", "deep")}
    for name, path in found.items():
        save_adapter(made, path, name, base=str(folder))
    return found


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
        (["--adapter", "sql"], "--adapter sql: write NAME=FOLDER"),
        (["--adapter", "a=x", "--adapter", "a=y"], "--adapter a=y: is there twice"),
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


def test_adapters_that_do_not_fit_are_refused(capsys, folder, adapters, tmp_path):
    def refused(base, adapter):
        assert cli.main(["serve", str(base), "--port", "0", "--adapter", f"x={adapter}"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert str(tmp_path / "none") in refused(folder, tmp_path / "none")
    other = llama.architecture(
        vocab_size=tokenizer().vocab_size, context=64, dim=64, num_layers=2, num_heads=4, tied=True
    )
    ayn.save(other.build(), tmp_path / "other", tokenizer())
    assert str(adapters["deep"]) in refused(tmp_path / "other", adapters["deep"])


def test_adapters_and_packed_weights_of_folders_answer_by_name(folder, adapters):
    given = [word for name, path in adapters.items() for word in ("--adapter", f"{name}={path}")]
    command = [sys.executable, "-m", "allyouneed", "serve", str(folder), "--port", "0", "--name", "small", *given]
    with subprocess.Popen([*command, "--quantize", "int8"], stdout=subprocess.PIPE, text=True) as process:
        try:
            url = process.stdout.readline().split()[3]
            names = [model["id"] for model in httpx.get(f"{url}/models").json()["data"]]
            assert names == ["small", "small:narrow", "small:deep"]
            lm = ayn.load(folder, quantize="int8", adapters=adapters)
            asked = {"max_new_tokens": 12, "temperature": 0.0, "ignore_eos": True}
            wanted = [
                one.generate(["The"], **asked)[0] for one in (lm, lm.with_adapter("narrow"), lm.with_adapter("deep"))
            ]
            body = {"prompt": "The", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
            found = [httpx.post(f"{url}/completions", json=body | {"model": name}).json() for name in names]
            assert [one["choices"][0]["text"] for one in found] == wanted
            assert len(set(wanted)) == 3
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)


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
