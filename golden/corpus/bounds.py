"""How far an answer may be from the frozen one, for common profiles, so that a program needs no bounds of its own.

One number stands for each row of an answer, which is what its last axis has: the largest bound in it, rounded up to three
digits. That leaves a program free of Python as strict as the bound of an element is uniform, and the numbers the same whatever
order the sums of a float64 library have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from decimal import ROUND_CEILING, Context
from typing import Any, Final, Literal

import numpy as np

from mla_spec.bounds.layer import layer_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.bounds.profile_presets import preset
from mla_spec.golden.cases.all import cases
from mla_spec.golden.cases.case import Case, config_from, layer_weights
from mla_spec.golden.corpus.calls import CALLS, dtypes_of
from mla_spec.golden.corpus.stored import StoredCase
from mla_spec.operations.operation import Within
from mla_spec.reference.formats import FORMATS
from mla_spec.reference.typing import Array
from mla_spec.subjects.supports import Supports

COMMON: Final = ("fp64", "fp32", "fp32-flash", "fp16-flash", "fp16-eager", "bf16-flash", "bf16-eager", "hopper-bf16")
CACHED: Final = "fp8-cache"
"""The profile of a quantized cache, for ``decode_quantized`` alone."""

_THREE_DIGITS: Final = Context(prec=3, rounding=ROUND_CEILING)


def bounds(listed: Sequence[Case] | None = None) -> dict[str, Any]:
    """The content of bounds.json: by case, array and profile, one number for each row; null where a bound says nothing.

    Args:
        listed: cases of another corpus than ours.
    """
    found: dict[str, dict[str, dict[str, list[float | None]]]] = {}
    for case in cases() if listed is None else listed:
        for name in profiles_of(case):
            for array, total in bounds_of(case, preset(name)):
                if array not in case.exact:
                    found.setdefault(case.name, {}).setdefault(array, {})[name] = by_row(total)
    return {
        "profiles": {name: preset(name).describe() for name in (*COMMON, CACHED)},
        "cases": found,
    }


def profiles_of(case: Case) -> list[str]:
    """The common profiles whose dtype holds the inputs of a case, where a subject can be asked for it."""
    if case.operation not in (*CALLS, "layer"):
        return []
    names = (*COMMON, CACHED) if case.operation == "decode_quantized" else COMMON
    return [name for name in names if dtypes_of(_unanswered(case), (preset(name).dtype,))]


def _unanswered(case: Case) -> StoredCase:
    """A case without its answers, of which no bound depends."""
    return StoredCase(
        name=case.name,
        operation=case.operation,
        purpose=case.purpose,
        catches=case.catches,
        sources=list(case.sources),
        parameters=case.parameters,
        inputs=dict(case.inputs),
        expected={},
        exact=list(case.exact),
    )


def bounds_of(case: Case, profile: Profile) -> Iterator[tuple[str, Array]]:
    """The bound of each element of each array that has one, the rounding of the frozen answer included."""
    if case.operation == "layer":
        yield from _layer_bounds(case, profile)
        return
    operation, build = CALLS[case.operation]
    if set(case.exact) >= {output.name for output in operation.outputs}:
        return
    wanted = operation.expected(build(_unanswered(case)), profile, Supports())
    for output, want in zip(operation.outputs, wanted, strict=True):
        if isinstance(want, Within):
            yield output.name, _with_rounding(want.value, want.bound.total)


def _layer_bounds(case: Case, profile: Profile) -> Iterator[tuple[str, Array]]:
    """The larger bound of the explicit and the absorbed form."""
    config, weights, prompt = (
        config_from(case.parameters["config"]),
        layer_weights(case.inputs),
        case.parameters["prompt"],
    )
    total: Array = np.zeros(())
    forms: tuple[Literal["explicit", "absorbed"], ...] = ("explicit", "absorbed")
    for form in forms:
        formed = replace(profile, form=form)
        want, bound = layer_with_bound(case.inputs["hidden"], case.inputs["positions"], weights, config, formed)
        total = np.maximum(total, _with_rounding(want, bound.total))
    yield "prefill", total[:, :prompt]
    yield "decode", total[:, prompt:]


def _with_rounding(value: Array, total: Array) -> Array:
    """A bound and the one rounding of the frozen answer."""
    rounding = FORMATS["float64"].unit_roundoff * np.where(np.isinf(value), 0.0, np.abs(value))
    return np.broadcast_to(total, value.shape) + rounding


def by_row(total: Array) -> list[float | None]:
    """The largest of each row of the last axis, in the order of the rows, rounded up; None where it is infinite."""
    return [_up(float(x)) for x in total.max(axis=-1, initial=0.0).ravel()]


def _up(x: float) -> float | None:
    return float(_THREE_DIGITS.create_decimal(x)) if np.isfinite(x) else None
