"""What a failing case needs, what its law states, and what is made of both."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mla_spec.installed import all_laws, planted_bugs
from mla_spec.judging.finding import TOPICS
from mla_spec.judging.findings import _cases, find_out
from mla_spec.judging.isolation import WorkerPool
from mla_spec.judging.law import Options
from mla_spec.judging.necessary import PLAIN, necessary
from mla_spec.judging.run import run_law
from mla_spec.judging.stated import TOPICS_OF_LAWS, stated
from mla_spec.judging.telltale_layer import STAGES
from mla_spec.judging.verdict import Record
from mla_spec.operations.all import KINDS
from mla_spec.operations.case import Case
from mla_spec.operations.decode import DecodeCase
from mla_spec.proof.bug_topics import STEPS, WORDS, topics_of

CASE = DecodeCase(dtype="float32", seqlens=(5, 7), s=2, num_heads=2, kv_lora_rank=4, page_size=4)


def test_what_makes_a_case_hold_is_needed() -> None:
    asked: list[Case] = []

    def again(case: Case) -> Record:
        asked.append(case)
        assert isinstance(case, DecodeCase)
        return Record("law", "subject", "pass" if case.s == 1 or case.page_size == 7 else "fail")

    found = necessary(CASE, again)
    assert [(each.topic, each.says) for each in found] == [
        ("mask", "right with one query a sequence"),
        ("reads", "right with one page a sequence"),
    ]
    assert replace(CASE, causal=False) in asked
    assert CASE not in asked


def test_each_plain_thing_is_a_field_of_some_case_and_is_about_something() -> None:
    for plain in PLAIN:
        assert plain.topic in TOPICS
        kinds = [KINDS[plain.kind]] if plain.kind else KINDS.values()
        assert any(plain.field in kind.__dataclass_fields__ for kind in kinds), plain
    topics = {topic for _, topic in TOPICS_OF_LAWS} | set(STAGES.values()) | set(STEPS.values()) | set(WORDS)
    assert topics <= set(TOPICS)


def test_each_word_is_in_the_name_of_a_law() -> None:
    for word, _ in TOPICS_OF_LAWS:
        assert any(word in name for name in all_laws()), word


def test_a_law_of_one_thing_states_it_and_sizes_are_said_where_they_are_large() -> None:
    record = Record("test_decode_reads_strides", "subject", "fail", separation={"field": "num_heads", "least": 16})
    (law,), (size,) = stated(record)
    assert (law.topic, law.says) == ("strides", "law: Views of larger or transposed tensors are read by their strides.")
    assert (size.topic, size.says) == ("size", "only where num_heads is at least 16")
    record = replace(record, law="test_decode_agrees_with_reference", separation={"field": "num_heads", "least": 2})
    assert stated(record) == ([], [])


@pytest.mark.parametrize(
    ("bug", "topics"),
    [("F22", {"reads"}), ("D6-prefill", {"mask"}), ("C1", {"norm"}), ("X-one-buffer-decode", {"memory"})],
)
def test_a_bug_is_about_what_its_author_wrote(bug: str, topics: set[str]) -> None:
    assert topics <= topics_of(planted_bugs()[bug])


def test_a_subject_in_its_own_process_is_asked_again() -> None:
    bug = planted_bugs()["D16"]
    options = Options(case=replace(CASE, dtype="float64", seqlens=(7,)), minimise=False)
    record = run_law(all_laws()["test_decode_agrees_with_reference"], bug.make(), options)
    assert (record.verdict, record.told) == ("fail", [])
    with WorkerPool(1) as pool:
        found = find_out(record, Options(spec=(bug.spec,)), pool)
        assert find_out(record, Options(spec=(bug.spec,)), pool, budget=0) == []
        assert find_out(replace(record, verdict="pass"), Options(spec=(bug.spec,)), pool) == []
    assert "mask" in {each.topic for each in found}
    assert "right with one query a sequence" in {each.says for each in found}


def test_a_large_case_is_asked_about_last() -> None:
    def evidence(case: str, *shape: int) -> dict[str, object]:
        return {"case": case, "shape": list(shape)}

    small, rich, large = evidence("a", 2), evidence("b", 64, 512), evidence("c", 64, 513)
    assert _cases(Record("law", "s", "fail", case="a", evidence=[small, rich])) == ["b", "a"]
    assert _cases(Record("law", "s", "fail", case="a", evidence=[small, large])) == ["a", "c"]
    assert _cases(Record("law", "s", "crashed", case="a")) == ["a"]
