"""The cases of the corpus: what each one is for, and its inputs, made of an exact integer recurrence.

Inputs are dyadic rationals k / 2^n of at most as many bits as the dtype holds, so they are the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mla_spec.reference.config import MLAConfig, RopeConfig, YarnScaling
from mla_spec.reference.formats import format_of
from mla_spec.reference.mla import weight_shapes
from mla_spec.reference.rope import half_from_interleaved
from mla_spec.reference.typing import Array

Values = Mapping[str, NDArray[Any]]

CANONICAL_NAN = np.array([0x7FF8000000000000], dtype="<u8").view("<f8")[0]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs of one operation.

    Attributes:
        name: also the beginning of its files' names.
        operation: a key of ``mla_spec.golden.expected.EXPECTED``.
        purpose: what is checked.
        catches: the kinds of fault that show here, in words.
        parameters: what the operation takes beside arrays; plain JSON.
        inputs: float64 (exactly representable in ``dtype``) and integer arrays.
        dtype: in which floating-point inputs are stored; results are float64.
        exact: results of which float64 arithmetic gives the expected bits in any order of its sums.
    """

    name: str
    operation: str
    purpose: str
    catches: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    inputs: Values
    dtype: str = "float64"
    exact: tuple[str, ...] = ()


class Numbers:
    """Pseudo-random numbers by the 64-bit recurrence of SplitMix64 (Steele, Lea and Flood 2014), in Python integers."""

    _MASK = 2**64 - 1

    def __init__(self, name: str) -> None:
        self._state = int.from_bytes(name.encode(), "little") & self._MASK
        for byte in name.encode():
            self._state = self._next() ^ byte

    def _next(self) -> int:
        self._state = (self._state + 0x9E3779B97F4A7C15) & self._MASK
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & self._MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & self._MASK
        return z ^ (z >> 31)

    def below(self, n: int) -> int:
        """An integer of 0 .. n - 1."""
        return self._next() % n

    def array(self, *shape: int, size: float = 1.0, centre: float = 0.0, dtype: str = "float64") -> Array:
        """Multiples of an ulp of ``dtype`` between centre − size and centre + size, both powers of two or 0."""
        precision = format_of(dtype).precision
        most = 2 ** (precision - (2 if centre else 1))
        numbers = [self.below(2 * most - 1) + 1 - most for _ in range(math.prod(shape))]
        return centre + np.array([k * (size / most) for k in numbers]).reshape(shape)

    def permutation(self, n: int) -> list[int]:
        order = list(range(n))
        for i in range(n - 1, 0, -1):
            j = self.below(i + 1)
            order[i], order[j] = order[j], order[i]
        return order


# Parameters


def rope_from(parameters: Mapping[str, Any]) -> RopeConfig:
    """The RopeConfig whose fields ``parameters`` holds."""
    fields = dict(parameters)
    yarn = fields.pop("yarn")
    return RopeConfig(**fields, yarn=None if yarn is None else YarnScaling(**yarn))


def config_from(parameters: Mapping[str, Any]) -> MLAConfig:
    """The MLAConfig whose fields ``parameters`` holds."""
    fields = dict(parameters)
    rope = fields.pop("rope")
    return MLAConfig(**fields, rope=None if rope is None else rope_from(rope))


def layer_weights(inputs: Values) -> dict[str, Array]:
    """The inputs whose names begin with "weights."."""
    prefix = "weights."
    return {name.removeprefix(prefix): x for name, x in inputs.items() if name.startswith(prefix)}


# Cases

POSITIONS = (0, 1, 4095, 4096, 163839, 2**20)

DEEPSEEK_V3 = RopeConfig(dim=64, yarn=YarnScaling(factor=40, original_max_position_embeddings=4096, ramp_guard=0.001))
KIMI_K2 = RopeConfig(
    dim=64,
    theta=50000.0,
    yarn=YarnScaling(factor=32, original_max_position_embeddings=4096, beta_fast=1, ramp_guard=0.001),
)
SHORT_YARN = YarnScaling(
    factor=4, original_max_position_embeddings=64, beta_fast=8, mscale=0.75, mscale_all_dim=0.75, ramp_guard=0.001
)
RATIO_YARN = YarnScaling(factor=8, original_max_position_embeddings=256, mscale_all_dim=0.5, ramp_guard=0.001)


