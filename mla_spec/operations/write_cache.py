"""``write_cache``: new tokens into the slots of a paged pool.

latent [n, c] and k_pe [n, r] of n new tokens are stored, bit for bit, as rows [latent | k_pe] of kv_cache
[pages, page_size, 1, c+r]. Token i goes to row slot % page_size of page slot // page_size, with slot = slot_mapping[i]
(int64 [n]). Slot -1 stores nothing. Only the named slots change. No slot is named twice, since the order of writes is open.

The pool is written in place through its strides: pages may lie further apart than a page is long, and rows further apart
than a row. Offsets may exceed 2^31 elements. Nothing is returned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from mla_spec.bounds.profile import Profile
from mla_spec.operations.case import Case
from mla_spec.operations.operation import Answers, Exactly, Operation, as_it_is
from mla_spec.reference.formats import format_of, round_to
from mla_spec.reference.typing import Array, IntArray
from mla_spec.subjects.driver import Tensors
from mla_spec.subjects.near import near
from mla_spec.subjects.signature import Argument, Output
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.views import ROW_PADDING, every_other, slice_of_wider, viewed


@dataclass(frozen=True)
class WriteInputs:
    """Arguments of ``write_cache``: float64 values exactly representable in the dtype, and slots."""

    latent: Array  # [n, c]
    k_pe: Array  # [n, r]
    kv_cache: Array  # [pages, page_size, 1, c+r]
    slot_mapping: IntArray  # [n], page · page_size + row, or -1; none twice but -1


@dataclass(frozen=True, kw_only=True)
class WriteCase(Case):
    """New tokens and the slots they go to; the share ``skipped`` of them has slot -1.

    ``skipped_run``: of runs of so many tokens, the first and then every other has slot -1 throughout. Rows hold ordinary
    numbers and, here and there, -0, infinities, NaN, the largest and the smallest number.
    """

    kind = "write"
    optional = ("skipped_run",)
    tokens: int = 1
    kv_lora_rank: int = 1
    qk_rope_head_dim: int = 0
    page_size: int = 1
    skipped: float = 0.0
    skipped_run: int = 0

    def build(self) -> WriteInputs:
        """The inputs: a pool with spare pages, whose slots are taken in random order."""
        rng = self.generator()
        pages = -(-self.tokens // self.page_size) + 2
        width = self.kv_lora_rank + self.qk_rope_head_dim
        rows = self._numbers(rng, (self.tokens, width))
        slots = rng.permutation(pages * self.page_size)[: self.tokens]
        kv_cache = self._numbers(rng, (pages, self.page_size, 1, width))
        absent = rng.random(self.tokens) < self.skipped
        if self.skipped_run:
            absent |= np.arange(self.tokens) // self.skipped_run % 2 == 0
        return WriteInputs(
            latent=rows[:, : self.kv_lora_rank],
            k_pe=rows[:, self.kv_lora_rank :],
            kv_cache=kv_cache,
            slot_mapping=np.where(absent, -1, slots).astype(np.int64),
        )

    def _numbers(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        fmt = format_of(self.dtype)
        special = [-0.0, np.inf, -np.inf, np.nan, fmt.max_finite, fmt.smallest_subnormal]
        x = np.where(rng.random(shape) < 0.03, rng.choice(special, shape), rng.standard_normal(shape))
        return round_to(x, self.dtype)


def expected(inputs: WriteInputs, profile: Profile, supports: Supports) -> Answers:
    """The pool with the new rows in their slots."""
    pool = inputs.kv_cache.copy()
    kept = inputs.slot_mapping >= 0
    rows = pool.reshape(-1, pool.shape[-1])
    rows[inputs.slot_mapping[kept]] = np.concatenate([inputs.latent, inputs.k_pe], axis=-1)[kept]
    return (Exactly(pool),)


@near
def _one_projection(t: Tensors) -> Tensors:
    """latent and k_pe as slices of one row, as kv_a_proj_with_mqa returns them."""
    both = torch.cat([t["latent"], t["k_pe"]], dim=-1)
    c = t["latent"].shape[-1]
    return t | {"latent": both[:, :c], "k_pe": both[:, c:]}


OPERATION = Operation(
    name="write_cache",
    sizes=("latent_dims", "page_sizes"),
    contract=__doc__,
    case=WriteCase,
    recorded=as_it_is,
    arguments=(
        Argument("latent", "[n, c]", far=True),
        Argument("k_pe", "[n, r]", far=True),
        Argument("kv_cache", "[pages, page_size, 1, c+r]", written=True),
        Argument("slot_mapping", "[n]", "int64"),
    ),
    outputs=(Output("kv_cache", "[pages, page_size, 1, c+r]", lambda inputs: inputs.kv_cache.shape),),
    expected=expected,
    views={
        "latent and k_pe as slices of one row": _one_projection,
        "slot_mapping as every other element": viewed(every_other, "slot_mapping"),
        "kv_cache with rows longer than c + r": viewed(slice_of_wider, "kv_cache", -1, ROW_PADDING),
        "kv_cache with pages further apart than a page": viewed(slice_of_wider, "kv_cache", 1, 3),
    },
    regimes=(
        ("every token has a slot", lambda case: case.skipped == 0),
        ("tokens without a slot", lambda case: 0 < case.skipped < 1),
        ("no token has a slot", lambda case: case.skipped == 1),
        ("pages of one token", lambda case: case.page_size == 1),
        ("pages of several tokens", lambda case: case.page_size > 1),
    ),
    others=lambda case: (replace(case, seed=case.seed + 1).build(),),
    distant=lambda case: replace(case, tokens=3).build(),
)
