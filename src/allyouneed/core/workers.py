"""Work for other processes: independent calls of one function, one after another in this process or many at once on a
Ray cluster; and objects that live on the workers of one and are asked again and again.

What an independent call leaves behind it writes to files, which all machines must see; what it returns is not sent
back. What an object returns is.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from allyouneed.core.errors import InputError

WORDS = ("local", "auto")  # that stand for an address
Workers = Callable[[Callable[..., None], Sequence[tuple[Any, ...]]], Iterator[int]]


def in_turn(function: Callable[..., None], calls: Sequence[tuple[Any, ...]]) -> Iterator[int]:
    """Call `function` with each of `calls`; yields the place of a call when it is done.

    >>> list(in_turn(print, [("one",), ("two",)]))
    one
    two
    [0, 1]
    """
    for place, arguments in enumerate(calls):
        function(*arguments)
        yield place


def over_ray(address: str) -> Workers:
    """The same on Ray, one core a call.

    `address` is HOST:PORT of a cluster's head, `auto` for the cluster this machine belongs to, `local` for a new one of
    this machine alone.

    Calls end in any order. The first that fails ends the others with its own error, and so does a caller that stops;
    where the process was connected to Ray before, they go on. (To cancel them there ended the process, with Ray 2.60.)

    Raises:
        InputError: Ray is not installed, nobody answers at that address, or a worker was lost with its call.
    """

    _check_form(address)

    def spread(function: Callable[..., None], calls: Sequence[tuple[Any, ...]]) -> Iterator[int]:
        if not calls:
            return
        with _connected(address) as ray:
            work = ray.put(function)  # sent once, however often it is called
            called = ray.remote(num_cpus=1, max_retries=0)(lambda function, arguments: function(*arguments))
            places = {called.remote(work, arguments): place for place, arguments in enumerate(calls)}
            while places:
                (done,), _ = ray.wait(list(places), num_returns=1)
                _result(ray, done)
                yield places.pop(done)

    return spread


class Actors:
    """Objects on the workers of a Ray cluster, each the same, made by `actors`."""

    def __init__(self, ray: Any, handles: Sequence[Any]) -> None:
        self._ray, self._handles = ray, handles

    def __len__(self) -> int:
        return len(self._handles)

    def tell(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every object; the arguments are sent to each machine once."""
        sent = [self._ray.put(argument) for argument in arguments]
        return self._all([handle.call.remote(method, *sent) for handle in self._handles])

    def ask(self, method: str, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Call a method of the first objects, one with each of `calls`, all at once; what they return, in order."""
        assert len(calls) <= len(self), "one call for each object at most"
        pairs = zip(self._handles, calls, strict=False)
        return self._all([handle.call.remote(method, *arguments) for handle, arguments in pairs])

    def _all(self, calls: Sequence[Any]) -> list[Any]:
        return [_result(self._ray, call) for call in calls]


@contextmanager
def actors(address: str, make: Callable[[], Any], count: int) -> Iterator[Actors]:
    """`count` objects that `make` makes, a core each, on the cluster at `address` as `over_ray` takes it; they end with
    the context.

    Raises:
        InputError: as of `over_ray`; also from what is asked of them, where a worker is lost.
    """
    _check_form(address)
    with _connected(address) as ray:
        handles = [ray.remote(num_cpus=1)(_Held).remote(make) for _ in range(count)]
        try:
            yield Actors(ray, handles)
        finally:
            for handle in handles:
                ray.kill(handle)


class _Held:
    """An object of one worker."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.object = make()

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self.object, method)(*arguments)


def _result(ray: Any, call: Any) -> Any:
    """What a call returned, or raised; one line for whatever became of its worker."""
    try:
        return ray.get(call)
    except ray.exceptions.RayTaskError as failed:
        raise (failed.cause if isinstance(failed.cause, InputError) else failed) from None
    except ray.exceptions.RayError as lost:
        name = type(lost).__name__
        raise InputError(
            f"ray: a worker or its machine was lost ({name}); run it again, what is done is kept"
        ) from None


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, connected until the end; a connection there was before is used and left as it is."""
    import ray

    if ray.is_initialized():
        yield ray
        return
    _check_answers(address)
    try:
        if address == "local":  # said to Ray too, which without an address takes that of the environment, RAY_ADDRESS
            ray.init(address, include_dashboard=False, log_to_driver=False)
        else:
            ray.init(address, log_to_driver=False)
    except ConnectionError:
        raise InputError(f"ray: there is no cluster at {address!r}; start one, or write local") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_form(address: str) -> None:
    if find_spec("ray") is None:
        raise InputError("Ray is not installed: pip install 'allyouneed[ray]'")
    if address not in WORDS and not re.fullmatch(r"(ray://)?[^/:]+:\d+", address):
        raise InputError(f"ray: {address!r} is no address; write local, auto or HOST:PORT")


def _check_answers(address: str) -> None:
    """Ray itself would try for minutes and then end the process."""
    if address in WORDS:
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise InputError(f"ray: nobody answers at {address!r} ({error.strerror or error})") from None
