"""The bound of the gradients of ragged and sparse prefill: what it is made of, and autograd stays within it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mla_spec.bounds.attention_backward import BackwardAttention, attention_backward_with_bound
from mla_spec.bounds.prefill_backward import prefill_backward_with_bound, sparse_prefill_backward_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.bounds.running import Bounded, perhaps_stored, stored
from mla_spec.reference.backward import prefill_backward, sparse_prefill_backward
from mla_spec.reference.formats import FORMATS, round_to
from mla_spec.reference.typing import Array, IntArray

PROFILES = {
    "float32": Profile.default("float32"),
    "bfloat16": Profile.default("bfloat16"),
    "truncated": replace(Profile.default("float16"), output_rounding="truncate"),
    "float8": Profile.default("float8_e5m2"),  # in which eight roundings in a row leave nothing
}


def excess(got: Array, want: Bounded) -> float:
    """The largest error as a multiple of the bound."""
    error = np.abs(got - want.value)
    return float(np.where(error > 0, error / np.maximum(want.error, 5e-324), 0).max(initial=0))


def assert_same(got: Bounded, want: Bounded) -> None:
    np.testing.assert_allclose(got.value, want.value, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(got.error, want.error, rtol=1e-12, atol=1e-14)


QUERIES, KEYS = (3, 0, 2, 4), (5, 2, 0, 4)  # of four sequences
ENTRIES = 7  # of each query of the sparse case


def ragged(dtype: str) -> tuple[tuple[Array, Array, Array], tuple[IntArray, IntArray], Array, Array]:
    """((q, k, v), offsets of queries and of keys, out_grad, lse_grad); two heads share each of two key heads."""
    rng = np.random.default_rng(5)
    cu_q, cu_k = (np.cumsum([0, *n]) for n in (QUERIES, KEYS))
    shapes = ((cu_q[-1], 4, 6), (cu_k[-1], 2, 6), (cu_k[-1], 2, 3), (cu_q[-1], 4, 3))
    q, k, v, out_grad = (round_to(rng.standard_normal(shape), dtype) for shape in shapes)
    return (q, k, v), (cu_q, cu_k), out_grad, round_to(rng.standard_normal((4, cu_q[-1])), "float32")


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": False}], ids=["default", "causal", "all keys"])
@pytest.mark.parametrize("with_lse", [True, False], ids=["gradient of the LSE", "none"])
@pytest.mark.parametrize("name", PROFILES)
def test_a_ragged_bound_is_that_of_each_sequence(name: str, with_lse: bool, options: dict[str, Any]) -> None:
    profile = PROFILES[name]
    (q, k, v), (cu_q, cu_k), out_grad, lse_grad = ragged(profile.dtype)
    changes: dict[str, Any] = {"softmax_scale": 0.5, "profile": profile}
    got = prefill_backward_with_bound(
        q, k, v, cu_q, cu_k, out_grad, lse_grad=lse_grad if with_lse else None, **changes, **options
    )
    for i in range(len(QUERIES)):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        want = attention_backward_with_bound(
            *(q[rows], k[keys], v[keys], out_grad[rows]),
            causal=options.get("causal", True),
            lse_grad=lse_grad[:, rows] if with_lse else None,
            **changes,
        )
        for have, of_sequence, part in zip(got, want, (rows, keys, keys), strict=True):
            np.testing.assert_array_equal(have.value[part], of_sequence.value)
            np.testing.assert_array_equal(have.error[part], of_sequence.error)
    assert [x.value.shape for x in got] == [x.shape for x in (q, k, v)]


def test_errors_of_gradients_that_arrive_are_those_of_each_sequence() -> None:
    (q, k, v), (cu_q, cu_k), out_grad, lse_grad = ragged("float32")
    errors = {"out_grad_error": 0.01 * np.abs(out_grad), "lse_grad_error": 0.02 * np.abs(lse_grad)}
    changes: dict[str, Any] = {"softmax_scale": 0.5, "profile": PROFILES["float32"]}
    got = prefill_backward_with_bound(q, k, v, cu_q, cu_k, out_grad, lse_grad=lse_grad, **errors, **changes)
    for i in range(len(QUERIES)):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        want = attention_backward_with_bound(
            *(q[rows], k[keys], v[keys], out_grad[rows]),
            out_grad_error=errors["out_grad_error"][rows],
            lse_grad=lse_grad[:, rows],
            lse_grad_error=errors["lse_grad_error"][:, rows],
            **changes,
        )
        for have, of_sequence, part in zip(got, want, (rows, keys, keys), strict=True):
            np.testing.assert_array_equal(have.error[part], of_sequence.error)


def of_one_query(
    q: Array, rows: Array, dv: int, out_grad: Array, lse_grad: Array | None, sink: Array | None, profile: Profile
) -> tuple[Bounded, list[Bounded]]:
    """Gradients of one query [h, d], stored, and of each of its rows, stored as key, as value and together, or not."""
    key = np.zeros((ENTRIES, 1, rows.shape[-1]))  # among as many entries as any query has
    key[: len(rows), 0] = rows
    attention = BackwardAttention.of(
        *(q[None], key, key[..., :dv]),
        softmax_scale=0.4,
        profile=profile,
        cache_seqlens=len(rows),
        causal=False,
        attn_sink=sink,
    )
    dq, dk, dvalue = attention.gradients(out_grad[None], lse_grad=None if lse_grad is None else lse_grad[:, None])
    each = []
    for as_key, as_value in zip(maybe(dk[:, 0], profile), maybe(dvalue[:, 0], profile), strict=True):
        value, error = as_key.value.copy(), as_key.error.copy()
        value[:dv] += as_value.value
        error[:dv] += as_value.error
        each.extend(maybe(Bounded(value[None], error[None]), profile))
    return stored(dq[0], profile.dtype, profile.output_rounding), each


def maybe(rows: Bounded, profile: Profile) -> list[Bounded]:
    """Rows that may have been stored, in the profile's rounding or to nearest."""
    ways = [perhaps_stored(rows, profile.dtype, way).error for way in ("nearest", profile.output_rounding)]
    return [Bounded(rows.value[i], np.maximum(ways[0][i], ways[1][i])) for i in range(len(rows.value))]


