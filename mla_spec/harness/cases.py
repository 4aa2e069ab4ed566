"""Cases: the inputs of one call, as plain data that can be written down, replayed and built again.

A case holds structure and a seed; ``build`` makes the values from a seeded generator, exactly representable in the case's
dtype. Its id is one string that carries all of it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar, get_type_hints

import numpy as np

from mla_spec.reference.config import MLAConfig, RopeConfig, YarnScaling
from mla_spec.reference.formats import round_to
from mla_spec.reference.mla import weight_shapes
from mla_spec.reference.typing import Array, IntArray

YARN = {
    "none": None,
    "deepseek-v3": YarnScaling(factor=40, original_max_position_embeddings=4096, ramp_guard=0.001),
    "short": YarnScaling(factor=4, original_max_position_embeddings=64, beta_fast=8, ramp_guard=0.001),
    "kimi-k2": YarnScaling(factor=32, original_max_position_embeddings=4096, beta_fast=1, ramp_guard=0.001),
    "ratio": YarnScaling(
        factor=8, original_max_position_embeddings=256, mscale=1.0, mscale_all_dim=0.5, ramp_guard=0.001
    ),
    "cos-sin-only": YarnScaling(
        factor=16, original_max_position_embeddings=128, mscale=1.0, mscale_all_dim=0.0, ramp_guard=0.001
    ),
    "empty-range": YarnScaling(factor=4, original_max_position_embeddings=6, ramp_guard=0.001),
}
"""YaRN scalings by the name a case holds. "ratio" and "cos-sin-only" put a factor on cos and sin; the correction range of
"empty-range" has no width, so that its ramp is that of the guard."""

C = TypeVar("C", bound="Case")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Base of all cases. ``kind`` begins the id."""

    kind: ClassVar[str]
    dtype: str
    seed: int = 0

    @property
    def id(self) -> str:
        """kind:field=value,...; tuples are joined by "+"."""
        return f"{self.kind}:" + ",".join(f"{f.name}={_write(getattr(self, f.name))}" for f in fields(self))

    def generator(self) -> np.random.Generator:
        """The generator of the case's values."""
        return np.random.default_rng([self.seed, sum(self.kind.encode())])


def _write(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(str(v) for v in value)
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _read(text: str, hint: Any) -> Any:
    if hint is bool:
        return {"true": True, "false": False}[text]
    if hint == int | None:
        return None if text == "none" else int(text)
    if hint == tuple[int, ...]:
        return tuple(int(part) for part in text.split("+") if part)
    return hint(text)


def parse_case(text: str) -> Case:
    """The case with this id; ValueError names the part that cannot be read."""
    kind, _, rest = text.partition(":")
    classes = {c.kind: c for c in (RopeCase, DecodeCase, LayerCase)}
    if kind not in classes:
        raise ValueError(f"case {text!r}: unknown kind {kind!r}; known are {', '.join(classes)}")
    cls = classes[kind]
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for part in rest.split(","):
        name, _, value = part.partition("=")
        if name not in hints or name == "kind":
            raise ValueError(f"case {text!r}: a {kind} case has no field {name!r}")
        try:
            values[name] = _read(value, hints[name])
        except (ValueError, KeyError):
            raise ValueError(f"case {text!r}: {name} cannot be {value!r}") from None
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"case {text!r}: {error}") from None


def make_rope(*, dim: int, layout: str, theta: float, yarn: str) -> RopeConfig | None:
    """The RopeConfig a case describes; None for layout "none"."""
    if layout == "none" or dim == 0:
        return None
    return RopeConfig(dim=dim, theta=theta, interleaved=layout == "interleaved", yarn=YARN[yarn])


