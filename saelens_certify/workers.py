"""Who works on the parts of a run: this process, or workers of a Ray cluster."""

from __future__ import annotations

import io
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import torch

from saelens_certify.config import CertifyConfig
from saelens_certify.errors import CertifyError
from saelens_certify.forward import ForwardEngine

Result = TypeVar("Result")

_RESTARTS = 2
"""How often a worker that died is started again; its task is repeated."""

_AHEAD = 2
"""Results per worker that may wait for one before them."""


class Workers(Protocol):
    """Those who work on the parts of a run, and the engine that they have.

    Attributes:
        engine: The model.
    """

    engine: ForwardEngine

    def in_order(
        self,
        function: Callable[..., Result],
        shared: tuple[Any, ...],
        tasks: Iterable[tuple[Any, ...]],
    ) -> Iterator[Result]:
        """Yield ``function(engine, *shared, *task)`` for each task, in their order.

        Args:
            function: A function of a module, without side effects.
            shared: What all tasks take.
            tasks: What each takes of its own.
        """
        ...


@contextmanager
def workers_for(engine: ForwardEngine, config: CertifyConfig) -> Iterator[Workers]:
    """Yield who works under these settings.

    Raises:
        CertifyError: If ``config.workers`` asks for more than there is.
    """
    if config.workers == 0:
        yield ThisProcess(engine)
        return
    workers = RayWorkers(engine, config.workers)
    try:
        yield workers
    finally:
        workers.stop()


class ThisProcess:
    """One task after another, each when its result is asked for."""

    def __init__(self, engine: ForwardEngine) -> None:
        self.engine = engine

    def in_order(
        self,
        function: Callable[..., Result],
        shared: tuple[Any, ...],
        tasks: Iterable[tuple[Any, ...]],
    ) -> Iterator[Result]:
        """See `Workers`."""
        for task in tasks:
            yield function(self.engine, *shared, *task)


class RayWorkers:
    """Ray actors, each with a copy of the model, on the cluster that is there or on this machine.

    A worker that dies is started again and repeats its task. Workers have equal numbers of
    processors; where the model is on a GPU, each has a GPU of its own.
    """

    def __init__(self, engine: ForwardEngine, n_workers: int) -> None:
        self.engine = engine
        self._n_workers = n_workers
        self._ray = _import_ray()
        self._actors: list[Any] = []
        self._sent: Any = None
        _check_device(engine)

    def stop(self) -> None:
        """Give the workers' processors and memory back."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors, self._sent = [], None

    def in_order(
        self,
        function: Callable[..., Result],
        shared: tuple[Any, ...],
        tasks: Iterable[tuple[Any, ...]],
    ) -> Iterator[Result]:
        """See `Workers`."""
        ray, waiting = self._ray, deque(enumerate(tasks))
        idle, held = deque(self._started() if waiting else ()), (self._put(shared),)
        running: dict[Any, tuple[int, Any]] = {}
        finished: dict[int, Result] = {}
        wanted = 0
        while True:
            while waiting and idle and len(finished) < _AHEAD * self._n_workers:
                index, task = waiting.popleft()
                actor = idle.popleft()
                running[actor.work.remote(function, held, task)] = index, actor
            if not running:
                return
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                index, actor = running.pop(reference)
                finished[index] = self._result(reference)
                idle.append(actor)
            while wanted in finished:
                yield finished.pop(wanted)
                wanted += 1

    def _started(self) -> list[Any]:
        """The actors; the first tasks start them."""
        if self._actors:
            return self._actors
        ray = self._ray
        if not ray.is_initialized():
            ray.init(include_dashboard=False)
        gpus = int(self.engine.device.type == "cuda")
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus = _processors_each(nodes, self._n_workers, gpus)
        # Tries while a worker starts again count too: the number of restarts is the limit.
        worker = ray.remote(_Worker).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=_RESTARTS, max_task_retries=-1
        )
        # Held: a worker that is started again asks for it once more.
        self._sent = self._put(self.engine)
        self._actors = [worker.remote(self._sent, cpus) for _ in range(self._n_workers)]
        return self._actors

    def _put(self, value: Any) -> Any:
        try:
            return self._ray.put(_sendable(value))
        except (TypeError, pickle.PicklingError) as error:
            raise CertifyError(
                f"this model or SAE cannot be sent to a worker ({error}): use workers=0"
            ) from error

    def _result(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except self._ray.exceptions.RayError as error:
            raise CertifyError(
                f"a worker died {_RESTARTS + 1} times at the same task, as for want of memory: lower workers or "
                "batch_tokens. What was measured before is kept where there is an output folder; the same "
                "call goes on there"
            ) from error


class _Worker:
    """What an actor is: the model, and the latest of what tasks share."""

    def __init__(self, engine: bytes, n_threads: int) -> None:
        torch.set_num_threads(n_threads)
        self._engine: ForwardEngine = pickle.loads(engine)
        self._reference: Any = None
        self._shared: tuple[Any, ...] = ()

    def work(
        self, function: Callable[..., Result], held: tuple[Any], task: tuple[Any, ...]
    ) -> Result:
        """Do one task; ``held`` is the reference of what all take, fetched once."""
        if held[0] != self._reference:
            self._shared = pickle.loads(_import_ray().get(held[0]))
            self._reference = held[0]
        return function(self._engine, *self._shared, *task)


def _sendable(value: Any) -> bytes:
    """Pickle a value whose functions may be of any kind.

    Transformers leaves hooks in a model that was once asked for hidden states. They hold a context variable,
    whose value is a matter of each process.
    """
    cloudpickle = _import_ray().cloudpickle

    class Pickler(cloudpickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, ContextVar):
                return _unset, (obj.name,)
            return super().reducer_override(obj)

    with io.BytesIO() as buffer:
        Pickler(buffer).dump(value)
        return buffer.getvalue()


def _unset(name: str) -> ContextVar[Any]:
    return ContextVar(name, default=None)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise CertifyError(
            "workers need Ray, which is not installed: pip install 'saelens_certify[ray]', or workers=0"
        ) from None
    return ray


def _check_device(engine: ForwardEngine) -> None:
    """Check that a copy of the model would find its device in another process.

    Raises:
        CertifyError: If it would not.
    """
    devices = {str(parameter.device) for parameter in engine.model.parameters()}
    if not devices <= {"cpu"} and not devices <= {"cuda", "cuda:0"}:
        raise CertifyError(
            f"the model is on {', '.join(sorted(devices))}, and a worker calls its only GPU cuda:0: put the whole model on "
            "'cuda:0' or 'cpu', or use workers=0"
        )


def _processors_each(nodes: Sequence[Mapping[str, float]], n_workers: int, gpus: int) -> int:
    """Return the most processors that every worker can have on these machines.

    Args:
        nodes: Resources of each machine.
        n_workers: Number of workers.
        gpus: GPUs that each needs.

    Raises:
        CertifyError: If so many do not fit, with one processor each.
    """

    def fit(cpus: int) -> int:
        return sum(
            min(
                int(node.get("CPU", 0)) // cpus,
                int(node.get("GPU", 0)) // gpus if gpus else n_workers,
            )
            for node in nodes
        )

    for cpus in range(max((int(node.get("CPU", 0)) for node in nodes), default=0), 0, -1):
        if fit(cpus) >= n_workers:
            return cpus
    each = "a processor and a GPU" if gpus else "a processor"
    raise CertifyError(
        f"workers = {n_workers} and the Ray cluster has {each} for {fit(1)}: lower workers, or connect to a larger "
        "cluster (ray.init(address=...) or RAY_ADDRESS)"
    )
