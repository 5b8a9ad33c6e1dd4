"""`finetune --method ppo|rejection`: what they learn, leave behind and refuse; rollouts by other processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_policy import PROMPTS, REWARD, TOKENIZER, policy, rollouts, settings
from tiny_run import same, untimed

from allyouneed import cli
from allyouneed.align import actors, kept, references
from allyouneed.align.held_out import HeldOut
from allyouneed.align.kept import KeptSampler
from allyouneed.align.rejection import Rejection
from allyouneed.align.samplers import LocalSampler
from allyouneed.core.errors import InputError
from allyouneed.core.metrics import MetricsLog, read
from allyouneed.generate.language_model import Sampling
from allyouneed.generate.load import load
from allyouneed.models.checkpoints.loading import load_decoder, save
from allyouneed.models.decoder import Decoder
from allyouneed.objectives.next_token import next_token
from allyouneed.train.loop import Trained, train

SMALL = """
def reward(prompt, completion):
    return sum("a" <= letter <= "z" for letter in completion) / max(len(completion), 1)
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A model, prompts, a reward and some text in one folder."""
    save(policy().model, tmp_path / "tiny", TOKENIZER)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS * 4))
    (tmp_path / "small.py").write_text(SMALL)
    (tmp_path / "text.jsonl").write_text('{"text": "some words to be kept in mind, and a few more"}\n' * 8)
    return tmp_path


def ending() -> Decoder:
    """A model of whose first eight tokens one or two are the end."""
    model = policy().model
    with torch.no_grad():
        model.embedding.weight[:, 0] += 1.0
        model.head.weight[TOKENIZER.eos_ids[0], 0] = 0.8
    return model


def finetune(files: Path, *arguments: object, capsys: pytest.CaptureFixture[str], out: str = "out") -> tuple[int, str]:
    given = (files / "tiny", files / "prompts.jsonl", "--out", files / out, "--max-new-tokens", 8, *arguments)
    code = cli.main(["finetune", *map(str, given)])
    told = capsys.readouterr()
    return code, told.out if code == 0 else told.err


def small(files: Path) -> tuple[object, ...]:
    return "--reward", files / "small.py", "--batch", 11, "--lr", "1e-2"


def test_ppo_raises_the_reward_and_keeps_decoder_critic_samples_and_a_log(files, capsys):
    text = ("--ptx", files / "text.jsonl", "--ptx-weight", 0.1)
    how = ("--method", "ppo", "--epochs", 8, "--passes", 4, "--samples", 44, "--kl-target", 3, *text)
    code, told = finetune(files, *how, *small(files), "--json", capsys=capsys)
    assert code == 0
    results = json.loads(told)
    assert results["reward"] > results["reward_before"] + 0.05
    assert abs(results["kl_before"]) < 1e-6 < results["kl"] and results["train"] == 44 and results["valid"] == 4
    assert isinstance(load_decoder(files / "out/model"), Decoder)
    assert set(load_file(files / "out/critic.safetensors")) == {"layer.weight", "layer.bias"}
    rows = list(read(files / "out/rollouts.jsonl"))
    assert len(rows) == 8 and max(row["engine_gap"] for row in rows) <= 1e-4 and rows[0]["beta"] == 0.02
    samples = [json.loads(line) for line in (files / "out/samples.jsonl").read_text().splitlines()]
    assert [list(row) for row in samples] == [["prompt", "before", "after", "reward_before", "reward_after"]] * 4
    mean = sum(row["reward_after"] for row in samples) / 4
    assert mean == pytest.approx(results["reward"])
    gain = mean - sum(row["reward_before"] for row in samples) / 4
    assert results["reward_gain"] == pytest.approx(gain)
    assert results["reward_gain_low"] <= gain <= results["reward_gain_high"]
    lm = load(files / "out/model")
    assert lm.generate([samples[0]["prompt"]], max_new_tokens=8, seed=0) != [samples[0]["before"]]
    assert "## " in (files / "out/samples.md").read_text()


def test_ppo_trains_adapters_alone(files, capsys):
    how = ("--method", "ppo", "--epochs", 1, "--lora", 2, "--lora-targets", "all-linear")
    assert finetune(files, *how, *small(files), capsys=capsys)[0] == 0
    assert (files / "out/model/adapter_model.safetensors").is_file()
    stored = load_file(next((files / "out/checkpoints").iterdir()) / "model.safetensors")
    assert all("adapters" in name or name.startswith("critic.") for name in stored)


def test_rejection_learns_from_its_best_answers(files, capsys):
    save(ending(), files / "tiny", TOKENIZER)
    how = ("--method", "rejection", "--epochs", 3, "--passes", 4, "--samples", 8)
    code, told = finetune(files, *how, *small(files), "--json", capsys=capsys)
    assert code == 0
    results, rows = json.loads(told), list(read(files / "out/rollouts.jsonl"))
    assert results["reward"] > results["reward_before"] + 0.05 and len(rows) == 3
    assert all(row["kept"] >= row["best"] > row["reward"] for row in rows)
    assert rows[0]["ended"] > 0.3 and rows[0]["better"] > 40 and rows[-1]["kept"] >= rows[0]["kept"]
    assert not (files / "out/critic.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--method", "ppo"), "--method ppo: --reward FILE.py, MODEL or URL says how good an answer is; add it"),
        (("--method", "sft", "--reward", "x.py"), "--max-new-tokens: sft has no use for it; leave it out"),
        (("--method", "rejection", "--reward", "x.py", "--kl", 1), "--kl: rejection has no use for it"),
        (("--method", "ppo", "--reward", "nowhere.py"), "nowhere.py: no such file"),
        (("--method", "ppo", "--reward", "{small}", "--kl-target", 0), "--kl-target 0.0; nats above 0 are needed"),
        (
            ("--method", "ppo", "--reward", "{small}", "--samples", 30),
            "--samples and --batch: rollouts.episodes=30 and minibatch=16; the one",
        ),
        (
            ("--method", "ppo", "--reward", "{small}", "--writers", 3),
            "--writers says how many cores of a cluster write",
        ),
        (
            ("--method", "ppo", "--reward", "{small}", "--ray", "here"),
            "ray: 'here' is no address; write local, auto or",
        ),
        (("--method", "ppo", "--reward", "{small}", "--ptx-weight", 1), "--ptx-weight says how much pretraining text"),
        (
            ("--method", "ppo", "--reward", "{small}", "--set", "mesh.shard=2"),
            "--method ppo: mesh splits the model, which writes answers whole on each rank; only mesh.data may be",
        ),
        (("--method", "ppo", "--reward", "{small}", "--passes", 0), "--passes 0; at least 1 is needed"),
        (("--method", "ppo", "--reward", "{small}", "--length", 9), "line 1: its 4 tokens and max_new_tokens=8 exceed"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(files, capsys, arguments, line):
    given = [str(x).replace("{small}", str(files / "small.py")) for x in arguments]
    code, told = finetune(files, *given, capsys=capsys)
    assert code == 2 and line in " ".join(told.split())


def test_a_reward_that_fails_ends_the_run_and_the_same_command_goes_on(files, capsys):
    """The reward fails once it was asked 100 times; when its file is mended, training goes on from the checkpoint."""
    broken = SMALL.replace("def", "calls = []\n\ndef", 1).replace(
        "    return", "    calls.append(1)\n    if len(calls) > 100:\n        raise RuntimeError('gone')\n    return"
    )
    (files / "small.py").write_text(broken)
    how = ("--method", "ppo", "--epochs", 4, "--samples", 44, *small(files))
    code, told = finetune(files, *how, capsys=capsys)
    assert code == 2 and "small.py: reward: RuntimeError: gone, for the completion" in " ".join(told.split())
    assert [path.name for path in sorted((files / "out/checkpoints").iterdir())] == ["step-00000004", "step-00000008"]
    (files / "small.py").write_text(SMALL)
    assert finetune(files, *how, capsys=capsys)[0] == 0
    assert [row["step"] for row in read(files / "out/rollouts.jsonl")] == [1, 2, 3, 4]
    assert finetune(files, *how, capsys=capsys, out="unbroken")[0] == 0
    broken_off, whole = (load_decoder(files / name / "model") for name in ("out", "unbroken"))
    assert same(broken_off, whole)


@pytest.mark.parametrize(("epochs", "rounds"), [(1, 1), (3, 3)])
def test_each_epoch_of_rejection_answers_all_prompts_anew(files, capsys, epochs, rounds):
    """44 prompts in steps of 16: three steps an epoch, the last of which begins another."""
    given = ("--method", "rejection", "--reward", files / "small.py", "--samples", 2, "--epochs", epochs)
    assert finetune(files, *given, capsys=capsys)[0] == 0
    assert len(list(read(files / "out/rollouts.jsonl"))) == rounds
    assert max(row["step"] for row in read(files / "out/metrics.jsonl")) == 3 * rounds


@pytest.mark.parametrize(
    ("how", "said", "steps"),
    [
        (("--samples", 22, "--epochs", 0.75), "2 of 2 steps, each on new answers", 4),
        (("--epochs", 1), "1 of 8 steps: all is learned from answers of the model as it came; more --epochs", 8),
    ],
)
def test_ppo_ends_with_whole_rollouts_and_says_where_there_is_but_one(files, capsys, how, said, steps):
    given = (files / "tiny", files / "prompts.jsonl", "--out", files / "out", "--max-new-tokens", 8, *how)
    assert cli.main(["finetune", *map(str, (*given, "--method", "ppo", *small(files)))]) == 0
    told = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert said in told and ", and what writing answers takes" in told
    assert max(row["step"] for row in read(files / "out/metrics.jsonl")) == steps


def test_what_is_mended_after_a_refused_start_begins(files, capsys):
    """Nothing was trained, so nothing stands in the way."""
    given = ("--method", "ppo", "--reward", files / "small.py", "--batch", 11, "--epochs", 1)
    assert finetune(files, *given, "--samples", 30, capsys=capsys)[0] == 2
    (files / "small.py").write_text("def reward(prompt, completion):\n    return 'much'\n")
    assert finetune(files, *given, "--samples", 33, capsys=capsys)[0] == 2
    (files / "small.py").write_text(SMALL)
    assert finetune(files, *given, "--samples", 44, capsys=capsys)[0] == 0


@pytest.mark.parametrize("changed", ["text.jsonl", "held.jsonl"])
def test_text_beside_and_what_is_judged_by_belong_to_a_run(files, capsys, changed):
    (files / "held.jsonl").write_text('{"prompt": "ab"}\n')
    beside = ("--ptx", files / "text.jsonl", "--valid", files / "held.jsonl")
    given = ("--method", "ppo", *small(files), "--epochs", 1, "--samples", 11, *beside)
    assert finetune(files, *given, capsys=capsys)[0] == 0
    (files / changed).write_text((files / changed).read_text().replace("ab", "cd").replace("words", "other"))
    code, told = finetune(files, *given, capsys=capsys)
    assert code == 2 and "another model, data, method or --batch was begun there" in " ".join(told.split())


# Rejection sampling as batches


@pytest.fixture
def written(monkeypatch) -> Iterator[Written]:
    yield Written(monkeypatch)


class Written:
    """The answers that runs write; the one after so many is not whole when its run is killed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.most, self.write = 0, 10_000, MetricsLog.write
        monkeypatch.setattr(MetricsLog, "write", lambda log, **row: self._write(log, **row))

    def _write(self, log: MetricsLog, **row: object) -> None:
        if "asked" in row:
            if self.count == self.most:
                log.file.write('{"asked": "cut')
                raise KeyboardInterrupt
            self.count += 1
        self.write(log, **row)


