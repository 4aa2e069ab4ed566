"""``layer``: one MLA attention layer with its own cache.

``layer(weights, config)`` returns an object. Its ``prefill(hidden, positions)`` and ``decode(hidden, positions)`` take hidden
[b, s, e] and positions int64 [b, s], append to the layer's own cache, and return [b, s, e]. ``reset()`` empties the cache;
``cache_bytes()`` is what its rows occupy. weights have their checkpoint names and shapes
(``mla_spec.reference.mla.weight_shapes``), and ``config`` is an ``MLAConfig``.

Where a subject is not made for some configurations, ``supports_layer(config)`` returns why, or "". A layer without ``decode``
has no cache, and one without ``reset`` or ``cache_bytes`` is not asked for them; what it is given and cannot take, it may refuse
with ``mla_spec.Unsupported``. What a layer is, ``Supports`` says, and then it is not asked for more: ``layer_cache``,
``layer_max_decode``, ``layer_chunks``, ``layer_thetas``, ``layer_max_positions``, ``layer_multiples``, ``layer_equal_head_dims``,
``layer_min_rope_dim``, ``q_lora_rank``, ``rope_layouts``, ``cache_page``.

A layer may hand out the stages of a call. Its ``trace(method, hidden, positions)`` does what "prefill" or "decode" does, and
returns those that it has, by name: q_a_proj and q_a_layernorm [b, s, q_lora_rank], q_nope [b, s, h, n] and q_pe [b, s, h, r] as
they meet the keys, kv_a_proj_with_mqa [b, s, c+r], kv_a_layernorm [b, s, c], latent [b, s, c] and k_pe [b, s, r] as they are
cached, lse [b, h, s], attention [b, s, h, v], with a gate g_proj [b, s, h or h·v] and gated [b, s, h, v], and o_proj, the output.
Those named for a weight are what that module gives.

``config.output_gate`` multiplies the result of attention by sigmoid(g_proj) of the tokens before o_proj, each "head" or each
"element" of it, or "query": each element, by gates that q_gate_proj gives with the queries, from the query latent after its norm
and before it; ``config.attention_sink`` adds to the softmax a logit of each head without a value, ``weights["sinks"]`` [h]. A
subject gets no layer with a gate that ``supports.output_gate`` does not name, and none with a sink unless ``supports.dense_sink``
names "layer". Their gradients are not judged.

The tensors of weights stay the caller's, who may overwrite what they hold, as an optimizer does, or a trainer that sends its
weights to an inference engine. After that and a ``reset()`` a layer uses the new ones, unless ``supports.layer_weights`` is
"copied".

Between calls a layer keeps no more memory than its cache, tables and workspaces aside, which are made once. Layers that one
subject makes are independent of each other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from mla_spec.operations.case import Case
from mla_spec.operations.regimes import Regime
from mla_spec.operations.rope import longrope_factors, make_rope
from mla_spec.reference.config import Llama4Scaling, MLAConfig
from mla_spec.reference.formats import round_to
from mla_spec.reference.mla import weight_shapes
from mla_spec.reference.published import PublishedModel, published_models
from mla_spec.reference.typing import Array, IntArray
from mla_spec.subjects.driver import TORCH_DTYPES, Driver, Result, Tensors
from mla_spec.subjects.extent import require_extent
from mla_spec.subjects.supports import LAYER_DIMS, Supports
from mla_spec.subjects.violation import NotOffered, Unsupported, Violation

Shape = tuple[int, ...]

APART = 5
"""Positions from the beginning of one sequence of a batch to that of the next."""

LLAMA_4_SCALING = Llama4Scaling(beta=0.1, original_max_position_embeddings=64)
"""The temperature of cases that have one and are of no published model: seen from position 64 on."""


@lru_cache(maxsize=1)
def layer_models() -> Mapping[str, PublishedModel]:
    """The verified MLA models whose options an MLAConfig expresses, by their names in case ids.

    A small layer has LongRoPE factors of its own: there are as many as pairs of rope dims.
    """
    return {
        re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-"): model
        for name, model in published_models().items()
        if model.is_mla and model.verified and not model.not_modelled and not _no_frequencies(model)
    }


def _no_frequencies(model: PublishedModel) -> bool:
    return model.fields["rope"] == "rotary" and model.fields["rope_theta"] is None


@dataclass(frozen=True)
class LayerInputs:
    """Weights, configuration and tokens of a layer; values exactly representable in the dtype."""

    weights: dict[str, Array]
    config: MLAConfig
    hidden: Array  # [b, s, e], prompt and decoded tokens
    positions: IntArray  # [b, s]


@dataclass(frozen=True, kw_only=True)
class LayerCase(Case):
    """A layer, a prompt and the tokens decoded after it.

    ``model`` names one of ``layer_models``, whose options then replace those of the case: eps, rotary embedding and scaling,
    factors on latents and queries. Widths stay the case's. ``weights`` "dense" are Gaussian; "aligned" have one entry per row on the way to the scores and no sign changes on the
    way to the output, so that a worst-case bound in 16-bit formats still means something; ``gain`` scales the queries and
    ``hidden_scale`` the tokens (small ones make the eps of the norms visible).
    """

    kind = "layer"
    optional = ("k_pe_norm", "output_gate", "attention_sink")
    batch: int = 1
    prompt: int = 1
    steps: int = 0
    hidden_size: int = 8
    num_heads: int = 1
    q_lora_rank: int | None = None
    kv_lora_rank: int = 4
    qk_nope_head_dim: int = 2
    qk_rope_head_dim: int = 2
    v_head_dim: int = 3
    layout: str = "interleaved"
    theta: float = 10000.0
    yarn: str = "none"
    longrope: str = "none"
    start: int = 0
    latent_norm_eps: float = 1e-6
    mla_scale_q_lora: bool = False
    mla_scale_kv_lora: bool = False
    k_pe_norm: bool = False
    llama_4_scaling: bool = False
    output_gate: str = "none"
    attention_sink: bool = False
    model: str = "none"
    weights: str = "dense"
    gain: float = 1.0
    hidden_scale: float = 1.0

    @property
    def config(self) -> MLAConfig:
        if self.model != "none":
            return self._config_of_model(layer_models()[self.model])
        return MLAConfig(
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            **self._widths,
            rope=make_rope(
                dim=self.qk_rope_head_dim,
                layout=self.layout,
                theta=self.theta,
                yarn=self.yarn,
                longrope=self.longrope,
            ),
            latent_norm_eps=self.latent_norm_eps,
            mla_scale_q_lora=self.mla_scale_q_lora,
            mla_scale_kv_lora=self.mla_scale_kv_lora,
            k_pe_norm=self.k_pe_norm,
            llama_4_scaling=LLAMA_4_SCALING if self.llama_4_scaling else None,
            output_gate=None if self.output_gate == "none" else self.output_gate,  # type: ignore[arg-type]
            attention_sink=self.attention_sink,
        )

    @property
    def _widths(self) -> dict[str, Any]:
        names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        return {name: getattr(self, name) for name in names}

    def _config_of_model(self, model: PublishedModel) -> MLAConfig:
        widths = {"hidden_size": self.hidden_size, "num_attention_heads": self.num_heads, **self._widths}
        scaling = model.fields["rope_scaling"]
        if scaling is not None and scaling["type"] == "longrope":
            scaling = {**scaling, **longrope_factors(self.qk_rope_head_dim)}
        return replace(model, fields={**model.fields, **widths, "rope_scaling": scaling}).mla_config()

    def build(self) -> LayerInputs:
        """The inputs."""
        rng = self.generator()
        config = self.config
        make = self._aligned if self.weights == "aligned" else self._dense
        weights = {name: round_to(w, self.dtype) for name, w in make(rng, config).items()}
        s = self.prompt + self.steps
        shape = (self.batch, s, self.hidden_size)
        hidden = rng.uniform(0.25, 2.0, shape) if self.weights == "aligned" else rng.standard_normal(shape)
        return LayerInputs(
            weights=weights,
            config=config,
            hidden=round_to(hidden * self.hidden_scale, self.dtype),
            positions=self.start + np.arange(s) + APART * np.arange(self.batch)[:, None],
        )

    def _dense(self, rng: np.random.Generator, config: MLAConfig) -> dict[str, Array]:
        weights = {}
        for name, shape in weight_shapes(config).items():
            if name.endswith("layernorm"):
                weights[name] = 1 + 0.25 * rng.uniform(-1, 1, shape)
            elif name == "sinks":
                weights[name] = rng.uniform(-1, 2, shape)  # of scores of a few keys
            else:
                weights[name] = rng.standard_normal(shape) / np.sqrt(shape[1])
        return self._with_gain(weights, self.gain)

    def _aligned(self, rng: np.random.Generator, config: MLAConfig) -> dict[str, Array]:
        c, n = config.kv_lora_rank, config.qk_nope_head_dim
        weights = {}
        for name, shape in weight_shapes(config).items():
            if name.endswith("layernorm"):
                weights[name] = 1 + 0.25 * rng.uniform(-1, 1, shape)
                continue
            if name == "sinks":
                weights[name] = rng.uniform(-1, 2, shape)
                continue
            w = np.zeros(shape)
            w[np.arange(shape[0]), rng.integers(0, shape[1], shape[0])] = rng.uniform(0.5, 1.5, shape[0])
            signs = rng.choice([-1.0, 1.0], shape[0])
            if name == "kv_a_proj_with_mqa":
                signs[:c] = 1.0
            if name == "kv_b_proj":
                signs.reshape(config.num_heads, -1)[:, n:] = 1.0
            weights[name] = w * signs[:, None]
        weights["o_proj"] = rng.uniform(0, 1, weights["o_proj"].shape) / weights["o_proj"].shape[1]
        # Scores of the same size whatever the width and the factors on them, since their errors grow with their size.
        factors = config.scale * config.q_lora_scale * max(1.0, config.kv_lora_scale)
        return self._with_gain(weights, 2 * self.gain / (factors * config.qk_head_dim))

    def _with_gain(self, weights: dict[str, Array], gain: float) -> dict[str, Array]:
        if "q_gate_proj" in weights:
            rows = weights["q_gate_proj"].reshape(self.num_heads, -1, weights["q_gate_proj"].shape[-1]).copy()
            rows[:, : self.config.qk_head_dim] *= gain
            weights["q_gate_proj"] = rows.reshape(weights["q_gate_proj"].shape)
            return weights
        name = "q_proj" if "q_proj" in weights else "q_b_proj"
        weights[name] = weights[name] * gain
        return weights


REGIMES: tuple[Regime, ...] = (
    ("one token in all", lambda case: case.prompt + case.steps == 1),
    ("a prompt of several", lambda case: case.prompt > 1),
    ("query compression", lambda case: case.q_lora_rank is not None),
    ("no query compression", lambda case: case.q_lora_rank is None),
    ("a published model", lambda case: case.model != "none"),
    ("no rotary embedding", lambda case: case.config.rope is None),
    ("rotary embedding", lambda case: case.config.rope is not None),
    ("factors on latents", lambda case: case.config.mla_scale_q_lora or case.config.mla_scale_kv_lora),
    ("norm on k_pe", lambda case: case.config.k_pe_norm),
    ("output gate", lambda case: case.config.output_gate is not None),
    ("attention sink", lambda case: case.config.attention_sink),
    ("temperature by position", lambda case: case.config.llama_4_scaling is not None),
    ("small hidden states", lambda case: case.hidden_scale < 1),
)
DECODING: tuple[Regime, ...] = (
    ("decoded tokens", lambda case: case.steps > 0),
    ("no decoded token", lambda case: case.steps == 0),
)


def make_layer(driver: Driver, weights: Tensors, config: MLAConfig) -> Any:
    """A layer object of the driver's subject; Unsupported where ``supports_layer(config)`` says why there is none."""
    subject = driver.subject
    reason = driver.guard(lambda: subject.supports_layer(config)) if hasattr(subject, "supports_layer") else ""
    if not isinstance(reason, str):
        raise Violation(f'supports_layer must return a reason or "", got {type(reason).__name__}')
    reason = reason or _refused(driver.supports, config)
    if reason:
        raise Unsupported(reason)
    return driver.guard(lambda: subject.layer(weights, config))


