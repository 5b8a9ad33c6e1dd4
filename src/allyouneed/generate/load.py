"""`load`: a language model from whatever names one."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from allyouneed.core.devices import give_back
from allyouneed.core.errors import InputError, about, unknown
from allyouneed.generate.language_model import LanguageModel

if TYPE_CHECKING:
    from allyouneed.models.decoder import Decoder

CODES = ("nf4", "fp4")  # of `quantize`, besides those of `adapt.packing`


def load(
    name: str | Path | Sequence[str],
    *,
    packed: bool = True,
    quantize: str | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    timeout: float | None = None,
) -> LanguageModel:
    """A language model; an encoder can only be asked for vectors, and says so.

    Args:
        name: a material's name, a folder in the Hugging Face layout, a hub id (`org/name`), a `.gguf` file, or the URL
            of an OpenAI-compatible endpoint; several with commas between, or a list of them, are a fleet that serves
            one model.
        packed: keep a GGUF's quantised blocks as they are and compute from them, which is faster to generate with and
            a sixth of the memory; False: float32 weights, for training.
        quantize: store weights in few bits while they are loaded: "int8" or "int4" packs float ones as the native
            program computes with them (`adapt.packing`); "nf4" or "fp4" as adapters are trained over them
            (`adapt.quantise`), which is slower to generate with.
        adapters: folders in PEFT's layout by the names that `LocalModel.with_adapter` knows them by; none is in use.
        timeout: of an endpoint, seconds without a byte from it; None: as `RemoteModel` has it.

    Raises:
        InputError: nothing of that name, or its files are broken; weights that are packed already, an adapter of
            another base.
    """
    if not isinstance(name, str | Path) or str(name).startswith(("http://", "https://")):
        from allyouneed.generate.remote import RemoteModel

        if quantize or adapters:
            raise InputError(f"{name}: an endpoint has weights and adapters of its own; name a model of this machine")
        asked = str(name) if isinstance(name, Path) else name
        return RemoteModel(asked) if timeout is None else RemoteModel(asked, timeout=timeout)
    if timeout is not None:
        raise InputError(f"{name}: a timeout is for endpoints; a model of this machine answers when it is done")
    from allyouneed.generate.local import LocalModel
    from allyouneed.generate.local_encoder import LocalEncoder, Reading
    from allyouneed.models.checkpoints.loading import as_decoder, load_module, load_tokenizer, opened
    from allyouneed.models.encoder import Encoder
    from allyouneed.nn.prepacked import prepack

    found = opened(name)
    few = quantize in CODES  # then each layer is stored in few bits as it comes from the file
    module, tokenizer = load_module(found, packed=packed, narrow=few), load_tokenizer(found)
    if isinstance(module, Encoder):
        assert isinstance(found, Path), "no encoder comes in a GGUF file"
        if quantize or adapters:
            raise InputError(f"{name}: an encoder is neither quantised nor adapted while it is loaded; name a decoder")
        prepack(module)
        return LocalEncoder(module, tokenizer, str(name), Reading.of(found, module.config.context))
    joined = _joined(as_decoder(module, name), str(name), quantize, adapters or {})
    give_back()  # an eighth of what stays resident: the vocabulary was read by way of many small pieces
    return LocalModel(joined, tokenizer, str(name))


def _joined(module: Decoder, name: str, quantize: str | None, adapters: Mapping[str, str | Path]) -> Decoder:
    """The module with weights in few bits, and adapters beside them."""
    from allyouneed.adapt.lora import use
    from allyouneed.models.checkpoints.adapters import load_adapter

    if quantize is not None:
        with about(name):
            _quantise(module, quantize, name)
    for adapter, folder in adapters.items():
        load_adapter(module, folder, adapter)
    if adapters:
        use(module, {})
    return module


def _quantise(module: Decoder, kind: str, name: str) -> None:
    """Store the weights in few bits, in place, and say which are not."""
    from allyouneed.adapt import packing
    from allyouneed.adapt.quantise import Quantise, quantise
    from allyouneed.models.checkpoints.names import listed

    if kind in packing.KINDS:
        left = packing.pack(module, kind)
        if left:
            warnings.warn(f"{name}: {listed(left)} stay in float32: no whole blocks", stacklevel=4)
    elif kind in CODES:
        quantise(module, Quantise.Config(kind=kind))
        module.float()  # what is left of 16 bits
    else:
        raise unknown("kind of weights", kind, (*packing.KINDS, *CODES))
