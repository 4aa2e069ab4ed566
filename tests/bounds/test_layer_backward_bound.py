"""The worst-case bound of a layer's gradients: no honest backward pass exceeds it, and it is not much wider than needed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mla_spec.adapters.pytorch import TorchAbsorbed, TorchExplicit, TorchSDPA
from mla_spec.bounds.error_bound import half_ulp
from mla_spec.bounds.layer import bounded_layer
from mla_spec.bounds.layer_backward import _Backward, layer_backward_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.bounds.running import Bounded
from mla_spec.operations.layer_gradients import LayerGradientCase, LayerGradientInputs
from mla_spec.reference.backward import attention_backward
from mla_spec.reference.config import MLAConfig
from mla_spec.reference.formats import round_to
from mla_spec.reference.layer_backward import layer_backward, linear_backward, rms_norm_backward, rope_backward
from mla_spec.reference.typing import Array
from mla_spec.subjects.driver import TORCH_DTYPES
from tests.bounds.test_bounded_gradients import bounded, off_by_its_error
from tests.reference.test_layer_backward import CONFIGS, layer_case, relative_error

SUBJECTS = [TorchExplicit(), TorchAbsorbed(), TorchSDPA()]
BASE = LayerGradientCase(
    dtype="bfloat16",
    batch=2,
    prompt=3,
    hidden_size=8,
    num_heads=2,
    q_lora_rank=4,
    kv_lora_rank=4,
    qk_nope_head_dim=2,
    qk_rope_head_dim=4,
    v_head_dim=3,
    weights="aligned",
    gain=0.5,
)
CASES = {
    "plain": BASE,
    "dense": replace(BASE, weights="dense"),
    "no query compression": replace(BASE, q_lora_rank=None),
    "no rope": replace(BASE, qk_rope_head_dim=0, layout="none"),
    "not rotated": replace(BASE, layout="none"),
    "norm on k_pe": replace(BASE, k_pe_norm=True),
    "YaRN": replace(BASE, yarn="cos-sin-only", start=60),
    "gate of heads": replace(BASE, output_gate="head"),
    "gate of elements": replace(BASE, output_gate="element", q_lora_rank=None),
    "gate of queries": replace(BASE, output_gate="query"),
    "sink": replace(BASE, attention_sink=True),
    "sink and gate, dense": replace(BASE, attention_sink=True, output_gate="element", weights="dense"),
    "scaled": replace(BASE, mla_scale_q_lora=True, mla_scale_kv_lora=True, llama_4_scaling=True, start=62),
}


def gradients(subject: TorchExplicit, inputs: LayerGradientInputs, dtype: str) -> dict[str, Array]:
    """What autograd gives in ``dtype``."""
    layer = inputs.layer
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(x)).to(TORCH_DTYPES[dtype]).requires_grad_()
        for name, x in {"hidden": layer.hidden, **layer.weights}.items()
    }
    made = subject.layer({name: tensors[name] for name in layer.weights}, layer.config)
    out = made.prefill(tensors["hidden"], torch.from_numpy(layer.positions))
    out.backward(torch.from_numpy(inputs.out_grad).to(out.dtype))
    grads = {name: x.grad for name, x in tensors.items()}
    return {name: g.double().numpy() for name, g in grads.items() if g is not None}


def ratios(got: dict[str, Array], inputs: LayerGradientInputs, profile: Profile) -> dict[str, float]:
    """The largest error of each gradient as a share of its bound."""
    layer = inputs.layer
    hidden, weights = layer_backward_with_bound(
        layer.hidden, layer.positions, layer.weights, layer.config, inputs.out_grad, profile
    )
    return {
        name: float((np.abs(got[name] - want) / np.maximum(bound.total, 1e-300)).max(initial=0.0))
        for name, (want, bound) in {"hidden": hidden, **weights}.items()
    }


@pytest.mark.parametrize("form", ["explicit", "absorbed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_values_are_the_gradients(name: str, form: Any) -> None:
    config = CONFIGS[name]
    hidden, positions, weights, out_grad = layer_case(config)
    profile = Profile.default("float32", form=form)
    want = layer_backward(hidden, positions, weights, config, out_grad)
    got = layer_backward_with_bound(hidden, positions, weights, config, out_grad, profile)
    assert list(got[1]) == list(weights)
    for parameter, x in {"hidden": want[0], **want[1]}.items():
        value, bound = got[0] if parameter == "hidden" else got[1][parameter]
        assert relative_error(value, x) < 1e-13, parameter
        assert bound.total.shape == x.shape


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_autograd_stays_within_the_bound(name: str, dtype: str, subject: TorchExplicit) -> None:
    for seed in range(3):
        inputs = replace(CASES[name], dtype=dtype, seed=seed).build_gradient()
        worst = ratios(gradients(subject, inputs, dtype), inputs, subject.profile[dtype])
        assert max(worst.values()) <= 1, (seed, worst)


class _Rounding(torch.autograd.Function):
    """Forwards, moves what passes by half an ulp of a narrow format, up or down; backwards, rounds to the format."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounding: Rounded, forwards: bool, backwards: bool) -> Tensor:
        ctx.rounding, ctx.backwards = rounding, backwards
        return rounding.moved(x) if forwards else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, None, None, None]:
        return ctx.rounding.stored(grads[0]) if ctx.backwards else grads[0], None, None, None