@dataclass(frozen=True, kw_only=True)
class RopeCase(Case):
    """Vectors to rotate: x [batch, s, (heads,) dim] at positions start, start + stride, ...; heads 0 means no axis.

    ``shift`` is the common shift of the relative-position law.
    """

    kind = "rope"
    batch: int = 1
    s: int = 1
    heads: int = 0
    dim: int = 2
    layout: str = "interleaved"
    theta: float = 10000.0
    yarn: str = "none"
    start: int = 0
    stride: int = 1
    shift: int = 1

    @property
    def rope(self) -> RopeConfig:
        rope = make_rope(dim=self.dim, layout=self.layout, theta=self.theta, yarn=self.yarn)
        assert rope is not None
        return rope

    def positions(self) -> IntArray:
        """[batch, s], different in each sequence."""
        return self.start + self.stride * np.arange(self.s) + 3 * np.arange(self.batch)[:, None]

    def vectors(self, count: int) -> list[Array]:
        """``count`` arrays of standard normal values, rounded to the dtype."""
        shape = (self.batch, self.s, *([self.heads] if self.heads else []), self.dim)
        rng = self.generator()
        return [round_to(rng.standard_normal(shape), self.dtype) for _ in range(count)]


@dataclass(frozen=True)
class DecodeInputs:
    """Arguments of ``decode``: float64 values exactly representable in the dtype, and integer tables."""

    q: Array  # [b, s, h, c+r]
    kv_cache: Array  # [pages, page_size, 1, c+r]
    block_table: IntArray  # [b, max pages]
    cache_seqlens: IntArray  # [b]
    head_dim_v: int
    softmax_scale: float
    causal: bool


