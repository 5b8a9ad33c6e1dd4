"""The server through the official client: every feature, each beside what the model answers when asked directly."""

from __future__ import annotations

import json
import math
import time

import httpx
import jsonschema
import numpy as np
import openai
import pytest
from serving import NAME, scripted, serving, tokenizer

from allyouneed.generate.language_model import Sampling

ASK = [{"role": "user", "content": "Name three fruits."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
HOUR = {"type": "function", "function": {"name": "tell_hour", "parameters": {"type": "object", "properties": {}}}}
GREEDY = {"model": NAME, "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running
        assert running.settles()


@pytest.fixture(scope="module")
def client(server):
    return server.client


@pytest.fixture(scope="module")
def alone():
    """The same model, asked without a server."""
    from serving import tiny

    return tiny()


def reason_of(completion):
    return completion.choices[0].finish_reason


class TestModels:
    def test_list(self, client):
        (model,) = client.models.list().data
        assert (model.id, model.max_model_len) == (NAME, 512)
        assert client.models.retrieve(NAME).id == NAME

    def test_unknown(self, client):
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model="tinny", messages=ASK)
        assert caught.value.param == "model" and "did you mean 'tiny'?" in str(caught.value)
        assert caught.value.code == "model_not_found"

    def test_usage_and_figures_tell_what_was_found(self):
        def figure(name: str) -> float:
            lines = httpx.get(f"{server.url}/metrics").text.splitlines()
            return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"allyouneed_{name}"))

        def reaches(name: str, least: float) -> bool:  # an answer may be there before it is counted
            end = time.monotonic() + 10
            while figure(name) < least and time.monotonic() < end:
                time.sleep(0.02)
            return figure(name) >= least

        with serving() as server:
            prompt = "The quick brown fox jumps over the lazy dog. " * 12
            ids = len(tokenizer().encode(prompt))
            asked = {"prompt": prompt, "max_tokens": 2, "n": 3}
            for found in (0, (ids - 1) // 16 * 16):
                usage = server.post("/v1/completions", json=asked).json()["usage"]
                assert usage["prompt_tokens"] == ids and usage["prompt_tokens_details"]["cached_tokens"] == found
            assert reaches("finished_requests_total", 6) and figure("finished_requests_total") == 6
            assert figure("prompt_tokens_total") == 2 * ids
            messages = [{"role": "user", "content": prompt}]
            for kind in ("chat", "responses"):
                for _ in range(2):
                    if kind == "chat":
                        usage = server.client.chat.completions.create(model=NAME, messages=messages, max_tokens=2).usage
                        cached = usage.prompt_tokens_details.cached_tokens
                    else:
                        usage = server.client.responses.create(model=NAME, input=messages, max_output_tokens=2).usage
                        cached = usage.input_tokens_details.cached_tokens
                assert cached > 100
            with server.client.completions.create(model=NAME, prompt="x", max_tokens=400, n=8, stream=True) as stream:
                next(stream)
            assert server.settles()
            assert reaches('finished_requests_total{reason="given up"}', 1)

    def test_health_metrics_and_document(self, server):
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
        text = httpx.get(f"{server.url}/metrics").text
        for name in (
            "requests_running",
            "requests_waiting",
            "engine_free",
            "engine_evictions",
            "generated_tokens_total",
        ):
            assert f"\nallyouneed_{name}" in text
        assert "allyouneed_time_to_first_token_seconds_bucket" in text
        assert "/v1/chat/completions" in httpx.get(f"{server.url}/openapi.json").json()["paths"]


class TestChat:
    def test_equals_the_model_alone(self, client, alone):
        answer = client.chat.completions.create(messages=ASK, **GREEDY)
        prompt = alone.tokenizer.encode(alone.chat_prompt(ASK))
        (expected,) = alone.complete([alone.chat_prompt(ASK)], Sampling(temperature=0, max_new_tokens=12))
        assert answer.choices[0].message.content == expected.text
        assert answer.usage.prompt_tokens == len(prompt) and answer.usage.completion_tokens == 12
        assert (answer.object, reason_of(answer)) == ("chat.completion", "length")

    def test_stream_equals_whole(self, client):
        whole = client.chat.completions.create(messages=ASK, **GREEDY)
        chunks = list(
            client.chat.completions.create(messages=ASK, stream=True, stream_options={"include_usage": True}, **GREEDY)
        )
        *told, last = chunks
        assert "".join(chunk.choices[0].delta.content or "" for chunk in told) == whole.choices[0].message.content
        assert told[0].choices[0].delta.role == "assistant"
        assert [chunk.choices[0].finish_reason for chunk in told if chunk.choices[0].finish_reason] == ["length"]
        assert last.choices == [] and last.usage == whole.usage
        assert all(chunk.usage is None for chunk in told) and len({chunk.id for chunk in chunks}) == 1

    def test_no_usage_unless_asked(self, client):
        chunks = list(client.chat.completions.create(messages=ASK, stream=True, **GREEDY))
        assert all(chunk.choices and chunk.usage is None for chunk in chunks)

    def test_seed_and_n(self, client):
        fields = {"model": NAME, "messages": ASK, "max_tokens": 12, "temperature": 1.5}
        both = client.chat.completions.create(seed=3, n=2, **fields)
        first, second = (choice.message.content for choice in both.choices)
        assert [choice.index for choice in both.choices] == [0, 1] and first != second
        alone = [client.chat.completions.create(seed=seed, **fields).choices[0].message.content for seed in (3, 4)]
        assert [first, second] == alone
        assert both.usage.completion_tokens == 24

    def test_n_streamed(self, client):
        texts = ["", "", ""]
        for chunk in client.chat.completions.create(messages=ASK, n=3, seed=1, stream=True, model=NAME, max_tokens=9):
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        whole = client.chat.completions.create(messages=ASK, n=3, seed=1, model=NAME, max_tokens=9)
        assert texts == [choice.message.content for choice in whole.choices]

    def test_stop_across_chunks(self, client):
        text = client.chat.completions.create(messages=ASK, **GREEDY).choices[0].message.content
        stop = text[len(text) // 2 : len(text) // 2 + 5]
        expected = text[: text.index(stop)]
        stopped = client.chat.completions.create(messages=ASK, stop=["never", stop], **GREEDY)
        assert (stopped.choices[0].message.content, reason_of(stopped)) == (expected, "stop")
        stream = client.chat.completions.create(messages=ASK, stop=stop, stream=True, **GREEDY)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected

    def test_logprobs(self, client, alone):
        answer = client.chat.completions.create(messages=ASK, logprobs=True, top_logprobs=3, **GREEDY)
        entries = answer.choices[0].logprobs.content
        (expected,) = alone.complete([alone.chat_prompt(ASK)], Sampling(temperature=0, max_new_tokens=12))
        assert [entry.logprob for entry in entries] == pytest.approx(expected.logprobs, abs=1e-5)
        assert b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace").startswith(expected.text)
        for entry in entries:
            assert entry.top_logprobs[0].token == entry.token and len(entry.top_logprobs) == 3
            assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1 + 1e-6
        stream = client.chat.completions.create(messages=ASK, logprobs=True, top_logprobs=3, stream=True, **GREEDY)
        told = [chunk.choices[0].logprobs for chunk in stream]
        assert [entry for logprobs in told if logprobs for entry in logprobs.content] == entries

    def test_logit_bias(self, client):
        token = tokenizer().encode("fox")[0]
        answer = client.chat.completions.create(messages=ASK, logit_bias={str(token): 100}, **GREEDY)
        assert answer.choices[0].message.content == tokenizer().decode([token] * 12)

    def test_penalties(self, client):
        plain = client.chat.completions.create(messages=ASK, logit_bias={"70": 14}, **GREEDY)
        other = client.chat.completions.create(
            messages=ASK, logit_bias={"70": 14}, presence_penalty=2, frequency_penalty=2, **GREEDY
        )
        assert plain.choices[0].message.content != other.choices[0].message.content

    def test_limits_of_both_names(self, client):
        for name in ("max_tokens", "max_completion_tokens"):
            answer = client.chat.completions.create(model=NAME, messages=ASK, temperature=0, **{name: 5})
            assert (answer.usage.completion_tokens, reason_of(answer)) == (5, "length")

    def test_without_a_limit_the_context_is_one(self, client):
        answer = client.chat.completions.create(
            model=NAME, messages=ASK, temperature=0, extra_body={"ignore_eos": True}
        )
        assert answer.usage.total_tokens == 512 and reason_of(answer) == "length"

    def test_null_is_absent(self, server):
        fields = dict.fromkeys(("max_tokens", "stop", "seed", "n", "tools", "stream_options", "logit_bias"))
        sent = {"messages": [{"role": "user", "content": "Hi", "name": None}], "temperature": 0, "stream": None}
        plain = server.post("/v1/chat/completions", json=sent)
        nulls = server.post("/v1/chat/completions", json=sent | fields)
        assert plain.status_code == 200 and nulls.json()["choices"] == plain.json()["choices"]

    def test_parts_and_developers(self, client):
        parts = [{"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]}]
        plain = [{"role": "system", "content": "Be\nbrief."}]
        answers = [client.chat.completions.create(messages=[*m, *ASK], **GREEDY) for m in (parts, plain)]
        assert answers[0].choices == answers[1].choices

    def test_unknown_fields_are_told_of(self, client):
        raw = client.chat.completions.with_raw_response.create(messages=ASK, extra_body={"colour": "red"}, **GREEDY)
        assert raw.headers["X-Ignored-Fields"] == "colour"
        odd = {"": 1, " ": 2, "a\r\nb": 3, "é": {}}
        raw = client.chat.completions.with_raw_response.create(messages=ASK, extra_body=odd, **GREEDY)
        assert raw.headers["X-Ignored-Fields"] == r"'', ' ', 'a\r\nb', '\xe9'"

    def test_min_tokens_holds_stop_strings_off(self, client):
        text = client.chat.completions.create(messages=ASK, **GREEDY).choices[0].message.content
        answer = client.chat.completions.create(messages=ASK, stop=text[0], extra_body={"min_tokens": 12}, **GREEDY)
        assert answer.choices[0].message.content.startswith(text[:-2])


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


class TestFormats:
    @pytest.mark.parametrize("temperature", [0, 1.0])
    def test_schema(self, client, temperature):
        form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
        answer = client.chat.completions.create(
            model=NAME, messages=ASK, response_format=form, temperature=temperature, seed=2, max_tokens=200
        )
        assert reason_of(answer) == "stop"
        jsonschema.validate(json.loads(answer.choices[0].message.content), PERSON)

    def test_object(self, client):
        answer = client.chat.completions.create(
            messages=ASK, response_format={"type": "json_object"}, model=NAME, seed=1, max_tokens=8
        )
        assert answer.choices[0].message.content.lstrip().startswith("{")

    def test_completions_too(self, client):
        form = {"type": "json_schema", "json_schema": {"schema": {"enum": ["yes", "no"]}}}
        answer = client.completions.create(model=NAME, prompt="?", max_tokens=20, extra_body={"response_format": form})
        assert json.loads(answer.choices[0].text) in ("yes", "no")

    @pytest.mark.parametrize("schema", [{"type": "no such"}, False, {"allOf": [{"type": "string"}, {"type": "null"}]}])
    def test_what_nothing_satisfies(self, server, schema):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        answer = server.post("/v1/chat/completions", json={"messages": ASK, "response_format": form})
        assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("response_format")


class TestTools:
    CALLS = (
        'Let me see.\n<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call>\n'
        '<tool_call>{"name": "tell_hour", "arguments": {}}</tool_call>'
    )

    def ask(self, client, **fields):
        return client.chat.completions.create(model=NAME, messages=ASK, tools=[WEATHER, HOUR], **fields)

    def test_parsed(self):
        with serving(scripted(self.CALLS)) as server:
            message = self.ask(server.client).choices[0].message
            assert message.content == "Let me see."
            calls = [(call.function.name, call.function.arguments) for call in message.tool_calls]
            assert calls == [("get_weather", '{"city": "Rome"}'), ("tell_hour", "{}")]
            assert reason_of(self.ask(server.client)) == "tool_calls"
            assert len({call.id for call in message.tool_calls}) == 2

    def test_streamed_with_index(self):
        with serving(scripted(self.CALLS)) as server:
            calls: dict[int, list[str]] = {}
            content, reasons = "", []
            for chunk in self.ask(server.client, stream=True):
                choice = chunk.choices[0]
                content += choice.delta.content or ""
                reasons += [choice.finish_reason] if choice.finish_reason else []
                for call in choice.delta.tool_calls or []:
                    assert (call.id is None) == (call.index in calls)
                    known = calls.setdefault(call.index, [call.function.name, ""])
                    known[1] += call.function.arguments
            assert calls == {0: ["get_weather", '{"city": "Rome"}'], 1: ["tell_hour", "{}"]}
            assert (content, reasons) == ("Let me see.", ["tool_calls"])

    def test_a_call_that_meets_the_limit(self):
        length = len(tokenizer().encode(self.CALLS[: self.CALLS.index("Rome")]))
        with serving(scripted(self.CALLS)) as server:
            for stream in (False, True):
                answer = self.ask(server.client, max_tokens=length, stream=stream)
                if stream:
                    assert [c.choices[0].finish_reason for c in answer][-1] == "length"
                else:
                    assert reason_of(answer) == "length"
                    assert answer.choices[0].message.tool_calls[0].function.arguments.startswith('{"city": ')

    def test_one_call_only(self):
        with serving(scripted(self.CALLS)) as server:
            answer = self.ask(server.client, parallel_tool_calls=False)
            assert [call.function.name for call in answer.choices[0].message.tool_calls] == ["get_weather"]
            assert reason_of(answer) == "tool_calls"
            assert server.settles(2)

    def test_none_is_text(self):
        with serving(scripted(self.CALLS)) as server:
            answer = self.ask(server.client, tool_choice="none")
            assert answer.choices[0].message.tool_calls is None and "<tool_call>" in answer.choices[0].message.content

    @pytest.mark.parametrize(
        "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=["required", "named"]
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_forced_by_a_guide(self, client, choice, stream):
        answer = self.ask(client, tool_choice=choice, seed=5, max_tokens=180, stream=stream)
        if stream:
            chunks = list(answer)
            deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
            name, arguments = deltas[0].function.name, "".join(d.function.arguments for d in deltas)
            reason = chunks[-1].choices[0].finish_reason
        else:
            (call,) = answer.choices[0].message.tool_calls
            name, arguments, reason = call.function.name, call.function.arguments, reason_of(answer)
        known = {tool["function"]["name"]: tool["function"]["parameters"] for tool in (WEATHER, HOUR)}
        if reason == "tool_calls":
            jsonschema.validate(json.loads(arguments), known[name])
        else:  # a random model may fill the room with digits
            assert reason == "length"
        assert isinstance(choice, str) or name == "get_weather"

    def test_strict_without_being_forced(self, client):
        strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
        answer = client.chat.completions.create(model=NAME, messages=ASK, tools=[strict], max_tokens=20, seed=1)
        assert answer.usage.completion_tokens

    def test_results_come_back(self, client):
        call = {
            "id": "call_1",
            "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
        }
        turns = [
            *ASK,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        ]
        answer = client.chat.completions.create(
            model=NAME, messages=turns, tools=[HOUR], max_tokens=4, extra_body={"ignore_eos": True}
        )
        assert answer.usage.completion_tokens == 4


class TestCompletions:
    def test_equals_the_model_alone(self, client, alone):
        prompts = ["The quick", "lazy dog", "the"]
        answer = client.completions.create(prompt=prompts, **GREEDY)
        expected = alone.complete(prompts, Sampling(temperature=0, max_new_tokens=12))
        assert [choice.text for choice in answer.choices] == [one.text for one in expected]
        assert answer.usage.prompt_tokens == sum(one.prompt_tokens for one in expected)

    def test_ids(self, client):
        ids = tokenizer().encode("The quick")
        by_text, by_ids, several = (
            client.completions.create(prompt=p, **GREEDY) for p in ("The quick", ids, [ids, ids])
        )
        assert by_text.choices == by_ids.choices
        assert [choice.text for choice in several.choices] == [by_text.choices[0].text] * 2

    def test_echo_and_logprobs(self, client, alone):
        prompt = "The quick brown fox"
        answer = client.completions.create(prompt=prompt, echo=True, logprobs=2, **GREEDY)
        text, found = answer.choices[0].text, answer.choices[0].logprobs
        assert text.startswith(prompt) and found.token_logprobs[0] is None
        length = answer.usage.prompt_tokens
        ids = tokenizer().encode(prompt)
        first = tokenizer().decode(ids[:1])
        assert sum(found.token_logprobs[1:length]) == pytest.approx(
            alone.score([first], [prompt[len(first) :]])[0], abs=1e-4
        )
        assert len(found.tokens) == length + 12 == len(found.text_offset) == len(found.top_logprobs)
        for token, start in zip(found.tokens[:length], found.text_offset, strict=False):
            assert text[start : start + len(token)] == token
        for value, others in zip(found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
            assert max(others.values()) >= value and 2 <= len(others) <= 3

    def test_echo_of_nothing_more(self, client):
        answer = client.completions.create(model=NAME, prompt="The lazy", max_tokens=0, echo=True, logprobs=0)
        assert answer.choices[0].text == "The lazy" and answer.usage.completion_tokens == 0
        assert len(answer.choices[0].logprobs.tokens) == answer.usage.prompt_tokens

    def test_best_of(self, client):
        fields = {"model": NAME, "prompt": "The", "max_tokens": 6, "temperature": 1.2, "seed": 1, "logprobs": 0}
        every = client.completions.create(n=5, **fields)
        best = client.completions.create(n=2, best_of=5, **fields)
        mean = {c.text: np.mean(c.logprobs.token_logprobs) for c in every.choices}
        assert [c.text for c in best.choices] == sorted(mean, key=lambda text: -mean[text])[:2]
        assert best.usage.completion_tokens == every.usage.completion_tokens

    def test_streamed(self, client):
        whole = client.completions.create(prompt=["The", "A"], echo=True, logprobs=1, **GREEDY)
        texts, tokens = ["", ""], [[], []]
        for chunk in client.completions.create(prompt=["The", "A"], echo=True, logprobs=1, stream=True, **GREEDY):
            choice = chunk.choices[0]
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
        assert texts == [choice.text for choice in whole.choices]
        assert tokens == [choice.logprobs.tokens for choice in whole.choices]

    def test_default_limit(self, client):
        assert client.completions.create(model=NAME, prompt="The", seed=0).usage.completion_tokens <= 16


class TestResponses:
    def test_text(self, client, alone):
        answer = client.responses.create(model=NAME, input="Name three fruits.", temperature=0, max_output_tokens=12)
        (expected,) = alone.complete([alone.chat_prompt(ASK)], Sampling(temperature=0, max_new_tokens=12))
        assert answer.output_text == expected.text
        assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert answer.usage.output_tokens == 12

    def test_streamed(self, client):
        fields = {"model": NAME, "input": ASK, "instructions": "Be brief.", "temperature": 0, "max_output_tokens": 12}
        whole = client.responses.create(**fields)
        events = list(client.responses.create(stream=True, **fields))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        kinds = [event.type for event in events]
        assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.incomplete"
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
        assert events[-1].response.output_text == whole.output_text

    def test_schema(self, client):
        form = {"type": "json_schema", "name": "answer", "schema": {"enum": ["yes", "no"]}, "strict": True}
        answer = client.responses.create(model=NAME, input="Well?", text={"format": form})
        assert json.loads(answer.output_text) in ("yes", "no") and answer.status == "completed"

    def test_tools(self):
        flat = {"type": "function", **WEATHER["function"]}
        with serving(scripted(TestTools.CALLS)) as server:
            answer = server.client.responses.create(model=NAME, input="Rome?", tools=[flat])
            message, *calls = answer.output
            assert message.content[0].text == "Let me see."
            assert [(c.name, c.arguments) for c in calls] == [("get_weather", '{"city": "Rome"}'), ("tell_hour", "{}")]
            events = list(server.client.responses.create(model=NAME, input="Rome?", tools=[flat], stream=True))
            done = [e for e in events if e.type == "response.function_call_arguments.done"]
            assert [e.arguments for e in done] == ['{"city": "Rome"}', "{}"]
            back = [
                {"role": "user", "content": "Rome?"},
                {"type": "function_call", "call_id": calls[0].call_id, "name": "get_weather", "arguments": "{}"},
                {"type": "function_call_output", "call_id": calls[0].call_id, "output": "sunny"},
            ]
            assert server.client.responses.create(model=NAME, input=back, tools=[flat]).status == "completed"

    def test_errors_name_its_own_fields(self, server):
        for sent, param in (
            ({"input": "x", "max_output_tokens": 9999}, "max_output_tokens"),
            ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
            ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
            ({"input": "x " * 3000, "instructions": "y"}, "input"),
            ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
            ({"input": "x", "store": True}, "store"),
            ({"input": "x", "truncation": "auto"}, "truncation"),
        ):
            answer = server.post("/v1/responses", json=sent)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert server.post("/v1/responses", json={"input": "x", "store": False, "max_output_tokens": 2}).is_success


class TestOthers:
    def test_embeddings(self, client, alone):
        texts = ["The quick", "lazy dog"]
        answer = client.embeddings.create(model=NAME, input=texts)  # the client asks for base64
        vectors = np.array([entry.embedding for entry in answer.data], np.float32)
        assert np.allclose(vectors, alone.embed(texts), atol=1e-6)
        floats = client.embeddings.create(model=NAME, input=texts, encoding_format="float")
        assert np.allclose([entry.embedding for entry in floats.data], vectors, atol=1e-6)
        short = client.embeddings.create(model=NAME, input=texts[0], dimensions=8)
        assert (
            np.linalg.norm(short.data[0].embedding) == pytest.approx(1, abs=1e-5) and len(short.data[0].embedding) == 8
        )
        ids = client.embeddings.create(model=NAME, input=[tokenizer().encode(text) for text in texts])
        assert np.allclose([entry.embedding for entry in ids.data], vectors, atol=1e-6)
        odd = [tokenizer().encode(letter)[0] for letter in "The"]  # which the text itself is not written with
        assert odd != tokenizer().encode("The")
        found = client.embeddings.create(model=NAME, input=odd)
        assert np.allclose(found.data[0].embedding, alone.embed_ids([odd])[0], atol=1e-6)
        assert found.usage.prompt_tokens == 3

    def test_tokens(self, server):
        answer = server.post("/tokenize", json={"prompt": "The quick"}).json()
        assert answer["tokens"] == tokenizer().encode("The quick") and answer["count"] == len(answer["tokens"])
        assert server.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "The quick"}
        chat = server.post("/tokenize", json={"messages": ASK}).json()
        asked = server.client.chat.completions.create(messages=ASK, **GREEDY)
        assert chat["count"] == asked.usage.prompt_tokens
