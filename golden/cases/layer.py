"""Cases of whole layers, of the absorbed weights and of RMSNorm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mla_spec.golden.cases.case import Case, Numbers, config_parameters, on_github
from mla_spec.golden.cases.rope import RATIO_YARN, SHORT_YARN
from mla_spec.reference.config import Llama4Scaling, LongRopeScaling, MLAConfig, RopeConfig
from mla_spec.reference.mla import weight_shapes
from mla_spec.reference.typing import Array


def small_cases() -> Iterator[Case]:
    """Absorption and RMSNorm."""
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
        sources=on_github("ModelTC/LightLLM/pull/744", "vllm-project/vllm/pull/56773"),
        parameters={"config": config_parameters(config)},
        inputs={"kv_b_proj": Numbers("absorb").array(*weight_shapes(config)["kv_b_proj"])},
        exact=("w_uk", "w_uv"),
    )
    numbers = Numbers("rms-norm-eps")
    rows = [numbers.array(8, size=size) for size in (2.0**-10, 2.0**-7, 0.0, 1.0, 2.0**-20)]
    yield Case(
        name="rms-norm-eps",
        operation="rms_norm",
        purpose="rows of rms about 1e-3, where eps = 1e-6 halves the square, beside larger, smaller and zero rows",
        catches="eps left out, added outside the root, or of another size (1e-5); squares summed in 16 bits",
        sources=on_github("huggingface/transformers/pull/44346", "fla-org/flash-linear-attention/commit/f494277f"),
        parameters={"eps": 1e-6},
        inputs={"x": np.stack(rows), "weight": numbers.array(8, size=0.5, centre=1.0)},
    )


def layer_cases() -> Iterator[Case]:
    """Layers whose dimensions all differ, in every variant."""
    plain = RopeConfig(dim=4)
    for name, changes, start, hidden_size, purpose, catches, sources in (
        (
            "layer-compressed-queries",
            {"q_lora_rank": 7, "rope": plain},
            4090,
            1.0,
            "a layer whose dimensions all differ, prefill and the decode of the next tokens",
            "weights transposed or reshaped with another dimension; nope and rope rows exchanged; the norm of a latent "
            "left out; a cache that is not continued",
            ("ModelTC/LightLLM/commit/808d8325f", "deepseek-ai/DeepSeek-V3/pull/1536"),
        ),
        (
            "layer-direct-queries",
            {"rope": RopeConfig(dim=4, interleaved=False)},
            163830,
            1.0,
            "queries projected without compression, pairs in halves, at far positions",
            "positions of decoded tokens counted from 0; pairs of the other layout; rows rotated twice",
            ("flashinfer-ai/flashinfer/pull/793", "flashinfer-ai/flashinfer/pull/847"),
        ),
        (
            "layer-nope",
            {"q_lora_rank": 7},
            17,
            1.0,
            "no rotary embedding: q_pe and k_pe enter the scores as projected",
            "rotation in a model without it; the r dims left out of the scores",
            (),
        ),
        (
            "layer-yarn",
            {"q_lora_rank": 7, "rope": RopeConfig(dim=4, theta=100.0, yarn=SHORT_YARN)},
            200,
            1.0,
            "YaRN: blended frequencies, and mscale² in the softmax scale",
            "YaRN's mscale² left out of the softmax scale, or mscale not squared",
            ("huggingface/transformers/pull/47435", "AI-Hypercomputer/maxtext/issues/3138"),
        ),
        (
            "layer-yarn-factor",
            {"rope": RopeConfig(dim=4, theta=100.0, yarn=RATIO_YARN)},
            1000,
            1.0,
            "YaRN with mscale unlike mscale_all_dim: factors on cos and sin and on the scale",
            "the factor of cos and sin applied to queries or keys only, or mscale_all_dim used for both factors",
            ("kekzl/imp/pull/880", "AMD-AGI/Primus/pull/930"),
        ),
        (
            "layer-small-hidden",
            {"q_lora_rank": 7, "rope": plain},
            0,
            2.0**-10,
            "hidden states of about 1e-3, so that the eps of both latent norms is visible",
            "an eps other than the configuration's in one of the latent norms",
            ("huggingface/transformers/pull/44585", "vllm-project/vllm/pull/35515"),
        ),
        (
            "layer-stated-scale",
            {"q_lora_rank": 7, "rope": plain, "softmax_scale": 0.7},
            5,
            1.0,
            "a stated softmax scale in place of (n + r)^-1/2",
            "the stated scale ignored; a scale computed from n or v, or from c + r; a division by it",
            ("NVIDIA/Megatron-LM/pull/3698", "AI-Hypercomputer/maxtext/issues/1370"),
        ),
    ):
        yield _layer_case(name, changes, start, hidden_size, purpose, catches, sources)


LONGROPE = LongRopeScaling(
    original_max_position_embeddings=64, short_factor=(1.0, 1.25), long_factor=(1.5, 12.0), attention_factor=None
)
LLAMA_4 = Llama4Scaling(beta=0.1, original_max_position_embeddings=64)
MOVED = 2**16 - 3
"""By how much positions are moved: the fourth token of the first sequence is then at 2^16."""


def variant_cases() -> Iterator[Case]:
    """Layers with the options of single models, in bfloat16, and one layer at two places of a context."""
    plain = RopeConfig(dim=4)
    for name, changes, start, purpose, catches, sources in (
        (
            "layer-longrope",
            {"q_lora_rank": 7, "rope": RopeConfig(dim=4, longrope=LONGROPE, max_position_embeddings=4096)},
            100,
            "LongRoPE in a model of long context: the long factors at every position, and its factor on cos and sin",
            "factors chosen by the position of a token; the factor on cos and sin left out, or on queries alone",
            (),
        ),
        (
            "layer-mla-scale",
            {"q_lora_rank": 7, "rope": plain, "mla_scale_q_lora": True, "mla_scale_kv_lora": True},
            3,
            "LongCat-Flash's factors (e / rank)^1/2 on both latents after their norms",
            "factors left out, inverted, or computed from the other rank; k_pe multiplied too",
            (),
        ),
        (
            "layer-llama-4-scaling",
            {"q_lora_rank": 7, "rope": plain, "llama_4_scaling": LLAMA_4},
            62,
            "a temperature of queries that changes between the second and the third token of the second sequence",
            "the temperature left out, on keys too, one position late, or the same for all tokens of a call",
            ("antonellof/ferrox/pull/213",),
        ),
        (
            "layer-at-its-place",
            {"rope": plain},
            11,
            "the first of a pair: layer-moved has the same layer and tokens further on, and the same answers",
            "a prompt rotated by its place in the call; a cached key rotated again with each token",
            (),
        ),
    ):
        yield _layer_case(name, changes, start, 1.0, purpose, catches, sources, dtype="bfloat16")
    yield _layer_case(
        "layer-moved",
        {"rope": plain},
        11,
        1.0,
        "the layer and the tokens of layer-at-its-place, every position 65,533 later: the same answers, bit for bit",
        "positions in 16 bits or rounded to bfloat16; a table of cos and sin that ends; positions of a cached key counted anew",
        ("flashinfer-ai/flashinfer/pull/793", "pytorch/torchtitan/pull/2575", "kekzl/imp/pull/913"),
        dtype="bfloat16",
        moved=MOVED,
        like="layer-at-its-place",
    )


def gated_cases() -> Iterator[Case]:
    """Layers with each kind of output gate, one of them with a sink of each head, in bfloat16."""
    plain = RopeConfig(dim=4)
    for name, changes, purpose, catches in (
        (
            "layer-gate-of-heads",
            {"rope": plain, "output_gate": "head"},
            "one gate for each head: sigmoid(g_proj h) times its output, before o_proj (Ling-3.0, dots3)",
            "the gate left out, applied after o_proj, or without its sigmoid; gates of another head or token",
        ),
        (
            "layer-gate-of-elements-and-sink",
            {"q_lora_rank": 7, "rope": plain, "output_gate": "element", "attention_sink": True},
            "one gate for each element of each head, and a sink of each head (Hy4)",
            "gates laid out [v, h]; a sink dropped, or counted once for each token",
        ),
        (
            "layer-gate-with-queries",
            {"q_lora_rank": 7, "rope": plain, "output_gate": "query"},
            "gates from the projection of the queries, of the query latent after its norm beside itself before it (A.X-K2)",
            "the latents in the other order, or one of them twice; rows of all queries taken to come before those of all gates",
        ),
    ):
        yield _layer_case(name, changes, 3, 1.0, purpose, catches, (), dtype="bfloat16")


def _layer_case(
    name: str,
    changes: dict[str, Any],
    start: int,
    hidden_size: float,
    purpose: str,
    catches: str,
    sources: tuple[str, ...],
    *,
    dtype: str = "float64",
    moved: int = 0,
    like: str = "",
) -> Case:
    """A layer, a prompt and two tokens after it; the second sequence starts at ``start``, and all are ``moved``.

    ``like`` names the case whose numbers, and so answers, it has.
    """
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
    numbers = Numbers(like or name)
    weights = {f"weights.{key}": _weight(numbers, key, shape, dtype) for key, shape in weight_shapes(config).items()}
    return Case(
        name=name,
        operation="layer",
        purpose=purpose,
        catches=catches,
        sources=on_github(*sources),
        parameters={"config": config_parameters(config), "prompt": prompt},
        inputs={
            **weights,
            "hidden": numbers.array(2, prompt + steps, 12, size=hidden_size, dtype=dtype),
            "positions": moved + np.array([[0], [start]]) + np.arange(prompt + steps),
        },
        dtype=dtype,
    )


def _weight(numbers: Numbers, name: str, shape: tuple[int, ...], dtype: str) -> Array:
    norm = name.endswith("layernorm")
    size = 1.0 if name.startswith("q_") and not norm else 0.5
    weight: Array = numbers.array(*shape, size=size, centre=1.0 if norm else 0.0, dtype=dtype)
    return weight
