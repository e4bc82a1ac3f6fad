"""Where jobs run: in this process, in processes of this machine, or on Ray. The same rows give the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch
from tqdm import tqdm

from ...attention.errors import GraftError, SettingError
from ..console import one_line, quiet_libraries
from ..errors import WorkerError
from ..extras import need
from ..outputs import clear_after
from .plan import Job, Setup
from .worker import Record, Worker, failed

Records = Generator[Record, None, None]
Engine = Callable[[Setup, Sequence[list[Job]], int], Records]


def local(setup: Setup, batches: Sequence[list[Job]], workers: int) -> Records:
    """In this process, one batch after the other."""
    threads = torch.get_num_threads()
    try:
        worker = Worker(setup)
        for batch in batches:
            yield from worker.run(batch)
    finally:
        torch.set_num_threads(threads)


def processes(setup: Setup, batches: Sequence[list[Job]], workers: int) -> Records:
    """In `workers` processes of this machine, spread over its accelerators."""
    yield from _drive(_Processes(setup, min(workers, len(batches))), batches)


def ray(setup: Setup, batches: Sequence[list[Job]], workers: int) -> Records:
    """In `workers` Ray actors: of the cluster at RAY_ADDRESS, else of a local one. The folders must be shared."""
    if not batches:  # a cluster is not started for nothing
        return
    need("ray", "ray")
    _reach(os.environ.get("RAY_ADDRESS", ""))
    yield from _drive(_Ray(setup, min(workers, len(batches))), batches)


ENGINES: Mapping[str, Engine] = {"local": local, "processes": processes, "ray": ray}


def engine(name: str) -> Engine:
    """The engine of that name.

    Raises:
        SettingError: there is none.
    """
    if name not in ENGINES:
        raise SettingError(f"engine {name!r}: must be {', '.join(ENGINES)}")
    return ENGINES[name]


class _Pool(Protocol):
    """Workers that take one batch at a time and may die of it."""

    def idle(self) -> bool: ...
    def busy(self) -> bool: ...
    def submit(self, batch: list[Job]) -> None: ...
    def finished(self) -> list[tuple[list[Job], list[Record] | None]]:
        """Waits for at least one batch; None where its worker died."""
        ...

    def close(self) -> None: ...


def _drive(pool: _Pool, batches: Sequence[list[Job]]) -> Records:
    """Feed a pool. A dead worker's rows are tried once more, each alone: the one that kills again has failed."""
    queue, lost = deque(batches), set[str]()
    try:
        while queue or pool.busy():
            while queue and pool.idle():
                pool.submit(queue.popleft())
            for batch, records in pool.finished():
                if records is not None:
                    yield from records
                    continue
                for job in batch:
                    if job.id in lost:
                        yield failed(job, "WorkerDied", "the worker process died at this row, twice")
                    else:
                        lost.add(job.id)
                        queue.appendleft([job])
    finally:
        pool.close()


def _of_worker(setup: Setup, index: int) -> Setup:
    """The setup with the worker's own accelerator, where there are several."""
    devices = torch.accelerator.device_count()
    if setup.device != "auto" or devices < 2:
        return setup
    kind = torch.accelerator.current_accelerator()
    return replace(setup, device=f"{kind.type}:{index % devices}") if kind else setup