def _refused(supports: Supports, config: MLAConfig) -> str:
    """Why what the subject declares rules a configuration out that a frozen case, or a published model, may have."""
    if config.q_lora_rank is None and supports.q_lora_rank == "required":
        return "q_lora_rank is required"
    if config.rope is not None and not supports.rope_layouts:
        return "there is no rotary embedding"
    if config.output_gate is not None and config.output_gate not in supports.output_gate:
        kind = "from the query" if config.output_gate == "query" else f"of each {config.output_gate}"
        return f"there is no gate {kind}"
    if config.attention_sink and "layer" not in supports.dense_sink:
        return "there is no attention sink"
    if reason := _refused_dims(supports, config):
        return reason
    if config.rope is not None and config.rope.theta not in (supports.layer_thetas or (config.rope.theta,)):
        return f"theta is one of {', '.join(f'{theta:g}' for theta in supports.layer_thetas or ())}"
    scaled = config.mla_scale_kv_lora and (config.q_lora_rank is None or config.mla_scale_q_lora)
    return "latents always have a scale" if supports.mla_scale_lora == "always" and not scaled else ""


def _refused_dims(supports: Supports, config: MLAConfig) -> str:
    """The same of its dimensions."""
    for name in LAYER_DIMS:
        if (getattr(config, name) or 0) % supports.multiple_of(name):
            return f"{name} is a multiple of {supports.multiple_of(name)}"
    if supports.layer_equal_head_dims and config.qk_nope_head_dim != config.v_head_dim:
        return "qk_nope_head_dim and v_head_dim are equal"
    least = supports.layer_min_rope_dim
    return f"qk_rope_head_dim is at least {least}" if 0 < config.qk_rope_head_dim < least else ""


