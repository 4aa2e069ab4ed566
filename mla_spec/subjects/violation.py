"""What a call of a subject may come to, other than a result."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager


class Violation(Exception):
    """The subject broke the law; the text says where and by how much."""


class SubjectCrashed(Exception):
    """The subject raised an exception on valid input, or asked to end the process.

    Attributes:
        exhausted: whether it could not have the memory it asked for.
    """

    exhausted = False


class SuiteFailed(Exception):
    """The suite's own code raised an exception, which the text names; it says nothing of the subject.

    See ``mla_spec.subjects.blame``.
    """


class Unsupported(Exception):
    """A subject refuses a call: what it is asked for is beyond what it is. The text is a clause that says why.

    A subject raises it, or returns such a text from ``supports_layer(config)``. The case is *unsupported*, never *fail*.
    """


class NotOffered(Exception):
    """The subject turned out to have no such thing, and never said that it has; the text says how that showed."""


class NotExported(SubjectCrashed):
    """Outputs come from files, and the call is not among those that were written; the text says why."""


class NoAnswer(SubjectCrashed):
    """Outputs come from files, and a call that was written has no answer yet."""


class DoesNotFit(Exception):
    """The device has no memory for distant tensors; the text says how much they need, and how much is free."""


class UnknownSubject(Exception):
    """No subject has this name; the text is one sentence for the user."""


class BrokenSubject(UnknownSubject):
    """A subject has this name, but its own code did not let it be made."""


TOLD = {
    c.__name__: c
    for c in (
        Violation,
        SubjectCrashed,
        SuiteFailed,
        Unsupported,
        NotOffered,
        NotExported,
        NoAnswer,
        DoesNotFit,
        UnknownSubject,
        BrokenSubject,
    )
}
"""What code beside a subject may raise, by name."""


@contextmanager
def subject_code() -> Iterator[None]:
    """Code of the subject runs here: whatever it raises, SystemExit included, is ``SubjectCrashed``.

    Ctrl-C is not its own, a ``Violation`` is an adapter's verdict on the kernel that it called, and ``Unsupported`` is no crash.
    """
    try:
        yield
    except (KeyboardInterrupt, SubjectCrashed, SuiteFailed, Violation, Unsupported):
        raise
    except BaseException as error:
        crash = SubjectCrashed(raised(error))
        crash.exhausted = lacks_memory(error)
        raise crash from error


def lacks_memory(error: BaseException) -> bool:
    """Whether an exception says that memory could not be had. On the CPU torch has no class for it."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in _text(error)
    )


def raised(error: BaseException) -> str:
    """The type of an exception, the first line of its text, and where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = _text(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''} ({frame.filename}:{frame.lineno})"


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:  # of the subject's own class
        return "it cannot be printed"
