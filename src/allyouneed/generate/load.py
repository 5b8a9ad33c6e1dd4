"""`load`: a language model from whatever names one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from allyouneed.core.devices import give_back
from allyouneed.generate.language_model import LanguageModel


def load(name: str | Path | Sequence[str], *, packed: bool = True) -> LanguageModel:
    """A language model; an encoder can only be asked for vectors, and says so.

    Args:
        name: a material's name, a folder in the Hugging Face layout, a hub id (`org/name`), a `.gguf` file, or the URL
            of an OpenAI-compatible endpoint; several with commas between, or a list of them, are a fleet that serves
            one model.
        packed: keep a GGUF's quantised blocks as they are and compute from them, which is faster to generate with and
            a sixth of the memory; False: float32 weights, for training.

    Raises:
        InputError: nothing of that name, or its files are broken.
    """
    if not isinstance(name, str | Path) or str(name).startswith(("http://", "https://")):
        from allyouneed.generate.remote import RemoteModel

        return RemoteModel(str(name) if isinstance(name, Path) else name)
    from allyouneed.generate.local import LocalModel
    from allyouneed.generate.local_encoder import LocalEncoder, Reading
    from allyouneed.models.checkpoints.loading import as_decoder, load_module, load_tokenizer, opened
    from allyouneed.models.encoder import Encoder
    from allyouneed.nn.prepacked import prepack

    found = opened(name)
    module, tokenizer = load_module(found, packed=packed), load_tokenizer(found)
    if isinstance(module, Encoder):
        assert isinstance(found, Path), "no encoder comes in a GGUF file"
        prepack(module)
        return LocalEncoder(module, tokenizer, str(name), Reading.of(found, module.config.context))
    give_back()  # an eighth of what stays resident: the vocabulary was read by way of many small pieces
    return LocalModel(as_decoder(module, name), tokenizer, str(name))
