"""Subjects that kill their process or never return."""

from __future__ import annotations

from pathlib import Path

import pytest

from mla_spec.judging.isolation import WorkerPool
from mla_spec.judging.law import Options
from mla_spec.judging.verdict import Record

HOSTILE = """
import os, signal, time
from mla_spec.adapters.pytorch import TorchAbsorbed

class Hostile(TorchAbsorbed):
    def absorb(self, kv_b_proj, *, config):
        self.harm()
    def decode(self, q, *arguments, **options):
        if q.shape[2] == 5:
            self.harm()
        return super().decode(q, *arguments, **options)

class Segfault(Hostile):
    def harm(self):
        os.kill(os.getpid(), signal.SIGSEGV)

class Hang(Hostile):
    def harm(self):
        time.sleep(1000)
"""
LAWS = ("test_absorb_splits_kv_b_proj", "test_decode_agrees_with_reference", "test_rope_preserves_norm")


def records(folder: Path, subject: str, timeout: float) -> list[Record]:
    file = folder / "hostile.py"
    file.write_text(HOSTILE)
    options = Options(examples=60, dtypes=("float32",), minimise_seconds=8, spec=(f"{file}:{subject}",))
    with WorkerPool(jobs=1, timeout=timeout) as pool:
        return [future.result() for future in [pool.submit(law, subject, options) for law in LAWS]]


@pytest.mark.parametrize(
    ("subject", "message"),
    [
        ("Segfault", "the process was killed by SIGSEGV"),
        ("Hang", "did not return within 3 s"),
    ],
)
def test_a_lost_process_costs_one_law_and_names_the_case(tmp_path: Path, subject: str, message: str) -> None:
    absorb, decode, rope = records(tmp_path, subject, timeout=3)
    assert (absorb.verdict, absorb.cases, absorb.message) == ("crashed", 1, message)
    assert (decode.verdict, decode.message.partition("within")[0]) == ("crashed", message.partition("within")[0])
    assert decode.cases >= 1
    assert ",num_heads=5," in decode.case  # without which it returns
    assert decode.replay.endswith(f":{subject} --law {LAWS[1]} --case {decode.case}")
    assert (rope.law, rope.verdict, rope.cases) == (LAWS[2], "pass", 60)
