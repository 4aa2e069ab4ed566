"""What ranks are given: parts of one attention, and what a subject may return as shards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.bounds.profile import Profile
from mla_spec.installed import all_laws
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.operations.all import parse_case
from mla_spec.operations.decode import DecodeCase, decode_expected
from mla_spec.operations.prefill import PrefillCase, prefill_expected
from mla_spec.operations.shards import ShardedLayerCase
from mla_spec.properties.ranks import PLACEMENTS, decode_ranks, owners, ring_steps
from mla_spec.reference.merge import merge

EXACT = Profile.default("float64")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("tokens", [0, 1, 3, 8, 29])
def test_every_token_has_an_owner_and_ranks_have_about_as_many(tokens: int, ranks: int) -> None:
    for placement in PLACEMENTS:
        counts = np.bincount(owners(tokens, ranks, placement), minlength=ranks)
        assert len(counts) == ranks
        assert counts.sum() == tokens
        assert counts.max() - counts.min() <= 2


def test_zigzag_gives_the_first_rank_both_ends() -> None:
    assert owners(8, 2, "zigzag").tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert owners(8, 2, "round robin").tolist() == [0, 1] * 4
    assert owners(8, 2, "contiguous").tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_exact_parts_of_ranks_merge_to_the_whole_decode(ranks: int, placement: str, causal: bool) -> None:
    """Sequences with fewer keys than ranks or queries, and with none, among them."""
    inputs = DecodeCase(
        dtype="float64", seqlens=(0, 1, 2, 30), s=3, num_heads=2, kv_lora_rank=5, page_size=4, causal=causal
    ).build()
    whole = decode_expected(inputs, EXACT)
    parts = [decode_expected(part, EXACT) for part in decode_ranks(inputs, ranks, placement)]
    out, lse = merge(np.stack([p.out for p in parts]), np.stack([p.lse for p in parts]))
    np.testing.assert_allclose(out.reshape(whole.out.shape), whole.out, rtol=1e-13, atol=1e-14)
    b, s, h = inputs.q.shape[:3]
    np.testing.assert_allclose(np.moveaxis(lse.reshape(b, s, h), 1, 2), whole.lse, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_steps_of_the_ring_see_every_visible_key_once(ranks: int) -> None:
    """One-hot values and equal scores: each query's weights, summed over the steps, are its causal mask."""
    case = PrefillCase(dtype="float64", seqlens_q=(7, 1, 0, 13), seqlens_k=(7, 1, 0, 13), v_head_dim=21)
    inputs = case.build()
    inputs.q[:] = 0
    inputs.v[:, 0] = np.eye(21)
    seen = np.zeros((21, 21))
    for step in ring_steps(inputs, ranks):
        part = prefill_expected(step.inputs, EXACT)
        keys_seen = np.exp(part.lse[0])[:, None]  # equal scores: the number of keys
        np.add.at(seen, step.queries, part.out[:, 0] * keys_seen)
    starts = np.repeat(inputs.cu_seqlens_q[:-1], case.seqlens_q)
    token = np.arange(21)
    np.testing.assert_allclose(seen, (token <= token[:, None]) & (token >= starts[:, None]), atol=1e-12)


def test_sharded_cases_are_read_back() -> None:
    case = ShardedLayerCase(dtype="bfloat16", num_heads=4, ranks=2, q_lora_rank=3)
    assert parse_case(case.id) == case


class Bad(TorchAbsorbed):
    """A subject whose shards are what ``spoil`` makes of the right ones."""

    def __init__(self, spoil: Any) -> None:
        self.spoil = spoil

    def shard_layer(self, *arguments: Any, **keywords: Any) -> Any:
        return self.spoil(super().shard_layer(*arguments, **keywords))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda shards: None, "pairs (weights, MLAConfig), got NoneType"),
        (lambda shards: shards[1:], "must return 2 pairs"),
        (lambda shards: [weights for weights, _ in shards], "pairs (weights, MLAConfig)"),
        (lambda shards: [({**w, "bias": w["o_proj"]}, c) for w, c in shards], "weights of rank 0 must be"),
        (lambda shards: [({**w, "o_proj": w["o_proj"].T}, c) for w, c in shards], "o_proj of rank 0 must have shape"),
    ],
)
def test_what_bad_shards_get(spoil: Any, message: str) -> None:
    case = ShardedLayerCase(dtype="float32", num_heads=4, ranks=2)
    record = run_law(all_laws()["test_shards_partition_the_weights"], Bad(spoil), Options(case=case))
    assert record.verdict == "fail"
    assert message in record.message
