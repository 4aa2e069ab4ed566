"""How other projects test MLA kernels: the inputs and pass criteria that they publish, as data.

This emulates criteria; no test of a peer is run. Batches and lengths are smaller than the peers', and where a source does
not say otherwise a peer is granted what finds more: ragged lengths, 1, 2 and 4 queries in turn, causal masks, pages in any
order, a scale of quantised caches that is not 1, and a reference without faults.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mla_spec.proof.peer_criteria import (
    Close,
    Cosine,
    Criterion,
    Every,
    NeverFails,
    NoWorseThanLowPrecision,
    Similar,
    Within,
)
from mla_spec.reference.typing import Array

Values = Callable[[np.random.Generator, tuple[int, ...]], Array]


def normal(factor: float = 1.0, limit: float = np.inf) -> Values:
    """Gaussian numbers times ``factor``, clamped to ±``limit``."""
    return lambda rng, shape: np.clip(factor * rng.standard_normal(shape), -limit, limit)


def uniform(low: float, high: float) -> Values:
    return lambda rng, shape: rng.uniform(low, high, shape)


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One test of a peer.

    Attributes:
        name, source: what it is, and where it is public.
        operation: of the contract, that its kernel is: "decode", "decode_quantized" (of ``fp8_per_tensor``),
            "sparse_prefill" or "prefill".
        dtype: of q and of a cache that is not quantised.
        values: of q, keys and values alike.
        inputs: the same in words.
        softmax_scale: it is never varied; c + r = 576 or, after absorption, n + r = 192 give the default.
        lengths: keys of each sequence, for each seed in turn.
        page_size: of the cache, in tokens.
        shuffled: whether pages are in any order; else they are 0, 1, 2, ...
        unused: what rows beyond a sequence's length hold.
        unused_page: what entries of the page table beyond a sequence's pages hold.
        noncontiguous: whether arguments of decode are views of larger or transposed tensors.
        sink_and_length: whether sparse attention gets ``attn_sink`` and ``topk_length``, in every other seed.
        against_itself: the reference is the same kernel with pages of one token.
        out, lse: pass criteria; None where the LSE is not compared.
    """

    name: str
    source: str
    operation: str = "decode"
    dtype: str = "bfloat16"
    values: Values
    inputs: str
    softmax_scale: float = 192**-0.5
    lengths: tuple[tuple[int, ...], ...] = ((200, 140, 77), (700, 65), (2098,))
    page_size: int = 64
    shuffled: bool = True
    unused: float = 0.0
    unused_page: int = 0
    noncontiguous: bool = False
    sink_and_length: bool = False
    against_itself: bool = False
    out: Criterion
    lse: Criterion | None = None


_FLASHINFER = "https://github.com/flashinfer-ai/flashinfer/tree/main/tests/attention"

