"""A subject that shares a process with the suite must not end it as if all were well."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

INCOMPLETE = 3
"""The exit code of a run that judged nothing."""


@contextmanager
def loud_exits() -> Iterator[None]:
    """In this process ``os._exit(0)`` says what happened, on what is stderr now, and ends with 3.

    Forked children end as they like. A kernel that calls the exit of C is not seen; in a worker process it is.
    """
    own, end, console = os.getpid(), os._exit, os.dup(2)  # a stderr that pytest captures later would be lost

    def _exit(status: int) -> None:
        if status == 0 and os.getpid() == own:
            os.write(console, b"mla-spec: the process was ended by os._exit(0) before there was a report\n")
            status = INCOMPLETE
        end(status)

    os._exit = _exit  # type: ignore[assignment]
    try:
        yield
    finally:
        os._exit = end
        os.close(console)
