"""What a subject is: an object that offers operations, and what it declares about itself.

A subject is any object with some of the methods that the modules of ``mla_spec.operations`` state, one module an operation;
``mla-spec contract OPERATION`` prints one. An absent method means that the operation is not offered. A subject gets and
returns torch tensors on its own device. ``name``, ``profile`` and ``supports`` are optional attributes.

Conventions that all operations share:

* Letters of shapes: b sequences, s queries, t keys, h heads, n nope dims, r rope dims, c latent dims, v value dims,
  e model dims, k selected keys.
* A row of a cache is [latent | k_pe], latent first. Its pages are named by a block table.
* Masks are bottom-right: of s queries and t keys, query i sees keys 0 .. t - s + i.
* An LSE is a natural logarithm, in float32 or better.
* Arguments are read by their strides, and none is changed but one that the operation is there to write.
* Outputs are memory of the caller's: they share none with arguments, and later calls leave them alone.
* Nothing of a call lives on in the next: what a tensor holds may change without a trace between two calls.
* softmax_scale is any finite number, a negative one too unless ``supports.negative_scale`` is False.
"""

from __future__ import annotations

from collections.abc import Mapping

from mla_spec.bounds.profile import Profile
from mla_spec.installed import operation_names
from mla_spec.subjects.supports import DTYPES, Supports
from mla_spec.subjects.violation import raised
from mla_spec.text.terminal import one_line, shown


def subject_name(subject: object) -> str:
    """``subject.name``, else the name of its class."""
    return one_line(getattr(subject, "name", type(subject).__name__), 200)


def offers(subject: object, operation: str) -> bool:
    """Whether the subject has the method ``operation``."""
    return callable(getattr(subject, operation, None))


def supports_of(subject: object) -> Supports:
    """``subject.supports``, else everything; TypeError when it is something else."""
    supports = getattr(subject, "supports", None)
    if supports is None:
        return Supports()
    if not isinstance(supports, Supports):
        raise TypeError(f"{subject_name(subject)}.supports must be a Supports, got {type(supports).__name__}")
    return supports


def profile_of(subject: object, dtype: str) -> Profile:
    """The profile declared for ``dtype`` in the mapping ``subject.profile``, else the default of that dtype.

    Raises:
        TypeError: ``subject.profile`` is no mapping from dtype names to Profiles of that dtype.
    """
    declared = getattr(subject, "profile", None)
    if declared is None:
        return Profile.default(dtype)
    name = subject_name(subject)
    if not isinstance(declared, Mapping):
        raise TypeError(f"{name}.profile must map dtype names to Profiles, got {type(declared).__name__}")
    for key in declared:
        if not isinstance(key, str) or key not in DTYPES:
            raise TypeError(f"{name}.profile has the key {shown(key)}; expected some of {', '.join(DTYPES)}")
    profile = declared.get(dtype)
    if profile is None:
        return Profile.default(dtype)
    if not isinstance(profile, Profile) or profile.dtype != dtype:
        raise TypeError(f"{name}.profile[{dtype!r}] must be a Profile of dtype {dtype!r}, got {shown(profile)}")
    return profile


class Unreadable(TypeError):
    """The subject's own code did not let its declaration be read."""


def require_subject(subject: object) -> None:
    """Raise TypeError, in one sentence, unless ``subject`` offers an operation and declares itself consistently."""
    names = operation_names()
    try:
        name = subject_name(subject)
        offered = any(offers(subject, operation) for operation in names)
        for dtype in supports_of(subject).dtypes:
            profile_of(subject, dtype)
    except (TypeError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise Unreadable(f"what {type(subject).__name__} declares cannot be read: {raised(error)}") from error
    if not offered:
        raise TypeError(f"{name} is not a subject: it has none of the methods {', '.join(names)}")
