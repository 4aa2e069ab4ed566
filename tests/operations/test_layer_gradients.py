"""Cases and laws of a layer's gradients: what is generated, what is judged by itself, and what failures say."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchLayer
from mla_spec.installed import all_laws
from mla_spec.judging.law import Options
from mla_spec.judging.run import run_law
from mla_spec.operations.all import parse_case
from mla_spec.operations.layer_gradients import LayerGradientCase
from mla_spec.planted_bugs import PLANTED
from mla_spec.properties.test_layer_gradients import LOOSE, parts
from mla_spec.reference.config import MLAConfig
from mla_spec.reference.formats import round_to
from mla_spec.reference.mla import weight_shapes
from mla_spec.subjects.supports import DTYPES, Supports

AGREE = all_laws()["test_layer_gradients_agree_with_reference"]
CASE = LayerGradientCase(
    dtype="float32",
    seed=3,
    batch=2,
    prompt=3,
    hidden_size=8,
    num_heads=2,
    q_lora_rank=4,
    kv_lora_rank=5,
    qk_nope_head_dim=3,
    qk_rope_head_dim=2,
    v_head_dim=2,
)


@pytest.mark.parametrize("weights", ["dense", "aligned"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cases_are_exact_and_replayable(dtype: str, weights: str) -> None:
    case = LayerGradientCase(**{**vars(CASE), "dtype": dtype, "weights": weights, "gain": 0.3})
    assert parse_case(case.id) == case
    inputs, again = case.build_gradient(), case.build_gradient()
    arrays = {**inputs.layer.weights, "hidden": inputs.layer.hidden, "out_grad": inputs.out_grad}
    for name, x in arrays.items():
        np.testing.assert_array_equal(round_to(x, dtype), x, err_msg=name)
    np.testing.assert_array_equal(inputs.out_grad, again.out_grad)
    assert inputs.out_grad.shape == inputs.layer.hidden.shape == (2, 3, 8)


def test_aligned_tokens_have_a_carrier_and_a_loud_first() -> None:
    hidden = LayerGradientCase(**{**vars(CASE), "weights": "aligned"}).build_gradient().layer.hidden
    assert (hidden[..., 0] >= 2 * hidden[..., 1:].max(axis=-1)).all()
    relative = hidden[..., 1:].mean(axis=-1) / hidden[..., 0]
    assert (relative[:, :1] > 4 * relative[:, 1:]).all()


@pytest.mark.parametrize("q_lora_rank", [None, 4])
def test_parts_hold_every_row_once(q_lora_rank: int | None) -> None:
    config = LayerGradientCase(**{**vars(CASE), "q_lora_rank": q_lora_rank}).config
    shapes = weight_shapes(config)
    found = list(parts(config, tuple(shapes)))
    for name, shape in {**shapes, "hidden": (2, 3, 8)}.items():
        rows = [np.arange(shape[0])[part.rows] for part in found if part.name == name]
        np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(shape[0]))
    titles = {part.title for part in found}
    projection = "q_proj" if q_lora_rank is None else "q_b_proj"
    assert {f"{projection}, nope rows", "kv_a_proj_with_mqa, rope rows", "kv_b_proj, key rows"} < titles


def test_loose_parts_are_parts() -> None:
    titles = {part.title for rank in (None, 4) for part in _parts_with(rank)}
    for loose in LOOSE.values():
        assert set(loose) < titles


def _parts_with(q_lora_rank: int | None) -> list[object]:
    config = LayerGradientCase(**{**vars(CASE), "q_lora_rank": q_lora_rank}).config
    return list(parts(config, tuple(weight_shapes(config))))


class Detached(TorchAbsorbed):
    """A layer whose result autograd knows nothing of."""

    def project_output(self, out: Tensor, weights: Mapping[str, Tensor], config: MLAConfig) -> Tensor:
        return super().project_output(out, weights, config).detach()


class Declared(Detached):
    supports = Supports(backward=("prefill", "sparse_prefill"))


class NotDifferentiable(TorchAbsorbed):
    """A layer with a step that has no backward pass."""

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> TorchLayer:
        return super().layer({**weights, "o_proj": _NoBackward.apply(weights["o_proj"])}, config)


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        raise NotImplementedError("o_proj has no backward pass")


def test_a_layer_without_gradients_must_say_so() -> None:
    record = run_law(AGREE, Detached(), Options(case=CASE))
    assert record.verdict == "fail"
    assert "out of layer does not require grad" in record.message
    record = run_law(AGREE, Declared(), Options(case=CASE))
    assert (record.verdict, record.message) == ("unsupported", "no gradients flow through its layer")


def test_a_backward_pass_that_raises_is_a_crash() -> None:
    record = run_law(AGREE, NotDifferentiable(), Options(case=CASE))
    assert record.verdict == "crashed"
    assert "NotImplementedError: o_proj has no backward pass" in record.message


def test_a_failure_names_the_parameter_and_its_rows() -> None:
    record = run_law(AGREE, PLANTED["K5-layer"].make(), Options(case=CASE))
    assert record.verdict == "fail"
    assert record.message.startswith("gradient of kv_a_proj_with_mqa, rope rows[")
    assert "main term of the bound: " in record.message
