"""What a training step keeps: the formula against what PyTorch's autograd really saves, and the report of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mla_spec.adapters.pytorch import TorchExplicit
from mla_spec.front.activation_report import activation_report
from mla_spec.front.cli import main
from mla_spec.reference.activations import bytes_per_token, mha_activations, mla_activations
from mla_spec.reference.config import MLAConfig, RopeConfig
from mla_spec.reference.mla import weight_shapes

aten: Any = torch.ops.aten
BATCH, TOKENS = 2, 16


def config(q_lora_rank: int | None) -> MLAConfig:
    """Queries as wide as values, as PyTorch's fused attention on the CPU needs it."""
    return MLAConfig(
        hidden_size=10,
        num_heads=3,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=7,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=8,
        rope=RopeConfig(dim=4),
    )


def dims(c: MLAConfig) -> dict[str, Any]:
    names = (
        "hidden_size",
        "num_heads",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
    )
    return {name: getattr(c, name) for name in names}


class FusedNorm(torch.autograd.Function):
    """RMSNorm as one operation; PyTorch's own is fused on GPUs only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        return (x.float() * inverse * weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        grad, unit = grads[0].float(), x.float() * inverse
        y = grad * weight.float()
        x_grad = (y - unit * (unit * y).mean(dim=-1, keepdim=True)) * inverse
        return x_grad.to(x.dtype), (grad * unit).flatten(0, -2).sum(dim=0).to(weight.dtype), None


class FusedRope(torch.autograd.Function):
    """Rotary embedding as one operation, which keeps the tables alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return TorchExplicit().rotate(x.float(), cos, sin, interleaved=True).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return TorchExplicit().rotate(grads[0].float(), cos, -sin, interleaved=True).to(grads[0].dtype), None, None


class Layer:
    """An MLA layer of fused operations."""

    def __init__(self, c: MLAConfig) -> None:
        generator = torch.Generator().manual_seed(0)
        self.config = c
        self.weights = {
            name: (
                1 + torch.rand(shape, generator=generator) / 4
                if len(shape) == 1
                else torch.randn(shape, generator=generator) / 3
            )
            .to(torch.bfloat16)
            .requires_grad_()
            for name, shape in weight_shapes(c).items()
        }
        assert c.rope is not None
        cos, sin = TorchExplicit().cos_sin(torch.arange(TOKENS), c.rope, torch.float32)
        self.tables = cos[:, None], sin[:, None]  # [s, 1, r/2]

    def norm(self, x: Tensor, name: str) -> Tensor:
        result: Tensor = FusedNorm.apply(x, self.weights[name], self.config.latent_norm_eps)  # type: ignore[no-untyped-call]
        return result

    def query(self, x: Tensor) -> Tensor:
        """[b, h, s, n+r] of the query's latent, or of the hidden states without compression."""
        if self.config.q_lora_rank is None:
            q = F.linear(x, self.weights["q_proj"])
        else:
            q = F.linear(self.norm(x, "q_a_layernorm"), self.weights["q_b_proj"])
        q_nope, q_pe = q.unflatten(-1, (self.config.num_heads, -1)).split([4, 4], dim=-1)
        rotated = FusedRope.apply(q_pe, *self.tables)  # type: ignore[no-untyped-call]
        return torch.cat([q_nope, rotated], dim=-1).transpose(1, 2)

    def keys_and_values(self, down: Tensor) -> tuple[Tensor, Tensor]:
        """[b, h, t, n+r] and [b, h, t, v] of what kv_a_proj_with_mqa gives."""
        latent, k_pe = down.split([self.config.kv_lora_rank, 4], dim=-1)
        up = F.linear(self.norm(latent, "kv_a_layernorm"), self.weights["kv_b_proj"])
        k_nope, v = up.unflatten(-1, (self.config.num_heads, -1)).split([4, 8], dim=-1)
        k_pe = FusedRope.apply(k_pe[:, :, None], *self.tables)  # type: ignore[no-untyped-call]
        k = torch.cat([k_nope, k_pe.expand(-1, -1, self.config.num_heads, -1)], dim=-1)
        return k.transpose(1, 2), v.transpose(1, 2).contiguous()

    def down(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden if self.config.q_lora_rank is None else F.linear(hidden, self.weights["q_a_proj"])
        return x, F.linear(hidden, self.weights["kv_a_proj_with_mqa"])

    def output(self, out: Tensor) -> Tensor:
        return F.linear(out.transpose(1, 2).flatten(2), self.weights["o_proj"])

    def everything_kept(self, hidden: Tensor) -> Tensor:
        x, down = self.down(hidden)
        out = F.scaled_dot_product_attention(
            self.query(x), *self.keys_and_values(down), is_causal=True, scale=self.config.scale
        )
        return self.output(out)

    def recomputed(self, hidden: Tensor) -> Tensor:
        """The query is recomputed from its latent; without one it is kept, and not recomputed from the hidden states."""
        x, down = self.down(hidden)
        start = self.query(x) if self.config.q_lora_rank is None else x
        return self.output(Recomputed.apply(start, down, self, *self.weights.values()))  # type: ignore[no-untyped-call]


class Recomputed(torch.autograd.Function):
    """From the latents to the result of attention; the backward pass computes q, k and v again."""

    @staticmethod
    def operands(layer: Layer, start: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = start.view_as(start) if layer.config.q_lora_rank is None else layer.query(start)
        return (q, *layer.keys_and_values(down))

    @staticmethod
    def forward(ctx: Any, start: Tensor, down: Tensor, layer: Layer, *weights: Tensor) -> Tensor:
        q, k, v = Recomputed.operands(layer, start, down)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=layer.config.scale)
        ctx.save_for_backward(start, down, out, lse)
        ctx.layer = layer
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        start, down, out, lse = ctx.saved_tensors
        layer = ctx.layer
        start, down = start.detach().requires_grad_(), down.detach().requires_grad_()
        with torch.enable_grad():
            operands = Recomputed.operands(layer, start, down)
        of_attention = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grads[0], *(x.detach() for x in operands), out, lse, 0.0, True, scale=layer.config.scale
        )
        weights = tuple(layer.weights.values())
        start_grad, down_grad, *weight_grads = torch.autograd.grad(
            operands, (start, down, *weights), of_attention, allow_unused=True
        )
        return (start_grad, down_grad, None, *weight_grads)


