"""SGLang's Triton attention, interpreted on a CPU: decode, and the attention of new tokens over a cache.

Written for the files of sglang 0.5.23. The calls are those of the signatures ``sglang-decode`` and ``sglang-extend``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mla_spec.adapters import interpreted
from mla_spec.adapters.written import adapter_of

FOLDER = "kernels/ops/attention"
INSIDE = "sglang.kernels.ops.attention"
PLATFORMS = ("is_cuda", "is_hip", "is_gfx95_supported", "is_gfx1250_supported")


def decode_kernel() -> Any:
    """``decode_attention_fwd``."""
    return _load("decode_attention", _beside("score_mod")).decode_attention_fwd


def extend_kernel() -> Any:
    """``extend_attention_fwd``, whose file imports from that of decode."""
    score_mod = _beside("score_mod")
    return _load("extend_attention", score_mod | _beside("decode_attention", score_mod)).extend_attention_fwd


def _beside(name: str, beside: Mapping[str, Mapping[str, object]] | None = None) -> dict[str, Mapping[str, object]]:
    return {f"{INSIDE}.{name}": vars(_load(name, beside or {}))}


def _load(name: str, beside: Mapping[str, Mapping[str, object]]) -> Any:
    """A file of SGLang's attention, told that no platform is there; ``beside`` is what it imports from files beside it."""
    interpreted.interpreter()
    stubs: dict[str, Mapping[str, object]] = {
        "sglang.srt.environ": {"envs": None},  # asked on an AMD GPU only
        "sglang.srt.utils": {"get_device_core_count": None, **dict.fromkeys(PLATFORMS, lambda: False)},
    }
    return interpreted.load_interpreted("sglang", f"{FOLDER}/{name}.py", {**stubs, **beside})


class SglangTriton:
    """Decode, without an LSE.

    One head has a kernel of its own. That rounds each product of q and k to their dtype, as a comment there says. The profile
    of one head would be that of all, so it is not among the cases.
    """

    name = "sglang-triton"
    package = "sglang"
    runs = interpreted.RUNS

    def __init__(self) -> None:
        self._decode = adapter_of("sglang-decode", decode_kernel())
        self.conventions, self.profile, self.supports = interpreted.declared(self._decode, (2, 3, 16))

    @classmethod
    def unavailable(cls) -> str:
        """Why this cannot run here, or ""."""
        return interpreted.unavailable("sglang", f"{FOLDER}/decode_attention.py")

    def decode(self, *arguments: Any, **options: Any) -> Any:
        return self._decode.decode(*arguments, **options)


class SglangTritonExtend:
    """The attention of new tokens over a cache: the last queries' own keys are passed apart from it."""

    name = "sglang-triton-extend"
    package = "sglang"
    runs = interpreted.RUNS

    def __init__(self) -> None:
        kernel = extend_kernel()
        self._batch, self._ragged = adapter_of("sglang-extend", kernel), adapter_of("sglang-extend-ragged", kernel)
        self.conventions, self.profile, self.supports = interpreted.declared(self._batch, (1, 3))

    @classmethod
    def unavailable(cls) -> str:
        """Why this cannot run here, or ""."""
        return interpreted.unavailable("sglang", f"{FOLDER}/extend_attention.py")

    def decode(self, *arguments: Any, **options: Any) -> Any:
        return self._batch.decode(*arguments, **options)

    def ragged_decode(self, *arguments: Any, **options: Any) -> Any:
        return self._ragged.ragged_decode(*arguments, **options)