@pytest.mark.parametrize(("method", "samples"), [("ppo", 44), ("ppo", 11), ("rejection", 2)])
@pytest.mark.parametrize("killed", [0, 30, 53, -6])
def test_a_run_that_is_killed_while_answers_are_written_goes_on_with_them(
    files, capsys, written, method, samples, killed
):
    """In the first judging, in rollouts before and after a checkpoint, in the last judging."""
    save(ending(), files / "tiny", TOKENIZER)
    how = ("--method", method, *small(files), "--epochs", 2, "--samples", samples)
    assert finetune(files, *how, capsys=capsys, out="unbroken")[0] == 0
    once, written.count = written.count, 0
    written.most = killed % once
    assert finetune(files, *how, capsys=capsys)[0] == 130
    written.most = 10_000
    assert finetune(files, *how, capsys=capsys)[0] == 0
    assert written.count == once
    broken_off, whole = (load_decoder(files / name / "model") for name in ("out", "unbroken"))
    assert same(broken_off, whole) and not list((files / "out").glob("*-of-rank-*"))


@pytest.mark.parametrize("fresh", [True, False])
def test_answers_of_a_model_that_was_changed_are_not_gone_on_with(files, capsys, written, fresh):
    """Its weights are the same, but not what they are told to do."""
    how = ("--method", "rejection", *small(files), "--epochs", 1, "--samples", 2, *["--fresh"] * fresh)
    save(ending(), files / "tiny", TOKENIZER)
    written.most = 60
    assert finetune(files, *how, capsys=capsys)[0] == 130
    path = files / "tiny/config.json"
    was, now = path.read_text(), path.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 100.0')
    assert was != now
    path.write_text(now)
    written.count, written.most = 0, 10_000
    code, told = finetune(files, *how, capsys=capsys)
    if fresh:
        assert code == 0 and written.count == 4 + 88 + 4
    else:
        assert code == 2 and "another model, data, method or --batch was begun there" in " ".join(told.split())


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    model = policy().model
    sampler = KeptSampler(LocalSampler.of(model, TOKENIZER, width=4, tokens=32), tmp_path / "answers.jsonl")
    sampler.complete(PROMPTS[:1], Sampling(max_new_tokens=4, seed=0))
    monkeypatch.setattr(sampler._log, "file", os.fdopen(os.open("/dev/full", os.O_WRONLY), "w"))
    for attempt in (lambda: sampler.complete(PROMPTS, Sampling(max_new_tokens=4, seed=1)), sampler.close):
        with pytest.raises(OSError, match="No space left") as caught:
            attempt()
        assert caught.value.filename == str(tmp_path / "answers.jsonl")


