"""The processes of a subject: a keeper, and what it starts, one after the other, to hold the subject and answer requests.

The keeper has imported torch and does not touch a device, so that it can fork a new process at once when one has died. It ends
all that a subject has started when the subject's process ends, when it is told to, and when the process that judges is gone.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mla_spec.installed import load_for_subjects

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_OUT_OF_THE_WAY = 1 << 14
"""The channel gets a number that loops over the usual descriptors do not reach."""

COMMAND = "import sys; sys.path[:] = {path!r}; from mla_spec.subjects import keeper; keeper.{function}({arguments})"


def python(function: str, *arguments: Any) -> list[str]:
    """The command of a Python that imports what this one does and calls a function of this module."""
    code = COMMAND.format(path=sys.path, function=function, arguments=", ".join(map(repr, arguments)))
    return [sys.executable, "-c", code]


def keep(lifeline: int, wrapper: list[str]) -> None:
    """Be the keeper: start a process for each channel that arrives, until the other end of the lifeline is closed.

    Args:
        lifeline: a socket. "start" comes with a channel, "end" without; how each process ended is sent back.
        wrapper: a command that is put before that of the subject's process; none for no such.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    if not wrapper:
        load_for_subjects()
    _Keeper(socket.socket(fileno=lifeline), wrapper).run()


class _Keeper:
    def __init__(self, lifeline: socket.socket, wrapper: list[str]) -> None:
        self.lifeline, self.wrapper = lifeline, wrapper
        self.subject: int | None = None
        self.woken, wake = os.pipe()
        for end in (self.woken, wake):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def run(self) -> None:
        lifeline = self.lifeline.fileno()
        while True:
            ready, _, _ = select.select([lifeline, self.woken], [], [])
            if self.woken in ready:
                with suppress(BlockingIOError):
                    os.read(self.woken, 4096)
                self._reap()
            if lifeline in ready:
                told, channels, _, _ = socket.recv_fds(self.lifeline, 16, 1)
                if told == b"":
                    _end_children(lambda pid, status: None)
                    return
                if channels:
                    self._start(channels[0], lifeline)
                else:
                    _end_children(self._ended)

    def _start(self, channel: int, lifeline: int) -> None:
        self.subject = os.fork()
        if self.subject:
            os.close(channel)
            return
        os.close(lifeline)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.close(self.woken)
        _be_the_subject(channel, self.wrapper)

    def _reap(self) -> None:
        """Take note of children that have ended; nothing of a subject outlives its process."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.subject:
                _end_children(lambda pid, status: None)
                self._ended(pid, status)

    def _ended(self, pid: int, status: int) -> None:
        if pid == self.subject:
            self.subject = None
            with suppress(OSError):  # nobody may be left to hear it
                self.lifeline.send(str(os.waitstatus_to_exitcode(status)).encode())


def _end_children(ended: Callable[[int, int], None]) -> None:
    """End all children, and what becomes a child when its parent has ended, until there are none."""
    while True:
        for pid in _children():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return
        ended(pid, status)


def _children() -> list[int]:
    me, found = os.getpid(), []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(entry.read_text(errors="replace").rpartition(")")[2].split()[1]) == me:
                found.append(int(entry.parent.name))
    return found


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _be_the_subject(channel: int, wrapper: list[str]) -> None:
    """In the child: answer requests until the channel is closed."""
    try:
        os.setsid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if wrapper:
            os.set_inheritable(channel, True)
            command = [*wrapper, *python("answer", channel)]
            os.execvp(command[0], command)
        answer(channel)
    except OSError as error:
        os.write(2, f"{error}\n".encode())
    finally:
        os._exit(1)


def answer(channel: int) -> None:
    """Be the process of a subject: answer what comes over the channel, a socket."""
    from mla_spec.subjects.answering import answer_requests

    high = _out_of_the_way(channel)
    sys.argv = ["mla-spec"]
    answer_requests(socket.socket(fileno=high))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _out_of_the_way(channel: int) -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        high = fcntl.fcntl(channel, fcntl.F_DUPFD_CLOEXEC, min(_OUT_OF_THE_WAY, soft - 1))
    except OSError:
        return channel
    os.close(channel)
    return high
