"""Laws of the operation ``write_cache``: new tokens into the slots of a paged pool. No number may change on its way."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mla_spec.bounds.profile import Profile
from mla_spec.judging.law import Run, law
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase, decode_expected
from mla_spec.operations.write_cache import OPERATION as WRITE
from mla_spec.operations.write_cache import WriteCase, WriteInputs
from mla_spec.properties.attention import judge_attention
from mla_spec.properties.far import NUMBERS, far_zeros, left_out_where_too_large, renumbered
from mla_spec.properties.fixed import write_cache
from mla_spec.properties.fixed.counts import latent_dims, pages_of_a_large_pool
from mla_spec.properties.hazards import reaches_far
from mla_spec.properties.strategies.decode import decode_cases
from mla_spec.properties.strategies.sizes import narrowed
from mla_spec.properties.strategies.write_cache import write_cases
from mla_spec.reference.cache import slot_mapping
from mla_spec.reference.typing import IntArray
from mla_spec.subjects.driver import Tensors, tensor_bits
from mla_spec.subjects.near import near
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.violation import Violation


@near
def _storage(x: Tensor) -> Tensor:
    """Everything in the memory that x is a view of, [elements]."""
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())


@near
def _rows(pool: Tensor, pages: IntArray, rows: IntArray) -> Tensor:
    """Rows of a pool, [slots, c+r]."""
    return pool[torch.from_numpy(pages.copy()), torch.from_numpy(rows.copy()), 0]


@near
def _without(pool: Tensor, pages: IntArray, rows: IntArray) -> Tensor:
    """A copy of a pool, as far apart in memory no more, with rows of zeros."""
    rest = pool.clone()
    rest[torch.from_numpy(pages.copy()), torch.from_numpy(rows.copy()), 0] = 0.0
    return rest


@near
def _layout(x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shape, strides and offset, in elements."""
    return tuple(x.shape), x.stride(), int(x.storage_offset())


def _write(run: Run, tensors: Tensors) -> None:
    """Write into ``tensors["kv_cache"]``."""
    run.driver.raw(WRITE, None, tensors)


class _Write:
    """A call of ``write_cache``, with what it had to store and, if ``keep``, the memory of the pool before it."""

    def __init__(self, run: Run, tensors: dict[str, Tensor], *, keep: bool = True) -> None:
        self.run, self.pool = run, tensors["kv_cache"]
        slots = tensor_bits(tensors["slot_mapping"])
        kept = slots >= 0
        page_size = _layout(self.pool)[0][1]
        self.slots = slots[kept] // page_size, slots[kept] % page_size  # page, row
        self.rows = np.concatenate([tensor_bits(tensors["latent"]), tensor_bits(tensors["k_pe"])], axis=-1)[kept]
        self.before = tensor_bits(_storage(self.pool)) if keep else None
        _write(run, tensors)

    def require_stored(self) -> None:
        """Raise Violation unless every named slot holds its row, bit for bit."""
        got = tensor_bits(_rows(self.pool, *self.slots))
        wrong = np.argwhere(got != self.rows)
        if len(wrong):
            i, column = (int(x) for x in wrong[0])
            page, row = int(self.slots[0][i]), int(self.slots[1][i])
            numbers = (self.run.driver.number(bits[i, column]) for bits in (got, self.rows))
            found, want = numbers
            self.run.require(
                False,
                f"page {page}, row {row}, column {column} holds {found!r}, want {want!r}; {len(wrong)} of {got.size} "
                "elements differ, none may",
            )

    def require_rest_unchanged(self) -> None:
        """Raise Violation if the memory of the pool has changed outside the named slots."""
        assert self.before is not None
        after = tensor_bits(_storage(self.pool)).copy()
        before = self.before.copy()
        shape, strides, offset = _layout(self.pool)
        for memory in (before, after):
            steps = tuple(stride * memory.itemsize for stride in strides)
            pool = np.lib.stride_tricks.as_strided(memory[offset:], shape, steps)
            pool[(*self.slots, 0)] = 0
        changed = np.flatnonzero(before != after)
        self.run.require(
            not len(changed),
            f"write_cache changed {len(changed)} elements of the pool's memory outside the slots it was given, first at "
            f"offset {changed[:1].tolist()}",
        )

    def require_all(self) -> None:
        """Raise Violation unless it did all it should and nothing else."""
        self.require_stored()
        self.require_rest_unchanged()


