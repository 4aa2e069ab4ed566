"""Judges a sample of the calls of a kernel as they happen, beside the process that serves or trains."""

from __future__ import annotations

import atexit
import json
import os
import queue
import secrets
import shlex
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mla_spec import __version__
from mla_spec.exchange.call import Call
from mla_spec.exchange.contents import Answer
from mla_spec.exchange.folder import Folder
from mla_spec.exchange.program import Program
from mla_spec.exchange.record import folder_of
from mla_spec.exchange.sample import Sample, require_rate, sampled
from mla_spec.exchange.tensor_file import ExchangeError, encode
from mla_spec.judging.audit_counts import SCHEMA, VERSION, Counts, Status, calls_until_met, level
from mla_spec.judging.audit_metrics import metrics
from mla_spec.judging.audit_worker import message
from mla_spec.subjects.description import Description
from mla_spec.subjects.violation import SubjectCrashed
from mla_spec.text.files import write_atomically

DIRECTORY = "mla-spec-audit"
LINES, METRICS = "audit.jsonl", "audit.prom"

HEADS = 16
"""Heads of a judged row of attention, at most."""

WAITING = 8
"""Copied calls that may wait to be judged; what comes then is dropped."""

INTERVAL = 10.0
"""Seconds between two lines of counts."""

RESTARTS = 3
"""How often in a row the judging process may end before a call is judged."""


def audit(
    kernel: Any,
    *,
    rate: float = 0.001,
    on_violation: Callable[[dict[str, Any]], None] | None = None,
    directory: str | None = None,
    most: int = 2**30,
    operation: str | None = None,
    seed: int | None = None,
) -> Any:
    """The kernel, of whose calls a random sample is judged by another process, as they happen.

    Of a call of the sample random rows are copied: of attention over a cache one sequence or query, at most 16 of its heads, and
    the pages or rows of the cache that these need; of other operations the whole call, up to 16 MiB. Nothing waits for the
    verdict, and nothing is raised into the caller: what is too much is dropped and counted.

    Args:
        kernel: a subject, or a function where ``operation`` names what it implements. Its profile and ``Supports`` are what it
            is judged by; there is no tolerance to choose.
        rate: share of the calls that are judged, 0 to 1.
        on_violation: called in a thread of this process with each violation: a dict of ``operation``, ``dtype``, ``message``,
            ``margins`` (error / bound by output), ``proof`` (beyond the worst case), ``call`` (its name in the folder, "" where
            it was not saved) and ``judge``, the command that repeats the verdict.
        directory: a folder that has no calls yet; None for one of this process below ``mla-spec-audit``.
        most: bytes of saved calls, after which violations are counted and told, and not saved.
        seed: of the sample; None for another each time.

    Returns:
        What is called like ``kernel``. Its ``auditing`` is an ``Auditing``.

    Raises:
        ValueError: ``rate`` is no share, the folder cannot be made, or the kernel offers no operation that has tensors.
    """
    require_rate(rate)
    now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    path = directory or f"{DIRECTORY}/{now}-{os.getpid()}-{secrets.token_hex(3)}"

    def make(declared: Description) -> Auditing:
        return Auditing(folder_of(path, declared), declared, rate, most, seed, on_violation)

    return sampled(kernel, operation, "auditing", make)


