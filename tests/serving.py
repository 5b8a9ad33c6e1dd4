"""A server in a thread, over a small random model with a real tokenizer, and what its tests share."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import httpx
import openai
import torch

from allyouneed.data.tokenizer_training import train_bpe
from allyouneed.data.tokenizers import Tokenizer
from allyouneed.generate.engine import Engine, Statistics
from allyouneed.generate.local import LocalModel
from allyouneed.generate.requests import Request, Step
from allyouneed.models import llama
from allyouneed.serve.assembly import assemble
from allyouneed.serve.server import Server, listen
from allyouneed.serve.settings import Settings

CONTEXT = 512
NAME = "tiny"
CORPUS = [
    "The quick brown fox jumps over the lazy dog. ",
    'call {"name": "get_weather", "arguments": {"city": "Köln"}} ',
]
TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools> use <tool_call>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def tokenizer() -> Tokenizer:
    """Byte-level BPE, with a template that takes tools as Hermes writes them."""
    made = train_bpe(CORPUS * 4, 400, ["<|im_end|>", "<|im_start|>"])
    made.chat_template = TEMPLATE
    return made


@functools.cache
def module() -> Any:
    """A LLaMA whose weights are large enough that its texts differ."""
    torch.manual_seed(0)
    size = tokenizer().vocab_size
    made = llama.architecture(vocab_size=size, context=CONTEXT, dim=32, num_layers=2, num_heads=4, tied=True)
    built = made.build().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(4)
    return built


def tiny(**config: Any) -> LocalModel:
    """The small model, with an engine of its own."""
    return LocalModel(module(), tokenizer(), NAME, config=Engine.Config(**{"blocks": 128, "max_batch": 4, **config}))


@dataclass(frozen=True)
class Running:
    """A server that answers at `url`."""

    url: str
    lm: LocalModel
    server: Server
    key: str

    @property
    def client(self) -> openai.OpenAI:
        """The official client; what fails is not tried again."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=60)

    def post(self, path: str, **sent: Any) -> httpx.Response:
        """Plain HTTP."""
        return httpx.post(self.url + path, timeout=60, headers={"Authorization": f"Bearer {self.key}"}, **sent)

    @property
    def free(self) -> int:
        """How many blocks can be taken."""
        return self.lm.engine.statistics().free

    def settles(self, seconds: float = 10.0) -> bool:
        """Whether all blocks are free again, at once or soon."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            statistics = self.lm.engine.statistics()
            if statistics.free == statistics.blocks and self.lm.engine.idle:
                return True
            time.sleep(0.02)
        return False


@contextmanager
def serving(lm: LocalModel | None = None, embedder: Any = None, **settings: Any) -> Iterator[Running]:
    """A server in a thread, for as long as the context lasts."""
    lm = lm or tiny()
    chosen = Settings(**{"port": 0, "drain": 5.0, **settings})
    with listen(chosen) as listening:
        server = Server(assemble(lm, chosen, embedder), chosen)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                time.sleep(0.01)
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            yield Running(url, lm, server, chosen.api_key or "none")
        finally:
            server.should_exit = True
            thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


class Scripted:
    """Stands where an engine stands, and writes given ids, one a pass and request; then it ends, or is cut short."""

    def __init__(self, ids: Sequence[int], seconds: float = 0.0) -> None:
        self.ids, self.seconds = ids, seconds
        self.under_way: dict[int, tuple[Request, int]] = {}
        self.added = 0

    waiting, room = 0, CONTEXT

    @property
    def running(self) -> int:
        return len(self.under_way)

    @property
    def idle(self) -> bool:
        return not self.under_way

    def statistics(self) -> Statistics:
        return Statistics(*[0] * len(fields(Statistics)))

    def add(self, request: Request) -> int:
        self.added += 1
        self.under_way[self.added] = (request, 0)
        return self.added

    def cancel(self, number: int) -> None:
        self.under_way.pop(number, None)

    def step(self) -> list[Step]:
        time.sleep(self.seconds)
        return [self._step(number, *self.under_way[number]) for number in list(self.under_way)]

    def _step(self, number: int, request: Request, made: int) -> Step:
        ended = made == len(self.ids)
        token = tokenizer().eos_ids[0] if ended else self.ids[made]
        reason = "stop" if ended or request.stop(token) else None
        if reason is None and made + 1 == request.sampling.max_new_tokens:
            reason = "length"
        self.under_way[number] = (request, made + 1)
        if reason:
            self.cancel(number)
        return Step(number, token, -0.5, reason)


def scripted(text: str, seconds: float = 0.0) -> LocalModel:
    """A model that always writes `text`."""
    lm = tiny()
    lm.engine = Scripted(tokenizer().encode(text), seconds)  # type: ignore[assignment]
    return lm
