"""One thread owns the engine and steps it; the event loop hands it requests and hears tokens.

Requests, cancellations and tokens cross between threads as messages; nothing here waits on the event loop. Knows no
HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from allyouneed.generate.requests import Request, RequestError, Step
from allyouneed.generate.stopping import Pieces, StopStrings
from allyouneed.serve.errors import ApiError

LOG = logging.getLogger("allyouneed.serve")


class Steps(Protocol):
    """What the driver needs of an engine."""

    @property
    def idle(self) -> bool:
        """Whether nothing is waiting or running."""

    def add(self, request: Request) -> int:
        """The number of a request from now on."""

    def cancel(self, number: int) -> None:
        """Forget a request."""

    def step(self) -> list[Step]:
        """One pass over everything that is due."""


@dataclass(frozen=True)
class News:
    """What became known of one request: its tokens in order and the text that is sure with them."""

    index: int
    steps: Sequence[Step]
    text: str

    @property
    def finish_reason(self) -> str | None:
        """Why the request ended, if it did."""
        return self.steps[-1].finish_reason


Heard = News | Exception


@dataclass(eq=False)
class Job:
    """One request on its way; `events` belongs to the event loop, all else to the driver's thread."""

    index: int  # among those that belong together
    request: Request
    text: StopStrings
    events: asyncio.Queue[Heard]
    number: int | None = None
    gone: bool = False
    steps: list[Step] = field(default_factory=list)
    error: Exception | None = None  # why its text could not be made

    def push(self, token: int) -> bool:
        """Whether its text ends with `token`. Where no text can be made of it, that ends this request and no other."""
        try:
            return self.text.push(token)
        except Exception as error:
            self.error = error
            return True


