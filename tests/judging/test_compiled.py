"""Laws of compiled operations run when a backend is named, and say why where they do not."""

from __future__ import annotations

import pytest

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.front.cli import main
from mla_spec.installed import all_laws
from mla_spec.judging.compiled import compiler_missing
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.planted_bugs.compiled import CompiledTableInDtype

ROPE = "test_compiled_rope_agrees_with_reference"
COMPILED = [name for name in all_laws() if name.startswith("test_compiled_")]


@pytest.mark.parametrize("name", COMPILED)
def test_a_shipped_subject_may_be_compiled(name: str) -> None:
    options = Options(compile="eager", dtypes=("bfloat16",))
    record = run_law(all_laws()[name], TorchAbsorbed(), options)
    assert record.verdict == "pass", record.text()
    assert record.cases


def test_nothing_is_compiled_unless_asked_for() -> None:
    record = run_law(all_laws()[ROPE], TorchAbsorbed())
    assert record.verdict == "unsupported"
    assert record.message == "not asked for: --compile BACKEND, e.g. inductor"


def test_a_fault_of_what_is_compiled_replays_with_the_backend() -> None:
    options = Options(compile="eager", dtypes=("bfloat16",), spec=("kernels.py:Kernel",))
    record = run_law(all_laws()[ROPE], CompiledTableInDtype(), options)
    assert record.verdict == "fail"
    assert record.replay.endswith(f"--case {record.case} --compile eager")
    assert run_law(all_laws()["test_rope_agrees_with_reference"], CompiledTableInDtype()).verdict == "pass"


def test_an_unusable_backend_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not work here with backend 'nonesuch'" in compiler_missing("nonesuch", "cpu")
    assert run_law(all_laws()[ROPE], TorchAbsorbed(), Options(compile="nonesuch")).verdict == "unsupported"
    assert main(["check", "torch-absorbed", "--law", ROPE, "--compile", "nonesuch"]) == 2
    assert capsys.readouterr().err.startswith("mla-spec: --compile 'nonesuch': torch.compile does not work here")


def test_the_command_compiles(capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "check",
        "torch-absorbed",
        "--law",
        ROPE,
        "--dtype",
        "float32",
        "--compile",
        "eager",
        "--seed",
        "0",
        "--in-process",
        "-v",
    ]
    assert main(command) == 0
    assert f"{ROPE}  pass" in capsys.readouterr().out
