"""Runs laws in a worker process: a subject that kills its process, or never returns, costs one law and not the report.

A subject that ends its process while it is imported or made is described by nobody, and that is said.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from mla_spec.installed import all_laws
from mla_spec.judging.law import Options
from mla_spec.judging.run import replay_command, run_law
from mla_spec.judging.verdict import Record
from mla_spec.subjects.configured import configured_subject
from mla_spec.subjects.description import Description, describe
from mla_spec.subjects.find import UnknownSubject

_CONTEXT = multiprocessing.get_context("spawn")  # a forked child could not use CUDA


class WorkerPool:
    """Processes that run laws, ``jobs`` at a time; a context manager.

    A law during which its process dies, or a case takes more than ``timeout`` seconds, is *crashed*; what follows runs in a
    new process. A process serves one subject, as long as laws of that subject are next, unless the subjects ``share`` them.
    """

    def __init__(self, jobs: int = 1, timeout: float | None = None, *, share: bool = False) -> None:
        self.timeout = timeout
        self.share = share
        self._threads = ThreadPoolExecutor(jobs)
        self._own = threading.local()
        self._workers: list[_Worker] = []

    def submit(self, law: str, subject_name: str, options: Options, signature: str | None = None) -> Future[Record]:
        """Run a law on the subject that ``options.spec`` names, when a process is free; first come, first served."""
        assert options.spec is not None
        return self._threads.submit(self._run, law, subject_name, options, signature)

    def describe(self, options: Options, signature: str | None = None) -> Future[Description]:
        """What the subject that ``options.spec`` names declares.

        The future raises ``UnknownSubject`` where it cannot be imported or made, or its process does not live to tell.
        """
        return self._threads.submit(lambda: self._worker(options, signature).describe(self.timeout))

    def _run(self, law: str, subject_name: str, options: Options, signature: str | None) -> Record:
        return self._worker(options, signature).run(law, subject_name, self.timeout)

    def _worker(self, options: Options, signature: str | None) -> _Worker:
        """The worker of this thread, turned to a subject."""
        worker: _Worker | None = getattr(self._own, "worker", None)
        if worker is None:
            worker = self._own.worker = _Worker(options, signature)
            self._workers.append(worker)
        worker.serve(options, signature, share=self.share)
        return worker

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(wait=error[0] is None, cancel_futures=True)
        for worker in self._workers:
            worker.stop()


@dataclass
class _Worker:
    options: Options
    signature: str | None
    process: SpawnProcess | None = None
    connection: Connection = field(init=False)

    def serve(self, options: Options, signature: str | None, *, share: bool) -> None:
        """Turn to the subject of ``options``, in a new process unless ``share``."""
        if not share and (options.spec, signature) != (self.options.spec, self.signature):
            self.stop()
        self.options, self.signature = options, signature

    def describe(self, timeout: float | None) -> Description:
        """What the subject declares."""
        assert self.options.spec is not None
        try:
            if self.process is None:
                self._start()
            self.connection.send((None, self.options, self.signature))
            if self.connection.poll(timeout):
                message = self.connection.recv()
                if isinstance(message, Description):
                    return message
                raise UnknownSubject(message)
            reason = f"did not end within {timeout:g} s"
        except (EOFError, ConnectionError):
            reason = f"failed: the process {self._end()}"
        self.stop()
        raise UnknownSubject(f"{self.options.spec[0]}: importing and making it {reason}")

    def run(self, law: str, subject_name: str, timeout: float | None) -> Record:
        start, cases, last = time.perf_counter(), 0, None
        try:
            if self.process is None:
                self._start()
            self.connection.send((law, self.options, self.signature))
            while True:
                if not self.connection.poll(timeout):
                    reason = f"did not return within {timeout:g} s"
                    break
                message = self.connection.recv()
                if isinstance(message, Record):
                    if message.verdict == "crashed" and self.options.device != "cpu":
                        self.stop()  # an illegal access leaves nothing usable in a CUDA process
                    return message
                cases, last = cases + 1, message
        except (EOFError, ConnectionError):
            reason = f"the process {self._end()}; such cases are not made smaller"
        self.stop()
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

    def _start(self) -> None:
        self.connection, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.connection.recv()  # until its imports are done, for which the timeout is not meant

    def _end(self) -> str:
        """How the process ended."""
        assert self.process is not None
        self.process.join()
        code = self.process.exitcode or 0
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None


def _serve(connection: Connection) -> None:
    """Send None when ready; then run the laws that arrive, and send each case before it runs, and the record.

    Without a law the subject is described, or why there is none.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    laws = all_laws()
    connection.send(None)
    subject, spec = None, None
    while True:
        law, options, signature = connection.recv()
        if options.spec != spec:
            try:
                subject, spec = configured_subject(options.spec[0], signature, options.dims), options.spec
            except UnknownSubject as error:
                if law is not None:
                    raise
                connection.send(str(error))
                continue
        if law is None:
            connection.send(describe(subject))
            continue
        connection.send(run_law(laws[law], subject, replace(options, announce=connection.send, isolated=True)))
