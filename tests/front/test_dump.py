"""The tensors of a case, written as they are given to a subject."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mla_spec.front.cli import main
from mla_spec.installed import all_laws
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.operations.all import CALLED, parse_case
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.subjects.driver import Driver

CASE = "decode:dtype=bfloat16,seqlens=5+3,s=2,num_heads=2,kv_lora_rank=4,qk_rope_head_dim=2,page_size=2"


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
        return found


class Keeps:
    """A subject that keeps what it is called with."""

    def decode(self, q: torch.Tensor, *tensors: torch.Tensor, **options: object) -> object:
        self.given = dict(zip(("q", "kv_cache", "block_table", "cache_seqlens"), (q, *tensors), strict=True))
        self.options = options
        raise ValueError


def test_the_file_holds_what_a_law_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "case.safetensors"
    assert main(["dump", CASE, "-o", str(path)]) == 0
    subject = Keeps()
    run_law(all_laws()["test_decode_agrees_with_reference"], subject, Options(case=parse_case(CASE), minimise=False))
    written = load_file(path)
    assert set(written) == set(subject.given)
    for name, x in subject.given.items():
        assert written[name].dtype == x.dtype
        assert torch.equal(written[name], x)
    about = metadata(path)
    assert parse_case(about["case"]) == parse_case(CASE)
    assert {name: json.loads(about[name]) for name in DECODE.keywords} == subject.options
    assert json.loads(about["operation"]) == "decode"
    assert "kv_cache       bfloat16  [8, 2, 1, 6]" in capsys.readouterr().out


@pytest.mark.parametrize("operation", CALLED, ids=lambda operation: operation.name)
def test_every_case_of_one_call_can_be_written(
    operation: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    case = operation.case(dtype="float32")  # type: ignore[attr-defined]
    assert main(["dump", case.id]) == 0
    written = load_file(f"{case.kind}.safetensors")
    named = {json.loads(metadata(Path(f"{case.kind}.safetensors"))["operation"])}
    assert named <= {each.name for each in CALLED if each.case is type(case)}
    own = next(each for each in CALLED if each.name in named)
    given = Driver(object(), "float32").tensors(own, own.build(case))
    assert {name: x.numel() for name, x in written.items()} == {name: x.numel() for name, x in given.items()}


def test_a_layer_has_its_weights_and_configuration(tmp_path: Path) -> None:
    path = tmp_path / "layer.safetensors"
    case = parse_case("layer:dtype=float32")
    assert main(["dump", case.id, "-o", str(path)]) == 0
    inputs = case.build()  # type: ignore[attr-defined]
    written = load_file(path)
    assert set(written) == {f"weights.{name}" for name in inputs.weights} | {"hidden", "positions"}
    np.testing.assert_array_equal(written["hidden"].double().numpy(), inputs.hidden)
    assert json.loads(metadata(path)["config"])["num_heads"] == inputs.config.num_heads


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("decode:dtype=float7", "float7"),
        ("nothing:dtype=float32", "unknown kind 'nothing'"),
        (
            "prefill_backward:dtype=float32",
            "a case of kind prefill_backward is not one call with tensors; cases of rope",
        ),
    ],
)
def test_what_cannot_be_written_is_said_and_leaves_no_file(
    case: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["dump", case, "-o", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert main(["dump", CASE, "-o", str(tmp_path / "no" / "x")]) == 2
