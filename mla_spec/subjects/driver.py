"""Calls a subject: case data to tensors on its device, and what it returns back to plain data."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mla_spec.operations.all import (
    DecodeInputs,
    MergeInputs,
    PrefillInputs,
    WriteInputs,
)
from mla_spec.reference.config import MLAConfig, RopeConfig
from mla_spec.reference.typing import Array, IntArray
from mla_spec.subjects.contract import supports_of
from mla_spec.subjects.violation import SubjectCrashed, Violation

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Result:
    """A tensor that a subject returned, as plain data.

    Attributes:
        value: float64.
        bits: the stored bit patterns, as integers.
        what: what it is, for messages.
    """

    value: Array
    bits: IntArray
    what: str

    def __getitem__(self, index: Any) -> Result:
        return Result(self.value[index], self.bits[index], self.what)

    def arranged(self, arrange: Callable[[Any], Any]) -> Result:
        """The same elements in another shape or order."""
        return Result(arrange(self.value), arrange(self.bits), self.what)


def computed(value: Array, what: str) -> Result:
    """A float64 value that a law computed from results, as a Result."""
    return Result(value, np.ascontiguousarray(value).view(np.int64), what)


def tensor_bits(x: torch.Tensor) -> IntArray:
    """The bit patterns of a tensor's elements."""
    bits: IntArray = x.detach().cpu().contiguous().view(_BITS[x.element_size()]).numpy().copy()
    return bits