def added_up(rows: list[Bounded], d: int, profile: Profile) -> Bounded:
    """The sum of n rows, one after the other, each sum but the first rounded; then stored."""
    value, error, size = np.zeros(d), np.zeros(d), np.zeros(d)
    for row in rows:
        value, error, size = value + row.value, error + row.error, size + np.abs(row.value) + row.error
    roundoff = 2.0 ** -FORMATS[profile.dtype].precision * (2 if profile.output_rounding == "truncate" else 1)
    lost = max(len(rows) - 1, 0) * roundoff
    if lost > 0:
        error = error + (lost / (1 - lost) if lost < 1 else np.inf) * size
    ways = [stored(Bounded(value, error), profile.dtype, way).error for way in ("nearest", profile.output_rounding)]
    return Bounded(value, np.maximum(*ways))


@pytest.mark.parametrize("with_sink", [True, False], ids=["sink", "no sink"])
@pytest.mark.parametrize("with_lse", [True, False], ids=["gradient of the LSE", "none"])
@pytest.mark.parametrize("name", PROFILES)
def test_a_sparse_bound_adds_up_what_each_entry_gives_its_row(name: str, with_lse: bool, with_sink: bool) -> None:
    profile, b, s, h, t, d, dv = PROFILES[name], 2, 3, 4, 6, 5, 2
    rng = np.random.default_rng(8)
    q, kv, out_grad = (
        round_to(rng.standard_normal(x), profile.dtype) for x in ((b, s, h, d), (b, t, d), (b, s, h, dv))
    )
    lse_grad, sink = rng.standard_normal((b, h, s)) if with_lse else None, rng.standard_normal(h) if with_sink else None
    indices = rng.integers(-1, t, (b, s, ENTRIES))
    indices[0, np.isin(indices[0], (0, 5))] = t  # one row in no entry, ...
    indices[0, :2, ::2], indices[0, 2, :2] = 0, 0  # ... one in nine of those that are read, ...
    indices[1, :2], indices[1, 1, 3], indices[1, 2] = 1, 2, -1  # ... one in ten, one in one, and a query without keys
    length = np.array([[7, 5, 7], [7, 4, 7]])
    options: dict[str, Any] = {
        "head_dim_v": dv,
        "softmax_scale": 0.4,
        "attn_sink": sink,
        "topk_length": length,
        "lse_grad": lse_grad,
    }
    dq, dkv = sparse_prefill_backward_with_bound(q, kv, indices, out_grad, profile=profile, **options)
    counts = set()
    for i in range(b):
        of_row: dict[int, list[Bounded]] = {j: [] for j in range(t)}
        for j in range(s):
            chosen = [int(x) for x in indices[i, j, : length[i, j]] if 0 <= x < t]
            dlse = None if lse_grad is None else lse_grad[i, :, j]
            want, each = of_one_query(q[i, j], kv[i, chosen], dv, out_grad[i, j], dlse, sink, profile)
            assert_same(dq[i, j], want)
            for row, gradient in zip(chosen, each[: len(chosen)], strict=True):
                of_row[row].append(gradient)
        for row, gradients in of_row.items():
            assert_same(dkv[i, row], added_up(gradients, d, profile))
            counts.add(len(gradients))
    assert not dkv.error[0, 5].any()
    assert {0, 1, 9, 10} <= counts


