"""Hugging Face transformers: the indexers of DeepSeek-V3.2 and GLM-5, whose operands are read from their forward pass.

The modules return selected keys alone. Their operands are those of the two matrix products in their forward pass, which a
function mode records. The scale d^-1/2, which they apply to q·k, goes into the weights; ``weights_proj`` stays in float32,
as their models keep it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mla_spec.adapters.transformers import context_length, rope_parameters
from mla_spec.bounds.profile import Profile, RopeProfile
from mla_spec.reference.indexer import IndexerConfig
from mla_spec.reference.rope import half_from_interleaved
from mla_spec.subjects.supports import Supports

_DTYPES = ("float32", "float16", "bfloat16")


def _supports(layout: str) -> Supports:
    return Supports(
        dtypes=_DTYPES,
        indexer_rope_layouts=(layout,),
        indexer_rope_optional=False,
        indexer_norm_eps=1e-6,
        longrope=False,
    )


class _Products(TorchFunctionMode):
    """Records the operands of ``torch.matmul``."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.matmul:
            self.operands.append((args[0], args[1]))
        return func(*args, **(kwargs or {}))


class DeepseekV32:
    """transformers.models.deepseek_v32."""

    name = "transformers:deepseek_v32"
    package = "transformers"
    model, prefix = "deepseek_v32", "DeepseekV32"
    # The cos/sin table is cast to the dtype, and the rotation computed in it.
    profile: Mapping[str, Profile] = {d: Profile.default(d, rope=RopeProfile(table=d, rotation=d)) for d in _DTYPES}
    supports = _supports("half")

    @classmethod
    def unavailable(cls) -> str:
        """Why this cannot run here, or ""."""
        if not importlib.util.find_spec("transformers"):
            return "transformers is not installed"
        found = importlib.util.find_spec(f"transformers.models.{cls.model}")
        return "" if found else f"this version of transformers has no {cls.model}"

    def project_indexer(
        self, hidden: Tensor, q_latent: Tensor, positions: Tensor, weights: Mapping[str, Tensor], config: IndexerConfig
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The operands of the two products of the module's forward pass."""
        assert config.rope is not None
        package = f"transformers.models.{self.model}"
        modeling = importlib.import_module(f"{package}.modeling_{self.model}")
        configuration = importlib.import_module(f"{package}.configuration_{self.model}")
        their_config = getattr(configuration, f"{self.prefix}Config")(
            hidden_size=config.hidden_size,
            q_lora_rank=config.q_lora_rank,
            qk_rope_head_dim=config.rope.dim,
            index_n_heads=config.index_n_heads,
            index_head_dim=config.index_head_dim,
            index_topk=config.index_topk,
            num_hidden_layers=1,
            rope_parameters=rope_parameters(config.rope),
            max_position_embeddings=context_length(config.rope),
        )
        module = getattr(modeling, f"{self.prefix}Indexer")(their_config, layer_idx=0)
        module = module.to(device=hidden.device, dtype=hidden.dtype).eval()
        named = {name if name.startswith("k_norm") else f"{name}.weight": w for name, w in weights.items()}
        module.load_state_dict(named, strict=True)
        module.weights_proj.float()
        rotary = getattr(modeling, f"{self.prefix}RotaryEmbedding")(config=their_config).to(hidden.device)
        tokens = len(hidden)
        mask = torch.ones(1, tokens, tokens, dtype=torch.bool, device=hidden.device)
        with _Products() as products:
            module(hidden[None], q_latent[None], rotary(hidden[None], positions[None]), mask, positions[None])
        (q, k), (head_weights, _) = products.operands
        q, k = q[0].to(hidden.dtype), k[0, 0].T.to(hidden.dtype)
        return self.laid_out(q, config), self.laid_out(k, config), head_weights[0, :, 0] * config.index_head_dim**-0.5

    def laid_out(self, x: Tensor, config: IndexerConfig) -> Tensor:
        """x [..., d] with its pairs as the configuration lays them out."""
        return x


class GlmMoeDsa(DeepseekV32):
    """transformers.models.glm_moe_dsa, which takes interleaved pairs and returns them in halves."""

    name = "transformers:glm_moe_dsa"
    model, prefix = "glm_moe_dsa", "GlmMoeDsa"
    supports = _supports("interleaved")

    def laid_out(self, x: Tensor, config: IndexerConfig) -> Tensor:
        interleaved = torch.from_numpy(half_from_interleaved(config.rope_dim).argsort()).to(x.device)
        return torch.cat([x[..., : config.rope_dim][..., interleaved], x[..., config.rope_dim :]], dim=-1)
