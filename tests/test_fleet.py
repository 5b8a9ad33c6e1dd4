"""A fleet of endpoints on this machine that die, hang, refuse, are busy and come back."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from test_remote import GREEDY, Reply, Server, completion, delta, nothing_from_outside, serving, stream

import allyouneed as ayn
from allyouneed.core.errors import InputError, RemoteError
from allyouneed.generate.endpoint import Endpoint, PassingError
from allyouneed.generate.fleet import FIRST_REST, Fleet
from allyouneed.generate.language_model import AccessError, LanguageModel, Sampling
from allyouneed.generate.remote import RemoteModel

__all__ = ["nothing_from_outside"]  # the fixture holds here too
Behaviour = Callable[[str, Any], Reply | None]
MODELS = Reply({"data": [{"id": "m"}]})


def echo(path: str, body: Any) -> Reply:
    return MODELS if path == "/v1/models" else completion(f"<{body['prompt']} {body.get('seed')}>")


def always(reply: Reply | None) -> Behaviour:
    return lambda path, body: reply


@contextmanager
def fleet_of(*behaviours: Behaviour, **options: Any) -> Iterator[tuple[RemoteModel, list[Server], list[float]]]:
    """A model over a server for each behaviour; pauses between tries are recorded and not waited for."""
    pauses: list[float] = []
    with ExitStack() as stack:
        servers = [stack.enter_context(serving(behave)) for behave in behaviours]
        urls = [server.url for server in servers]
        lm = RemoteModel(urls, **({"model": "m", "sleep": pauses.append} | options))
        stack.callback(lm.close)
        yield lm, servers, pauses


def fleet(lm: RemoteModel) -> Fleet:
    assert isinstance(lm.caller.service, Fleet)
    return lm.caller.service


def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.005)


def texts(count: int, seed: int | None = None) -> list[str]:
    return [f"<{i} {None if seed is None else seed + i}>" for i in range(count)]


def asked(servers: list[Server]) -> list[int]:
    return [len(server.bodies()) for server in servers]


def test_answers_keep_their_order_and_seeds_their_requests() -> None:
    slow = Counter[str]()

    def uneven(path: str, body: Any) -> Reply:
        slow[path] += 1
        time.sleep(0.002 * (slow[path] * 37 % 5))
        return echo(path, body)

    prompts = [str(i) for i in range(60)]
    with fleet_of(uneven, uneven, echo, concurrency=3) as (lm, servers, _):
        assert isinstance(lm, LanguageModel)
        assert lm.generate(prompts, seed=100, max_new_tokens=1) == texts(60, 100)
        assert sum(asked(servers)) == 60 and all(count >= 3 for count in asked(servers))
    with fleet_of(echo) as (alone, _, _):
        assert alone.generate(prompts, seed=100, max_new_tokens=1) == texts(60, 100)


def test_no_endpoint_is_given_more_than_its_share_also_when_others_are_down() -> None:
    def slow(path: str, body: Any) -> Reply:
        time.sleep(0.005)
        return echo(path, body)

    with fleet_of(slow, slow, always(None), concurrency=2) as (lm, servers, pauses):
        assert lm.generate([str(i) for i in range(50)]) == texts(50)
        assert [server.most for server in servers[:2]] == [2, 2] and pauses == []


def test_the_least_loaded_is_chosen() -> None:
    gate = threading.Event()

    def held(path: str, body: Any) -> Reply:
        gate.wait(20)
        return echo(path, body)

    with fleet_of(held, echo, concurrency=4) as (lm, servers, _):
        caller = threading.Thread(target=lm.generate, args=(["held"],))
        caller.start()
        until(lambda: servers[0].under_way == 1)
        for i in range(10):
            assert lm.generate([str(i)]) == [f"<{i} None>"]
        assert asked(servers) == [1, 10]
        gate.set()
        caller.join()


def test_equals_take_turns() -> None:
    with fleet_of(echo, echo, echo) as (lm, servers, _):
        for i in range(9):
            lm.generate([str(i)])
        assert asked(servers) == [3, 3, 3]


@pytest.mark.parametrize("status", [None, 408, 429, 500, 503])
def test_what_fails_goes_on_to_the_next_at_once(status: int | None) -> None:
    bad = always(None if status is None else Reply({"error": "busy"}, status))
    with fleet_of(bad, echo) as (lm, servers, pauses):
        assert lm.generate([str(i) for i in range(30)], seed=5) == texts(30, 5)
        assert pauses == [] and asked(servers)[1] == 30
        assert asked(servers)[0] <= 8  # those that were under way when it failed first


def test_nobody_listens_at_one_address() -> None:
    with serving(echo) as gone:
        dead = gone.url
    with serving(echo) as server:
        lm = ayn.load(f"{dead},{server.url}")
        assert lm.name == "m" and lm.generate(["0", "1"]) == texts(2)
        lm.close()
        listed = ayn.load([dead, server.url])
        assert listed.generate(["0", "1"]) == texts(2)
        listed.close()


def test_one_that_hangs_is_left_behind() -> None:
    over = threading.Event()

    def hangs(path: str, body: Any) -> Reply | None:
        over.wait(20)
        return None

    with fleet_of(hangs, echo, timeout=2.0, concurrency=4) as (lm, servers, pauses):
        started = time.monotonic()
        assert lm.generate([str(i) for i in range(40)]) == texts(40)
        assert time.monotonic() - started < 15 and pauses == []
        assert 1 <= asked(servers)[0] <= 4
        over.set()


def test_one_that_works_long_at_an_answer_is_well() -> None:
    over = threading.Event()

    def slow(path: str, body: Any) -> Reply:
        if path != "/v1/models" and body["prompt"] == "long":
            over.wait(20)
        return echo(path, body)

    with fleet_of(slow, slow, timeout=2.0) as (lm, servers, pauses):
        with pytest.raises(RemoteError, match=r"request 1: .* no answer within"):
            lm.generate(["0", "long"])
        assert all(member.well for member in fleet(lm).members) and pauses == []
        assert sum(body["prompt"] == "long" for server in servers for body in server.bodies()) == 1
        over.set()


def test_one_that_dies_amid_work_and_comes_back() -> None:
    alive = threading.Event()
    alive.set()

    def mortal(path: str, body: Any) -> Reply | None:
        time.sleep(0.002)
        return echo(path, body) if alive.is_set() else None

    with fleet_of(mortal, echo, concurrency=2) as (lm, servers, _):
        clock = [0.0]
        fleet(lm)._clock = lambda: clock[0]
        assert lm.generate([str(i) for i in range(20)]) == texts(20) and asked(servers)[0] > 0
        alive.clear()
        assert lm.generate([str(i) for i in range(20)]) == texts(20)
        was = asked(servers)[0]
        assert lm.generate([str(i) for i in range(20)]) == texts(20)
        assert asked(servers)[0] == was, "it rests"
        clock[0] += FIRST_REST  # its rest is over, and it is asked how it is: still dead
        lm.generate(["x"])
        until(lambda: fleet(lm).members[0].failures == 2 and not fleet(lm).members[0].probed)
        assert asked(servers)[0] == was, "no work was given to find that out"
        alive.set()
        clock[0] += FIRST_REST  # the second rest is longer
        lm.generate(["x"])
        assert not fleet(lm).members[0].well
        clock[0] += FIRST_REST
        lm.generate(["x"])
        until(lambda: fleet(lm).members[0].well)
        assert lm.generate([str(i) for i in range(20)]) == texts(20) and asked(servers)[0] > was


def test_a_pause_that_is_asked_for_is_given() -> None:
    first = threading.Event()

    def busy_once(path: str, body: Any) -> Reply:
        if first.is_set():
            return echo(path, body)
        first.set()
        return Reply({"error": "slow down"}, 429, {"Retry-After": "30"})

    with fleet_of(busy_once, echo) as (lm, servers, pauses):
        clock = [0.0]
        fleet(lm)._clock = lambda: clock[0]
        for clock[0] in (0.0, 10.0, 29.0):
            assert lm.generate(["0"]) == texts(1)
        assert asked(servers) == [1, 3] and pauses == []
        clock[0] = 31.0
        lm.generate(["0"])
        until(lambda: fleet(lm).members[0].well)
        lm.generate(["0"])
        lm.generate(["0"])
        assert asked(servers)[0] == 2


def test_all_busy_is_waited_for_as_long_as_the_first_asks() -> None:
    left = {"/a": 2, "/b": 2}

    def busy(name: str, pause: str) -> Behaviour:
        def behave(path: str, body: Any) -> Reply:
            left[name] -= 1
            return echo(path, body) if left[name] < 0 else Reply({"error": "full"}, 503, {"Retry-After": pause})

        return behave

    with fleet_of(busy("/a", "20"), busy("/b", "7")) as (lm, _, pauses):
        assert lm.generate(["0"]) == texts(1)
        assert pauses[0] == 7.0
        assert len(pauses) <= 4


def test_all_down_is_one_line_after_all_tries() -> None:
    with fleet_of(always(None), always(Reply({"error": "down"}, 500)), retries=3) as (lm, servers, pauses):
        with pytest.raises(RemoteError, match=r"^request 0: http://127") as caught:
            lm.generate(["p"])
        assert "\n" not in str(caught.value) and len(pauses) == 3
        assert all(count >= 1 for count in asked(servers))


def test_all_that_were_down_come_back() -> None:
    tries = Counter[str]()

    def returning(path: str, body: Any) -> Reply | None:
        tries[path] += 1
        return echo(path, body) if tries[path] > 5 else None

    with fleet_of(returning, returning) as (lm, _, pauses):
        assert lm.generate(["0"]) == texts(1)
        assert pauses


def test_a_wrong_request_is_asked_of_one_only() -> None:
    refuse = always(Reply({"error": {"message": "too long"}}, 400))
    with fleet_of(refuse, refuse) as (lm, servers, pauses):
        with pytest.raises(RemoteError, match="400 too long"):
            lm.generate(["p"])
        assert sum(asked(servers)) == 1 and pauses == []
        assert all(member.well for member in fleet(lm).members)


def test_a_refused_key_is_said() -> None:
    refuse = always(Reply({"error": {"message": "who?"}}, 401))
    with fleet_of(refuse, refuse) as (lm, _, _), pytest.raises(AccessError, match=r"401 who\?.*OPENAI_API_KEY"):
        lm.generate(["p"])


def test_one_line_names_what_the_endpoints_list() -> None:
    def lists(*names: str) -> Behaviour:
        return always(Reply({"data": [{"id": name} for name in names]}))

    with fleet_of(lists("x", "common", "last"), lists("last", "common")) as (lm, _, _):
        assert lm.models() == ["common", "last"]
    with fleet_of(lists("x"), lists("y")) as (lm, _, _), pytest.raises(InputError, match=r"no model in common: .* x; "):
        lm.models()


def test_an_unknown_model_is_named() -> None:
    def strict(path: str, body: Any) -> Reply:
        return Reply({"data": [{"id": "smollm2-135m"}]}) if path == "/v1/models" else Reply({"error": "no"}, 404)

    with (
        fleet_of(strict, strict, model="smollm-135m") as (lm, _, _),
        pytest.raises(AccessError, match="unknown model 'smollm-135m'; did you mean 'smollm2-135m'"),
    ):
        lm.generate(["p"])


def test_streams_open_elsewhere_and_stay_where_they_began() -> None:
    whole = stream(delta("a"), delta("b"), "[DONE]")
    with fleet_of(always(None), always(whole)) as (lm, _, pauses):
        assert list(lm.chat_stream([], GREEDY)) == ["a", "b"] and pauses == []
    broken = stream(delta("so far"), cut=True)
    with fleet_of(always(broken), always(broken)) as (lm, servers, _):
        pieces = lm.chat_stream([], GREEDY)
        assert next(pieces) == "so far"
        with pytest.raises(RemoteError, match="the stream broke off"):
            next(pieces)
        assert sum(len(server.requests) for server in servers) == 1
        assert all(member.streams == member.posts == 0 for member in fleet(lm).members)


def test_a_stream_under_way_counts_as_load_until_it_ends_or_is_left() -> None:
    def both(path: str, body: Any) -> Reply:
        return stream(delta("a"), delta("b"), "[DONE]") if "chat" in path else echo(path, body)

    with fleet_of(both, both) as (lm, servers, _):
        pieces = lm.chat_stream([], GREEDY)
        assert next(pieces) == "a"
        for i in range(6):
            lm.generate([str(i)])
        assert asked(servers) == [0, 6]
        pieces.close()
        lm.generate(["x"])
        lm.generate(["y"])
        assert asked(servers) == [1, 7]


def test_bad_fleets() -> None:
    for urls, message in [
        ("http://a,b", "endpoint 'b' is no address; write http://host:port/v1"),
        ("http://a,", "endpoint '' is no address"),
        (["http://a:1/v1", "http://a:1"], "fleet: http://a:1/v1 is named twice"),
        ([], "fleet: no endpoint; name at least one"),
    ]:
        with pytest.raises(InputError, match=message):
            RemoteModel(urls, "m")


def test_a_fleet_asks_once_as_an_endpoint_does() -> None:
    with serving(always(Reply({}, 503))) as one, serving(always(Reply({}, 429))) as other:
        for service in (Endpoint(one.url), Fleet([Endpoint(one.url), Endpoint(other.url)])):
            with pytest.raises(PassingError):
                service.post("completions", {}, str)
            with pytest.raises(PassingError):
                service.stream("completions", {}, str)
            service.close()
        assert len(one.requests) >= 3


def test_work_of_several_threads_under_random_failures_is_all_answered() -> None:
    """Two of three fail a third of the time, each in its own way, while four callers work at once."""
    lock, count = threading.Lock(), Counter[str]()

    def unreliable(bad: Reply | None) -> Behaviour:
        def behave(path: str, body: Any) -> Reply | None:
            with lock:
                count[path] += 1
                fails = path != "/v1/models" and count[path] * 2654435761 % 3 == 0
            return bad if fails else echo(path, body)

        return behave

    with fleet_of(unreliable(None), unreliable(Reply({}, 502)), echo, concurrency=3) as (lm, servers, _):
        found: dict[int, list[str]] = {}

        def work(caller: int) -> None:
            found[caller] = lm.generate([str(i) for i in range(50)], seed=caller)

        callers = [threading.Thread(target=work, args=(caller,)) for caller in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert found == {caller: texts(50, caller) for caller in range(4)}
        assert all(member.posts == 0 for member in fleet(lm).members)
        assert max(server.most for server in servers) <= 3


def test_sampling_says_the_same_to_every_endpoint() -> None:
    with fleet_of(echo, echo) as (lm, servers, _):
        lm.complete(["a", "b", "c", "d"], Sampling(seed=7, top_k=3, stop=("\n",), max_new_tokens=2))
        bodies = {body["prompt"]: body for server in servers for body in server.bodies()}
    assert [bodies[prompt].pop("seed") for prompt in "abcd"] == [7, 8, 9, 10]
    assert all(bodies[p] | {"prompt": ""} == bodies["a"] | {"prompt": ""} for p in "abcd")
