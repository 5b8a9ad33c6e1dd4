"""The engine: token ids in, token ids out. It knows nothing of text, nor what a module keeps of it.

Requests come and go while others run; each pass reads one more token of those that are being continued and chunks of
prompts beside them (`generate.scheduler`). Shapes: L rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isnan

import torch
from torch import Tensor

from allyouneed import core
from allyouneed.adapt.lora import mix_of
from allyouneed.core import devices
from allyouneed.core.errors import InputError
from allyouneed.generate.blocks import chained
from allyouneed.generate.continuation import Continuation
from allyouneed.generate.language_model import Sampling
from allyouneed.generate.mail import Mail
from allyouneed.generate.reading import Continues, CurrentReader
from allyouneed.generate.requests import Guide, Request, Step
from allyouneed.generate.sampling import NO_NUMBERS, Sampler
from allyouneed.generate.scheduler import Scheduler, Turns
from allyouneed.generate.speculation import Asked, Drafts, Speculator
from allyouneed.generate.tables import Tables, root
from allyouneed.nn.paged import Storage, bytes_per_block
from allyouneed.nn.sight import Memory

SHARE = 0.25  # of the memory, which blocks take at most where their number is not given, a speculator's included

Stop = Callable[[int, int], bool]  # (request, token just produced) -> whether the request ends here


@dataclass(frozen=True)
class Statistics:
    """What an engine did so far, and how it stands."""

    blocks: int
    free: int  # of them, those that can be taken
    cached: int  # of the free ones, those whose content can still be found
    evictions: int  # findable blocks that were taken for something else
    waiting: int
    running: int
    preemptions: int  # running requests that had to give up their blocks
    read: int  # tokens that the model read
    shared: int  # tokens of prompts that were found instead of read
    made: int  # tokens that were told of in a `Step`
    drafts: int  # tokens that were guessed
    kept: int  # of them, those that the model said, too


class Engine:
    """Generates with one module: decoders, recurrent models, encoder–decoders.

    Tokens of a request do not depend on what else runs, nor on chunks, shared prefixes and interruptions. Not
    thread-safe: whoever owns it steps it.

    >>> from allyouneed.models import llama
    >>> engine = Engine(llama.EXAMPLE.build().eval())
    >>> number = engine.add(Request(ids=[1, 2, 3], sampling=Sampling(max_new_tokens=2)))
    >>> [step.finish_reason for step in (*engine.step(), *engine.step())], engine.idle
    ([None, 'length'], True)
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(core.Config):
        """How much runs at once, and what is kept of it."""

        block_size: int = 16  # tokens a block
        blocks: int | None = None  # None: for `max_batch` requests of the whole context, within a quarter of the memory
        max_batch: int = 16  # requests running at once; more wait
        chunk: int = 512  # most tokens of prompts read in one pass, beside those of running requests
        share_prefixes: bool = True  # what was read for one prompt serves others that begin alike
        kv8: bool = False  # keys and values in 8 bits

        def __post_init__(self) -> None:
            """Refuse numbers that nothing could run with."""
            for name in ("block_size", "max_batch", "chunk"):
                if getattr(self, name) < 1:
                    raise InputError(f"engine: {name}={getattr(self, name)}; at least 1 is needed")
            if self.blocks is not None and self.blocks < 1:
                raise InputError(f"engine: blocks={self.blocks}; at least 1 is needed")

    def __init__(
        self,
        module: Continues,
        eos_ids: Sequence[int] = (),
        config: Config | None = None,
        speculator: Speculator | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """`speculator` guesses the next tokens, so that one pass may give several. Ids from `vocab_size` on only pad
        the module's tables and never come; None: there are none.

        Raises:
            InputError: the speculator does not fit the module, or drafts could not be taken back from its state.
        """
        self.module, self.eos_ids, self.config = module, frozenset(eos_ids), config or Engine.Config()
        self._vocab_size = vocab_size
        like, size, eight = module.new_cache(1, 0), self.config.block_size, self.config.kv8
        each = bytes_per_block(like, size, eight_bits=eight)
        storage = Storage(like, self._count(each, speculator), size, eight_bits=eight)
        self.tables = Tables(module, storage, share=self.config.share_prefixes)
        self.reader = CurrentReader(module, storage)
        self._scheduler = Scheduler(self.tables, max_batch=self.config.max_batch, chunk=self.config.chunk)
        self._under_way: dict[int, Continuation] = {}
        self._mail = Mail()
        self._added = self._read = self._made = self._drafts = self._kept = 0
        self._speculator = speculator
        if speculator is not None:
            if storage.states:
                raise InputError("speculation: drafts cannot be taken back from a recurrent state; go without")
            speculator.attach(module, storage, self.config.chunk)

    @property
    def idle(self) -> bool:
        """Whether nothing waits or runs, and all was told."""
        return not self._under_way and self._mail.taken

    @property
    def vocab_size(self) -> int:
        """How many ids may come: of the module, which may have grown since, where no number was given."""
        return self._vocab_size or int(self.module.config.vocab_size)

    @property
    def room(self) -> int | None:
        """The most tokens of one request, its answer included: the model's context, or fewer that all blocks hold; None
        where there is no limit.
        """
        limit: int | None = self.module.limit
        if not self.tables.storage.banks:
            return limit
        held = self.tables.pool.total * self.tables.size
        return held if limit is None else min(limit, held)

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._scheduler.waiting)

    @property
    def running(self) -> int:
        """How many requests run."""
        return len(self._scheduler.running)

    def statistics(self) -> Statistics:
        """Counts since the engine was made."""
        pool, scheduler = self.tables.pool, self._scheduler
        return Statistics(
            blocks=pool.total,
            free=pool.free,
            cached=pool.cached,
            evictions=pool.evictions,
            waiting=self.waiting,
            running=self.running,
            preemptions=scheduler.preemptions,
            read=self._read,
            shared=scheduler.shared,
            made=self._made,
            drafts=self._drafts,
            kept=self._kept,
        )

    def add(self, request: Request) -> int:
        """Have a request wait its turn; its number, by which steps tell of it.

        Raises:
            InputError: it could never run: no or unknown tokens, more than the context or all blocks hold, nothing to
                generate, a memory that is missing or that nobody reads, an adapter that the module has not.
        """
        ids = [int(token) for token in request.ids]
        self._check(request, ids)
        self._refresh()
        number, self._added = self._added, self._added + 1
        adapters = mix_of(self.module, request.adapter)
        keys = self.tables.keys(ids[:-1], adapters)
        whole = chained(root(adapters) + repr(id(request.memory)).encode(), ids)
        sampler = partial(Sampler, request.sampling, ids, self.vocab_size, self.eos_ids, request.guide)
        pace = self._speculator.pace() if self._speculator else None
        self._under_way[number] = Continuation(number, request, ids, sampler, keys, whole, adapters, pace=pace)
        self._scheduler.add(self._under_way[number])
        return number

    def cancel(self, number: int) -> None:
        """Forget a request; its blocks are free at once. Unknown and finished numbers are fine."""
        self._mail.drop(number)
        self._end(number)

    def step(self) -> list[Step]:
        """One pass over everything that is due, and the tokens that came of it for requests that were `add`ed: none
        while prompts are only being read, none when `idle`.

        Raises:
            RequestError: a request's `stop` or guide raised something, or its logits are no numbers. It is over, the
                others go on: what the pass gave them is told by the next call.
            Exception: what broke a whole pass; all are then read anew.
        """
        if self._under_way and self._mail.taken:
            self._pass()
        return self._mail.take()

    def steps(
        self,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[Sampling],
        stop: Stop = lambda request, token: False,
        memory: Memory | None = None,
        guides: Sequence[Guide | None] | None = None,
        adapter: str | None = None,
    ) -> Iterator[Step]:
        """Tokens as they come, numbers being places in `prompts`; several such calls may take turns on one engine.

        Args:
            prompts: at least one token id each.
            samplings: one for each prompt; where nothing is to be generated, nothing comes.
            stop: asked after every token but an end token, once.
            memory: what was read of another model, a row for each prompt.
            guides: which tokens may come, for each prompt.
            adapter: who answers, as of a `Request`.

        Raises:
            InputError: as `add`.
            Exception: what `stop` or a guide raised; other calls go on.
        """
        memories = [None] * len(prompts) if memory is None else memory.rows()
        numbers: dict[int, int] = {}
        try:
            guided = guides or [None] * len(prompts)
            for i, (ids, sampling, row, guide) in enumerate(zip(prompts, samplings, memories, guided, strict=True)):
                if sampling.max_new_tokens:
                    asked = Request(ids=ids, sampling=sampling, stop=partial(stop, i), memory=row, guide=guide)
                    number = self.add(replace(asked, adapter=adapter))
                    numbers[number] = i
                    self._mail.open(number)
                else:
                    self.check(ids, 0)
            yield from self._told(numbers)
        finally:  # also where nobody listens any longer
            for number in numbers:
                self.cancel(number)
                self._mail.close(number)

    def check(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        """Refuse a prompt that is empty, or that the context cannot hold together with what is asked for."""
        limit, total = self.module.limit, len(prompt) + max_new_tokens
        if not len(prompt):
            raise InputError("prompt is empty; give at least one token")
        if limit is not None and total > limit:
            raise InputError(
                f"prompt of {len(prompt)} tokens and max_new_tokens={max_new_tokens} exceed the context of "
                f"{limit} by {total - limit}; shorten the prompt or lower max_new_tokens"
            )

    def forget(self) -> None:
        """Use nothing that was read of, or made from, the weights so far: to be called after the base's weights, or
        those of any part by way of `.data`, were written to. Merging, unmerging and training of adapters are seen.
        """
        self.tables.forget()
        self.reader.renew()

    def _refresh(self) -> None:
        """Forget if adapters were merged, or written to."""
        if self.reader.stale():
            self.forget()

    def _told(self, numbers: dict[int, int]) -> Iterator[Step]:
        """The steps of some requests of `steps`; what comes for others meanwhile is kept for them."""
        left = set(numbers)
        while left:
            for number in sorted(left):
                for step in self._mail.of(number):
                    if step.finish_reason:
                        left.discard(number)
                    yield replace(step, request=numbers[number])
            if left:
                self._pass()

    def _end(self, number: int) -> None:
        """Hold nothing of a request any more."""
        one = self._under_way.pop(number, None)
        if one is not None:
            self._scheduler.remove(one)
            if self._speculator:
                self._speculator.forget(number)

    @torch.inference_mode()
    def _pass(self) -> None:
        """One pass over those whose turn it is. Where it breaks off, nobody knows what was read: all read anew."""
        turns = self._scheduler.plan()
        assert turns, "requests wait, and none of them can run"
        self._refresh()
        try:
            self._guess(turns)
            self._chosen(self._read_all(turns))
        except BaseException:
            for one in self._scheduler.interrupt_all():
                one.drafts = Drafts()
            raise

    def _read_all(self, turns: Turns) -> list[tuple[Continuation, Tensor]]:
        """Have the model read; those that go on with a token, and the logits that say which."""
        if not turns:  # all wait for their drafts
            return []
        pieces = [self.tables.piece(one.held, one.next(count), one.wanted(count)) for one, count in turns.items()]
        rows = self.reader.read(pieces).split([piece.wanted for piece in pieces])
        due: list[tuple[Continuation, Tensor]] = []
        for (one, count), logits in zip(turns.items(), rows, strict=True):
            start = one.held.length
            self._read += count + len(one.drafts.tokens)
            self.tables.commit(one.held, one.tokens, start + count)
            if one.echoing:
                one.echo(logits.log_softmax(-1)[:, : self.vocab_size], start)
            if one.unread == 0:
                alike = self._scheduler.fork(one) if not one.made else []
                due += [(one, logits[-1 - len(one.drafts.tokens) :]), *((each, logits[-1:]) for each in alike)]
        return due

    def _guess(self, turns: Turns) -> None:
        """Have drafts made for those that read their last token; those that wait for theirs lose their turn."""
        if self._speculator is None:
            return
        able = [one for one in turns if one.unread == 1 and one.ahead > 0]
        asked = [Asked(one.number, one.tokens, one.ahead, one.sampler, one.held) for one in able]
        for one, drafts in zip(able, self._speculator.propose(asked) if asked else (), strict=True):
            if drafts is None:
                del turns[one]
                continue
            one.drafts = drafts
            self._drafts += len(drafts.tokens)

    def _chosen(self, due: Sequence[tuple[Continuation, Tensor]]) -> None:
        """Choose a token for each, given logits (1, V), and with drafts (n + 1, V) as many as follow kept ones."""
        if not due:
            return
        logits = torch.cat([rows for _, rows in due])
        logprobs = logits.log_softmax(-1)[:, : self.vocab_size]
        known = logits[:, : self.vocab_size].numpy()
        likeliest = known.argmax(-1).tolist()  # in a tenth of the time of PyTorch's: 4 µs for 49 k logits
        start = 0
        for one, rows in due:
            try:
                self._settle(one, *self._follow(one, rows, logprobs[start:], likeliest[start:]))
            except BaseException as error:
                self._mail.fault(one.number, error)
                self._end(one.number)
                if not isinstance(error, Exception):  # someone wants out at once
                    raise
            start += len(rows)

    def _follow(self, one: Continuation, rows: Tensor, logprobs: Tensor, likeliest: Sequence[int]) -> tuple[int, bool]:
        """Tell of the tokens that come, as long as they are those that were guessed: how many of these were kept, and
        whether the request is over.
        """
        drafts = one.drafts
        for i, logits in enumerate(rows):
            if one.sampler.plain:
                token = likeliest[i]
            elif i < len(drafts.odds) and not one.sampler.greedy:
                token = one.sampler.judge(logits, drafts.tokens[i], drafts.odds[i])
            else:
                token = one.sampler.choose(logits)
            one.tokens.append(token)
            step = one.step(token, logprobs[i], self._finished(one, token))
            if isnan(step.logprob):  # greedy, too
                raise InputError(NO_NUMBERS)
            self._made += 1
            self._mail.tell(step)
            if step.finish_reason or i == len(drafts.tokens) or token != drafts.tokens[i]:
                break
        return i, step.finish_reason is not None

    def _settle(self, one: Continuation, kept: int, over: bool) -> None:
        """Hold the drafts that were kept, and no others."""
        self._kept += kept
        if over:
            self._end(one.number)
        elif one.pace is not None:
            self.tables.commit(one.held, one.tokens, one.held.length + kept)
            self.tables.trim(one.held)
            one.pace.hear(len(one.drafts.tokens), kept)
            one.drafts = Drafts()

    def _finished(self, one: Continuation, token: int) -> str | None:
        """Why the request ends with this token, if it does."""
        if token in self.eos_ids and not one.request.sampling.ignore_eos:
            return "stop"
        try:
            one.sampler.take(token)
        except InputError:  # the guide gives up
            return "error"
        try:
            return self._ended(one, token)
        except Exception as error:
            self._mail.fault(one.number, error)
            return "error"

    def _ended(self, one: Continuation, token: int) -> str | None:
        """The same, of a token that is no end token."""
        sampling, guide = one.request.sampling, one.request.guide
        if one.request.stop(token):
            return "stop"
        if guide is not None and guide.finished:
            return "stop"
        return "length" if one.made == sampling.max_new_tokens else None

    def _check(self, request: Request, ids: Sequence[int]) -> None:
        sampling = request.sampling
        self.check(ids, sampling.max_new_tokens)
        if sampling.max_new_tokens < 1:
            raise InputError("max_new_tokens=0: a request generates at least one token")
        for token in (min(ids), max(ids), *(token for token, _ in sampling.logit_bias)):
            if not 0 <= token < self.vocab_size:
                raise InputError(f"token {token} is none of the model's; they are 0 to {self.vocab_size - 1}")
        rows = 0 if request.memory is None else len(request.memory.states)
        if rows != int(self.module.answers):
            wanted = "needs one, of what it answers" if self.module.answers else "reads none"
            raise InputError(f"request with a memory of {rows} rows: this model {wanted}")
        needed = self.tables.count(len(ids) + sampling.max_new_tokens)
        if needed > self.tables.pool.total:
            raise InputError(
                f"{len(ids)} tokens and max_new_tokens={sampling.max_new_tokens} take {needed} blocks of "
                f"{self.tables.size}, the cache has {self.tables.pool.total}; raise blocks, or ask for less"
            )

    def _count(self, each: int, speculator: Speculator | None) -> int:
        """How many blocks to have, of so many bytes each."""
        if not each:
            return 0
        if self.config.blocks is not None:
            return self.config.blocks
        assert self.module.limit is not None, "what keeps all tokens has a context"
        wanted = self.config.max_batch * -(-self.module.limit // self.config.block_size)
        most = devices.memory(self.module.device)
        each += speculator.bytes_per_block(self.config.block_size) if speculator else 0
        return wanted if most is None else min(wanted, max(1, int(SHARE * most // each)))
