"""The bound of gradients: honest backward passes never exceed it, and small faults do."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from mla_spec.bounds.attention_backward import BackwardAttention, Gradients, attention_backward_with_bound
from mla_spec.bounds.operand_rounding import InheritedError
from mla_spec.bounds.profile import Accumulator, Profile
from mla_spec.bounds.running import (
    Bounded,
    matmul,
    multiply,
    perhaps_stored,
    stored,
)
from mla_spec.proof.emulated import Schedule
from mla_spec.reference.backward import attention_backward
from mla_spec.reference.formats import round_to
from mla_spec.reference.typing import Array
from tests.bounds.emulated_backward import EmulatedBackward

STDS = (0.01, 1.0, 4.0, 16.0)
NARROW = ("p", "dp", "ds", "scaled")


def passes() -> Iterator[EmulatedBackward]:
    """The honest family: styles and roundings of each, then other arithmetic."""
    for dtype in ("float32", "float16", "bfloat16"):
        default = Profile.default(dtype)
        for style in ("plain", "softmax", "fused"):
            yield EmulatedBackward(default, style, ())
            yield EmulatedBackward(default, style, NARROW, heads_stored=True)
            yield EmulatedBackward(default, style, ("p", "ds"), schedule=Schedule(stepwise=True))
            yield EmulatedBackward(default, style, ("dp", "scaled"), schedule=Schedule(reverse=True))
            yield EmulatedBackward(replace(default, probabilities="float32"), style, heads_stored=True)
        yield EmulatedBackward(replace(default, tile=3), "fused", ("p", "ds"))
        yield EmulatedBackward(replace(default, row_sum="rounded"), "fused", NARROW)
        yield EmulatedBackward(replace(default, exp_error=2048.0), "fused", schedule=Schedule(exp_bias=1.0))
        yield EmulatedBackward(replace(default, exp_error=2048.0), "plain", schedule=Schedule(exp_bias=-1.0))
        yield EmulatedBackward(replace(default, output_rounding="truncate"), "fused", ("ds",))
        blocked = Accumulator(order="blocked", block=4)
        yield EmulatedBackward(replace(default, score=blocked, value=blocked), "plain", NARROW)
        yield EmulatedBackward(replace(default, score_format="bfloat16", score_roundings=2), "plain", NARROW)
        yield EmulatedBackward(replace(default, lse="bfloat16"), "fused")
    yield EmulatedBackward(Profile.default("float64"), "softmax")
    yield EmulatedBackward(Profile.default("float64"), "fused")


def _name(kernel: EmulatedBackward) -> str:
    stored_heads = ", heads stored" * kernel.heads_stored
    schedule = ", ".join(f"{k}={v}" for k, v in vars(kernel.schedule).items() if v)
    return f"{kernel.style}, {kernel.profile.describe()}, {'+'.join(kernel.narrow)}{stored_heads}, {schedule}"


PASSES = {_name(kernel): kernel for kernel in passes()}


@dataclass(frozen=True)
class Inputs:
    """Operands exactly representable in their dtype, and how many keys each query sees."""

    q: Array
    k: Array
    v: Array
    out_grad: Array
    lse_grad: Array | None
    scale: float
    causal: bool

    @property
    def seen(self) -> Array:
        s, t = len(self.q), len(self.k)
        return np.maximum(t - s + 1 + np.arange(s), 0) if self.causal else np.full(s, t)


def inputs(seed: int, dtype: str, logit_std: float) -> Inputs:
    """One case; the shapes, the values' mean, ties and the LSE's gradient vary with the seed."""
    rng = np.random.default_rng(seed)
    s, h, d, dv = int(rng.choice([1, 3, 6])), 2, int(rng.choice([2, 8, 24])), int(rng.choice([1, 5, 16]))
    g, t = int(rng.choice([1, 2])), int(rng.choice([1, 2, 5, 17]))
    shapes = ((s, h, d), (t, g, d), (t, g, dv), (s, h, dv))
    q, k, v, out_grad = (rng.standard_normal(shape) for shape in shapes)
    v += float(rng.choice([0.0, 1.0, 30.0]))
    if seed % 3 == 1:
        k[1::2] = k[: t // 2]
    q, k, v, out_grad = (round_to(x, dtype) for x in (q * logit_std, k, v, out_grad))
    lse_grad = round_to(rng.standard_normal((h, s)), "float32") if seed % 2 else None
    return Inputs(q, k, v, out_grad, lse_grad, float(d**-0.5), bool(seed % 4))


def bounded(case: Inputs, profile: Profile, **options: Any) -> Gradients:
    return attention_backward_with_bound(
        *(case.q, case.k, case.v, case.out_grad),
        softmax_scale=case.scale,
        profile=profile,
        causal=case.causal,
        lse_grad=case.lse_grad,
        **options,
    )


def computed(kernel: EmulatedBackward, case: Inputs) -> tuple[Array, Array, Array]:
    return kernel.gradients(
        *(case.q, case.k, case.v, case.out_grad), softmax_scale=case.scale, seen=case.seen, lse_grad=case.lse_grad
    )


def excess(got: Array, want: Bounded) -> float:
    """The largest error as a multiple of the bound."""
    error = np.abs(got - want.value)
    assert not np.isnan(want.error).any()
    return float(np.where(error > 0, error / np.maximum(want.error, 5e-324), 0).max(initial=0))


def excesses(kernel: EmulatedBackward, case: Inputs, profile: Profile | None = None) -> list[float]:
    """Of q, k and v, judged by ``profile`` or by the kernel's own."""
    want = bounded(case, profile or kernel.profile)
    return [excess(got, x) for got, x in zip(computed(kernel, case), want, strict=True)]