class _Processes:
    def __init__(self, setup: Setup, workers: int) -> None:
        self._setup, self._context = setup, multiprocessing.get_context("spawn")
        self._idle: list[tuple[int, Any, Connection]] = []
        self._busy: dict[Connection, tuple[int, Any, list[Job]]] = {}
        self._free = list(range(workers))

    def idle(self) -> bool:
        return bool(self._idle or self._free)

    def busy(self) -> bool:
        return bool(self._busy)

    def submit(self, batch: list[Job]) -> None:
        index, process, connection = self._idle.pop() if self._idle else self._start(self._free.pop())
        self._busy[connection] = (index, process, batch)
        try:
            connection.send(batch)
        except OSError:  # it died while idle; `finished` sees its end
            return

    def finished(self) -> list[tuple[list[Job], list[Record] | None]]:
        found: list[tuple[list[Job], list[Record] | None]] = []
        for connection in wait(list(self._busy)):
            assert isinstance(connection, Connection)
            index, process, batch = self._busy.pop(connection)
            try:
                answer = connection.recv()
            except (EOFError, OSError):
                self._end(process)
                connection.close()
                self._free.append(index)
                found.append((batch, None))
                continue
            if isinstance(answer, BaseException):
                raise answer
            self._idle.append((index, process, connection))
            found.append((batch, answer))
        return found

    def close(self) -> None:
        running = [(p, c) for _, p, c in self._idle] + [(p, c) for c, (_, p, _) in self._busy.items()]
        for _, connection in running:
            connection.close()  # an idle worker ends by itself
        for process, connection in running:
            if connection in self._busy:
                process.terminate()
            self._end(process)

    def _end(self, process: Any) -> None:
        process.join()
        clear_after(self._setup.out, process.pid)

    def _start(self, index: int) -> tuple[int, Any, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, _of_worker(self._setup, index)), daemon=True)
        with _deaf():
            process.start()
        theirs.close()
        return index, process, ours


@contextmanager
def _deaf() -> Iterator[None]:
    """Ctrl-C at a terminal reaches every process: a child is started deaf to it, and imports for some seconds."""
    if threading.current_thread() is not threading.main_thread():  # who alone may say what a signal does
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(connection: Connection, setup: Setup) -> None:
    """A worker process: batches in, records out, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    tqdm.set_lock(threading.RLock())  # its default is a semaphore that a killed process leaves behind
    quiet_libraries()
    worker = Worker(setup)
    try:
        while True:
            batch = connection.recv()
            try:
                connection.send(worker.run(batch))
            except GraftError as error:
                connection.send(error)
    except (EOFError, OSError):  # the parent is gone
        return


def _reach(address: str) -> None:
    """Raise unless somebody listens at host:port; Ray itself would wait for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):  # "auto", "local"
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise WorkerError(f"the Ray cluster at RAY_ADDRESS={address} cannot be reached: {error}") from None


class _Ray:
    def __init__(self, setup: Setup, workers: int) -> None:
        import ray

        self._ray, self._setup = ray, setup
        self._own = not ray.is_initialized()
        if self._own:
            at = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
            try:
                ray.init(log_to_driver=False, configure_logging=False, **at)
            except Exception as error:
                raise WorkerError(f"Ray cannot be started or joined: {one_line(error)}") from None
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        self._actor = ray.remote(num_cpus=1, num_gpus=gpus)(Worker)
        self._starting: dict[Any, Any] = {}
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, list[Job]]] = {}
        for _ in range(workers):
            self._start()

    def idle(self) -> bool:
        return bool(self._idle)

    def busy(self) -> bool:
        return bool(self._busy)

    def submit(self, batch: list[Job]) -> None:
        actor = self._idle.pop()
        self._busy[actor.run.remote(batch)] = (actor, batch)

    def finished(self) -> list[tuple[list[Job], list[Record] | None]]:
        [reference], _ = self._ray.wait([*self._busy, *self._starting], num_returns=1)
        if reference in self._starting:
            self._begin(reference)
            return []
        actor, batch = self._busy.pop(reference)
        try:
            records = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayError:
            self._start()
            return [(batch, None)]
        self._idle.append(actor)
        return [(batch, records)]

    def close(self) -> None:
        for actor in [*self._starting.values(), *self._idle, *(actor for actor, _ in self._busy.values())]:
            self._ray.kill(actor)
        if self._own:
            self._ray.shutdown()

    def _start(self) -> None:
        # it is given rows once it runs: an actor for which the cluster has no room holds none back
        actor = self._actor.remote(self._setup)
        self._starting[actor.__ray_ready__.remote()] = actor

    def _begin(self, reference: Any) -> None:
        actor = self._starting.pop(reference)
        try:
            self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            if not (self._idle or self._busy or self._starting):
                raise WorkerError(f"no Ray worker could be started: {one_line(error)}") from None
            return
        self._idle.append(actor)
