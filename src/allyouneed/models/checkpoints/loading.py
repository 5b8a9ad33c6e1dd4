"""A model or tokenizer from whatever names one, and a model into the Hugging Face layout."""

from __future__ import annotations

from pathlib import Path

from allyouneed.core.errors import InputError, about
from allyouneed.data import materials
from allyouneed.data.tokenizers import Tokenizer
from allyouneed.models.checkpoints import adapters, ggml, huggingface, peft_config
from allyouneed.models.checkpoints.gguf import GGUF
from allyouneed.models.decoder import Decoder
from allyouneed.models.encoder import Encoder
from allyouneed.models.heads import Head

FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model"]


def opened(name: str | Path) -> GGUF | Path:
    """The checkpoint that `name` stands for, fetched where need be: its folder, or its `.gguf` file with the header
    read, which module and tokenizer are both in.
    """
    path = open_checkpoint(name)
    return GGUF.open(path) if path.is_file() else path


def load_module(
    name: str | Path | GGUF, *, packed: bool = False, step: int | None = None, narrow: bool = False
) -> huggingface.Model:
    """The model of a checkpoint as a module in evaluation mode: a decoder, an encoder, or both in one.

    Args:
        name: a material's name, a folder in the Hugging Face layout, a hub id (`org/name`) or a `.gguf` file, which may
            be open already. Of an adapter in PEFT's layout it is the base that the adapter names, with the adapter
            merged.
        packed: compute from a GGUF's quantised blocks instead of float32 copies; such weights are frozen.
        step: of a model that was kept along its training: the folder `step<k>` in the folder `name` (`train.suite`),
            or the hub's revision of that name, as Pythia has them.
        narrow: leave a folder's weights of 16 bits so, mapped from the file: for whoever stores them in few bits next,
            one by one.

    Raises:
        InputError: nothing of that name, no checkpoint of that step, or its files are broken.

    >>> load_module("no-such-model")
    Traceback (most recent call last):
    allyouneed.core.errors.InputError: ...
    """
    if isinstance(name, GGUF):
        return ggml.load(name, packed=packed)
    found = opened(name if step is None else _open_step(name, step))
    if isinstance(found, Path) and adapters.is_adapter(found):
        return _merged(found)
    return ggml.load(found, packed=packed) if isinstance(found, GGUF) else huggingface.load(found, narrow=narrow)


def load_decoder(name: str | Path, *, packed: bool = False) -> Decoder:
    """The same where only a decoder will do.

    Raises:
        InputError: the checkpoint holds another kind of model.
    """
    return as_decoder(load_module(name, packed=packed), name)


def as_decoder(module: huggingface.Model, name: object) -> Decoder:
    """`module`, if it is a decoder.

    Raises:
        InputError: it is of another kind.
    """
    if isinstance(module, Decoder):
        return module
    does = "reads a source and writes a target"
    if isinstance(module, Encoder | Head):
        does = "only reads" if isinstance(module, Encoder) else "tells labels"
    raise InputError(f"{name}: {does}; a decoder is wanted, which continues a text")


def load_tokenizer(name: str | Path | GGUF) -> Tokenizer:
    """The tokenizer that belongs to a checkpoint, with its chat template."""
    found = name if isinstance(name, GGUF) else opened(name)
    if isinstance(found, Path) and adapters.is_adapter(found) and not (found / "tokenizer.json").is_file():
        return load_tokenizer(_chain(found)[1])
    return Tokenizer.from_gguf(found) if isinstance(found, GGUF) else Tokenizer.from_folder(found)


def save(
    module: huggingface.Model,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    max_shard_bytes: int = 5 * 10**9,
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
    if _is_hub_id(name):
        return _from_hub(str(name))
    return materials.path(str(name))


def _merged(folder: Path) -> huggingface.Model:
    """The base that an adapter names, with it merged."""
    base, *found = reversed(_chain(folder))
    module = load_module(base)
    for one in found:
        adapters.merge_adapter(module, one)
    return module


def _chain(folder: Path) -> list[Path]:
    """An adapter's folder and that of its base, which may be an adapter as well, until one is a model."""
    found = [folder.resolve()]
    while adapters.is_adapter(found[-1]):
        named = peft_config.read(found[-1]).base
        if not named:
            mend = f"merge it into one: allyouneed merge MODEL {folder} OUT"
            raise InputError(f"{found[-1]}: the adapter does not name its base; {mend}")
        with about(f"{found[-1]}: its base"):
            found.append(open_checkpoint(named).resolve())
        if found[-1] in found[:-1]:
            raise InputError(f"{folder}: the adapter is its own base")
    return found


def _open_step(name: str | Path, step: int) -> Path:
    """The folder of one step of a run that was kept along its training."""
    path = Path(name)
    if not path.is_dir() and _is_hub_id(name):
        return _from_hub(str(name), revision=f"step{step}")
    if (path / f"step{step}").is_dir():
        return path / f"step{step}"
    numbers = (found.name.removeprefix("step") for found in path.glob("step*") if found.is_dir())
    kept = sorted(int(number) for number in numbers if number.isdecimal())
    if not kept:
        raise InputError(f"{name}: step {step} is asked for, but this is no folder with checkpoints by step (step512)")
    nearest = [*[k for k in kept if k < step][-1:], *[k for k in kept if k > step][:1]]
    raise InputError(f"{name}: no checkpoint of step {step}; the nearest: {' and '.join(map(str, nearest))}")


def _is_hub_id(name: str | Path) -> bool:
    return str(name).count("/") == 1 and not str(name).startswith((".", "/")) and not str(name).endswith(".gguf")


def _from_hub(name: str, revision: str | None = None) -> Path:
    """A model's folder from the Hugging Face Hub, through its cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:160] or type(error).__name__
        asked = name if revision is None else f"{name} at {revision}"
        raise InputError(f"{asked}: no such folder here, and the hub did not give it: {reason}") from None