class Rounded(TorchExplicit):
    """A layer in float64, but that intermediates are off by as much as rounding to ``dtype`` can be, and gradients rounded.

    ``up`` is the probability that an intermediate is too large. Gradients of weights and hidden states are not rounded yet.
    """

    def __init__(self, dtype: str, seed: int, up: float = 0.5) -> None:
        self.dtype = dtype
        self.up = up
        self.generator = torch.Generator().manual_seed(seed)

    def stored(self, x: Tensor) -> Tensor:
        return torch.from_numpy(round_to(x.numpy(), self.dtype))

    def moved(self, x: Tensor) -> Tensor:
        largest = torch.where(x == 0, 0.0, torch.from_numpy(half_ulp(np.abs(x.numpy()), self.dtype)))
        up = torch.rand(x.shape, generator=self.generator) < self.up
        return x + torch.where(up, largest, -largest)

    def result(self, x: Tensor) -> Tensor:
        return _Rounding.apply(x, self, True, False)  # type: ignore[no-any-return, no-untyped-call]

    def operand(self, x: Tensor) -> Tensor:
        return _Rounding.apply(x, self, False, True)  # type: ignore[no-any-return, no-untyped-call]

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.result(super().linear(self.operand(x), weight))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        unit = super().rms_norm(self.operand(x), torch.ones_like(weight), eps)
        return self.result(self.operand(self.result(unit)) * self.operand(weight.expand_as(unit)))

    def scaled(self, x: Tensor, factor: Tensor | float) -> Tensor:
        one = torch.as_tensor(factor, dtype=x.dtype) == 1
        return torch.where(one, x, self.result(super().scaled(self.operand(x), factor)))

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        return self.result(super().rotate(self.operand(x), cos, sin, interleaved))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = (self.operand(x) for x in (q, k, v))
        out, lse = super().attend(q, k, v, visible, softmax_scale)
        return self.result(out), lse


class RoundedAbsorbed(Rounded, TorchAbsorbed):
    """The same in the absorbed form."""


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cls", [Rounded, RoundedAbsorbed])
def test_roundings_as_large_as_can_be_stay_within_the_bound(cls: type[Rounded], name: str, dtype: str) -> None:
    form: Any = "absorbed" if cls is RoundedAbsorbed else "explicit"
    for seed in range(5):
        inputs = replace(CASES[name], dtype=dtype, seed=seed).build_gradient()
        got = {k: round_to(x, dtype) for k, x in gradients(cls(dtype, seed), inputs, "float64").items()}
        worst = ratios(got, inputs, Profile.default(dtype, form=form))
        assert max(worst.values()) <= 1, (seed, worst)


