"""Sparse attention and its indexer in ball and rational arithmetic, against the float64 reference."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from mla_spec.golden.corpus import compare
from mla_spec.operations.indexer import IndexerCase
from mla_spec.operations.project_indexer import ProjectIndexerCase
from mla_spec.operations.sparse import SparseDecodeCase, SparsePrefillCase
from mla_spec.reference.config import RopeConfig

pytest.importorskip("flint", reason="ball arithmetic needs python-flint (the extra 'golden')")

from mla_spec.golden.exact import ball_sparse as certified_sparse
from mla_spec.golden.exact import balls as certified
from mla_spec.golden.exact.expected import expected


def agrees(operation: str, inputs: dict[str, Any], parameters: dict[str, Any]) -> None:
    """The reference stays within its own allowance of the certified results."""
    given = {name: x for name, x in inputs.items() if x is not None}
    want = expected(operation, given, parameters)
    compare.compare(operation, given, parameters, want, [])


@pytest.mark.parametrize("seed", range(8))
def test_sparse_attention(seed: int) -> None:
    shared: dict[str, Any] = {
        "dtype": "float64",
        "seed": seed,
        "num_heads": 1 + seed % 3,
        "kv_lora_rank": 5,
        "qk_rope_head_dim": 2,
        "topk": 6,
        "invalid": 0.3,
        "duplicates": seed % 2 == 0,
        "empty_rows": seed % 4 == 1,
        "with_length": seed % 3 == 0,
        "sink": ("none", "finite", "infinite")[seed % 3],
        "logit_std": 4.0,
    }
    for case in (
        SparsePrefillCase(s_q=4, s_kv=9, **shared),
        SparseDecodeCase(batch=2, s=2, pages=3, page_size=3, **shared),
    ):
        inputs = dict(vars(case.build()))
        parameters = {name: inputs.pop(name) for name in ("head_dim_v", "softmax_scale")}
        if isinstance(case, SparseDecodeCase):
            inputs["kv_cache"] = inputs.pop("kv")
        agrees(case.operation, inputs, parameters)


def test_a_sink_is_a_key_of_value_0() -> None:
    rng = np.random.default_rng(1)
    q, rows = rng.standard_normal((1, 1, 3)), rng.standard_normal((4, 3))
    rows[3, :2] = 0.0
    q[0, 0, 2] = 1.0
    options: dict[str, Any] = {"scale": certified.arb(1), "head_dim_v": 2, "topk_length": None}
    sink = rows[3] @ q[0, 0]
    with_sink = certified_sparse.sparse_attention(q, rows, np.array([[0, 1, 2]]), attn_sink=np.array([sink]), **options)
    as_key = certified_sparse.sparse_attention(q, rows, np.array([[0, 1, 2, 3]]), attn_sink=None, **options)
    # balls of one number, whose middles may be rounded to neighbors
    np.testing.assert_array_max_ulp(with_sink[0].astype(float), as_key[0].astype(float), maxulp=1)
    assert float(with_sink[2][0, 0]) < float(as_key[2][0, 0])


@pytest.mark.parametrize("seed", range(9))
def test_the_indexer(seed: int) -> None:
    regime = ("typical", "ties", "integers")[seed % 3]
    case = IndexerCase(
        dtype="float64",
        seed=seed,
        seqlens_q=(3, 0, 2),
        seqlens_k=(7, 2, 1),
        num_heads=3,
        head_dim=4,
        top_k=(1, 3, 9)[seed // 3],
        regime=regime,
    )
    inputs = dict(vars(case.build()))
    agrees("indexer", inputs, {"top_k": inputs.pop("top_k")})


def test_ties_go_to_the_smaller_index_and_unseen_keys_to_no_one() -> None:
    ones, cu = np.ones((3, 1, 1)), np.array([0, 3])
    logits, indices = certified_sparse.select(ones, np.array([[1.0], [2.0], [1.0]]), np.ones((3, 1)), cu, cu, 2)
    assert logits.tolist() == [[1, 0, 0], [1, 2, 0], [1, 2, 1]]
    assert indices.tolist() == [[0, -1], [1, 0], [1, 0]]


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("rope_dim", [0, 4, 8])
def test_the_operands_of_the_indexer(layout: str, rope_dim: int) -> None:
    case = ProjectIndexerCase(
        dtype="float64",
        seqlens=(3, 2),
        index_n_heads=2,
        rope_dim=rope_dim,
        layout=layout,
        yarn="ratio",
        start=4095,
        hidden_scale=2.0**-10,
    )
    built = case.build()
    weights = {f"weights.{name}": w for name, w in built.weights.items()}
    inputs = {**weights, "hidden": built.hidden, "q_latent": built.q_latent, "positions": built.positions}
    agrees("project_indexer", inputs, {"config": asdict(built.config)})


@pytest.mark.parametrize("start", [0, 3, 6])
def test_a_part_that_is_rotated(start: int) -> None:
    rope = RopeConfig(dim=4, interleaved=start == 3)
    inputs = {"x": np.random.default_rng(2).standard_normal((2, 3, 10)), "positions": np.array([1, 4096])}
    agrees("partial_rope", inputs, {"rope": asdict(rope), "start": start})
    out = expected("partial_rope", inputs, {"rope": asdict(rope), "start": start})["out"]
    whole = expected("rope", {**inputs, "x": inputs["x"][..., start : start + 4]}, {"rope": asdict(rope)})["out"]
    np.testing.assert_array_equal(out[..., start : start + 4], whole)
    np.testing.assert_array_equal(
        np.delete(out, slice(start, start + 4), -1), np.delete(inputs["x"], slice(start, start + 4), -1)
    )
    other = expected("partial_rope", inputs, {"rope": asdict(replace(rope, theta=3.0)), "start": start})["out"]
    assert (other != out).any()
