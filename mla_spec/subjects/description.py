"""What a subject says of itself, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from mla_spec.installed import operation_names
from mla_spec.subjects.contract import offers, profile_of, subject_name, supports_of


@dataclass(frozen=True)
class Description:
    """A subject without its code.

    Attributes:
        name: its own, or its class's.
        text: operations, restrictions, and the profile of each dtype, over several lines.
    """

    name: str
    text: str


def describe(subject: object) -> Description:
    """What is declared: operations, restrictions, and the profile of each dtype where it is not the default."""
    supports, name = supports_of(subject), subject_name(subject)
    offered = [operation for operation in operation_names() if offers(subject, operation)]
    lines = [f"{name}: offers {', '.join(offered)}"]
    restrictions = supports.restrictions()
    if restrictions:
        lines.append(f"  supports {restrictions}")
    for dtype in supports.dtypes:
        lines.append(f"  profile {profile_of(subject, dtype).describe()}")
    return Description(name, "\n".join(lines))
