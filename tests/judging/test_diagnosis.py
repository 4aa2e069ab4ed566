"""A wrong result is told which convention it obeys, a right one nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mla_spec.adapters.pytorch import TorchExplicit
from mla_spec.bounds.profile import Profile
from mla_spec.installed import all_laws
from mla_spec.judging.diagnosis import diagnosis, finding, obeyed
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.operations.case import Case
from mla_spec.operations.conventions import DECODE_CONVENTIONS, PREFILL_CONVENTIONS, RAGGED_CONVENTIONS, SCALES
from mla_spec.operations.decode import OPERATION as DECODE
from mla_spec.operations.decode import DecodeCase
from mla_spec.operations.operation import Operation
from mla_spec.operations.prefill import OPERATION as PREFILL
from mla_spec.operations.prefill import PrefillCase
from mla_spec.operations.ragged import OPERATION as RAGGED
from mla_spec.operations.ragged import RaggedDecodeCase
from mla_spec.operations.sparse import SPARSE_DECODE, SparseDecodeCase
from mla_spec.subjects.driver import Driver
from mla_spec.subjects.supports import Supports

DECODED = DecodeCase(
    dtype="float32", seed=1, seqlens=(5, 9, 1), s=3, num_heads=3, kv_lora_rank=8, qk_rope_head_dim=4, page_size=2
)
PREFILLED = PrefillCase(
    dtype="float32", seed=1, seqlens_q=(2, 1), seqlens_k=(6, 4), num_heads=3, qk_head_dim=6, v_head_dim=3
)

PACKED = RaggedDecodeCase(
    dtype="float32",
    seed=1,
    seqlens_q=(3, 1, 2),
    seqlens_k=(5, 9, 1),
    num_heads=4,
    kv_lora_rank=8,
    qk_rope_head_dim=4,
    page_size=2,
)
SELECTED = SparseDecodeCase(
    dtype="float32", seed=1, batch=2, s=2, pages=5, page_size=4, topk=8, num_heads=3, kv_lora_rank=8, qk_rope_head_dim=4
)
CASES: dict[str, tuple[Operation, Case]] = {
    "decode": (DECODE, DECODED),
    "prefill": (PREFILL, PREFILLED),
    "ragged_decode": (RAGGED, PACKED),
    "sparse_decode": (SPARSE_DECODE, SELECTED),
}


class Of(TorchExplicit):
    """A correct subject, with what it is given and what it returns changed."""

    name = "of"

    def __init__(self, options: Any = lambda o: o, lse: Any = lambda x: x) -> None:
        self.options, self.lse = options, lse

    def decode(self, q: Any, *args: Any, **options: Any) -> Any:
        out, lse = super().decode(q, *args, **self.options(options, q))
        return out, self.lse(lse)

    def prefill(self, q: Any, *args: Any, **options: Any) -> Any:
        out, lse = super().prefill(q, *args, **self.options(options, q))
        return out, self.lse(lse)

    def ragged_decode(self, q: Any, *args: Any, **options: Any) -> Any:
        out, lse = super().ragged_decode(q, *args, **self.options(options, q))
        return out, self.lse(lse)

    def sparse_decode(self, q: Any, *args: Any, **options: Any) -> Any:
        out, lse = super().sparse_decode(q, *args, **self.options(options, q))
        return out, self.lse(lse)


class RopeFirst(TorchExplicit):
    def ragged_decode(self, q: Any, kv_cache: Any, *args: Any, head_dim_v: int, **options: Any) -> Any:
        q, kv_cache = (x.roll(head_dim_v - x.shape[-1], -1) for x in (q, kv_cache))
        return super().ragged_decode(q, kv_cache, *args, head_dim_v=head_dim_v, **options)

    def decode(self, q: Any, kv_cache: Any, *args: Any, head_dim_v: int, **options: Any) -> Any:
        q, kv_cache = (x.roll(head_dim_v - x.shape[-1], -1) for x in (q, kv_cache))
        return super().decode(q, kv_cache, *args, head_dim_v=head_dim_v, **options)


class TopLeft(TorchExplicit):
    def visible(self, s: int, t: int, lengths: Any, causal: bool) -> Any:
        mask = super().visible(s, t, lengths, causal=False)
        return mask.tril() if causal else mask


def told(subject: Any, *, supports: Supports = Supports(), name: str = "decode") -> str:
    operation, case = CASES[name]
    inputs = operation.build(case)
    got = Driver(subject, "float32").call(operation, inputs)
    return diagnosis(obeyed(operation, inputs, got, Profile.default("float32"), supports))


def unchanged(options: Any, q: Any) -> Any:
    return options


def scaled(factor: Any) -> Any:
    return lambda options, q: options | {"softmax_scale": factor(options["softmax_scale"], q)}


WRONG = [
    ("the LSE is a logarithm of base 2", Of(unchanged, lambda lse: lse / np.log(2)), "decode"),
    ("converted as one of base 2", Of(unchanged, lambda lse: lse * np.log(2)), "decode"),
    ("softmax_scale is left out: it is 1", Of(scaled(lambda scale, q: 1.0)), "decode"),
    ("the root of the head dim", Of(scaled(lambda scale, q: q.shape[-1] ** -0.5)), "decode"),
    ("powers of 2, not of e", Of(scaled(lambda scale, q: scale * np.log(2))), "decode"),
    ("causal is not honored", Of(lambda options, q: options | {"causal": False}), "decode"),
    ("an LSE of the other sign", Of(unchanged, lambda lse: lse.masked_fill(lse == -np.inf, np.inf)), "decode"),
    ("laid out [b, s, h], not [b, h, s]", Of(unchanged, lambda x: x.transpose(1, 2).reshape(x.shape)), "decode"),
    (
        "laid out [h, b·s] where [b·s, h] was expected",
        Of(unchanged, lambda x: x.transpose(0, 1).reshape(3, 3, 3).transpose(1, 2)),
        "decode",
    ),
    ("as if the rope part came first", RopeFirst(), "decode"),
    ("the mask is top-left", TopLeft(), "decode"),
    ("laid out [tokens, h], not [h, tokens]", Of(unchanged, lambda x: x.T.reshape(x.shape)), "prefill"),
    ("the mask is top-left", TopLeft(), "prefill"),
    ("the LSE is a logarithm of base 2", Of(unchanged, lambda lse: lse / np.log(2)), "prefill"),
    ("softmax_scale is left out: it is 1", Of(scaled(lambda scale, q: 1.0)), "prefill"),
    ("the LSE is a logarithm of base 2", Of(unchanged, lambda lse: lse / np.log(2)), "ragged_decode"),
    ("softmax_scale is left out: it is 1", Of(scaled(lambda scale, q: 1.0)), "ragged_decode"),
    ("laid out [tokens, h], not [h, tokens]", Of(unchanged, lambda x: x.T.reshape(x.shape)), "ragged_decode"),
    (
        "laid out [h, tokens] where [tokens, h] was expected",
        Of(unchanged, lambda x: x.reshape(x.T.shape).T),
        "ragged_decode",
    ),
    ("as if the rope part came first", RopeFirst(), "ragged_decode"),
    ("the root of the head dim", Of(scaled(lambda scale, q: q.shape[-1] ** -0.5)), "sparse_decode"),
    ("powers of 2, not of e", Of(scaled(lambda scale, q: scale * np.log(2))), "sparse_decode"),
    ("the mask is top-left", TopLeft(), "ragged_decode"),
]


@pytest.mark.parametrize(("sentence", "subject", "name"), WRONG)
def test_each_convention_is_recognized(sentence: str, subject: Any, name: str) -> None:
    obeyed = told(subject, name=name)
    assert obeyed.startswith("all would be right if ")
    assert sentence in obeyed
    assert ", or " not in obeyed


KNOWN = (*DECODE_CONVENTIONS, *PREFILL_CONVENTIONS, *RAGGED_CONVENTIONS, *SCALES)


def test_every_convention_is_tested() -> None:
    known = {convention.what for convention in KNOWN}
    assert {what for what in known if not any(sentence in what for sentence, *_ in WRONG)} == set()


def test_a_convention_is_found_out_with_what_declares_it() -> None:
    for convention in KNOWN:
        assert finding(convention).says.startswith(f"all would be right if {convention.what}")
    (sign,) = {each for each in KNOWN if each.declare.startswith("empty_row")}
    assert finding(sign).says.endswith('; if that is intended, declare Supports(empty_row="zero/+inf")')


@pytest.mark.parametrize("tell", [False, True])
def test_a_record_tells_of_conventions_asked_or_not(tell: bool) -> None:
    wrong = Of(scaled(lambda scale, q: 1.0))
    options = Options(case=DECODED, minimise=False, tell=tell)
    record = run_law(all_laws()["test_decode_agrees_with_reference"], wrong, options)
    assert record.told == [finding(SCALES[0]).as_dict()]
    assert finding(SCALES[0]).says in record.message


@pytest.mark.parametrize("name", CASES)
def test_right_results_and_unrecognized_ones_are_told_nothing(name: str) -> None:
    assert told(TorchExplicit(), name=name) == ""
    assert told(Of(scaled(lambda scale, q: 1.1 * scale)), name=name) == ""


def test_a_declared_convention_is_none() -> None:
    subject = Of(unchanged, lambda lse: lse.masked_fill(lse == -np.inf, np.inf))
    assert told(subject, supports=Supports(empty_row="zero/+inf")) == ""


def test_large_cases_are_not_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Of(scaled(lambda scale, q: 1.0))
    assert told(wrong) != ""
    monkeypatch.setattr("mla_spec.judging.diagnosis.LARGEST", 8)
    assert told(wrong) == ""
