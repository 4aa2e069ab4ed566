"""What a subject is: operations it may offer, and what it declares about itself.

A subject is any object with some of the methods below. It gets and returns torch tensors on its own device. ``name``,
``profile`` and ``supports`` are optional attributes; an absent method means the operation is not offered.

====================  ===============================================================  ==============================
operation             call                                                             returns
====================  ===============================================================  ==============================
``rope``              ``rope(x, positions, *, rope)``                                  x rotated, same shape
``absorb``            ``absorb(kv_b_proj, *, config)``                                 (w_uk [h,n,c], w_uv [h,v,c])
``dequantize_weight`` ``dequantize_weight(codes, scales, *, block_size, dtype)``       weight [out, in]
``prefill``           ``prefill(q, k, v, cu_seqlens_q, cu_seqlens_k, *,                (out [tokens,h,v],
                      softmax_scale, causal)``                                         lse [h,tokens] or None)
``decode``            ``decode(q, kv_cache, block_table, cache_seqlens, *,             (out [b,s,h,c],
                      head_dim_v, softmax_scale, causal)``                             lse [b,h,s] or None)
``merge``             ``merge(outs, lses)``                                            (out [(b,) s,h,v],
                                                                                       lse [(b,) h,s])
``write_cache``       ``write_cache(latent, k_pe, kv_cache, slot_mapping)``            None; changes kv_cache
``quantize_cache``    ``quantize_cache(rows, *, format, page_size, tensor_scale)``     pages
``dequantize_cache``  ``dequantize_cache(pages, *, format, page_size,                  kv_cache, as ``decode``
                      tensor_scale, dtype)``                                           takes it
``decode_quantized``  ``decode_quantized(q, pages, block_table, cache_seqlens, *,      (out [b,s,h,v],
                      format, page_size, tensor_scale, head_dim_v,                     lse [b,h,s] or None)
                      softmax_scale, causal)``
``sparse_prefill``    ``sparse_prefill(q, kv, indices, *, head_dim_v,                  (out [s,h,c],
                      softmax_scale, attn_sink=None, topk_length=None)``               max_logits [s,h],
                                                                                       lse [s,h])
``sparse_decode``     ``sparse_decode(q, kv_cache, indices, *, head_dim_v,             (out [b,s,h,c],
                      softmax_scale, attn_sink=None, topk_length=None)``               lse [b,h,s])
``project_indexer``   ``project_indexer(hidden, q_latent, positions, weights,          (q [tokens,h,d], k [tokens,d],
                      config)``                                                        weights [tokens,h])
``indexer``           ``indexer(q, k, weights, cu_seqlens_q, cu_seqlens_k, *,          (logits [tokens, key tokens],
                      top_k)``                                                         indices [tokens, top_k])
``layer``             ``layer(weights, config)``                                       an object with ``prefill``,
                                                                                       ``decode``, ``reset`` and
                                                                                       ``cache_bytes``
``shard_layer``       ``shard_layer(weights, config, *, ranks)``                       [(weights, config), ...],
                                                                                       one per rank
``gather_gradients``  ``gather_gradients(gradients, *, config)``                       {name: gradient}
====================  ===============================================================  ==============================

Shapes: x is positions.shape + (r,) or positions.shape + (h, r); kv_b_proj [h·(n+v), c], viewed as (h, n + v, c);
q [b, s, h, c + r]; kv_cache [pages, page_size, 1, c + r], latent first; block_table int32 [b, max pages]; cache_seqlens
int32 [b], counting the s new tokens; positions int64. ``rope`` is a RopeConfig and ``config`` an MLAConfig.

dequantize_weight: the weight of codes float8_e4m3fn [out, in] and scales float32 [blocks of rows, blocks of columns], the
``weight_scale_inv`` of checkpoints, in ``dtype``. ``block_size`` is the rows and columns of a block, and the last blocks may
be smaller (``mla_spec.reference.block_scales``). Code times scale is computed in float32 or better (float64 for float64)
and rounded to the dtype once.

prefill: q and k [tokens, h, n + r] and v [tokens, h, v], the tokens of all sequences on one axis, sequence i being
cu_seqlens[i] .. cu_seqlens[i + 1] - 1 (int32 [b + 1]). Query i of the s of a sequence sees keys 0 .. t - s + i of its t
when causal (bottom-right), all of them otherwise. Sequences may have more keys than queries, or fewer, or none of either.

decode: query i of s sees keys 0 .. seqlen - s + i when causal, all keys otherwise. The LSE is the natural logarithm, in
float32 or better. Whatever lies beyond a sequence's length, in pages or in table entries, may hold anything. The memory in
use grows no faster than the batch.

merge: outs [parts, (b,) s, h, v] and lses [parts, (b,) h, s] of one attention over disjoint keys, with a batch axis as
``decode`` returns them or without one as ``prefill`` does. LSEs are natural logarithms, in float32, or float64 where the
outs are; the output has the dtype of the outs. A part without keys has the output and the LSE that ``supports.empty_row``
declares, and so has a row whose parts are all empty. Whatever finite numbers an empty part's output holds, they have no
weight.

write_cache: latent [n, c] and k_pe [n, r] of n new tokens are stored, bit for bit, as rows [latent | k_pe] of kv_cache
[pages, page_size, 1, c + r], token i in row slot % page_size of page slot // page_size with slot = slot_mapping[i] (int64
[n]). Slot -1 stores nothing. Only the named slots change. No slot is named twice, since the order of writes is open. The
pool is written in place through its strides: pages may lie further apart than a page is long, and rows further apart than
a row; offsets may exceed 2^31 elements.

Quantised caches: ``format`` is a name of ``mla_spec.reference.cache_layout.LAYOUTS``, whose layout says where the bytes of
pages [pages, bytes per page] (uint8) lie; pages may lie further apart than their bytes. ``tensor_scale`` is the float32
scale of all codes of a format that stores none, and 1 for the others. quantize_cache stores rows [n, width], [latent | k_pe]
or keys of an indexer, in token order in as few pages as hold them, with scales within ``scale_limits``, the nearest codes
and the nearest plain elements, none beyond the largest number (``mla_spec.reference.quantised_cache``), computed in float32
or better. Padding and unused rows may hold anything, which readers ignore. dequantize_cache returns all rows,
[pages, page_size, 1, width] in ``dtype``; those that hold no token may be anything. decode_quantized is ``decode`` of these
rows, of which the first head_dim_v elements are the values. A reader that rounds code times scale to a format narrower than
its softmax's arithmetic declares that as ``Profile.cache_dequantised``.

sparse_prefill: q [s, h, c + r], kv [s_kv, 1, c + r] whose first head_dim_v columns are the values, indices int32
[s, 1, k], as FlashMLA's ``flash_mla_sparse_fwd`` takes them. Query i attends to the rows that indices[i] selects, and there
is no other mask. -1, or an index of s_kv or more, selects nothing, anywhere in a row. An index that occurs twice is two
keys. Neither the order of a row nor what no index selects matters. topk_length int32 [s]: the entries of row i from
topk_length[i] on are not read. attn_sink float32 [h] (float64 for float64 tensors): out is multiplied by
1/(1 + exp(attn_sink - lse)); -inf changes nothing and +inf gives out exactly 0. max_logits, the largest of softmax_scale
times q·k, and the LSE do not count the sink; both are natural, in float32 or better. A row that selects nothing gives
what ``supports.empty_row`` declares, and max_logits -inf. Both may be None where ``supports.lse`` is False.

sparse_decode: the same for q [b, s, h, c + r] and kv_cache [pages, page_size, 1, c + r], indices int32 [b, s, k] counting
its slots, page · page_size + row, and topk_length int32 [b]. s_kv is pages · page_size.

project_indexer: what a layer gives its indexer, from hidden [tokens, e], q_latent [tokens, q_lora_rank] (the attention's
query latent after its norm), positions int64 [tokens], weights under their checkpoint names and shapes, and an
IndexerConfig (``mla_spec.reference.indexer``). q and k are rounded to the dtype; their first ``config.rope.dim`` dims are
rotated, in the layout that ``config.rope`` states and returned in it, and the others are not. A Hadamard matrix on q and k, on
which no q·k depends, is left out. The weights are float32 (float64 for float64 tensors), as ``indexer`` takes them, with
the factor (h d)^-1/2 in them.

indexer: the lightning indexer of DeepSeek-V3.2 on q [tokens, h, d], k [key tokens, d] and weights [tokens, h], float32
(float64 for float64 tensors), with every scale factor already in the weights and rotary embedding already applied. Packed
sequences are those of ``prefill``, and always causal. logits, in float32 or better, are Σ_h weights · relu(q·k); where a
query does not see a key they may hold anything. indices, int32 or int64, count key tokens over all sequences, as
``sparse_prefill`` takes them. Row i names the top_k keys with the largest logits that query i sees, in any order; -1 fills
the row from there on where it sees fewer. Of equal logits the smaller index is selected, unless ``supports.indexer_ties``
says "any".

layer: ``prefill(hidden, positions)`` and ``decode(hidden, positions)`` take hidden [b, s, e] and positions [b, s], append
to the layer's own cache and return [b, s, e]; ``reset()`` empties the cache; ``cache_bytes()`` is what its rows occupy.
Between calls a layer keeps no more memory than that, tables and workspaces aside, which are made once. Layers that one
subject makes are independent of each other.
Weights have their checkpoint names and shapes (``mla_spec.reference.mla.weight_shapes``).

backward: gradients are those that autograd gives through ``prefill``, ``sparse_prefill`` or ``layer``, where
``supports.backward`` names the operation, or names none and the output requires a gradient. Each tensor that requires a gradient (q, k and v; q and kv; hidden and the weights)
gets one of its shape and dtype, for any gradient of out, whatever its strides, and of the LSE where ``supports.lse_backward``;
max_logits has none, and attn_sink is a constant. Queries that see no key, keys that no query sees, and rows of kv that no
entry selects have gradient 0.

shard_layer: tensor parallelism. Rank i gets the weights and configuration of a ``layer`` of its own with heads
i·h/ranks .. (i + 1)·h/ranks - 1: their rows of q_proj or q_b_proj and of kv_b_proj, their columns of o_proj, and all of the
other weights. The outputs of the ranks' layers add up to the layer's. ranks divides num_heads.

gather_gradients: ``gradients`` are those of each rank's weights, by name, in the order of ``shard_layer``, of a loss that
depends on the sum of the ranks' outputs. Returned is the gradient of each weight of the whole layer, whose configuration is
``config``: gradients of the weights of heads are joined, and those of what every rank has are added.
"""