def test_a_file_of_answers_has_a_bound(tmp_path, monkeypatch):
    model = policy().model
    sampler = KeptSampler(LocalSampler.of(model, TOKENIZER, width=4, tokens=32), tmp_path / "answers.jsonl")
    monkeypatch.setattr(kept, "MOST", 2000)
    for seed in range(4):
        sampler.complete(PROMPTS, Sampling(max_new_tokens=4, seed=seed))
        assert len(list(read(sampler.path))) == len(PROMPTS)


class Ending(LocalSampler):
    """Says of the answers to some prompts that they came to an end; of an untrained model hardly one does."""

    ends: frozenset[str] | set[str] = frozenset(PROMPTS)

    def complete(self, prompts, sampling):
        found = zip(prompts, super().complete(prompts, sampling), strict=True)
        return [replace(one, finish_reason="stop" if prompt in self.ends else "length") for prompt, one in found]


def selecting(seed: int = 0, **options: object) -> tuple[Decoder, Rejection]:
    model = policy(seed).model
    sampler = Ending.of(model, TOKENIZER, width=16, tokens=32)
    config = Rejection.Config(**{"samples": 4, "max_new_tokens": 8, "batch": 4, "epochs": 2} | options)
    return model, Rejection(model, sampler, REWARD, PROMPTS, config, seed=0)


