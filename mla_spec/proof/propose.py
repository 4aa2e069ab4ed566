"""Which presets a subject satisfies: it is called once for each case, and held against the bound of every preset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mla_spec.bounds.kernel_presets import all_presets
from mla_spec.bounds.profile import Profile
from mla_spec.installed import all_laws
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase, DecodeInputs, decode_expected
from mla_spec.proof.sensitivity import draw_cases
from mla_spec.subjects.description import declared_by
from mla_spec.subjects.driver import Driver, Results
from mla_spec.subjects.near import there
from mla_spec.text.table import format_table


@dataclass(frozen=True)
class Fit:
    """A preset beside a subject.

    Attributes:
        preset, profile: its name and what it declares.
        width: its bound, as a share of what it bounds: median over the cases.
        worst: the subject's largest error / bound of out and LSE; at most 1 where it satisfies the preset.
    """

    preset: str
    profile: Profile
    width: float
    worst: float

    @property
    def satisfied(self) -> bool:
        return self.worst <= 1


def fits(subject: Any, dtype: str, *, count: int = 40, seed: int = 0, device: str = "cpu") -> list[Fit]:
    """Every preset of ``dtype``, the strictest first.

    Args:
        subject: offers ``decode``; it may be in a process of its own.
        count: cases, those of ``test_decode_agrees_with_reference``.

    Raises:
        ValueError: the subject has no ``decode``, or does not support the dtype.
    """
    declared = declared_by(subject)
    if "decode" not in declared.operations:
        raise ValueError(f"{declared.name} does not offer decode, by which a profile is proposed")
    supports = declared.supports
    if dtype not in supports.dtypes:
        raise ValueError(f"{declared.name} does not support {dtype}; it supports {', '.join(supports.dtypes)}")
    default = Profile.default(dtype)
    candidates = {f"{dtype} default": default} | {n: p for n, p in all_presets().items() if p.dtype == dtype}
    unlike = {profile: name for name, profile in reversed(candidates.items())}  # one name for each profile
    law = all_laws()["test_decode_agrees_with_reference"]
    driver = there(Driver, subject, dtype, device)
    calls = []
    for case in draw_cases(law, supports, default, count, seed):
        assert isinstance(case, DecodeCase)
        inputs = case.build()
        calls.append((inputs, driver.call(DECODE, inputs)))
    found = [Fit(name, profile, *_held(calls, profile)) for profile, name in unlike.items()]
    return sorted(found, key=lambda fit: (fit.width, fit.preset))


def _held(calls: list[tuple[DecodeInputs, Results]], profile: Profile) -> tuple[float, float]:
    """(width, worst) of a profile."""
    each = [_of_call(inputs, got, profile) for inputs, got in calls]
    widths = [width for width, _ in each if width is not None]
    return float(np.median(widths)) if widths else 0.0, max((worst for _, worst in each), default=0.0)


def _of_call(inputs: DecodeInputs, got: Results, profile: Profile) -> tuple[float | None, float]:
    want = decode_expected(inputs, profile)
    ratios, total = [0.0], want.out_error.total
    for part, value, bound in zip(got, (want.out, want.lse), (total, want.lse_error.total), strict=True):
        if part is None:
            continue
        with np.errstate(all="ignore"):
            ratio = np.abs(part.value - value) / bound
        ratios.append(float(np.where(part.value == value, 0.0, ratio)[np.isfinite(value)].max(initial=0.0)))
    inexact = total > 0
    size = np.sqrt(np.mean(want.out[inexact] ** 2)) if inexact.any() else 0.0
    return (float(np.median(total[inexact]) / size) if size > 0 else None), max(
        np.inf if np.isnan(r) else r for r in ratios
    )


def proposal(subject: Any, dtype: str, **options: Any) -> Iterator[str]:
    """The table of ``fits``, and the preset to declare, as lines."""
    found = fits(subject, dtype, **options)
    rows = [("preset", "bound / output", "error / bound", "")]
    rows += [(f.preset, f"{f.width:.1e}", f"{f.worst:.3g}", "" if f.satisfied else "not satisfied") for f in found]
    yield format_table(rows)
    best = next((f for f in found if f.satisfied), None)
    if best is None:
        yield f"{dtype}: no preset is satisfied; `mla-spec check` says what is wrong, and by which rounding"
        return
    yield f"{dtype}: the strictest preset that is satisfied is {best.preset!r}, with errors up to {best.worst:.3g} of its bound"
    yield f"  {best.profile.describe()}"
    yield "  Presets below it in the table would be satisfied too, but say less. Declare what the code does, not what passes."
