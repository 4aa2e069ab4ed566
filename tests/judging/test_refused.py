"""What a subject refuses is unsupported: in some cases, in all, or where its layer has no such method."""

from __future__ import annotations

from typing import Any

import pytest

from mla_spec import MLAConfig, Options, Unsupported
from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.adapters.pytorch_layer import TorchLayer
from mla_spec.installed import all_laws
from mla_spec.judging.run import run_law
from mla_spec.judging.verdict import Record
from mla_spec.subjects.answering import _told

FEW = Options(examples=16, dtypes=("float32",))
PREFILL, DECODE = "test_layer_prefill_agrees_with_reference", "test_layer_decode_agrees_with_reference"


def record(subject: Any, law: str) -> Record:
    return run_law(all_laws()[law], subject, FEW)


class NeedsCompression(TorchAbsorbed):
    """Fails, were it asked, where there is no q_lora_rank."""

    def supports_layer(self, config: MLAConfig) -> str:
        return "" if config.q_lora_rank is not None else "q_lora_rank must be given"

    def layer(self, weights: Any, config: MLAConfig) -> Any:
        assert "q_a_proj" in weights
        return super().layer(weights, config)


class Refuses(TorchAbsorbed):
    def supports_layer(self, config: MLAConfig) -> str:
        return "it has no layer of any kind"


class PrefillOnly(TorchAbsorbed):
    """A layer without a cache."""

    def layer(self, weights: Any, config: MLAConfig) -> Any:
        made = super().layer(weights, config)

        class Layer:
            prefill = made.prefill
            reset = made.reset

        return Layer()


class OneToken(TorchLayer):
    def decode(self, hidden: Any, positions: Any) -> Any:
        if hidden.shape[1] > 1:
            raise Unsupported(f"decode takes one token, got {hidden.shape[1]}")
        return super().decode(hidden, positions)


class OneTokenADecode(TorchAbsorbed):
    def layer(self, weights: Any, config: MLAConfig) -> Any:
        return OneToken(self, weights, config)


class WrongWhereItAccepts(NeedsCompression):
    def softmax_scale(self, config: MLAConfig) -> float:
        return 2 * config.scale


class Mumbles(TorchAbsorbed):
    def supports_layer(self, config: MLAConfig) -> Any:
        return True


def test_refused_cases_are_left_out_and_counted() -> None:
    got = record(NeedsCompression(), PREFILL)
    assert got.verdict == "pass", got.text()
    assert "cases refused by the subject: q_lora_rank must be given" in got.note


def test_a_subject_that_refuses_all_is_unsupported() -> None:
    got = record(Refuses(), PREFILL)
    assert (got.verdict, got.message) == ("unsupported", "refused by the subject: it has no layer of any kind")


def test_what_is_not_refused_is_judged() -> None:
    got = record(WrongWhereItAccepts(), PREFILL)
    assert got.verdict == "fail"
    assert "q_lora_rank=none" not in got.case


@pytest.mark.parametrize(("law", "verdict", "message"), [(PREFILL, "pass", ""), (DECODE, "unsupported", "no decode")])
def test_absent_methods_are_unsupported(law: str, verdict: str, message: str) -> None:
    got = record(PrefillOnly(), law)
    assert got.verdict == verdict, got.text()
    assert got.message == (message and f"its layer has {message}")


def test_one_token_a_decode() -> None:
    assert record(OneTokenADecode(), DECODE).verdict == "pass"
    got = record(OneTokenADecode(), "test_layer_decodes_several_tokens_at_once")
    assert got.verdict == "unsupported", got.text()
    assert got.message.startswith("refused by the subject: decode takes one token, got")


def test_a_refusal_without_words_is_told() -> None:
    assert "supports_layer must return a reason" in record(Mumbles(), PREFILL).message


def test_a_refusal_crosses_processes_and_a_namesake_is_a_crash() -> None:
    class OfMyOwn(Unsupported):
        pass

    namesake = type("Unsupported", (Exception,), {})
    for error, told in ((OfMyOwn("no such layer"), "Unsupported"), (namesake("graph break"), "SubjectCrashed")):
        with pytest.raises(type(error)) as raised:
            raise error
        assert _told(raised.value)[1][0] == told
