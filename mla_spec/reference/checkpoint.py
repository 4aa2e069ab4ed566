"""A model's configuration file as an entry like those of the table of published models.

Three spellings are read: a config.json of transformers, with ``rope_scaling`` and ``rope_theta`` or, from transformers 5 on,
``rope_parameters``; one that nests its language model, as multimodal checkpoints do; and DeepSeek's own inference
configuration, with ``dim`` and ``n_heads``. What a file does not state but its model class fixes is in ``ARCHITECTURES``.

Sources: transformers 5.23.0, models/*/configuration_*.py and modeling_*.py of the classes named there; DeepSeek-V3
repository, inference/model.py, class ModelArgs @9b4e9788.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mla_spec.reference.published import PublishedModel, published_model
from mla_spec.reference.scaling import require_positive_int

Source = Mapping[str, Any] | str | Path
"""A parsed configuration, the text of one, or the path of a file or of a folder that holds config.json."""


@dataclass(frozen=True)
class Architecture:
    """What a model class fixes and its configuration file need not state.

    Attributes:
        interleaved: pair layout of the rotary embedding.
        passes_eps: whether the norms on the latents get ``rms_norm_eps``; otherwise their eps is 1e-6.
        scales_latents: whether both latents are multiplied by sqrt(hidden_size / rank).
        normalizes_k_pe: whether k_pe has an RMSNorm.
        rotary: False where the class has no rotary embedding.
        output_gate, attention_sink: those of ``MLAConfig``.
        not_modelled: options that ``MLAConfig`` does not express.
    """

    interleaved: bool = True
    passes_eps: bool = False
    scales_latents: bool = False
    normalizes_k_pe: bool = False
    rotary: bool = True
    output_gate: str | None = None
    attention_sink: bool = False
    not_modelled: tuple[str, ...] = ()


ARCHITECTURES: Final[dict[str, Architecture]] = {
    **dict.fromkeys(
        (
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "kimi_k2",
            "joyai_llm_flash",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "youtu",
            "youtu_llm",
            "axk1",
            "mistral4",
            "sarvam_mla",
        ),
        Architecture(),
    ),
    "minicpm3": Architecture(interleaved=False),
    "kimi_linear": Architecture(rotary=False),
    "kimi_k3": Architecture(rotary=False, output_gate="element"),
    "longcat_flash": Architecture(scales_latents=True),
    **dict.fromkeys(("glm5_next", "glm5_next_text"), Architecture(passes_eps=True, rotary=False)),
    "axk2": Architecture(output_gate="query"),
    "bailing_hybrid": Architecture(output_gate="head"),
    "dots3_note_text": Architecture(passes_eps=True, scales_latents=True, normalizes_k_pe=True, output_gate="head"),
    "hy_v4": Architecture(interleaved=False, output_gate="element", attention_sink=True),
}
"""By ``model_type``. A file without one, as DeepSeek's own, is of the default architecture."""

_OWN_NAMES: Final = {"dim": "hidden_size", "n_heads": "num_attention_heads", "n_layers": "num_hidden_layers"}
"""DeepSeek's inference configuration: its names, and transformers' for the same."""

_LAYER_TYPES: Final = ("full_attention", "indexed_attention", "deepseek_sparse_attention", "linear_attention")

GATE_OF_KIMI: Final = "mla_use_output_gate"
"""Kimi-K3's text_config is of class kimi_linear, with this gate of each element."""

_REFUSED: Final = ("attention_bias", "use_head_wise_attn_gate", "attn_output_gate")
"""Options that ``MLAConfig`` does not express, where they are true."""

_DIMS: Final = ("hidden_size", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")


def checkpoint_model(source: Source) -> PublishedModel:
    """The configuration as a ``PublishedModel``, whose name is its path, or else its model_type.

    A shortened file that lacks the rotary embedding still determines the cache; ``mla_config`` then names what it lacks.

    Args:
        source: see ``Source``. A text is JSON; a mapping is not changed.

    Raises:
        ValueError: unreadable file, text that is no JSON object, attention that is not MLA, a dimension that is no positive
            integer, or a key of the rotary embedding that is unknown or contradicts another.
    """
    name, config = read_config(source)
    try:
        return _entry(name, _renamed(config))
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(name) else f"{name}: {error}") from error


def is_checkpoint(name: str) -> bool:
    """Whether a name on the command line is a configuration's path rather than a published model's name."""
    return name.endswith(".json") or Path(name).is_dir()


def find_model(name: str) -> PublishedModel:
    """The model that a name on the command line means: a configuration's path, or a published model's name.

    Raises:
        ValueError: see ``checkpoint_model`` and ``published_model``.
    """
    return checkpoint_model(name) if is_checkpoint(name) else published_model(name)


def read_config(source: Source) -> tuple[str, dict[str, Any]]:
    """(path or model_type, configuration of the language model); ValueError for what is unreadable or no JSON object."""
    name, config = _read(source)
    config = _language_model(config)
    return name or str(config.get("model_type", "configuration")), config


