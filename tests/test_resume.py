"""Runs that are killed, stopped, spoilt or starved, and what comes of taking them up again. Run as a program, this file
is the killer: it imports torch once and forks runs to kill.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import At, Tiny, batches, run, same, settings, tiny, untimed

from allyouneed.core.errors import InputError
from allyouneed.core.metrics import read
from allyouneed.train import checkpoints as saving
from allyouneed.train.checkpoints import Checkpoints, weights
from allyouneed.train.loop import Training
from allyouneed.train.optimizers import AdamW

KILLS = 20


def saved(folder: Path) -> list[str]:
    return [path.name for path in sorted((folder / "checkpoints").iterdir())]


# What a checkpoint is


def test_a_state_comes_back_as_it_was(tmp_path):
    state = {
        "a": {"x": torch.randn(3), "deep": {"er": {"y": torch.arange(4, dtype=torch.uint8)}, "n": 7}, "none": {}},
        "b": {"list": [1, 2], "name": "é", "big": 2**63 - 1, "exact": 0.1 + 0.2},
    }
    saving.write(tmp_path, state)
    back = saving.read(tmp_path)
    assert torch.equal(back["a"].pop("x"), state["a"].pop("x"))
    assert torch.equal(back["a"]["deep"]["er"].pop("y"), state["a"]["deep"]["er"].pop("y"))
    assert back == state
    assert sorted(p.name for p in tmp_path.iterdir()) == ["SHA256SUMS", "a.safetensors", "state.json"]


def test_the_model_file_holds_the_weights_by_name_the_tied_ones_once(tmp_path):
    module = tiny()
    run(module, tmp_path)
    stored = load_file(tmp_path / "checkpoints/step-00000012/model.safetensors")
    assert stored.keys() == {name for name, _ in module.named_parameters()}
    assert all(torch.equal(stored[name], p) for name, p in module.named_parameters())


def test_buffers_that_are_saved_are_weights():
    module = torch.nn.BatchNorm1d(2)
    module.register_buffer("scratch", torch.zeros(1), persistent=False)
    assert list(weights(module)) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def test_the_last_few_are_kept(tmp_path):
    run(tiny(), tmp_path, settings(keep=2, save_every=2))
    assert saved(tmp_path) == ["step-00000010", "step-00000012"]


# Taking up a run


def test_resuming_is_bit_for_bit(tmp_path):
    """Weights, averages and curves, through dropout and data order; the module it resumes with began elsewhere."""
    unbroken, resumed = tiny(), tiny(seed=1)
    whole = run(unbroken, training=settings(ema=0.9))
    run(tiny(), tmp_path, settings(ema=0.9))
    shutil.rmtree(tmp_path / "checkpoints/step-00000012")  # as if it had come no further than step 9
    again = run(resumed, tmp_path, settings(ema=0.9))
    assert same(unbroken, resumed)
    assert untimed(again.history) == untimed(whole.history) == untimed(list(read(tmp_path / "metrics.jsonl")))
    assert all(torch.equal(x, whole.averages[name]) for name, x in again.averages.items())
    assert again.seen == whole.seen


def test_a_finished_run_is_not_run_again(tmp_path):
    module = tiny()
    run(module, tmp_path)
    again = tiny(seed=1)
    trained = run(again, tmp_path, objective=None)
    assert same(module, again) and len(trained.history) == 12


def test_a_run_may_be_prolonged(tmp_path):
    prolonged, whole = tiny(), tiny()
    constant = {"schedule": settings().schedule.replace(floor=1.0)}
    run(prolonged, tmp_path, settings(steps=7, **constant))
    run(prolonged, tmp_path, settings(steps=12, **constant))
    run(whole, training=settings(steps=12, **constant))
    assert same(prolonged, whole)


def test_beginning_again_forgets_what_was(tmp_path):
    run(tiny(), tmp_path, settings(steps=9))
    module, fresh = tiny(), tiny()
    run(module, tmp_path, settings(steps=4), resume=False)
    run(fresh, training=settings(steps=4))
    assert same(module, fresh)
    assert saved(tmp_path) == ["step-00000003", "step-00000004"]
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_folder_of_another_training(tmp_path):
    run(tiny(), tmp_path)
    with pytest.raises(InputError, match=r"this run was begun with clip=1\.0, not 2\.0; choose another folder"):
        run(tiny(), tmp_path, settings(clip=2.0))
    with pytest.raises(InputError, match=r"this run was begun with optimizer=.*0\.0003"):
        run(tiny(), tmp_path, settings(optimizer=AdamW.Config(lr=1.0)))


def test_a_folder_of_another_model(tmp_path):
    run(tiny(), tmp_path)
    with pytest.raises(InputError, match=r"another model: embedding.weight is \(11, 8\) in it and \(11, 4\) in this"):
        run(tiny(dim=4), tmp_path)


def test_a_folder_of_other_data(tmp_path):
    run(tiny(), tmp_path)
    data = batches()
    data.load_state_dict = lambda state: (_ for _ in ()).throw(InputError("data state: of other data"))
    with pytest.raises(InputError, match="data state"):
        run(tiny(), tmp_path, data=data)


# Broken checkpoints

FILES = [*(f"{part}.safetensors" for part in ("model", "optimizer", "averages", "batches", "randomness"))]
FILES += ["state.json", "SHA256SUMS"]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 16
    path.write_bytes(content)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Tiny]:
    """The folder of a run to its end, and its module."""
    folder, module = tmp_path_factory.mktemp("finished"), tiny()
    run(module, folder, settings(ema=0.9))
    return folder, module


@pytest.mark.parametrize("spoil", [truncate, flip, zero, empty, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_broken_checkpoint_falls_back_to_the_one_before(tmp_path, capsys, finished, name, spoil):
    folder, module = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    spoil(tmp_path / "checkpoints/step-00000012" / name)
    resumed = tiny(seed=1)
    run(resumed, tmp_path, settings(ema=0.9))
    assert same(module, resumed)
    (line,) = capsys.readouterr().err.splitlines()
    assert "step-00000012" in line and line.endswith("; passing over this checkpoint")
    assert saving.read_plain(Checkpoints(tmp_path / "checkpoints").newest())["run"]["step"] == 12  # whole again


def test_what_no_digest_stands_for_is_not_taken(tmp_path, capsys, finished):
    """Digests are written last: a machine that lost its power may have kept their file's name and not its content."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    newest, before = checkpoints.path(12), checkpoints.path(9)
    lines = (newest / "SHA256SUMS").read_text().splitlines(keepends=True)
    (newest / "SHA256SUMS").write_text("".join(line for line in lines if "model" not in line))
    flip(newest / "model.safetensors")
    assert checkpoints.newest() == before
    assert "model.safetensors: in the folder or in SHA256SUMS, but not in both" in capsys.readouterr().err


