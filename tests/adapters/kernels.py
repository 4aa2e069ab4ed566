"""Honest PyTorch kernels, each called as one public kernel is. They share one attention, and nothing with adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """(out [s, h, v], natural LSE [s, h]) of q [s, h, d] over k [t, d] or [t, h, d], bottom-right where causal."""
    keys, values = (x.float()[:, None] if x.ndim == 2 else x.float() for x in (k, v))
    keys, values = (x.expand(-1, q.shape[1], -1).transpose(0, 1) for x in (keys, values))  # [h, t, ·]
    scores = q.float().transpose(0, 1) @ keys.transpose(1, 2) * scale  # [h, s, t]
    s, t = scores.shape[1:]
    if causal:
        future = torch.arange(t) > t - s + torch.arange(s)[:, None]
        scores = scores.masked_fill(future, -torch.inf)
    lse = scores.logsumexp(-1) if t else torch.full(scores.shape[:2], -torch.inf)
    empty = lse == -torch.inf
    p = torch.exp(scores - lse.masked_fill(empty, 0.0)[..., None])
    return (p @ values).transpose(0, 1).to(q.dtype), lse.transpose(0, 1)


def paged(table: Tensor, length: int, cache: Tensor) -> Tensor:
    """The rows of one sequence, [t, d], of a cache [pages, n, 1, d] or [pages, n, d]."""
    n = cache.shape[1]
    pages = cache[table[: -(-length // n)].long()]
    return pages.flatten(0, 1)[:length].flatten(1)


def listed(indptr: Tensor, i: int, indices: Tensor) -> Tensor:
    return indices[int(indptr[i]) : int(indptr[i + 1])].long()


def batched(q: Tensor, rows: Any, c: int, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """(out [b, s, h, c], LSE [b, s, h]) where ``rows(i)`` are those of sequence i."""
    results = [attend(q[i], rows(i), rows(i)[:, :c], scale, causal) for i in range(len(q))]
    out, lse = (torch.stack(x) for x in zip(*results, strict=True))
    return out, lse


def get_mla_metadata():
    """As FlashMLA's: empty, and filled by the call that it is for."""
    return [], None


def flash_mla(q, k_cache, block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits=None,
              softmax_scale=None, causal=False):  # fmt: skip
    assert tile_scheduler_metadata == []
    tile_scheduler_metadata.append(cache_seqlens.tolist())
    rows = lambda i: paged(block_table[i], int(cache_seqlens[i]), k_cache)  # noqa: E731
    out, lse = batched(q, rows, head_dim_v, softmax_scale, causal)
    return out, lse.masked_fill(lse == -torch.inf, torch.inf).transpose(1, 2)


class FlashInferMLA:
    """Base 2, in [t, h]."""

    def plan(self, **options):
        self.options = options

    def run(self, q_nope, q_pe, ckv_cache, kpe_cache, return_lse):
        o = self.options
        cache, q = torch.cat([ckv_cache, kpe_cache], -1), torch.cat([q_nope, q_pe], -1)
        outs, lses = [], []
        for i in range(len(o["kv_len_arr"])):
            queries = slice(int(o["qo_indptr"][i]), int(o["qo_indptr"][i + 1]))
            pages = cache[listed(o["kv_indptr"], i, o["kv_indices"])]
            rows = pages.flatten(0, 1)[: int(o["kv_len_arr"][i])]
            out, lse = attend(q[queries], rows, rows[:, : o["head_dim_ckv"]], o["sm_scale"], o["causal"])
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses) / torch.log(torch.tensor(2.0))


def flashinfer_trtllm(query, kv_cache, workspace_buffer, qk_nope_head_dim, kv_lora_rank, qk_rope_head_dim, block_tables,
                      seq_lens, max_seq_len, bmm1_scale=1.0, bmm2_scale=1.0, return_lse=False):  # fmt: skip
    rows = lambda i: paged(block_tables[i], int(seq_lens[i]), kv_cache)  # noqa: E731
    out, lse = batched(query, rows, kv_lora_rank, bmm1_scale, True)
    return out * bmm2_scale, lse.flatten(0, 1)


def vllm_triton(q, k_buffer, v_buffer, o, lse, req_to_token, b_seq_len, attn_logits, num_kv_splits, sm_scale, page_size=1,
                is_mla=False):  # fmt: skip
    for i in range(len(q)):
        rows = paged(req_to_token[i], int(b_seq_len[i]), k_buffer)
        out, logsum = attend(q[i : i + 1], rows, rows[:, : v_buffer.shape[-1]], sm_scale, False)
        o[i], lse[i] = out[0], logsum[0]


