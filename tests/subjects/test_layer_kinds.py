"""What a layer can be: each field of ``Supports`` has an honest layer that needs it, and conforms with it alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mla_spec import MLAConfig, Options, Supports
from mla_spec.adapters.pytorch import TorchAbsorbed
from mla_spec.adapters.pytorch_layer import TorchLayer
from mla_spec.bounds.profile import Profile
from mla_spec.front.overview import overview
from mla_spec.installed import all_laws
from mla_spec.judging.causes import causes
from mla_spec.judging.run import run_law
from mla_spec.judging.verdict import Record
from mla_spec.properties.strategies.layer import every_option, fitted, long_layers, rotating_layer
from mla_spec.subjects.supports import DTYPES
from mla_spec.text.layout import Screen

LAWS = [name for name, law in all_laws().items() if law.needs == ("layer",)]


class Plain(TorchAbsorbed):
    """A correct layer that checks what it is made of and given."""

    kind: type[TorchLayer] = TorchLayer

    def require(self, config: MLAConfig) -> None:
        """Nothing."""

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> Any:
        self.require(config)
        return self.kind(self, weights, config)


class OneToken(TorchLayer):
    def decode(self, hidden: Tensor, positions: Tensor) -> Tensor:
        assert hidden.shape[1] == 1, "decode takes one token"
        return super().decode(hidden, positions)


class OneTokenADecode(Plain):
    kind = OneToken


class Whole(TorchLayer):
    """Its prefill takes the whole prompt."""

    def prefill(self, hidden: Tensor, positions: Tensor) -> Tensor:
        assert self.cache is None, "prefill needs an empty cache"
        return super().prefill(hidden, positions)


class NoChunks(Plain):
    kind = Whole


class PrefillAlone:
    """Forgets a prompt when it has answered; that it has a ``decode`` of another kind is no cache."""

    def __init__(self, *made_of: Any) -> None:
        self.made_of = made_of

    def prefill(self, hidden: Tensor, positions: Tensor) -> Tensor:
        return TorchLayer(*self.made_of).prefill(hidden, positions)

    def decode(self, hidden: Tensor, positions: Tensor) -> Tensor:
        raise NotImplementedError("there is no cache")


class Cacheless(Plain):
    """As of a model that is only trained."""

    def layer(self, weights: Mapping[str, Tensor], config: MLAConfig) -> Any:
        return PrefillAlone(self, weights, config)


class Expanded(TorchLayer):
    """Keeps keys and values of all heads, as the first public modules did."""

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        latent, k_pe = self.subject.project_latent(hidden, positions, self.weights, self.config)
        q = torch.cat(self.subject.project_query(hidden, positions, self.weights, self.config), dim=-1).transpose(1, 2)
        k_nope = self.subject.linear(latent[:, None], self.w_uk)  # [b, h, t, n]
        shared = k_pe[:, None].expand(-1, k_nope.shape[1], -1, -1)
        self.append(torch.cat([k_nope, shared], dim=-1), self.subject.linear(latent[:, None], self.w_uv))
        assert self.cache is not None
        k, v = self.cache
        scale = self.subject.softmax_scale(self.config)
        visible = self.subject.layer_visible(q, k)
        out, _ = self.subject.attend_beside(q, k, v, visible, scale, self.weights.get("sinks"))
        out = out.transpose(1, 2)
        if self.config.output_gate is not None:
            out = self.subject.gated(out, hidden, self.weights, self.config)
        return self.subject.project_output(out, self.weights, self.config)

    def append(self, latent: Tensor, k_pe: Tensor) -> None:
        new = latent, k_pe
        self.cache = (
            new if self.cache is None else tuple(torch.cat(x, dim=2) for x in zip(self.cache, new, strict=True))
        )  # type: ignore[assignment]


class ExpandedCache(Plain):
    kind = Expanded
    profile = {d: replace(p, form="explicit") for d, p in TorchAbsorbed.profile.items()}


class Paged(TorchLayer):
    """Its cache grows by pages of four tokens."""

    def cache_bytes(self) -> int:
        tokens = 0 if self.cache is None else self.cache[0].shape[1]
        return 0 if self.cache is None else super().cache_bytes() // tokens * 4 * math.ceil(tokens / 4)


class PagedCache(Plain):
    kind = Paged


class FixedTheta(Plain):
    def require(self, config: MLAConfig) -> None:
        assert config.rope is None or config.rope.theta in (10000.0, 50000.0), "theta is fixed"


class Compressed(Plain):
    def require(self, config: MLAConfig) -> None:
        assert config.q_lora_rank is not None, "queries must be compressed"


class EqualHeads(Plain):
    def require(self, config: MLAConfig) -> None:
        assert config.qk_nope_head_dim == config.v_head_dim, "heads must be as wide in k_nope as in v"


class WideRope(Plain):
    def require(self, config: MLAConfig) -> None:
        assert config.qk_rope_head_dim == 0 or config.qk_rope_head_dim >= 4, "there must be two pairs"


class NoPE(Plain):
    def require(self, config: MLAConfig) -> None:
        assert config.rope is None, "there is no rotary embedding"


class Tabled(TorchLayer):
    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        assert int(positions.max()) < 128, "the table ends"
        return super().forward(hidden, positions)


class ShortTable(Plain):
    kind = Tabled


class Tiled(Plain):
    def require(self, config: MLAConfig) -> None:
        assert config.hidden_size % 4 == 0, "rows are read in vectors of four"
        assert config.v_head_dim % 2 == 0, "values are read in pairs"
        assert config.kv_lora_rank % 4 == 0, "latents are read in vectors of four"


@dataclass(frozen=True)
class Kind:
    """A layer, and what it must declare."""

    subject: type[Plain]
    declare: dict[str, Any]
    unsupported: tuple[str, ...] = ()


DECODING = (
    "test_layer_decode_agrees_with_reference",
    "test_layer_of_thousands_of_cached_tokens",
    "test_layer_decodes_several_tokens_at_once",
    "test_layer_prefill_in_chunks",
    "test_prefill_equals_token_by_token_decode",
    "test_reset_empties_the_cache",
    "test_cache_bytes_are_exact",
    "test_cache_bytes_are_those_of_published_models",
)
KINDS = [
    Kind(OneTokenADecode, {"layer_max_decode": 1}, ("test_layer_decodes_several_tokens_at_once",)),
    Kind(NoChunks, {"layer_chunks": False}, ("test_layer_prefill_in_chunks",)),
    Kind(Cacheless, {"layer_cache": "none"}, (*DECODING, "test_layer_stages_agree_with_reference")),  # it has no trace
    Kind(ExpandedCache, {"layer_cache": "expanded"}, ("test_cache_bytes_are_those_of_published_models",)),
    Kind(PagedCache, {"cache_page": 4}),
    Kind(FixedTheta, {"layer_thetas": (10000.0, 50000.0)}),
    Kind(Compressed, {"q_lora_rank": "required"}),
    Kind(EqualHeads, {"layer_equal_head_dims": True}),
    Kind(WideRope, {"layer_min_rope_dim": 4}),
    Kind(NoPE, {"rope_layouts": ()}, ("test_layer_depends_on_relative_positions_only",)),
    Kind(ShortTable, {"layer_max_positions": 128}, ("test_layer_of_thousands_of_cached_tokens",)),
    Kind(Tiled, {"layer_multiples": (("hidden_size", 4), ("v_head_dim", 2), ("kv_lora_rank", 4))}),
]
ids = [kind.subject.__name__ for kind in KINDS]


def record(subject: Any, law: str, dtype: str = "float32") -> Record:
    return run_law(all_laws()[law], subject, Options(examples=8, dtypes=(dtype,), minimise=False))


def declared(kind: Kind) -> Plain:
    subject = kind.subject()
    subject.supports = replace(TorchAbsorbed.supports, **kind.declare)  # type: ignore[misc]
    return subject


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_a_layer_that_declares_what_it_is_conforms(kind: Kind) -> None:
    records = [record(declared(kind), law) for law in LAWS]
    assert [r.text() for r in records if r.verdict not in ("pass", "unsupported")] == []
    assert {r.law for r in records if r.verdict == "unsupported"} == set(kind.unsupported)
    assert [r.note for r in records if "refused" in r.note] == []


@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_without_it_the_layer_does_not(kind: Kind) -> None:
    verdicts = {record(kind.subject(), law).verdict for law in LAWS}
    assert verdicts & {"fail", "crashed"}


@pytest.mark.parametrize("kind", KINDS, ids=ids)
@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_bounds_say_something_in_16_bits_too(kind: Kind, dtype: str) -> None:
    for law in ("test_layer_prefill_agrees_with_reference", "test_layer_gradients_agree_with_reference"):
        got = record(declared(kind), law, dtype)
        assert got.verdict == "pass", got.text()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS, ids=ids)
def test_fixed_cases_obey_what_is_declared(kind: Kind, dtype: str) -> None:
    supports, profile = Supports(**kind.declare), Profile.default(dtype)
    for case in (*every_option(supports, profile), *rotating_layer(supports, profile), *long_layers(supports, profile)):
        assert fitted(case, supports) == case
        kind.subject().require(case.config)
        assert int(case.build().positions.max()) < (supports.layer_max_positions or 2**31)


@pytest.mark.parametrize(
    "wrong",
    [
        {"layer_multiples": (("width", 4),)},
        {"layer_multiples": (("hidden_size", 0),)},
        {"layer_max_positions": 63},
        {"layer_cache": "half"},
        {"layer_thetas": (0.0,)},
    ],
)
def test_declarations_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Supports(**wrong)


SAID = {
    OneTokenADecode: "layer_max_decode=1",
    NoChunks: "layer_chunks=False",
    Cacheless: "layer_cache='none'",
    FixedTheta: "layer_thetas=(10000.0, 50000.0)",
    Compressed: "q_lora_rank='required'",
    EqualHeads: "layer_equal_head_dims=True",
    WideRope: "layer_min_rope_dim=4",
    NoPE: "rope_layouts=()",
    ShortTable: "layer_max_positions=1",
}


@pytest.mark.parametrize("subject", SAID, ids=lambda subject: subject.__name__)
def test_laws_that_crash_alike_are_one_paragraph_that_names_the_field(subject: type[Plain]) -> None:
    options = Options(examples=60, dtypes=("float32",))
    laws = [law for law in LAWS if "agrees" in law or "several" in law or "ignored" in law or "chunks" in law]
    records = [run_law(all_laws()[law], subject(), options) for law in laws]
    crashed = [cause for cause in causes(records) if cause.lead.verdict == "crashed"]
    assert len(crashed) == 1
    assert crashed[0].declare.startswith(f"if it is not made for such cases, declare Supports({SAID[subject]}")
    assert f"declare\n   Supports({SAID[subject]}" in overview(records, Screen(60))


class Broken(Plain):
    def require(self, config: MLAConfig) -> None:
        raise NotImplementedError


def test_nothing_is_named_where_all_crashes() -> None:
    options = Options(examples=8, dtypes=("float32",))
    (cause,) = causes([run_law(all_laws()[law], Broken(), options) for law in LAWS])
    assert cause.declare == ""
