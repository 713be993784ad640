"""Ray actors that come and go with the cluster, and the work that is handed to them.

Work is given in small leases. What an actor was given counts as done only once `unfinished` says
so (it looks at what is on disk), so whatever ends an actor (its process killed, its node gone),
what it had not committed goes to others. An item that is being worked on when its actor fails is
suspect: it is tried again alone, and given up after `MOST_STRIKES`. The loss of a node is nobody's
fault, unless it goes on and on.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import ray
import torch
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError

from shared.errors import UserError, first_line
from shared.interrupt import Interruption

Item = TypeVar("Item")

MOST_STRIKES = 3
"""Actors that one item may cost."""
MOST_LOSSES = 10
"""Nodes that may be lost over one item: machines go for reasons of their own, but one whose memory
an item eats whole goes as well."""
_TICK_SECONDS = 1.0
_LOOK_SECONDS = 5.0  # between two looks at what nodes there are
_PATIENCE_SECONDS = 30.0  # without any actor, before the user is told
_RESCUE_SECONDS = 120.0  # for the clip in the encoder and the commit of open shards
# What ends the run, as in one process: it would happen to every other actor too.
_FATAL = (UserError, OSError, torch.OutOfMemoryError)


@dataclass(frozen=True, kw_only=True)
class Joined:
    """What an actor says of itself once it can work."""

    host: str
    node: str
    """Ray's id of the node."""
    pid: int
    writer: int | None
    """The number of its shards; None where it writes none."""

    def __str__(self) -> str:
        writer = "" if self.writer is None else f", writer w{self.writer:03d}"
        return f"{self.host} (process {self.pid}{writer})"


@dataclass(eq=False)
class _Actor:
    handle: Any
    """Methods `start() -> Joined`, `work(items) -> {position: why rejected}`, `finish(rescue)`."""
    starting: Any
    """Reference to what `start` returns."""
    joined: Joined | None = None
    leases: dict[Any, list[int]] = field(default_factory=dict)
    """Reference → items, of what it is working on."""
    given: list[int] = field(default_factory=list)
    """All items that it ever got."""

    def __str__(self) -> str:
        return "a node" if self.joined is None else str(self.joined)


