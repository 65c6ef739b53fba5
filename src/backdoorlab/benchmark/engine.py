"""Who executes a plan. An engine takes stages in order and yields results as they come; the store does the rest.

Any process that holds the same store and the same plan may execute any stage: keys make results the same wherever they
are computed, and locks keep two from computing one. An engine therefore only decides where and when a stage runs.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from backdoorlab.benchmark.card import Card
from backdoorlab.benchmark.remote import open_store
from backdoorlab.benchmark.runner import Runner, RunResult
from backdoorlab.benchmark.spec import Experiment
from backdoorlab.benchmark.store import StoreError
from backdoorlab.core.errors import BackdoorLabError, InputError

if TYPE_CHECKING:
    from backdoorlab.benchmark.grid import Stage

Result = RunResult | str
"""What running the stage gave, or why it cannot be run."""

_Report = tuple[str, bool] | str
"""A result as a worker sends it: the card as JSON and whether it was in the store, or why the stage cannot be run."""

_BLOCKED = "not run: the stage that it builds on was refused"


class Engine(Protocol):
    """Executes a plan."""

    def execute(
        self, stages: Sequence[Stage], runner: Runner, *, fresh: bool
    ) -> Generator[tuple[Stage, Result], None, None]:
        """Yield every stage once, with its result, a parent before its children.

        Args:
            stages: a plan.
            runner: says which store, data folder and device; engines with several processes make equal ones there.
            fresh: compute every stage again.
        """
        ...


class LocalEngine:
    """This machine: in this process, or in one worker process per device.

    Args:
        devices: such as ("cuda:0", "cuda:1") or ("cpu", "cpu"); with fewer than two, everything runs in this process on
            the runner's device. CPU workers share the cores evenly; note that sums over other numbers of threads may
            differ in the last bit.
        admit: asked before each stage begins; one that is not admitted is left out. Not with several devices.
    """

    def __init__(self, devices: Sequence[str] = (), admit: Callable[[Stage], bool] | None = None) -> None:
        self.devices, self.admit = tuple(devices), admit
        if admit is not None and len(self.devices) > 1:
            raise InputError(f"stages can be left out on one device only, got {len(self.devices)}")

    def execute(
        self, stages: Sequence[Stage], runner: Runner, *, fresh: bool
    ) -> Generator[tuple[Stage, Result], None, None]:
        """See :class:`Engine`."""
        if len(self.devices) > 1:
            yield from self._spread(stages, runner, fresh)
            return
        refused: set[int] = set()
        for stage in stages:
            if self.admit is not None and not self.admit(stage):
                continue
            result: Result = _BLOCKED if stage.parent in refused else _attempt(runner, stage.experiment, fresh)
            if isinstance(result, str):
                refused.add(stage.index)
            yield stage, result

    def _spread(
        self, stages: Sequence[Stage], runner: Runner, fresh: bool
    ) -> Generator[tuple[Stage, Result], None, None]:
        spawn = _Spawn()
        queue: SimpleQueue[str] = spawn.SimpleQueue()
        for device in self.devices:
            queue.put(device)
        threads = max(1, (os.cpu_count() or 1) // len(self.devices))
        # Nothing is ever sent: workers wait for the end of the pipe, which the death of this process brings about.
        lifeline, ours = spawn.Pipe(duplex=False)
        store = getattr(runner.store, "url", str(runner.store.root))
        settings = (lifeline, queue, store, runner.root, runner.download, threads)
        children = {s.index: [c for c in stages if c.parent == s.index] for s in stages}
        pool = ProcessPoolExecutor(len(self.devices), spawn, _start, settings)

        def submit(stage: Stage) -> Future[_Report]:
            with _interrupts_held():  # this may start a worker, which inherits it
                return pool.submit(_work, stage.experiment, fresh)

        try:
            running: dict[Future[_Report], Stage] = {submit(s): s for s in stages if s.parent is None}
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    stage, result = running.pop(future), _received(future)
                    yield stage, result
                    for child in children[stage.index]:
                        if isinstance(result, str):
                            yield child, _BLOCKED
                        else:
                            running[submit(child)] = child
        except BaseException:
            for process in spawn.started:  # they may be in the middle of an hour's work
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            ours.close()
            lifeline.close()


class _Spawn(SpawnContext):
    """Starts fresh processes, and remembers them."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[SpawnProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]
        process = SpawnProcess(*args, **kwargs)
        self.started.append(process)
        return process


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back for a moment: it reaches every process of a terminal, and only the first one should answer."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _attempt(runner: Runner, experiment: Experiment, fresh: bool) -> Result:
    try:
        return runner.run(experiment, fresh=fresh)
    except StoreError:
        raise  # no further stage could be stored either
    except InputError as error:
        return str(error)


_runner: Runner
"""Of a worker process; :func:`_start` makes it before any stage arrives."""


def _start(
    lifeline: Connection, queue: SimpleQueue[str], store: str, root: str | Path | None, download: bool, threads: int
) -> None:
    """Make this worker's runner on the next free device, and end with the process that started it.

    A worker without work waits for some, and would wait for ever after the process that sends it has ended.
    """
    global _runner
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    device = queue.get()
    if device == "cpu":
        torch.set_num_threads(threads)
    _runner = Runner(open_store(store), device=device, root=root, download=download)


def _end_with(lifeline: Connection) -> None:
    """Wait until the other end of the pipe is closed, then end this process at once.

    What it computes is lost; what it has stored is whole (:mod:`backdoorlab.benchmark.store`), and the system releases
    its locks.
    """
    with suppress(EOFError, OSError):
        lifeline.recv_bytes()
    os._exit(1)


def _work(experiment: Experiment, fresh: bool) -> _Report:
    result = _attempt(_runner, experiment, fresh)
    return result if isinstance(result, str) else (result.card.to_json(), result.reused)


def _received(future: Future[_Report]) -> Result:
    try:
        report = future.result()
    except BrokenProcessPool:
        raise BackdoorLabError("a worker process died (out of memory?); run the same command again to go on") from None
    return report if isinstance(report, str) else RunResult(Card.from_json(report[0]), report[1])
