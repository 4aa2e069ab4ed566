"""The engine: verdicts of correct, wrong, crashing, hostile and silent subjects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch

from mla_spec import check_subject
from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit, TorchSDPA
from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.profile import Profile
from mla_spec.installed import all_laws
from mla_spec.judging.check import find_laws
from mla_spec.judging.law import Law, Options
from mla_spec.judging.run import run_law
from mla_spec.judging.verdict import Record, VacuousCase, merge
from mla_spec.operations.all import parse_case
from mla_spec.operations.decode import DecodeCase
from mla_spec.operations.indexer import IndexerCase
from mla_spec.properties.strategies.decode import decode_cases
from mla_spec.subjects.driver import computed
from mla_spec.subjects.supports import DTYPES, Supports
from mla_spec.subjects.violation import NotOffered, Violation

LAWS = all_laws()
FEW = Options(examples=16, seed=11)
SHIPPED = (TorchExplicit(), TorchAbsorbed(), TorchSDPA())
CHECKED = [
    (subject, name, DTYPES[(i + j) % len(DTYPES)])  # each law in three dtypes: the README's first command runs all
    for i, subject in enumerate(SHIPPED)
    for j, name in enumerate(LAWS)
]


@pytest.mark.parametrize(("subject", "name", "dtype"), CHECKED, ids=lambda x: getattr(x, "name", x))
def test_shipped_subjects_conform(subject: TorchExplicit, name: str, dtype: str) -> None:
    record = run_law(LAWS[name], subject, replace(FEW, dtypes=(dtype,), spread=len(DTYPES)))
    if record.verdict == "unsupported":  # there, and perhaps not in others
        record = run_law(LAWS[name], subject, FEW)
    if record.verdict == "unsupported":
        assert not subject.supports.lse or LAWS[name].unavailable(FEW)
        return
    assert record.verdict == "pass", record.text()
    fixed = isinstance(LAWS[name].cases(subject.supports, Profile.default("float32")), list)
    assert fixed or record.cases * LAWS[name].cost * len(DTYPES) >= FEW.count


class Bad(TorchAbsorbed):
    """A subject whose ``decode`` returns what ``spoil`` makes of the right answer."""

    def __init__(self, spoil: Any) -> None:
        self.spoil = spoil

    def decode(self, *arguments: Any, **keywords: Any) -> Any:
        return self.spoil(*super().decode(*arguments, **keywords))


def crash(out: torch.Tensor, lse: torch.Tensor) -> Any:
    raise RuntimeError("illegal memory access\nsecond line")


def halve(out: torch.Tensor, lse: torch.Tensor) -> Any:
    return out / 2, lse


@pytest.mark.parametrize(
    ("spoil", "verdict", "message"),
    [
        (lambda out, lse: (torch.zeros_like(out), lse), "fail", "main term of the bound"),
        (lambda out, lse: (out / 2, lse), "fail", "exceeds the bound"),
        (lambda out, lse: (torch.full_like(out, torch.nan), lse), "fail", "got nan"),
        (lambda out, lse: out, "fail", "decode must return (out, lse), got Tensor"),
        (lambda out, lse: None, "fail", "decode must return (out, lse), got NoneType"),
        (lambda out, lse: (out.transpose(0, 1).reshape(-1), lse), "fail", "out must have shape"),
        (lambda out, lse: (out.numpy(force=True), lse), "fail", "out must be a torch tensor, got ndarray"),
        (lambda out, lse: (out.to(torch.complex64), lse), "fail", "got torch.complex64"),
        (lambda out, lse: (out, None), "fail", "lse must be a torch tensor, got NoneType"),
        (lambda out, lse: (out, lse.half()), "fail", "lse must be torch.float32 or torch.float64, got torch.float16"),
        (crash, "crashed", "RuntimeError: illegal memory access (test_laws.py"),
    ],
)
def test_what_a_bad_decode_gets(spoil: Any, verdict: str, message: str) -> None:
    options = Options(examples=20, dtypes=("float32",))
    record = run_law(LAWS["test_decode_agrees_with_reference"], Bad(spoil), options)
    assert record.verdict == verdict
    assert message.replace("(test_laws.py", "(") in record.message


def test_an_answer_that_changes_between_calls_is_a_violation() -> None:
    class Moody(TorchAbsorbed):
        calls = 0

        def decode(self, *arguments: Any, **keywords: Any) -> Any:
            self.calls += 1
            out, lse = super().decode(*arguments, **keywords)
            return (out * 2 if self.calls == 7 else out), lse

    record = run_law(LAWS["test_decode_agrees_with_reference"], Moody(), FEW)
    assert record.verdict == "fail"
    *figures, often = record.message.splitlines()
    assert often == ("this came back in 0 of 5 repetitions of the same inputs: the subject is not deterministic")
    assert figures[0].startswith("out[")
    assert "exceeds the bound" in figures[1]
    assert figures[2].startswith("main term of the bound: ")
    again = run_law(LAWS["test_decode_agrees_with_reference"], TorchAbsorbed(), Options(case=parse_case(record.case)))
    assert again.verdict == "pass"


@pytest.mark.parametrize(
    ("spoil", "verdict", "text"), [(crash, "crashed", "RuntimeError: illegal"), (halve, "fail", "got ")]
)
def test_how_often_the_first_failure_comes_back_is_counted(spoil: Any, verdict: str, text: str) -> None:
    """Wrong once, right until the failure is shrunk or replayed, then wrong in the second and fourth repetition."""

    class Rarely(TorchAbsorbed):
        seen: dict[bytes, int] = {}
        first = b""

        def decode(self, q: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
            out, lse = super().decode(q, *arguments, **keywords)
            key = q.view(torch.uint8).numpy().tobytes()
            self.first = self.first or (key if out.any() else b"")
            self.seen[key] = count = self.seen.get(key, 0) + 1
            return spoil(out, lse) if key == self.first and count in (1, 4, 6) else (out, lse)

    options = Options(examples=4, dtypes=("float32",), minimise=False)
    record = run_law(LAWS["test_decode_agrees_with_reference"], Rarely(), options)
    assert record.verdict == verdict
    assert record.message.startswith(text) or text in record.message
    assert record.message.endswith(
        "this came back in 2 of 5 repetitions of the same inputs: the subject is not deterministic"
    )
    assert record.case


@pytest.mark.parametrize("end", [SystemExit(0), GeneratorExit(), BaseException("over"), pytest.skip.Exception("no")])
def test_a_call_that_raises_what_is_no_exception_crashed(end: BaseException) -> None:
    class Ends(TorchAbsorbed):
        def decode(self, *arguments: Any, **keywords: Any) -> Any:
            raise end

    record = run_law(LAWS["test_decode_agrees_with_reference"], Ends(), FEW)
    assert (record.verdict, record.cases) == ("crashed", 4)  # once in each dtype
    assert record.message.startswith(f"{type(end).__name__}: {end}")
    assert record.replay == ""


def test_a_declaration_that_ends_the_process_crashed() -> None:
    class Later(TorchAbsorbed):
        reads = 0

        @property
        def supports(self) -> Supports:  # type: ignore[override]
            Later.reads += 1
            if Later.reads > 1:
                raise SystemExit(0)
            return Supports()

    later = Later()
    first, second = (run_law(LAWS["test_decode_agrees_with_reference"], later, FEW) for _ in range(2))
    for record in (first, second):
        assert (record.verdict, record.cases) == ("crashed", 0)
        assert record.message.startswith("what it declares cannot be read: SystemExit: 0 (")
    with pytest.raises(TypeError, match="what Later declares cannot be read: SystemExit: 0"):
        check_subject(later)


def test_a_result_of_a_class_of_its_own_is_a_violation() -> None:
    class Tensor(torch.Tensor):
        def detach(self) -> Any:
            raise SystemExit(0)

    record = run_law(
        LAWS["test_decode_agrees_with_reference"], Bad(lambda out, lse: (out.as_subclass(Tensor), lse)), FEW
    )
    assert record.verdict == "fail"
    assert record.message == "out must be a plain tensor on cpu, got a Tensor"


def test_a_failure_is_minimised_and_replays() -> None:
    subject = Bad(lambda out, lse: (out * 1.01, lse))
    made = LAWS["test_decode_agrees_with_reference"]
    record = run_law(made, subject, Options(spec=("pkg:Bad",), dtypes=("float32",)))
    case = parse_case(record.case)
    assert isinstance(case, DecodeCase)
    assert case.s == len(case.seqlens) == 1
    assert record.replay == f"mla-spec check pkg:Bad --law {made.name} --case {record.case}"
    again = run_law(made, subject, Options(case=case))
    assert (again.verdict, again.cases, again.message) == ("fail", 1, record.message)
    assert run_law(made, TorchAbsorbed(), Options(case=case)).verdict == "pass"
    text = record.text()
    assert all(part in text for part in ("[torch-absorbed]: fail", "smallest case:", "replay:", "got", "want"))


def test_absent_operations_and_features_are_unsupported_not_passed() -> None:
    class OnlyRope:
        def rope(self, x: Any, positions: Any, *, rope: Any) -> Any:
            return TorchExplicit().rope(x, positions, rope=rope)

    records = {r.law: r for r in check_subject(OnlyRope(), options=Options(examples=4))}
    assert records["test_rope_preserves_norm"].verdict == "pass"
    assert records["test_decode_agrees_with_reference"].verdict == "unsupported"
    assert records["test_decode_agrees_with_reference"].message == "does not offer decode"
    lse = run_law(LAWS["test_decode_lse_agrees_with_reference"], TorchSDPA(), FEW)
    assert (lse.verdict, lse.message) == ("unsupported", "decode returns no LSE")
    no_double = run_law(LAWS["test_rope_preserves_norm"], OnlyRope(), Options(dtypes=()))
    assert no_double.verdict == "unsupported"


def make_law(check: Any) -> Law:
    return Law("test_made_here", ("decode",), decode_cases, check, lambda supports: "")


def vacuous_at(*places: int) -> Callable[[Any, Any], None]:
    """A check whose bound says little in the cases that are counted so."""
    counted = count()

    def check(run: Any, case: Any) -> None:
        run.compares(1)
        if next(counted) in places:
            raise VacuousCase("the bound is too loose")

    return check


ONE_DTYPE = Options(examples=17, dtypes=("float32",), seed=0)


@pytest.mark.parametrize(("places", "verdict"), [((4,), "pass"), ((4, 9), "pass"), ((4, 9, 11), "incomplete")])
def test_of_drawn_cases_one_in_eight_may_say_little(places: tuple[int, ...], verdict: str) -> None:
    record = run_law(make_law(vacuous_at(*places)), TorchAbsorbed(), ONE_DTYPE)
    said = record.note if verdict == "pass" else record.message
    assert (record.verdict, said) == (verdict, f"{len(places)} of 17 cases say little: the bound is too loose")


def test_a_law_of_which_all_cases_say_little_is_incomplete() -> None:
    one = Options(examples=1, dtypes=("float32",), seed=0)
    record = run_law(make_law(vacuous_at(0, 1)), TorchAbsorbed(), one)
    assert (record.verdict, record.message) == ("incomplete", "1 of 1 cases say little: the bound is too loose")


def test_a_case_that_was_written_down_must_say_something() -> None:
    first = DecodeCase(dtype="float32")

    def check(run: Any, case: Any) -> None:
        run.compares(1)
        if case == first:
            raise VacuousCase("the bound is too loose")

    law = replace(make_law(check), first=lambda supports, profile: [first])
    record = run_law(law, TorchAbsorbed(), ONE_DTYPE)
    assert (record.verdict, record.message) == ("incomplete", "the bound is too loose")


def test_a_bound_that_is_none_is_incomplete() -> None:
    def check(run: Any, case: Any) -> None:
        ErrorBound({"slip": np.array([-1.0])})

    record = run_law(make_law(check), TorchAbsorbed(), FEW)
    assert (record.verdict, record.message) == ("incomplete", "'slip' must be 0 or more, got -1.0")


def test_two_results_that_are_nan_are_not_the_same_function() -> None:
    def check(run: Any, case: Any) -> None:
        nan = computed(np.array([np.nan]), "out")
        run.same_function(nan, nan, ErrorBound({"bound": np.ones(1)}), "called twice")

    record = run_law(make_law(check), TorchAbsorbed(), FEW)
    assert (record.verdict, record.message) == ("fail", "out has NaN: called twice")


def test_an_error_of_the_suite_itself_is_not_blamed_on_the_subject() -> None:
    def check(run: Any, case: Any) -> None:
        raise ZeroDivisionError("in the law")

    with pytest.raises(ZeroDivisionError):
        run_law(make_law(check), TorchAbsorbed(), FEW)


def test_examples_are_spread_over_the_dtypes_and_equal_seeds_give_equal_cases() -> None:
    seen: list[list[str]] = []

    def check(run: Any, case: DecodeCase) -> None:
        seen[-1].append(case.id)

    for seed in (1, 1, 2):
        seen.append([])
        run_law(make_law(check), TorchAbsorbed(), Options(examples=80, seed=seed))
    assert seen[0] == seen[1] != seen[2]
    dtypes = [parse_case(case).dtype for case in seen[0][1:]]  # the first case runs twice
    assert {dtypes.count(dtype) for dtype in set(dtypes)} == {20}
    assert len(set(dtypes)) == 4


def test_supports_bounds_what_is_drawn() -> None:
    limited = Supports(
        page_sizes=(64,),
        num_heads=(7,),
        latent_dims=((6, 4),),
        max_s=1,
        causal=(False,),
        empty_row="unsupported",
    )

    def check(run: Any, case: DecodeCase) -> None:
        assert (case.page_size, case.num_heads, case.s, case.causal) == (64, 7, 1, False)
        assert (case.kv_lora_rank, case.qk_rope_head_dim) == (6, 4)
        assert min(case.seqlens) >= 1

    class Limited(TorchAbsorbed):
        supports = limited

    assert run_law(make_law(check), Limited(), FEW).verdict == "pass"


def test_the_gravest_verdict_of_the_dtypes_counts() -> None:
    records = [
        Record("law", "subject", "pass", 5, 0.5, "case-a", seconds=1.0),
        Record("law", "subject", "fail", 2, message="why", case="case-b", seconds=0.5),
        Record("law", "subject", "incomplete", 1),
    ]
    merged = merge(records)
    assert (merged.verdict, merged.cases, merged.worst, merged.message) == ("fail", 8, 0.5, "why")
    assert merged.seconds == 1.5


def test_declarations_are_checked() -> None:
    class Nothing:
        pass

    class WrongProfile(TorchAbsorbed):
        profile = {"float32": Profile.default("bfloat16")}

    class WrongSupports(TorchAbsorbed):
        supports = {"dtypes": ["float32"]}  # type: ignore[assignment]

    with pytest.raises(TypeError, match="Nothing is not a subject: it has none of the methods rope, absorb"):
        check_subject(Nothing())
    with pytest.raises(TypeError, match=r"profile\['float32'\] must be a Profile of dtype 'float32'"):
        check_subject(WrongProfile())
    with pytest.raises(TypeError, match="supports must be a Supports, got dict"):
        check_subject(WrongSupports())
    with pytest.raises(ValueError, match="dtypes has unknown value 'fp8'"):
        Supports(dtypes=("fp8",))


def test_unknown_laws_suggest_close_names() -> None:
    with pytest.raises(ValueError, match="did you mean test_rope_preserves_norm"):
        find_laws(["test_rope_preserve_norms"])


def test_every_law_states_itself_in_one_line() -> None:
    assert all(made.statement.endswith((".", "...")) for made in LAWS.values())


def test_violation_is_not_an_assertion() -> None:
    # A subject's own failed assertion is a crash, not a violation.
    assert not issubclass(Violation, AssertionError)


def test_a_law_whose_cases_are_all_trivial_is_incomplete() -> None:
    record = run_law(make_law(lambda run, case: run.trivial("nothing is asked")), TorchAbsorbed(), FEW)
    assert record.verdict == "incomplete"
    assert record.message == "no subject could have failed any of its 4 cases: nothing is asked"
    assert record.case


def test_some_trivial_cases_do_no_harm() -> None:
    def check(run: Any, case: DecodeCase) -> None:
        if case.seed % 2:
            run.trivial("the seed is odd")

    record = run_law(make_law(check), TorchAbsorbed(), replace(FEW, examples=64))
    assert record.verdict == "pass"
    assert record.cases == 64


def test_results_without_an_element_are_trivial() -> None:
    nothing = computed(np.zeros((3, 0)), "out")
    law = make_law(lambda run, case: run.within(nothing, nothing.value, ErrorBound({"none": nothing.value})))
    record = run_law(law, TorchAbsorbed(), FEW)
    assert record.verdict == "incomplete"
    assert "no output has an element" in record.message


@pytest.mark.parametrize(
    ("supports", "law", "field"),
    [
        (Supports(num_heads=(0,)), "test_decode_agrees_with_reference", "num_heads=(0,)"),
        (Supports(latent_dims=((0, 64),)), "test_write_cache_stores_latent_then_rope", "latent_dims=((0, 64),)"),
        (Supports(prefill_dims=((192, 0),)), "test_prefill_at_production_counts", "prefill_dims=((192, 0),)"),
        (Supports(indexer_top_k=(0,)), "test_indexer_selects_the_largest_logits", "indexer_top_k=(0,)"),
    ],
)
def test_outputs_without_an_element_are_unsupported(supports: Supports, law: str, field: str) -> None:
    subject = TorchAbsorbed()
    subject.supports = supports
    record = run_law(LAWS[law], subject, FEW)
    assert record.verdict == "unsupported"
    assert record.message == f"{field} leaves outputs without an element"


def test_widths_without_rope_dims_leave_something_to_judge() -> None:
    assert Supports(latent_dims=((512, 0),), num_heads=(0, 16)).nothing_to_judge(("decode",)) == ""


def test_a_law_without_a_case_is_unsupported() -> None:
    law = Law("law", ("decode",), lambda *_: [], lambda *_: None, lambda _: "")
    record = run_law(law, TorchAbsorbed(), FEW)
    assert record.verdict == "unsupported"
    assert record.message == "no case fits what the subject supports"


def test_a_law_unsupported_in_one_dtype_runs_in_the_others() -> None:
    def check(run: Any, case: DecodeCase) -> None:
        if case.dtype == "float64":
            raise NotOffered("no such number")

    record = run_law(make_law(check), TorchAbsorbed(), FEW)
    assert record.verdict == "pass"
    assert record.cases == 12


class FirstKeys(TorchAbsorbed):
    """Its indexer selects the first keys, and can select no fewer than 2048."""

    supports = Supports(indexer_top_k=(2048,))

    def largest(self, logits: torch.Tensor, top_k: int) -> torch.Tensor:
        return torch.arange(min(top_k, logits.shape[1])).expand(len(logits), -1)


def test_a_selection_of_more_keys_than_there_usually_are_is_judged() -> None:
    record = run_law(LAWS["test_indexer_selects_the_largest_logits"], FirstKeys(), replace(FEW, examples=3))
    assert record.verdict == "fail", record.text()
    shorter = IndexerCase(dtype="float32", seqlens_q=(2,), seqlens_k=(9,), top_k=2048)
    record = run_law(LAWS["test_indexer_selects_the_largest_logits"], FirstKeys(), Options(case=shorter))
    assert record.verdict == "incomplete"
    assert "no query sees more than top_k = 2048 keys" in record.message