from __future__ import annotations

from collections.abc import Mapping

from mla_spec.bounds.profile import Profile
from mla_spec.subjects.supports import Supports

QUANTISED = ("quantize_cache", "dequantize_cache", "decode_quantized")
SPARSE = ("sparse_prefill", "sparse_decode", "project_indexer", "indexer")
PARALLEL = ("shard_layer", "gather_gradients")
OPERATIONS = (
    *("rope", "absorb", "dequantize_weight", "prefill", "decode", "merge", "write_cache"),
    *(*QUANTISED, *SPARSE, "layer", *PARALLEL),
)


def subject_name(subject: object) -> str:
    """``subject.name``, else the name of its class."""
    return str(getattr(subject, "name", type(subject).__name__))


def offers(subject: object, operation: str) -> bool:
    """Whether the subject has the method ``operation``."""
    return callable(getattr(subject, operation, None))


def supports_of(subject: object) -> Supports:
    """``subject.supports``, else everything; TypeError when it is something else."""
    supports = getattr(subject, "supports", None)
    if supports is None:
        return Supports()
    if not isinstance(supports, Supports):
        raise TypeError(f"{subject_name(subject)}.supports must be a Supports, got {type(supports).__name__}")
    return supports


def profile_of(subject: object, dtype: str) -> Profile:
    """The profile declared for ``dtype`` in the mapping ``subject.profile``, else the default of that dtype.

    Raises:
        TypeError: ``subject.profile`` is no mapping from dtype names to Profiles of that dtype.
    """
    declared = getattr(subject, "profile", None)
    if declared is None:
        return Profile.default(dtype)
    name = subject_name(subject)
    if not isinstance(declared, Mapping):
        raise TypeError(f"{name}.profile must map dtype names to Profiles, got {type(declared).__name__}")
    profile = declared.get(dtype)
    if profile is None:
        return Profile.default(dtype)
    if not isinstance(profile, Profile) or profile.dtype != dtype:
        raise TypeError(f"{name}.profile[{dtype!r}] must be a Profile of dtype {dtype!r}, got {profile!r}")
    return profile


def require_subject(subject: object) -> None:
    """Raise TypeError, in one sentence, unless ``subject`` offers an operation and declares itself consistently."""
    if not any(offers(subject, operation) for operation in OPERATIONS):
        raise TypeError(f"{subject_name(subject)} is not a subject: it has none of the methods {', '.join(OPERATIONS)}")
    for dtype in supports_of(subject).dtypes:
        profile_of(subject, dtype)
