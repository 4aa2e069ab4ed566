"""Published MLA models, from the data file ``published_models.json``, which states the source of every entry."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from mla_spec.reference.config import Llama4Scaling, MLAConfig, RopeConfig


@dataclass(frozen=True)
class PublishedModel:
    """One entry of the data file.

    Attributes:
        name: as published.
        fields: the checkpoint's configuration, under DeepSeek's names (num_attention_heads for num_heads).
        verified: False where the entry as a whole rests on secondary sources.
        unverified_fields: the fields of a verified entry that do.
        not_modelled: options of the model that ``MLAConfig`` does not express yet.
        source: where the figures were read.
        absent: how a message says that a field is None.
    """

    name: str
    fields: Mapping[str, Any]
    verified: bool
    unverified_fields: tuple[str, ...]
    not_modelled: tuple[str, ...]
    source: tuple[str, ...]
    absent: str = "is not published"

    @property
    def is_mla(self) -> bool:
        """False for DeepSeek-V4, whose attention shares one KV head of equal keys and values, and for DeepSeek-OCR (MHA)."""
        return bool(self.fields["attention"] == "mla")

    @property
    def num_cached_layers(self) -> int | None:
        """MLA caches in the model (LongCat-Flash has two a layer), or None where unpublished."""
        layers = self.fields["num_mla_layers"]
        return None if layers is None else int(layers)

    def latent_rows(self) -> list[tuple[int, int]]:
        """(layers, elements per token) of the latent caches; layers without rotary embedding have no k_pe in theirs.

        Raises:
            ValueError: the model is not MLA, or its layers or the widths of their rows are not published.
        """
        if not self.is_mla:
            raise ValueError(f"{self.name}: attention is {self.fields['attention']!r}, not MLA")
        if self.num_cached_layers is None:
            raise ValueError(f"{self.name}: the number of layers {self.absent}")
        latent, rope = self.required("kv_lora_rank"), self.required("qk_rope_head_dim")
        without = self.fields.get("num_nope_layers", 0)
        rows = [(self.num_cached_layers - without, latent + rope), (without, latent)]
        return [(layers, elements) for layers, elements in rows if layers]

    def mla_config(self) -> MLAConfig:
        """The entry as an ``MLAConfig``; ValueError names what it cannot express."""
        if not self.is_mla:
            raise ValueError(f"{self.name}: attention is {self.fields['attention']!r}, not MLA")
        if self.not_modelled:
            raise ValueError(f"{self.name}: MLAConfig does not express {self.not_modelled[0]!r}")
        temperature = self.fields.get("llama_4_scaling")
        return MLAConfig(
            hidden_size=self.required("hidden_size"),
            num_heads=self.required("num_attention_heads"),
            q_lora_rank=self.fields["q_lora_rank"],
            kv_lora_rank=self.required("kv_lora_rank"),
            qk_nope_head_dim=self.required("qk_nope_head_dim"),
            qk_rope_head_dim=self.required("qk_rope_head_dim"),
            v_head_dim=self.required("v_head_dim"),
            rope=self._rope(),
            latent_norm_eps=self.required("latent_norm_eps"),
            mla_scale_q_lora=self.fields.get("mla_scale_q_lora", False),
            mla_scale_kv_lora=self.fields.get("mla_scale_kv_lora", False),
            k_pe_norm=self.fields.get("k_pe_norm", False),
            llama_4_scaling=None if temperature is None else Llama4Scaling(**temperature),
            output_gate=self.fields.get("output_gate"),
            attention_sink=self.fields.get("attention_sink", False),
        )

    def _rope(self) -> RopeConfig | None:
        if self.fields["rope"] != "rotary":
            return None
        dim, theta = self.required("qk_rope_head_dim"), self.required("rope_theta")
        scaling = self.fields["rope_scaling"]
        for name in [] if scaling is None else [key for key, value in scaling.items() if value is None]:
            raise ValueError(f"{self.name}: rope_scaling.{name} {self.absent}")
        try:
            return RopeConfig.from_checkpoint(
                dim=dim,
                theta=theta,
                interleaved=self.fields["rope_interleave"],
                rope_scaling=scaling,
                max_position_embeddings=self.fields["max_position_embeddings"],
            )
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def required(self, field: str) -> Any:
        """What the entry says of ``field``; ValueError where that is None."""
        if self.fields[field] is None:
            raise ValueError(f"{self.name}: {field} {self.absent}")
        return self.fields[field]


@lru_cache(maxsize=1)
def published_models() -> dict[str, PublishedModel]:
    """All entries by name, in the order of the data file."""
    text = files("mla_spec.reference").joinpath("published_models.json").read_text(encoding="utf-8")
    own = ("name", "verified", "unverified_fields", "not_modelled", "source")
    return {
        entry["name"]: PublishedModel(
            name=entry["name"],
            fields={k: v for k, v in entry.items() if k not in own},
            verified=entry["verified"],
            unverified_fields=tuple(entry["unverified_fields"]),
            not_modelled=tuple(entry["not_modelled"]),
            source=tuple(entry["source"]),
        )
        for entry in json.loads(text)
    }


def published_model(name: str) -> PublishedModel:
    """The entry called ``name``, whatever the case; ValueError suggests close names."""
    by_lower = {known.lower(): model for known, model in published_models().items()}
    model = by_lower.get(name.lower())
    if model is None:
        close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(by_lower[c].name for c in close)}?" if close else "see `mla-spec models`"
        raise ValueError(f"unknown model {name!r}; {hint}")
    return model