@dataclass(frozen=True, kw_only=True)
class DecodeCase(Case):
    """Queries against a paged latent cache.

    ``logit_std`` is the standard deviation of the logits, reached through softmax_scale. ``regime``: "typical"; "outlier"
    has latent channels 30 times the rest; "ties" repeats keys; "offset" has values far from 0; "sink" gives the first key
    much of the weight. Latents have a mean, as real ones do, so outputs do not average out to 0. ``qk_nope_head_dim`` and
    ``v_head_dim`` are those of the explicit form.
    """

    kind = "decode"
    seqlens: tuple[int, ...] = (1,)
    s: int = 1
    num_heads: int = 1
    kv_lora_rank: int = 1
    qk_rope_head_dim: int = 0
    page_size: int = 1
    causal: bool = True
    logit_std: float = 1.0
    regime: str = "typical"
    qk_nope_head_dim: int = 2
    v_head_dim: int = 3

    @property
    def pages_needed(self) -> list[int]:
        return [-(-n // self.page_size) for n in self.seqlens]

    def build(self) -> DecodeInputs:
        """The inputs: pages in random order in a pool with spare pages, unused slots and entries harmless."""
        rng = self.generator()
        b, h, c, d = len(self.seqlens), self.num_heads, self.kv_lora_rank, self.kv_lora_rank + self.qk_rope_head_dim
        width = max(self.pages_needed) + 2
        pool = sum(self.pages_needed) + 3
        table = rng.integers(0, pool, (b, width)).astype(np.int32)
        order = iter(rng.permutation(pool))
        for row, count in zip(table, self.pages_needed, strict=True):
            row[:count] = [next(order) for _ in range(count)]
        cache = self._rows(rng, (pool, self.page_size, 1), c, d)
        q = rng.standard_normal((b, self.s, h, d))
        if self.regime == "sink":
            for i in range(b):
                cache[table[i, 0], 0, 0] = np.abs(cache[table[i, 0], 0, 0]) * np.sign(q[i].sum(axis=(0, 1)))
        q, cache = round_to(q, self.dtype), round_to(cache, self.dtype)
        scale = self.logit_std / np.sqrt(c / 4 + self.qk_rope_head_dim)
        return DecodeInputs(
            q=q,
            kv_cache=cache,
            block_table=table,
            cache_seqlens=np.array(self.seqlens, dtype=np.int32),
            head_dim_v=c,
            softmax_scale=float(scale),
            causal=self.causal,
        )

    def _rows(self, rng: np.random.Generator, lead: tuple[int, ...], c: int, d: int) -> Array:
        rows = rng.standard_normal((*lead, d))
        mean = rng.choice([-1.0, 1.0], c)
        spread = np.full(c, 0.5)
        if self.regime == "offset":
            mean, spread = 8 * mean, np.full(c, 0.25)
        if self.regime == "outlier":
            mean, spread = mean, np.where(rng.random(c) < 0.1, 15.0, 0.5)
        rows[..., :c] = mean + spread * rows[..., :c]
        if self.regime == "ties":
            rows[1::2] = rows[: rows.shape[0] // 2]
        return rows

    def latent_weights(self) -> tuple[Array, MLAConfig, Array]:
        """(kv_b_proj, config, q_nope [b, s, h, n]) of the explicit form behind the case, rounded to the dtype."""
        config = MLAConfig(
            hidden_size=1,
            num_heads=self.num_heads,
            q_lora_rank=None,
            kv_lora_rank=self.kv_lora_rank,
            qk_nope_head_dim=self.qk_nope_head_dim,
            qk_rope_head_dim=self.qk_rope_head_dim,
            v_head_dim=self.v_head_dim,
        )
        rng = np.random.default_rng([self.seed, 1])
        kv_b_proj = rng.standard_normal(weight_shapes(config)["kv_b_proj"]) / np.sqrt(self.kv_lora_rank)
        q_nope = rng.standard_normal((len(self.seqlens), self.s, self.num_heads, self.qk_nope_head_dim))
        return round_to(kv_b_proj, self.dtype), config, round_to(q_nope, self.dtype)


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

    ``weights`` "dense" are Gaussian; "aligned" have one entry per row on the way to the scores and no sign changes on the
    way to the output, so that a worst-case bound in 16-bit formats still means something; ``gain`` scales the queries and
    ``hidden_scale`` the tokens (small ones make the eps of the norms visible).
    """

    kind = "layer"
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
    start: int = 0
    latent_norm_eps: float = 1e-6
    weights: str = "dense"
    gain: float = 1.0
    hidden_scale: float = 1.0

    @property
    def config(self) -> MLAConfig:
        return MLAConfig(
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            q_lora_rank=self.q_lora_rank,
            kv_lora_rank=self.kv_lora_rank,
            qk_nope_head_dim=self.qk_nope_head_dim,
            qk_rope_head_dim=self.qk_rope_head_dim,
            v_head_dim=self.v_head_dim,
            rope=make_rope(dim=self.qk_rope_head_dim, layout=self.layout, theta=self.theta, yarn=self.yarn),
            latent_norm_eps=self.latent_norm_eps,
        )

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
            positions=self.start + np.arange(s) + 5 * np.arange(self.batch)[:, None],
        )

    def _dense(self, rng: np.random.Generator, config: MLAConfig) -> dict[str, Array]:
        weights = {}
        for name, shape in weight_shapes(config).items():
            if name.endswith("layernorm"):
                weights[name] = 1 + 0.25 * rng.uniform(-1, 1, shape)
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
            w = np.zeros(shape)
            w[np.arange(shape[0]), rng.integers(0, shape[1], shape[0])] = rng.uniform(0.5, 1.5, shape[0])
            signs = rng.choice([-1.0, 1.0], shape[0])
            if name == "kv_a_proj_with_mqa":
                signs[:c] = 1.0
            if name == "kv_b_proj":
                signs.reshape(config.num_heads, -1)[:, n:] = 1.0
            weights[name] = w * signs[:, None]
        weights["o_proj"] = rng.uniform(0, 1, weights["o_proj"].shape) / weights["o_proj"].shape[1]
        # Scores of the same size whatever the width and YaRN's mscale², since their errors grow with their size.
        return self._with_gain(weights, 2 * self.gain / (config.scale * config.qk_head_dim))

    def _with_gain(self, weights: dict[str, Array], gain: float) -> dict[str, Array]:
        name = "q_proj" if "q_proj" in weights else "q_b_proj"
        weights[name] = weights[name] * gain
        return weights
