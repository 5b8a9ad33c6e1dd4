"""One answer of a chat in the making: news in, deltas out, and the whole message of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from allyouneed.generate.requests import Step, Top
from allyouneed.serve.answers import (
    CallAnswer,
    ChatLogprobs,
    Delta,
    FinishReason,
    MessageAnswer,
    TokenLogprob,
    TopLogprob,
    identity,
)
from allyouneed.serve.driver import News
from allyouneed.serve.served import Served
from allyouneed.serve.tools import Argued, Called, Event, Reader, Said


class Turn:
    """What one answer has said so far.

    Args:
        reader: tells calls from text; None: all is text.
        forced: the answer is a call, because a guide lets nothing else be written.
        parallel: several calls are accepted; else the first ends the answer.
    """

    def __init__(self, reader: Reader | None = None, *, forced: bool = False, parallel: bool = True) -> None:
        self.reader, self.forced, self.parallel = reader, forced, parallel
        self.content, self.calls, self.tokens = "", [], 0  # type: str, list[CallAnswer], int
        self.cached: int | None = None  # tokens of its prompt that were not read for it; None: nothing was heard yet
        self.finish_reason: FinishReason | None = None

    def hear(self, news: News) -> list[Delta]:
        """What `news` adds to the message."""
        self.tokens += len(news.steps)
        self.cached = news.steps[0].cached if self.cached is None else self.cached
        if self.reader is None:
            deltas = self._deltas([Said(news.text)] if news.text else [])
        else:
            deltas = self._deltas(self.reader.push(news.text))
            deltas += self._deltas(self.reader.finish()) if news.finish_reason else []
        if self.enough:
            self.finish_reason = "tool_calls"
        elif news.finish_reason:
            self.finish_reason = self._reason(news.finish_reason)
        return deltas

    @property
    def enough(self) -> bool:
        """Whether a call is complete where no more than one is wanted."""
        return not self.parallel and self.reader is not None and self.reader.whole > 0

    def message(self) -> MessageAnswer:
        """The whole message."""
        message: MessageAnswer = {
            "role": "assistant",
            "content": self.content if self.content or not self.calls else None,
            "refusal": None,
        }
        if self.calls:
            message["tool_calls"] = self.calls
        return message

    def _deltas(self, events: Iterable[Event]) -> list[Delta]:
        return [delta for event in events if (delta := self._delta(event))]

    def _delta(self, event: Event) -> Delta | None:
        if isinstance(event, Said):
            self.content += event.text
            return {"content": event.text}
        if isinstance(event, Called) and (self.parallel or not self.calls):
            call: CallAnswer = {
                "id": identity("call_"),
                "type": "function",
                "function": {"name": event.name, "arguments": ""},
            }
            self.calls.append(call)
            opened: CallAnswer = {
                "index": len(self.calls) - 1,
                "id": call["id"],
                "type": "function",
                "function": {"name": event.name, "arguments": ""},
            }
            return {"tool_calls": [opened]}
        if isinstance(event, Argued):
            self.calls[-1]["function"]["arguments"] += event.text
            return {"tool_calls": [{"index": len(self.calls) - 1, "function": {"arguments": event.text}}]}
        return None

    def _reason(self, reason: str) -> FinishReason:
        """A turn that the limit cut is no finished call, unless the guide had already let the call end."""
        if not self.calls:
            return "length" if reason == "length" else "stop"
        assert self.reader is not None
        complete = not self.reader.cut and (self.forced or reason != "length")
        return "tool_calls" if complete else "length" if reason == "length" else "stop"


def chat_logprobs(served: Served, steps: Sequence[Step]) -> ChatLogprobs:
    """The log-probabilities of some tokens as chats tell them."""
    return {"content": [_entry(served, step) for step in steps], "refusal": None}


def _entry(served: Served, step: Step) -> TokenLogprob:
    return {**_top(served, step.token, step.logprob), "top_logprobs": _tops(served, step.top)}


def _tops(served: Served, top: Top) -> list[TopLogprob]:
    return [_top(served, token, logprob) for token, logprob in top]


def _top(served: Served, token: int, logprob: float) -> TopLogprob:
    written = served.token_bytes(token)
    text = written.decode("utf-8", errors="replace")
    return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(written)}


LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's own number for what is impossible
