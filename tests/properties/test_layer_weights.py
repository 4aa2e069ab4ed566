"""A layer that copies its weights may say so, and is then not asked to see them change."""

from __future__ import annotations

from typing import Any

from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.planted_bugs.layers import RelaidWeights
from mla_spec.properties import test_layer_weights as laws

OVERWRITTEN: Any = laws.test_layer_uses_weights_overwritten_in_place
MADE_AGAIN: Any = laws.test_layer_made_again_uses_its_own_weights
FEW = Options(examples=24, dtypes=("float32",), minimise=False)


class Undeclared(RelaidWeights):
    supports = TorchAbsorbed.supports


def test_a_declared_copy_is_not_asked_to_change() -> None:
    record = run_law(OVERWRITTEN.law, RelaidWeights(), FEW)
    assert record.verdict == "unsupported"
    assert "keep a copy of the weights" in record.text()
    assert "layer_weights='copied'" in RelaidWeights.supports.restrictions()


def test_an_undeclared_copy_fails() -> None:
    assert run_law(OVERWRITTEN.law, Undeclared(), FEW).verdict == "fail"


def test_a_copy_made_anew_has_the_new_weights() -> None:
    assert run_law(MADE_AGAIN.law, RelaidWeights(), FEW).verdict == "pass"
