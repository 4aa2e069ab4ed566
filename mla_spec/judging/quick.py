"""A quick check: elementary laws only, each on adversarial cases first and then on a few small ones.

Which laws these are, and their first cases, stands in ``mla_spec.properties.quick``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mla_spec.bounds.profile import Profile
from mla_spec.operations.extent import Most
from mla_spec.subjects.supports import Supports

EXAMPLES = 8
"""Generated cases per law."""

MINIMISING = 10.0
"""Seconds in which a smaller failing case is looked for."""

MOST = Most(batch=4, keys=160)
"""Of the cases: two pages of 64 and a token more."""

SMALL: dict[str, tuple[Any, ...]] = {
    "num_heads": (1, 2, 3, 5, 16, 17),
    "latent_dims": ((24, 8), (32, 16), (16, 0)),
    "prefill_dims": ((24, 16), (16, 16), (12, 24)),
    "page_sizes": (1, 16, 64, 3),
    "indexer_dims": ((3, 16), (8, 32)),
}
"""By field of ``Supports``, what is drawn where the subject takes any."""


def small(supports: Supports, profile: Profile) -> Supports:
    """What a subject that declares ``supports`` is given. A coarse profile needs many keys, which then stay."""
    most = Most.of(supports) & (replace(MOST, keys=None) if profile.coarse else MOST)
    sizes: dict[str, Any] = {name: values for name, values in SMALL.items() if getattr(supports, name) is None}
    return replace(supports, **sizes | {"max_batch": most.batch, "max_keys": most.keys})


def told(examples: int) -> str:
    """What a quick check has not asked, in one sentence."""
    return (
        f"quick: elementary laws alone, adversarial cases and {examples} drawn ones each, at most {MOST.batch} sequences of "
        f"{MOST.keys} keys; docs/quick_check.md says what was left out"
    )
