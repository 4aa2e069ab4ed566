"""A case id means the same inputs, bit for bit, in every version: ids are written down, and must keep their values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mla_spec.operations.all import KINDS, parse_case
from mla_spec.operations.case import Case

DIGESTS: dict[str, str] = json.loads((Path(__file__).parent / "case_digests.json").read_text(encoding="utf-8"))
"""The digest of the inputs of each of some cases, of every kind."""

TOLD = {"format", "page_size"}
"""Fields of the inputs of quantised caches that the case itself has."""

ADDED = {
    ("MLAConfig", "k_pe_norm"): False,
    ("MLAConfig", "output_gate"): None,
    ("MLAConfig", "attention_sink"): False,
    **{(inputs, name): None for inputs in ("DecodeInputs", "PrefillInputs") for name in ("attn_sink", "window")},
}
"""Fields of classes that they have had since the digests were taken, each with the value that changes nothing."""


def digest(case: Case) -> str:
    """Of everything that ``build`` makes; of a rope case, of what it rotates."""
    sha = hashlib.sha256()
    built: list[Any] = []
    for method in ("build", "build_quantised"):
        if hasattr(case, method) and case.kind != "rope":
            built.append(getattr(case, method)())
    if case.kind == "rope":
        built += [case.vectors(2), case.positions(), case.rope]  # type: ignore[attr-defined]
    for value in built:
        _feed(sha, value)
    return sha.hexdigest()


def _feed(sha: Any, value: Any) -> None:
    if is_dataclass(value):
        for name in sorted(f.name for f in fields(value)):
            told = name in TOLD and hasattr(value, "tensor_scale")
            if not told and getattr(value, name) is not ADDED.get((type(value).__name__, name), ...):
                sha.update(name.encode())
                _feed(sha, getattr(value, name))
    elif isinstance(value, Mapping):
        for name in sorted(value):
            sha.update(str(name).encode())
            _feed(sha, value[name])
    elif isinstance(value, np.ndarray):
        sha.update(str((value.dtype, value.shape)).encode())
        sha.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, (tuple, list)):
        for each in value:
            _feed(sha, each)
    else:
        sha.update(repr(value).encode())


@pytest.mark.parametrize("text", DIGESTS)
def test_an_id_keeps_its_values(text: str) -> None:
    assert digest(parse_case(text)) == DIGESTS[text]


def test_another_seed_has_other_values() -> None:
    text = next(text for text in DIGESTS if text.startswith("decode:"))
    seed = text.partition("seed=")[2].partition(",")[0]
    assert digest(parse_case(text.replace(f"seed={seed}", "seed=12345"))) != DIGESTS[text]


def test_every_kind_is_watched() -> None:
    assert {text.partition(":")[0] for text in DIGESTS} == set(KINDS)
