"""What a subject says of itself, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TypeVar

from mla_spec.bounds.profile import Profile
from mla_spec.installed import operation_names
from mla_spec.subjects.contract import offers, profile_of, subject_name, supports_of
from mla_spec.subjects.near import Handle, there, travels
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.violation import subject_code
from mla_spec.text.terminal import one_line

T = TypeVar("T")


@travels
@dataclass(frozen=True)
class Description:
    """A subject without its code.

    Attributes:
        name: its own, or its class's.
        operations: those that it offers.
        supports, profiles: what it declares; a profile for each of its dtypes.
        fault: why its own code did not let it be made or read, or "".
        conventions: what an adapter converts, in a sentence each.
    """

    name: str
    operations: tuple[str, ...]
    supports: Supports
    profiles: dict[str, Profile]
    fault: str = ""
    conventions: tuple[str, ...] = ()

    @property
    def _offered(self) -> list[str]:
        if self.fault:
            return [self.fault]
        lines = [f"{self.name}: offers {', '.join(self.operations)}"]
        lines += [f"  {sentence}" for sentence in self.conventions]
        restrictions = self.supports.restrictions()
        lines += [f"  supports {restrictions}"] if restrictions else []
        never_seen = self.supports.never_seen()
        return [*lines, f"  {never_seen}"] if never_seen else lines

    @property
    def summary(self) -> list[str]:
        """The same in fewer lines: of the profiles, only which fields are not the default."""
        changed = sorted({name for profile in self.profiles.values() for name in profile.changed})
        return [*self._offered, f"  profile changes {', '.join(changed)}"] if changed else self._offered

    @property
    def text(self) -> str:
        """Operations, conventions, restrictions, and each profile where it is not the default, over several lines."""
        return "\n".join([*self._offered, *(f"  profile {profile.describe()}" for profile in self.profiles.values())])

    def profile(self, dtype: str) -> Profile:
        """That of a dtype, which may be none of its own."""
        return self.profiles.get(dtype) or Profile.default(dtype)


def describe(subject: object) -> Description:
    """What is declared: the name, operations, restrictions, and the profile of each dtype.

    Raises:
        SubjectCrashed: it cannot be read.
    """
    with subject_code():
        supports = supports_of(subject)
        return Description(
            one_line(subject_name(subject), 200),
            tuple(operation for operation in operation_names() if offers(subject, operation)),
            as_given(Supports, supports),
            {dtype: as_given(Profile, profile_of(subject, dtype)) for dtype in supports.dtypes},
            conventions=tuple(one_line(str(x), 200) for x in getattr(subject, "conventions", ())),
        )


def declared_by(subject: object) -> Description:
    """As ``describe``, where the subject is; of one in a process of its own it is read once.

    Raises:
        SubjectCrashed: it cannot be read.
        UnknownSubject: there is none.
    """
    if not isinstance(subject, Handle):
        return describe(subject)
    facts = subject.process.facts
    if "declared" not in facts:
        facts["declared"] = there(describe, subject)
    description: Description = facts["declared"]
    return description


def as_given(cls: type[T], declared: T) -> T:
    """An object of this very class with the same fields."""
    return declared if type(declared) is cls else cls(**{f.name: getattr(declared, f.name) for f in fields(cls)})  # type: ignore[arg-type]
