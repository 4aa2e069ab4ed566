"""What a subject elsewhere declares, as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from mla_spec.bounds.profile import Profile
from mla_spec.exchange.tensor_file import ExchangeError
from mla_spec.installed import operation_named
from mla_spec.subjects.signature import Signature
from mla_spec.subjects.supports import DTYPES, Supports
from mla_spec.text.terminal import one_line, shown
from mla_spec.text.typed import read_object


@dataclass(frozen=True)
class Declared:
    """What is known of a subject that is elsewhere.

    Attributes:
        name: for reports.
        operations: those that it answers; only such as take tensors and give tensors.
        supports: what it can be given; gradients never, since no graph of autograd leads elsewhere.
        profile: by dtype, where it is not the default.
    """

    name: str
    operations: tuple[str, ...]
    supports: Supports
    profile: dict[str, Profile]

    def __post_init__(self) -> None:
        object.__setattr__(self, "supports", replace(self.supports, backward=()))

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        profile = {dtype: asdict(each) for dtype, each in self.profile.items()}
        plain = {
            "name": self.name,
            "operations": self.operations,
            "supports": asdict(self.supports),
            "profile": profile,
        }
        made: dict[str, Any] = json.loads(json.dumps(plain))
        return made


FIELDS = ("name", "operations", "supports", "profile")


def read_declared(content: Any, what: str) -> Declared:
    """What a JSON object declares; all but ``operations`` may be left out.

    Raises:
        ExchangeError: it is no such object.
    """
    if not isinstance(content, dict):
        raise ExchangeError(f"{what} is {shown(content)}; expected an object with {', '.join(FIELDS)}")
    unknown = [name for name in content if name not in FIELDS]
    if unknown:
        raise ExchangeError(f"{what} has the unknown field {shown(unknown[0])}; expected some of {', '.join(FIELDS)}")
    operations = content.get("operations")
    if not isinstance(operations, list) or not operations:
        raise ExchangeError(f"{what}: operations is {shown(operations)}; expected a list of names")
    for name in operations:
        if not isinstance(name, str) or not isinstance(operation_named(name), Signature):
            raise ExchangeError(f"{what}: the operation {shown(name)} is unknown, or takes and gives no tensors")
    name, supports, profile = content.get("name", "program"), content.get("supports", {}), content.get("profile", {})
    if not isinstance(name, str) or not isinstance(profile, dict):
        raise ExchangeError(f"{what}: name must be a text, and profile an object by dtype")
    try:
        return Declared(
            one_line(name, 200),
            tuple(operations),
            read_object(Supports, supports, f"{what}: supports"),
            {dtype: _profile(dtype, fields, what) for dtype, fields in profile.items()},
        )
    except ValueError as error:  # Mistyped is one
        raise ExchangeError(str(error)) from error


def _profile(dtype: str, fields: Any, what: str) -> Profile:
    if dtype not in DTYPES or not isinstance(fields, dict):
        raise ExchangeError(f"{what}: profile has {shown(dtype)}; expected fields by one of {', '.join(DTYPES)}")
    changed = json.loads(json.dumps(asdict(Profile.default(dtype)))) | fields
    made: Profile = read_object(Profile, changed, f"{what}: profile of {dtype}")
    if made.dtype != dtype:
        raise ExchangeError(f"{what}: the profile of {dtype} is one of {made.dtype}")
    return made