def vllm_cutlass(out, lse, q_nope, q_pe, kv_c_and_k_pe_cache, seq_lens, page_table, workspace, scale, num_kv_splits):
    assert q_nope.shape[1] == 128
    vllm_triton(
        torch.cat([q_nope, q_pe], -1), kv_c_and_k_pe_cache, q_nope, out, lse, page_table, seq_lens, None, 1, scale
    )
    return out


def sglang_decode(q, k_buffer, v_buffer, o, kv_indptr, kv_indices, attn_logits, attn_lse, num_kv_splits, max_kv_splits,
                  sm_scale, k_scale, v_scale):  # fmt: skip
    for i in range(len(q)):
        slots = listed(kv_indptr, i, kv_indices)
        o[i] = attend(q[i : i + 1], k_buffer[slots, 0], v_buffer[slots, 0], sm_scale, False)[0][0]


def sglang_extend(q_extend, k_extend, v_extend, o_extend, k_buffer, v_buffer, qo_indptr, kv_indptr, kv_indices,
                  custom_mask, is_causal, mask_indptr, max_len_extend, k_scale, v_scale, sm_scale=None,
                  lse_extend=None):  # fmt: skip
    for i in range(len(qo_indptr) - 1):
        new, old = slice(int(qo_indptr[i]), int(qo_indptr[i + 1])), listed(kv_indptr, i, kv_indices)
        k, v = torch.cat([k_buffer[old, 0], k_extend[new, 0]]), torch.cat([v_buffer[old, 0], v_extend[new, 0]])
        o_extend[new], lse_extend[new] = attend(q_extend[new], k, v, sm_scale, is_causal)


def aiter_mla(q, kv_buffer, o, qo_indptr, kv_indptr, kv_indices, kv_last_page_lens, max_seqlen_q, page_size=1, nhead_kv=1,
              sm_scale=None, return_lse=False, causal=True):  # fmt: skip
    lse = torch.empty(q.shape[:2])
    for i in range(len(kv_last_page_lens)):
        queries, pages = slice(int(qo_indptr[i]), int(qo_indptr[i + 1])), listed(kv_indptr, i, kv_indices)
        length = (len(pages) - 1) * page_size + int(kv_last_page_lens[i])
        rows = kv_buffer[pages].flatten(0, 1)[:length, 0]
        o[queries], lse[queries] = attend(q[queries], rows, rows[:, : o.shape[-1]], sm_scale, causal)
    return None, lse


def aiter_triton(q, kv_buffer, out, cu_seqlens_q, seqused_k, max_seqlen_kv, block_tables, softmax_scale, kv_lora_rank,
                 qk_rope_head_dim, causal, q_descale, kv_descale):  # fmt: skip
    assert causal
    for i in range(len(seqused_k)):
        queries = slice(int(cu_seqlens_q[i]), int(cu_seqlens_q[i + 1]))
        rows = paged(block_tables[i], int(seqused_k[i]), kv_buffer)
        out[queries] = attend(q[queries], rows, rows[:, :kv_lora_rank], softmax_scale, causal)[0]


def flash_attn_3(q, k_cache, v_cache, qv, page_table, cache_seqlens, softmax_scale=None, causal=False,
                 return_softmax_lse=False):  # fmt: skip
    # d here is that of q alone, which is why no default is MLA's.
    cache, whole = torch.cat([v_cache, k_cache], -1), torch.cat([qv, q], -1)
    rows = lambda i: paged(page_table[i], int(cache_seqlens[i]), cache)  # noqa: E731
    out, lse = batched(whole, rows, v_cache.shape[-1], softmax_scale, causal)
    return out, lse.transpose(1, 2), "more"


def flash_attn_3_ragged(q, k_cache, v_cache, qv, page_table, cache_seqlens, cu_seqlens_q, max_seqlen_q,
                        softmax_scale=None, causal=False, return_softmax_lse=False):  # fmt: skip
    assert max_seqlen_q == int(cu_seqlens_q.diff().max())
    cache, whole = torch.cat([v_cache, k_cache], -1), torch.cat([qv, q], -1)
    out, lse = torch.empty_like(qv), torch.empty(q.shape[1], len(q))
    for i in range(len(cache_seqlens)):
        mine, rows = slice(*cu_seqlens_q[i : i + 2].tolist()), paged(page_table[i], int(cache_seqlens[i]), cache)
        out[mine], logsum = attend(whole[mine], rows, rows[:, : v_cache.shape[-1]], softmax_scale, causal)
        lse[:, mine] = logsum.T
    return out, lse


