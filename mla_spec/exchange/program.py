"""A program that answers calls: each comes on its standard input, and each answer goes to its standard output."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import tempfile
from typing import IO, Any

from mla_spec.exchange.call import SCHEMA, VERSION, Call
from mla_spec.exchange.contents import Answer, ContentsSubject, read_answer
from mla_spec.exchange.declared import Declared, read_declared
from mla_spec.exchange.tensor_file import LARGEST, ExchangeError, decode, encode
from mla_spec.subjects.violation import SubjectCrashed
from mla_spec.text.terminal import printable, shown

PATIENCE = 5.0
"""Seconds in which a program that closed its output ends."""

TOLD = 2000
"""Bytes of what a program printed last, for a message."""


class Program:
    """A running program; it starts with the first message, and again after its end.

    A message is its length in bytes, as 8 bytes, the lowest first, and a safetensors file of that length.
    """

    def __init__(self, command: str) -> None:
        self.command = command
        try:
            self._arguments = shlex.split(command)
        except ValueError as error:
            raise ExchangeError(f"the command {shown(command)} cannot be split into words: {error}") from error
        if not self._arguments:
            raise ExchangeError("the command is empty; expected a program and its arguments")
        self._running: subprocess.Popen[bytes] | None = None
        self._printed: IO[bytes] | None = None

    def ask(self, message: bytes) -> bytes:
        """The answer to a message.

        Raises:
            SubjectCrashed: the program ended, or wrote something else.
        """
        running = self._running or self._start()
        assert running.stdin is not None
        try:
            running.stdin.write(len(message).to_bytes(8, "little"))
            running.stdin.write(message)
            running.stdin.flush()
        except OSError:
            raise self._ended() from None
        size = int.from_bytes(self._read(8), "little")
        if size > LARGEST:
            self.stop()
            raise SubjectCrashed(
                f"{self.command} wrote to its standard output what is no answer; messages go to stderr"
            )
        return self._read(size)

    def _start(self) -> subprocess.Popen[bytes]:
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the program runs
        try:
            self._running = subprocess.Popen(
                self._arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._printed
            )
        except OSError as error:
            raise ExchangeError(f"{shown(self._arguments[0])} cannot be started: {error.strerror}") from error
        return self._running

    def _read(self, size: int) -> bytes:
        assert self._running is not None and self._running.stdout is not None
        data = self._running.stdout.read(size)
        if len(data) < size:
            raise self._ended()
        return data

    def _ended(self) -> SubjectCrashed:
        """How the program ended, and what it printed last."""
        assert self._running is not None and self._printed is not None
        try:
            code = self._running.wait(PATIENCE)
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        except subprocess.TimeoutExpired:
            how = "closed its standard output"
        size = self._printed.seek(0, 2)
        self._printed.seek(max(0, size - TOLD))
        said = printable(self._printed.read().decode(errors="replace").strip(), TOLD)
        self.stop()
        return SubjectCrashed(f"{self.command} {how} before it answered" + (f"\nit printed:\n{said}" if said else ""))

    def stop(self) -> None:
        """End the program; the next message starts it again."""
        if self._running is not None:
            self._running.kill()
            self._running.wait()
            for pipe in (self._running.stdin, self._running.stdout, self._printed):
                assert pipe is not None
                try:
                    pipe.close()
                except OSError:
                    continue  # what was not yet written is lost with its reader
        self._running = None


def program_subject(command: str) -> ContentsSubject:
    """The subject that a command answers for.

    Raises:
        ExchangeError: the program cannot be started, or does not say what it offers.
    """
    program = Program(command)

    def answer(call: Call) -> Answer:
        return read_answer(program.ask(call.encoded()), f"an answer of {command}")

    return ContentsSubject(_described(program), "pipe", answer)


def _described(program: Program) -> Declared:
    """What the program says of itself, before its first call."""
    request = encode({}, {"schema": SCHEMA, "version": VERSION, "operation": "describe"})
    what = f"what {program.command} declares"
    try:
        _, texts = decode(program.ask(request), what)
    except SubjectCrashed as error:
        raise ExchangeError(str(error)) from error
    content: dict[str, Any] = {"operations": texts.get("operations", "").split()}
    if "name" in texts:
        content["name"] = texts["name"]
    for name in ("supports", "profile"):
        try:
            content |= {name: json.loads(texts[name])} if name in texts else {}
        except (ValueError, RecursionError) as error:
            raise ExchangeError(f"{what}: {name} is no JSON: {shown(texts[name])}") from error
    return read_declared(content, what)
