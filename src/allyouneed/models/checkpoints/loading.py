"""A model or tokenizer from whatever names one, and a model into the Hugging Face layout."""

from __future__ import annotations

from pathlib import Path

from allyouneed.core.errors import InputError
from allyouneed.data import materials
from allyouneed.data.tokenizers import Tokenizer
from allyouneed.models.checkpoints import ggml, huggingface
from allyouneed.models.checkpoints.gguf import GGUF
from allyouneed.models.decoder import Decoder

FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model"]


def load_module(name: str | Path, *, packed: bool = False) -> Decoder:
    """The model of a checkpoint as a module in evaluation mode.

    Args:
        name: a material's name, a folder in the Hugging Face layout, a hub id (`org/name`) or a `.gguf` file.
        packed: compute from a GGUF's quantised blocks instead of float32 copies; such weights are frozen.

    Raises:
        InputError: nothing of that name, or its files are broken.

    >>> load_module("no-such-model")
    Traceback (most recent call last):
    allyouneed.core.errors.InputError: ...
    """
    path = open_checkpoint(name)
    return ggml.load(GGUF.open(path), packed=packed) if path.is_file() else huggingface.load(path)


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer that belongs to a checkpoint, with its chat template."""
    path = open_checkpoint(name)
    return Tokenizer.from_gguf(GGUF.open(path)) if path.is_file() else Tokenizer.from_folder(path)


def save(
    module: Decoder, folder: str | Path, tokenizer: Tokenizer | None = None, *, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write the Hugging Face layout: config.json, safetensors, and the tokenizer's files where it is given.

    `transformers` loads the folder with the same outputs where it has such a model.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    huggingface.save(module, folder, max_shard_bytes=max_shard_bytes)
    if tokenizer is not None:
        tokenizer.save(folder)


def open_checkpoint(name: str | Path) -> Path:
    """The folder or `.gguf` file that `name` stands for, fetched where need be."""
    path = Path(name)
    if path.is_dir() or path.is_file():
        return path
    if str(name).count("/") == 1 and not str(name).startswith((".", "/")) and not str(name).endswith(".gguf"):
        return _from_hub(str(name))
    return materials.path(str(name))


def _from_hub(name: str) -> Path:
    """A model's folder from the Hugging Face Hub, through its cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:160] or type(error).__name__
        raise InputError(f"{name}: no such folder here, and the hub did not give it: {reason}") from None