def learned(model: Decoder, batches: Rejection, folder: Path | None = None, steps: int = 12) -> Trained:
    return train(model, next_token, batches, settings(steps=steps, save_every=1, keep=20), folder=folder, quiet=True)


def test_each_iteration_keeps_what_is_better_than_all_before():
    model, batches = selecting()
    scores = []
    for _ in range(3):
        for _ in range(6):
            next(batches)
        scores.append([score for _, score in batches.kept.values()])
        with torch.no_grad():
            model.embedding.weight.add_(0.1 * torch.randn(model.embedding.weight.shape))
    assert all(a <= b for first, second in pairwise(scores) for a, b in zip(first, second, strict=True))
    assert batches.notes.rows[0]["better"] == 12
    for prompt, (piece, score) in zip(PROMPTS, batches.kept.values(), strict=True):
        ids = [token for token in piece.targets if token >= 0]
        assert TOKENIZER.decode(piece.ids[:4]) == prompt
        assert score == REWARD([prompt], [TOKENIZER.decode(ids)])[0]


def test_what_was_cut_off_is_not_learned_and_its_prompt_waits():
    _, batches = selecting()
    batches.sampler.ends = {PROMPTS[2], PROMPTS[7]}
    rows = [row for _ in range(6) for row in next(batches)["ids"].tolist()]
    assert {TOKENIZER.decode(row[:4]) for row in rows} == batches.sampler.ends and len(rows) == 24
    assert batches.notes.rows[0]["better"] == 2 and batches.notes.rows[0]["ended"] == pytest.approx(2 / 12)
    _, resumed = selecting()
    resumed.sampler.ends = batches.sampler.ends = {PROMPTS[0], PROMPTS[7]}
    resumed.load_state_dict(batches.state_dict())
    assert all(torch.equal(next(batches)["ids"], next(resumed)["ids"]) for _ in range(4))
    assert sorted(batches.kept) == sorted(resumed.kept) == [0, 2, 7]
    _, none = selecting()
    none.sampler.ends = set()
    with pytest.raises(InputError, match="no answer came to an end within max_new_tokens=8"):
        next(none)


