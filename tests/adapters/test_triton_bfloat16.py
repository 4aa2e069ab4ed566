"""Each repair of bfloat16 in Triton's interpreter, alone: without it the fault shows, with it numbers are those of torch.

Torch computes in bfloat16 as a GPU does: in float32, rounded once. Where an order of summation is free, the numbers are such
that every order gives the same.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import pytest
import torch
from torch import Tensor

from mla_spec.adapters import interpreted, triton_bfloat16

N = 16
BFLOAT16 = torch.bfloat16


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Kernels of the interpreter as it was released."""
    pytest.importorskip("triton")
    interpreted.interpreter()
    for (owner, method), released in triton_bfloat16.RELEASED.items():
        monkeypatch.setattr(owner, method, released)
    return import_module("bfloat16_kernels")


def repair(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One repair alone."""
    for (owner, method), replacement in triton_bfloat16.repairs()[name].items():
        monkeypatch.setattr(owner, method, replacement)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(BFLOAT16)


def same(got: Tensor, want: Tensor) -> bool:
    """Bit for bit, but that a NaN is a NaN."""
    return torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(0.5), want.nan_to_num(0.5))


def run(kernel: object, *inputs: Tensor, out: Tensor) -> Tensor:
    kernel[(1,)](*inputs, out, n=inputs[0].shape[-1])  # type: ignore[index]
    return out


def test_dot(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = (torch.arange(N * N).reshape(N, N) % k - 2.0 for k in (5, 7))  # every order of summation is exact
    want = x @ y
    arguments = (kernels.dot, x.to(BFLOAT16), y.to(BFLOAT16))
    assert not torch.equal(run(*arguments, out=torch.empty(N, N)), want)
    repair("dot", monkeypatch)
    assert torch.equal(run(*arguments, out=torch.empty(N, N)), want)


def test_arithmetic(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = numbers(2, 4096)
    want = [x + y, x - y, x * y, -x, torch.maximum(x, y), torch.where(x < y, x, y)]
    got = run(kernels.arithmetic, x, y, out=torch.empty(6, 4096, dtype=BFLOAT16))
    assert not any(map(same, got, want))
    repair("arithmetic", monkeypatch)
    got = run(kernels.arithmetic, x, y, out=torch.empty(6, 4096, dtype=BFLOAT16))
    assert all(map(same, got, want))


def test_what_is_not_repaired_is_refused(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    repair("arithmetic", monkeypatch)
    x, wide = numbers(N), torch.full((N,), 2.0)
    with pytest.raises(Exception, match="create_fma of bfloat16 numbers"):
        run(kernels.fma, x, out=torch.empty_like(x))
    assert torch.equal(run(kernels.fma, wide, out=torch.empty(N)), wide * wide + wide)


def every_float32() -> Tensor:
    """Numbers of all sizes; ties, what lies just beside them, what rounds to infinity, infinities, NaN and subnormals."""
    upper = torch.arange(2**16, dtype=torch.int64).repeat_interleave(8)
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234, 0xABCD]).repeat(2**16)
    return (upper << 16 | lower).to(torch.uint32).view(torch.float32)


def test_cast_from_float32(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x = every_float32()
    assert not same(run(kernels.cast, x, out=torch.empty_like(x, dtype=BFLOAT16)), x.to(BFLOAT16))
    repair("casts", monkeypatch)
    assert same(run(kernels.cast, x, out=torch.empty_like(x, dtype=BFLOAT16)), x.to(BFLOAT16))


def test_a_cast_that_asks_for_truncation_truncates(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    repair("casts", monkeypatch)
    x = numbers(4096).float() * (1 + 3 * 2**-9)
    want = (x.view(torch.int32) >> 16 << 16).view(torch.float32).to(BFLOAT16)
    assert not torch.equal(x.to(BFLOAT16), want)
    assert torch.equal(run(kernels.truncating_cast, x, out=torch.empty_like(want)), want)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float16, torch.float64])
def test_casts_of_other_types(dtype: torch.dtype, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x = (numbers(4096).double() * 300).to(dtype)
    assert not same(run(kernels.cast, x, out=torch.empty_like(x, dtype=BFLOAT16)), x.to(BFLOAT16))
    repair("casts", monkeypatch)
    narrow = run(kernels.cast, x, out=torch.empty_like(x, dtype=BFLOAT16))
    assert same(narrow, x.to(BFLOAT16))
    assert same(run(kernels.cast, narrow, out=torch.empty_like(x)), narrow.to(dtype))


def test_reductions(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x = (torch.arange(N * N).reshape(N, N) % 7 - 3.0).to(BFLOAT16)  # sums of up to 256 are exact in any order
    every = torch.stack([x.sum(), x.max(), x.min()])
    want = torch.cat([x.sum(1), x.amax(1), x.amin(1), every])
    got = run(kernels.reductions, x, out=torch.empty_like(want))
    assert not torch.equal(got, want)
    repair("reductions", monkeypatch)
    assert torch.equal(run(kernels.reductions, x, out=torch.empty_like(want)), want)


def test_every_partial_sum_is_rounded(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 + 1 is 256 in bfloat16: a sum in float32 would be 264."""
    repair("reductions", monkeypatch)
    x = torch.zeros(N, N, dtype=BFLOAT16)
    x[0, 0], x[0, 1:9] = 256, 1
    total = run(kernels.reductions, x, out=torch.empty(3 * N + 3, dtype=BFLOAT16))[0].item()
    assert 256 <= total < 264


def test_scan(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    x = numbers(N)
    want = [x[0]]
    for each in x[1:]:
        want.append(want[-1] + each)
    assert not torch.equal(run(kernels.scan, x, out=torch.empty_like(x)), torch.stack(want))
    repair("reductions", monkeypatch)
    assert torch.equal(run(kernels.scan, x, out=torch.empty_like(x)), torch.stack(want))


def test_repairs_are_made_once_by_whoever_loads_a_kernel() -> None:
    pytest.importorskip("triton")
    interpreted.interpreter()
    made = {key: getattr(*key) for key in triton_bfloat16.RELEASED}
    interpreted.interpreter()
    assert made == {key: getattr(*key) for key in triton_bfloat16.RELEASED}
    assert set(made) == {key for each in triton_bfloat16.repairs().values() for key in each}
