"""The text of ``mla-spec cache --training``."""

from __future__ import annotations

from collections.abc import Iterator

from mla_spec.reference.activations import Activation, bytes_per_token, mha_activations, mla_activations
from mla_spec.reference.checkpoint import find_model
from mla_spec.reference.published import PublishedModel
from mla_spec.text.table import format_table

Kept = tuple[Activation, ...]

_DIMS = ("hidden_size", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def activation_report(name: str, dtype: str, tokens: int, batch: int) -> str:
    """Bytes that a training step keeps for the attention of a model, with and without query compression, beside MHA.

    Each with everything kept, and with norms and up-projections recomputed in the backward pass.

    Args:
        tokens: per sequence, and ``batch`` sequences, for the bytes of the whole model.

    Raises:
        ValueError: unknown model or dtype, a count below 1, a model that is not MLA, or a dimension or number of layers that
            is not published.
    """
    for label, count in (("tokens", tokens), ("batch", batch)):
        if count < 1:
            raise ValueError(f"{label} must be at least 1, got {count}")
    model = find_model(name)
    layers = model.num_cached_layers
    if layers is None:
        raise ValueError(f"{model.name}: the number of layers {model.absent}")
    rows = [("attention", "recomputed", "B/token/layer", "B/token", "B in all", "first row is")]
    variants = list(_variants(model))
    first = bytes_per_token(variants[0][2], dtype)
    for attention, recomputed, kept in variants:
        each = bytes_per_token(kept, dtype)
        share = "" if kept is variants[0][2] else f"{100 * first / each:.1f} %"
        numbers = str(each), str(layers * each), str(batch * tokens * layers * each)
        rows.append((attention, recomputed, *numbers, share))
    title = f"{model.name}: kept from forward to backward pass, {layers} layers, {dtype}, {batch} × {tokens} tokens"
    parts = ", ".join(f"{a.name} {a.bytes_per_token(dtype)}" for a in variants[0][2])
    return "\n".join([title, format_table(rows), f"B/token/layer of the first row: {parts}"])


def _variants(model: PublishedModel) -> Iterator[tuple[str, str, Kept]]:
    """(attention, what is recomputed, what is kept), the model's own attention first."""
    if not model.is_mla:
        raise ValueError(f"{model.name}: attention is {model.fields['attention']!r}, not MLA")
    dims = {field: model.required(field) for field in _DIMS}
    dims["num_heads"] = model.required("num_attention_heads")
    rank = model.fields["q_lora_rank"]
    own = [("MLA", rank)] if rank is None else [("MLA", rank), ("MLA without query compression", None)]
    for attention, q_lora_rank in own:
        for recompute in (True, False):
            what = "norms and up-projections" if recompute else "nothing"
            yield attention, what, mla_activations(**dims, q_lora_rank=q_lora_rank, recompute=recompute)
    heads = {field: dims[field] for field in ("hidden_size", "num_heads", "v_head_dim")}
    qk_head_dim = dims["qk_nope_head_dim"] + dims["qk_rope_head_dim"]
    yield "MHA", "nothing", mha_activations(**heads, qk_head_dim=qk_head_dim)