def test_files_are_on_disk_before_their_folder_has_its_name(tmp_path, monkeypatch):
    synced: list[str] = []
    monkeypatch.setattr(saving, "sync", lambda path: synced.append(path.name))
    saving.seal(tmp_path, {"run": {}}, {})
    assert synced == ["state.json", "SHA256SUMS"]


def test_broken_ones_ahead_do_not_count_among_those_kept(tmp_path, finished):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    for step in (9, 12):
        truncate(tmp_path / f"checkpoints/step-{step:08d}/model.safetensors")
    with pytest.raises(KeyboardInterrupt):
        run(
            tiny(), tmp_path, settings(ema=0.9, keep=1), callbacks=[At(7, lambda: os.kill(os.getpid(), signal.SIGTERM))]
        )
    assert saving.read_plain(Checkpoints(tmp_path / "checkpoints").newest())["run"]["step"] == 7


def test_all_broken(tmp_path):
    run(tiny(), tmp_path, settings(steps=3))
    truncate(tmp_path / "checkpoints/step-00000003/model.safetensors")
    with pytest.raises(InputError, match=r"checkpoints: no checkpoint can be read; begin again with resume=False"):
        run(tiny(), tmp_path)


# A full disk


@pytest.fixture(params=["limit", "tmpfs"])
def disk(request, tmp_path) -> Iterator[tuple[Path, Callable[[], None], Callable[[], None]]]:
    """A folder, and what fills its disk and frees it: a small file system where one may be mounted, else a limit."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    mounted = request.param == "tmpfs" and shutil.which("mount") and not subprocess.run(mount, stderr=-3).returncode
    filler, limits = tmp_path / "filler", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill() -> None:
        if not mounted:
            return resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                return None

    def free() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        filler.unlink(missing_ok=True)

    yield tmp_path, fill, free
    free()
    if mounted:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("log_every", [4, 1])  # the first to find no room: a checkpoint, the log
def test_a_full_disk_stops_the_run_with_one_line(disk, log_every):
    folder, fill, free = disk
    training = settings(steps=60, save_every=5, log_every=log_every)
    with pytest.raises(InputError, match=r"cannot be written: .*; the last checkpoint stands") as caught:
        run(tiny(), folder, training, callbacks=[At(8, fill)])
    free()
    assert "\n" not in str(caught.value)
    assert "No space left" in str(caught.value) or "File too large" in str(caught.value)
    assert saved(folder) == ["step-00000005"]
    resumed, unbroken = tiny(seed=1), tiny()
    history = run(resumed, folder, training).history
    assert untimed(history) == untimed(run(unbroken, training=training).history)
    assert same(resumed, unbroken)


def test_taking_up_a_run_on_a_full_disk_loses_nothing(disk):
    folder, fill, free = disk
    run(tiny(), folder, settings(steps=6))
    logged = (folder / "metrics.jsonl").read_bytes()
    fill()
    with pytest.raises(InputError, match=r"metrics.jsonl: cannot be written"):
        run(tiny(), folder)
    free()
    assert (folder / "metrics.jsonl").read_bytes() == logged


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/metrics.jsonl: cannot be written: File exists"):
        run(tiny(), tmp_path / "file")


# kill -9


def test_kill_9_at_random_moments_changes_nothing(tmp_path):
    """Moments spread over a whole run, and every call that touches its files: each ends as if never killed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["random"]["kills"] == KILLS and report["random"]["different"] == []
    assert report["random"]["before_first_save"] > 0 and report["random"]["after_first_save"] > 0
    assert report["files"]["kills"] > 40 and report["files"]["different"] == []


