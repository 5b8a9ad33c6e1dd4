"""What is required of answers is checked as a reader would: answers written by hand for every kind of task."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from allyouneed.align.graders import open_reward
from allyouneed.core.errors import InputError
from allyouneed.data import requirements as must
from allyouneed.data.checkable import HELD_OUT, TEMPLATES, TRAINED, Checks, Task, tasks

GOOD = {  # by the beginning of a prompt, an answer that meets all requirements; {…} are what the prompt says
    r"List (\d) (\w+)": lambda n, what: "\n".join(f"- {what} {i}" for i in range(int(n))),
    r"Write one sentence about (.+), in capital": lambda topic: f"I LIKE {topic.upper()}.",
    r"Give me a numbered list of (\d)": lambda n: "\n".join(f"{i + 1}. no {i}" for i in range(int(n))),
    r"(\w+) is (\d+) years old": lambda name, age: f'{{"name": "{name}", "age": {age}}}',
    r"Describe (.+) in at most (\d+)": lambda topic, n: f"This is {topic} to me.",
    r"Write exactly (\w+) sentences? about (.+)\.": lambda n, topic: " ".join([f"I like {topic}."] * must_count(n)),
    r"Tell me about (.+)\. Use between (\d+)": lambda topic, n: f"Well, {topic}" + " so" * int(n) + ".",
    r"Write a poem of (\w+) lines about (.+)\. ": lambda n, topic: "\n".join([f"O {topic}"] * must_count(n)),
    r"Write a sentence about (.+) that contains the word '(\w+)'": lambda topic, word: f"Of {topic} I say {word}.",
    r"Write a sentence about (.+) without the word": lambda topic: f"Everybody likes {topic}!",
    r"Write a short text about (.+) whose last word is '(\w+)'": lambda topic, w: f"I often think {topic} is {w}.",
    r"Write a sentence about (.+) whose first word is '(\w+)'": lambda topic, word: f"{word} thoughts of {topic}.",
    r"What is (\d+) ([+-]) (\d+)": lambda a, sign, b: str(int(a) + int(b) * (1 if sign == "+" else -1)),
    r"\w+ has (\d+) coins and finds (\d+)": lambda a, b: f"{int(a) + int(b)}.",
    r"\w+ bakes (\d+) rolls and sells (\d+)": lambda a, b: str(int(a) - int(b)),
    r"Write a cheerful message to a friend about (.+)\.": lambda topic: f"What a wonderful, happy day for {topic}!",
    r"Write a polite request for (.+)\.": lambda wish: f"Please, could you give me {wish}?",
    r"Say something full of joy about (.+), in": lambda topic: f"It is a joy, I love it: {topic}!",
    r"How would a very polite person ask a stranger for (.+)\?": lambda wish: f"Would you kindly give me {wish}?",
}


def must_count(word: str) -> int:
    return ["one", "two", "three", "four", "five"].index(word) + 1


def answered(task: Task) -> str:
    if task.kind == "refusal":
        unsafe = any(crime in task.prompt for crime in (*TRAINED.crimes, *HELD_OUT.crimes))
        return "I'm sorry, but I can’t help with that." if unsafe else "First, get what you need. Then begin."
    ((match, make),) = [(m, make) for pattern, make in GOOD.items() if (m := re.match(pattern, task.prompt))]
    return make(*match.groups())


@pytest.mark.parametrize("held_out", [False, True])
def test_every_kind_of_task_can_be_done_and_is_failed_by_nothing_and_by_rambling(held_out):
    asked = tasks(300, seed=1, held_out=held_out)
    for task in asked:
        assert task.score(answered(task)) == 1.0, (task.prompt, task.each(answered(task)))
        assert task.score("") == task.score(" \n") == 0.0, task.prompt
        assert task.score("well " * 400) <= 0.5 or task.kind == "refusal", task.prompt
    kinds = [task.kind for task in asked]
    assert set(kinds) == set(TEMPLATES) and min(map(kinds.count, TEMPLATES)) >= 10


def test_refusing_is_wrong_as_often_as_it_is_right():
    wanted = [task.parts[0][1].wanted for task in tasks(200, seed=0) if task.kind == "refusal"]
    assert 0.3 < sum(wanted) / len(wanted) < 0.7


def test_nothing_is_shared_with_what_is_held_out():
    learned, held_out = tasks(300, seed=0), tasks(150, seed=0, held_out=True)
    assert not {t.prompt for t in learned} & {t.prompt for t in held_out}
    for name in ("topics", "plurals", "people", "words", "crimes", "chores", "wishes"):
        assert not {*getattr(TRAINED, name)} & {*getattr(HELD_OUT, name)}
    for kind, (ours, theirs) in TEMPLATES.items():
        assert not {*ours} & {*theirs}, kind
    assert tasks(20, seed=4) == tasks(20, seed=4) != tasks(20, seed=5)
    with pytest.raises(InputError, match="tasks=100000: only"):
        tasks(100_000, seed=0, held_out=True)


def test_the_reward_finds_the_task_by_its_prompt():
    asked = tasks(12, seed=0)
    reward = Checks(asked)
    good = [answered(task) for task in asked]
    assert reward([task.prompt for task in asked], good) == [1.0] * 12
    assert reward([[{"role": "user", "content": task.prompt}] for task in asked], good) == [1.0] * 12
    with pytest.raises(InputError, match="'Hello' is none of the 12 tasks'"):
        reward(["Hello"], ["Hi"])


@pytest.mark.parametrize(
    ("requirement", "answer", "expected"),
    [
        (must.Bullets(3), "- a\n- b\n- c", 1.0),
        (must.Bullets(3), "1. a\n2. b\n3. c", 0.0),
        (must.Bullets(3), "- a\n- A\n- a", 1 / 3),  # said three times
        (must.Bullets(2, "1."), "1. a\n2) b", 1.0),
        (must.Bullets(2), "Here:\n- a\n- b", 2 / 3),
        (must.Lines(2), "a\nb\nc\nd", 0.5),
        (must.Words(3, 5), "it's a well-known fact", 1.0),  # it's a well known fact
        (must.Words(3, 5), "one", 1 / 3),
        (must.Sentences(2), "It costs 3.50 here. Yes!", 1.0),
        (must.Sentences(1), "no end", 0.0),
        (must.Has("sea", "a boat"), "A boat at Sea.", 1.0),
        (must.Has("sea"), "seaside", 0.0),
        (must.Lacks("is"), "This island", 1.0),
        (must.Ends("amen"), "amen, brother", 0.0),
        (must.Ends("amen"), "So be it: AMEN!!", 1.0),
        (must.Begins("so it"), "So, it begins", 1.0),
        (must.Cased(upper=False), "all small 123", 1.0),
        (must.Cased(upper=True), "123", 0.0),
        (must.Json(("a",)), '```json\n{"a": 1}\n```', 1.0),
        (must.Json(("a", "b")), '{"a": 1}', 0.5 + 1 / 3),
        (must.Json(("a",)), "[1]", 0.0),
        (must.Number(-4), "It is -4", 1.0),
        (must.Number(4), "four", 0.0),
        (must.Bare(), "4 apples", 0.0),
        (must.Refuses(True), "I cannot do that.", 1.0),
        (must.Refuses(False), "I cannot do that.", 0.0),
        (must.Refuses(False), "", 0.0),
        (must.Tone(must.POLITE, 2), "Thanks a lot, thank you", 0.5),
        (must.Tone(must.POLITE, 2), "Please, thanks!", 1.0),
    ],
)
def test_requirements(requirement, answer, expected):
    assert requirement(answer) == pytest.approx(expected)


def test_the_example_writes_the_prompts_beside_it_and_scores_those_held_out():
    home = Path(__file__).parents[1] / "docs" / "examples"
    said = []
    for asked, there in (([], "prompts.jsonl"), (["held", "out"], "held.jsonl")):
        done = subprocess.run([sys.executable, home / "checked.py", *asked], capture_output=True, text=True, timeout=60)
        lines, first = done.stdout.splitlines(), (home / there).read_text().splitlines()
        assert first and lines[: len(first)] == first
        said.append([json.loads(line)["prompt"] for line in lines])
    reward = open_reward(str(home / "checked.py"))
    learned, held = said
    assert not {one[0]["content"] for one in learned} & {one[0]["content"] for one in held}
    assert len(reward([*learned, *held], [""] * len([*learned, *held]))) == 192 + 96
