"""Dialogues in which an order of the first turn is to stand in all turns: whether it is kept is known exactly.

Each turn asks for things of the world of `Orders`. The standing order says with which word every answer ends; it stands
in the first message alone, or, where somebody says it again each time, in every one. Holds no way to learn it.

>>> world = Dialogues.Config().build()
>>> for message in world.opened("amen", world.turns(2, seed=0), ["baro", "mina amen"]):
...     print(message["role"], ":", message["content"])
user : end all with amen . name two blessed things but not limi :
assistant : baro
user : name one blessed things :
assistant : mina amen
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from allyouneed import core
from allyouneed.core.errors import InputError
from allyouneed.core.seeds import derive
from allyouneed.data.jsonl import Message
from allyouneed.data.orders import Order, Orders
from allyouneed.data.tokenizers import END_OF_TEXT, Tokenizer

ENDINGS = ("amen", "cheers", "please", "so", "indeed", "over", "sir", "done")  # none a word of the orders
STANDING = "end all with {} ."
SPOKEN = ("user", "assistant", "end", "all", "with", *ENDINGS)  # words that only dialogues have
TEMPLATE = (
    "{% for message in messages %}{{ message.role }} {{ message.content }}"
    "{% if message.role == 'assistant' %} " + END_OF_TEXT + "{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


class Dialogues(core.Configured):
    """Turns of plain orders, and the words that a standing order may ask for."""

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """The world whose things are asked for, and the most that one turn asks for."""

        orders: Orders.Config = field(default_factory=lambda: Orders.Config(but=0.25, manner=0.0))
        most: int = 2

    def __init__(self, config: Config) -> None:
        if not 1 <= config.most <= 4:
            raise InputError(f"most={config.most}; a turn asks for 1 to 4 things")
        self.config, self.orders = config, config.orders.build()

    def tokenizer(self) -> Tokenizer:
        """A token a word, with the template of these conversations."""
        return self.orders.tokenizer(*SPOKEN, chat_template=TEMPLATE)

    def turns(self, count: int, seed: int, *, held_out: bool = False) -> list[Order]:
        """What is asked, one turn after the other."""
        drawn = iter(self.orders.orders(16 * count + 64, derive(seed, "turns"), held_out=held_out))
        return [next(order for order in drawn if order.count <= self.config.most) for _ in range(count)]

    def ending(self, seed: int) -> str:
        """One of the words to end with."""
        return random.Random(derive(seed, "ending")).choice(ENDINGS)

    def opened(
        self, ending: str, asked: Sequence[Order], answers: Sequence[str], *, every: bool = False
    ) -> list[Message]:
        """A conversation: the standing order in the first message, or in `every` one of the user's. With an answer less
        than there are turns the last is still to be answered; without `ending` nothing stands.
        """
        assert len(asked) - len(answers) in (0, 1), "turns and their answers"
        found: list[Message] = []
        for i, order in enumerate(asked):
            standing = STANDING.format(ending) + " " if ending and (every or i == 0) else ""
            found.append({"role": "user", "content": f"{standing}{order}"})
            found += [{"role": "assistant", "content": answer} for answer in answers[i : i + 1]]
        return found

    def answer(self, order: Order, source: random.Random, ending: str = "") -> str:
        """One that obeys the turn, and the standing order if there is one."""
        return " ".join(word for word in (self.orders.demonstrate(order, source), ending) if word)

    def kept(self, ending: str, answer: str) -> bool:
        """Whether an answer ends with the word, said once."""
        words = answer.split()
        return words[-1:] == [ending] and words.count(ending) == 1

    def obedience(self, order: Order, answer: str) -> float:
        """How well the turn itself was obeyed; the ending is of no account."""
        words = answer.split()
        return self.orders.obedience(order, " ".join(words[:-1] if words[-1:] and words[-1] in ENDINGS else words))
