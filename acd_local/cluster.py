"""Shares pieces of work among the machines of a Ray cluster, in actors that each keep a model loaded.

Ray starts the actors, moves what they are given and what they return, and says which of them are gone. Where a piece's
actor is gone the piece is done again, so that every piece gives one result. Only this module imports Ray, and only
where a cluster is asked for.
"""

from __future__ import annotations

import importlib.util
import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any

from acd_local.errors import AcdError, InternalError, UsageError, shown
from acd_local.progress import check_stop
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.lifetime import Closing
from acd_local.runtime.threads import physical_cores

LOCAL = "local"  # the address of a cluster that is started here
_LOOK = 1.0  # seconds between two looks at the cluster's machines, and at whether to stop
_PATIENCE = 20.0  # seconds that the head may be silent
_QUIET = 10.0  # seconds without any actor that are not spoken of
_DEATHS = 3  # of actors, that a piece of work is given up after; of each of a machine's, that the machine is
_STORE = 200_000_000  # bytes for what is on its way; records and prompts are small

Worker = Callable[[Any], Any]


def check_installed() -> None:
    """Check that Ray can be imported; raises UsageError."""
    if importlib.util.find_spec("ray") is None:
        raise UsageError("--ray needs Ray, here and on all machines of a cluster: run pip install 'acd-local[ray]'")


class Cluster(Closing):
    """A connection to a cluster; one at a time in a process.

    Args:
        address: as `ray.init` takes it; "local" starts a cluster of this machine alone, which `close` ends.

    Raises:
        UsageError: Ray is not installed, or there is no such cluster.
    """

    def __init__(self, address: str) -> None:
        check_installed()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to Ray's makers
        os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # no call after `close` starts another cluster
        import ray

        self.ray: ModuleType = ray
        quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
        if address == LOCAL:
            quiet |= {"num_cpus": physical_cores(), "object_store_memory": _STORE, "include_dashboard": False}
        try:
            ray.init(address=address, **quiet)
        except Exception as error:  # of many classes
            reason = shown(" ".join(str(error).split()), 300)
            raise UsageError(f"--ray: cannot use the cluster {shown(address)}: {reason}") from None

    def close(self) -> None:
        self.ray.shutdown()


class _Machines:
    """Asks the cluster's head for its machines, again and again in a thread: without a head the call returns late."""

    def __init__(self, ray: ModuleType) -> None:
        self._ray = ray
        self._silent = 0.0
        self._turned = time.monotonic()
        self._answers: deque[list[dict[str, Any]]] = deque(maxlen=1)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="acd-cluster", daemon=True)
        self._thread.start()

    def look(self) -> list[dict[str, Any]]:
        """Return what the head said last, once; to be called at least every few seconds.

        Raises:
            InternalError: the head was silent for long. The time that this process was stopped does not count.
        """
        now = time.monotonic()
        self._silent, self._turned = self._silent + min(now - self._turned, 2 * _LOOK), now
        if self._answers:
            self._silent = 0.0
            return self._answers.pop()
        if self._silent > _PATIENCE:
            raise InternalError(
                "the cluster's head does not answer: what is finished is kept, the same command goes on from there"
            )
        return []

    def close(self) -> None:
        self._ended.set()
        self._thread.join(2 * _LOOK)

    def _ask(self) -> None:
        while not self._ended.is_set():
            with suppress(Exception):  # of many classes; the silence tells
                self._answers.append(self._ray.nodes())
            self._ended.wait(_LOOK)


@dataclass(eq=False)
class _Actor:
    """An actor on one machine; `piece` is the place of what it works at, None while it loads."""

    machine: str
    gpus: int
    handle: Any
    piece: int | None = None


