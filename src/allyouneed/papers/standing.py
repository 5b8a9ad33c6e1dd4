"""A standing order over the turns of a dialogue, learned by Ghost Attention or not: the part of `llama2` that talks.

Both arms go on from one model that keeps an order which stands in the message before it, whatever was answered before;
what becomes of an order that is not said again, nothing shows it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from allyouneed import core
from allyouneed.align import ghost
from allyouneed.core.seeds import derive
from allyouneed.data.dialogues import STANDING, Dialogues
from allyouneed.data.instructions import conversation
from allyouneed.generate.language_model import Sampling
from allyouneed.papers import aligned
from allyouneed.papers.aligned import Speaker, Stage

KEPT, FORGOT = "Ghost Attention", "none"


@dataclass(frozen=True, kw_only=True)
class Ghosts(core.Config):
    """The dialogues in which a standing order is to be kept."""

    world: Dialogues.Config = field(default_factory=Dialogues.Config)
    tuned: Stage  # on dialogues without an order and such as end with an answer that keeps one
    ghosted: Stage  # both arms
    dialogues: int = 1500
    trained_turns: int = 6
    turns: int = 8
    tested: int = 128  # dialogues


def dialogues(config: Ghosts, base: Speaker, seed: int, folder: Path) -> dict[str, Any]:
    """The share of dialogues in which the order of the first turn is `kept`, by arm and turn, and in how many of the
    answers that were sampled to learn from it is kept.
    """
    world, source = config.world.build(), random.Random(derive(seed, "dialogues"))
    plain = [_talk(world, source.randint(1, config.trained_turns), source) for _ in range(config.dialogues)]
    ordered = [_ordered(world, source.randint(1, config.trained_turns), source) for _ in range(config.dialogues)]
    pieces = [conversation(base.tokenizer, one) for one in plain]
    pieces += [ghost.piece(base.tokenizer, one) for one in ordered]
    tuned = aligned.learned(base, pieces, config.tuned, seed, folder / "tuned")
    asked: list[Any] = [
        _talk(world, source.randint(2, config.trained_turns), source)[:-1] for _ in range(config.dialogues)
    ]
    orders = [STANDING.format(world.ending(source.getrandbits(32))) for _ in asked]
    sampling = Sampling(max_new_tokens=base.most, temperature=1.0, seed=derive(seed, "ghosts"))
    haunted = ghost.haunted(tuned.sampler().lm, asked, orders, sampling)
    extra = {KEPT: [ghost.piece(base.tokenizer, one) for one in haunted.values()], FORGOT: []}
    kept = {}
    for name, more in extra.items():
        arm = aligned.learned(tuned.copy(), [*pieces, *more, *more], config.ghosted, seed, folder / name.split()[0])
        kept[name] = _kept(config, world, arm, seed)
    sampled = [world.kept(orders[i].split()[-2], one[-1]["content"]) for i, one in haunted.items()]
    print(f"  ghosts: {len(asked) - len(haunted)} of {len(asked)} answers left out, empty or cut off")
    return {"kept": kept, "sampled answers that keep it": sum(sampled) / len(sampled)}


def later(kept: Sequence[float]) -> float:
    """The mean over all turns but the first, which takes no memory."""
    return sum(kept[1:]) / len(kept[1:])


def _talk(world: Dialogues, turns: int, source: random.Random) -> list[Any]:
    """A dialogue without a standing order."""
    asked = world.turns(turns, source.getrandbits(32))
    return [dict(m) for m in world.opened("", asked, [world.answer(order, source) for order in asked])]


def _ordered(world: Dialogues, turns: int, source: random.Random) -> list[Any]:
    """A dialogue in which an order stands in all messages from some turn on, and the last answer, which alone is to be
    learned, keeps it.
    """
    asked, ending = world.turns(turns, source.getrandbits(32)), world.ending(source.getrandbits(32))
    answers = [*(world.answer(order, source) for order in asked[:-1]), world.answer(asked[-1], source, ending)]
    messages, first = [dict(m) for m in world.opened("", asked, answers)], source.randrange(turns)
    for message in messages[2 * first :: 2]:
        message["content"] = f"{STANDING.format(ending)} {message['content']}"
    return messages


def _kept(config: Ghosts, world: Dialogues, speaker: Speaker, seed: int) -> list[float]:
    """The share of dialogues in which the order of the first turn is kept, for each turn; answers are the speaker's."""
    lm = speaker.sampler().lm
    endings = [world.ending(derive(seed, "tested", i)) for i in range(config.tested)]
    asked = [world.turns(config.turns, derive(seed, "tested", i), held_out=True) for i in range(config.tested)]
    said: list[list[str]] = [[] for _ in endings]
    found = []
    for turn in range(config.turns):
        open_: list[Any] = [
            world.opened(ending, orders[: turn + 1], answers)
            for ending, orders, answers in zip(endings, asked, said, strict=True)
        ]
        answers = lm.complete(open_, Sampling(max_new_tokens=speaker.most, temperature=0.0))
        for own, one in zip(said, answers, strict=True):
            own.append(one.text.strip())
        found.append(_share(world, endings, said))
    return found


def _share(world: Dialogues, endings: Sequence[str], said: Sequence[Sequence[str]]) -> float:
    """Of dialogues whose last answer keeps the order."""
    return sum(world.kept(ending, own[-1]) for ending, own in zip(endings, said, strict=True)) / len(endings)
