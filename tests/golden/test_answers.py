"""Wrong answers in the golden files are found, and so is a wrong reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mla_spec.golden.cases.case import rope_from
from mla_spec.golden.corpus import arrays, computed, corpus
from mla_spec.golden.corpus.corpus import CorpusError
from mla_spec.reference import attention as reference_attention
from mla_spec.reference import cache_layout
from mla_spec.reference.config import RopeConfig, YarnScaling
from mla_spec.reference.formats import decode_bits, round_to
from mla_spec.reference.merge import merge
from mla_spec.reference.quantised_cache import dequantise
from mla_spec.reference.typing import Array
from tests.golden.corpus_files import edit_manifest, entry_of, require_refusal


def replace_answer(root: Path, file: str, change: Callable[[Array], Array]) -> None:
    """Change an expected array, and its hash with it."""
    path = root / file
    head, values = path.read_bytes()[:128], np.load(path, allow_pickle=False)
    data = arrays.content(change(values).astype("<f8"))
    path.write_bytes(head + data)
    edit_manifest(root, lambda m: entry_of(m, file).update(sha256=arrays.sha256(data)))


def nudge(ulps: int) -> Callable[[Array], Array]:
    """Move the last element by so many ulps."""

    def change(values: Array) -> Array:
        values = values.copy()
        values.flat[-1] += ulps * np.spacing(values.flat[-1])
        return values

    return change


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("arrays/rope-table-yarn.frequencies.npy", nudge(1)),
        ("arrays/absorb.w_uv.npy", nudge(1)),
        ("arrays/decode-one-hot-rope.out.npy", nudge(1)),
        ("arrays/rms-norm-eps.out.npy", nudge(64)),
        ("arrays/rope-interleaved.out.npy", nudge(64)),
        ("arrays/decode-paged.out.npy", nudge(256)),
        ("arrays/ragged-mixed.out.npy", nudge(256)),
        ("arrays/ragged-one-hot.lse.npy", nudge(1)),
        ("arrays/merge-far-apart.lse.npy", nudge(256)),
        ("arrays/layer-yarn.decode.npy", nudge(2**20)),
        ("arrays/decode-paged.lse.npy", lambda x: np.where(np.isinf(x), np.inf, x)),
        ("arrays/decode-paged.lse.npy", lambda x: np.where(np.isinf(x), np.nan, x)),
    ],
)
def test_a_wrong_answer_with_the_right_hash_is_found(file: str, change: Callable[[Array], Array], copy: Path) -> None:
    replace_answer(copy, file, change)
    case, array = Path(file).stem.rsplit(".", 1)
    with pytest.raises(CorpusError, match=rf"^case '{case}': {array}\[.* but the reference gives .* allowed "):
        corpus.verify(copy)


def aligned_top_left(limit: Callable[..., Any]) -> Callable[..., Any]:
    """Aligned top-left: query i sees keys 0 .. i."""

    def top_left(q: Array, k: Array, values: Any, cache_seqlens: Any, causal: bool) -> Any:
        seen = limit(q, k, values, cache_seqlens, causal)
        rows = np.tile(np.arange(1, q.shape[-3] + 1), q.shape[-2] // k.shape[-2])
        return np.minimum(rows, k.shape[-3]) + 0 * seen if causal else seen

    return top_left


def test_faults_named_by_the_cases_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused_with(name: str, target: Any, attribute: str, value: Any) -> None:
        require_refusal(monkeypatch, name, target, attribute, value)

    def eps_outside(x: Array, weight: Array, eps: float) -> Array:
        return weight * x / (np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) + eps)

    def pages_in_order(**x: Any) -> Any:
        return paged_decode(**{**x, "block_table": np.sort(x["block_table"], axis=1)})

    def truncated(parameters: Any) -> RopeConfig:
        return rope_from({**parameters, "yarn": {**parameters["yarn"], "truncate": True}})

    def merge_in_base_2(outs: Array, lses: Array) -> Any:
        out, lse = merge(outs, lses * math.log(2))
        return out, lse / math.log(2)

    def least_score(**x: Any) -> Any:
        out, lse = paged_decode(**x)
        return np.where(np.moveaxis(lse, 1, 2)[..., None] < -5e4, 0.0, out), lse

    def twice_rounded(x: Array, name: str, **options: Any) -> Array:
        with np.errstate(over="ignore"):
            return round_to(x.astype(np.float32).astype(np.float64), name, **options)

    def bfloat16_scales(stored: Any, layout: Any) -> Array:
        return dequantise(replace(stored, scales=round_to(stored.scales, "bfloat16")), layout)

    def scales_beside_codes(name: str) -> Any:
        return replace(cache_layout.layout_of(name), row=("codes", "scales", "plain"), tail=())

    paged_decode, limit = computed.paged_decode, reference_attention._visible_keys
    refused_with("layer-yarn", YarnScaling, "softmax_factor", 1.0)
    refused_with("rope-yarn-factor", YarnScaling, "cos_sin_factor", 1.0)
    refused_with("rms-norm-eps", computed, "rms_norm", eps_outside)
    refused_with("decode-paged", computed, "paged_decode", pages_in_order)
    refused_with("rope-table-yarn-untruncated", computed, "rope_from", truncated)
    refused_with("merge-three-parts", computed, "merge", merge_in_base_2)
    refused_with("decode-beyond-float16", computed, "paged_decode", least_score)
    refused_with("bits-e5m2", computed, "decode_bits", lambda bits, name: decode_bits(bits, "float8_e4m3fn"))
    refused_with("round-bfloat16", computed, "round_to", twice_rounded)
    refused_with("unpack-fp8-ds-mla", computed, "dequantise", bfloat16_scales)
    refused_with("pack-nvfp4-ds-mla", cache_layout, "_scale_order", lambda layout: np.arange(layout.groups))
    refused_with("unpack-deepseek-v4", computed, "layout_of", scales_beside_codes)
    refused_with("prefill-ragged", reference_attention, "_visible_keys", aligned_top_left(limit))


def test_values_that_a_dtype_does_not_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="not exactly representable in bfloat16"):
        arrays.encode(np.array([1.0, 1 + 2.0**-8]), "bfloat16")
    values = np.array([-0.0, 1.5, -(2.0**-133), np.inf, np.nan])
    np.testing.assert_array_equal(arrays.decode(arrays.encode(values, "bfloat16"), "bfloat16"), values)
