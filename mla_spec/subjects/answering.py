"""What the process of a subject does: it makes the subject, and runs the functions that it is asked to run."""

from __future__ import annotations

import os
import socket
from itertools import count
from typing import Any

import torch

from mla_spec.subjects.blame import suite_failed
from mla_spec.subjects.configured import Dims, configured_subject
from mla_spec.subjects.memory import fill_memory
from mla_spec.subjects.messages import framed, read_exactly, read_parts, read_request, write_reply
from mla_spec.subjects.violation import TOLD, SubjectCrashed, SuiteFailed, Unsupported, raised

SUBJECT = 0
"""The number of the subject itself."""


def made_here(spec: str, signature: str | None, dims: Dims, threads: int, device: str) -> Any:
    """The subject, in a process that is as laws want it."""
    torch.set_num_threads(threads)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # where kernels are launched
    fill_memory(device)
    return configured_subject(spec, signature, dims)


def answer_requests(channel: socket.socket) -> None:
    """Answer until the other end is closed, which alone ends it."""
    kept, own = _Kept(), os.getpid()
    while True:
        try:
            parts = read_parts(lambda size: read_exactly(channel, size))
        except (EOFError, ConnectionError):
            return
        try:
            reply = write_reply(_answer(parts, kept), kept.keep)
        except BaseException as error:
            reply = write_reply(_told(error), kept.keep)
        del parts
        if os.getpid() != own:  # a child that the subject has forked, and that returned as if it were its parent
            os._exit(0)
        for part in framed(reply):
            channel.sendall(part)


class _Kept:
    """What stays here, by number."""

    def __init__(self) -> None:
        self.objects: dict[int, Any] = {}
        self.numbers = count(1)

    def keep(self, x: Any) -> int:
        number = next(self.numbers)
        self.objects[number] = x
        return number


def _answer(parts: list[Any], kept: _Kept) -> tuple[str, Any]:
    released, made, function, arguments, options = read_request(parts, lambda number: kept.objects[number])
    for number in released:
        kept.objects.pop(number, None)
    value = function(*arguments, **options)
    if made:
        kept.objects[SUBJECT] = value
        return "value", None
    return "value", value


def _told(error: BaseException) -> tuple[str, Any]:
    """An exception as its class, text and what else it says."""
    if isinstance(error, Unsupported):
        error = Unsupported(str(error))  # of whatever class a subject derives from it
    # Others have classes of these names too, as torch's own Unsupported.
    if TOLD.get(type(error).__name__) is not type(error):
        error = (SuiteFailed if suite_failed(error) else SubjectCrashed)(raised(error))
    return "raised", (type(error).__name__, str(error), getattr(error, "exhausted", False))
