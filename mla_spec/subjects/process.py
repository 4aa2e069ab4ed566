"""The process of a subject, as seen by the one that judges it: requests go there, replies come back, deaths are told."""

from __future__ import annotations

import os
import selectors
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from os import getpid
from pathlib import Path
from typing import Any, NoReturn

from mla_spec.subjects.answering import SUBJECT, made_here
from mla_spec.subjects.configured import Dims
from mla_spec.subjects.keeper import python
from mla_spec.subjects.messages import NoMessage, framed, read_parts, read_reply, unwritten, write_request
from mla_spec.subjects.near import HANDLES, Handle, call_method
from mla_spec.subjects.output import Output
from mla_spec.subjects.violation import TOLD, BrokenSubject, SubjectCrashed, UnknownSubject, Violation

PATIENCE = 5.0
"""Seconds in which a process that was told to end does."""

BUFFER = 1 << 22
"""Bytes that may be on their way, as far as the system allows: the fewer, the more often two processes take turns."""

LIMIT = 300.0
"""Seconds that a request may take, where nobody says otherwise."""

STARTING = 600.0
"""Seconds in which a process has imported what the suite needs, under whatever it runs."""

HANGS = 2
"""Calls that did not return, after which less time is given."""

SLOWEST = 20
"""Then a call may take this many times what the longest took that did return, and a tenth of the limit."""


class SubjectDied(SubjectCrashed):
    """The process of the subject has ended, or had to be; the text says how."""


class SubjectHung(SubjectDied):
    """A call did not return in time."""


