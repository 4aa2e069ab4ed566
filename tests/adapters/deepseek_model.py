"""A file with the interface of DeepSeek-V3's ``inference/model.py``, in few lines: attention only, on one rank."""

import math
from dataclasses import dataclass

import torch
from kernel import act_quant, fp8_gemm, weight_dequant  # noqa: F401
from torch import nn

attn_impl = "absorb"


@dataclass
class ModelArgs:
    max_batch_size: int = 8
    max_seq_len: int = 16384
    dim: int = 2048
    n_heads: int = 16
    q_lora_rank: int = 0
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    original_seq_len: int = 4096
    rope_theta: float = 10000.0
    rope_factor: float = 40
    beta_fast: int = 32
    beta_slow: int = 1
    mscale: float = 1.0


def precompute_freqs_cis(args):
    r = args.qk_rope_head_dim
    freqs = 1.0 / args.rope_theta ** (torch.arange(0, r, 2, dtype=torch.float32) / r)
    if args.max_seq_len > args.original_seq_len:

        def pair(turns):
            return r * math.log(args.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(args.rope_theta))

        low, high = max(math.floor(pair(args.beta_fast)), 0), min(math.ceil(pair(args.beta_slow)), r - 1)
        ramp = ((torch.arange(r // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
        freqs = freqs / args.rope_factor * ramp + freqs * (1 - ramp)
    angles = torch.outer(torch.arange(args.max_seq_len), freqs)
    return torch.polar(torch.ones_like(angles), angles)


def rotated(x, freqs_cis):
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * freqs_cis[None, :, None]).flatten(-2).to(x.dtype)


class Norm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, 1e-6)


class MLA(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.args, h, c = args, args.n_heads, args.kv_lora_rank
        n, r, v = args.qk_nope_head_dim, args.qk_rope_head_dim, args.v_head_dim

        def matrix(width, height):
            return nn.Linear(width, height, bias=False)

        if args.q_lora_rank:
            self.wq_a, self.q_norm = matrix(args.dim, args.q_lora_rank), Norm(args.q_lora_rank)
            self.wq_b = matrix(args.q_lora_rank, h * (n + r))
        else:
            self.wq = matrix(args.dim, h * (n + r))
        self.wkv_a, self.kv_norm, self.wkv_b = matrix(args.dim, c + r), Norm(c), matrix(c, h * (n + v))
        self.wo = matrix(h * v, args.dim)
        self.scale = (n + r) ** -0.5
        if args.max_seq_len > args.original_seq_len:
            self.scale *= (0.1 * args.mscale * math.log(args.rope_factor) + 1) ** 2
        sizes = {"kv_cache": (c,), "pe_cache": (r,)}
        if attn_impl == "naive":
            sizes = {"k_cache": (h, n + r), "v_cache": (h, v)}
        for name, size in sizes.items():
            self.register_buffer(name, torch.zeros(args.max_batch_size, args.max_seq_len, *size), persistent=False)

    def forward(self, x, start_pos, freqs_cis, mask):
        args, (b, s, _) = self.args, x.shape
        n, r, v, end = args.qk_nope_head_dim, args.qk_rope_head_dim, args.v_head_dim, start_pos + x.shape[1]
        q = self.wq_b(self.q_norm(self.wq_a(x))) if args.q_lora_rank else self.wq(x)
        q_nope, q_pe = q.view(b, s, args.n_heads, n + r).split([n, r], dim=-1)
        q_pe = rotated(q_pe, freqs_cis)
        latent, k_pe = self.wkv_a(x).split([args.kv_lora_rank, r], dim=-1)
        latent, k_pe = self.kv_norm(latent), rotated(k_pe.unsqueeze(2), freqs_cis)
        if attn_impl == "naive":
            k_nope, value = self.wkv_b(latent).view(b, s, args.n_heads, n + v).split([n, v], dim=-1)
            self.k_cache[:b, start_pos:end] = torch.cat([k_nope, k_pe.expand(-1, -1, args.n_heads, -1)], dim=-1)
            self.v_cache[:b, start_pos:end] = value
            q = torch.cat([q_nope, q_pe], dim=-1)
            scores = torch.einsum("bshd,bthd->bsht", q, self.k_cache[:b, :end]) * self.scale
        else:
            w = self.wkv_b.weight.view(args.n_heads, n + v, -1)
            self.kv_cache[:b, start_pos:end], self.pe_cache[:b, start_pos:end] = latent, k_pe.squeeze(2)
            q_nope = torch.einsum("bshn,hnc->bshc", q_nope, w[:, :n])
            scores = torch.einsum("bshc,btc->bsht", q_nope, self.kv_cache[:b, :end])
            scores = (scores + torch.einsum("bshr,btr->bsht", q_pe, self.pe_cache[:b, :end])) * self.scale
        if mask is not None:
            scores = scores + mask.unsqueeze(1)
        p = scores.softmax(dim=-1, dtype=torch.float32).to(x.dtype)
        if attn_impl == "naive":
            out = torch.einsum("bsht,bthv->bshv", p, self.v_cache[:b, :end])
        else:
            out = torch.einsum("bsht,btc->bshc", p, self.kv_cache[:b, :end])
            out = torch.einsum("bshc,hvc->bshv", out, w[:, n:])
        return self.wo(out.flatten(2))