@pytest.mark.parametrize("name", PASSES)
def test_honest_passes_stay_within_the_bound(name: str) -> None:
    kernel = PASSES[name]
    for std, seed in itertools.product(STDS, range(6)):
        case = inputs(seed, kernel.profile.dtype, std)
        assert max(excesses(kernel, case)) <= 1, (std, seed)


def test_bound_comes_with_the_exact_gradients() -> None:
    for seed in range(8):
        case = inputs(seed, "float32", 1.0)
        exact = attention_backward(
            *(case.q, case.k, case.v, case.out_grad),
            softmax_scale=case.scale,
            causal=case.causal,
            lse_grad=case.lse_grad,
        )
        for a, b in zip(exact, bounded(case, Profile.default("float64")), strict=True):
            assert excess(a, b) <= 1


@pytest.mark.parametrize(("dtype", "share"), [("float32", 0.05), ("float16", 0.5), ("bfloat16", 0.5)])
def test_bound_is_not_idle(dtype: str, share: float) -> None:
    """The honest family comes near the bound where roundings to 16 bits make it, less where float32 sums do."""
    kernels = [kernel for kernel in PASSES.values() if kernel.profile.dtype == dtype]
    largest = np.max([excesses(k, inputs(seed, dtype, 1.0)) for k in kernels for seed in range(4)], axis=0)
    assert (largest > share).all(), largest


FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str, Profile]] = {
    # name: (changes of the kernel, of its profile, the gradients that show it, what it declares)
    "dP in bfloat16": ({"narrow": ("dp",)}, {"probabilities": "bfloat16"}, "qk", Profile.default("float32")),
    "P in bfloat16": ({"narrow": ("p",)}, {"probabilities": "bfloat16"}, "v", Profile.default("float32")),
    "dS in bfloat16": ({"narrow": ("ds",)}, {"probabilities": "bfloat16"}, "qk", Profile.default("float32")),
    "P in float16": ({"narrow": ("p",)}, {"probabilities": "float16"}, "v", Profile.default("float32")),
    "gradients in bfloat16": ({}, {"dtype": "bfloat16"}, "qkv", Profile.default("float32")),
    "truncated gradients": (
        {},
        {"output_rounding": "truncate", "output": "float32"},
        "qkv",
        Profile.default("bfloat16", probabilities="float32", output="float32"),
    ),
    "LSE in bfloat16": ({"style": "fused"}, {"lse": "bfloat16"}, "v", Profile.default("float32")),
    "scores in bfloat16": (
        {"style": "fused"},
        {"score_format": "bfloat16", "score_roundings": 2},
        "v",
        Profile.default("float32"),
    ),
    "sums in bfloat16": ({}, {"value": Accumulator(format="bfloat16")}, "qk", Profile.default("float32")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_arithmetic_that_is_not_declared_exceeds_the_bound(name: str) -> None:
    changes, actual, shown, declared = FAULTS[name]
    kernel = EmulatedBackward(**{"profile": replace(declared, **actual)} | changes)
    largest = np.zeros(3)
    for seed in range(6):
        case = inputs(seed, "bfloat16", 1.0)
        assert max(excesses(kernel, case)) <= 1  # honest about itself ...
        largest = np.maximum(largest, excesses(kernel, case, declared))
    assert (largest[["qkv".index(x) for x in shown]] > 1).all(), largest  # ... and not as declared


@pytest.mark.parametrize(
    ("dtype", "error"), [("float64", 1e-12), ("float32", 3e-4), ("float16", 1e-2), ("bfloat16", 5e-2)]
)
def test_a_scale_that_is_a_little_wrong_exceeds_the_bound(dtype: str, error: float) -> None:
    """In the gradients of q and k alone, of two keys."""
    case = replace(inputs(3, dtype, 1.0), causal=False, lse_grad=None)
    case = replace(case, q=case.q[:1], k=np.stack([case.k[0], -case.k[0]]), v=np.stack([case.v[0], -case.v[0]]))
    want = bounded(replace(case, out_grad=case.out_grad[:1]), Profile.default(dtype, probabilities=dtype))
    for x in want[:2]:
        wrong = round_to(x.value * (1 + error), dtype)
        assert excess(wrong, x) > 1
        assert excess(round_to(x.value, dtype), x) <= 1


def test_a_key_too_many_exceeds_the_bound() -> None:
    case = replace(inputs(5, "bfloat16", 1.0), causal=False)
    more = replace(case, k=np.concatenate([case.k, case.k[-1:]]), v=np.concatenate([case.v, case.v[-1:] + 1]))
    kernel = EmulatedBackward(Profile.default("bfloat16"), "fused")
    got, want = computed(kernel, more), bounded(case, kernel.profile)
    assert excess(got[0], want[0]) > 1
    assert excess(got[2][:-1], want[2]) > 1


@pytest.mark.parametrize("style", ["plain", "fused"])
def test_errors_of_operands_are_in_the_bound(style: Any) -> None:
    """Operands moved to the ends of their intervals, at random."""
    rng = np.random.default_rng(1)
    kernel = EmulatedBackward(Profile.default("float32"), style)
    for seed in range(8):
        case = inputs(seed, "float32", 1.0)
        size = {name: np.abs(getattr(case, name)) * 2.0**-8 for name in ("q", "k", "v", "out_grad")}
        moved = {name: getattr(case, name) + rng.choice([-1, 1], e.shape) * e for name, e in size.items()}
        want = bounded(
            case,
            kernel.profile,
            inherited=InheritedError(size["q"], size["k"], size["v"]),
            out_grad_error=size["out_grad"],
        )
        got = computed(kernel, replace(case, **{name: round_to(x, "float32") for name, x in moved.items()}))
        assert max(excess(a, b) for a, b in zip(got, want, strict=True)) <= 1.001  # operands were rounded once more


def test_gradients_of_what_is_not_seen_have_no_error() -> None:
    case = inputs(2, "bfloat16", 1.0)
    k, v = np.full((6, 1, 8), 1e30), np.full((6, 1, 3), 1e30)
    k[:2], v[:2] = 1.0, 2.0
    rng = np.random.default_rng(4)
    q, out_grad = (round_to(rng.standard_normal((3, 2, n)), "bfloat16") for n in (8, 3))
    case = replace(case, q=q, k=k, v=v, out_grad=out_grad, lse_grad=None, causal=True)
    dq, dk, dv = bounded(case, Profile.default("bfloat16"), cache_seqlens=2)
    for x in (dq[:1], dk[2:], dv[2:]):
        assert not x.value.any()
        assert not x.error.any()
    assert dv[:2].error.any()


@pytest.mark.parametrize("what", ["P", "dP", "O"])
def test_plain_steps_see_a_sink_through_the_lse(what: str) -> None:
    """What is stored then has the size that it has before the sink takes its share, and D subtracts two sums."""
    rng, worst = np.random.default_rng(7), np.zeros(3)
    profile = Profile.default("float32", probabilities="bfloat16", output="bfloat16")
    for scale in (1.0, 3.0) * 20:
        q, k, v, do = (round_to(rng.standard_normal((n, 2)), "bfloat16") for n in (2, 3, 3, 2))
        v *= 2.0 ** rng.integers(-3, 8, (3, 1))
        scores = scale * q @ k.T
        lse = np.log(np.exp(scores).sum(axis=-1, keepdims=True))
        sink = np.array([lse.mean() + rng.uniform(-1, 5)])

        def stored_if(name: str, x: Array) -> Array:
            return round_to(x, "bfloat16") if name == what else x

        p, share = np.exp(scores - lse), 1 / (1 + np.exp(sink - lse))
        of_share = (do * stored_if("O", p @ v)).sum(axis=-1, keepdims=True)
        dp = stored_if("dP", share * do @ v.T)
        of_lse = of_share * share * (1 - share)
        ds = scale * p * (dp - (p * dp).sum(axis=-1, keepdims=True) + of_lse)
        got = ds @ k, ds.T @ q, stored_if("P", p).T @ (share * do)
        want = BackwardAttention.of(
            *(x[:, None] for x in (q, k, v)), softmax_scale=scale, profile=profile, causal=False, attn_sink=sink
        ).gradients(do[:, None])
        worst = np.maximum(worst, [excess(x[:, None], y) for x, y in zip(got, want, strict=True)])
    assert (worst <= 1).all(), worst
    assert worst.max() > 0.2, worst


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
def test_stored_is_how_far_a_rounded_number_of_the_interval_gets(dtype: str, rounding: Any) -> None:
    rng = np.random.default_rng(7)
    x = rng.standard_normal(400)
    x[::2] = round_to(x[::2], dtype)
    e = np.abs(x) * 10.0 ** rng.uniform(-9, -1, 400)
    interval = Bounded(x, e)
    numbers = round_to(x + rng.uniform(-1, 1, (200, 400)) * e, dtype, rounding=rounding)
    farthest = np.abs(numbers - x).max(axis=0)
    bound = stored(interval, dtype, rounding).error
    assert (farthest <= bound).all()
    assert (farthest >= 0.9 * bound).mean() > 0.9  # 200 numbers come near the ends of most
    assert (perhaps_stored(interval, dtype, rounding).error >= np.maximum(bound, e)).all()


def test_a_number_of_the_format_is_exact_again() -> None:
    one = Bounded(np.array([1.0, 1.0]), np.array([2.0**-10, 2.0**-7]))
    assert stored(one, "bfloat16").error.tolist() == [0.0, 2.0**-7]
    assert perhaps_stored(one, "bfloat16").error.tolist() == [2.0**-10, 2.0**-7]


def test_products_carry_the_errors_of_both_operands() -> None:
    """At the worst corner: both errors away from 0, and each step rounded up."""
    a, b = (
        Bounded(np.array([[2.0, -3.0]]), np.array([[0.5, 0.25]])),
        Bounded(np.array([[4.0], [-5.0]]), np.array([[1.0], [2.0]])),
    )
    corner = 2.5 * 5.0 + 3.25 * 7.0
    assert matmul(a, b, 0.0).value.tolist() == [[23.0]]
    assert 23.0 + matmul(a, b, 0.0).error[0, 0] >= corner
    assert 23.0 + matmul(a, b, 0.01).error[0, 0] >= 1.01 * corner
    both = multiply(a, Bounded(b.value.T, b.error.T), 0.01)
    assert (np.abs(both.value) + both.error >= 1.01 * np.array([[12.5, 22.75]])).all()