PEERS: tuple[Peer, ...] = (
    Peer(
        name="FlashMLA dense decode",
        source="https://github.com/deepseek-ai/FlashMLA/blob/main/tests/test_flash_mla_dense_decoding.py",
        values=normal(0.1, 1.0),
        inputs="randn / 10, clamped to ±1",
        softmax_scale=576**-0.5,
        unused=np.nan,
        unused_page=2**31 - 1,
        noncontiguous=True,
        out=Every(Within(8e-4, 2.01 / 128), Similar(5e-6)),
        lse=Every(Within(1e-6, 8.01 / 65536), Similar(1e-7)),
    ),
    Peer(
        name="FlashMLA sparse prefill",
        source="https://github.com/deepseek-ai/FlashMLA/tree/main/tests",
        operation="sparse_prefill",
        values=normal(0.1, 1.0),
        inputs="randn / 10, clamped to ±1",
        softmax_scale=0.5,
        sink_and_length=True,
        out=Every(Within(8e-4, 3.01 / 128), Similar(7e-6)),
        lse=Within(1e-6, 2.01 / 65536),
    ),
    Peer(
        name="FlashInfer fa2, fa3",
        source=_FLASHINFER,
        dtype="float16",
        values=normal(),
        inputs="randn",
        page_size=16,
        shuffled=False,
        out=Close(1e-3, 1e-3),
    ),
    Peer(
        name="FlashInfer cutlass",
        source=_FLASHINFER,
        values=normal(100.0),
        inputs="randn × 100",
        out=Close(1e-2, 1e-2),
    ),
    Peer(
        name="FlashInfer trtllm fp8",
        source=_FLASHINFER,
        operation="decode_quantized",
        values=normal(),
        inputs="randn",
        out=Close(1e-1, 1e-1),
    ),
    Peer(
        name="FlashInfer xqa fp8",
        source=_FLASHINFER,
        operation="decode_quantized",
        values=normal(),
        inputs="randn",
        out=Close(0.05, 0.05, share=0.95),
    ),
    Peer(
        name="FlashInfer cute-dsl fp8",
        source=_FLASHINFER,
        operation="decode_quantized",
        values=normal(0.1),
        inputs="0.1 randn",
        out=Close(0.0, 0.1),
        lse=Close(0.0, 0.1),
    ),
    Peer(
        name="FlashInfer fa3 fp8",
        source=_FLASHINFER,
        operation="decode_quantized",
        values=normal(0.1),
        inputs="0.1 randn",
        lengths=((1100, 1024), (1500, 1030)),
        out=Close(0.0, 1.5e-2),
    ),
    Peer(
        name="vLLM FlashMLA",
        source="https://github.com/vllm-project/vllm/blob/main/tests/kernels/attention/test_flashmla.py",
        values=normal(),
        inputs="randn",
        shuffled=False,
        unused=np.nan,
        out=Similar(1e-5),
        lse=Similar(1e-5),
    ),
    Peer(
        name="vLLM MLA backends",
        source="https://github.com/vllm-project/vllm/blob/main/tests/v1/attention/test_mla_backends.py",
        values=normal(),
        inputs="randn",
        out=Close(1e-2, 1e-2),
    ),
    Peer(
        name="vLLM MLA backends fp8",
        source="https://github.com/vllm-project/vllm/blob/main/tests/v1/attention/test_mla_backends.py",
        operation="decode_quantized",
        values=normal(),
        inputs="randn",
        out=Close(0.0, 0.15),
    ),
    Peer(
        name="vLLM Triton page 1 against 16",
        source="https://github.com/vllm-project/vllm/tree/main/tests/kernels/attention",
        values=normal(),
        inputs="randn",
        page_size=16,
        against_itself=True,
        out=Close(1.3e-6, 1e-5),
    ),
    Peer(
        name="SGLang Triton grouped",
        source="https://github.com/sgl-project/sglang/tree/main/test",
        values=normal(),
        inputs="randn",
        page_size=1,
        shuffled=False,
        out=Every(Cosine(0.99), Close(0.0, 3e-2)),
    ),
    Peer(
        name="aiter asm",
        source="https://github.com/ROCm/aiter/blob/main/op_tests/test_mla.py",
        values=normal(),
        inputs="randn",
        softmax_scale=576**-0.5,
        page_size=1,
        out=NeverFails(),
    ),
    Peer(
        name="aiter Triton fp8",
        source="https://github.com/ROCm/aiter/tree/main/op_tests",
        operation="decode_quantized",
        values=normal(),
        inputs="randn",
        page_size=1,
        out=Close(0.15, 0.15, share=0.99),
    ),
    Peer(
        name="tilelang sparse",
        source="https://github.com/tile-ai/tilelang/tree/main/examples/deepseek_v32",
        operation="sparse_prefill",
        values=normal(),
        inputs="randn",
        softmax_scale=576**-0.5,
        out=Similar(1e-2),
    ),
    Peer(
        name="TensorRT-LLM fp8",
        source="https://github.com/NVIDIA/TensorRT-LLM/tree/main/tests/unittest/_torch",
        operation="decode_quantized",
        values=uniform(-1.0, 1.0),
        inputs="uniform in -1 .. 1",
        out=Close(4e-2, 0.4),
    ),
    Peer(
        name="TransformerEngine mla_3_2",
        source="https://github.com/NVIDIA/TransformerEngine/tree/main/tests/pytorch",
        operation="prefill",
        values=normal(0.1),
        inputs="0.1 randn",
        lengths=((100, 70), (65, 1, 130)),
        out=Close(1.5e-2, 1.5e-2),
    ),
    Peer(
        name="tpu-inference",
        source="https://github.com/vllm-project/tpu-inference/tree/main/tests",
        values=uniform(0.0, 1.0),
        inputs="uniform in 0 .. 1",
        softmax_scale=1.0,
        out=Close(0.2, 0.1),
    ),
    Peer(
        name="FlashAttention MLA (cute)",
        source="https://github.com/Dao-AILab/flash-attention/tree/main/tests/cute",
        values=normal(),
        inputs="randn",
        lengths=((200, 140, 77), (700, 65), (4098,)),
        out=NoWorseThanLowPrecision(2.0),
    ),
    Peer(
        name="flashinfer-bench",
        source="https://github.com/flashinfer-ai/flashinfer-bench",
        values=normal(),
        inputs="randn",
        out=Close(1e-2, 1e-2),
        lse=Close(1e-2, 1e-2),
    ),
)
"""The tests that are emulated."""