@law(needs=WRITE, cases=write_cases)
def test_write_cache_stores_latent_then_rope(run: Run, case: WriteCase) -> None:
    """Each named slot holds [latent | k_pe] of its token, bit for bit."""
    _Write(run, run.driver.tensors(WRITE, case.build())).require_stored()


@law(needs=WRITE, cases=write_cases)
def test_write_cache_changes_named_slots_only(run: Run, case: WriteCase) -> None:
    """Every other byte of the pool is what it was."""
    _Write(run, run.driver.tensors(WRITE, case.build())).require_rest_unchanged()


@law(needs=WRITE, cases=narrowed(write_cases, min_tokens=2, min_skipped=0.3))
def test_write_cache_skips_slot_minus_one(run: Run, case: WriteCase) -> None:
    """Tokens with slot -1 might as well be absent, wherever they stand."""
    tensors = run.driver.tensors(WRITE, case.build())
    kept = tensor_bits(tensors["slot_mapping"]) >= 0
    if not kept.any():
        _Write(run, tensors).require_all()
        return
    pools = []
    for tokens in (slice(None), np.flatnonzero(kept)):
        arguments = _tokens(tensors, tokens)
        _write(run, arguments)
        pools.append(tensor_bits(arguments["kv_cache"]))
    changed = int((pools[0] != pools[1]).sum())
    run.require(changed == 0, f"{changed} elements of the pool depend on tokens whose slot is -1")


@near
def _tokens(tensors: dict[str, Tensor], which: IntArray | slice) -> dict[str, Tensor]:
    """The arguments for some of the tokens, and a pool of their own."""
    chosen = {name: tensors[name][which] for name in ("latent", "k_pe", "slot_mapping")}
    return chosen | {"kv_cache": tensors["kv_cache"].clone()}


@law(needs=WRITE, cases=narrowed(write_cases, min_tokens=3), live="calls")
def test_write_cache_calls_are_independent(run: Run, case: WriteCase) -> None:
    """A longer write and then a shorter one into the same pool do what each should."""
    tensors = run.driver.tensors(WRITE, case.build())
    cut = case.tokens // 2 + 1
    for part in (slice(cut), slice(cut, None)):
        _Write(run, _tokens(tensors, part) | {"kv_cache": tensors["kv_cache"]}).require_all()


@law(needs=WRITE, cases=write_cases, live="tensors")
def test_write_cache_reads_strides(run: Run, case: WriteCase) -> None:
    """Views of larger tensors and pools are read and written by their strides, and nothing between their rows changes."""
    for name, view in WRITE.all_views.items():
        try:
            _Write(run, view(run.driver.tensors(WRITE, case.build()))).require_all()
        except Violation as violation:
            raise Violation(f"with {name}:\n{violation}") from None


@law(needs=WRITE, cases=narrowed(write_cases, min_tokens=2), live="tensors")
def test_write_cache_reaches_beyond_2_31_elements(run: Run, case: WriteCase) -> None:
    """Pages, and tokens, so far apart that offsets exceed 2^31 elements are written as any other."""
    pages, page_size = 3, case.page_size
    count = min(case.tokens, pages * page_size)
    slots = np.random.default_rng([case.seed, 6]).permutation(pages * page_size)[:count]
    if slots.max() < 2 * page_size:
        slots[-1] = pages * page_size - 1
    tensors = _tokens(run.driver.tensors(WRITE, case.build()), slice(count))
    tensors["slot_mapping"] = run.driver.integers(slots, torch.int64)
    with left_out_where_too_large(run, "kv_cache"):
        tensors["kv_cache"] = far_zeros(tensors["kv_cache"], pages, wait=not run.left_out)
        write = _Write(run, tensors, keep=False)
        write.require_stored()
        rest = tensor_bits(_without(tensors["kv_cache"], *write.slots))
        run.require(not rest.any(), "write_cache changed slots of a pool with distant pages that were not named")
        del tensors, write, rest
    reaches_far(WRITE, run, case)


