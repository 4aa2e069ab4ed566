"""The inputs of a peer's test, and what a subject returns for them."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeInputs
from mla_spec.operations.prefill import OPERATION as PREFILL
from mla_spec.operations.prefill import PrefillInputs
from mla_spec.operations.quantised_decode import OPERATION as DECODE_QUANTIZED
from mla_spec.operations.quantised_decode import QuantisedDecodeInputs
from mla_spec.operations.sparse import SPARSE_PREFILL, SparseInputs
from mla_spec.proof.peers import Peer
from mla_spec.reference.cache import gather_rows
from mla_spec.reference.cache_layout import layout_of, pack
from mla_spec.reference.formats import round_to
from mla_spec.reference.quantised_cache import dequantised_cache, quantise
from mla_spec.reference.typing import Array
from mla_spec.subjects.contract import supports_of
from mla_spec.subjects.driver import Driver
from mla_spec.subjects.find import resolve_subject

HEADS, LATENT, ROPE = 16, 512, 64
FORMAT, TENSOR_SCALE = "fp8_per_tensor", 0.75

Lengths = tuple[int, ...]
Returned = tuple[Array, Array | None]


@dataclass(frozen=True)
class PeerCall:
    """One call of a peer's test, with its reference.

    Attributes:
        inputs: of the operation.
        want: out and LSE of a correct subject in float32, from the same inputs.
        coarse: out with every step rounded to the dtype.
    """

    peer: Peer
    inputs: Any
    want: Returned
    coarse: Array

    def suits(self, subject: Any) -> bool:
        """Whether the subject declares to take the inputs."""
        supports = supports_of(subject)
        return not isinstance(self.inputs, SparseInputs) or self.inputs.attn_sink is None or supports.attention_sink

    def run(self, subject: Any) -> Returned:
        """What the subject returns; Violation or SubjectCrashed where that is nothing to compare."""
        return run(self.peer, self.inputs, subject, self.peer.dtype)


@functools.cache
def peer_call(peer: Peer, seed: int) -> PeerCall:
    """The call of a seed: in decode they have 1, 2 and 4 queries per sequence, in turn."""
    rng = np.random.default_rng([seed, 5])
    lengths = peer.lengths[seed % len(peer.lengths)]
    inputs: Any
    if peer.operation == "sparse_prefill":
        inputs = _sparse_inputs(peer, lengths, rng, peer.sink_and_length and seed % 2 == 1)
    elif peer.operation == "prefill":
        inputs = _prefill_inputs(peer, lengths, rng)
    else:
        inputs = _decode_inputs(peer, lengths, rng, (1, 2, 4)[seed % 3])
    want = _reference(peer, inputs)
    return PeerCall(peer, inputs, want, _low_precision(inputs, peer.dtype) if _is_decode(inputs) else want[0])


def run(peer: Peer, inputs: Any, subject: Any, dtype: str) -> Returned:
    """out and LSE, in float64, of the operation on tensors of ``dtype``."""
    driver = Driver(subject, dtype)
    if isinstance(inputs, QuantisedDecodeInputs):
        out, lse = driver.call(DECODE_QUANTIZED, inputs)
    elif isinstance(inputs, SparseInputs):
        out, _, lse = driver.call(SPARSE_PREFILL, inputs)
    elif isinstance(inputs, PrefillInputs):
        out, lse = driver.call(PREFILL, inputs)
    else:
        tensors = driver.tensors(DECODE, inputs)
        out, lse = driver.call(DECODE, inputs, _views(tensors) if peer.noncontiguous else tensors)
    return out.value, None if lse is None else lse.value


def _views(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same arguments as views: q with heads outermost in memory, rows and table as slices of wider ones."""
    q, kv_cache, table = tensors["q"], tensors["kv_cache"], tensors["block_table"]
    return tensors | {
        "q": q.transpose(0, 2).contiguous().transpose(0, 2),
        "kv_cache": torch.cat([kv_cache, kv_cache], dim=-1)[..., : kv_cache.shape[-1]],
        "block_table": torch.cat([table, table], dim=-1)[:, : table.shape[1]],
    }


def pages_of_one_token(inputs: DecodeInputs) -> DecodeInputs:
    """The same cache with pages of one token."""
    size = inputs.kv_cache.shape[1]
    table = inputs.block_table[:, :, None] * size + np.arange(size)
    return replace(
        inputs,
        kv_cache=inputs.kv_cache.reshape(-1, 1, 1, inputs.kv_cache.shape[-1]),
        block_table=table.reshape(len(table), -1).astype(np.int32),
    )