class Driver:
    """One subject on one device with one dtype.

    Every call is checked for what it returns (type, shape, dtype: a wrong one is a violation) and an exception of the
    subject becomes ``SubjectCrashed``. Autograd records nothing unless ``recording``.
    """

    recording = False

    def __init__(self, subject: Any, dtype: str, device: str = "cpu") -> None:
        self.subject = subject
        self.dtype = dtype
        self.device = device
        self.supports = supports_of(subject)

    def tensor(self, x: Array) -> torch.Tensor:
        """float64 data as a tensor of the case's dtype; values are representable, so this is exact."""
        return torch.from_numpy(np.ascontiguousarray(x)).to(device=self.device, dtype=TORCH_DTYPES[self.dtype])

    def integers(self, x: IntArray, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device=self.device, dtype=dtype)

    def guard(self, call: Callable[[], Any]) -> Any:
        """Run a call into the subject."""
        try:
            with torch.set_grad_enabled(self.recording):
                return call()
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text = str(error).strip().splitlines()
            raise SubjectCrashed(
                f"{type(error).__name__}: {text[0] if text else ''} ({frame.filename}:{frame.lineno})"
            ) from error

    def result(
        self, x: Any, what: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] | None = None
    ) -> Result:
        """A returned tensor as plain data; Violation when its type, shape or dtype is not the contract's."""
        dtypes = dtypes or (TORCH_DTYPES[self.dtype],)
        if not isinstance(x, torch.Tensor):
            raise Violation(f"{what} must be a torch tensor, got {type(x).__name__}")
        if tuple(x.shape) != shape:
            raise Violation(f"{what} must have shape {list(shape)}, got {list(x.shape)}")
        if x.dtype not in dtypes:
            raise Violation(f"{what} must be {' or '.join(str(d) for d in dtypes)}, got {x.dtype}")
        value: Array = x.detach().to("cpu", torch.float64).numpy().copy()
        return Result(value, tensor_bits(x), what)

    def rope(self, x: Array, positions: IntArray, rope: RopeConfig) -> Result:
        return self.rope_tensors(self.tensor(x), self.integers(positions, torch.int64), rope)

    def rope_tensors(self, x: torch.Tensor, positions: torch.Tensor, rope: RopeConfig) -> Result:
        out = self.guard(lambda: self.subject.rope(x, positions, rope=rope))
        return self.result(out, "rope output", tuple(x.shape))

    def absorb(self, kv_b_proj: Array, config: MLAConfig) -> tuple[Result, Result]:
        returned = self.guard(lambda: self.subject.absorb(self.tensor(kv_b_proj), config=config))
        returned = _pair(returned, "absorb", "(w_uk, w_uv)")
        h, c = config.num_heads, config.kv_lora_rank
        return (
            self.result(returned[0], "w_uk", (h, config.qk_nope_head_dim, c)),
            self.result(returned[1], "w_uv", (h, config.v_head_dim, c)),
        )

    def prefill_tensors(self, inputs: PrefillInputs) -> dict[str, torch.Tensor]:
        """The tensor arguments of ``prefill`` by name."""
        return {
            "q": self.tensor(inputs.q),
            "k": self.tensor(inputs.k),
            "v": self.tensor(inputs.v),
            "cu_seqlens_q": self.integers(inputs.cu_seqlens_q, torch.int32),
            "cu_seqlens_k": self.integers(inputs.cu_seqlens_k, torch.int32),
        }

    def prefill(
        self, inputs: PrefillInputs, tensors: dict[str, torch.Tensor] | None = None
    ) -> tuple[Result, Result | None]:
        """(out, lse), lse None where the subject declares none. ``tensors`` replace those built from ``inputs``."""
        out, lse = self.prefill_raw(inputs, tensors or self.prefill_tensors(inputs))
        tokens, h = inputs.q.shape[:2]
        result = self.result(out, "out", (tokens, h, inputs.v.shape[-1]))
        if not self.supports.lse:
            return result, None
        return result, self.result(lse, "lse", (h, tokens), (torch.float32, torch.float64))

    def prefill_raw(self, inputs: PrefillInputs, tensors: dict[str, torch.Tensor]) -> tuple[Any, Any]:
        """What ``prefill`` returned, unread."""
        arguments = [tensors[name] for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")]
        returned = self.guard(
            lambda: self.subject.prefill(*arguments, softmax_scale=inputs.softmax_scale, causal=inputs.causal)
        )
        return _pair(returned, "prefill", "(out, lse)")

    def decode_tensors(self, inputs: DecodeInputs) -> dict[str, torch.Tensor]:
        """The tensor arguments of ``decode`` by name."""
        return {
            "q": self.tensor(inputs.q),
            "kv_cache": self.tensor(inputs.kv_cache),
            "block_table": self.integers(inputs.block_table, torch.int32),
            "cache_seqlens": self.integers(inputs.cache_seqlens, torch.int32),
        }

    def decode(
        self, inputs: DecodeInputs, tensors: dict[str, torch.Tensor] | None = None
    ) -> tuple[Result, Result | None]:
        """(out, lse), lse None where the subject declares none. ``tensors`` replace those built from ``inputs``."""
        return self.read_decode(inputs, self.decode_raw(inputs, tensors or self.decode_tensors(inputs)))

    def read_decode(self, inputs: DecodeInputs, returned: Any) -> tuple[Result, Result | None]:
        """What ``decode`` returned for ``inputs``."""
        out, lse = _pair(returned, "decode", "(out, lse)")
        b, s, h = inputs.q.shape[:3]
        result = self.result(out, "out", (b, s, h, inputs.head_dim_v))
        if not self.supports.lse:
            return result, None
        return result, self.result(lse, "lse", (b, h, s), (torch.float32, torch.float64))

    def decode_raw(self, inputs: DecodeInputs, tensors: dict[str, torch.Tensor]) -> tuple[Any, Any]:
        """What ``decode`` returned, unread."""
        returned = self.guard(
            lambda: self.subject.decode(
                tensors["q"],
                tensors["kv_cache"],
                tensors["block_table"],
                tensors["cache_seqlens"],
                head_dim_v=inputs.head_dim_v,
                softmax_scale=inputs.softmax_scale,
                causal=inputs.causal,
            )
        )
        return _pair(returned, "decode", "(out, lse)")

    def merge_tensors(self, inputs: MergeInputs) -> dict[str, torch.Tensor]:
        """The tensor arguments of ``merge`` by name; LSEs of empty parts are what the subject declares."""
        lses = inputs.lses
        if self.supports.empty_row == "zero/+inf":
            lses = np.where(np.isneginf(lses), np.inf, lses)
        dtype = torch.float64 if self.dtype == "float64" else torch.float32
        return {"outs": self.tensor(inputs.outs), "lses": torch.from_numpy(lses).to(self.device, dtype)}

    def merge(self, inputs: MergeInputs, tensors: dict[str, torch.Tensor] | None = None) -> tuple[Result, Result]:
        """(out, lse). ``tensors`` replace those built from ``inputs``."""
        out, lse = self.merge_raw(tensors or self.merge_tensors(inputs))
        return (
            self.result(out, "merged out", inputs.outs.shape[1:]),
            self.result(lse, "merged lse", inputs.lses.shape[1:], (torch.float32, torch.float64)),
        )

    def merge_raw(self, tensors: dict[str, torch.Tensor]) -> tuple[Any, Any]:
        """What ``merge`` returned, unread."""
        return _pair(self.guard(lambda: self.subject.merge(tensors["outs"], tensors["lses"])), "merge", "(out, lse)")

    def write_tensors(self, inputs: WriteInputs) -> dict[str, torch.Tensor]:
        """The tensor arguments of ``write_cache`` by name."""
        return {
            "latent": self.tensor(inputs.latent),
            "k_pe": self.tensor(inputs.k_pe),
            "kv_cache": self.tensor(inputs.kv_cache),
            "slot_mapping": self.integers(inputs.slot_mapping, torch.int64),
        }

    def write_cache(self, tensors: dict[str, torch.Tensor]) -> None:
        """Write into ``tensors["kv_cache"]``; Violation when something is returned."""
        names = ("latent", "k_pe", "kv_cache", "slot_mapping")
        returned = self.guard(lambda: self.subject.write_cache(*(tensors[name] for name in names)))
        if returned is not None:
            raise Violation(f"write_cache must return None, got {type(returned).__name__}")

    def layer(self, weights: dict[str, Array], config: MLAConfig) -> LayerDriver:
        tensors = {name: self.tensor(w) for name, w in weights.items()}
        return LayerDriver(self, self.guard(lambda: self.subject.layer(tensors, config)), tensors)


def _pair(returned: Any, operation: str, names: str) -> tuple[Any, Any]:
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise Violation(f"{operation} must return {names}, got {type(returned).__name__}")
    return returned


class LayerDriver:
    """One layer object of a subject."""

    def __init__(self, driver: Driver, layer: Any, weights: dict[str, torch.Tensor]) -> None:
        self.driver = driver
        self.layer = layer
        self.weights = weights

    def run(self, method: str, hidden: Array, positions: IntArray) -> Result:
        """``prefill`` or ``decode`` of hidden [b, s, e] at positions [b, s]."""
        x, at = self.driver.tensor(hidden), self.driver.integers(positions, torch.int64)
        out = self.driver.guard(lambda: getattr(self.layer, method)(x, at))
        return self.driver.result(out, f"{method} output", hidden.shape)

    def reset(self) -> None:
        self.driver.guard(lambda: self.layer.reset())

    def cache_bytes(self) -> int:
        count = self.driver.guard(lambda: self.layer.cache_bytes())
        if isinstance(count, bool) or not isinstance(count, int):
            raise Violation(f"cache_bytes must return an int, got {type(count).__name__}")
        return count
