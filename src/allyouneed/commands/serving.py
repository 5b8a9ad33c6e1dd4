"""`serve`: a language model behind OpenAI's HTTP interface."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from allyouneed.commands.models import Model, Quantize
from allyouneed.core.errors import InputError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from allyouneed.generate.engine import Engine
    from allyouneed.generate.language_model import LanguageModel
    from allyouneed.generate.local import LocalModel
    from allyouneed.generate.local_encoder import LocalEncoder
    from allyouneed.generate.speculation import Speculator

KEY = "ALLYOUNEED_API_KEY"


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command("serve")(serve)


def serve(
    model: Model = "smollm2-135m-instruct",
    host: Annotated[str, typer.Option(help="What to listen on; other than loopback needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar=KEY, help="What clients must send, on all routes but /health.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; without, as it was named here.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER", help="An adapter in PEFT's layout, asked for as MODEL:NAME; may be repeated."
        ),
    ] = None,
    quantize: Quantize = None,
    embedder: Annotated[str | None, typer.Option(help="An encoder that answers /v1/embeddings.")] = None,
    context: Annotated[
        int | None, typer.Option(help="The most tokens of a request; without, all the model holds.")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Requests running at once; more wait.")] = 16,
    chunk: Annotated[
        int, typer.Option(help="Tokens of prompts read in one pass, beside those of running requests.")
    ] = 512,
    blocks: Annotated[
        int | None, typer.Option(help="Blocks of the cache; without, a quarter of the memory at most.")
    ] = None,
    block_size: Annotated[int, typer.Option(help="Tokens of a block.")] = 16,
    draft: Annotated[str | None, typer.Option(help="A smaller model with the same vocabulary guesses tokens.")] = None,
    lookup: Annotated[bool, typer.Option("--lookup", help="Guess tokens from the text's own repetitions.")] = False,
    early_exit: Annotated[
        int | None, typer.Option(metavar="LAYERS", help="The model's own first layers guess tokens.")
    ] = None,
    kv8: Annotated[bool, typer.Option("--kv8", help="Keep keys and values in 8 bits.")] = False,
    share_prefixes: Annotated[bool, typer.Option(help="Read prompts that begin alike once.")] = True,
    max_requests: Annotated[int, typer.Option(help="Requests under way, waiting ones included; more get 429.")] = 256,
    max_body: Annotated[int, typer.Option(help="The most bytes of a body.")] = 4 << 20,
    timeout: Annotated[float, typer.Option(help="Seconds until an answer is whole.")] = 600.0,
    drain: Annotated[float, typer.Option(help="Seconds for answers under way when told to stop.")] = 30.0,
) -> None:
    """Answer OpenAI clients over HTTP: chat, completions, responses, embeddings. SIGTERM or Ctrl-C ends it gently."""
    from allyouneed.generate.engine import Engine
    from allyouneed.generate.load import load

    try:
        from allyouneed.serve.assembly import assemble
        from allyouneed.serve.server import listen, run
        from allyouneed.serve.settings import Settings
    except ImportError as error:
        raise InputError(f"serving needs {error.name}: pip install 'allyouneed[serve]'") from None
    settings = Settings(
        host=host,
        port=port,
        api_key=api_key,
        context=context,
        max_requests=max_requests,
        max_body=max_body,
        timeout=timeout,
        drain=drain,
    )
    config = Engine.Config(
        block_size=block_size,
        blocks=_blocks(blocks, context, max_batch, block_size),
        max_batch=max_batch,
        chunk=chunk,
        share_prefixes=share_prefixes,
        kv8=kv8,
    )
    guessing, adapters = _speculator(draft, lookup, early_exit), named_folders(adapter or [])
    with listen(settings) as listening:
        began = time.perf_counter()
        loaded = load(model, quantize=quantize, adapters=adapters)
        app = assemble(_served(loaded, name or model, config, guessing), settings, _encoder(embedder))
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/v1"
        listening.listen()  # who reads the line below may ask at once
        print(f"{name or model} answers at {address} (loaded in {time.perf_counter() - began:.1f} s)", flush=True)
        _tell_room(app)
        try:
            run(app, settings, listening)
        except KeyboardInterrupt:
            print("stopped")


def _tell_room(app: FastAPI) -> None:
    """Say where requests have to be shorter than the model could read."""
    models = app.state.service.models.values()
    for served in {served.lm.module: served for served in reversed(models)}.values():  # a model before its adapters
        limit, room = served.lm.module.limit, served.lm.engine.room if served.generates else None
        if room is not None and served.context == room != limit:
            said = f"{served.name}: a request has {room} tokens at most, as many as all blocks hold"
            print(f"{said}, of {limit} that the model reads; raise --blocks for more", file=sys.stderr)


def _blocks(blocks: int | None, context: int | None, max_batch: int, block_size: int) -> int | None:
    """With a context of its own the cache holds `max_batch` requests of that length."""
    if blocks is not None or context is None:
        return blocks
    return max_batch * -(-context // block_size)


def _speculator(draft: str | None, lookup: bool, early_exit: int | None) -> Speculator | None:
    from allyouneed.generate.drafting import Draft, EarlyExit
    from allyouneed.generate.load import load
    from allyouneed.generate.local import LocalModel
    from allyouneed.generate.speculation import PromptLookup

    if (draft is not None) + lookup + (early_exit is not None) > 1:
        raise InputError("--draft, --lookup and --early-exit all guess tokens; choose one of them")
    if draft is None:
        return PromptLookup() if lookup else None if early_exit is None else EarlyExit(early_exit)
    lm = load(draft)
    if not isinstance(lm, LocalModel):
        raise InputError(f"--draft {draft} does not generate; name a decoder of this machine")
    return Draft(lm.module)


def named_folders(given: Sequence[str]) -> dict[str, str]:
    """`NAME=FOLDER`s as a mapping.

    >>> named_folders(["sql=runs/sql"])
    {'sql': 'runs/sql'}
    """
    found: dict[str, str] = {}
    for one in given:
        name, sign, folder = one.partition("=")
        if not (name and sign and folder) or name in found:
            raise InputError(f"--adapter {one}: {'is there twice' if name in found else 'write NAME=FOLDER'}")
        found[name] = folder
    return found


def _served(
    lm: LanguageModel, name: str, config: Engine.Config, guessing: Speculator | None
) -> LocalModel | LocalEncoder:
    """The model with an engine of this configuration."""
    from allyouneed.generate.local import LocalModel
    from allyouneed.generate.local_encoder import LocalEncoder

    if isinstance(lm, LocalModel):
        return LocalModel(lm.module, lm.tokenizer, name, config=config, speculator=guessing)
    if isinstance(lm, LocalEncoder):
        return LocalEncoder(lm.module, lm.tokenizer, name, lm.reading)
    raise InputError(f"{lm.name} is an endpoint already; serve a model of this machine")


def _encoder(name: str | None) -> LocalEncoder | None:
    from allyouneed.generate.load import load
    from allyouneed.generate.local_encoder import LocalEncoder

    lm = None if name is None else load(name)
    if lm is not None and not isinstance(lm, LocalEncoder):
        raise InputError(f"--embedder {name} is no encoder; a decoder answers /v1/embeddings by itself")
    return lm