def cases() -> list[Case]:
    """All cases, in the order of the manifest."""
    return [*_rope_cases(), *_small_cases(), *_layer_cases(), *_prefill_cases(), *_decode_cases(), *_merge_cases()]


def _rope_cases() -> Iterator[Case]:
    positions = np.array(POSITIONS)
    for name, rope, catches in (
        (
            "rope-table-plain",
            RopeConfig(dim=16),
            "frequencies theta^(-i/r) in place of theta^(-2i/r); angles formed in float32 or bfloat16",
        ),
        (
            "rope-table-yarn",
            DEEPSEEK_V3,
            "YaRN left out, its ramp reversed, or its factor applied to every pair",
        ),
        (
            "rope-table-yarn-narrow",
            KIMI_K2,
            "a correction range whose ends are not rounded down and up, so that the ramp has no width",
        ),
    ):
        yield Case(
            name=name,
            operation="rope_table",
            purpose="frequencies, and cos and sin without any factor, at positions up to 2^20",
            catches=catches,
            parameters={"rope": asdict(rope)},
            inputs={"positions": positions},
        )
    x = Numbers("rope-layouts").array(len(POSITIONS), 2, 8)  # [s, h, r]
    half = half_from_interleaved(8)
    for name, rope, values, purpose, catches in (
        (
            "rope-interleaved",
            RopeConfig(dim=8),
            x,
            "pairs (2i, 2i+1) rotated, every head by the angle of its position",
            "pairs (i, i + r/2) rotated in their place; the sine with the wrong sign; heads taken for positions",
        ),
        (
            "rope-half",
            RopeConfig(dim=8, interleaved=False),
            x[..., half],
            "pairs (i, i + r/2) rotated; input and result are those of rope-interleaved in the order 0, 2, .., 1, 3, ..",
            "weights permuted for one layout and rotated in the other",
        ),
        (
            "rope-yarn-factor",
            RopeConfig(dim=8, yarn=RATIO_YARN),
            x,
            "YaRN with mscale unlike mscale_all_dim: cos and sin carry the ratio of both",
            "the factor on cos and sin left out or squared",
        ),
    ):
        yield Case(
            name=name,
            operation="rope",
            purpose=purpose,
            catches=catches,
            parameters={"rope": asdict(rope)},
            inputs={"x": values, "positions": positions},
        )


def _small_cases() -> Iterator[Case]:
    config = MLAConfig(
        hidden_size=1,
        num_heads=3,
        q_lora_rank=None,
        kv_lora_rank=5,
        qk_nope_head_dim=2,
        qk_rope_head_dim=0,
        v_head_dim=4,
    )
    yield Case(
        name="absorb",
        operation="absorb",
        purpose="kv_b_proj split per head into key rows, first, and value rows, with n unlike v",
        catches="all heads' key rows taken first; key and value rows exchanged; n used for both widths",
        parameters={"config": asdict(config)},
        inputs={"kv_b_proj": Numbers("absorb").array(*weight_shapes(config)["kv_b_proj"])},
        exact=("w_uk", "w_uv"),
    )
    numbers = Numbers("rms-norm-eps")
    rows = [numbers.array(8, size=size) for size in (2.0**-10, 2.0**-7, 0.0, 1.0, 2.0**-20)]
    yield Case(
        name="rms-norm-eps",
        operation="rms_norm",
        purpose="rows of rms about 1e-3, where eps = 1e-6 halves the square, beside larger, smaller and zero rows",
        catches="eps left out, added outside the root, or of another size (1e-5)",
        parameters={"eps": 1e-6},
        inputs={"x": np.stack(rows), "weight": numbers.array(8, size=0.5, centre=1.0)},
    )


