"""The command line: what it prints, how it fails, how little it imports."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import ClassVar

import pytest

from allyouneed import cli
from allyouneed.core.errors import InputError
from allyouneed.core.workers import in_turn
from allyouneed.papers import runner
from allyouneed.train.interrupts import Stopped

HEAVY = ("torch", "numpy", "matplotlib", "httpx", "rich", "transformers", "tokenizers", "huggingface_hub", "gguf")


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(arguments)
    told = capsys.readouterr()
    return code, told.out, told.err


def test_list_shows_all_papers_within_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns in (40, 80, 100, 300):
        monkeypatch.setenv("COLUMNS", str(columns))
        code, out, err = run("list", capsys=capsys)
        rows = [line for line in out.splitlines() if line[:3].strip().isdigit() and line[3:5] == "  "]
        assert (code, err, len(rows)) == (0, "", 51) and "\x1b" not in out
        assert max(map(len, out.splitlines())) <= min(max(columns, 80), 120)
        assert out.index("attention") < out.index("alibi") < out.index("flash_attention") < out.index("whisper")


def test_list_as_json_is_the_public_list(capsys: pytest.CaptureFixture[str]) -> None:
    import allyouneed

    code, out, _ = run("list", "--json", capsys=capsys)
    listed = json.loads(out)
    assert code == 0 and len(listed) == 51
    assert [entry["slug"] for entry in listed] == [entry.slug for entry in allyouneed.papers()]
    assert listed[18]["url"] == "https://arxiv.org/abs/2108.12409" and listed[18]["state"] in ("built", "not built")


def test_show_says_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("show", "whisper", capsys=capsys)
    assert code == 0 and "Robust Speech Recognition" in out and "https://arxiv.org/abs/2212.04356" in out


def test_materials_are_listed_and_found(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run("materials", capsys=capsys)
    assert code == 0 and "smollm2-135m-instruct" in out and "Apache-2.0" in out
    (tmp_path / "mine.gguf").touch()
    assert run("materials", str(tmp_path / "mine.gguf"), capsys=capsys) == (0, f"{tmp_path / 'mine.gguf'}\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lst"], "Did you mean 'list'?"),
        (["run", "alibi", "--sise", "smoke"], "--size"),
        (["list", "--nothing"], "allyouneed list --help"),
        (["run"], "Missing argument 'SLUG'"),
        (["run", "alibi", "--seeds", "many"], "Invalid value for '--seeds'"),
        (["show", "alibbi"], "unknown paper 'alibbi'; did you mean 'alibi'?"),
        (["run", "wisper"], "unknown paper 'wisper'; did you mean 'whisper'?"),
        (["materials", "smolm2-135m-instruct"], "did you mean 'smollm2-135m-instruct'?"),
        (["publish"], "either a paper's name or --pages"),
        (["publish", "alibi", "--pages"], "either a paper's name or --pages"),
    ],
)
def test_mistakes_cost_one_line_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(*arguments, capsys=capsys)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and words.lower() in err.lower()


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (InputError("a.json: line 3\nis not JSON"), 2, "error: a.json: line 3 is not JSON\n"),
        (KeyboardInterrupt(), 130, "stopped; run again to resume\n"),
        (Stopped(signal.SIGTERM, "saved at step 7"), 143, "stopped; run again to resume (SIGTERM: saved at step 7)\n"),
        (OSError(28, "No space left on device", "x.bin"), 1, "error: no space left for x.bin; "),
    ],
)
def test_what_goes_wrong_inside_a_command(
    raised: BaseException, code: int, line: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(*arguments: object, **options: object) -> None:
        raise raised

    monkeypatch.setattr(runner, "run", fail)
    found, _, err = run("run", "alibi", capsys=capsys)
    assert found == code and err.strip().startswith(line.strip()) and "Traceback" not in err


def test_bugs_of_ours_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "run", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", "alibi"])


def test_options_of_run_reach_the_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    monkeypatch.setattr(runner, "run", lambda slug, size, **options: seen.update(options, slug=slug, size=size))
    line = "run alibi --size smoke --seeds 2 --set a.b=1 --set c=x,y --out there --fresh"
    assert cli.main(line.split()) == 0
    assert seen.pop("out").name == "there" and seen.pop("workers") is in_turn
    assert seen == {"slug": "alibi", "size": "smoke", "seeds": 2, "overrides": ["a.b=1", "c=x,y"], "fresh": True}


@pytest.mark.parametrize(
    "command", [[], ["--help"], ["list"], ["list", "--json"], ["show", "whisper"], ["run", "--help"], ["materials"]]
)
def test_light_commands_import_nothing_heavy(command: list[str]) -> None:
    script = f"""
import sys
from allyouneed.cli import main
code = main({command!r})
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "[]\n") and done.stdout


