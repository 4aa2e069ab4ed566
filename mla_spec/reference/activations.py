"""What one attention layer keeps of each token between the forward and the backward pass of a training step.

DeepSeek-V2 compresses the queries for this alone: "in order to reduce the activation memory during training, we also perform
low-rank compression for the queries, even if it cannot reduce the KV cache" (arXiv 2405.04434, section 2.1.2). It does so
where the up-projections are computed again in the backward pass, as DeepSeek-V3 does: "we recompute all RMSNorm operations
and MLA up-projections during back-propagation" (arXiv 2412.19437, section 3.2.3). Where they are not, compression adds the
two latents of the query to what is kept.

Counted is every tensor from the layer's input to the operand of o_proj, in the explicit form, that a backward pass needs:

================  ============  ===========================================  ========================================
tensor            elements      needed by                                    kept
================  ============  ===========================================  ========================================
hidden            e             ∂W of the down-projections or of q_proj      always
q_down            q_lora_rank   RMSNorm, as its operand                      with compression
c_q               q_lora_rank   ∂W of q_b_proj                               with compression, unless recomputed
q                 h (n + r)     attention                                    unless recomputed; always where there is no
                                                                             up-projection to recompute it from
kv_down           c + r         RMSNorm; k when it is recomputed             always
latent            c             ∂W of kv_b_proj                              unless recomputed
k, v              h (n+r), h v  attention                                    unless recomputed
out               h v           attention, ∂W of o_proj                      always
rms               1 per norm    RMSNorm                                      unless recomputed
lse               h             attention, which forms P anew                always
================  ============  ===========================================  ========================================

Attention is a fused kernel that keeps no P, of which there would be h numbers a token and key; rotary embedding and constant
factors keep nothing; k_pe is kept as a part of kv_down, one tensor, and again in the k of every head. rms and lse are
float32, or float64 where the rest is. Weights, their gradients, masks and tables of cos and sin, which layers share, are not
counted, nor are an output gate and the norm before the layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from mla_spec.reference.formats import format_of


@dataclass(frozen=True)
class Activation:
    """A tensor that is kept.

    Attributes:
        name: as in the table above.
        elements: per token.
        statistic: in float32 or better, not in the dtype of the others.
    """

    name: str
    elements: int
    statistic: bool = False

    def bytes_per_token(self, dtype: str) -> int:
        """Where the layer computes in ``dtype``; ValueError where that is no format of whole bytes."""
        itemsize = format_of(dtype).itemsize
        return self.elements * (max(itemsize, 4) if self.statistic else itemsize)


def mla_activations(
    *,
    hidden_size: int,
    num_heads: int,
    q_lora_rank: int | None,
    kv_lora_rank: int,
    qk_nope_head_dim: int,
    qk_rope_head_dim: int,
    v_head_dim: int,
    recompute: bool,
) -> tuple[Activation, ...]:
    """What a layer keeps.

    Args:
        q_lora_rank: None without query compression.
        recompute: whether norms and up-projections are computed again in the backward pass.
    """
    h, c, r = num_heads, kv_lora_rank, qk_rope_head_dim
    qk, v = h * (qk_nope_head_dim + r), h * v_head_dim
    kept = [Activation("hidden", hidden_size)]
    if q_lora_rank is not None:
        kept.append(Activation("q_down", q_lora_rank))
    if q_lora_rank is not None and not recompute:
        kept += [Activation("c_q", q_lora_rank), Activation("q rms", 1, statistic=True)]
    if q_lora_rank is None or not recompute:
        kept.append(Activation("q", qk))
    kept.append(Activation("kv_down", c + r))
    if not recompute:
        kept += [Activation("latent", c), Activation("kv rms", 1, statistic=True)]
        kept += [Activation("k", qk), Activation("v", v)]
    return (*kept, Activation("out", v), Activation("lse", h, statistic=True))


def mha_activations(*, hidden_size: int, num_heads: int, qk_head_dim: int, v_head_dim: int) -> tuple[Activation, ...]:
    """What multi-head attention with these heads keeps. It has no norms and no up-projections to recompute."""
    h = num_heads
    return (
        Activation("hidden", hidden_size),
        Activation("q", h * qk_head_dim),
        Activation("k", h * qk_head_dim),
        Activation("v", h * v_head_dim),
        Activation("out", h * v_head_dim),
        Activation("lse", h, statistic=True),
    )


def bytes_per_token(kept: tuple[Activation, ...], dtype: str) -> int:
    """Bytes of all of them, of one token in one layer."""
    return sum(activation.bytes_per_token(dtype) for activation in kept)
