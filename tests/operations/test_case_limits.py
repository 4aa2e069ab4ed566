"""Ids of cases that anybody may write: what makes no sense is refused before anything is built."""

from __future__ import annotations

from typing import Any

import pytest

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.bounds.profile import Profile
from mla_spec.front.cli import main
from mla_spec.installed import all_laws
from mla_spec.judging.drawing import draw, kind_of
from mla_spec.judging.law import Options, Run
from mla_spec.judging.run import run_law
from mla_spec.operations.all import KINDS, parse_case
from mla_spec.operations.case import Case
from mla_spec.operations.case_limits import MOST, elements, fault
from mla_spec.operations.workload import LINES, read_workload
from mla_spec.operations.workload_line import ELEMENTS
from mla_spec.subjects.driver import Driver
from mla_spec.subjects.supports import Supports

REFUSED = {
    "decode:dtype=fp8": "dtype is 'fp8'; expected one of float64, float32",
    "decode:dtype=float32,regime=wild": "regime is 'wild'; expected one of typical",
    "decode:dtype=float32,regime=edges": "regime is 'edges'; expected one of typical",
    "decode:dtype=float32,page_size=0": "page_size is 0; expected an integer of 1 to",
    "decode:dtype=float32,num_heads=-1": "num_heads is -1; expected an integer of 1 to",
    "decode:dtype=float32,seed=-1": "seed is -1; expected an integer of 0 to",
    "decode:dtype=float32,seqlens=": "seqlens is empty; expected one or more integers joined by +",
    "decode:dtype=float32,seqlens=1+-3": "seqlens is -3; expected an integer of 0 to",
    "decode:dtype=float32,logit_std=nan": "logit_std is nan; expected a number of 0 to 1e+300",
    "decode:dtype=float32,logit_std=inf": "logit_std is inf; expected a number of 0 to 1e+300",
    "decode:dtype=float32,s=1,s=2": "s is given twice",
    "decode:dtype=float32,s=0x10": "s cannot be '0x10'",
    "decode:s=1": "missing 1 required keyword-only argument: 'dtype'",
    "decode:": "a decode case has no field ''",
    "decode:dtype=float32,kind=rope": "a decode case has no field 'kind'",
    "decode:dtype=float32,seqlens=1000000000": "expected at most 268435456",
    "decode:dtype=float32,shared_pages=1000000000": "expected at most 268435456",
    "prefill:dtype=float32,seqlens_q=60000,seqlens_k=60000": "its scores have 3600000000 elements",
    "write:dtype=float32,tokens=1000000000": "expected at most 268435456",
    "weight:dtype=float32,rows=1000000,columns=1000000": "its weights have 10000000000",
    "rope:dtype=float32,yarn=lots": "yarn is 'lots'; expected one of none",
    "rope:dtype=float32,longrope=lots": "longrope is 'lots'; expected one of none",
    "rope:dtype=float32,layout=none": "layout is 'none'; expected one of interleaved, half",
    "layer:dtype=float32,model=gpt": "model is 'gpt'; expected one of none, ",
    "merge:dtype=float32,empty=2": "empty is 2.0; expected a number of 0 to 1",
    "pages:dtype=float32,format=fp6": "format is 'fp6'; expected one of ",
    "sparse_decode:dtype=float32,sink=deep": "sink is 'deep'; expected one of none, finite, infinite",
    "x" * 10**5: "unknown kind 'xxx",
    "\x1b[31m": r"unknown kind '\x1b[31m'",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:60])
def test_what_makes_no_sense_is_refused_in_one_sentence(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    law = "test_decode_agrees_with_reference"
    assert main(["check", "torch-absorbed", "--law", law, "--case", text, "--in-process"]) == 2
    err = capsys.readouterr().err
    assert REFUSED[text] in err
    assert err.count("\n") == 1
    assert len(err) < 1100


def test_a_law_takes_cases_of_its_own_kind(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["check", "torch-absorbed", "--law", "test_rope_preserves_norm", "--case", "decode:dtype=float32"]
    assert main(asked) == 2
    message = "--law test_rope_preserves_norm takes cases of kind rope, but --case is of kind decode"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["layer:dtype=float32,qk_rope_head_dim=3", "rope:dtype=float32,dim=3"])
def test_inputs_that_cannot_be_built_are_a_usage_error(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    law = "test_layer_prefill_agrees_with_reference" if text.startswith("layer") else "test_rope_preserves_norm"
    law = next(name for name, made in all_laws().items() if kind_of(made) == text.partition(":")[0] and law)
    assert main(["check", "torch-absorbed", "--law", law, "--case", text]) == 2
    assert "its inputs cannot be built: " in capsys.readouterr().err


def test_a_case_that_a_law_is_not_made_for_is_incomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    law = all_laws()["test_decode_agrees_with_reference"]

    def odd(*arguments: Any) -> None:
        raise IndexError("no second key")

    monkeypatch.setattr(Run, "within", odd)
    record = run_law(law, TorchAbsorbed(), Options(case=parse_case("decode:dtype=float32")))
    assert record.verdict == "incomplete"
    assert record.message.startswith("this law cannot be judged by this case: IndexError: no second key")


class Seen(list[Case]):
    """Keeps the cases that are drawn, where a run tries them on a subject until its time is over."""

    def __call__(self, case: Case, *, drawn: bool = False) -> None:
        self.append(case)

    def require_time(self) -> None:
        """There is time."""


@pytest.mark.parametrize("name", all_laws())
def test_every_case_that_is_drawn_may_be_asked_for(name: str) -> None:
    law = all_laws()[name]
    run = Run(Driver(TorchAbsorbed(), "bfloat16", "cpu"), Profile.default("bfloat16"), Supports())
    cases = law.cases(run.supports, run.profile)
    seen = Seen([*law.first(run.supports, run.profile), *(cases if isinstance(cases, list) else ())])
    if not isinstance(cases, list):
        draw(law, run, cases, 6, Options(minimise=False), seen)
    assert {case.id: fault(case) for case in seen if fault(case)} == {}
    assert {parse_case(case.id) == case for case in seen} <= {True}
    assert {case.kind for case in seen} <= {kind_of(law)}


def test_recorded_loads_may_be_asked_for_again(tmp_path: Any) -> None:
    file = tmp_path / "shapes.jsonl"
    file.write_text(f'{{"operation": "decode", "seqlens": [{",".join(["8192"] * 128)}], "num_heads": 128}}')
    (case,) = read_workload(str(file))
    assert fault(case) == ""
    assert set(LINES) >= {case.kind}
    assert max(elements(case).values()) <= MOST
    assert ELEMENTS < MOST


def test_every_kind_has_limits() -> None:
    assert [kind for kind, made in KINDS.items() if fault(made(dtype="float32"))] == []