def test_importing_the_package_imports_nothing_but_itself() -> None:
    script = "import sys, allyouneed; print(sorted(n for n in sys.modules if n.startswith('allyouneed')))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "['allyouneed']\n"


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m allyouneed list --json"
    for enough in (["head", "-c", "1"], ["true"]):
        first = subprocess.Popen(command.split(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        subprocess.run(enough, stdin=first.stdout, stdout=subprocess.DEVNULL)
        assert first.stdout is not None and first.stderr is not None
        first.stdout.close()
        assert first.stderr.read() == b""
        first.stderr.close()
        assert first.wait() in (0, 1)


class Keyboard:
    """Standard input for the code that asks what it is."""

    def __init__(self, terminal: bool) -> None:
        self.isatty, self.fileno = (lambda: terminal), (lambda: -1)


def test_chat_goes_on_wherever_ctrl_c_comes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from allyouneed.commands import chatting

    heard: list[str] = []

    class Talk:
        def hear(self, message: str) -> None:
            heard.append(message)
            if len(heard) == 1:
                raise KeyboardInterrupt

    for terminal in (True, False):
        heard.clear()
        said = iter(["one", "two", None])
        monkeypatch.setattr(chatting, "_read_message", lambda descriptor, said=said: next(said))
        monkeypatch.setattr("sys.stdin", Keyboard(terminal))
        with nullcontext() if terminal else pytest.raises(KeyboardInterrupt):
            chatting.converse(Talk())
        assert heard == ["one", "two"][: 1 + terminal]
        assert capsys.readouterr().out == ("\n> \n(Ctrl-D ends)\n> \n> \n" if terminal else "")


def test_chat_keeps_what_was_said_and_unsays_what_was_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from allyouneed.commands import chatting
    from allyouneed.generate import load

    class Model:
        asked: ClassVar[list[list[str]]] = []

        def chat_stream(self, messages: list[dict[str, str]], sampling: object) -> Iterator[str]:
            self.asked.append([message["content"] for message in messages])
            if messages[-1]["content"] == "too long":
                raise InputError("prompt exceeds the context by 7")
            yield from ("yes", "!")

    monkeypatch.setattr(load, "load", lambda name, **options: Model())
    said = iter(["hello", "too long", "again", None])
    monkeypatch.setattr(chatting, "_read_message", lambda descriptor: next(said))
    monkeypatch.setattr("sys.stdin", Keyboard(terminal=False))
    code, out, err = run("chat", "--system", "be brief", capsys=capsys)
    assert (code, err) == (0, "error: prompt exceeds the context by 7\n") and out.count("yes!") == 2
    assert Model.asked[-1] == ["be brief", "hello", "yes!", "again"]


def test_an_error_is_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    class Stderr:
        write = staticmethod(written.append)

    monkeypatch.setattr("sys.stderr", Stderr())
    assert cli.main(["run", "nothing-of-ours"]) == 2
    (line,) = written  # or the lines of two ranks run into each other
    assert line.startswith("error: ") and line.endswith("\n")


def test_laws_stand_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("laws", "--compute", "1e21", capsys=capsys)
    assert code == 0 and max(map(len, out.splitlines())) <= 120
    for row in (
        ("Kaplan", "4.68 B", "2.43", "5.37", "1.86"),  # 4.68 and 2.86: Hoffmann et al. 2022, sec. D.4; L: eq. 1.3
        ("Hoffmann 1", "2.86 B", "3.15", "3.18"),
        ("Hoffmann 2", "2.82 B", "3.09", "3.24"),
        ("Hoffmann 3", "2.22 B", "2.86", "3.50"),
        ("Besiroglu", "2.78 B", "3.26", "3.07"),
    ):
        (line,) = [line for line in out.splitlines() if line.startswith(row[0])]
        assert all(cell in line for cell in row)


def test_laws_as_json_say_what_follows_from_two_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("laws", "--parameters", "70e9", "--tokens", "1.4e12", "--json", capsys=capsys)
    told = json.loads(out)
    assert code == 0 and [row["law"] for row in told["yours"]] == ["Kaplan", "Hoffmann 3", "Besiroglu"]
    assert all(row["compute"] == 6 * 70e9 * 1.4e12 and row["tokens_per_parameter"] == 20 for row in told["yours"])
    assert told["yours"][1]["loss"] == round(
        1.69337368 + 406.401018 / 70e9**0.33917084 + 410.722827 / 1.4e12**0.2849083, 4
    )
    assert [row["at_convergence"] for row in told["yours"]] == [True, False, False]
    shown = run("laws", "--parameters", "70e9", "--tokens", "1.4e12", capsys=capsys)[1]
    assert shown.count("Kaplan, at convergence ") == 1
    assert len(told["laws"]) == 5 and all(row["source"] for row in told["laws"])
    alone = json.loads(run("laws", "--compute", "1e21", "--parameters", "1e9", "--json", capsys=capsys)[1])
    assert alone["yours"][0]["tokens"] == 1e21 / 6e9
    table3 = json.loads(run("laws", "--parameters", "1e12", "--json", capsys=capsys)[1])["laws"][1]
    assert abs(table3["compute"] / 1.27e26 - 1) < 0.01 and abs(table3["tokens"] / 21.2e12 - 1) < 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one or two of --compute, --parameters and --tokens"),
        (("--compute", "1e3"), "compute=1000: by the law 'Kaplan' that is for"),
        (("--parameters", "1e200"), "parameters=1e+200: the compute for it is more than the largest number there is"),
        (("--parameters", "1e200", "--tokens", "1e200"), "parameters=1e+200, tokens=1e+200: C = 6ND leaves no number"),
        (("--compute", "1e21", "--parameters", "1e308"), "compute=1e+21, parameters=1e+308: C = 6ND leaves no number"),
        (("--tokens", "-5"), "tokens=-5; it must be a finite number above 0"),
        (("--compute", "nan", "--tokens", "1e9"), "compute=nan; it must be a finite number above 0"),
        (("--compute", "lots"), "Invalid value for '--compute'"),
    ],
)
def test_laws_refuse_in_one_line(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("laws", *arguments, capsys=capsys)
    assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1


def test_jobs_go_nowhere_without_an_address(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run("run", "alibi", "--ray", "there", "--out", str(tmp_path), capsys=capsys)
    assert (code, out) == (2, "") and err == "error: ray: 'there' is no address; write local, auto or HOST:PORT\n"
    assert not any(tmp_path.iterdir())
