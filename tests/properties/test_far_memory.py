"""Laws of far memory take what fits on the device, and what they had to leave out is never a pass."""

from __future__ import annotations

import pytest
import torch

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.front.report import exit_code
from mla_spec.installed import all_laws
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.judging.verdict import Record
from mla_spec.properties import far
from mla_spec.subjects.memory import Memory, free_memory

LAWS = [name for name in all_laws() if name.endswith("_reaches_beyond_2_31_elements")]
DECODE = "test_decode_reaches_beyond_2_31_elements"
FEW = Options(examples=8)


def with_memory(monkeypatch: pytest.MonkeyPatch, free: float, total: float = 80e9) -> None:
    """Have the CPU stand for a device, which knows how much of its memory is free."""
    monkeypatch.setattr(far, "free_memory", lambda device: Memory(int(free), int(total)))
    monkeypatch.setattr(far, "PATIENCE", 0.0)


def record_of(law: str, dtype: str, subject: object | None = None) -> Record:
    return run_law(all_laws()[law], subject or TorchAbsorbed(), Options(examples=40, dtypes=(dtype,)))


def test_memory_of_the_cpu_is_not_counted() -> None:
    """Distant tensors are mapped there, and take only what is written."""
    assert free_memory(torch.device("cpu")) is None


@pytest.mark.parametrize("law", LAWS)
def test_what_does_not_fit_is_incomplete(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, free=1e9)
    record = record_of(law, "float64")
    assert record.verdict == "incomplete", record.text()
    assert "GB of the device and 2.1 GB beside it; 1.0 GB of 80.0 GB are free" in record.message
    assert exit_code([record]) == 3


def test_a_narrow_dtype_fits_where_a_wide_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, free=20e9)
    assert record_of(DECODE, "float16").verdict == "pass"
    assert record_of(DECODE, "float64").verdict == "incomplete"
    everything = run_law(all_laws()[DECODE], TorchAbsorbed(), FEW)
    assert everything.verdict == "incomplete"
    assert everything.message.startswith("q in float64 needs 51.")
    assert everything.cases >= 4, "the other dtypes ran too"


def test_what_fits_is_judged_beside_what_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of bytes fit where queries in float64 do not, and a violation there is graver than what was left out."""

    class ForgetsFarPages(TorchAbsorbed):
        def named_pages(self, pages: torch.Tensor, block_table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            near = torch.arange(len(pages)) * pages.stride(0) < 2**31
            return super().named_pages(pages * near[:, None], block_table)

    with_memory(monkeypatch, free=20e9)
    law = "test_decode_quantized_reaches_beyond_2_31_elements"
    assert record_of(law, "float64").verdict == "incomplete"
    assert record_of(law, "float64", ForgetsFarPages()).verdict == "fail"


def test_memory_that_another_process_gives_back_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter([1e9, 1e9, 60e9])
    monkeypatch.setattr(far, "free_memory", lambda device: Memory(int(next(left)), int(80e9)))
    far.require_memory(2**34, torch.device("cpu"))
    assert next(left, None) is None


def test_memory_that_a_device_does_not_have_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(far, "free_memory", lambda device: Memory(int(8e9), int(8e9)))
    monkeypatch.setattr(far.time, "sleep", lambda seconds: pytest.fail("waits"))
    with pytest.raises(far.DoesNotFit):
        far.require_memory(2**34, torch.device("cpu"))