def test_gradients_of_nothing_are_exact_however_many_entries_add_them_up() -> None:
    rng = np.random.default_rng(9)
    q, kv = (round_to(rng.standard_normal(shape), "float8_e5m2") for shape in ((2, 3, 4), (3, 4)))
    options: dict[str, Any] = {"head_dim_v": 2, "softmax_scale": 0.4, "profile": PROFILES["float8"]}
    with np.errstate(divide="raise", invalid="raise"):
        got = sparse_prefill_backward_with_bound(q, kv, np.ones((2, 7), dtype=int), np.zeros((2, 3, 2)), **options)
    for x in got:
        assert not x.value.any()
        assert not x.error.any()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_autograd_of_ragged_attention_stays_within_the_bound(dtype: str) -> None:
    """Torch's own gradients, and the exact ones from the other module."""
    torch_dtype = getattr(torch, dtype)
    rng = np.random.default_rng(5)
    queries, keys = (3, 0, 2, 4), (5, 2, 0, 4)
    cu_q, cu_k = (np.cumsum([0, *n]) for n in (queries, keys))
    q, k, v, out_grad = (
        round_to(rng.standard_normal((n, 2, 8)), dtype) for n in (cu_q[-1], cu_k[-1], cu_k[-1], cu_q[-1])
    )
    leaves = [torch.tensor(x, dtype=torch_dtype, requires_grad=True) for x in (q, k, v)]
    outs = []
    for i in range(4):
        a, b, c = (x[slice(*cu[i : i + 2])] for x, cu in zip(leaves, (cu_q, cu_k, cu_k), strict=True))
        p = torch.softmax(torch.einsum("shd,thd->hst", a.float(), b.float()) * 0.5, dim=-1)
        outs.append(torch.einsum("hst,thd->shd", p, c.float()).to(torch_dtype))
    torch.cat(outs).backward(torch.tensor(out_grad, dtype=torch_dtype))
    options: dict[str, Any] = {"softmax_scale": 0.5, "causal": False}
    want = prefill_backward_with_bound(q, k, v, cu_q, cu_k, out_grad, profile=Profile.default(dtype), **options)
    exact = prefill_backward(q, k, v, cu_q, cu_k, out_grad, **options)
    for leaf, x, y in zip(leaves, want, exact, strict=True):
        assert leaf.grad is not None
        assert excess(leaf.grad.double().numpy(), x) <= 1
        np.testing.assert_allclose(x.value, y, rtol=0, atol=1e-13)


SINKS = {"none": None, "finite": np.array([0.3, -1.0]), "infinite": np.array([np.inf, -np.inf])}


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_autograd_of_sparse_attention_stays_within_the_bound(dtype: str, sink: str) -> None:
    """Rows are gathered in the dtype, so that their gradients are stored and added in it, repetitions one by one."""
    torch_dtype, rng = getattr(torch, dtype), np.random.default_rng(6)
    q, kv, out_grad = (round_to(rng.standard_normal(shape), dtype) for shape in ((6, 2, 6), (5, 6), (6, 2, 4)))
    indices = rng.integers(-1, 6, (6, 7))
    indices[2] = -1
    lse_grad = round_to(rng.standard_normal((2, 6)), "float32")
    leaves = [torch.tensor(x, dtype=torch_dtype, requires_grad=True) for x in (q, kv)]
    selected = torch.tensor((indices >= 0) & (indices < 5))
    rows = leaves[1][torch.tensor(indices).masked_fill(~selected, 0)].masked_fill(~selected[..., None], 0.0)
    scores = torch.einsum("shd,skd->shk", leaves[0].float(), rows.float()) * 0.5
    some = selected.any(dim=-1)
    scores = scores[some].masked_fill(~selected[some, None], -torch.inf)
    out, lse = torch.softmax(scores, -1) @ rows[some, :, :4].float(), torch.logsumexp(scores, -1)
    attn_sink = SINKS[sink]
    if attn_sink is not None:
        out = out * torch.sigmoid(lse - torch.tensor(attn_sink).float())[..., None]
    torch.autograd.backward(
        [out.to(torch_dtype), lse],
        [torch.tensor(out_grad, dtype=torch_dtype)[some], torch.tensor(lse_grad).float().T[some]],
    )
    options: dict[str, Any] = {"head_dim_v": 4, "softmax_scale": 0.5, "attn_sink": attn_sink, "lse_grad": lse_grad}
    want = sparse_prefill_backward_with_bound(q, kv, indices, out_grad, profile=Profile.default(dtype), **options)
    exact = sparse_prefill_backward(q, kv, indices, out_grad, **options)
    for leaf, x, y in zip(leaves, want, exact, strict=True):
        assert leaf.grad is not None
        assert excess(leaf.grad.double().numpy(), x) <= 1
        np.testing.assert_allclose(x.value, y, rtol=0, atol=1e-13)
