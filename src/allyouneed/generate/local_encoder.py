"""An encoder in this process: texts in, vectors out, as sentence-transformers reads its checkpoints.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from allyouneed.core.errors import InputError
from allyouneed.core.files import read_json
from allyouneed.data.tokenizers import Tokenizer
from allyouneed.generate.language_model import Completion, Message, Queue, Sampling, Turns
from allyouneed.models.checkpoints.fields import Fields
from allyouneed.models.encoder import Encoder

MODULES = (
    "Transformer",
    "Pooling",
    "Normalize",
)  # of a sentence-transformers model that is an encoder and nothing more
POOLINGS = ("mean", "cls")
CACHED = 2048  # tokens read at once: in rows of 256 MiniLM takes 11 % less time than with 4096


@dataclass(frozen=True)
class Reading:
    """How a text becomes one vector: of at most `most` tokens, special ones included, the `mean` of the last hidden
    states, or that of the first token alone (`cls`).
    """

    most: int
    pooling: str = "mean"

    @staticmethod
    def of(folder: Path, context: int) -> Reading:
        """What the files of sentence-transformers in a checkpoint's folder say; without them the mean of all tokens.

        Raises:
            InputError: they ask for a layer or a way of pooling that we do not compute.
        """
        _check_modules(folder / "modules.json")
        limits = _fields(folder / "sentence_bert_config.json")
        limits.expect("do_lower_case", False)
        most = limits.integer("max_seq_length", context)
        return Reading(min(most, context), _pooling(_fields(folder / "1_Pooling" / "config.json")))


class LocalEncoder:
    """Satisfies `LanguageModel` with an encoder and its tokenizer, as far as encoders can: they do not generate.

    Args:
        batch: how many texts are read at once.
    """

    def __init__(
        self, module: Encoder, tokenizer: Tokenizer, name: str, reading: Reading | None = None, *, batch: int = 32
    ) -> None:
        if tokenizer.vocab_size > module.config.vocab_size:
            sizes = f"{tokenizer.vocab_size} tokens, the model {module.config.vocab_size}"
            raise InputError(f"{name}: the tokenizer has {sizes}; they do not belong together")
        self.module, self.tokenizer, self.name, self.batch = module, tokenizer, name, batch
        self.reading = reading or Reading(module.config.context)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(n, dim) float32 of unit length; what of a text goes beyond `reading.most` tokens is not read.

        Texts are read in the order of their lengths, so that a batch is hardly ever padded, and long ones in smaller
        batches, whose hidden layers stay in the processor's cache.
        """
        rows = self.tokenizer.encode_batch(texts, add_special_tokens=True, most=self.reading.most)
        for i, row in enumerate(rows):
            if not row:
                raise InputError(f"text {i} is empty, and {self.name} puts no special tokens around it")
        return self.embed_ids(rows)

    @torch.inference_mode()
    def embed_ids(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """(n, dim) float32: `embed` of texts that are ids already, with whatever special tokens belong around them."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        vectors = torch.zeros(len(rows), self.module.config.dim)
        for chosen in self._batches(order, rows):
            vectors[chosen] = self._vectors([list(rows[i]) for i in chosen]).float().cpu()
        return F.normalize(vectors, dim=-1).numpy()

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has, special ones left out."""
        return [len(row) for row in self.tokenizer.encode_batch(texts)]

    def complete(self, prompts: Sequence[Turns], sampling: Sampling | Sequence[Sampling]) -> list[Completion]:
        """Refused."""
        self._refuse("generate")

    def queue(self) -> Queue:
        """Refused."""
        self._refuse("generate")

    def stream(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        """Refused."""
        self._refuse("generate")

    def chat_stream(self, messages: Sequence[Message], sampling: Sampling) -> Iterator[str]:
        """Refused."""
        self._refuse("chat")

    def generate(self, prompts: Sequence[str], **sampling: object) -> list[str]:
        """Refused."""
        self._refuse("generate")

    def chat(self, messages: Sequence[Message], **sampling: object) -> str:
        """Refused."""
        self._refuse("chat")

    def score(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[float]:
        """Refused."""
        self._refuse("score continuations")

    def _refuse(self, asked: str) -> NoReturn:
        raise InputError(f"{self.name} is an encoder: it cannot {asked}, only embed texts; ask a decoder")

    def _batches(self, order: list[int], rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """`order` in batches of at most `batch` rows and, where these are several, `CACHED` tokens."""
        chosen: list[int] = []
        for i in order:
            if chosen and (len(chosen) == self.batch or (len(chosen) + 1) * len(rows[i]) > CACHED):
                yield chosen
                chosen = []
            chosen.append(i)
        if chosen:
            yield chosen

    def _vectors(self, rows: list[list[int]]) -> Tensor:
        """One vector a row, (B, dim); rows come in the order of their lengths."""
        width, device = len(rows[-1]), self.module.device
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        real = torch.arange(width, device=device) < lengths[:, None]
        # rows of one length need no mask, which lets attention take its fastest way
        hidden = self.module.hidden(ids, None if len(rows[0]) == width else real.long())
        if self.reading.pooling == "cls":
            return hidden[:, 0]
        return (hidden * real[..., None]).sum(1) / lengths[:, None]


def _check_modules(path: Path) -> None:
    for part in read_json(path) if path.is_file() else []:
        kind = str(part.get("type") if isinstance(part, dict) else part).rpartition(".")[2]
        if kind not in MODULES:
            raise InputError(f"{path}: the model has a part {kind[:60]!r}; accepted: {', '.join(MODULES)}")


def _pooling(fields: Fields) -> str:
    """The one way of pooling that is asked for, as older and newer versions write it."""
    asked = [name for name, wanted in fields.values.items() if name.startswith("pooling_mode_") and wanted is True]
    if asked:
        modes = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
        if len(asked) > 1 or asked[0] not in modes:
            raise fields.wrong("pooling_mode", asked, "one of " + ", ".join(modes))
        return modes[asked[0]]
    return fields.choice("pooling_mode", POOLINGS, "mean")


def _fields(path: Path) -> Fields:
    """The fields of a file that may be missing."""
    values: Any = read_json(path) if path.is_file() else {}
    return Fields(values, path)
