"""What only a GPU can show of the suite itself."""

from __future__ import annotations

import pytest
import torch

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.front.cli import main
from mla_spec.installed import all_laws
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.planted_bugs.state import Capturable, LengthsOfFirstCall
from mla_spec.subjects.memory import free_memory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

ON_GPU = Options(device="cuda", examples=20)


def test_two_workers_share_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    laws = ["--law", "test_decode_agrees_with_reference", "--law", "test_prefill_agrees_with_reference"]
    assert (
        main(["check", "torch-absorbed", "--device", "cuda", "--jobs", "2", "--seed", "0", "--examples", "20", *laws])
        == 0
    )
    assert "2 pass" in capsys.readouterr().out


def test_a_captured_decode_is_judged() -> None:
    law = all_laws()["test_decode_is_replayed_in_a_cuda_graph"]
    assert run_law(law, Capturable(), ON_GPU).verdict == "pass"
    assert run_law(law, LengthsOfFirstCall(), ON_GPU).verdict == "fail"


def test_distant_memory_is_judged_or_does_not_fit_and_is_given_back() -> None:
    law = all_laws()["test_decode_reaches_beyond_2_31_elements"]
    device = torch.device("cuda")
    before = free_memory(device)
    record = run_law(law, TorchAbsorbed(), Options(device="cuda", examples=8, dtypes=("float16",)))
    after = free_memory(device)
    assert before is not None and after is not None
    needed = 2 * 2**32 + 2**32
    assert record.verdict == ("pass" if before.free > needed else "incomplete"), record.text()
    assert after.free > before.free - 2**30


def test_an_error_of_the_device_is_of_the_call_that_made_it() -> None:
    class Asserts(TorchAbsorbed):
        """Its kernel fails after the call has returned."""

        def decode(self, *tensors, **options):  # type: ignore[no-untyped-def]
            out = super().decode(*tensors, **options)
            torch._assert_async(torch.zeros(1, device="cuda"))
            return out

    record = run_law(all_laws()["test_decode_agrees_with_reference"], Asserts(), Options(device="cuda", examples=1))
    assert record.verdict == "crashed", record.text()