@pytest.mark.parametrize("cls", [Rounded, RoundedAbsorbed])
def test_errors_of_one_sign_come_near_the_bound_and_stay_within(cls: type[Rounded]) -> None:
    """Scores are so small that hardly any gradient comes through them; all other terms are positive."""
    form: Any = "absorbed" if cls is RoundedAbsorbed else "explicit"
    profile = Profile.default("bfloat16", form=form, probabilities="float32")
    largest: dict[str, float] = {}
    for seed in range(30):
        inputs = replace(BASE, batch=1, gain=2.0**-10, seed=seed).build_gradient()
        got = {
            k: round_to(x, "bfloat16") for k, x in gradients(cls("bfloat16", seed, seed % 2), inputs, "float64").items()
        }
        worst = ratios(got, inputs, profile)
        largest = {name: max(ratio, largest.get(name, 0.0)) for name, ratio in worst.items()}
    assert max(largest.values()) <= 1, largest
    for name, least in {
        "hidden": 0.4,
        "kv_a_proj_with_mqa": 0.4,
        "kv_a_layernorm": 0.4,
        "kv_b_proj": 0.6,
        "o_proj": 0.7,
    }.items():
        assert largest[name] > least, largest


class FoldedFactors(TorchAbsorbed):
    """Factors of latents are multiplied into the weights of their norms, which are rounded, as in vLLM."""

    def layer(self, weights: Any, config: MLAConfig) -> Any:
        folded = {
            "q_a_layernorm": weights["q_a_layernorm"] * config.q_lora_scale,
            "kv_a_layernorm": weights["kv_a_layernorm"] * config.kv_lora_scale,
        }
        plain = replace(config, mla_scale_q_lora=False, mla_scale_kv_lora=False)
        return super().layer({**weights, **folded}, plain)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_factors_folded_into_the_norms_stay_within_the_bound(dtype: str) -> None:
    for seed in range(10):
        inputs = replace(CASES["scaled"], llama_4_scaling=False, dtype=dtype, seed=seed).build_gradient()
        got = gradients(FoldedFactors(), inputs, dtype)
        assert max(ratios(got, inputs, FoldedFactors.profile[dtype]).values()) <= 1, seed


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)
def test_gradients_that_are_rounded_more_than_declared_exceed_the_bound(subject: TorchExplicit) -> None:
    inputs = replace(BASE, weights="dense").build_gradient()
    worst = ratios(gradients(subject, inputs, "bfloat16"), inputs, subject.profile["float32"])
    assert min(worst.values()) > 1, worst


def backward_steps(case: LayerGradientCase, profile: Profile, **exact: Bounded) -> _Backward:
    """The backward pass of a layer of which some intermediates are replaced."""
    inputs = case.build_gradient().layer
    arguments = inputs.hidden, inputs.positions, inputs.weights, inputs.config, profile
    return _Backward(*arguments, replace(bounded_layer(*arguments), **exact))


@pytest.mark.parametrize("form", ["explicit", "absorbed"])
def test_errors_of_operands_go_through_attention(form: Any) -> None:
    """In float64 all that moves the gradients is the error of q, k, v and of the gradient that arrives."""
    steps = backward_steps(replace(BASE, weights="dense"), Profile.default("float64", form=form))
    layer, rng, worst = steps.layer, np.random.default_rng(0), np.zeros(3)
    for _ in range(50):
        q, k, v = (Bounded(x.value, 1e-6 * rng.uniform(0, 1, x.value.shape)) for x in (layer.q, layer.k, layer.v))
        arrives = bounded(rng, *layer.attended.value.shape, error=1e-6)
        moved = [off_by_its_error(x, rng) for x in (q, k, v, arrives)]
        got = attention_backward(*moved, softmax_scale=steps.config.scale)
        want = replace(steps, layer=replace(layer, q=q, k=k, v=v)).attention(arrives)[:3]
        worst = np.maximum(worst, [(np.abs(g - w.value) / w.error).max() for g, w in zip(got, want, strict=True)])
    assert (worst <= 1).all()
    assert (worst > 0.2).all(), worst


