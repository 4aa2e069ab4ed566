"""Calls the operations of a subject on quantised caches."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from mla_spec.operations.quantised_cache import QuantisedCase, QuantisedDecodeInputs
from mla_spec.reference.cache_layout import Bytes
from mla_spec.reference.typing import Array
from mla_spec.subjects.driver import (
    TORCH_DTYPES,
    Driver,
    Result,
    tensor_bits,
)


class _Decode:
    """The subject's ``decode_quantized`` as a ``decode`` whose kv_cache is the pages."""

    def __init__(self, subject: Any, supports: Any, keywords: dict[str, Any]) -> None:
        self.supports = supports
        self.decode = partial(subject.decode_quantized, **keywords)


class QuantisedDriver:
    """A driver's subject with the format, page size and tensor scale of a case."""

    def __init__(self, driver: Driver, case: QuantisedCase, tensor_scale: float) -> None:
        self.driver = driver
        self.layout, self.page_size = case.layout, case.page_size
        self.keywords = {"format": case.format, "page_size": case.page_size, "tensor_scale": tensor_scale}

    def pages(self, pages: Bytes) -> torch.Tensor:
        """Pages as a tensor of bytes."""
        return torch.from_numpy(pages.copy()).to(self.driver.device)

    def quantize_cache(self, rows: Array, tensor: torch.Tensor | None = None) -> Bytes:
        """The pages of rows [n, width]; ``tensor`` replaces the one built from ``rows``."""
        tensor = self.driver.tensor(rows) if tensor is None else tensor
        returned = self.driver.guard(lambda: self.driver.subject.quantize_cache(tensor, **self.keywords))
        shape = -(-len(rows) // self.page_size), self.layout.bytes_per_page(self.page_size)
        self.driver.result(returned, "pages", shape, (torch.uint8,))
        return tensor_bits(returned).astype(np.uint8)

    def dequantize_cache(self, pages: Bytes, tensor: torch.Tensor | None = None) -> Result:
        """All rows of pages, [pages · page_size, width]; ``tensor`` replaces the one built from ``pages``."""
        tensor = self.pages(pages) if tensor is None else tensor
        dtype = TORCH_DTYPES[self.driver.dtype]
        returned = self.driver.guard(lambda: self.driver.subject.dequantize_cache(tensor, dtype=dtype, **self.keywords))
        shape = len(pages), self.page_size, 1, self.layout.width
        rows = self.driver.result(returned, "dequantised rows", shape)
        return rows.arranged(lambda x: x.reshape(-1, self.layout.width))

    def decode_tensors(self, inputs: QuantisedDecodeInputs) -> dict[str, torch.Tensor]:
        """The tensor arguments of ``decode_quantized`` by name; the pages are called "kv_cache"."""
        return self.driver.decode_tensors(inputs.exact) | {"kv_cache": self.pages(inputs.pages)}

    def decode(
        self, inputs: QuantisedDecodeInputs, tensors: dict[str, torch.Tensor] | None = None
    ) -> tuple[Result, Result | None]:
        """(out, lse), lse None where the subject declares none. ``tensors`` replace those built from ``inputs``."""
        quantised = _Decode(self.driver.subject, self.driver.supports, self.keywords)
        driver = Driver(quantised, self.driver.dtype, self.driver.device)
        return driver.decode(inputs.exact, tensors or self.decode_tensors(inputs))
