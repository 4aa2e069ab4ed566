"""What a call of a subject may come to, other than a result."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager


class Violation(Exception):
    """The subject broke the law; the text says where and by how much."""


class SubjectCrashed(Exception):
    """The subject raised an exception on valid input, or asked to end the process."""


class NotOffered(Exception):
    """The subject turned out to have no such thing, and never said that it has; the text says how that showed."""


@contextmanager
def subject_code() -> Iterator[None]:
    """Code of the subject runs here: whatever it raises, SystemExit included, is ``SubjectCrashed``. Ctrl-C is not its own."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise SubjectCrashed(raised(error)) from error


def raised(error: BaseException) -> str:
    """The type of an exception, the first line of its text, and where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''} ({frame.filename}:{frame.lineno})"