@pytest.mark.parametrize("form", ["explicit", "absorbed"])
def test_gradients_of_attention_may_be_stored(form: Any) -> None:
    steps = backward_steps(
        replace(BASE, weights="dense"), Profile.default("bfloat16", form=form, probabilities="float32")
    )
    exact = {name: Bounded(x.value, 0 * x.value) for name, x in vars(steps.layer).items() if name in ("q", "k", "v")}
    arrives = np.random.default_rng(0).standard_normal(steps.layer.attended.value.shape)
    gradients = replace(steps, layer=replace(steps.layer, **exact)).attention(Bounded(arrives, 0 * arrives))
    for x in gradients[:3]:
        assert (np.abs(round_to(x.value, "bfloat16") - x.value) <= x.error).all()


def test_errors_of_latents_go_through_their_norms() -> None:
    steps = backward_steps(replace(BASE, weights="dense"), Profile.default("float64"))
    rng, c, worst = np.random.default_rng(0), steps.config.kv_lora_rank, np.zeros(2)
    b, s = steps.hidden.shape[:2]
    latent_grad, k_pe_grad = rng.standard_normal((b, s, c)), rng.standard_normal((b, s, 4))
    q_grad = rng.standard_normal((b, s, 2, 6))
    eps = steps.config.latent_norm_eps
    for _ in range(50):
        kv_down = Bounded(steps.layer.kv_down.value, 1e-6 * rng.uniform(0, 1, (b, s, c + 4)))
        q_down = Bounded(steps.layer.q_down.value, 1e-6 * rng.uniform(0, 1, (b, s, 4)))
        moved = replace(steps, layer=replace(steps.layer, kv_down=kv_down, q_down=q_down))
        keys = moved.keys(Bounded(latent_grad, 0 * latent_grad), Bounded(k_pe_grad, 0 * k_pe_grad))[1]
        got = rms_norm_backward(
            off_by_its_error(kv_down[..., :c], rng), steps.weights["kv_a_layernorm"], eps, latent_grad
        )[1]
        want, bound = keys["kv_a_layernorm"]
        queries = moved.query(Bounded(q_grad, 0 * q_grad))[1]
        c_q_grad = linear_backward_of_query(steps, q_grad)
        q_got = rms_norm_backward(off_by_its_error(q_down, rng), steps.weights["q_a_layernorm"], eps, c_q_grad)[1]
        q_want, q_bound = queries["q_a_layernorm"]
        ratio = (np.abs(got - want) / bound.total).max(), (np.abs(q_got - q_want) / q_bound.total).max()
        worst = np.maximum(worst, ratio)
    assert (worst <= 1).all()
    assert (worst > 0.2).all(), worst


def linear_backward_of_query(steps: _Backward, q_grad: Array) -> Array:
    """The gradient of the query's normalised latent, [b, s, q_lora_rank]."""
    q_pe_grad = rope_backward(q_grad[..., 2:], steps.positions, steps.config.rope)
    flat = np.concatenate([q_grad[..., :2], q_pe_grad], axis=-1).reshape(*q_grad.shape[:2], -1)
    through: Array = flat @ steps.weights["q_b_proj"]
    return through


def test_a_factor_of_the_query_rounds_its_gradient() -> None:
    """With exact latents all that is rounded of q_b_proj's gradient is the gradient times the factor, and the result."""
    case = replace(BASE, weights="dense", mla_scale_q_lora=True, qk_rope_head_dim=0, layout="none", batch=1)
    steps = backward_steps(case, Profile.default("bfloat16"))
    c_q = Bounded(round_to(steps.layer.c_q.value, "bfloat16"), 0 * steps.layer.c_q.value)
    steps = replace(steps, layer=replace(steps.layer, c_q=c_q))
    rng, worst = np.random.default_rng(0), 0.0
    for _ in range(50):
        q_grad = round_to(rng.standard_normal((1, 3, 2, 2)), "bfloat16")
        want, bound = steps.query(Bounded(q_grad, 0 * q_grad))[1]["q_b_proj"]
        grad = round_to(steps.config.q_lora_scale * q_grad.reshape(1, 3, 4), "bfloat16")
        got = round_to(linear_backward(grad, c_q.value), "bfloat16")
        error = np.abs(got - want)
        assert (error <= bound.total).all()
        worst = max(worst, (error / half_ulp(np.abs(want), "bfloat16")).max())
    assert worst > 1.5
