"""A kernel in C++, called through ctypes. Any language that makes a shared library can be checked like this.

    g++ -O2 -shared -fPIC -o examples/cpp_decode.so examples/cpp_decode.cpp
    mla-spec check examples/cpp_decode.py:CppDecode

Strides go to the kernel as they are: the adapter copies nothing, so that what is judged is the kernel.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from mla_spec import Supports

_LIBRARY = ctypes.CDLL(str(Path(__file__).with_suffix(".so")))
_LIBRARY.decode.restype = None


def _pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _int64(*values: int) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


class CppDecode:
    """The adapter: memory of the caller's, pointers, strides."""

    name = "cpp-decode"
    supports = Supports(dtypes=("float32",), backward=())

    def decode(
        self,
        q: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        cache_seqlens: Tensor,
        *,
        head_dim_v: int,
        softmax_scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        b, s, h, d = q.shape
        out, lse = torch.empty(b, s, h, head_dim_v), torch.empty(b, h, s)
        page, token, _, element = kv_cache.stride()
        _LIBRARY.decode(
            *(_pointer(q), _int64(*q.stride())),
            *(_pointer(kv_cache), _int64(page, token, element)),
            *(_pointer(block_table), _int64(*block_table.stride())),
            *(_pointer(cache_seqlens), ctypes.c_int64(cache_seqlens.stride(0))),
            *(_pointer(out), _pointer(lse)),
            *map(ctypes.c_int64, (b, s, h, d, head_dim_v, kv_cache.shape[1])),
            *(ctypes.c_float(softmax_scale), ctypes.c_bool(causal)),
        )
        return out, lse