class Auditing(Sample):
    """A sample that a process of its own judges. ``docs/audit.md`` describes the files."""

    what = "mla_spec.audit: no more calls are judged"
    whole = 0
    most_heads = HEADS

    def __init__(
        self,
        folder: Folder,
        declared: Description,
        rate: float,
        most: int,
        seed: int | None,
        on_violation: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        super().__init__(declared, rate, seed)
        self.folder, self.room, self.on_violation = folder, most, on_violation
        self.counts = Counts()
        self._process = os.getpid()
        self._waiting: queue.Queue[tuple[Call, Answer, Any] | None] = queue.Queue(WAITING)
        self._thread: threading.Thread | None = None
        self._start = threading.Lock()
        self._worker = Program(_command(str(folder.path)))
        self._written = -INTERVAL
        self._failed, self._ended = 0, False
        head = {"type": "audit", "schema": SCHEMA, "version": VERSION, "suite": __version__, "rate": rate}
        self._append(json.dumps({**head, "subject": folder.header.subject}) + "\n")

    def keep(self, call: Call, answer: Answer) -> None:
        """Hand a copy to the thread that has it judged, unless too many wait."""
        if os.getpid() != self._process:  # a fork has no such thread
            return
        self.taken += 1
        try:
            self._waiting.put_nowait((call, answer, _recorded_event(call, answer)))
        except queue.Full:
            self.counts.dropped += 1
        if self._thread is None:
            with self._start:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._serve, name="mla-spec-audit", daemon=True)
                    self._thread.start()
                    atexit.register(self._end)

    @property
    def status(self) -> Status:
        """The counts so far."""
        return Status(
            self.declared.name, self.calls, self.taken, self.too_large, self.full, dict(self.heads), self.counts
        )

    def report(self) -> str:
        """Counts, margins, the rate of false alarms, and how soon a fault is met, for people."""
        return self.status.text()

    def metrics(self) -> str:
        """The same in the text format of Prometheus."""
        return metrics(self.status)

    def calls_until_met(self, share: float = 1.0) -> int | None:
        """Calls within which a judged row has a fault of this share of the rows, with 99 %; None where none is judged.

        Of a fault in one head of h the share is 1 / h where at most one head is taken, and 1 where all are. Before any call is
        judged the rate that was asked for counts.
        """
        return calls_until_met(self.status.rate if self.counts.held else self.rate, share)

    def close(self, timeout: float = 60.0) -> None:
        """Wait until what was copied is judged, write the last counts, and judge no more; for the end of a run or a test."""
        self.full = self.full or "it was closed"
        if self._thread is not None:
            with suppress(queue.Full):
                self._waiting.put(None, timeout=timeout)
                self._thread.join(timeout)
            atexit.unregister(self._end)
        self._end()

    def _end(self) -> None:
        self._ended = True
        self._worker.stop()
        self._write()

    def _serve(self) -> None:
        """The thread: one call after the other."""
        while True:
            item = self._waiting.get()
            if item is None or self._ended:
                return
            try:
                self._judge(*item)
            except Exception as error:  # nothing of an audit may reach who calls the kernel
                self.counts.dropped += 1
                self._failed += 1
                if self._failed >= RESTARTS and not (self.full or self._ended):
                    self.stop(f"{type(error).__name__}: {error}")
            finally:
                self._waiting.task_done()

    def _judge(self, call: Call, answer: Answer, event: Any) -> None:
        call, answer = _on_host(call, answer, event)
        called, answered = call.encoded(), encode(answer, {})
        failure = level(self.counts.held + 1)
        try:
            found = json.loads(self._worker.ask(message(called, answered, failure, self.room)))
        except (SubjectCrashed, ExchangeError) as error:
            raise RuntimeError(str(error)) from error
        self._failed = 0
        self.room -= found["bytes"]
        first = (call.operation, found["verdict"]) not in self.counts.judged
        self.counts.add(call.operation, found)
        if found["verdict"] == "fail":
            self._tell(call.operation, found)
        elif first and found["verdict"] != "pass":
            plain = {"type": "not judged", "operation": call.operation, "verdict": found["verdict"]}
            self._append(json.dumps({**plain, "message": found["message"]}) + "\n")
        if time.monotonic() - self._written >= INTERVAL:
            self._write()

    def _tell(self, operation: str, found: dict[str, Any]) -> None:
        """Write a violation down, and call back."""
        told = {name: found[name] for name in ("dtype", "message", "margins", "proof", "call")}
        violation = {"operation": operation, **told, "judge": f"mla-spec judge {shlex.quote(str(self.folder.path))}"}
        self._append(json.dumps({"type": "violation", "judged": self.counts.held, **violation}) + "\n")
        if self.on_violation is not None:
            try:
                self.on_violation(violation)
            except Exception as error:
                warnings.warn(f"mla_spec.audit: on_violation raised {type(error).__name__}: {error}", stacklevel=2)

    def _write(self) -> None:
        """Write the counts into both files."""
        self._written = time.monotonic()
        self._append(self.status.line())
        try:
            write_atomically(self.folder.path / METRICS, self.metrics())
        except OSError as error:
            self._complain(error)

    def _append(self, line: str) -> None:
        try:
            with open(Path(self.folder.path) / LINES, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not self.full:
            self.stop(f"cannot write {self.folder.path}: {error.strerror}")


def _command(folder: str) -> str:
    """The command of the process that judges; it sees no device, and computes with one thread."""
    alone = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    code = (
        f"import os, sys; os.environ.update({alone!r}); sys.path[:] = {sys.path!r}; "
        f"from mla_spec.judging.audit_worker import main; main({folder!r}, {os.getpid()})"
    )
    return shlex.join([sys.executable, "-c", code])


def _recorded_event(call: Call, answer: Answer) -> Any:
    """What says when copies on a device are there; None where all are on the host."""
    for x in (*call.tensors.values(), *answer.values()):
        if x.is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(x.device))
            return event
    return None


def _on_host(call: Call, answer: Answer, event: Any) -> tuple[Call, Answer]:
    """Copies on the host; those on a device are brought by a stream of their own."""
    if event is None:
        return call, answer
    event.synchronize()
    device = next(x.device for x in (*call.tensors.values(), *answer.values()) if x.is_cuda)
    with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        tensors = {name: x.cpu() for name, x in call.tensors.items()}
        outputs = {name: x.cpu() for name, x in answer.items()}
    return Call(call.operation, tensors, call.values, call.strides), outputs