class LayerDriver:
    """One layer object of a subject."""

    def __init__(self, driver: Driver, layer: Any, weights: Tensors) -> None:
        self.driver = driver
        self.layer = layer
        self.weights = weights
        self.tokens = 0

    @classmethod
    def of(cls, driver: Driver, weights: Mapping[str, Array], config: MLAConfig) -> LayerDriver:
        """A layer of the driver's subject."""
        return cls.holding(driver, {name: driver.tensor(w) for name, w in weights.items()}, config)

    @classmethod
    def holding(cls, driver: Driver, tensors: Tensors, config: MLAConfig) -> LayerDriver:
        """A layer made from these very tensors."""
        return cls(driver, make_layer(driver, tensors, config), tensors)

    def overwrite_weights(self, weights: Mapping[str, Array]) -> None:
        """Write other weights where these lie, without a trace in autograd's count of versions."""
        for name, w in weights.items():
            self.weights[name].data.copy_(self.driver.tensor(w))

    def run(self, method: str, hidden: Array, positions: IntArray) -> Result:
        """``prefill`` or ``decode`` of hidden [b, s, e] at positions [b, s]."""
        out = self.call(method, self.driver.tensor(hidden), self.driver.integers(positions, torch.int64))
        return self.driver.result(out, f"{method} output", hidden.shape)

    def call(self, method: str, hidden: torch.Tensor, positions: torch.Tensor) -> Any:
        """What ``prefill`` or ``decode`` returns, unread."""
        function = self._method(method)
        self._require_declared(method, hidden, positions)
        return self.driver.guard(lambda: function(hidden, positions))

    def _require_declared(self, method: str, hidden: torch.Tensor, positions: torch.Tensor) -> None:
        """Raise Unsupported where the call is more than the subject declares."""
        supports, count = self.driver.supports, hidden.shape[1]
        if method == "prefill" and self.tokens and not supports.layer_chunks:
            raise Unsupported("its prefill continues no cache")
        if method == "decode" and count > (supports.layer_max_decode or count):
            raise Unsupported(f"layer_max_decode={supports.layer_max_decode}, and a call has {count} tokens")
        self.tokens += count
        require_extent(supports, len(hidden), self.tokens)
        most = supports.layer_max_positions
        if most is not None and int(positions.max()) >= most:
            raise Unsupported(f"layer_max_positions={most}, and a call has position {int(positions.max())}")

    def trace(self, method: str, hidden: Array, positions: IntArray, shapes: dict[str, Shape]) -> dict[str, Result]:
        """The stages that the layer hands out of a call, by name; Violation where one is none of ``shapes``."""
        function = self._method("trace")
        tokens = self.driver.tensor(hidden), self.driver.integers(positions, torch.int64)
        self._require_declared(method, *tokens)
        stages = self.driver.guard(lambda: function(method, *tokens))
        if not isinstance(stages, Mapping) or not stages.keys() <= shapes.keys():
            told = ", ".join(map(str, stages)) if isinstance(stages, Mapping) else type(stages).__name__
            raise Violation(f"trace must return a dict of some of {', '.join(shapes)}, got {told}")
        dtypes = (TORCH_DTYPES[self.driver.dtype], torch.float32, torch.float64)
        what = {name: f"stage {name} of {method}" for name in stages}
        return {name: self.driver.result(x, what[name], shapes[name], dtypes) for name, x in stages.items()}

    def reset(self) -> None:
        self.tokens = 0
        if self.driver.supports.layer_cache == "none" and not hasattr(self.layer, "reset"):
            return
        self.driver.guard(self._method("reset"))

    def cache_bytes(self) -> int:
        count = self.driver.guard(self._method("cache_bytes"))
        if isinstance(count, bool) or not isinstance(count, int):
            raise Violation(f"cache_bytes must return an int, got {type(count).__name__}")
        return count

    def _method(self, name: str) -> Any:
        """A method of the layer; NotOffered where it has none."""
        method = getattr(self.layer, name, None)
        if not callable(method):
            raise NotOffered(f"its layer has no {name}")
        return method