class SubjectProcess:
    """A process that holds one subject; it starts with the first request, and again after its end.

    Args:
        spec, signature, dims: what names the subject; see ``configured_subject``.
        threads, device: how torch is set up there.
        limit: seconds that a request may take; None for any.
        under: a command that runs the process, such as a sanitizer; empty for none.

    Attributes:
        subject: the subject there.
        facts: what others have read of the subject and keep, since it is asked for often.
    """

    def __init__(
        self,
        spec: str,
        signature: str | None = None,
        dims: Dims = (),
        threads: int = 1,
        device: str = "cpu",
        *,
        limit: float | None = None,
        under: str = "",
    ) -> None:
        self.made_of: tuple[Any, ...] = spec, signature, dims, threads, device
        self.limit, self.under = limit, shlex.split(under)
        self.output = Output(bool(self.under))
        self.hangs, self.longest = 0, 0.0
        self.facts: dict[str, Any] = {}
        self._life = 0
        self._made, self._known = False, False  # whether the subject is there now, and ever was
        self._released: list[int] = []
        self._methods: set[tuple[str, str]] = set()
        self._keeper: subprocess.Popen[bytes] | None = None
        self._lifeline: socket.socket | None = None
        self._channel: socket.socket | None = None
        self._selector = selectors.DefaultSelector()
        self.subject = Handle(self, 0, SUBJECT, "the subject")

    def request(self, function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """What the function returns there.

        Raises:
            Violation, SubjectCrashed, NotOffered, DoesNotFit: as it did there.
            SubjectDied: the process ended instead, or did not answer in time.
            UnknownSubject: there is no such subject.
        """
        if self._channel is None:
            self._start()
        if not self._made:
            self._make()
        released, self._released = self._released, []
        start = time.monotonic()
        value = self._exchange(write_request((released, False, function, arguments, options)), self.patience)
        self.longest = max(self.longest, time.monotonic() - start)
        return value

    def attribute(self, handle: Handle, name: str) -> Any:
        """An attribute of what a handle stands for; a method is not asked for before it is called."""
        if (handle.of, name) not in self._methods:
            is_method, value = self.request(_attribute, (handle, name), {})
            if not is_method:
                return value
            self._methods.add((handle.of, name))
        return lambda *arguments, **options: self.request(call_method, (handle, name, *arguments), options)

    def release(self, handle: Handle) -> None:
        """Let go of what a handle stands for, with the next request."""
        if handle.life == self._life and handle.key != SUBJECT:
            self._released.append(handle.key)

    def holds(self, handle: Handle) -> bool:
        """Whether what it stands for is still there."""
        return handle.key == SUBJECT or (handle.life == self._life and self._channel is not None)

    def turn_to(self, *made_of: Any, share: bool = False) -> None:
        """Hold another subject from now on, in a new process unless they ``share`` one; arguments as of the constructor."""
        if made_of == self.made_of:
            return
        self.made_of, self._made, self._known = made_of, False, False
        self.hangs, self.longest, self.facts = 0, 0.0, {}
        if not share:
            self.end()

    def require_silence(self) -> None:
        """Raise Violation where the tool under which the subject runs has reported anything since its last call of this.

        The process ends then: most tools report a place only once, and the next case may have the same to show.
        """
        if not self.under or self._channel is None:
            return
        self._drain()
        report = self.output.reported()
        self.output.clear()
        if report:
            self.end()
            raise Violation(f"{self.tool} reports: {report}")

    def finish(self) -> None:
        """Let the process end by itself, under the tool that it runs under; Violation where that has an error to tell."""
        if not self.under or self._channel is None or self._lifeline is None:
            return
        self.require_silence()
        self._disconnect()
        status = self._told_status(STARTING)
        self._drain()
        if not status:
            self._forget_keeper()
        if status != "0":
            raise Violation(f"under {self.tool} the process ended with {status or 'its keeper'}{self.output.told()}")

    def end(self) -> None:
        """End the process of the subject; the next request starts another."""
        self._kill()

    @property
    def tool(self) -> str:
        """The name of the tool under which the subject runs: that of its command, or of the library that env loads before others."""
        words = self.under[1:] if self.under[0] == "env" else self.under
        command = next((word for word in words if "=" not in word), None)
        loaded = [word.partition("=")[2] for word in words if word.startswith("LD_PRELOAD=")]
        return Path(command or (loaded or self.under)[0]).name

    @property
    def patience(self) -> float | None:
        """Seconds that the next request may take."""
        if self.limit is None or self.hangs < HANGS:
            return self.limit
        return min(self.limit, max(self.limit / 10, SLOWEST * self.longest))

    def stop(self) -> None:
        """End the process, the keeper and all that they have started."""
        self._disconnect()
        if self._keeper is not None and self._lifeline is not None:
            self._selector.close()
            self._lifeline.close()  # upon which it ends all, and itself
            try:
                self._keeper.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self._keeper.kill()
                self._keeper.wait()
            assert self._keeper.stdout is not None
            self._keeper.stdout.close()
            self._keeper = self._lifeline = None
            self._selector = selectors.DefaultSelector()

    def launch(self) -> None:
        """Start the keeper, without waiting for it."""
        if self._keeper is not None:
            return
        self._lifeline, theirs = socket.socketpair()
        self._keeper = subprocess.Popen(
            python("keep", theirs.fileno(), self.under),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        theirs.close()
        assert self._keeper.stdout is not None
        os.set_blocking(self._keeper.stdout.fileno(), False)
        self._selector.register(self._keeper.stdout, selectors.EVENT_READ, "output")
        self._selector.register(self._lifeline, selectors.EVENT_READ, "lifeline")

    def _start(self) -> None:
        self.launch()
        assert self._lifeline is not None
        self._channel, theirs = socket.socketpair()
        for end in (self._channel, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        self._channel.setblocking(False)
        self._selector.register(self._channel, selectors.EVENT_READ, "channel")
        self._life, self._released = self._life + 1, []
        self.output.clear()
        try:
            socket.send_fds(self._lifeline, [b"start"], [theirs.fileno()])
        except OSError:
            self._lost()
        finally:
            theirs.close()
        self._exchange(write_request(([], False, getpid, (), {})), STARTING)

    def _make(self) -> None:
        """Have the subject made; where it once could be and now cannot, it has died."""
        once, self._made = self._known, False
        try:
            self._exchange(write_request(([], True, made_here, self.made_of, {})), self.limit)
        except (UnknownSubject, SubjectCrashed) as error:
            self._kill()
            if once:
                raise SubjectDied(f"it could not be made again: {error}") from None
            if isinstance(error, UnknownSubject):
                raise
            raise BrokenSubject(f"{self.made_of[0]}: importing and making it failed: {error}") from None
        self._made = self._known = True
        if self.under:
            self._drain()
            self.output.clear()  # what a tool says of Python and torch

    def _exchange(self, request: list[Any], patience: float | None) -> Any:
        end = None if patience is None else time.monotonic() + patience
        try:
            for part in framed(request):
                self._send(memoryview(part), end)
            kind, value = read_reply(
                read_parts(lambda size: self._receive(size, end)),
                lambda key, of: HANDLES.get(of, Handle)(self, self._life, key, of),
            )
        except NoMessage as error:
            self._kill()
            raise SubjectDied(
                f"something other than the suite wrote into the channel of its process: {error}"
            ) from None
        except TimeoutError:
            self._kill()
            self.hangs += 1
            raise SubjectHung(f"did not return within {patience:g} s{self.output.told()}") from None
        except (KeyboardInterrupt, SystemExit):
            self._kill()  # its answer is lost
            raise
        if kind == "value":
            return value
        name, text, exhausted = value
        told = TOLD[name](text)
        if isinstance(told, SubjectCrashed):
            told.exhausted = exhausted
        raise told

    def _send(self, data: memoryview, end: float | None) -> None:
        assert self._channel is not None
        while data:
            try:
                data = data[self._channel.send(data) :]
            except BlockingIOError:
                self._selector.modify(self._channel, selectors.EVENT_READ | selectors.EVENT_WRITE, "channel")
                try:
                    self._wait(end)
                finally:
                    if self._channel is not None:
                        self._selector.modify(self._channel, selectors.EVENT_READ, "channel")
            except ConnectionError:
                self._lost()

    def _receive(self, size: int, end: float | None) -> memoryview:
        assert self._channel is not None
        got, done = unwritten(size), 0
        while done < size:
            try:
                count = self._channel.recv_into(got[done:])
            except BlockingIOError:
                self._wait(end)
                continue
            except ConnectionError:
                count = 0
            if not count:
                self._lost()
            done += count
        return got

    def _wait(self, end: float | None) -> None:
        """Wait until the channel is ready; keep what the subject prints."""
        while True:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError
            ready = {key.data for key, _ in self._selector.select(left)}
            if "output" in ready:
                self._drain()
            if "channel" in ready:
                return
            if "lifeline" in ready:
                self._lost()

    def _drain(self) -> None:
        assert self._keeper is not None and self._keeper.stdout is not None
        with suppress(BlockingIOError):
            while data := os.read(self._keeper.stdout.fileno(), 1 << 16):
                self.output.add(data)

    def _lost(self) -> NoReturn:
        """Say how the process has ended."""
        reason = self._ended()
        self._disconnect()
        raise SubjectDied(f"the process {reason}{self.output.told()}")

    def _ended(self) -> str:
        assert self._lifeline is not None and self._keeper is not None
        status = self._told_status()
        if status is None:
            self._kill()
            return "closed its channel"
        self._drain()
        if status == "":
            self._forget_keeper()
            return "was ended together with its keeper"
        code = int(status)
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def _told_status(self, patience: float = PATIENCE) -> str | None:
        """The exit status as the keeper tells it, empty where the keeper is gone, None where the process lives on."""
        assert self._lifeline is not None
        self._lifeline.settimeout(patience)
        try:
            return self._lifeline.recv(64).decode()
        except TimeoutError:
            return None
        except ConnectionError:
            return ""
        finally:
            self._lifeline.settimeout(None)

    def _kill(self) -> None:
        """End the process at once, and what it has started."""
        if self._channel is None or self._lifeline is None:
            return
        self._disconnect()
        try:
            self._lifeline.send(b"end")
            if self._told_status():
                self._drain()
                return
        except OSError:
            pass
        self._forget_keeper()

    def _forget_keeper(self) -> None:
        """End a keeper that does not answer; the next request starts another."""
        assert self._keeper is not None
        self._keeper.kill()
        self.stop()

    def _disconnect(self) -> None:
        if self._channel is not None:
            self._selector.unregister(self._channel)
            self._channel.close()
            self._channel, self._made = None, False


def _attribute(of: Any, name: str) -> tuple[bool, Any]:
    value = getattr(of, name)
    return (True, None) if callable(value) else (False, value)


@contextmanager
def apart(spec: str, device: str = "cpu", *, signature: str | None = None, limit: float = LIMIT) -> Iterator[Handle]:
    """The subject that ``spec`` names, in a process of its own that ends with the block.

    The first request raises UnknownSubject where there is none, and BrokenSubject where it cannot be made.
    """
    process = SubjectProcess(spec, signature, device=device, limit=limit)
    try:
        yield process.subject
    finally:
        process.stop()