def _in_small_pages(supports: Supports, profile: Profile) -> list[WriteCase]:
    """As many tokens as fill three pages, whose size lets a large pool be small."""
    c, r = latent_dims(supports)
    size = pages_of_a_large_pool(supports, 16)
    return [
        WriteCase(dtype=profile.dtype, tokens=len(NUMBERS) * size, kv_lora_rank=c, qk_rope_head_dim=r, page_size=size)
    ]


@law(needs=WRITE, cases=_in_small_pages, live="tensors")
def test_write_cache_writes_pages_of_any_number(run: Run, case: WriteCase) -> None:
    """Slots of pages whose numbers exceed 2^15, and 2^16, are written as any other, and no slot of another page."""
    slots = np.random.default_rng([case.seed, 7]).permutation(case.tokens)
    page, row = np.array(NUMBERS)[slots // case.page_size], slots % case.page_size
    tensors = run.driver.tensors(WRITE, case.build())
    tensors["slot_mapping"] = run.driver.integers(page * case.page_size + row, torch.int64)
    with left_out_where_too_large(run, "kv_cache"):
        tensors["kv_cache"] = renumbered(_leading(tensors["kv_cache"], len(NUMBERS)))
        _Write(run, tensors).require_all()


@near
def _leading(x: Tensor, count: int) -> Tensor:
    return x[:count]


@law(needs=WRITE, cases=write_cache.wide, live="tensors")
def test_write_cache_of_many_wide_tokens(run: Run, case: WriteCase) -> None:
    """Rows of 512 + 64 elements are each in their slot when 65,600 tokens are written at once, fewer in wide formats."""
    tensors = _over_and_over(run.driver.tensors(WRITE, case.build()), write_cache.times_wide(case))
    _write(run, tensors)
    token = _first_not_stored(tensors)
    run.require(
        token is None, f"the slot of token {token} of {len(tensors['latent'])} does not hold its row, bit for bit"
    )


@near
def _over_and_over(tensors: dict[str, Tensor], times: int) -> dict[str, Tensor]:
    """The same tokens again and again, in the slots of a pool of zeros, of which the last come first."""
    latent, k_pe, pool = tensors["latent"].repeat(times, 1), tensors["k_pe"].repeat(times, 1), tensors["kv_cache"]
    slots = torch.arange(len(latent), device=latent.device).flip(0)
    pages = -(-len(latent) // pool.shape[1])
    return {
        "latent": latent,
        "k_pe": k_pe,
        "kv_cache": pool.new_zeros(pages, *pool.shape[1:]),
        "slot_mapping": slots,
    }


@near
def _first_not_stored(tensors: dict[str, Tensor]) -> int | None:
    """The first token whose slot, in the order of ``_over_and_over``, holds other bits than its row; None if none does."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensors["latent"].element_size()]
    stored = tensors["kv_cache"].flatten(0, 2)[: len(tensors["latent"])].view(integer)
    latent, k_pe = (tensors[name].view(integer).flip(0) for name in ("latent", "k_pe"))
    c = latent.shape[1]
    same = (stored[:, :c] == latent).all(dim=1) & (stored[:, c:] == k_pe).all(dim=1)
    return None if bool(same.all()) else int((~same).flip(0).nonzero()[0])


@law(needs=("write_cache", "decode"), cases=narrowed(decode_cases, min_length=1))
def test_decode_reads_what_write_cache_wrote(run: Run, case: DecodeCase) -> None:
    """Tokens written through their slots are the keys and values that decode sees."""
    inputs = case.build()
    want = decode_expected(inputs, run.profile)
    pool = run.driver.tensor(np.zeros_like(inputs.kv_cache))
    page_size, c = case.page_size, case.kv_lora_rank
    for table, length in zip(inputs.block_table, inputs.cache_seqlens, strict=True):
        slots: IntArray = slot_mapping(table, np.arange(length), page_size)
        rows = inputs.kv_cache[slots // page_size, slots % page_size, 0]
        tensors = run.driver.tensors(WRITE, WriteInputs(rows[:, :c], rows[:, c:], inputs.kv_cache, slots))
        _write(run, tensors | {"kv_cache": pool})
    tensors = run.driver.tensors(DECODE, inputs) | {"kv_cache": pool}
    judge_attention(run, run.call(DECODE, inputs, tensors), want)
