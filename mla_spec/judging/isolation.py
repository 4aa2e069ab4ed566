"""Runs laws in worker processes, each of which judges a subject that lives in a further one.

The subject is neither where the report is made nor where its results are judged: it can spoil its own process only.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess

from mla_spec.installed import all_laws
from mla_spec.judging.copies import CONTEXT
from mla_spec.judging.law import Options
from mla_spec.judging.malloc import keep_freed_memory
from mla_spec.judging.run import replay_command, run_law
from mla_spec.judging.verdict import Record
from mla_spec.subjects.description import Description, declared_by
from mla_spec.subjects.process import SubjectProcess
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.violation import BrokenSubject, SubjectCrashed, SuiteFailed, UnknownSubject

PATIENCE = 5.0
"""Seconds in which a process that judges ends what it has started."""


@dataclass(frozen=True)
class _Settings:
    timeout: float | None
    share: bool
    under: str


class WorkerPool:
    """Processes that run laws, ``jobs`` at a time; a context manager.

    A law during which the subject's process dies, or a call takes more than ``timeout`` seconds, is *crashed*; what follows
    runs in a new process. Such a process serves one subject, as long as laws of that subject are next, unless the subjects
    ``share`` it. It runs ``under`` a command where one is given, such as a sanitizer. With several ``devices`` each has one
    process, whatever ``jobs`` is, and laws run on that of the process which takes them.
    """

    def __init__(
        self,
        jobs: int = 1,
        timeout: float | None = None,
        *,
        share: bool = False,
        under: str = "",
        devices: Sequence[str] = (),
    ) -> None:
        self._settings = _Settings(timeout, share, under)
        several = len(devices) > 1
        self._devices = iter(devices) if several else itertools.repeat(None)
        self._threads = ThreadPoolExecutor(len(devices) if several else jobs)
        self._own = threading.local()
        self._workers: list[_Worker] = []

    def submit(self, law: str, subject_name: str, options: Options, signature: str | None = None) -> Future[Record]:
        """Run a law on the subject that ``options.spec`` names, when a process is free; first come, first served.

        ``options.announce`` is called here, in a thread.
        """
        assert options.spec is not None
        return self._threads.submit(self._run, law, subject_name, options, signature)

    def describe(self, options: Options, signature: str | None = None) -> Future[Description]:
        """What the subject that ``options.spec`` names declares.

        It has a ``fault`` where it cannot be imported or made, or its process does not live to tell. The future raises
        ``UnknownSubject`` where there is none.
        """
        return self._threads.submit(lambda: self._worker(options, signature).describe())

    def prepare(self, options: Options, signature: str | None = None) -> None:
        """Have one more process make the subject, so that it is ready when laws are submitted. A fault of the subject is told by
        ``describe`` alone.
        """
        self.describe(options, signature)

    def _run(self, law: str, subject_name: str, options: Options, signature: str | None) -> Record:
        return self._worker(options, signature).run(law, subject_name)

    def _worker(self, options: Options, signature: str | None) -> _Worker:
        """The worker of this thread, turned to a subject."""
        worker: _Worker | None = getattr(self._own, "worker", None)
        if worker is None:
            worker = self._own.worker = _Worker(self._settings, options, signature, next(self._devices))
            self._workers.append(worker)
        worker.serve(options, signature)
        return worker

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(wait=error[0] is None, cancel_futures=True)
        for worker in self._workers:
            worker.stop()


@dataclass
class _Worker:
    """A process that judges, and what is known of it here."""

    settings: _Settings
    options: Options
    signature: str | None
    device: str | None = None
    process: ForkServerProcess | None = None
    connection: Connection = field(init=False)
    lifeline: Connection = field(init=False)

    def serve(self, options: Options, signature: str | None) -> None:
        """Turn to the subject of ``options``, on the device of this worker where it has one."""
        self.options = replace(options, under=self.settings.under, device=self.device or options.device)
        self.signature = signature

    def describe(self) -> Description:
        """What the subject declares."""
        assert self.options.spec is not None
        try:
            self._ask(None)
            message = self.connection.recv()
        except (EOFError, ConnectionError):
            return broken(self.options.spec[0], f"the process that judges {self._end()}")
        if isinstance(message, Description):
            return message
        raise message

    def run(self, law: str, subject_name: str) -> Record:
        """The record of a law; crashed where the process that judges does not live to make it."""
        start, cases, last = time.perf_counter(), 0, None
        try:
            self._ask(law)
            while not isinstance(message := self.connection.recv(), Record):
                cases, last = cases + 1, message
                if self.options.announce is not None:
                    self.options.announce(message)
            return message
        except (EOFError, ConnectionError):
            reason = f"the process that judges {self._end()}"
        return Record(
            law,
            subject_name,
            "crashed",
            cases=cases,
            message=reason,
            case="" if last is None else last.id,
            replay="" if last is None else replay_command(law, last, self.options),
            seconds=time.perf_counter() - start,
        )

    def _ask(self, law: str | None) -> None:
        if self.process is None:
            self._start()
        self.connection.send((law, replace(self.options, announce=None), self.signature))

    def _start(self) -> None:
        self.connection, theirs = CONTEXT.Pipe()
        end, self.lifeline = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(target=_serve, args=(theirs, end, self.settings, dict(os.environ)), daemon=True)
        self.process.start()
        theirs.close()
        end.close()

    def _end(self) -> str:
        """How the process ended."""
        process = self.process
        if process is None:
            return "was ended with the run"
        process.join()
        code = process.exitcode or 0
        self.stop()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def stop(self) -> None:
        """End the process, and with it that of the subject. Two threads may ask for it: who waits for it, and who ends the run."""
        process, self.process = self.process, None
        if process is not None:
            self.lifeline.close()
            process.join(PATIENCE)
            process.kill()
            process.join()
            self.connection.close()


def _serve(connection: Connection, lifeline: Connection, settings: _Settings, environment: dict[str, str]) -> None:
    """Judge: run the laws that arrive on the subject that comes with them, and send each case before it runs, and the record.

    Without a law the subject is described, or why there is none.
    """
    os.environ.clear()  # of the time when the first process was started
    os.environ.update(environment)
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    laws, subjects = all_laws(), _Subjects(settings)
    while True:
        try:
            law, options, signature = connection.recv()
        except EOFError:
            return
        if law is None:
            connection.send(subjects.describe(options, signature))
            continue
        subject = subjects.of(options, signature)
        record = run_law(laws[law], subject.subject, replace(options, announce=connection.send, isolated=True))
        if record.verdict == "crashed" and options.device != "cpu":
            subject.end()  # an illegal access leaves nothing usable in a CUDA process
        connection.send(record)


def _end_with(lifeline: Connection) -> None:
    """End this process when the other end of the lifeline is closed, however that came about."""
    with suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(1)


class _Subjects:
    """The process of the subject that laws run on now."""

    def __init__(self, settings: _Settings) -> None:
        self.settings = settings
        self.process: SubjectProcess | None = None

    def of(self, options: Options, signature: str | None) -> SubjectProcess:
        """The process of the subject that ``options`` name; the one before it ends, unless subjects share it."""
        assert options.spec is not None
        made_of = options.spec[0], signature, options.dims, options.threads, options.device
        if self.process is None:
            self.process = SubjectProcess(*made_of, limit=self.settings.timeout, under=self.settings.under)
        self.process.turn_to(*made_of, share=self.settings.share)
        return self.process

    def describe(self, options: Options, signature: str | None) -> Description | UnknownSubject:
        """What the subject declares, or why there is none."""
        assert options.spec is not None
        try:
            return declared_by(self.of(options, signature).subject)
        except BrokenSubject as error:
            return broken(options.spec[0], str(error))
        except UnknownSubject as error:
            return error
        except (SubjectCrashed, SuiteFailed) as error:
            return broken(options.spec[0], f"what it declares cannot be read: {error}")


def broken(name: str, fault: str) -> Description:
    """Stands for what a subject declares where its own code did not let it."""
    return Description(name, (), Supports(), {}, fault)
