"""Pairs of answers as tokens: what is learned of them, what is refused, and by which line."""

from __future__ import annotations

import json

import pytest

from allyouneed.core.errors import InputError
from allyouneed.data import instructions, jsonl
from allyouneed.data.packing import IGNORED
from allyouneed.data.preferences import collate, pair, within
from allyouneed.data.tokenizer_training import train_unigram
from allyouneed.data.tokenizers import byte_tokenizer
from allyouneed.models.checkpoints.loading import load_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}.{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def chatting(template: str = TEMPLATE):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def turns(*said: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in said]


def learned(tokenizer, piece) -> str:
    return tokenizer.decode([t for t in piece.targets if t != IGNORED])


def test_strings_and_messages():
    tokenizer = chatting()
    plain = pair(tokenizer, jsonl.Preference("2+2=", "4", "5!"))
    assert [learned(tokenizer, piece) for piece in plain.pieces] == ["4", "5!"]
    assert [tokenizer.decode(piece.ids) for piece in plain.pieces] == ["2+2=4", "2+2=5!"]
    assert plain.longest == 7 and plain.margin == 0.0
    asked = turns(("system", "S"), ("user", "Q"), ("assistant", "OLD"), ("user", "R"))
    chosen, rejected = turns(("assistant", "good")), turns(("assistant", "bad"))
    made = pair(tokenizer, jsonl.Graded(asked, chosen, rejected, 1.5))
    assert [learned(tokenizer, piece) for piece in made.pieces] == ["good.", "bad."]
    assert tokenizer.decode(made.pieces[1].ids) == "<s>S.<u>Q.<a>OLD.<u>R.<a>bad." and made.margin == 1.5


def test_an_answer_may_repeat_its_prompt():
    """As the sets of whole conversations have it: prompt a string, answers with the user's turn before them."""
    tokenizer = chatting()
    said = [turns(("user", "Q"), ("assistant", text)) for text in ("good", "bad")]
    made = pair(tokenizer, jsonl.Preference("Q", *said))
    assert [tokenizer.decode(piece.ids) for piece in made.pieces] == ["<u>Q.<a>good.", "<u>Q.<a>bad."]
    assert pair(tokenizer, jsonl.Preference(turns(("user", "Q")), *said)) == made


def test_batches_pad_the_shorter_answer():
    tokenizer = byte_tokenizer()
    made = [pair(tokenizer, jsonl.Preference("a", "b", "ccc")), pair(tokenizer, jsonl.Preference("dd", "e", "f"))]
    batch = collate(made)
    assert batch["ids"].shape == (2, 2, 5) and batch["ranks"].tolist() == [[0, 1], [0, 1]]
    assert batch["segments"].sum(-1).tolist() == [[3, 5], [4, 4]]
    for row, example in enumerate(made):
        for side, piece in enumerate(example.pieces):
            assert batch["ids"][row, side, : len(piece.ids)].tolist() == piece.ids
            assert batch["targets"][row, side, : len(piece.ids)].tolist() == piece.targets
            assert batch["targets"][row, side, len(piece.ids) :].eq(IGNORED).all()


BAD = {
    "the same": (jsonl.Preference("q", "a", "a"), "chosen and rejected are the same answer"),
    "the same but for form": (
        jsonl.Preference("q", turns(("assistant", "a")), turns(("user", "q"), ("assistant", "a"))),
        "the same answer",
    ),
    "empty chosen": (jsonl.Preference("q", " ", "a"), "chosen is empty"),
    "empty rejected": (jsonl.Preference("q", "a", "\n"), "rejected is empty"),
    "empty message": (jsonl.Preference("q", turns(("assistant", "a")), turns(("assistant", " "))), "rejected is empty"),
    "nobody answers": (jsonl.Preference("q", turns(("assistant", "a")), turns(("user", "b"))), "rejected is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_preference_is_refused(name):
    record, message = BAD[name]
    with pytest.raises(InputError, match=message):
        pair(chatting(), record)


def test_answers_that_are_cut_are_refused():
    made = pair(byte_tokenizer(), jsonl.Preference("q", "aaaa", "b"))
    assert within(made, 6) is made
    with pytest.raises(InputError, match="chosen with its prompt has 6 tokens; at most 5 fit"):
        within(made, 5)
    made = pair(byte_tokenizer(), jsonl.Preference("q", "a", "bbbb"))
    with pytest.raises(InputError, match="rejected with its prompt has 6 tokens"):
        within(made, 5)


def test_a_template_that_does_not_mark_the_assistant_is_refused():
    tokenizer = chatting("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    with pytest.raises(InputError, match="chosen: the chat template does not mark what the assistant says"):
        pair(tokenizer, jsonl.Preference("q", turns(("assistant", "a")), turns(("assistant", "b"))))
    strict = chatting(
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('turns') }}{% endif %}[{{ m.content }}]{% endfor %}"
    )
    made = pair(strict, jsonl.Preference("q", turns(("assistant", "a")), turns(("assistant", "b"))))
    assert [learned(strict, piece) for piece in made.pieces] == ["[a]", "[b]"]  # where whose turn it is is a rule


def test_margins_by_whatever_name_and_lines_that_lack_them(tmp_path):
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b", "gap": 2},
        {"prompt": "q", "chosen": "a", "rejected": "b", "gap": -1},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "a", "gap": 1},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bad: list[str] = []
    tokenizer = byte_tokenizer()
    named = {"gap": "margin"}
    made = jsonl.made(path, [jsonl.Graded], lambda record: pair(tokenizer, record), bad=bad, named=named)
    assert [one.margin for one in made] == [2]
    assert [line.removeprefix(f"{path}: ") for line in bad] == [
        "line 2: field 'gap' is of type int; accepted: a number from 0",
        "line 3: keys 'prompt', 'chosen', 'rejected'; accepted: prompt + chosen + rejected + gap",
        "line 4: chosen and rejected are the same answer; two that differ are needed",
    ]


def test_what_is_learned_is_shown():
    tokenizer = chatting()
    conversation = turns(("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B"))
    piece = instructions.piece(tokenizer, jsonl.Chat(conversation))
    assert instructions.shown(tokenizer, piece) == "<u>Q.<a>⟦A.⟧<u>R.<a>⟦B.⟧"


ASKED = "Is the shop open? Answer: "


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer("smollm2-135m-instruct")


@pytest.mark.parametrize("prompt", [ASKED, ASKED.strip(), "One\n\n", "One \n", "Say"])
@pytest.mark.parametrize("answer", ["yes", " yes", "no", "\nno"])
def test_an_answer_is_learned_whole_after_what_a_model_that_is_asked_reads(smollm2, prompt, answer):
    """Also where one token would take the end of the prompt and the beginning of the answer."""
    piece = instructions.piece(smollm2, jsonl.Completion(prompt, answer))
    asked = smollm2.encode(prompt, add_special_tokens=True)
    assert piece.ids[: len(asked)] == asked
    assert learned(smollm2, piece) == answer and piece.targets[-2] == smollm2.eos_ids[0]
    assert piece.targets[: len(asked) - 1] == [IGNORED] * (len(asked) - 1)


def test_answers_to_one_prompt_differ_in_what_is_learned(smollm2):
    made = pair(smollm2, jsonl.Preference(ASKED, "yes", "no"))
    assert [learned(smollm2, piece) for piece in made.pieces] == ["yes", "no"]
    chat = turns(("user", "Q"), ("assistant", "\nA"), ("user", "R"), ("assistant", "\n\nB"))
    piece = instructions.piece(smollm2, jsonl.Chat(chat))
    said = smollm2.decode([t for t in piece.targets if t != IGNORED], skip_special_tokens=False)
    assert said == "\nA<|im_end|>\n\n\nB<|im_end|>\n"


def test_a_vocabulary_that_puts_a_space_before_each_part_keeps_the_text():
    """What is written by Unigram pieces is read as one; the piece that reaches over the border is learned."""
    tokenizer = train_unigram(["two is two", "is it two or one", "one two one two"], 40, sentinels=4)
    whole = tokenizer.encode("is it two", add_special_tokens=True)
    piece = instructions.piece(tokenizer, jsonl.Completion("is it ", "two"))
    assert piece.ids[: len(whole)] == whole and learned(tokenizer, piece).strip() == "two"


def test_an_answer_that_begins_with_other_words_than_its_prompt_is_refused():
    said = turns(("system", "S"), ("user", "Q"), ("assistant", "good"))
    line = "chosen: begins with a system's message but not with the prompt; give the answer alone"
    with pytest.raises(InputError, match=line):
        pair(chatting(), jsonl.Preference("Q", said, turns(("assistant", "bad"))))
    rejected = turns(("user", "other"), ("assistant", "bad"))
    with pytest.raises(InputError, match="rejected: begins with a user's message but not with the prompt"):
        pair(chatting(), jsonl.Preference("Q", turns(("assistant", "good")), rejected))
    both = pair(chatting(), jsonl.Preference(said[:2], said, turns(("assistant", "bad"))))
    assert chatting().decode(both.pieces[0].ids) == "<s>S.<u>Q.<a>good."