def kept_bytes(layer: Layer, step: Callable[[Tensor], Tensor]) -> tuple[int, dict[str, Tensor]]:
    """Bytes of the storages that autograd keeps, those of weights and tables aside; and the gradients."""
    hidden = torch.randn(BATCH, TOKENS, layer.config.hidden_size, generator=torch.Generator().manual_seed(1))
    hidden = hidden.to(torch.bfloat16).requires_grad_()
    shared = {x.untyped_storage().data_ptr() for x in (*layer.weights.values(), *layer.tables)}
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in shared:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = step(hidden)
    names = ("hidden", *layer.weights)
    grads = torch.autograd.grad(out.float().square().sum(), (hidden, *layer.weights.values()))
    return sum(storages.values()), dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("q_lora_rank", [5, None])
@pytest.mark.parametrize("recompute", [False, True])
def test_autograd_keeps_what_the_formula_says(q_lora_rank: int | None, recompute: bool) -> None:
    layer = Layer(config(q_lora_rank))
    got, grads = kept_bytes(layer, layer.recomputed if recompute else layer.everything_kept)
    kept = mla_activations(**dims(layer.config), recompute=recompute)
    assert got == BATCH * TOKENS * bytes_per_token(kept, "bfloat16")
    reference = kept_bytes(layer, layer.everything_kept)[1]
    for name, grad in grads.items():
        assert torch.equal(grad, reference[name]), name
        assert grad.abs().max() > 0, name


def test_compression_of_queries_saves_where_they_are_recomputed() -> None:
    """DeepSeek-V3: 1536 numbers in the place of 128 · 192."""
    v3 = dims(MLAConfig.published("DeepSeek-V3"))
    with_compression, without = (
        {
            name: a.elements
            for name, a in ((a.name, a) for a in mla_activations(**{**v3, "q_lora_rank": rank}, recompute=True))
        }
        for rank in (1536, None)
    )
    assert with_compression == {"hidden": 7168, "q_down": 1536, "kv_down": 576, "out": 16384, "lse": 128}
    assert without == {"hidden": 7168, "q": 24576, "kv_down": 576, "out": 16384, "lse": 128}
    kept = [
        bytes_per_token(mla_activations(**{**v3, "q_lora_rank": rank}, recompute=False), "bfloat16")
        for rank in (1536, None)
    ]
    assert kept[0] - kept[1] == 2 * 2 * 1536 + 4


def test_everything_that_is_kept_has_its_name_and_size() -> None:
    kept = mla_activations(**dims(config(5)), recompute=False)
    assert {a.name: a.elements for a in kept} == {
        "hidden": 10,
        "q_down": 5,
        "c_q": 5,
        "q rms": 1,
        "q": 24,
        "kv_down": 11,
        "latent": 7,
        "kv rms": 1,
        "k": 24,
        "v": 24,
        "out": 24,
        "lse": 3,
    }
    assert [a.name for a in kept if a.statistic] == ["q rms", "kv rms", "lse"]


def test_statistics_are_wide() -> None:
    heads = {"hidden_size": 4, "num_heads": 2, "qk_head_dim": 3, "v_head_dim": 1}
    kept = mha_activations(**heads)
    assert {a.name: a.elements for a in kept} == {"hidden": 4, "q": 6, "k": 6, "v": 2, "out": 2, "lse": 2}
    assert [bytes_per_token(kept, d) for d in ("bfloat16", "float32", "float64")] == [
        2 * 20 + 8,
        4 * 20 + 8,
        8 * 20 + 16,
    ]


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "DeepSeek-V3", "--training", "--tokens", "4096"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("DeepSeek-V3: kept from forward to backward pass, 61 layers, bfloat16, 1 × 4096 tokens\n")
    own, kept, plain, _, mha = (" ".join(line.split()) for line in text.splitlines()[2:7])
    assert own == "MLA norms and up-projections 51840 3162240 12952535040"
    assert kept.startswith("MLA nothing 187016 ")
    assert plain == "MLA without query compression norms and up-projections 97920 5973120 24465899520 52.9 %"
    assert mha == "MHA nothing 178688 10899968 44646268928 29.0 %"
    assert "hidden 14336, q_down 3072, kv_down 1152, out 32768, lse 512" in text
    assert len(activation_report("DeepSeek-V2-Lite", "bfloat16", 1, 1).splitlines()) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["DeepSeek-V4"], "unknown model"),
        (["DeepSeek-V3", "--tokens", "0"], "tokens must be at least 1, got 0"),
        (["DeepSeek-V3", "--dtype", "int3"], "unknown number format"),
        (["DeepSeek-V3", "--layout", "fp8_ds_mla"], "--layout is of a cache"),
    ],
)
def test_what_cannot_be_reported_is_said(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", *arguments, "--training"]) == 2
    assert message in capsys.readouterr().err
