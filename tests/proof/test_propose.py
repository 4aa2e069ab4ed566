"""Which preset a subject satisfies, and how near it comes to its bound."""

from __future__ import annotations

import pytest

from mla_spec.bounds.kernel_presets import presets
from mla_spec.front.cli import main
from mla_spec.proof.emulated import EmulatedKernel
from mla_spec.proof.propose import fits, proposal


def test_tf32_products_satisfy_tf32_and_nothing_stricter() -> None:
    found = fits(EmulatedKernel(presets("triton-tf32")), "float32", count=12)
    assert [f.width for f in found] == sorted(f.width for f in found)
    best = next(f for f in found if f.satisfied)
    assert best.preset == "triton-tf32 float32"
    assert 0.01 < best.worst <= 1
    assert {f.preset for f in found if not f.satisfied} >= {"float32 default", "fp32-flash"}


def test_a_subject_that_satisfies_none_is_told_so() -> None:
    wrong = EmulatedKernel(presets("fp32"))
    honest = wrong.decode
    wrong.decode = lambda *a, **k: (1.5 * honest(*a, **k)[0], honest(*a, **k)[1])  # type: ignore[method-assign]
    assert "no preset is satisfied" in list(proposal(wrong, "float32", count=6))[-1]


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles"]) == 0
    assert "trtllm-fp8: query and P in float8_e4m3fn" in capsys.readouterr().out
    assert main(["profile", "torch-explicit", "--dtype", "float64", "--cases", "4"]) == 0
    assert "float64: the strictest preset that is satisfied is" in capsys.readouterr().out