def _layer_cases() -> Iterator[Case]:
    plain = RopeConfig(dim=4)
    for name, changes, start, hidden_size, purpose, catches in (
        (
            "layer-compressed-queries",
            {"q_lora_rank": 7, "rope": plain},
            4090,
            1.0,
            "a layer whose dimensions all differ, prefill and the decode of the next tokens",
            "weights transposed or reshaped with another dimension; nope and rope rows exchanged; the norm of a latent "
            "left out; a cache that is not continued",
        ),
        (
            "layer-direct-queries",
            {"rope": RopeConfig(dim=4, interleaved=False)},
            163830,
            1.0,
            "queries projected without compression, pairs in halves, at far positions",
            "positions of decoded tokens counted from 0; pairs of the other layout",
        ),
        (
            "layer-nope",
            {"q_lora_rank": 7},
            17,
            1.0,
            "no rotary embedding: q_pe and k_pe enter the scores as projected",
            "rotation in a model without it; the r dims left out of the scores",
        ),
        (
            "layer-yarn",
            {"q_lora_rank": 7, "rope": RopeConfig(dim=4, theta=100.0, yarn=SHORT_YARN)},
            200,
            1.0,
            "YaRN: blended frequencies, and mscale² in the softmax scale",
            "YaRN's mscale² left out of the softmax scale, or mscale not squared",
        ),
        (
            "layer-yarn-factor",
            {"rope": RopeConfig(dim=4, theta=100.0, yarn=RATIO_YARN)},
            1000,
            1.0,
            "YaRN with mscale unlike mscale_all_dim: factors on cos and sin and on the scale",
            "the factor of cos and sin applied to queries or keys only",
        ),
        (
            "layer-small-hidden",
            {"q_lora_rank": 7, "rope": plain},
            0,
            2.0**-10,
            "hidden states of about 1e-3, so that the eps of both latent norms is visible",
            "an eps other than the configuration's in one of the latent norms",
        ),
        (
            "layer-stated-scale",
            {"q_lora_rank": 7, "rope": plain, "softmax_scale": 0.7},
            5,
            1.0,
            "a stated softmax scale in place of (n + r)^-1/2",
            "a scale computed from n or v, or from c + r",
        ),
    ):
        fields: dict[str, Any] = {"q_lora_rank": None, **changes}
        config = MLAConfig(
            hidden_size=12,
            num_heads=3,
            kv_lora_rank=10,
            qk_nope_head_dim=6,
            qk_rope_head_dim=4,
            v_head_dim=5,
            **fields,
        )
        prompt, steps = 4, 2
        numbers = Numbers(name)
        weights = {f"weights.{key}": _weight(numbers, key, shape) for key, shape in weight_shapes(config).items()}
        yield Case(
            name=name,
            operation="layer",
            purpose=purpose,
            catches=catches,
            parameters={"config": asdict(config), "prompt": prompt},
            inputs={
                **weights,
                "hidden": numbers.array(2, prompt + steps, 12, size=hidden_size),
                "positions": np.array([[0], [start]]) + np.arange(prompt + steps),
            },
        )


def _weight(numbers: Numbers, name: str, shape: tuple[int, ...]) -> Array:
    if name.endswith("layernorm"):
        return numbers.array(*shape, size=0.5, centre=1.0)
    return numbers.array(*shape, size=1.0 if name.startswith("q_") else 0.5)


def _prefill_cases() -> Iterator[Case]:
    for name, causal, lengths, purpose, catches in (
        (
            "prefill-ragged",
            True,
            ((3, 3), (2, 6), (0, 2), (4, 2), (1, 1)),
            "sequences of unequal lengths with fewer, as many and more keys than queries, aligned at the end",
            "causal mask aligned top-left; rows without keys that are NaN or an average; an offset into the wrong axis",
        ),
        (
            "prefill-not-causal",
            False,
            ((3, 4), (2, 0)),
            "every query sees every key of its sequence; one sequence has none",
            "a mask applied all the same; keys of the neighbouring sequence read",
        ),
    ):
        numbers = Numbers(name)
        queries, keys = (np.cumsum([0, *count]) for count in zip(*lengths, strict=True))
        yield Case(
            name=name,
            operation="prefill",
            purpose=purpose,
            catches=catches,
            parameters={"softmax_scale": 0.6, "causal": causal},
            inputs={
                "q": numbers.array(int(queries[-1]), 2, 7, size=2.0),
                "k": numbers.array(int(keys[-1]), 2, 7),
                "v": numbers.array(int(keys[-1]), 2, 4),
                "cu_seqlens_q": queries.astype(np.int32),
                "cu_seqlens_k": keys.astype(np.int32),
            },
        )