def _read(source: Source) -> tuple[str, dict[str, Any]]:
    """(path or "", configuration)."""
    if isinstance(source, Mapping):
        return "", dict(source)
    if isinstance(source, str) and source.lstrip().startswith("{"):
        return "", _parsed("configuration", source)
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        return str(path), _parsed(str(path), path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ValueError(f"{path}: cannot be read: {reason}") from error


def _parsed(name: str, text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{name}: expected a JSON object, got {type(config).__name__}")
    return config


def _language_model(config: dict[str, Any]) -> dict[str, Any]:
    """The nested configuration of the language model, or the configuration itself."""
    for key in ("text_config", "language_config"):
        if isinstance(config.get(key), Mapping):
            return dict(config[key])
    return config


def _renamed(config: dict[str, Any]) -> dict[str, Any]:
    """DeepSeek's own names in transformers'; defaults are those of ModelArgs."""
    if not {"dim", "n_heads"} <= set(config):
        return config
    for key in ("yarn", "llama_4_scaling"):
        if key in config:
            raise ValueError(f"{key!r} is of Mistral's params.json; expected DeepSeek's own names or transformers'")
    mscale = config.get("mscale", 1.0)
    scaling = {
        "type": "yarn",
        "factor": config.get("rope_factor", 40),
        "original_max_position_embeddings": config.get("original_seq_len", 4096),
        "beta_fast": config.get("beta_fast", 32),
        "beta_slow": config.get("beta_slow", 1),
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "applies": "beyond_original",
    }
    return {
        **{_OWN_NAMES.get(key, key): value for key, value in config.items()},
        "rope_theta": config.get("rope_theta", 10000.0),
        "max_position_embeddings": config.get("max_seq_len", 16384),
        "rope_scaling": scaling,
    }


def _entry(name: str, config: dict[str, Any]) -> PublishedModel:
    _require_mla(config)
    kind = config.get("model_type")
    known = Architecture() if kind is None else ARCHITECTURES.get(kind)
    architecture = known or Architecture(not_modelled=(f"model_type {kind!r}",))
    theta, scaling, temperature = _rope(config)
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    v_head_dim = config.get("v_head_dim")
    fields = {
        **{key: config.get(key) for key in _DIMS},
        "attention": "mla",
        "v_head_dim": hidden // heads if v_head_dim is None and heads and hidden else v_head_dim,
        "q_lora_rank": config.get("q_lora_rank") or None,
        "qk_rope_head_dim": config.get("qk_rope_head_dim"),
        "num_hidden_layers": config.get("num_hidden_layers"),
        "num_mla_layers": _cached_layers(config),
        "rope": "rotary" if _rotary(config, architecture) else "none",
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_interleave": config.get("rope_interleave", architecture.interleaved),
        "llama_4_scaling": temperature,
        "max_position_embeddings": config.get("max_position_embeddings"),
        "latent_norm_eps": config.get("rms_norm_eps") if architecture.passes_eps else 1e-6,
        "mla_scale_q_lora": config.get("mla_scale_q_lora", architecture.scales_latents),
        "mla_scale_kv_lora": config.get("mla_scale_kv_lora", architecture.scales_latents),
        "k_pe_norm": architecture.normalizes_k_pe,
        "output_gate": _gate(config, architecture),
        "attention_sink": architecture.attention_sink,
        **_indexer(config),
    }
    counts = {key: fields[key] for key in (*_DIMS, "q_lora_rank", "num_mla_layers") if fields[key] is not None}
    require_positive_int(name, **counts)
    return PublishedModel(
        name=name,
        fields=fields,
        verified=True,
        unverified_fields=(),
        not_modelled=(*architecture.not_modelled, *_options(config)),
        source=(name,),
        absent="is not stated",
    )


def _require_mla(config: dict[str, Any]) -> None:
    if config.get("use_mla") is False:
        raise ValueError("use_mla is false, so that attention is not MLA")
    if config.get("compress_ratios") is not None:
        raise ValueError("compress_ratios are of DeepSeek-V4, whose attention shares one KV head and is not MLA")
    if config.get("kv_lora_rank") is None:
        raise ValueError("kv_lora_rank is not stated, so that attention is not MLA")
    if config.get("qk_rope_head_dim") is None:
        raise ValueError("qk_rope_head_dim is not stated; expected the width of the rotated key, 0 where there is none")


def _rotary(config: dict[str, Any], architecture: Architecture) -> bool:
    return config["qk_rope_head_dim"] != 0 and not config.get("mla_use_nope", not architecture.rotary)


def _gate(config: dict[str, Any], architecture: Architecture) -> str | None:
    stated = config.get(GATE_OF_KIMI)
    if stated is None:
        return architecture.output_gate
    return "element" if stated else None


def _options(config: dict[str, Any]) -> tuple[str, ...]:
    """What the file itself says of attention that ``MLAConfig`` does not express."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    found = {"sliding_window": window, **{key: config.get(key) for key in _REFUSED}}
    return tuple(key for key, value in found.items() if value)


def _rope(config: dict[str, Any]) -> tuple[Any, dict[str, Any] | None, dict[str, Any] | None]:
    """(theta, rope_scaling without what other keys hold, llama_4_scaling), each None where it is not stated."""
    both = [config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key) is not None]
    if len(both) == 2 and both[0] != both[1]:
        raise ValueError("rope_parameters and rope_scaling contradict each other; expected one of them")
    if both and not isinstance(both[0], Mapping):
        raise ValueError(f"rope_scaling: expected a JSON object, got {both[0]!r}")
    scaling = dict(both[0]) if both else {}
    scaling = {key: value for key, value in scaling.items() if value is not None}
    if "type" in scaling:
        scaling["rope_type"] = _agreed("type", scaling.pop("type"), scaling.get("rope_type"))
    theta = _agreed("rope_theta", scaling.pop("rope_theta", None), config.get("rope_theta"))
    _agreed(
        "max_position_embeddings", scaling.pop("max_position_embeddings", None), config.get("max_position_embeddings")
    )
    _require_all_rotated(config, scaling.pop("partial_rotary_factor", 1))
    temperature, beta = config.get("llama_4_scaling"), scaling.pop("llama_4_scaling_beta", None)
    if beta is not None:
        original = scaling.get("original_max_position_embeddings")
        temperature = {"beta": beta, "original_max_position_embeddings": original}
    if scaling:
        scaling["type"] = scaling.pop("rope_type", "default")
    return theta, scaling or None, temperature


def _agreed(key: str, inner: Any, outer: Any) -> Any:
    """The value that two places state, or the only one that does."""
    if inner is not None and outer is not None and inner != outer:
        raise ValueError(f"{key} is stated twice, as {inner!r} and {outer!r}; expected one value")
    return outer if inner is None else inner


def _require_all_rotated(config: dict[str, Any], factor: float) -> None:
    """All r dims are rotated: the factor is 1, or r over the n + r of a head, or r over the head_dim that is stated."""
    rope, nope = config["qk_rope_head_dim"], config.get("qk_nope_head_dim") or 0
    widths = [rope, nope + rope, config.get("head_dim") or rope]
    if not any(factor * width == rope for width in widths):
        raise ValueError(f"partial_rotary_factor must leave {rope} rotated dims, got {factor!r}")


def _cached_layers(config: dict[str, Any]) -> int | None:
    """How many latent caches the model has, or None where that is not stated."""
    kinds, linear = config.get("layer_types"), config.get("linear_attn_config")
    layers: int | None = config.get("num_hidden_layers")
    group, blocks = config.get("layer_group_size"), config.get("num_layers")
    if kinds is not None:
        return sum(map(_caches_latents, kinds))
    if isinstance(linear, Mapping) and "full_attn_layers" in linear:
        return len(linear["full_attn_layers"])
    if config.get("model_type") == "longcat_flash" and blocks is not None:
        return int(2 * blocks)  # two attentions a block
    if group is not None and layers is not None:
        require_positive_int("layers", num_hidden_layers=layers, layer_group_size=group)
        whole = layers // group * group
        return sum(bool((i + 1) % group == 0 or i >= whole) for i in range(layers))
    return layers


def _caches_latents(kind: str) -> bool:
    """Whether a layer of this kind has a cache that grows with each token; ValueError for a kind that is unknown."""
    if kind not in _LAYER_TYPES:
        raise ValueError(f"layer_types: expected one of {', '.join(_LAYER_TYPES)}, got {kind!r}")
    return kind != "linear_attention"


def _indexer(config: dict[str, Any]) -> dict[str, Any]:
    """The indexer's dimensions, and how many layers keep keys of their own; none where there is no indexer."""
    if config.get("index_head_dim") is None:
        return {}
    dims = {key: config.get(key) for key in ("index_n_heads", "index_head_dim", "index_topk", "index_kpool")}
    require_positive_int("indexer", **{key: value for key, value in dims.items() if value is not None})
    return {**dims, "num_indexer_layers": _indexer_layers(config)}


def _indexer_layers(config: dict[str, Any]) -> int | None:
    """Layers whose indexer is their own; the others use the selection of the layer before (GLM-5.2)."""
    layers: int | None = config.get("num_hidden_layers")
    kinds, pattern, every = (config.get(key) for key in ("indexer_types", "index_topk_pattern", "index_topk_freq"))
    if kinds is None and pattern is not None:
        kinds = [{"F": "full", "S": "shared"}.get(kind, kind) for kind in pattern]
    if kinds is None and every is not None and layers is not None:
        offset = config.get("index_skip_topk_offset", 2)
        kinds = ["shared" if max(i - offset + 1, 0) % max(every, 1) else "full" for i in range(layers)]
    if kinds is None:
        return _cached_layers(config)
    caches = map(_caches_latents, config.get("layer_types") or ["indexed_attention"] * len(kinds))
    return sum(bool(kind == "full" and cached) for kind, cached in zip(kinds, caches, strict=True))
