"""The bounds of a layer and of its gradients are the steps of ``bounded*``, composed as docs/bounds.md says: head by head.

The steps themselves are written out in test_bounded.py, test_bounded_steps.py, test_bounded_gradients.py and
test_backward_bound_written_out.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import pytest

from mla_spec.bounds.attention import attention_with_bound
from mla_spec.bounds.attention_backward import BackwardAttention
from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.layer import BoundedLayer, bounded_layer, layer_with_bound
from mla_spec.bounds.layer_backward import layer_backward_with_bound
from mla_spec.bounds.operand_rounding import InheritedError
from mla_spec.bounds.profile import Profile
from mla_spec.bounds.running import (
    Bounded,
    concatenated,
    perhaps_stored,
    product,
)
from mla_spec.bounds.running_gradients import (
    Gradient,
    added,
    gate_gradients,
    rms_norm_gradients,
    summed_over_heads,
    summed_over_tokens,
    weight_gradient,
)
from mla_spec.bounds.running_steps import (
    bounded_rms_norm,
    foldable,
    rotated,
    scaled_by_config,
    temperature,
)
from mla_spec.reference.config import Llama4Scaling, MLAConfig, RopeConfig
from mla_spec.reference.formats import round_to
from mla_spec.reference.mla import weight_shapes
from mla_spec.reference.typing import Array, IntArray
from tests.bounds.bound_terms import U64, UNIT_ROUNDOFF, half_ulp

PLAIN = MLAConfig(
    hidden_size=9,
    num_heads=4,
    q_lora_rank=7,
    kv_lora_rank=5,
    qk_nope_head_dim=10,
    qk_rope_head_dim=6,
    v_head_dim=8,
    latent_norm_eps=1e-3,
    rope=RopeConfig(dim=6, theta=100.0),
)
CONFIGS = {
    "plain": PLAIN,
    "no query compression": replace(PLAIN, q_lora_rank=None),
    "not rotated": replace(PLAIN, rope=None),
    "norm on k_pe": replace(PLAIN, k_pe_norm=True),
    "gate of heads": replace(PLAIN, output_gate="head"),
    "gate of elements": replace(PLAIN, output_gate="element", q_lora_rank=None),
    "gate of queries": replace(PLAIN, output_gate="query"),
    "gate of elements beside latents": replace(PLAIN, output_gate="element"),
    "sink": replace(PLAIN, attention_sink=True),
    "scaled": replace(
        PLAIN,
        mla_scale_q_lora=True,
        mla_scale_kv_lora=True,
        llama_4_scaling=Llama4Scaling(beta=0.3, original_max_position_embeddings=4),
    ),
}
POSITIONS = np.array([[2, 3, 4], [11, 12, 13]])
B, S = POSITIONS.shape


def exact(x: Array) -> Bounded:
    return Bounded(x, np.zeros_like(x))


def stacked(heads: list[Bounded]) -> Bounded:
    """Heads [..., s, i] as [..., s, h, i]."""
    return Bounded(*(np.stack([getattr(x, name) for x in heads], axis=-2) for name in ("value", "error")))


def side_by_side(heads: list[Bounded]) -> Bounded:
    return concatenated(*heads)


@dataclass(frozen=True)
class Composed:
    """A layer over hidden states [b, s, e], from the rows of its weights that belong to each head."""

    hidden: Array
    weights: dict[str, Array]
    config: MLAConfig
    profile: Profile

    @property
    def heads(self) -> range:
        return range(self.config.num_heads)

    def linear(self, weight: Array, x: Bounded) -> Bounded:
        return product("oi,...i->...o", weight, x, self.profile)

    def back(self, weight: Array, grad: Bounded, terms: int | None = None) -> Bounded:
        return product("oi,...o->...i", weight, grad, self.profile, terms)

    def w_uk(self, head: int) -> Array:
        n, v = self.config.qk_nope_head_dim, self.config.v_head_dim
        return self.weights["kv_b_proj"][head * (n + v) :][:n]

    def w_uv(self, head: int) -> Array:
        n, v = self.config.qk_nope_head_dim, self.config.v_head_dim
        return self.weights["kv_b_proj"][head * (n + v) + n :][:v]

    def cooled(self, x: Bounded) -> Bounded:
        return temperature(x[..., None, :], POSITIONS, self.config.llama_4_scaling, self.profile)[..., 0, :]

    def rotated(self, x: Bounded, positions: IntArray = POSITIONS) -> Bounded:
        return rotated(x, positions, self.config.rope, self.profile)

    @cached_property
    def q_down(self) -> Bounded:
        x = exact(self.hidden)
        return x if self.config.q_lora_rank is None else self.linear(self.weights["q_a_proj"], x)

    @cached_property
    def q_norm(self) -> Bounded:
        config = self.config
        if config.q_lora_rank is None:
            return self.q_down
        return bounded_rms_norm(self.q_down, self.weights["q_a_layernorm"], config.latent_norm_eps, self.profile)

    @cached_property
    def c_q(self) -> Bounded:
        config = self.config
        if config.q_lora_rank is None:
            return self.q_down
        if config.output_gate == "query":
            return side_by_side([self.q_norm, self.q_down])
        return foldable(self.q_norm, config.q_lora_scale, self.profile.dtype)

    def up(self, head: int) -> Array:
        """Of one head's queries, [n+r, q_lora_rank or e]."""
        qk, v = self.config.qk_head_dim, self.config.v_head_dim
        if self.config.output_gate == "query":
            return self.weights["q_gate_proj"][head * (qk + v) :][:qk]
        return self.weights["q_proj" if self.config.q_lora_rank is None else "q_b_proj"][head * qk :][:qk]

    def query(self, head: int) -> tuple[Bounded, Bounded]:
        """(q_nope, q_pe), each [b, s, ·]."""
        config = self.config
        q = self.linear(self.up(head), self.c_q)
        q = scaled_by_config(q, config.q_lora_scale, self.profile)
        n = config.qk_nope_head_dim
        return self.cooled(q[..., :n]), self.cooled(self.rotated(q[..., n:]))

    @cached_property
    def kv_down(self) -> Bounded:
        return self.linear(self.weights["kv_a_proj_with_mqa"], exact(self.hidden))

    @cached_property
    def kv_norm(self) -> Bounded:
        config, c = self.config, self.config.kv_lora_rank
        weight = self.weights["kv_a_layernorm"]
        return bounded_rms_norm(self.kv_down[..., :c], weight, config.latent_norm_eps, self.profile)

    @cached_property
    def latent(self) -> Bounded:
        config = self.config
        latent = foldable(self.kv_norm, config.kv_lora_scale, self.profile.dtype)
        return scaled_by_config(latent, config.kv_lora_scale, self.profile)

    @cached_property
    def k_pe(self) -> Bounded:
        config, down = self.config, self.kv_down[..., self.config.kv_lora_rank :]
        if not config.k_pe_norm:
            return self.rotated(down)
        weight = self.weights["k_rope_only_layernorm"]
        return self.rotated(bounded_rms_norm(down, weight, config.latent_norm_eps, self.profile))

    @cached_property
    def operands(self) -> list[tuple[Bounded, Bounded, Bounded]]:
        """(q, k, v) of each head."""
        result = []
        for head in self.heads:
            q_nope, q_pe = self.query(head)
            if self.profile.form == "explicit":
                k_nope, v = self.linear(self.w_uk(head), self.latent), self.linear(self.w_uv(head), self.latent)
                result.append((side_by_side([q_nope, q_pe]), side_by_side([k_nope, self.k_pe]), v))
            else:
                q_latent = self.linear(self.w_uk(head).T, q_nope)
                q, k = side_by_side([q_latent, q_pe]), side_by_side([self.latent, self.k_pe])
                result.append((q, k, self.latent))
        return result

    @cached_property
    def attention(self) -> list[tuple[Bounded, Bounded]]:
        """(out [b, s, ·], lse [b, s]) of each head."""
        result = []
        for head, operands in enumerate(self.operands):
            q, k, v = (x[..., None, :] for x in operands)
            bound = attention_with_bound(
                q.value,
                k.value,
                v.value,
                softmax_scale=self.config.scale,
                profile=replace(self.profile, cache_dequantised=None),
                inherited=InheritedError(q.error, k.error, v.error),
                attn_sink=self.weights["sinks"][head : head + 1] if self.config.attention_sink else None,
                sink_joins=True,
            )
            out, lse = Bounded(bound.out, bound.out_error.total), Bounded(bound.lse, bound.lse_error.total)
            result.append((out[..., 0, :], lse[..., 0, :]))
        return result

    @property
    def attended(self) -> list[Bounded]:
        return [out for out, _ in self.attention]

    @cached_property
    def expanded(self) -> Bounded:
        if self.profile.form == "explicit":
            return side_by_side(self.attended)
        return side_by_side([self.linear(self.w_uv(head), self.attended[head]) for head in self.heads])

    @cached_property
    def g(self) -> Bounded:
        x = exact(self.hidden)
        if self.config.output_gate == "query":
            qk, v = self.config.qk_head_dim, self.config.v_head_dim
            rows = [self.weights["q_gate_proj"][head * (qk + v) + qk :][:v] for head in self.heads]
            return side_by_side([self.linear(own, self.c_q) for own in rows])
        return x if self.config.output_gate is None else self.linear(self.weights["g_proj"], x)

    @cached_property
    def out(self) -> Bounded:
        """The values times their gates, each a sigmoid that is stored, and the product too."""
        if self.config.output_gate is None:
            return self.expanded
        value, error = np.empty_like(self.expanded.value), np.empty_like(self.expanded.error)
        u, dtype = UNIT_ROUNDOFF[self.profile.softmax], self.profile.dtype
        of_gate = self.config.v_head_dim if self.config.output_gate == "head" else 1
        for b, s, i in np.ndindex(value.shape):
            x, e = (float(a[b, s, i // of_gate]) for a in (self.g.value, self.g.error))
            o, e_o = (float(a[b, s, i]) for a in (self.expanded.value, self.expanded.error))
            least, gate, most = (1 / (1 + math.exp(-y)) for y in (x - e, x, x + e))
            off = max(most - gate, gate - least)
            of_exp = math.expm1(u * (abs(x) + e + self.profile.exp_error)) * (1 - least)
            off += ((1 + 4 * u) / (1 - of_exp) - 1 + 8 * U64) * (gate + off)
            off += half_ulp(gate + off, dtype)
            error[b, s, i] = abs(o) * off + e_o * (gate + off)
            error[b, s, i] += (u + U64) * (abs(o * gate) + error[b, s, i])
            error[b, s, i] += half_ulp(abs(o * gate) + error[b, s, i], dtype)
            value[b, s, i] = o * gate
        return Bounded(value, error)

    def bounded(self) -> BoundedLayer:
        shared = self.profile.form == "absorbed"
        q, k, v = (stacked(list(x)) for x in zip(*self.operands, strict=True))
        return BoundedLayer(
            q_down=self.q_down,
            q_norm=self.q_norm,
            c_q=self.c_q,
            q_nope=stacked([self.query(head)[0] for head in self.heads]),
            q_pe=stacked([self.query(head)[1] for head in self.heads]),
            kv_down=self.kv_down,
            kv_norm=self.kv_norm,
            latent=self.latent,
            k_pe=self.k_pe,
            q=q,
            k=k[..., :1, :] if shared else k,
            v=v[..., :1, :] if shared else v,
            attended=stacked(self.attended),
            lse=stacked([lse for _, lse in self.attention]),
            expanded=self.expanded,
            g=self.g,
            out=self.out,
        )

    def attention_gradients(
        self, out_grads: list[Bounded], grads: dict[str, Gradient]
    ) -> tuple[Bounded, Bounded, Bounded]:
        """(∂q [b, s, h, ·], ∂k, ∂v [b, t, h or 1, ·]), each perhaps stored; adds that of the sinks to ``grads``."""
        layer, do = self.bounded(), stacked(out_grads)
        attention = BackwardAttention.of(
            layer.q.value,
            layer.k.value,
            layer.v.value,
            softmax_scale=self.config.scale,
            profile=self.profile,
            inherited=InheritedError(layer.q.error, layer.k.error, layer.v.error),
            attn_sink=self.weights["sinks"] if self.config.attention_sink else None,
            sink_joins=self.config.attention_sink,
        )
        if self.config.attention_sink:
            of_sink = perhaps_stored(attention.sink_gradient(do.value, do.error), self.profile.dtype)
            grads["sinks"] = summed_over_tokens(of_sink, self.profile)
        dq, dk, dv = (perhaps_stored(x, self.profile.dtype) for x in attention.gradients(do.value, do.error))
        return dq, dk, dv

    def gradients(self, out_grad: Array) -> dict[str, Gradient]:
        """Of "hidden" and of each weight."""
        config, n, v = self.config, self.config.qk_nope_head_dim, self.config.v_head_dim
        grads = {"o_proj": weight_gradient(exact(out_grad), self.out, self.profile)}
        of_out = [self.back(self.weights["o_proj"][:, head * v :][:, :v], exact(out_grad)) for head in self.heads]
        of_g: list[Bounded] = []
        if config.output_gate is not None:
            own = self.g.value.shape[-1] // config.num_heads
            pairs = [
                gate_gradients(
                    self.expanded[..., head * v :][..., :v], self.g[..., head * own :][..., :own], grad, self.profile
                )
                for head, grad in enumerate(of_out)
            ]
            of_out, of_g = ([pair[i] for pair in pairs] for i in range(2))
        if self.profile.form == "explicit":
            dq, dk, dv = self.attention_gradients(of_out, grads)
            # the gradients of all heads' keys and values may be summed by one projection
            terms = config.num_heads * (n + v)
            by_key = [self.back(self.w_uk(head), dk[..., head, :n], terms) for head in self.heads]
            by_value = [self.back(self.w_uv(head), dv[..., head, :], terms) for head in self.heads]
            latent_grad = added(
                *(summed_over_heads(stacked(x), self.profile) for x in (by_key, by_value)), profile=self.profile
            )
            k_pe_grad = summed_over_heads(dk[..., n:], self.profile)
            of_w_uk = [weight_gradient(dk[..., head, :n], self.latent, self.profile) for head in self.heads]
            of_w_uv = [weight_gradient(dv[..., head, :], self.latent, self.profile) for head in self.heads]
            of_query = [(dq[..., head, :n], dq[..., head, n:]) for head in self.heads]
        else:
            c = config.kv_lora_rank
            of_latent = [self.back(self.w_uv(head), of_out[head]) for head in self.heads]
            dq, dk, dv = self.attention_gradients(of_latent, grads)
            latent_grad, k_pe_grad = added(dk[..., 0, :c], dv[..., 0, :], profile=self.profile), dk[..., 0, c:]
            of_query = [(self.linear(self.w_uk(head), dq[..., head, :c]), dq[..., head, c:]) for head in self.heads]
            of_w_uk = [weight_gradient(self.query(head)[0], dq[..., head, :c], self.profile) for head in self.heads]
            of_w_uv = [weight_gradient(of_out[head], self.attended[head], self.profile) for head in self.heads]
        grads["kv_b_proj"] = rows([x for pair in zip(of_w_uk, of_w_uv, strict=True) for x in pair])
        uses = [
            self.query_gradients(of_query, of_g, grads),
            self.latent_gradients(latent_grad, k_pe_grad, grads),
        ]
        if config.output_gate in ("head", "element"):
            g_grad = side_by_side(of_g)
            grads["g_proj"] = weight_gradient(g_grad, exact(self.hidden), self.profile)
            uses.append(self.back(self.weights["g_proj"], g_grad, self.all_down))
        total = added(*uses, profile=self.profile)
        return {**grads, "hidden": (total.value, ErrorBound({"of all uses": total.error}))}

    def query_gradients(
        self, of_query: list[tuple[Bounded, Bounded]], of_g: list[Bounded], grads: dict[str, Gradient]
    ) -> Bounded:
        """∂hidden, given ∂(q_nope, q_pe) and ∂g of each head; adds those of weights to ``grads``."""
        config, weights, profile = self.config, self.weights, self.profile
        parts = [(self.cooled(nope), self.rotated(self.cooled(pe), -POSITIONS)) for nope, pe in of_query]
        if config.output_gate == "query":
            grad = side_by_side([side_by_side([*pair, own]) for pair, own in zip(parts, of_g, strict=True)])
            return self.query_and_gate_gradients(grad, grads)
        grad = side_by_side([side_by_side(list(pair)) for pair in parts])
        if config.q_lora_rank is None:
            grads["q_proj"] = weight_gradient(grad, exact(self.hidden), profile)
            return self.back(weights["q_proj"], grad)
        grad = scaled_by_config(grad, config.q_lora_scale, profile)
        grads["q_b_proj"] = weight_gradient(grad, self.c_q, profile)
        of_c_q = foldable(self.back(weights["q_b_proj"], grad), config.q_lora_scale, profile.dtype)
        down, grads["q_a_layernorm"] = rms_norm_gradients(
            self.q_down, weights["q_a_layernorm"], config.latent_norm_eps, of_c_q, profile
        )
        grads["q_a_proj"] = weight_gradient(down, exact(self.hidden), profile)
        return self.back(weights["q_a_proj"], down, self.all_down)

    def query_and_gate_gradients(self, grad: Bounded, grads: dict[str, Gradient]) -> Bounded:
        """∂hidden of A.X-K2's queries, whose latents are projected up as they are too; adds those of weights to ``grads``."""
        weights, profile, rank = self.weights, self.profile, len(self.weights["q_a_proj"])
        grads["q_gate_proj"] = weight_gradient(grad, self.c_q, profile)
        of_both = self.back(weights["q_gate_proj"], grad)
        normed, grads["q_a_layernorm"] = rms_norm_gradients(
            self.q_down, weights["q_a_layernorm"], self.config.latent_norm_eps, of_both[..., :rank], profile
        )
        down = added(normed, of_both[..., rank:], profile=profile)
        grads["q_a_proj"] = weight_gradient(down, exact(self.hidden), profile)
        return self.back(weights["q_a_proj"], down, self.all_down)

    def latent_gradients(self, latent_grad: Bounded, k_pe_grad: Bounded, grads: dict[str, Gradient]) -> Bounded:
        """∂hidden, given ∂latent and ∂k_pe; adds those of weights to ``grads``."""
        config, weights, profile, c = self.config, self.weights, self.profile, self.config.kv_lora_rank
        latent_grad = scaled_by_config(latent_grad, config.kv_lora_scale, profile)
        latent_grad = foldable(latent_grad, config.kv_lora_scale, profile.dtype)
        down, grads["kv_a_layernorm"] = rms_norm_gradients(
            self.kv_down[..., :c], weights["kv_a_layernorm"], config.latent_norm_eps, latent_grad, profile
        )
        before = self.rotated(k_pe_grad, -POSITIONS)
        if config.k_pe_norm:
            weight, eps = weights["k_rope_only_layernorm"], config.latent_norm_eps
            before, grads["k_rope_only_layernorm"] = rms_norm_gradients(
                self.kv_down[..., c:], weight, eps, before, profile
            )
        both = side_by_side([down, before])
        grads["kv_a_proj_with_mqa"] = weight_gradient(both, exact(self.hidden), profile)
        return self.back(weights["kv_a_proj_with_mqa"], both, self.all_down)

    @property
    def all_down(self) -> int | None:
        """Outputs of q_a_proj, kv_a_proj_with_mqa and g_proj, which may be one projection."""
        if self.config.q_lora_rank is None:
            return None
        gates = len(self.weights["g_proj"]) if self.config.output_gate in ("head", "element") else 0
        return len(self.weights["q_a_proj"]) + len(self.weights["kv_a_proj_with_mqa"]) + gates


def rows(grads: list[Gradient]) -> Gradient:
    """Gradients of the rows of a weight, one below the other."""
    errors = np.concatenate([bound.total for _, bound in grads])
    return np.concatenate([value for value, _ in grads]), ErrorBound({"of each head": errors})


def composed(name: str, form: Any, **changes: Any) -> Composed:
    config, rng = CONFIGS[name], np.random.default_rng(0)
    weights = {
        name: round_to(rng.uniform(0.5, 1.5, shape) if len(shape) == 1 else 0.4 * rng.standard_normal(shape), "float16")
        for name, shape in weight_shapes(config).items()
    }
    hidden = round_to(rng.standard_normal((B, S, config.hidden_size)), "float16")
    return Composed(hidden, weights, config, Profile.default("float32", form=form, **changes))


def assert_same(got: Bounded, want: Bounded) -> None:
    """Up to sums of float64 in another order, which reach the errors through what they are rounded to."""
    np.testing.assert_allclose(got.value, want.value, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(got.error, want.error, rtol=1e-6)


@pytest.mark.parametrize("form", ["explicit", "absorbed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_bound_of_a_layer_is_composed_of_its_steps(name: str, form: Any) -> None:
    layer = composed(name, form, cache_dequantised="bfloat16")  # which is not a layer's own
    arguments = layer.hidden, POSITIONS, layer.weights, layer.config, layer.profile
    got, want = bounded_layer(*arguments), layer.bounded()
    for field in fields(BoundedLayer):
        assert_same(getattr(got, field.name), getattr(want, field.name))
    value, bound = layer_with_bound(*arguments)
    assert_same(Bounded(value, bound.total), layer.linear(layer.weights["o_proj"], layer.out))


@pytest.mark.parametrize("form", ["explicit", "absorbed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_bound_of_a_layers_gradients_is_composed_of_its_steps(name: str, form: Any) -> None:
    layer = composed(name, form)
    out_grad = np.random.default_rng(1).standard_normal(layer.hidden.shape)
    hidden, weights = layer_backward_with_bound(
        layer.hidden, POSITIONS, layer.weights, layer.config, out_grad, layer.profile
    )
    got, want = {**weights, "hidden": hidden}, layer.gradients(out_grad)
    assert list(weights) == list(layer.weights)
    assert [*hidden[1].terms] == ["error of earlier stages"]
    assert got.keys() == want.keys()
    for parameter, (value, bound) in got.items():
        exact_value, error = want[parameter]
        assert_same(Bounded(value, bound.total), Bounded(exact_value, error.total))
