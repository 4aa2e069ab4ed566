"""Signatures of public MLA kernels, as data: a row says how a kernel is called, and what comes back where.

A value of ``arguments`` is a word of ``words`` with the axes in which it is passed, "q[t,h,d]", or a constant; a text stands in quotes,
"'text'". Letters: b, s, h, c, r, v as in contracts, d = c + r (or n + r in prefill), p pages, n tokens of a page, t tokens of all
sequences, m = p · n slots.
"out", "lse" and "scratch" are memory made for the call: out in the dtype of q, others in float32.

Facts, no text: each row names where its parameters and conventions were read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mla_spec.subjects.supports import DTYPES, Supports

NARROW = ("float16", "bfloat16")
REAL = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class KernelSignature:
    """How one public kernel is called.

    Attributes:
        call: where its package has it, "module:object".
        source: where its facts were read: repository or package, file, commit or version.
        operation: of the contract that it implements.
        arguments: by its parameters' names, what is passed.
        plan: what is passed to its method ``plan`` first, where ``run`` is then called; empty for a function.
        positional: whether arguments are passed by place, as compiled operators take them.
        returns: what it returns, in order; "_" for what nobody needs. What is not returned is memory among the arguments.
        lse_base: of the logarithm.
        default_scale: what it takes where no scale is passed, "" where one must be. MLA's own is (n + r)^-1/2 in every form, so the
            scale is always passed.
        causal: its own rule, in words.
        supports: least and greatest sizes, dtypes, rows without keys.
        arithmetic: by dtype, what its profile has other than the default.
        hardware: what it needs.
    """

    call: str
    source: str
    operation: Literal["decode", "ragged_decode", "rank_decode", "prefill"] = "decode"
    arguments: Mapping[str, Any]
    plan: Mapping[str, Any] = field(default_factory=dict)
    positional: bool = False
    returns: tuple[str, ...] = ()
    lse_base: Literal["e", "2"] = "e"
    default_scale: str
    causal: str
    supports: Supports
    arithmetic: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    hardware: str = "a GPU"


def _same(dtypes: tuple[str, ...], **arithmetic: Any) -> dict[str, Mapping[str, Any]]:
    return dict.fromkeys(dtypes, arithmetic)


MLA = ((512, 64),)

_OF_BATCHES: Mapping[str, KernelSignature] = {
    "flash-mla": KernelSignature(
        call="flash_mla:flash_mla_with_kvcache",
        source="deepseek-ai/FlashMLA flash_mla/flash_mla_interface.py 02fe0d0",
        arguments={
            "q": "q",
            "k_cache": "kv",
            "block_table": "block_table",
            "cache_seqlens": "seqlens",
            "head_dim_v": "kv_lora_rank",
            "tile_scheduler_metadata": "metadata",
            "softmax_scale": "scale",
            "causal": "causal",
        },
        returns=("out[b,s,h,c]", "lse[b,h,s]"),
        default_scale="(c + r)^-1/2",
        causal="an argument, False by default, bottom-right",
        supports=Supports(dtypes=NARROW, page_sizes=(64,), latent_dims=MLA, empty_row="zero/+inf", backward=()),
        arithmetic=_same(NARROW, tile=64),
    ),
    "flashinfer-mla": KernelSignature(
        call="flashinfer.mla:BatchMLAPagedAttentionWrapper",
        source="flashinfer-ai/flashinfer flashinfer/mla/_core.py fb28d72",
        plan={
            "qo_indptr": "query_indptr",
            "kv_indptr": "page_indptr",
            "kv_indices": "page_indices",
            "kv_len_arr": "seqlens",
            "num_heads": "heads",
            "head_dim_ckv": "kv_lora_rank",
            "head_dim_kpe": "qk_rope_head_dim",
            "page_size": "page_size",
            "causal": "causal",
            "sm_scale": "scale",
            "q_data_type": "dtype",
            "kv_data_type": "dtype",
        },
        arguments={
            "q_nope": "q_latent[t,h,c]",
            "q_pe": "q_pe[t,h,r]",
            "ckv_cache": "latent[p,n,c]",
            "kpe_cache": "k_pe[p,n,r]",
            "return_lse": True,
        },
        returns=("out[t,h,c]", "lse[t,h]"),
        lse_base="2",
        default_scale="",
        causal="an argument of plan, bottom-right",
        supports=Supports(dtypes=NARROW, latent_dims=MLA, empty_row="unsupported", backward=()),
    ),
    "flashinfer-trtllm-mla": KernelSignature(
        call="flashinfer.mla:trtllm_batch_decode_with_kv_cache_mla",
        source="flashinfer-ai/flashinfer flashinfer/mla/_core.py fb28d72",
        arguments={
            "query": "q",
            "kv_cache": "kv[p,n,d]",
            "workspace_buffer": "workspace",
            "qk_nope_head_dim": 128,
            "kv_lora_rank": "kv_lora_rank",
            "qk_rope_head_dim": "qk_rope_head_dim",
            "block_tables": "block_table",
            "seq_lens": "seqlens",
            "max_seq_len": "longest",
            "bmm1_scale": "scale",
            "bmm2_scale": 1.0,
            "return_lse": True,
        },
        returns=("out[b,s,h,c]", "lse[t,h]"),
        default_scale="1",
        causal="always, bottom-right",
        supports=Supports(
            dtypes=("bfloat16",),
            page_sizes=(32, 64),
            latent_dims=MLA,
            causal=(True,),
            empty_row="unsupported",
            backward=(),
        ),
    ),
    "vllm-triton": KernelSignature(
        call="vllm.v1.attention.ops.triton_decode_attention:decode_attention_fwd",
        source="vllm 0.32.0 vllm/v1/attention/ops/triton_decode_attention.py",
        arguments={
            "q": "q[t,h,d]",
            "k_buffer": "kv",
            "v_buffer": "latent",
            "o": "out[t,h,c]",
            "lse": "lse[t,h]",
            "req_to_token": "block_table",
            "b_seq_len": "seqlens",
            "attn_logits": "scratch[t,h,4,c+1]",
            "num_kv_splits": 4,
            "sm_scale": "scale",
            "page_size": "page_size",
            "is_mla": True,
        },
        default_scale="",
        causal="one query sees all keys",
        supports=Supports(dtypes=REAL, max_s=1, empty_row="unsupported", backward=()),
        arithmetic=_same(REAL, tile=32, splits=4),
    ),
    "vllm-cutlass": KernelSignature(
        call="vllm._custom_ops:sm100_cutlass_mla_decode",
        source="vllm 0.32.0 vllm/_custom_ops.py",
        arguments={
            "out": "out[t,h,c]",
            "lse": "lse[t,h]",
            "q_nope": "q_latent[t,h,c]",
            "q_pe": "q_pe[t,h,r]",
            "kv_c_and_k_pe_cache": "kv[p,n,d]",
            "seq_lens": "seqlens",
            "page_table": "block_table",
            "workspace": "workspace",
            "scale": "scale",
            "num_kv_splits": 1,
        },
        positional=True,
        default_scale="",
        causal="one query sees all keys",
        supports=Supports(
            dtypes=NARROW,
            page_sizes=(128,),
            num_heads=(128,),
            latent_dims=MLA,
            max_s=1,
            empty_row="unsupported",
            backward=(),
        ),
    ),
    "sglang-decode": KernelSignature(
        call="sglang.kernels.ops.attention.decode_attention:decode_attention_fwd",
        source="sglang 0.5.23 sglang/kernels/ops/attention/decode_attention.py",
        arguments={
            "q": "q[t,h,d]",
            "k_buffer": "kv[m,1,d]",
            "v_buffer": "latent[m,1,c]",
            "o": "out[t,h,c]",
            "kv_indptr": "slot_indptr",
            "kv_indices": "slot_indices",
            "attn_logits": "scratch[t,h,4,c]",
            "attn_lse": "scratch[t,h,4]",
            "num_kv_splits": "four_splits",
            "max_kv_splits": 4,
            "sm_scale": "scale",
            "k_scale": 1.0,
            "v_scale": 1.0,
        },
        default_scale="",
        causal="one query sees all keys",
        supports=Supports(dtypes=REAL, max_s=1, lse=False, empty_row="unsupported", backward=()),
        arithmetic=_same(REAL, tile=32, splits=4),
    ),
    "sglang-extend": KernelSignature(
        call="sglang.kernels.ops.attention.extend_attention:extend_attention_fwd",
        source="sglang 0.5.23 sglang/kernels/ops/attention/extend_attention.py",
        arguments={
            "q_extend": "q[t,h,d]",
            "k_extend": "new_kv[t,1,d]",
            "v_extend": "new_latent[t,1,c]",
            "o_extend": "out[t,h,c]",
            "k_buffer": "kv[m,1,d]",
            "v_buffer": "latent[m,1,c]",
            "qo_indptr": "query_indptr",
            "kv_indptr": "prefix_indptr",
            "kv_indices": "prefix_indices",
            "custom_mask": None,
            "is_causal": True,
            "mask_indptr": None,
            "max_len_extend": "queries",
            "k_scale": 1.0,
            "v_scale": 1.0,
            "sm_scale": "scale",
            "lse_extend": "lse[t,h]",
        },
        default_scale="(c + r)^-1/2",
        causal="an argument, bottom-right",
        supports=Supports(dtypes=REAL, causal=(True,), empty_row="unsupported", backward=()),
        arithmetic=_same(REAL, tile=32),
    ),
    "aiter-mla": KernelSignature(
        call="aiter.mla:mla_decode_fwd",
        source="ROCm/aiter aiter/mla.py 000edf3",
        arguments={
            "q": "q[t,h,d]",
            "kv_buffer": "kv",
            "o": "out[t,h,c]",
            "qo_indptr": "query_indptr",
            "kv_indptr": "page_indptr",
            "kv_indices": "page_indices",
            "kv_last_page_lens": "last_page_len",
            "max_seqlen_q": "queries",
            "page_size": "page_size",
            "sm_scale": "scale",
            "return_lse": True,
            "causal": "causal",
        },
        returns=("_", "lse[t,h]"),
        default_scale="(c + r)^-1/2",
        causal="an argument, True by default, bottom-right",
        supports=Supports(
            dtypes=("bfloat16",), num_heads=(16, 128), latent_dims=MLA, empty_row="unsupported", backward=()
        ),
        hardware="an AMD GPU",
    ),
    "aiter-triton-mla": KernelSignature(
        call="aiter.ops.triton.attention.mla:mla_decode_fwd",
        source="ROCm/aiter aiter/ops/triton/attention/mla.py 2038b2d",
        arguments={
            "q": "q[t,h,d]",
            "kv_buffer": "kv",
            "out": "out[t,h,c]",
            "cu_seqlens_q": "query_indptr",
            "seqused_k": "seqlens",
            "max_seqlen_kv": "longest",
            "block_tables": "block_table",
            "softmax_scale": "scale",
            "kv_lora_rank": "kv_lora_rank",
            "qk_rope_head_dim": "qk_rope_head_dim",
            "causal": "causal",
            "q_descale": None,
            "kv_descale": None,
        },
        default_scale="",
        causal="True is the only value, bottom-right",
        supports=Supports(dtypes=("bfloat16",), causal=(True,), lse=False, empty_row="unsupported", backward=()),
        hardware="an AMD GPU",
    ),
    "flash-attn-3-mla": KernelSignature(
        call="flash_attn_interface:flash_attn_with_kvcache",
        source="Dao-AILab/flash-attention hopper/flash_attn_interface.py 0251105",
        arguments={
            "q": "q_pe",
            "k_cache": "k_pe",
            "v_cache": "latent",
            "qv": "q_latent",
            "page_table": "block_table",
            "cache_seqlens": "seqlens",
            "softmax_scale": "scale",
            "causal": "causal",
            "return_softmax_lse": True,
        },
        returns=("out[b,s,h,c]", "lse[b,h,s]"),
        default_scale="(r + c)^-1/2",
        causal="an argument, False by default, bottom-right",
        supports=Supports(dtypes=NARROW, latent_dims=MLA, empty_row="unsupported", backward=()),
    ),
    "flash-attn-4": KernelSignature(
        call="flash_attn.cute.interface:flash_attn_varlen_func",
        source="Dao-AILab/flash-attention flash_attn/cute/interface.py 0251105",
        arguments={
            "q": "q_pe",
            "k": "k_pe",
            "v": "latent",
            "qv": "q_latent",
            "seqused_k": "seqlens",
            "page_table": "block_table",
            "softmax_scale": "scale",
            "causal": "causal",
            "return_lse": True,
        },
        returns=("out[b,s,h,c]", "lse[b,s,h]"),
        default_scale="(r + c)^-1/2",
        causal="an argument, False by default, bottom-right",
        supports=Supports(dtypes=NARROW, latent_dims=MLA, empty_row="unsupported", backward=()),
    ),
    "flash-attn-varlen": KernelSignature(
        call="flash_attn:flash_attn_varlen_func",
        source="Dao-AILab/flash-attention flash_attn/flash_attn_interface.py 0053002",
        operation="prefill",
        arguments={
            "q": "q",
            "k": "k",
            "v": "v",
            "cu_seqlens_q": "cu_seqlens_q",
            "cu_seqlens_k": "cu_seqlens_k",
            "max_seqlen_q": "longest_q",
            "max_seqlen_k": "longest_k",
            "softmax_scale": "scale",
            "causal": "causal",
            "return_attn_probs": True,
        },
        returns=("out[t,h,v]", "lse[h,t]"),
        default_scale="(n + r)^-1/2",
        causal="an argument, False by default, bottom-right",
        supports=Supports(dtypes=NARROW, prefill_dims=((192, 192), (128, 128)), empty_row="unsupported", backward=()),
    ),
    "lmdeploy": KernelSignature(
        call="lmdeploy.pytorch.kernels.cuda.pagedattention:flash_attn_with_kvcache",
        source="lmdeploy 0.18.0 lmdeploy/pytorch/kernels/cuda/pagedattention.py",
        arguments={
            "q": "q[t,h,d]",
            "k_cache": "kv",
            "v_cache": "latent",
            "cache_seqlens": "seqlens",
            "page_table": "block_table",
            "max_seqlen_q": "queries",
            "softmax_scale": "scale",
            "causal": "causal",
        },
        returns=("out[t,h,c]",),
        default_scale="(c + r)^-1/2",
        causal="an argument",
        supports=Supports(dtypes=NARROW, page_sizes=(16, 32, 64), lse=False, empty_row="unsupported", backward=()),
    ),
    "torch-sdpa": KernelSignature(
        call="torch.nn.functional:scaled_dot_product_attention",
        source="torch 2.13.0 torch.nn.functional",
        operation="prefill",
        arguments={
            "query": "padded_q",
            "key": "padded_k",
            "value": "padded_v",
            "attn_mask": "mask",
            "scale": "scale",
        },
        returns=("out[b,h,s,v]",),
        default_scale="(n + r)^-1/2",
        causal="in the mask; its own is_causal is top-left",
        supports=Supports(dtypes=DTYPES, lse=False),
        # In 16 bits the CPU's exp is a polynomial of degree 3 (ATen/cpu/vec/vec512/vec512_float.h, fexp_u20).
        arithmetic=_same(("float64", "float32"), tile=16, operand_roundings=4)
        | _same(NARROW, tile=16, operand_roundings=4, exp_error=2048.0),
        hardware="",
    ),
}

# Where a rank has no key that a query sees, a merge needs an LSE of -inf. FlashAttention's softmax gives that (hopper/softmax.h);
# FlashInfer documents nothing.
_OF_RANKS: Mapping[str, KernelSignature] = {
    "vllm-flash-attn-rank": KernelSignature(
        call="vllm.vllm_flash_attn.flash_attn_interface:flash_attn_varlen_func",
        source="vllm 0.32.0 vllm/vllm_flash_attn/flash_attn_interface.py; v1/attention/backends/mla/flashattn_mla.py",
        operation="rank_decode",
        arguments={
            "q": "q_pe[t,h,r]",
            "k": "k_pe",
            "v": "latent",
            "q_v": "q_latent[t,h,c]",
            "max_seqlen_q": "queries",
            "cu_seqlens_q": "query_indptr",
            "max_seqlen_k": "longest_own",
            "seqused_k": "own_seqlens",
            "block_table": "block_table",
            "softmax_scale": "scale",
            "causal": "causal",
            "return_softmax_lse": True,
            "fa_version": 3,
            "cp_world_size": "ranks",
            "cp_rank": "rank",
            "cp_tot_seqused_k": "seqlens",
        },
        returns=("out[t,h,c]", "lse[h,t]"),
        default_scale="(r + c)^-1/2",
        causal="an argument, False by default, bottom-right in the whole",
        supports=Supports(dtypes=NARROW, latent_dims=MLA, interleaves=(1,), backward=()),
    ),
    "flashinfer-trtllm-mla-rank": KernelSignature(
        call="flashinfer.mla:trtllm_batch_decode_with_kv_cache_mla",
        source="vllm 0.32.0 vllm/v1/attention/backends/mla/flashinfer_mla.py; flashinfer/mla/_batch_mla/_functional.py",
        operation="rank_decode",
        arguments={
            "query": "q",
            "kv_cache": "kv[p,n,d]",
            "workspace_buffer": "workspace",
            "qk_nope_head_dim": 128,
            "kv_lora_rank": "kv_lora_rank",
            "qk_rope_head_dim": "qk_rope_head_dim",
            "block_tables": "block_table",
            "seq_lens": "own_seqlens",
            "max_seq_len": "longest_own",
            "bmm1_scale": "scale",
            "bmm2_scale": 1.0,
            "return_lse": True,
            "backend": "'cute-dsl'",
            "enable_dcp": True,
            "cp_world": "ranks",
            "cp_rank": "rank",
            "causal_seqlens_kv_global": "seqlens",
        },
        returns=("out[b,s,h,c]", "lse[b,s,h]"),
        default_scale="1",
        causal="always, bottom-right in the whole",
        supports=Supports(
            dtypes=("bfloat16",),
            page_sizes=(32, 64),
            latent_dims=MLA,
            causal=(True,),
            interleaves=(1,),
            backward=(),
        ),
    ),
}

_FLASH_ATTN_3 = _OF_BATCHES["flash-attn-3-mla"]

SIGNATURES: Mapping[str, KernelSignature] = {
    **_OF_BATCHES,
    **_OF_RANKS,
    "flashinfer-mla-ragged": replace(_OF_BATCHES["flashinfer-mla"], operation="ragged_decode"),
    "sglang-extend-ragged": replace(_OF_BATCHES["sglang-extend"], operation="ragged_decode"),
    "flash-attn-3-mla-ragged": replace(
        _FLASH_ATTN_3,
        operation="ragged_decode",
        arguments={**_FLASH_ATTN_3.arguments, "cu_seqlens_q": "query_indptr", "max_seqlen_q": "queries"},
        returns=("out[t,h,c]", "lse[h,t]"),
    ),
}
"""By the name that ``--signature`` takes. A kernel that takes offsets of queries has a second one, for packed queries; one that takes
its rank of context parallelism, another."""