def of_a_rank(q, rows, c, scale, causal, dealt):
    """(out [s, h, c], LSE [s, h]) of q [s, h, d] over the rows of one rank: of ``dealt`` (ranks, rank, tokens of the whole)."""
    ranks, rank, whole = dealt
    ends = [whole - len(q) + 1 + i if causal else whole for i in range(len(q))]
    seen = [max(0, end - rank + ranks - 1) // ranks for end in ends]
    outs, lses = zip(
        *(attend(q[i : i + 1], rows[:n], rows[:n, :c], scale, False) for i, n in enumerate(seen)), strict=True
    )
    return torch.cat(outs), torch.cat(lses)


def vllm_flash_attn(q, k, v, max_seqlen_q, cu_seqlens_q, max_seqlen_k, seqused_k=None, q_v=None, softmax_scale=None,
                    causal=False, block_table=None, return_softmax_lse=False, fa_version=2, cp_world_size=1, cp_rank=0,
                    cp_tot_seqused_k=None):  # fmt: skip
    assert fa_version == 3
    assert max_seqlen_k >= int(seqused_k.max())
    cache, whole = torch.cat([v, k], -1), torch.cat([q_v, q], -1)
    out, lse = torch.empty_like(q_v), torch.empty(q.shape[1], len(q))
    for i in range(len(seqused_k)):
        mine, rows = slice(*cu_seqlens_q[i : i + 2].tolist()), paged(block_table[i], int(seqused_k[i]), cache)
        dealt = (cp_world_size, cp_rank, int(cp_tot_seqused_k[i]))
        out[mine], logsum = of_a_rank(whole[mine], rows, v.shape[-1], softmax_scale, causal, dealt)
        lse[:, mine] = logsum.T
    return out, lse


def flashinfer_trtllm_rank(query, kv_cache, workspace_buffer, qk_nope_head_dim, kv_lora_rank, qk_rope_head_dim, block_tables,
                           seq_lens, max_seq_len, bmm1_scale=1.0, bmm2_scale=1.0, return_lse=False, backend="auto",
                           enable_dcp=False, cp_world=1, cp_rank=0, causal_seqlens_kv_global=None):  # fmt: skip
    assert enable_dcp
    outs, lses = [], []
    for i in range(len(query)):
        rows, dealt = (
            paged(block_tables[i], int(seq_lens[i]), kv_cache),
            (cp_world, cp_rank, int(causal_seqlens_kv_global[i])),
        )
        out, lse = of_a_rank(query[i], rows, kv_lora_rank, bmm1_scale, True, dealt)
        outs.append(out * bmm2_scale)
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses)


def flash_attn_4(q, k, v, qv, seqused_k, page_table, softmax_scale=None, causal=False, return_lse=False):
    out, lse, _ = flash_attn_3(q, k, v, qv, page_table, seqused_k, softmax_scale, causal, True)
    return out, lse.transpose(1, 2)


def flash_attn_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
                      return_attn_probs=False):  # fmt: skip
    out, lse = q.new_empty(*q.shape[:2], v.shape[-1]), torch.empty(q.shape[1], len(q))
    for i in range(len(cu_seqlens_q) - 1):
        mine, keys = slice(*cu_seqlens_q[i : i + 2].tolist()), slice(*cu_seqlens_k[i : i + 2].tolist())
        out[mine], logsum = attend(q[mine], k[keys], v[keys], softmax_scale, causal)
        lse[:, mine] = logsum.T
    return out, lse, None


def lmdeploy(q, k_cache, v_cache, cache_seqlens, page_table, max_seqlen_q, softmax_scale=None, causal=False):
    whole = q.unflatten(0, (-1, max_seqlen_q))
    rows = lambda i: paged(page_table[i], int(cache_seqlens[i]), k_cache)  # noqa: E731
    return batched(whole, rows, v_cache.shape[-1], softmax_scale, causal)[0].flatten(0, 1)


KERNELS = {
    "flash-mla": flash_mla,
    "flashinfer-mla": FlashInferMLA(),
    "flashinfer-trtllm-mla": flashinfer_trtllm,
    "vllm-triton": vllm_triton,
    "vllm-cutlass": vllm_cutlass,
    "sglang-decode": sglang_decode,
    "sglang-extend": sglang_extend,
    "aiter-mla": aiter_mla,
    "aiter-triton-mla": aiter_triton,
    "flash-attn-3-mla": flash_attn_3,
    "flash-attn-4": flash_attn_4,
    "flash-attn-varlen": flash_attn_varlen,
    "lmdeploy": lmdeploy,
    "vllm-flash-attn-rank": vllm_flash_attn,
    "flashinfer-trtllm-mla-rank": flashinfer_trtllm_rank,
    "flashinfer-mla-ragged": FlashInferMLA(),
    "sglang-extend-ragged": sglang_extend,
    "flash-attn-3-mla-ragged": flash_attn_3_ragged,
    "torch-sdpa": torch.nn.functional.scaled_dot_product_attention,
}
