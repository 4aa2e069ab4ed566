"""Cases of weights: in blocks with one scale each, and divided among ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mla_spec.golden.cases.case import Case, Numbers, config_parameters, on_github
from mla_spec.golden.exact import rationals as exact
from mla_spec.reference.config import MLAConfig
from mla_spec.reference.mla import weight_shapes


def weight_cases() -> Iterator[Case]:
    """All of them, in the order of the manifest."""
    yield _blocks()
    yield from _ranks()


def _blocks() -> Case:
    numbers = Numbers("dequantize-weight")
    finite = [p for p in range(256) if exact.number(p, "float8_e4m3fn") is not None]
    codes = [finite[numbers.below(len(finite))] for _ in range(5 * 7)]
    return Case(
        name="dequantize-weight",
        operation="dequantize_weight",
        purpose="a float8_e4m3fn weight in blocks of 2 rows and 3 columns, which divide neither its 5 rows nor its 7 columns",
        catches="rows and columns of a block exchanged; one scale per row or for the last full block; a division by the "
        "scale, which checkpoints call its inverse",
        sources=on_github("ModelTC/LightLLM/pull/744", "NVIDIA/TensorRT-LLM/pull/14793"),
        parameters={"block_size": [2, 3]},
        inputs={
            "codes": np.array(codes, dtype=np.uint8).reshape(5, 7),
            "scales": numbers.array(3, 3, size=0.25, centre=0.5, dtype="float32"),
        },
        dtypes={"scales": "float32"},
        exact=("out",),
    )


def _ranks() -> Iterator[Case]:
    config = MLAConfig(
        hidden_size=3,
        num_heads=4,
        q_lora_rank=2,
        kv_lora_rank=5,
        qk_nope_head_dim=2,
        qk_rope_head_dim=2,
        v_head_dim=1,
    )
    shapes, numbers, ranks = weight_shapes(config), Numbers("shard-layer"), 2
    weights = {f"weights.{name}": numbers.integers(*shape) for name, shape in shapes.items()}
    parts = [
        exact.shard_layer({name: np.zeros(shape) for name, shape in shapes.items()}, 4, ranks, i) for i in range(2)
    ]
    yield Case(
        name="shard-layer",
        operation="shard_layer",
        purpose="a layer of four heads divided between two ranks: rows of q_b_proj and kv_b_proj, columns of o_proj, and all of "
        "the other weights",
        catches="rows taken in turn and not by head; kv_b_proj divided into keys and values; rows of o_proj; a latent "
        "projection that is divided",
        parameters={"config": config_parameters(config), "ranks": ranks},
        inputs=weights,
        exact=tuple(f"rank{i}.{name}" for i in range(ranks) for name in shapes),
    )
    yield Case(
        name="gather-gradients",
        operation="gather_gradients",
        purpose="gradients of two ranks joined where the weight is divided, and added where every rank has it",
        catches="the gradients of the shared latent and rope rows left as those of one rank, or only some of them added",
        sources=on_github("NVIDIA/Megatron-LM/pull/6839"),
        parameters={"config": config_parameters(config), "ranks": ranks},
        inputs={
            f"rank{i}.{name}": numbers.integers(*part.shape) for i in range(ranks) for name, part in parts[i].items()
        },
        exact=tuple(shapes),
    )
