"""What a call of a subject may come to, other than a result."""

from __future__ import annotations


class Violation(Exception):
    """The subject broke the law; the text says where and by how much."""


class SubjectCrashed(Exception):
    """The subject raised an exception on valid input."""


class NotOffered(Exception):
    """The subject turned out to have no such thing, and never said that it has; the text says how that showed."""
