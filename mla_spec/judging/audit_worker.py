"""The process of an audit that judges: copies of calls come on its standard input, and what it finds goes to its standard output.

A message is its length in bytes, as 8 bytes, the lowest first, and then a line of JSON, a call and its answer. The reply is its
length and JSON. The process ends when its input does, and when the process that started it is gone.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import IO, Any

import torch

from mla_spec.exchange.call import address, read_call
from mla_spec.exchange.contents import read_answer
from mla_spec.exchange.folder import Folder
from mla_spec.exchange.record import put
from mla_spec.exchange.tensor_file import ExchangeError
from mla_spec.judging.audit_counts import number
from mla_spec.judging.recorded import Judgement, judge_answer

WATCH = 1.0
"""Seconds between two looks at whether the process that started this one is there."""


def message(call: bytes, answer: bytes, failure: float, room: int) -> bytes:
    """What is asked about a call.

    Args:
        failure: how probable a false alarm may be.
        room: bytes that may still be saved.
    """
    head = {"call": len(call), "failure": failure, "room": room}
    return b"".join([json.dumps(head).encode(), b"\n", call, answer])


def main(folder: str, parent: int) -> None:
    """Judge until the input ends.

    Args:
        folder: where failing calls are saved, with the header that says what the kernel declares.
        parent: the process that is served.
    """
    if hasattr(os, "setsid") and os.getpid() != os.getsid(0):
        os.setsid()  # an interrupt from the terminal is not for this process
    os.nice(19)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no reply
    _serve(Folder.opened(folder), sys.stdin.buffer, out)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH)
    os._exit(0)


def _serve(folder: Folder, given: IO[bytes], out: IO[bytes]) -> None:
    while True:
        size = given.read(8)
        if len(size) < 8:
            return
        data = given.read(int.from_bytes(size, "little"))
        reply = json.dumps(_found(folder, data)).encode()
        out.write(len(reply).to_bytes(8, "little") + reply)
        out.flush()


def _found(folder: Folder, data: bytes) -> dict[str, Any]:
    """What is found of a call; a failing one is saved."""
    line, _, rest = data.partition(b"\n")
    head = json.loads(line)
    called, answered = rest[: head["call"]], rest[head["call"] :]
    try:
        call = read_call(called, "a call")
        found = judge_answer(folder.declared, call, lambda: read_answer(answered, "its answer"), head["failure"])
    except (ExchangeError, ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as error:
        return _plain(Judgement(verdict="incomplete", message=f"{type(error).__name__}: {error}"))
    plain = _plain(found)
    if found.verdict == "fail" and len(called) + len(answered) <= head["room"]:
        plain["bytes"] = (len(called) + len(answered)) * put(folder, call, answered, str(len(folder.known)))
        plain["call"] = address(called)
    return plain


def _plain(found: Judgement) -> dict[str, Any]:
    """As JSON; None stands for numbers that are not finite."""
    sights = {
        name: [max(sight.bounds), max(sight.relative)]
        for name, sight in found.sights.items()
        if sight.bounds and all(number(x) is not None for x in (*sight.bounds, *sight.relative))
    }
    return {
        "verdict": found.verdict,
        "dtype": found.dtype,
        "message": found.message,
        "margins": {name: number(margin) for name, margin in found.margins.items()},
        "proof": found.proof,
        "sights": sights,
        "call": "",
        "bytes": 0,
    }
