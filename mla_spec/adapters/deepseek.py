"""DeepSeek-V3's ``inference/model.py``, or another file with its interface: ``mla-spec check deepseek:path/to/model.py``.

The file has ``ModelArgs``, ``precompute_freqs_cis(args)``, ``attn_impl`` ("absorb" or "naive") and a module ``MLA(args)``, which is called
as ``mla(x, start_pos, freqs_cis, mask)``. It imports three FP8 kernels from a module ``kernel``, which nothing here needs: where
there is none, their names are None. ``deepseek-naive:`` takes the other of its two forms, which caches expanded keys and values.

Source: github.com/deepseek-ai/DeepSeek-V3, inference/model.py.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from mla_spec.bounds.profile import Profile, RopeProfile
from mla_spec.reference.config import MLAConfig
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.violation import UnknownSubject

LENGTH = 8192
"""Tokens of the cache and of the rotary table, unless a scaling begins only later."""

NEEDED = ("MLA", "ModelArgs", "precompute_freqs_cis", "attn_impl")
WEIGHTS = {
    "q_proj": "wq",
    "q_a_proj": "wq_a",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "wkv_b",
    "o_proj": "wo",
}
"""By the checkpoint's names of weights, the file's."""

_DTYPES = ("float32", "float16", "bfloat16")


def _profile(dtype: str, form: str) -> Profile:
    """Products, sums and scaled scores are stored in the dtype, the softmax is in float32, and P is rounded when it is normalized.

    Rotation multiplies complex float32 numbers.
    """
    return Profile.default(
        dtype, form=form, rope=RopeProfile(), score_format=dtype, score_roundings=4, row_sum="normalised"
    )


class DeepseekFile:
    """The attention of one such file."""

    package = "torch"
    conventions = (
        "positions are one row for all sequences, so that each is given alone",
        "the mask is made as the file's Transformer makes it: of the new tokens alone",
    )

    def __init__(self, path: Path, form: str) -> None:
        self.path, self.form = path, form
        self.file = _load(path)
        self.name = f"{'deepseek' if form == 'absorb' else 'deepseek-naive'}:{path.name}"
        self.profile = {dtype: _profile(dtype, {"absorb": "absorbed", "naive": "explicit"}[form]) for dtype in _DTYPES}
        self.supports = Supports(
            dtypes=_DTYPES,
            max_batch=1,
            backward=(),
            rope_layouts=("interleaved",),
            rope_optional=False,
            yarn_options=(),
            yarn_mscale_rule="equal",
            longrope=False,
            mla_scale_lora=False,
            k_pe_norm=False,
            llama_4_scaling=False,
            latent_norm_eps=1e-6,
            layer_dim_multiple=2,  # complex numbers begin at even offsets of a row
            layer_cache="latent" if form == "absorb" else "expanded",
            layer_max_decode=1,
            layer_chunks=False,
            layer_max_positions=LENGTH,
        )

    def supports_layer(self, config: MLAConfig) -> str:
        """The file puts no factor on cos and sin."""
        yarn = None if config.rope is None else config.rope.active_yarn
        return "" if yarn is None or yarn.cos_sin_factor == 1 else "YaRN must leave cos and sin as they are"

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> Any:
        return _Layer(self.file, self.form, weights, config)


class _Layer:
    """One ``MLA`` with its cache, called with the tensors of ``weights`` in the place of its parameters."""

    def __init__(self, file: ModuleType, form: str, weights: Mapping[str, Tensor], config: MLAConfig) -> None:
        first = next(iter(weights.values()))
        args = _arguments(file, config)
        with _attribute(file, "attn_impl", form):
            self.module = file.MLA(args).to(device=first.device, dtype=first.dtype)
        self.file, self.form, self.config = file, form, config
        self.table = file.precompute_freqs_cis(args).to(first.device)
        self.parameters = {f"{WEIGHTS[name]}.weight": w for name, w in weights.items()}
        self.itemsize = first.element_size()
        self.reset()

    def reset(self) -> None:
        self.tokens = 0

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        s = hidden.shape[1]
        mask = torch.full((s, s), -torch.inf, device=hidden.device).triu_(1) if s > 1 else None
        with _attribute(self.file, "attn_impl", self.form):
            arguments = (hidden, self.tokens, self.table[positions[0]], mask)
            out: Tensor = functional_call(self.module, self.parameters, arguments)
        self.tokens += s
        return out

    prefill = decode = forward

    def cache_bytes(self) -> int:
        c = self.config
        expanded = c.num_heads * (c.qk_head_dim + c.v_head_dim)
        return self.tokens * (c.cache_dim if self.form == "absorb" else expanded) * self.itemsize


def _arguments(file: ModuleType, config: MLAConfig) -> Any:
    """The file's spelling of a configuration. It scales where a context is longer than the original one."""
    assert config.rope is not None
    yarn = config.rope.active_yarn
    scaling: dict[str, Any] = {"original_seq_len": LENGTH}
    if yarn is not None:
        scaling = {
            "original_seq_len": yarn.original_max_position_embeddings,
            "rope_factor": yarn.factor,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale_all_dim or 0.0,
        }
    return file.ModelArgs(
        max_batch_size=1,
        max_seq_len=LENGTH if yarn is None else max(LENGTH, yarn.original_max_position_embeddings + 1),
        dim=config.hidden_size,
        n_heads=config.num_heads,
        q_lora_rank=config.q_lora_rank or 0,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        rope_theta=config.rope.theta,
        **scaling,
    )


@contextmanager
def _attribute(file: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Here a global of the file has another value."""
    before = getattr(file, name)
    setattr(file, name, value)
    try:
        yield
    finally:
        setattr(file, name, before)


def _load(path: Path) -> ModuleType:
    """The file as a module, and for it a module ``kernel`` where there is none."""
    spec = importlib.util.spec_from_file_location(f"deepseek_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    file = importlib.util.module_from_spec(spec)
    stub = ModuleType("kernel")
    vars(stub).update(act_quant=None, weight_dequant=None, fp8_gemm=None)
    beside = str(path.parent)
    sys.modules[spec.name] = file
    missing = importlib.util.find_spec("kernel") is None and not (path.parent / "kernel.py").is_file()
    if missing:
        sys.modules["kernel"] = stub
    sys.path.insert(0, beside)
    try:
        spec.loader.exec_module(file)
    finally:
        sys.path.remove(beside)
        if missing:
            del sys.modules["kernel"]
    absent = [name for name in NEEDED if not hasattr(file, name)]
    if absent:
        raise UnknownSubject(f"{path} has no {', '.join(absent)}; expected DeepSeek-V3's inference/model.py")
    return file


def absorbed(path: str) -> DeepseekFile:
    """The file's absorbed form, which caches latents."""
    return DeepseekFile(Path(path).resolve(), "absorb")


def naive(path: str) -> DeepseekFile:
    """The file's naive form, which caches expanded keys and values."""
    return DeepseekFile(Path(path).resolve(), "naive")