def _paged(
    numbers: Numbers, rows: list[Array], *, page_size: int, table_width: int | None = None
) -> dict[str, NDArray[Any]]:
    """A paged cache of the rows [t, c+r] of each sequence: pages shuffled, every unused slot NaN."""
    lengths = [len(r) for r in rows]
    needed = [-(-n // page_size) for n in lengths]
    pages = sum(needed) + 1  # one that no sequence uses
    order = numbers.permutation(pages)
    cache = np.full((pages, page_size, 1, rows[0].shape[1]), CANONICAL_NAN)
    table = np.full((len(rows), table_width or max(needed) + 1), order[-1], dtype=np.int32)
    free = iter(order)
    for sequence, count, own in zip(rows, needed, table, strict=True):
        own[:count] = [next(free) for _ in range(count)]
        for j, row in enumerate(sequence):
            cache[own[j // page_size], j % page_size, 0] = row
    return {"kv_cache": cache, "block_table": table, "cache_seqlens": np.array(lengths, dtype=np.int32)}


def _latent_rows(numbers: Numbers, length: int, c: int, r: int, dtype: str = "float64") -> Array:
    """Rows [t, c+r] of latents around ±1 and rope keys around 0."""
    sign = np.array([1.0, -1.0] * c)[:c]
    latent = sign * numbers.array(length, c, centre=1.0, dtype=dtype)
    return np.concatenate([latent, numbers.array(length, r, dtype=dtype)], axis=-1)


def _decode_case(
    name: str,
    purpose: str,
    catches: str,
    *,
    seqlens: tuple[int, ...],
    s: int = 1,
    h: int = 3,
    c: int = 6,
    r: int = 4,
    page_size: int = 4,
    causal: bool = True,
    dtype: str = "float64",
) -> Case:
    numbers = Numbers(name)
    rows = [_latent_rows(numbers, n, c, r, dtype) for n in seqlens]
    return Case(
        name=name,
        operation="decode",
        purpose=purpose,
        catches=catches,
        parameters={"softmax_scale": 0.4, "head_dim_v": c, "causal": causal},
        inputs={
            "q": numbers.array(len(seqlens), s, h, c + r, size=2.0, dtype=dtype),
            **_paged(numbers, rows, page_size=page_size),
        },
        dtype=dtype,
    )


def _decode_cases() -> Iterator[Case]:
    yield _decode_case(
        "decode-paged",
        "ragged lengths in shuffled pages, one of them 0; unused slots hold NaN, unused table entries a page of NaN",
        "pages taken in the order of storage; slots past the length read, even with weight 0; 0/0 in the empty sequence",
        seqlens=(5, 0, 13, 1),
    )
    yield _decode_case(
        "decode-several-queries",
        "three queries per sequence, aligned at the end; the first ones of short sequences see no key",
        "query i sees i keys too many or too few; rows without keys that are not 0 and -inf",
        seqlens=(0, 1, 2, 6),
        s=3,
    )
    yield _decode_case(
        "decode-not-causal",
        "three queries per sequence, each seeing all keys",
        "the causal mask applied whatever the flag says",
        seqlens=(2, 5),
        s=3,
        causal=False,
    )
    yield _decode_case(
        "decode-long",
        "131 keys in pages of 64, so the last page and the last tile of 128 hold three",
        "a tail of the keys left out or read beyond its end",
        seqlens=(131,),
        h=2,
        c=4,
        r=2,
        page_size=64,
    )
    yield _large_logits()
    yield _one_hot()
    yield _uniform()
    yield _huge_logits()
    for dtype in ("bfloat16", "float16"):
        yield _decode_case(
            f"decode-{dtype}",
            f"{dtype} inputs taken as the exact numbers they are; the results are float64",
            "inputs rounded again, or read in another 16-bit format or byte order",
            seqlens=(5, 0, 9),
            h=2,
            c=8,
            dtype=dtype,
        )


def _large_logits() -> Case:
    numbers = Numbers("decode-large-logits")
    c, r, lengths = 4, 2, (6, 9)
    rows = [numbers.array(n, c + r) for n in lengths]
    for row in rows:
        row[:, 0] = 78.125
    q = numbers.array(len(lengths), 1, 2, c + r, size=2.0)
    q[..., 0] = [128.0, -128.0]  # one head near +1e4, one near -1e4
    return Case(
        name="decode-large-logits",
        operation="decode",
        purpose="logits of +1e4 and -1e4 that differ by about 1, so several keys share the weight",
        catches="softmax without its maximum subtracted; a mask or a first maximum of -1e4; logits in 16 bits",
        parameters={"softmax_scale": 1.0, "head_dim_v": c, "causal": True},
        inputs={"q": q, **_paged(numbers, rows, page_size=4)},
    )


def _one_hot() -> Case:
    numbers = Numbers("decode-one-hot-rope")
    c, r, length, page_size = 3, 2, 7, 3
    targets = (0, page_size - 1, page_size, length - 1)
    rows = []
    for target in targets:
        row = np.zeros((length, c + r))
        row[:, :c] = np.arange(length)[:, None] + np.array([1.0, 0.5, -64.0])  # the value names its token
        row[target, c] = 64.0
        rows.append(row)
    q = np.zeros((len(targets), 1, 2, c + r))
    q[..., c] = [4.0, 8.0]
    return Case(
        name="decode-one-hot-rope",
        operation="decode",
        purpose="one key leads by 256 through its rope part alone: first and last of a page, of the sequence, of another",
        catches="the rope part left out of the scores or read from the wrong columns; a token taken from its neighbour",
        parameters={"softmax_scale": 1.0, "head_dim_v": c, "causal": True},
        inputs={"q": q, **_paged(numbers, rows, page_size=page_size)},
        exact=("out", "lse"),
    )


def _uniform() -> Case:
    numbers = Numbers("decode-uniform")
    c, r = 4, 2
    rows = [np.concatenate([_integers(numbers, n, c), numbers.array(n, r)], axis=-1) for n in (8, 16)]
    return Case(
        name="decode-uniform",
        operation="decode",
        purpose="queries of 0: the mean of small integers over 8 and 16 keys, and lse log 8 and log 16",
        catches="a key counted twice or not at all; an LSE in base 2",
        parameters={"softmax_scale": 0.4, "head_dim_v": c, "causal": True},
        inputs={"q": np.zeros((2, 1, 2, c + r)), **_paged(numbers, rows, page_size=4)},
        exact=("out",),
    )


def _integers(numbers: Numbers, *shape: int) -> Array:
    return np.array([float(numbers.below(65) - 32) for _ in range(math.prod(shape))]).reshape(shape)


def _huge_logits() -> Case:
    numbers = Numbers("decode-huge-logits")
    c, big = 3, 2.0**499
    rows = np.concatenate([_integers(numbers, 5, c), np.zeros((5, 2))], axis=-1)
    rows[:, c] = big * np.array([1.0, 0.75, -1.5, 1.125, -1.0])
    rows[:, c + 1] = -big * np.array([1.5, 1.25, 1.0, 1.75, 1.125])
    q = np.zeros((1, 1, 3, c + 2))
    q[0, 0, 0, c] = q[0, 0, 2, c + 1] = big / 2
    q[0, 0, 1, c] = -big / 2
    return Case(
        name="decode-huge-logits",
        operation="decode",
        purpose="logits of about 1e300, of both signs and all negative, each exact in float64",
        catches="a mask or a first maximum that is finite, such as -1e30; overflow to NaN",
        parameters={"softmax_scale": 1.0, "head_dim_v": c, "causal": True},
        inputs={"q": q, **_paged(numbers, [rows], page_size=2)},
        exact=("out", "lse"),
    )


def _merge_cases() -> Iterator[Case]:
    far = [(700.25, -700.5), (0.5, 0.25), (-40.0, -10.5), (10000.0, 10001.0), (-20000.0, -20003.0), (30.0, 0.0)]
    yield _merge_case(
        "merge-far-apart",
        far,
        "two parts whose LSEs are equal, near and 1400 apart, and too large for exp",
        "weights exp(lse) formed without subtracting the maximum; parts averaged; base 2 taken for base e",
    )
    none = -math.inf
    empty = [
        (none, 0.5, none),
        (1.5, none, -0.25),
        (none, none, none),
        (none, none, 3.0),
        (0.0, 1.0, 2.0),
        (none, 0.0, 0.0),
    ]
    yield _merge_case(
        "merge-empty-parts",
        empty,
        "three parts, some or all without keys (LSE -inf)",
        "-inf minus -inf; a row without keys that is NaN",
    )


def _merge_case(name: str, lses: Sequence[tuple[float, ...]], purpose: str, catches: str) -> Case:
    h, s, v = 3, 2, 4
    lse = np.array(lses).T.reshape(-1, 1, h, s)  # [parts, 1, h, s]
    outs = Numbers(name).array(len(lse), 1, s, h, v)  # [parts, 1, s, h, v]
    outs[np.isneginf(np.swapaxes(lse, -1, -2))] = 0.0
    return Case(
        name=name,
        operation="merge",
        purpose=purpose,
        catches=catches,
        inputs={"outs": outs, "lses": lse},
    )
