"""What a subject declares that it can be given."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from mla_spec.installed import operation_named
from mla_spec.reference.cache_layout import LAYOUTS
from mla_spec.text.terminal import shown
from mla_spec.text.typed import Count, Least, Size, require_fields

YARN_OPTIONS = ("attention_factor", "softmax_mscale", "truncate", "applies")

BACKWARD = ("prefill", "sparse_prefill", "layer", "rope", "merge")
"""Operations whose gradients are judged."""

WITH_OPTIONS = ("decode", "prefill")
"""Operations that may take a sink, and a window."""

LAYER_DIMS = (
    "hidden_size",
    "num_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)

DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Supports:
    """What a subject can be given. The default is everything but ``dense_sink``, ``sliding_window``,
    ``output_gate`` and ``cuda_graphs``; what a subject declares otherwise shows in its report.

    Args:
        dtypes: of the tensors.
        page_sizes: of the cache, in tokens; None for any.
        num_heads: None for any.
        latent_dims: pairs (kv_lora_rank, qk_rope_head_dim) of ``decode``, ``ragged_decode``, ``rank_decode``,
            ``write_cache`` and sparse attention; None for any.
        max_s: most queries per sequence in ``decode`` and ``rank_decode``; None for any.
        interleaves: tokens of a block that ``rank_decode`` deals to a rank at once; None for any.
        max_parts: most parts that ``merge`` takes; None for any.
        max_batch: most sequences of a call; None for any.
        max_keys: most keys that a query sees: cached tokens of a sequence, keys of a packed one, indices of sparse attention,
            tokens that a layer has cached. At least 16, or None for any.
        prefill_dims: pairs (qk_nope_head_dim + qk_rope_head_dim, v_head_dim) of ``prefill``; None for any.
        weight_block_sizes: pairs (rows, columns) of blocks of ``dequantize_weight``; None for any.
        cache_formats: of quantised caches.
        topk_multiple: the number of indices per query of sparse attention is a multiple of it.
        attention_sink: whether sparse attention takes ``attn_sink``.
        dense_sink: operations, of "decode", "prefill" and "layer", that take a sink. Not taken for granted.
        sliding_window: operations, of "decode" and "prefill", that take ``window``. Not taken for granted.
        topk_length: whether sparse attention takes ``topk_length``.
        indexer_dims: pairs (h, d) of ``indexer``; None for any.
        indexer_top_k: values of ``top_k``; None for any.
        indexer_logits: whether ``indexer`` returns the logits, or None.
        indexer_rope_layouts: pair layouts of ``project_indexer``, of "interleaved" and "half".
        indexer_rope_optional: whether the indexer may have no rotary embedding.
        indexer_norm_eps: the only eps of the LayerNorm on the indexer's keys, or None for any.
        indexer_ties: of equal logits that not all can be selected, the ones with the "smaller index" are, or "any".
        lse: whether attention returns the LSE.
        backward: operations that autograd differentiates, of "prefill", "sparse_prefill", "layer", "rope" and "merge"; where
            None, those whose outputs require a gradient when their arguments do.
        lse_backward: whether gradients come through the LSE too.
        negative_scale: whether softmax_scale may be negative: a kernel that subtracts the largest product q·k before it
            scales cannot take one.
        causal: the values of ``causal`` that attention accepts.
        empty_row: what a row without keys gives, as "out/lse"; "unsupported" where such rows may not occur.
        rope_layouts: pair layouts, of "interleaved" and "half"; none where there is no rotary embedding (NoPE only).
        rope_optional: whether a layer may have no rotary embedding (NoPE).
        yarn: whether YaRN is implemented.
        yarn_options: what of a ``YarnScaling`` is honored where a configuration states it, of "attention_factor",
            "softmax_mscale", "truncate" and "applies".
        yarn_mscale_rule: whether only "equal" mscale and mscale_all_dim are implemented, or "any".
        longrope: whether LongRoPE is implemented.
        q_lora_rank: whether a layer's queries are compressed in "any" configuration that is asked for, or that is "required".
        mla_scale_lora: whether a layer's latents may have LongCat-Flash's scale factors, or "always" have them.
        k_pe_norm: whether a layer may have an RMSNorm on k_pe.
        llama_4_scaling: whether a layer's queries may have a temperature by position.
        output_gate: the gates that a layer may have, of "head", "element" and "query". Not taken for granted.
        layer_weights: what a layer sees when the weights it was made from are overwritten: "live" where its next call uses
            the new ones, "copied" where it keeps those it was made with, and has to be made anew.
        layer_dim_multiple: kv_lora_rank and qk_nope_head_dim of a layer must be multiples of it.
        layer_multiples: pairs (dimension, multiple) of a layer, such as ("hidden_size", 16), of "hidden_size", "num_heads",
            "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim" and "v_head_dim".
        layer_equal_head_dims: whether qk_nope_head_dim and v_head_dim of a layer must be equal.
        layer_min_rope_dim: the least qk_rope_head_dim of a layer that has one.
        layer_thetas: bases of a layer's rotary embedding; None for any.
        layer_max_positions: positions of a layer are smaller; at least 64, or None for any.
        layer_cache: what a layer keeps of each token: the "latent" and k_pe, "expanded" keys and values of all heads, or "none":
            then it has no ``decode``.
        layer_max_decode: most tokens of one call of a layer's ``decode``; None for any.
        layer_chunks: whether a layer's ``prefill`` may continue what is cached.
        latent_norm_eps: the only eps of the latent norms, or None for any.
        cache_page: tokens to which a layer's cache is rounded up.
        cuda_graphs: whether ``decode`` can be captured in a CUDA graph. Not taken for granted: what waits for the device
            to know a length cannot.

    Raises:
        ValueError: a value of another type, an unknown dtype, cache format, empty-row rule, rope layout or rule for weights, dimension of a layer.
    """

    dtypes: tuple[str, ...] = DTYPES
    page_sizes: tuple[Size, ...] | None = None
    num_heads: tuple[Size, ...] | None = None
    latent_dims: tuple[tuple[Size, Size], ...] | None = None
    max_s: Count | None = None
    interleaves: tuple[Count, ...] | None = None
    max_parts: Count | None = None
    max_batch: Count | None = None
    max_keys: Annotated[int, Least(16)] | None = None
    prefill_dims: tuple[tuple[Size, Size], ...] | None = None
    weight_block_sizes: tuple[tuple[Size, Size], ...] | None = None
    cache_formats: tuple[str, ...] = tuple(LAYOUTS)
    topk_multiple: Count = 1
    attention_sink: bool = True
    dense_sink: tuple[str, ...] = ()
    sliding_window: tuple[str, ...] = ()
    topk_length: bool = True
    indexer_dims: tuple[tuple[Size, Size], ...] | None = None
    indexer_top_k: tuple[Size, ...] | None = None
    indexer_logits: bool = True
    indexer_rope_layouts: tuple[str, ...] = ("interleaved", "half")
    indexer_rope_optional: bool = True
    indexer_norm_eps: Annotated[float, Least(0)] | None = None
    indexer_ties: Literal["smaller index", "any"] = "smaller index"
    lse: bool = True
    backward: tuple[str, ...] | None = None
    lse_backward: bool = True
    negative_scale: bool = True
    causal: tuple[bool, ...] = (True, False)
    empty_row: Literal["zero/-inf", "zero/+inf", "unsupported"] = "zero/-inf"
    rope_layouts: tuple[str, ...] = ("interleaved", "half")
    rope_optional: bool = True
    yarn: bool = True
    yarn_options: tuple[str, ...] = YARN_OPTIONS
    yarn_mscale_rule: Literal["any", "equal"] = "any"
    longrope: bool = True
    q_lora_rank: Literal["any", "required"] = "any"
    mla_scale_lora: bool | Literal["always"] = True
    k_pe_norm: bool = True
    llama_4_scaling: bool = True
    output_gate: tuple[str, ...] = ()
    layer_weights: Literal["live", "copied"] = "live"
    layer_dim_multiple: Count = 1
    layer_multiples: tuple[tuple[str, Count], ...] = ()
    layer_equal_head_dims: bool = False
    layer_min_rope_dim: Size = 0
    layer_thetas: tuple[Annotated[float, Least(1)], ...] | None = None
    layer_max_positions: Annotated[int, Least(64)] | None = None
    layer_cache: Literal["latent", "expanded", "none"] = "latent"
    layer_max_decode: Count | None = None
    layer_chunks: bool = True
    latent_norm_eps: Annotated[float, Least(0)] | None = None
    cache_page: Count = 1
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        require_fields(self)
        _require_known("dtypes", self.dtypes, DTYPES)
        _require_known("cache_formats", self.cache_formats, tuple(LAYOUTS))
        _require_known("backward", self.backward or (), BACKWARD)
        _require_known("dense_sink", self.dense_sink, (*WITH_OPTIONS, "layer"))
        _require_known("output_gate", self.output_gate, ("head", "element", "query"))
        _require_known("sliding_window", self.sliding_window, WITH_OPTIONS)
        _require_known("rope_layouts", self.rope_layouts, ("interleaved", "half"))
        _require_known("indexer_rope_layouts", self.indexer_rope_layouts, ("interleaved", "half"))
        _require_known("yarn_options", self.yarn_options, YARN_OPTIONS)
        _require_known("layer_multiples", tuple(name for name, _ in self.layer_multiples), LAYER_DIMS)

    def multiple_of(self, dimension: str) -> int:
        """Of what a dimension of a layer is a multiple."""
        own = [multiple for name, multiple in self.layer_multiples if name == dimension]
        both = dimension in ("kv_lora_rank", "qk_nope_head_dim")
        return math.lcm(*own, self.layer_dim_multiple if both else 1)

    def may_differentiate(self, operation: str) -> bool:
        """Whether autograd differentiates ``operation``, or might."""
        return self.backward is None or operation in self.backward

    def nothing_to_judge(self, operations: Iterable[str]) -> str:
        """Why every output of one of ``operations`` is empty, whatever the case, or ""."""
        for name in operations:
            for field in getattr(operation_named(name), "sizes", ()):
                values = getattr(self, field)
                if values is not None and not any(_size(field, value) for value in values):
                    return f"{field}={values!r} leaves outputs without an element"
        return ""

    def never_seen(self) -> str:
        """Which sizes the limits on sequences and keys keep from every law, as a sentence, or ""."""
        sizes = [
            f"{what} more than {most} {things} ({name}={most})"
            for name, most, what, things in (
                ("max_batch", self.max_batch, "a call with", "sequences"),
                ("max_keys", self.max_keys, "a query that sees", "keys"),
            )
            if most is not None
        ]
        return f"never seen: {'; '.join(sizes)}" if sizes else ""

    def restrictions(self) -> str:
        """The fields that differ from the default, in one line; empty when nothing is restricted."""
        default, everything = Supports(), {"backward": BACKWARD}
        changed = [
            f.name
            for f in fields(self)
            if getattr(self, f.name) not in (getattr(default, f.name), everything.get(f.name))
        ]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in changed)


def _size(field: str, value: int | tuple[int, int]) -> int:
    """A size that is 0 where outputs have no element. A cached row need not have rope dims."""
    if isinstance(value, int):
        return value
    return value[0] if field == "latent_dims" else min(value)


def _require_known(field: str, values: tuple[Any, ...], known: tuple[Any, ...]) -> None:
    for value in values:
        if value not in known:
            raise ValueError(f"Supports: {field} has unknown value {shown(value)}; known are {', '.join(known)}")