def _reference(peer: Peer, inputs: Any) -> Returned:
    exact = inputs.exact if isinstance(inputs, QuantisedDecodeInputs) else inputs
    return run(peer, exact, resolve_subject("torch-explicit"), "float32")


def _is_decode(inputs: Any) -> bool:
    return isinstance(inputs, DecodeInputs)


def _decode_inputs(
    peer: Peer, lengths: Lengths, rng: np.random.Generator, s: int
) -> DecodeInputs | QuantisedDecodeInputs:
    pages = [-(-length // peer.page_size) for length in lengths]
    order = rng.permutation(sum(pages)) if peer.shuffled else np.arange(sum(pages))
    table = np.full((len(pages), max(pages)), peer.unused_page, dtype=np.int32)
    for row, count, first in zip(table, pages, np.cumsum([0, *pages[:-1]]), strict=True):
        row[:count] = order[first : first + count]
    cache = round_to(peer.values(rng, (sum(pages), peer.page_size, 1, LATENT + ROPE)), peer.dtype)
    q = round_to(peer.values(rng, (len(pages), s, HEADS, LATENT + ROPE)), peer.dtype)
    inputs = DecodeInputs(
        q=q,
        kv_cache=cache,
        block_table=table,
        cache_seqlens=np.array(lengths, dtype=np.int32),
        head_dim_v=LATENT,
        softmax_scale=peer.softmax_scale,
        causal=True,
    )
    if peer.operation == "decode_quantized":
        return _quantised(inputs, peer.page_size)
    for row, count, length in zip(table, pages, lengths, strict=True):
        cache[row[count - 1], length - (count - 1) * peer.page_size :] = peer.unused
    return inputs


def _quantised(inputs: DecodeInputs, page_size: int) -> QuantisedDecodeInputs:
    layout = layout_of(FORMAT)
    stored = quantise(inputs.kv_cache.reshape(-1, layout.width), layout, tensor_scale=TENSOR_SCALE)
    pages = pack(stored, layout, page_size)
    rows = dequantised_cache(pages, layout, page_size, tensor_scale=TENSOR_SCALE)
    exact = replace(inputs, kv_cache=rows)
    return QuantisedDecodeInputs(
        pages=pages, exact=exact, format=FORMAT, page_size=page_size, tensor_scale=TENSOR_SCALE
    )


def _sparse_inputs(peer: Peer, lengths: Lengths, rng: np.random.Generator, options: bool) -> SparseInputs:
    s, s_kv, top_k = 16, max(lengths), 128
    indices = np.stack([rng.permutation(s_kv)[:top_k] for _ in range(s)])
    indices[rng.random(indices.shape) < 0.1] = -1
    return SparseInputs(
        q=round_to(peer.values(rng, (s, HEADS, LATENT + ROPE)), peer.dtype),
        kv=round_to(peer.values(rng, (s_kv, 1, LATENT + ROPE)), peer.dtype),
        indices=indices[:, None].astype(np.int32),
        head_dim_v=LATENT,
        softmax_scale=peer.softmax_scale,
        attn_sink=round_to(rng.standard_normal(HEADS) + np.log(top_k), "float32") if options else None,
        topk_length=rng.integers(1, top_k + 1, s).astype(np.int32) if options else None,
    )


def _prefill_inputs(peer: Peer, lengths: Lengths, rng: np.random.Generator) -> PrefillInputs:
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    q, k, v = (round_to(peer.values(rng, (int(offsets[-1]), HEADS, width)), peer.dtype) for width in (192, 192, 128))
    return PrefillInputs(q, k, v, offsets, offsets, peer.softmax_scale, True)


def _low_precision(inputs: DecodeInputs, dtype: str) -> Array:
    """Decode with scores, weights and output each rounded to ``dtype``, [b, s, h, c]."""
    rows = np.nan_to_num(gather_rows(inputs.kv_cache, inputs.block_table, inputs.cache_seqlens))  # [b, t, c+r]
    s, t = inputs.q.shape[1], rows.shape[1]
    last = inputs.cache_seqlens[:, None] - s + np.arange(s)  # [b, s]
    scores = round_to(np.einsum("bshd,btd->bsht", inputs.q, rows) * inputs.softmax_scale, dtype)
    scores = np.where((np.arange(t) <= last[..., None])[:, :, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = round_to(weights / weights.sum(axis=-1, keepdims=True), dtype)
    return round_to(np.einsum("bsht,btc->bshc", weights, rows[..., : inputs.head_dim_v]), dtype)
