"""The golden files as they are: they verify, hold what is generated, and can be read by their description alone."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mla_spec.front.cli import main
from mla_spec.golden.cases.all import cases
from mla_spec.golden.cases.case import Case
from mla_spec.golden.corpus import (
    arrays,
    compare,
    corpus,
    figures,
)
from mla_spec.golden.corpus.corpus import CorpusError
from mla_spec.reference.rope import half_from_interleaved
from tests.golden.corpus_files import contents


def test_the_installed_corpus_verifies(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["golden", "verify"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{len(cases())} cases, ")
    assert "the float64 reference agrees: worst error/bound 0." in text


def test_the_corpus_is_small_and_needs_no_pickle() -> None:
    files = contents(corpus.installed())
    assert sum(map(len, files.values())) < 9 * 2**17
    for name in files:
        if name.endswith(".npy"):
            np.load(corpus.installed() / name, allow_pickle=False)


def test_stored_inputs_are_those_of_the_generator() -> None:
    for stored, case in zip(corpus.load(), cases(), strict=True):
        assert stored.name == case.name
        for name, values in case.inputs.items():
            np.testing.assert_array_equal(stored.inputs[name], values)


def test_the_two_rope_layouts_hold_the_same_answers() -> None:
    stored = {case.name: case for case in corpus.load()}
    p = half_from_interleaved(8)
    half, interleaved = stored["rope-half"].expected["out"], stored["rope-interleaved"].expected["out"]
    np.testing.assert_array_equal(half, interleaved[..., p])


def test_no_allowance_is_vacuous() -> None:
    for case in corpus.load():
        for got in compare.COMPUTED[case.operation](case.inputs, case.parameters):
            want = case.expected[got.name]
            if got.name not in case.exact:
                seen = np.isfinite(want) & (got.error > 0)
                rms = np.sqrt(np.mean(want[seen] ** 2)) if seen.any() else 1.0
                # As far below bfloat16's roundoff as float64 is below float32's.
                assert np.median(got.error[seen] if seen.any() else 0.0) < 2.0**-29 * rms, (case.name, got.name)


# The format, read by its description alone

ELEMENTS = {"<f8": "d", "<f4": "f", "<f2": "e", "<i8": "q", "<i4": "i", "|u1": "B", "<u2": "H"}


def read_by_hand(root: Path, entry: dict[str, Any]) -> tuple[float, ...]:
    """The elements of an array, with no more than README.md says."""
    data = (root / entry["file"]).read_bytes()
    assert data[:8] == b"\x93NUMPY\x01\x00"
    (n,) = struct.unpack_from("<H", data, 8)
    content = data[10 + n :]
    assert hashlib.sha256(content).hexdigest() == entry["sha256"]
    values = struct.unpack(f"<{math.prod(entry['shape'])}{ELEMENTS[entry['stored_as']]}", content)
    if entry["dtype"] == "bfloat16":
        return tuple(struct.unpack("<f", struct.pack("<I", bits << 16))[0] for bits in values)
    return values


def test_the_description_of_the_format_is_enough_to_read_every_array() -> None:
    root = corpus.installed()
    manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    seen = set()
    for entry, case in zip(manifest["cases"], corpus.load(), strict=True):
        for array in entry["arrays"]:
            values = case.inputs if array["role"] == "input" else case.expected
            np.testing.assert_array_equal(read_by_hand(root, array), values[array["name"]].ravel())
            seen.add(array["stored_as"])
    assert seen == set(arrays.STORED_DTYPES.values()) == set(ELEMENTS)


def test_the_description_names_everything() -> None:
    text = (corpus.installed() / "README.md").read_text(encoding="utf-8").replace("\\|", "|")
    manifest = json.loads((corpus.installed() / "manifest.json").read_text(encoding="utf-8"))
    words = {"`" + stored + "`" for stored in ELEMENTS}
    for case in manifest["cases"]:
        words |= {f"`{case['operation']}`", *(f"`{key}`" for key in case if key != "name")}
    assert [word for word in sorted(words) if word not in text] == []


def test_every_case_says_what_it_catches() -> None:
    made: list[Case] = cases()
    assert len({case.name for case in made}) == len(made)
    assert all(case.purpose and case.catches for case in made)
    assert sum(bool(case.sources) for case in made) > len(made) / 2
    assert all(source.startswith("https://github.com/") for case in made for source in case.sources)


def test_a_figure_that_does_not_round_to_the_published_one_is_refused() -> None:
    figure = figures.figures()[0]
    assert str(figure.exact) == "8784/125"
    wrong = figures.Figure(**{**figure.__dict__, "published": "70.273"})
    with pytest.raises(CorpusError, match=r"DeepSeek-V3 computes to 70\.272; expected 70\.273"):
        wrong.record()