class Pool(Closing):
    """Actors on all machines of a cluster, also on those that join later, each with what `make` makes there.

    Args:
        make: a picklable function; what it returns is called with pieces of work, one after the other.
        cpus: CPUs of an actor. A machine gets as many actors as it has room for.
        gpu: give actors a GPU each on machines that have some.
        line: is told what the user should know: machines that are left out, actors that were lost.
    """

    def __init__(
        self, cluster: Cluster, make: Callable[[], Worker], *, cpus: int, gpu: bool, line: Callable[[str], None]
    ) -> None:
        self._ray = cluster.ray
        self._make = self._ray.put(make)
        self._cpus = cpus
        self._gpu = gpu
        self._line = line
        self._head = _Machines(self._ray)
        self._machines: dict[str, str] = {}  # those that were seen: what people call them
        self._places: Counter[str] = Counter()  # actors that a machine has room for
        self._gone: set[str] = set()
        self._deaths: Counter[str | int] = Counter()  # since something was done, by machine; by piece
        self._refusals: dict[str, AcdError] = {}  # by machine
        self._running: dict[Any, _Actor] = {}  # by what is awaited of it
        self._idle: list[_Actor] = []
        self._alone: float | None = None  # when to say so

    def work(self, pieces: Sequence[object], stop: CancelToken | None = None) -> Iterator[tuple[int, Any]]:
        """Do pieces of work, and yield the place of each with its result, in the order in which they are done.

        Raises:
            Stopped: `stop` was set.
            AcdError: what a piece raised; or no machine can do any.
        """
        waiting = deque(range(len(pieces)))
        left = len(pieces)
        self._deaths.clear()
        while left:
            check_stop(stop)
            self._look()
            self._say_if_alone()
            while waiting and self._idle:
                self._begin(self._idle.pop(), waiting[0], pieces[waiting.popleft()])
            for ref in self._awaited():
                actor = self._running.pop(ref)
                piece, actor.piece = actor.piece, None
                try:
                    result = self._ray.get(ref)
                except self._ray.exceptions.RayTaskError as error:
                    self._refused(actor, piece, error)
                except self._ray.exceptions.RayError as error:
                    self._lost(actor, piece, error)
                    if piece is not None:
                        waiting.appendleft(piece)
                else:
                    self._idle.append(actor)
                    if piece is not None:
                        self._deaths.pop(actor.machine, None)
                        left -= 1
                        yield piece, result

    def close(self) -> None:
        """End all actors, whatever they are at."""
        self._head.close()
        for actor in [*self._running.values(), *self._idle]:
            self._ray.kill(actor.handle)
        self._running.clear()
        self._idle.clear()

    # -- machines ------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Start actors on machines that are new."""
        for node in self._head.look():
            machine = node["NodeID"]
            if node["Alive"] and machine not in self._machines:
                self._machines[machine] = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
                cpus, gpus = (int(node["Resources"].get(kind, 0)) for kind in ("CPU", "GPU"))
                self._places[machine] = min(cpus // self._cpus, gpus if self._gpu and gpus else cpus)
                for _ in range(self._places[machine]):
                    self._start(machine, 1 if self._gpu and gpus else 0)
                if 0 < cpus < self._cpus:
                    self._leave_out(
                        machine, UsageError(f"{cpus} CPUs are fewer than an actor's --threads {self._cpus}")
                    )
        if self._refusals and not self._running and not self._idle:
            raise next(iter(self._refusals.values()))

    def _say_if_alone(self) -> None:
        if self._running or self._idle:
            self._alone = None
        elif self._alone is None:
            self._alone = time.monotonic() + _QUIET
        elif time.monotonic() > self._alone:
            self._line("waiting for a machine to work on")
            self._alone = math.inf

    def _start(self, machine: str, gpus: int) -> None:
        here = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(machine, soft=False)
        remote = self._ray.remote(_Remote).options(num_cpus=self._cpus, num_gpus=gpus, scheduling_strategy=here)
        actor = _Actor(machine, gpus, remote.remote(self._make, _versions()))
        self._running[actor.handle.load.remote()] = actor

    def _leave_out(self, machine: str, why: AcdError) -> None:
        self._refusals.setdefault(machine, type(why)(f"{self._machines[machine]}: {why}"))
        self._line(f"left out: {self._refusals[machine]}")

    # -- pieces --------------------------------------------------------------------------------------------------------

    def _begin(self, actor: _Actor, number: int, piece: object) -> None:
        actor.piece = number
        self._running[actor.handle.do.remote(piece)] = actor

    def _awaited(self) -> list[Any]:
        """Wait for one result at most as long as until the next look; what an actor that died left is one too."""
        if not self._running:
            time.sleep(_LOOK / 10)
            return []
        done, _ = self._ray.wait(list(self._running), timeout=_LOOK)
        return list(done)

    def _refused(self, actor: _Actor, piece: int | None, error: Any) -> None:
        """Leave a machine out that cannot load what it takes; an error of a piece of work is everybody's."""
        cause = error.cause
        if not isinstance(cause, AcdError):
            raise InternalError(f"{self._machines[actor.machine]}: {type(cause).__name__}: {cause}") from error
        self._ray.kill(actor.handle)
        if piece is not None:
            raise cause
        if actor.machine not in self._refusals:
            self._leave_out(actor.machine, cause)

    def _lost(self, actor: _Actor, piece: int | None, error: Exception) -> None:
        """Start another in the place of an actor that is gone, unless its machine is gone too."""
        machine = self._machines[actor.machine]
        if isinstance(error, self._ray.exceptions.ActorUnschedulableError):
            if actor.machine not in self._gone:
                self._gone.add(actor.machine)
                self._line(f"{machine} has left the cluster")
            return
        self._deaths[actor.machine] += 1
        if piece is not None:
            self._line(f"an actor on {machine} is gone: its work is done again")
            self._deaths[piece] += 1
            if self._deaths[piece] == _DEATHS:
                raise InternalError(f"{_DEATHS} actors died at the same piece of work, the last one on {machine}")
        if self._deaths[actor.machine] < _DEATHS * self._places[actor.machine]:
            self._start(actor.machine, actor.gpus)
        elif actor.machine not in self._refusals:
            why = shown(" ".join(str(error).split()), 300)
            lost = self._deaths[actor.machine]
            self._leave_out(actor.machine, InternalError(f"{lost} actors were lost there with nothing done: {why}"))


class _Remote:
    """What runs on another machine."""

    def __init__(self, make: Callable[[], Worker], versions: dict[str, str]) -> None:
        self._make = make
        self._versions = versions
        self._worker: Worker | None = None

    def load(self) -> None:
        os.environ.setdefault("GGML_NO_BACKTRACE", "1")
        for name, wanted in self._versions.items():
            if (found := _versions()[name]) != wanted:
                raise UsageError(
                    f"{name} {found or 'unknown'} is there, {wanted} here: install the same on all machines"
                )
        self._worker = self._make()

    def do(self, piece: object) -> object:
        assert self._worker is not None
        return self._worker(piece)


def _versions() -> dict[str, str]:
    """What decides results and what is sent, by name; "" for what is not installed as a package."""
    from acd_local import __version__

    try:
        llama = metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        llama = ""
    return {"acd_local": __version__, "llama-cpp-python": llama}