class Driver:
    """Owns an engine. `start` and `close` frame its life; between them any number of generations run at once."""

    def __init__(self, engine: Steps, read: Callable[[Any], None] = lambda engine: None) -> None:
        """`read` is called in the driver's thread, first of all and after each pass, to take figures of the engine."""
        self.engine, self.read = engine, read
        self.jobs: dict[int, Job] = {}
        self._messages: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closing = self._ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether it steps, and will."""
        return self._thread.is_alive() and not self._ended

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to step; what is heard is delivered on `loop`."""
        self._loop = loop
        self._thread.start()

    def close(self) -> None:
        """Stop after the pass under way; whoever still waits hears of it."""
        self._send(self._close)
        self._thread.join()

    def fail(self, error: Exception) -> None:
        """End all generations with `error`."""
        self._send(lambda: self._fail_all(error))

    async def submit(self, jobs: Iterable[Job]) -> None:
        """Hand over jobs, all or none.

        Raises:
            InputError: one of them can never run.
            ApiError: nothing runs any more.
        """
        jobs = list(jobs)
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._send(lambda: self._add(jobs, answer))
        if self._ended:  # what was sent before that was seen is answered by the thread's last act
            raise _ended()
        try:
            await asyncio.shield(answer)
        except asyncio.CancelledError:
            self.cancel(jobs)
            raise

    def cancel(self, jobs: Iterable[Job]) -> None:
        """Forget jobs; those that ended are passed over."""
        jobs = list(jobs)
        self._send(lambda: self._cancel(jobs))

    def _send(self, message: Callable[[], None]) -> None:
        self._messages.put(message)

    def _run(self) -> None:
        try:
            self.read(self.engine)
            while not self._closing:
                self._go_on()
        except Exception as error:
            LOG.critical("the engine cannot go on; restart the server", exc_info=error)
        finally:
            self._end()

    def _go_on(self) -> None:
        """Hear, and one pass. One that fails costs what was running; where that cannot be given up, nothing goes on."""
        try:
            self._hear()
            if not self._closing and not self.engine.idle:
                self._step()
            self.read(self.engine)
        except RequestError as error:
            self._fail(error)
        except Exception as error:
            LOG.error("a pass of the engine failed; what was running is given up", exc_info=error)
            self._fail_all(ApiError("the engine failed; the log says how", status=500, code="engine_failed"))

    def _end(self) -> None:
        """All that wait hear that nothing comes any more, and so do those whose messages were not yet read."""
        jobs, self.jobs = list(self.jobs.values()), {}
        for job in jobs:
            job.gone, job.number = True, None
        self._deliver([(job, _ended()) for job in jobs])
        self._ended = True
        with contextlib.suppress(queue.Empty):
            while True:
                self._messages.get(block=False)()

    def _hear(self) -> None:
        """Take all messages; wait for one where there is nothing else to do."""
        block = self.engine.idle
        with contextlib.suppress(queue.Empty):
            while True:
                self._messages.get(block=block)()
                block = False

    def _step(self) -> None:
        told: list[Job] = []
        for step in self.engine.step():
            job = self.jobs.get(step.request)
            if job is not None:
                if not job.steps:
                    told.append(job)
                job.steps.append(step)
        self._deliver([(job, self._news(job)) for job in told])

    def _news(self, job: Job) -> Heard:
        steps, job.steps = job.steps, []
        if job.error is not None:
            return self._given_up(job, job.error)
        if steps[-1].finish_reason == "error":
            self._forget(job)
            return ApiError(
                "the text could not go on as its format demands; allow more, or ask for less", code="format"
            )
        try:
            if steps[-1].finish_reason is not None:
                self._forget(job)
                job.text.finish()
            return News(job.index, steps, job.text.take())
        except Exception as error:
            return self._given_up(job, error)

    def _given_up(self, job: Job, error: Exception) -> Heard:
        LOG.error("the text of a request could not be made; it is given up", exc_info=error)
        self._cancel([job])
        return ApiError("the text of this answer could not be made; the log says how", status=500, code="text_failed")

    def _fail(self, error: RequestError) -> None:
        """One request cannot go on."""
        LOG.error("a request broke and is given up", exc_info=error)
        job = self.jobs.get(error.request)
        if job is not None:
            self._forget(job)
            told = ApiError("the engine failed on this request; the log says how", status=500, code="engine_failed")
            self._deliver([(job, told)])

    def _add(self, jobs: Sequence[Job], answer: asyncio.Future[None]) -> None:
        if self._ended:
            self._call(lambda: _settle(answer, _ended()))
            return
        try:
            for job in jobs:
                if not job.gone:
                    job.number = self.engine.add(replace(job.request, stop=job.push))
                    self.jobs[job.number] = job
        except Exception as error:
            refusal = error  # a name that outlives this block
            self._cancel(jobs)
            self._call(lambda: _settle(answer, refusal))
        else:
            self._call(lambda: _settle(answer, None))

    def _cancel(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            job.gone = True
            if job.number is not None:
                self.engine.cancel(job.number)
                self._forget(job)

    def _forget(self, job: Job) -> None:
        if job.number is not None:
            self.jobs.pop(job.number, None)
            job.number = None

    def _fail_all(self, error: Exception) -> None:
        jobs = list(self.jobs.values())
        self._deliver([(job, error) for job in jobs])
        self._cancel(jobs)

    def _close(self) -> None:
        self._closing = True

    def _deliver(self, heard: Sequence[tuple[Job, Heard]]) -> None:
        if heard:
            self._call(lambda: _put(heard))

    def _call(self, function: Callable[[], Any]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(function)


def _ended() -> ApiError:
    return ApiError("the server is shutting down", status=503, code="shutting_down")


def _put(heard: Sequence[tuple[Job, Heard]]) -> None:
    for job, one in heard:
        job.events.put_nowait(one)


def _settle(answer: asyncio.Future[None], error: Exception | None) -> None:
    if answer.done():
        return
    if error is None:
        answer.set_result(None)
    else:
        answer.set_exception(error)


class Generation:
    """Requests that belong together: what is heard of them, in the order in which it comes.

    Args:
        most_seconds: after so many the rest is given up, and `TimeoutError` raised.
    """

    def __init__(
        self,
        driver: Driver,
        requests: Sequence[Request],
        pieces: Callable[[], Pieces],
        most_seconds: float,
        watch: Callable[[News, float, bool], None] = lambda news, seconds, first: None,
        ended: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """`watch` hears the news too, the seconds since the last of the same request, and whether it is the first;
        `ended` why each request ended.
        """
        events: asyncio.Queue[Heard] = asyncio.Queue()
        self.driver, self.events, self.most_seconds = driver, events, most_seconds
        self.watch, self.ended = watch, ended
        self.started, self.left = False, set(range(len(requests)))  # those that have not ended
        self.jobs = [
            Job(i, one, StopStrings(pieces(), one.sampling.stop, one.sampling.min_tokens), events)
            for i, one in enumerate(requests)
        ]

    async def start(self) -> None:
        """Hand all requests over.

        Raises:
            InputError: one can never run.
        """
        self.began = asyncio.get_running_loop().time()
        self.last: dict[int, float] = {}
        await self.driver.submit(self.jobs)
        self.started = True

    def end(self, index: int) -> None:
        """Give up one request: enough of it was heard."""
        self.driver.cancel([self.jobs[index]])
        self._end(index, "enough")

    def close(self) -> None:
        """Give up what has not ended. May be called at any time, and again."""
        self.driver.cancel(self.jobs)
        for index in list(self.left):
            self._end(index, "given up")

    def _end(self, index: int, reason: str) -> None:
        if index in self.left:
            self.left.remove(index)
            if self.started:
                self.ended(reason)

    async def news(self) -> AsyncIterator[News]:
        """What is heard, until all requests have ended.

        Raises:
            TimeoutError, ApiError: the rest will not come.
        """
        while self.left:
            async with asyncio.timeout_at(self.began + self.most_seconds):
                heard = await self.events.get()
            if isinstance(heard, Exception):
                raise heard
            if heard.index in self.left:
                self._told(heard)
                yield heard

    def _told(self, news: News) -> None:
        now = asyncio.get_running_loop().time()
        self.watch(news, now - self.last.get(news.index, self.began), news.index not in self.last)
        self.last[news.index] = now
        if news.finish_reason is not None:
            self._end(news.index, news.finish_reason)
