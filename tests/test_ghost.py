"""Ghost Attention and the gating of two rewards, on a model that says what it is told to."""

from __future__ import annotations

import math

import pytest
import torch

from allyouneed.align import ghost
from allyouneed.align.gating import Gated, gate
from allyouneed.core.errors import InputError
from allyouneed.data.dialogues import Dialogues
from allyouneed.data.instructions import conversation
from allyouneed.data.packing import IGNORED
from allyouneed.generate.language_model import Completion, Sampling

ASKED = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]


class Parrot:
    """Says the number of messages it was given that hold the instruction."""

    name = "parrot"

    def complete(self, prompts, sampling):
        self.prompts = prompts
        said = [sum("Be brief." in message["content"] for message in prompt) for prompt in prompts]
        return [Completion(f" {count} ", "stop", 1, 1) for count in said]


def test_the_answer_is_sampled_with_the_order_everywhere_and_learned_with_it_once():
    parrot = Parrot()
    ((number, found),) = ghost.haunted(parrot, [ASKED], ["Be brief."], Sampling()).items()
    assert number == 0
    assert [m["content"] for m in parrot.prompts[0]] == ["Be brief. Hi", "Hello", "Be brief. Bye"]
    assert [m["content"] for m in found] == ["Be brief. Hi", "Hello", "Bye", "2"]
    assert [m["role"] for m in found] == ["user", "assistant", "user", "assistant"]
    assert ASKED[0]["content"] == "Hi"  # nothing was written into what was given


class Interrupted(Parrot):
    """Comes to an end with the second of three dialogues alone: the first is cut, the last says nothing."""

    def complete(self, prompts, sampling):
        return [Completion("Well,", "length", 1, 1), Completion("Bye", "stop", 1, 1), Completion(" ", "stop", 1, 1)][
            : len(prompts)
        ]


def test_an_answer_that_is_not_whole_is_left_out():
    found = ghost.haunted(Interrupted(), [ASKED] * 3, ["Be brief.", "Be kind.", "Be quick."], Sampling())
    assert {number: (one[0]["content"], one[-1]["content"]) for number, one in found.items()} == {
        1: ("Be kind. Hi", "Bye")
    }
    with pytest.raises(InputError, match="all 1 answers are empty or were cut off; max_new_tokens=128"):
        ghost.haunted(Interrupted(), [ASKED], ["Be brief."], Sampling())


def test_only_the_last_answer_is_learned():
    world = Dialogues.Config().build()
    tokenizer, asked, (a, b, *_) = world.tokenizer(), world.turns(2, seed=0), world.orders.things
    messages = world.opened("amen", asked, [a, f"{b} amen"])
    learned = [token for token in ghost.piece(tokenizer, messages).targets if token != IGNORED]
    assert tokenizer.decode(learned).split() == [b, "amen"]
    everything = conversation(tokenizer, [dict(m) for m in messages])
    assert ghost.piece(tokenizer, messages).ids == everything.ids
    assert sum(t != IGNORED for t in everything.targets) == len(learned) + 2  # the first answer and its end


def test_what_is_no_dialogue_to_be_answered_is_refused():
    with pytest.raises(InputError, match="dialogue 0 does not end with the user"):
        ghost.haunted(Parrot(), [ASKED[:2]], ["Be brief."], Sampling())
    with pytest.raises(InputError, match="begins with a message of the user's"):
        ghost.stated(ASKED[1:], "Be brief.")


def test_the_gate_is_the_papers_rule():
    generator = torch.Generator().manual_seed(0)
    helpful, safe = torch.randn(2, 500, generator=generator, dtype=torch.double) * 3
    unsafe = torch.rand(500, generator=generator) < 0.3
    expected = []
    for h, s, u in zip(helpful.tolist(), safe.tolist(), unsafe.tolist(), strict=True):
        chance_h, chance_s = 1 / (1 + math.exp(-h)), 1 / (1 + math.exp(-s))
        chosen = chance_s if u or chance_s < 0.15 else chance_h
        expected.append(math.log(chosen / (1 - chosen)))  # the logit of R_c
    assert torch.allclose(gate(helpful, safe, unsafe), torch.tensor(expected, dtype=torch.double), atol=1e-9)
    assert unsafe.any() and ((safe.sigmoid() < 0.15) & ~unsafe).any()


def test_a_reward_that_is_no_number_is_named_through_the_gate():
    def bad(prompts, completions):
        return [float("nan")] * len(prompts)

    with pytest.raises(InputError, match="reward bad: gave nan for the completion 'b' of the prompt 'a'"):
        Gated(lambda p, c: [0.0], bad, unsafe=lambda prompt: False)(["a"], ["b"])