@dataclass(eq=False)
class Fleet(Generic[Item]):
    """Brings items to an end, with as many actors as there is room for. Used once."""

    hire: Callable[[int], Any]
    """Creates the n-th actor, from 1."""
    room: Callable[[], int]
    """How many the nodes can hold."""
    demand: str
    """What one needs, in words."""
    unfinished: Callable[[Sequence[Item]], Sequence[Item]]
    """Those items whose result is not on disk."""
    lease: int
    """Items that an actor gets at once, at most."""
    in_hand: int
    """Leases of an actor: what the next one needs can be read while one is worked on."""
    worth: int
    """Items that must wait before another actor starts."""
    signals: Interruption
    say: Callable[[str], None]
    _items: Sequence[Item] = ()
    _pending: deque[int] = field(default_factory=deque)
    _announced: set[int] = field(default_factory=set)
    _rejected: dict[int, str] = field(default_factory=dict)
    _strikes: Counter[int] = field(default_factory=Counter)
    _losses: Counter[int] = field(default_factory=Counter)
    _actors: list[_Actor] = field(default_factory=list)
    _hired: int = 0
    _failures: int = 0
    _places: int = 0
    _looked: float = -_LOOK_SECONDS
    _lonely_since: float = field(default_factory=time.monotonic)

    def run(self, items: Sequence[Item]) -> Iterator[tuple[Item, str | None]]:
        """Items as they are done, with the reason for those that are rejected.

        When it ends, all that was not rejected is on disk and no actor is left. Raises what an
        actor raised of UserError, OSError and OutOfMemoryError, and UserError where actors fail
        and nothing is done; after that, or after a signal, `rescue` ends the actors.
        """
        self._items = items
        self._pending.extend(range(len(items)))
        while self._pending:
            while self._pending or any(actor.leases for actor in self._actors):
                self._grow()
                self._give()
                for actor, reference in self._wait(self._references()):
                    yield from self._collect(actor, reference)
            yield from self._dismiss()

    def rescue(self) -> None:
        """Let actors commit what they have encoded, and end them."""
        for actor in [actor for actor in self._actors if actor.joined is None]:
            self._end(actor)
        references = [actor.handle.finish.remote(True) for actor in self._actors]
        if references:
            with suppress(RayError):
                ray.wait(references, num_returns=len(references), timeout=_RESCUE_SECONDS)
        for actor in list(self._actors):
            self._end(actor)

    def _grow(self) -> None:
        """Start actors while there is room and work for them; at least one, which may wait."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_SECONDS:
            self._places, self._looked = self.room(), now
        busy = sum(bool(actor.leases) for actor in self._actors)
        useful = busy + -(-len(self._pending) // self.worth)
        while len(self._actors) < min(max(1, self._places), useful):
            self._hired += 1
            handle = self.hire(self._hired)
            self._actors.append(_Actor(handle, handle.start.remote()))
        if any(actor.joined for actor in self._actors):
            self._lonely_since = now
        elif now - self._lonely_since > _PATIENCE_SECONDS:
            self._lonely_since = now + 10 * _PATIENCE_SECONDS
            self.say(
                f"waiting  no actor is up yet: it is loading, or there is no node with "
                f"{self.demand} that nobody else uses (see `ray status`)"
            )

    def _give(self) -> None:
        for actor in self._actors:
            while actor.joined and self._pending and len(actor.leases) < self.in_hand:
                lease = self._next_lease(actor)
                if not lease:
                    break
                items = [self._items[number] for number in lease]
                actor.leases[actor.handle.work.remote(items)] = lease
                actor.given += lease

    def _next_lease(self, actor: _Actor) -> list[int]:
        """The next items for an actor. A suspect one goes alone."""
        if any(self._strikes[number] for lease in actor.leases.values() for number in lease):
            return []
        if self._strikes[self._pending[0]]:
            return [] if actor.leases else [self._pending.popleft()]
        size = max(1, min(self.lease, len(self._pending) // (4 * len(self._actors))))
        lease: list[int] = []
        while len(lease) < size and self._pending and not self._strikes[self._pending[0]]:
            lease.append(self._pending.popleft())
        return lease

    def _references(self) -> dict[Any, _Actor]:
        found: dict[Any, _Actor] = {}
        for actor in self._actors:
            found |= dict.fromkeys(actor.leases, actor)
            if actor.joined is None:
                found[actor.starting] = actor
        return found

    def _wait(self, references: dict[Any, _Actor]) -> list[tuple[_Actor, Any]]:
        """What is done by now, or within a moment. Signals are heard after it."""
        with self.signals.deferred():
            done, _ = ray.wait(list(references), num_returns=1, timeout=_TICK_SECONDS)
        return [(references[reference], reference) for reference in done]

    def _collect(self, actor: _Actor, reference: Any) -> Iterator[tuple[Item, str | None]]:
        """Take an answer, or the news that there will be none."""
        try:
            answer = ray.get(reference)
        except RayError as error:
            if actor in self._actors:
                yield from self._lost(actor, _cause(error))
            return
        if reference is actor.starting:
            actor.joined = answer
            self.say(f"actor    {actor} is up")
            return
        self._failures = 0
        for position, number in enumerate(actor.leases.pop(reference)):
            if position in answer:
                yield self._reject(number, answer[position])
            else:
                yield from self._announce(number)

    def _dismiss(self) -> Iterator[tuple[Item, str | None]]:
        """Let every actor commit and end; what one does not commit is pending again."""
        for actor in [actor for actor in self._actors if actor.joined is None]:
            self._end(actor)
        finishing = {actor.handle.finish.remote(False): actor for actor in self._actors}
        while finishing:
            for actor, reference in self._wait(finishing):
                del finishing[reference]
                try:
                    ray.get(reference)
                    self._end(actor)
                except RayError as error:
                    yield from self._lost(actor, _cause(error))

    def _lost(self, actor: _Actor, error: BaseException) -> Iterator[tuple[Item, str | None]]:
        """Others get what an actor has not committed."""
        self._end(actor)
        if isinstance(error, _FATAL):
            raise error
        suspects = {number for lease in actor.leases.values() for number in lease}
        why = _why(error)
        if _node_is_gone(actor, error):
            why = "its node is gone or out of reach"
            self._losses.update(suspects)
        else:
            self._failures += 1
            self._strikes.update(suspects)
        mine = [number for number in actor.given if number not in self._rejected]
        left = {id(item) for item in self.unfinished([self._items[number] for number in mine])}
        again = [number for number in mine if id(self._items[number]) in left]
        for number in mine:
            if id(self._items[number]) not in left:
                yield from self._announce(number)
        for number in again:
            if self._strikes[number] >= MOST_STRIKES or self._losses[number] >= MOST_LOSSES:
                cost = self._strikes[number] + self._losses[number]
                yield self._reject(number, f"{cost} actors failed over it, the last so: {why}")
            elif self._strikes[number]:
                self._pending.append(number)
            else:
                self._pending.appendleft(number)
        self.say(f"lost     the actor on {actor}: {why}; {len(again)} given to others")
        if self._failures > 2 * MOST_STRIKES + len(self._actors):
            raise UserError(
                f"--engine ray: {self._failures} actors failed one after the other and nothing "
                f"was done in between, the last one so: {why}. Every node needs wandistill with "
                "its ray extra, the model, the data and the output folder, under the same names. "
                "`ray logs` has what the actors wrote."
            )

    def _announce(self, number: int) -> Iterator[tuple[Item, None]]:
        """An item as done, once, however often it is."""
        if number not in self._announced:
            self._announced.add(number)
            yield self._items[number], None

    def _reject(self, number: int, reason: str) -> tuple[Item, str]:
        self._rejected[number] = reason
        return self._items[number], reason

    def _end(self, actor: _Actor) -> None:
        self._actors.remove(actor)
        with suppress(RayError):
            ray.kill(actor.handle)


def _cause(error: RayError) -> BaseException:
    """What was raised in the actor, or the error that says how it ended."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return cause if isinstance(cause, BaseException) else error


def _why(error: BaseException) -> str:
    """The line of Ray's pages that says what happened, to its first full stop."""
    if not isinstance(error, ActorDiedError):
        return first_line(error)
    lines = str(error).strip().splitlines()
    if "creation task" in lines[0]:  # a traceback follows
        return lines[-1].strip()
    text = " ".join(" ".join(lines).split())
    for sign in ("Worker exit detail: ", "dead because ", "died because "):
        if sign in text:
            return text.partition(sign)[2].partition(". ")[0]
    return first_line(error)


def _node_is_gone(actor: _Actor, error: BaseException) -> bool:
    """Whether the machine is to blame. A node that died is out of reach before Ray knows it."""
    if isinstance(error, ActorUnavailableError):
        return True
    if actor.joined is None:
        return "its node" in _why(error)
    nodes = ray.nodes()
    return not any(node["NodeID"] == actor.joined.node and node["Alive"] for node in nodes)
