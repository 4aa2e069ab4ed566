"""Quick checks: which laws, how large their cases are, what is said of them; and the time that minimising may take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mla_spec import Options, check_subject, parametrize_with_checks
from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.bounds.profile import Profile
from mla_spec.front.cli import main
from mla_spec.installed import all_laws, operation_names, quick_laws
from mla_spec.judging.check import find_laws
from mla_spec.judging.quick import EXAMPLES, MOST, small
from mla_spec.judging.run import run_law
from mla_spec.operations.case import Case
from mla_spec.operations.extent import beyond
from mla_spec.properties.quick import HAZARDS
from mla_spec.subjects.supports import DTYPES, Supports

DOC = Path(__file__).parents[2] / "docs" / "quick_check.md"
ATTENTION = ("decode", "ragged_decode", "prefill", "merge", "quantised-decode", "sparse_prefill", "sparse_decode")
AGREES = "test_decode_agrees_with_reference"


def rows() -> Iterator[str]:
    """The table of the page, as it should be."""
    laws = all_laws()
    for operation in operation_names():
        names = [name for name in laws if name in quick_laws() and laws[name].needs[0] == operation]
        own = [f"`{name}`" for name in names if not name.endswith(tuple(f"{operation}_{h}" for h in HAZARDS))]
        if own:
            yield f"| `{operation}` | {', '.join(own)} |"


def test_the_page_names_the_laws() -> None:
    table = DOC.read_text(encoding="utf-8").partition("<!-- quick: begin -->")[2].partition("<!-- quick: end -->")[0]
    assert table.strip().splitlines()[2:] == list(rows())


def test_every_elementary_law_is_one_and_every_operation_has_some() -> None:
    assert quick_laws().keys() <= all_laws().keys()
    offered = {name for law in quick_laws() for name in all_laws()[law].needs}
    assert set(operation_names()) - offered == {"shard_layer", "gather_gradients"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("supports", [Supports(), Supports(empty_row="unsupported", max_s=1, num_heads=(128,))])
def test_first_cases_are_small_and_obey_what_is_declared(dtype: str, supports: Supports) -> None:
    profile = Profile.default(dtype)
    given = small(supports, profile)
    for name, first in quick_laws().items():
        for case in first(given, profile):
            assert case.dtype == dtype
            assert beyond(case, given) == "", name
            if supports.empty_row == "unsupported":
                assert 0 not in getattr(case, "seqlens", ()), name
            if supports.num_heads and case.kind in ATTENTION:
                assert case.num_heads == 128, name


def ran(subject: Any, law: str, options: Options) -> list[Case]:
    """The cases of a law."""
    seen: list[Case] = []
    record = run_law(all_laws()[law], subject, replace(options, announce=seen.append))
    assert record.verdict == "pass", record.text()
    return seen


def test_cases_are_few_and_small() -> None:
    quick = Options(quick=True, dtypes=("float32",))
    cases = ran(TorchAbsorbed(), AGREES, quick)
    assert EXAMPLES + 3 < len(cases) <= EXAMPLES + 7
    assert all(beyond(case, Supports(max_batch=MOST.batch, max_keys=MOST.keys)) == "" for case in cases)
    assert max(getattr(case, "num_heads", 1) for case in cases) <= 17
    usual = ran(TorchAbsorbed(), AGREES, replace(quick, quick=False))
    assert any(beyond(case, Supports(max_batch=MOST.batch, max_keys=MOST.keys)) for case in usual)
    assert len(ran(TorchAbsorbed(), AGREES, replace(quick, examples=20))) > len(cases)


def test_laws_are_the_elementary_ones_and_those_named_in_full() -> None:
    names = [law.name for law in find_laws([], quick=True)]
    assert set(names) == quick_laws().keys()
    decode = [law.name for law in find_laws(["decode"], quick=True)]
    assert AGREES in decode
    assert "test_decode_page_relabelling_changes_nothing" not in decode
    assert [law.name for law in find_laws(["test_decode_last_key_matters"], quick=True)] == [
        "test_decode_last_key_matters"
    ]
    with pytest.raises(ValueError, match="a quick check has no law of it"):
        find_laws(["shard_layer"], quick=True)


def test_python_and_pytest_run_the_same_laws() -> None:
    quick = Options(quick=True, dtypes=("float32",), examples=1)
    records = check_subject(TorchAbsorbed(), laws=["rope"], options=quick)
    assert {record.law for record in records} == {law.name for law in find_laws(["rope"], quick=True)}
    mark = parametrize_with_checks([TorchAbsorbed()], options=quick)
    assert len(mark.args[1]) == len(quick_laws())


def test_the_report_never_says_that_it_conforms(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            ["check", "torch-absorbed", "--quick", "--law", "rope", "--dtype", "float32", "--seed", "0", "--jobs", "1"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "passes a quick check: 6 pass" in out
    assert "quick: elementary laws alone, adversarial cases and 8 drawn ones each" in out
    assert "conforms" not in out
    assert "cases: --seed 0 --examples 8 --quick" in out


def test_laws_of_a_quick_check_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["laws", "--quick"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == quick_laws().keys()


class Doubles(TorchAbsorbed):
    """Wrong wherever there is more than one key."""

    def __init__(self) -> None:
        self.calls = 0

    def decode(self, q: Any, kv_cache: Any, block_table: Any, cache_seqlens: Any, **options: Any) -> Any:
        self.calls += 1
        out, lse = super().decode(q, kv_cache, block_table, cache_seqlens, **options)
        return out * (1 + (cache_seqlens > 1).to(out.dtype))[:, None, None, None], lse


def minimised(seconds: float) -> tuple[int, str]:
    subject = Doubles()
    options = Options(dtypes=("float32",), minimise_seconds=seconds, spec=("k.py:K",))
    record = run_law(all_laws()[AGREES], subject, options)
    assert record.verdict == "fail"
    assert record.replay.endswith(f"--case {record.case}")
    return subject.calls, record.case


def test_a_smaller_case_is_looked_for_as_long_as_there_is_time() -> None:
    few, first = minimised(1e-9)
    many, smallest = minimised(60)
    assert few == 2  # the first case that fails, and the same once more, of which the record is
    assert many > 10
    assert re.search(r"seqlens=(\S+?),", first)[1].count("+") == 3  # type: ignore[index]
    assert "seqlens=2," in smallest


@pytest.mark.parametrize("value", ["0", "-1", "nan"])
def test_no_time_at_all_is_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "torch-absorbed", f"--minimise-seconds={value}"]) == 2
    assert "--minimise-seconds must be positive" in capsys.readouterr().err
