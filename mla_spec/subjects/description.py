"""What a subject says of itself, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from mla_spec.bounds.profile import Profile
from mla_spec.installed import operation_names
from mla_spec.subjects.contract import offers, profile_of, subject_name, supports_of
from mla_spec.subjects.supports import Supports
from mla_spec.text.terminal import one_line


@dataclass(frozen=True)
class Description:
    """A subject without its code.

    Attributes:
        name: its own, or its class's.
        operations: those that it offers.
        supports, profiles: what it declares; a profile for each of its dtypes.
    """

    name: str
    operations: tuple[str, ...]
    supports: Supports
    profiles: dict[str, Profile]

    @property
    def text(self) -> str:
        """Operations, restrictions, and each profile where it is not the default, over several lines."""
        lines = [f"{self.name}: offers {', '.join(self.operations)}"]
        restrictions = self.supports.restrictions()
        if restrictions:
            lines.append(f"  supports {restrictions}")
        return "\n".join([*lines, *(f"  profile {profile.describe()}" for profile in self.profiles.values())])


def describe(subject: object) -> Description:
    """What is declared: the name, operations, restrictions, and the profile of each dtype."""
    supports = supports_of(subject)
    return Description(
        one_line(subject_name(subject), 200),
        tuple(operation for operation in operation_names() if offers(subject, operation)),
        supports,
        {dtype: profile_of(subject, dtype) for dtype in supports.dtypes},
    )
