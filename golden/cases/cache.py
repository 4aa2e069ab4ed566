"""Cases of writing a paged cache, and of decode from a quantised one."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mla_spec.golden.cases.case import Case, Numbers, on_github
from mla_spec.golden.cases.number import draw_rows
from mla_spec.golden.exact import rationals as exact

PAGE_SIZE = 2


def cache_cases() -> Iterator[Case]:
    """All of them, in the order of the manifest."""
    yield _write()
    for layout, purpose, catches, sources in (
        (
            "fp8_ds_mla",
            "two sequences in shuffled pages of 656-byte rows, whose float32 scales are no powers of two",
            "scales left out or applied to the rope part; the rope part read as FP8; rows of 576 bytes",
            ("vllm-project/vllm/pull/49435", "vllm-project/vllm/pull/36297"),
        ),
        (
            "fp8_per_tensor",
            "two sequences in shuffled pages of 576-byte rows, with one scale for all codes",
            "the tensor's scale left out of the values, the scores, or both; applied twice",
            ("vllm-project/vllm/pull/37054", "sgl-project/sglang/pull/34765"),
        ),
    ):
        yield _decode_quantized(layout, purpose, catches, sources)


def _write() -> Case:
    numbers = Numbers("write-cache")
    c, r = 4, 2
    return Case(
        name="write-cache",
        operation="write_cache",
        purpose="seven tokens into a pool of four pages of three rows, two of them with slot -1; all other slots keep what "
        "they hold",
        catches="slot -1 taken for the last slot; the rope part stored before the latent; page and row exchanged; a token "
        "stored in its neighbour's slot",
        sources=on_github("vllm-project/vllm/pull/49427"),
        inputs={
            "latent": numbers.array(7, c),
            "k_pe": numbers.array(7, r),
            "kv_cache": numbers.array(4, 3, 1, c + r),
            "slot_mapping": np.array([4, -1, 11, 0, 2, -1, 7]),
        },
        exact=("out",),
    )


def _decode_quantized(name: str, purpose: str, catches: str, sources: tuple[str, ...]) -> Case:
    layout, numbers = exact.LAYOUTS[name], Numbers(f"decode-quantized-{name}")
    codes, scales, plain = draw_rows(numbers, layout, 6)
    pages = exact.pack(codes, scales, plain, name, PAGE_SIZE)
    return Case(
        name=f"decode-{name.replace('_', '-')}",
        operation="decode_quantized",
        purpose=purpose,
        catches=catches,
        sources=on_github(*sources),
        parameters={
            "layout": name,
            "page_size": PAGE_SIZE,
            "tensor_scale": 1.0 if layout.scale is not None else 0.8125,
            "head_dim_v": 512,
            "softmax_scale": 2.0**-13,
            "causal": True,
        },
        inputs={
            "q": numbers.array(2, 1, 2, 576, size=2.0, dtype="bfloat16"),
            "pages": pages,
            "block_table": np.array([[2, 0], [1, 1]], dtype=np.int32),
            "cache_seqlens": np.array([3, 1], dtype=np.int32),
        },
        dtype="bfloat16",
    )
