"""Ghost Attention: an instruction of the first turn learned to be kept in all turns (Touvron et al. 2023, sec. 3.3).

A dialogue is had in which every message of the user's begins with the instruction, and its last answer is sampled; then
all instructions but the first are taken away, and only that last answer is learned. Knows nothing of what instructions
say.
"""

from __future__ import annotations

from collections.abc import Sequence

from allyouneed.core.errors import InputError
from allyouneed.data.instructions import conversation
from allyouneed.data.packing import Piece
from allyouneed.data.tokenizers import Tokenizer
from allyouneed.generate.language_model import LanguageModel, Message, Sampling

Dialogue = Sequence[Message]


def restated(dialogue: Dialogue, instruction: str) -> list[Message]:
    """The dialogue with the instruction before every message of the user's.

    >>> [message["content"] for message in restated([{"role": "user", "content": "Hi"}] * 2, "Be brief.")]
    ['Be brief. Hi', 'Be brief. Hi']
    """
    return [_with(message, instruction) if message["role"] == "user" else message for message in dialogue]


def stated(dialogue: Dialogue, instruction: str) -> list[Message]:
    """The dialogue with the instruction before its first message alone.

    >>> [message["content"] for message in stated([{"role": "user", "content": "Hi"}] * 2, "Be brief.")]
    ['Be brief. Hi', 'Hi']

    Raises:
        InputError: the first message is not the user's.
    """
    if not dialogue or dialogue[0]["role"] != "user":
        raise InputError("ghost attention: a dialogue begins with a message of the user's")
    return [_with(dialogue[0], instruction), *dialogue[1:]]


def haunted(
    lm: LanguageModel, dialogues: Sequence[Dialogue], instructions: Sequence[str], sampling: Sampling
) -> dict[int, list[Message]]:
    """Dialogues to learn from: each ends with a message of the user's, is answered under the instruction restated
    everywhere, and comes with that answer and the instruction stated once. Answers between are what they were.

    Returns:
        By the number of the dialogue. One whose answer is empty or was cut off is left out, since it would be learned
        as whole.

    Raises:
        InputError: a dialogue does not end with the user, or none was answered whole.
    """
    for number, dialogue in enumerate(dialogues):
        if not dialogue or dialogue[-1]["role"] != "user":
            raise InputError(
                f"ghost attention: dialogue {number} does not end with the user; nothing is to be answered"
            )
    asked = [restated(*pair) for pair in zip(dialogues, instructions, strict=True)]
    answers = lm.complete(asked, sampling)
    whole = {i: one.text.strip() for i, one in enumerate(answers) if one.finish_reason == "stop" and one.text.strip()}
    if answers and not whole:
        given = f"max_new_tokens={sampling.max_new_tokens}"
        raise InputError(
            f"ghost attention: all {len(answers)} answers are empty or were cut off; {given} may be too few"
        )
    return {
        i: [*stated(dialogues[i], instructions[i]), {"role": "assistant", "content": text}] for i, text in whole.items()
    }


def piece(tokenizer: Tokenizer, dialogue: Dialogue) -> Piece:
    """A dialogue of which the last answer alone is learned: the loss of all turns before it is 0, since their answers
    do not keep the instruction.
    """
    return conversation(
        tokenizer, [{"role": one["role"], "content": one["content"]} for one in dialogue], after=len(dialogue) - 1
    )


def _with(message: Message, instruction: str) -> Message:
    return {"role": message["role"], "content": f"{instruction} {message['content']}"}