@pytest.mark.parametrize("step", [3, 6, 8])
def test_rejection_resumes_bit_for_bit(tmp_path, step):
    """An iteration is six steps."""
    whole, batches = selecting()
    trained = learned(whole, batches)
    learned(*selecting(), tmp_path, steps=12)
    for path in (tmp_path / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    again, resumed = selecting(seed=1)
    history = learned(again, resumed, tmp_path)
    assert same(whole, again) and untimed(history.history) == untimed(trained.history)


@pytest.mark.parametrize("changes", [{"epochs": 3.0}, {"samples": 2}, {"temperature": 0.5}])
def test_a_state_of_rejection_under_other_settings_is_refused(changes):
    model, batches = selecting()
    next(batches)
    (name,) = changes
    config, state = batches.config.replace(**changes), batches.state_dict()
    with pytest.raises(InputError, match=f"it was taken with {name}="):
        Rejection(model, batches.sampler, REWARD, PROMPTS, config, seed=batches.seed).load_state_dict(state)
    with pytest.raises(InputError, match="it was taken with seed="):
        Rejection(model, batches.sampler, REWARD, PROMPTS, batches.config, seed=9).load_state_dict(state)
    with pytest.raises(InputError, match="it was taken with prompts="):
        Rejection(model, batches.sampler, REWARD, PROMPTS[::-1], batches.config, seed=batches.seed).load_state_dict(
            state
        )


# Held-out prompts


def test_answers_before_and_after_come_from_the_same_numbers(tmp_path):
    acting = policy()
    sampler = LocalSampler.of(acting.model, TOKENIZER, width=16, tokens=32)
    sampling = Sampling(max_new_tokens=8, seed=1)
    held = HeldOut(acting.model, sampler, references.of(acting.model), REWARD, sampling)
    first, again = held.judge(PROMPTS), held.judge(PROMPTS)
    assert first == again and first["kl"] == 0 and first["length"] <= 8
    with torch.no_grad():
        acting.model.embedding.weight.mul_(1.2)
    assert held.judge(PROMPTS)["kl"] > 0
    held.write(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert any(row["before"] != row["after"] for row in rows) and [row["prompt"] for row in rows] == PROMPTS


# Rollouts by other processes


def test_workers_write_what_the_engine_here_writes():
    """Two workers, weights sent after a step; log-probabilities agree, so the rollouts are the same."""
    acting, twin = policy(), policy()
    with actors.over_ray("local", acting.model, TOKENIZER, count=2, width=8, tokens=32) as sampler:
        far, near = rollouts(acting, sampler=sampler, epochs=1), rollouts(twin, epochs=1)
        for _ in range(2):
            for batches in (far, near):
                for _ in range(2):
                    next(batches)
            assert all(torch.equal(x, near.rollout[name]) for name, x in far.rollout.items())
            with torch.no_grad():
                for model in (acting.model, twin.model):
                    model.embedding.weight.mul_(1.1)
        with pytest.raises(InputError, match="exceed the context of 48"):
            sampler.complete(["a", "b"], Sampling(max_new_tokens=99))


def test_the_command_line_has_workers_write_the_same(files, capsys):
    how = ("--method", "ppo", "--epochs", 2, "--samples", 22, "--lora", 2, *small(files))
    assert finetune(files, *how, capsys=capsys, out="out")[0] == 0
    assert finetune(files, *how, "--ray", "local", capsys=capsys, out="ray")[0] == 0
    one, two = (load_file(files / out / "model/adapter_model.safetensors") for out in ("out", "ray"))
    assert one.keys() == two.keys() and all(torch.equal(x, two[name]) for name, x in one.items())
    stood = [json.loads((files / out / "task.json").read_text()) for out in ("out", "ray")]
    assert stood[0] == stood[1], "one may go on where the other stopped"


ASKED = SMALL.replace("    return", "    print('asked by', os.environ.get('RANK'))\n    return").replace(
    "def", "import os\n\ndef", 1
)


@pytest.mark.parametrize("method", ["ppo", "rejection"])
def test_two_ranks_share_the_writing_and_learn_what_one_learns(files, capsys, method):
    (files / "small.py").write_text(ASKED)
    if method == "rejection":
        save(ending(), files / "tiny", TOKENIZER)
    how = ("--method", method, "--epochs", 1, "--samples", {"ppo": 44, "rejection": 3}[method], *small(files))
    assert finetune(files, *how, capsys=capsys)[0] == 0
    done = together(files, *how)
    assert done.returncode == 0, done.stderr
    answers = {"ppo": 44, "rejection": 3 * 44}[method]  # and four held out, before and after
    assert done.stdout.count("asked by 0") == answers + 2 * 4 and "asked by 1" not in done.stdout
    (one,), (two,) = (list(read(files / out / "rollouts.jsonl")) for out in ("out", "ranks"))
    untold = {"seconds", "rollout_seconds", "time"}
    assert {k: v for k, v in one.items() if k not in untold} == {k: v for k, v in two.items() if k not in untold}
    alone, shared = (load_file(files / out / "model/model.safetensors") for out in ("out", "ranks"))
    assert alone.keys() == shared.keys()
    for name, x in alone.items():
        torch.testing.assert_close(shared[name], x, atol=1e-5, rtol=0)


def test_what_one_rank_is_refused_ends_all(files):
    (files / "small.py").write_text(SMALL.replace("return", "return 1 /", 1).replace("1 / sum", "1 / 0 * sum"))
    done = together(files, "--method", "ppo", "--epochs", 1, "--samples", 44, *small(files))
    assert done.returncode != 0 and done.stderr.count("reward: ZeroDivisionError: division by zero") == 2
    assert "exitcode  : 2" in done.stderr


def together(files: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The same command on two ranks, into `ranks`."""
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ranks += ["--monitor-interval", "2", "-m", "allyouneed"]  # time for each to say what is wrong
    given = (files / "tiny", files / "prompts.jsonl", "--out", files / "ranks", "--max-new-tokens", 8, *arguments)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*ranks, "finetune", *map(str, given)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
