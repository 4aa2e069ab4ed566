"""Laws that read the golden files."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from mla_spec.bounds.profile import Profile
from mla_spec.golden.corpus.corpus import installed
from mla_spec.judging.law import Run, law
from mla_spec.operations.layer import LayerCase, LayerDriver, layer_models
from mla_spec.properties.strategies.layer import first_layout, fitted
from mla_spec.subjects.near import there
from mla_spec.subjects.supports import Supports


@cache
def _published_sizes() -> dict[str, dict[str, Any]]:
    """The entries of cache_sizes.json by model."""
    sizes = json.loads((installed() / "cache_sizes.json").read_text(encoding="utf-8"))
    return {entry["model"]: entry for entry in sizes["models"]}


def _widths() -> dict[tuple[int, int], str]:
    """The widths of published caches, each with the first model that has them; without those of unknown layers."""
    found: dict[tuple[int, int], str] = {}
    for name, model in layer_models().items():
        if model.name in _published_sizes() and model.fields["qk_rope_head_dim"]:
            found.setdefault((model.fields["kv_lora_rank"], model.fields["qk_rope_head_dim"]), name)
    return found


def _needs_latent_cache(supports: Supports) -> str:
    what = {"latent": "", "expanded": "the cache of its layer holds expanded keys", "none": "its layer has no cache"}
    return what[supports.layer_cache]


def _cases(supports: Supports, profile: Profile) -> list[LayerCase]:
    """A small layer with each cache that is published in this format."""
    multiple = supports.layer_dim_multiple
    return [
        fitted(
            LayerCase(
                dtype=profile.dtype,
                batch=2,
                prompt=3,
                steps=1,
                kv_lora_rank=c,
                qk_rope_head_dim=r,
                qk_nope_head_dim=2 * multiple,
                layout=first_layout(supports),
                latent_norm_eps=supports.latent_norm_eps or 1e-6,
            ),
            supports,
        )
        for c, r in _widths()
        if profile.dtype != "float64" and c % multiple == 0
    ]


@law(needs="layer", cases=_cases, missing=_needs_latent_cache)
def test_cache_bytes_are_those_of_published_models(run: Run, case: LayerCase) -> None:
    """A layer whose cache is as wide as a published model's holds exactly the bytes that the golden files give for it."""
    width = case.kv_lora_rank, case.qk_rope_head_dim
    if width not in _widths():
        run.trivial("no published model has a cache of this width")
    name = layer_models()[_widths()[width]].name
    inputs, page = case.build(), run.supports.cache_page
    layer = there(LayerDriver.of, run.driver, inputs.weights, inputs.config)
    for tokens, method, called in (
        (case.prompt, "prefill", slice(0, case.prompt)),
        (case.prompt + 1, "decode", slice(case.prompt, case.prompt + 1)),
    ):
        layer.run(method, inputs.hidden[:, called], inputs.positions[:, called])
        pages = -(-tokens // page)
        want = case.batch * pages * page * _bytes_per_token(name, case)
        got = layer.cache_bytes()
        run.require(
            got == want,
            f"cache_bytes after {tokens} tokens of {case.batch} sequences: got {got}, want {want}, since {name} has "
            f"{_bytes_per_token(name, case)} B for a token and layer in {case.dtype}",
        )


def _bytes_per_token(name: str, case: LayerCase) -> int:
    """What a layer of a model takes for a token, by the golden files."""
    (found,) = (
        cache
        for cache in _published_sizes()[name]["caches"]
        if cache["cache"] == "latent" and cache["elements_per_token_and_layer"] == case.config.cache_dim
    )
    total: int = found["formats"][case.dtype]["bytes_per_token_in_all_layers"]
    assert total % found["layers"] == 0
    return total // int(found["layers"])