def fork(work: Callable[[], Any]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def finish(work: Callable[[], Any]) -> None:
    assert os.waitpid(fork(work), 0)[1] == 0


def whole_run(folder: Path, training: Training) -> None:
    """Train to the end, then write what came of it."""
    module = tiny()
    trained = run(module, folder, training)
    digest = hashlib.sha256()
    for x in [*module.state_dict().values(), *trained.averages.values()]:
        digest.update(x.numpy().tobytes())
    rows = untimed(list(read(folder / "metrics.jsonl")))
    (folder / "outcome.json").write_text(json.dumps([digest.hexdigest(), rows, saved(folder)]))


def outcome(folder: Path) -> Any:
    return json.loads((folder / "outcome.json").read_text())


def kill_at_random(base: Path) -> dict[str, Any]:
    """Kill runs from outside, each in its own twentieth of the time a run takes, and take them up again.

    The first of them before it would have saved.
    """
    training = settings(steps=30, ema=0.9, keep=2)
    finish(lambda: whole_run(base / "warm", training))
    began = time.perf_counter()
    pid = fork(lambda: whole_run(base / "unbroken", training))
    while not list((base / "unbroken" / "checkpoints").glob("step-*")):
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        time.sleep(0.001)
    first = time.perf_counter() - began
    assert os.waitpid(pid, 0)[1] == 0
    seconds, moments = time.perf_counter() - began, random.Random(0)
    different, early, kills = [], 0, 0
    while kills < KILLS:
        folder = base / f"killed-{kills}"
        moment = (kills + moments.random()) / KILLS * seconds if kills else moments.random() * first / 2
        shutil.rmtree(folder, ignore_errors=True)
        pid = fork(lambda folder=folder: whole_run(folder, training))
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
        if not os.WIFSIGNALED(os.waitpid(pid, 0)[1]):  # it was faster than the unbroken one
            seconds *= 0.95
            continue
        kills += 1
        early += not list((folder / "checkpoints").glob("step-*"))
        finish(lambda folder=folder: whole_run(folder, training))
        if outcome(folder) != outcome(base / "unbroken"):
            different.append(moment)
    return {"kills": kills, "different": different, "before_first_save": early, "after_first_save": kills - early}


def at_file_call(number: int, folder: Path, act: Callable[[], None]) -> None:
    """Do something just before the `number`-th time that files in `folder` are opened, renamed, removed …"""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and str(folder) in str(arguments[0]):
            count += 1
            if count == number:
                act()

    sys.addaudithook(hook)


def kill_at_file_calls(base: Path) -> dict[str, Any]:
    """Kill runs that save at steps 2 and 3, keeping one, at every call that touches their files."""
    training = settings(steps=3, save_every=2, ema=0.9, keep=1)
    finish(lambda: whole_run(base / "unbroken", training))
    different, kills, folder = [], 0, base / "killed"
    while True:
        shutil.rmtree(folder, ignore_errors=True)

        def die(number: int = kills + 1) -> None:
            at_file_call(number, folder, lambda: os.kill(os.getpid(), signal.SIGKILL))
            whole_run(folder, training)

        if not os.WIFSIGNALED(os.waitpid(fork(die), 0)[1]):
            return {"kills": kills, "different": different}
        kills += 1
        finish(lambda: whole_run(folder, training))
        if outcome(folder) != outcome(base / "unbroken"):
            different.append(kills)


if __name__ == "__main__":
    torch.set_num_threads(1)
    where = Path(sys.argv[1])
    run(tiny())  # what torch loads at first use, it loads once for all forks
    print(json.dumps({"random": kill_at_random(where / "random"), "files": kill_at_file_calls(where / "files")}))
