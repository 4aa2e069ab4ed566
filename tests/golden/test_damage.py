"""Every kind of damage to the golden files is named in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mla_spec.front.cli import main
from mla_spec.golden.corpus import arrays, corpus
from mla_spec.golden.corpus.corpus import CorpusError
from tests.golden.corpus_files import ARRAY, edit_manifest, entry_of


def flip(root: Path, position: int, file: str = ARRAY) -> None:
    data = bytearray((root / file).read_bytes())
    data[position] ^= 1
    (root / file).write_bytes(bytes(data))


def rewrite(root: Path, header: bytes) -> None:
    (root / ARRAY).write_bytes(header + (root / ARRAY).read_bytes()[128:])


def big_header(root: Path) -> None:
    rewrite(root, b"\x93NUMPY\x01\x00\xff\xff" + b" " * 65535)


def pickled(root: Path) -> None:
    np.save(root / ARRAY, np.array([{"a": 1}], dtype=object), allow_pickle=True)


def fortran(root: Path) -> None:
    rewrite(root, arrays.header("float64", (4, 1, 3, 6)).replace(b"False,", b"True, "))


def huge_shape(root: Path) -> None:
    edit_manifest(root, lambda m: entry_of(m).update(shape=[2**30, 2**30, 2**30]))


def json_bomb(root: Path) -> None:
    (root / "manifest.json").write_text("[" * 100_000)


def listed_twice(root: Path) -> None:
    edit_manifest(root, lambda m: m["cases"].append(m["cases"][0]))


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda root: (root / ARRAY).unlink(), f"{ARRAY}: the file is missing; manifest.json lists it"),
    (lambda root: (root / "arrays/x.npy").touch(), "arrays/x.npy: unexpected; manifest.json does not list it"),
    (lambda root: flip(root, -1), f"{ARRAY}: the content has sha256 *; expected *"),
    (lambda root: flip(root, 0), f"{ARRAY}: not a .npy file of version 1.0; expected it to begin with *"),
    (lambda root: flip(root, 100), f"{ARRAY}: the header is not as this corpus writes it; *"),
    (big_header, f"{ARRAY}: the header says it is 65535 bytes long; expected 118"),
    (pickled, f"{ARRAY}: the header gives dtype '|O'; expected '<f8'"),
    (fortran, f"{ARRAY}: the header gives order True; expected False"),
    (
        lambda root: rewrite(root, arrays.header("float64", (4, 3, 1, 6))),
        f"{ARRAY}: the header gives shape (4, 3, 1, 6); expected (4, 1, 3, 6)",
    ),
    (
        lambda root: rewrite(root, arrays.header("float16", (4, 1, 3, 6))),
        f"{ARRAY}: the header gives dtype '<f2'; expected '<f8'",
    ),
    (
        lambda root: (root / ARRAY).write_bytes((root / ARRAY).read_bytes()[:-8]),
        f"{ARRAY}: the file has 696 bytes; expected 704 for float64 [4, 1, 3, 6]",
    ),
    (
        lambda root: (root / ARRAY).write_bytes((root / ARRAY).read_bytes()[:50]),
        f"{ARRAY}: the file ends within the header; expected 128 bytes of it",
    ),
    (
        huge_shape,
        "manifest.json: array 'out' of case 'decode-paged' has shape [1073741824, 1073741824, 1073741824]; expected at most *",
    ),
    (
        lambda root: edit_manifest(root, lambda m: entry_of(m).update(dtype="float128")),
        "manifest.json: array 'out' of case 'decode-paged' has dtype 'float128'; expected one of float64, *",
    ),
    (
        lambda root: edit_manifest(root, lambda m: entry_of(m).update(byte_order="big")),
        "manifest.json: array 'out' of case 'decode-paged' has byte_order 'big'; expected 'little'",
    ),
    (
        lambda root: edit_manifest(root, lambda m: entry_of(m).update(file="../../etc/passwd")),
        f"manifest.json: array 'out' of case 'decode-paged' is in '../../etc/passwd'; expected '{ARRAY}'",
    ),
    (
        lambda root: edit_manifest(root, lambda m: entry_of(m).pop("sha256")),
        "manifest.json: array 'out' of case 'decode-paged' has no 'sha256'; expected one of JSON type string",
    ),
    (
        lambda root: edit_manifest(root, lambda m: entry_of(m).update(shape=[4, -1])),
        "manifest.json: array 'out' of case 'decode-paged' has shape [4, -1]; expected a list of sizes",
    ),
    (listed_twice, "manifest.json: case 'rope-table-plain' is listed twice"),
    (
        lambda root: edit_manifest(root, lambda m: m.update(version=99)),
        "manifest.json: version is not 1, which this version reads",
    ),
    (
        lambda root: edit_manifest(root, lambda m: m["cases"][0].update(operation="dance")),
        "case 'rope-table-plain': unknown operation 'dance'; expected one of rope_table, *",
    ),
    (
        lambda root: edit_manifest(root, lambda m: m["cases"][0].update(parameters={})),
        "case 'rope-table-plain': rope_table needs 'rope', which the case lacks",
    ),
    (
        lambda root: edit_manifest(root, lambda m: m["cases"][0]["parameters"]["rope"].update(dim=3)),
        "case 'rope-table-plain': rope_table cannot be computed from this case: RopeConfig: dim *",
    ),
    (
        lambda root: edit_manifest(root, lambda m: entry_of(m).update(shape=[0, 2**31 - 1, 2**31 - 1, 2**31 - 1])),
        "manifest.json: array 'out' of case 'decode-paged' has shape [0, 2147483647, *; expected at most 268435456 *",
    ),
    (
        lambda root: edit_manifest(root, lambda m: entry_of(m).update(shape=[1] * 100)),
        "manifest.json: array 'out' of case 'decode-paged' has shape [1, 1, *; expected at most 268435456 *",
    ),
    (
        lambda root: edit_manifest(root, lambda m: entry_of(m).update(comparison="exakt")),
        "manifest.json: array 'out' of case 'decode-paged' has comparison 'exakt'; expected 'exact' or 'bounded'",
    ),
    (
        lambda root: edit_manifest(root, lambda m: entry_of(m).pop("comparison")),
        "manifest.json: array 'out' of case 'decode-paged' has comparison ''; expected 'exact' or 'bounded'",
    ),
    (
        lambda root: edit_manifest(root, lambda m: m["cases"][0]["arrays"][0].update(comparison="exact")),
        "manifest.json: array 'positions' of case 'rope-table-plain' has comparison 'exact'; expected none, *",
    ),
    (
        lambda root: edit_manifest(root, lambda m: m["cases"][0].update(sources=[{}])),
        "manifest.json: case 'rope-table-plain' has sources [{}]; expected strings",
    ),
    (
        lambda root: edit_manifest(root, lambda m: m["cases"][0]["parameters"].update(rope=[1])),
        "manifest.json: case 'rope-table-plain': parameter rope is [1]; expected an object",
    ),
    (
        lambda root: edit_manifest(root, lambda m: m["cases"][0]["parameters"].update(rtol=0.1)),
        "manifest.json: case 'rope-table-plain': unknown parameter 'rtol'; expected some of *",
    ),
    (
        lambda root: edit_manifest(root, lambda m: m["cases"][0]["parameters"]["rope"].update(dim=2**40)),
        "manifest.json: case 'rope-table-plain': parameter rope.dim is 1099511627776; expected at most 65536",
    ),
    (
        lambda root: edit_manifest(root, lambda m: m["cases"][0]["parameters"]["rope"].update(theta="big")),
        "case 'rope-table-plain': rope_table cannot be computed from this case: *",
    ),
    (json_bomb, "manifest.json: not valid JSON in UTF-8: *"),
    (lambda root: (root / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json: not valid JSON in UTF-8: *"),
    (
        lambda root: (root / "manifest.json").write_text("[]"),
        "manifest.json: format is not 'mla-spec golden corpus', *",
    ),
    (lambda root: (root / "manifest.json").unlink(), "manifest.json: the file is missing in *"),
    (
        lambda root: (root / "cache_sizes.json").write_text('{"models": ['),
        "cache_sizes.json: not valid JSON in UTF-8: *",
    ),
    (lambda root: (root / "headline_figures.json").unlink(), "headline_figures.json: the file is missing in *"),
]


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_damage_is_refused_in_one_sentence(number: int, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, sentence = DAMAGE[number]
    damage(copy)
    assert main(["golden", "verify", "--dir", str(copy)]) == 1
    text = capsys.readouterr().err
    parts = f"mla-spec: {sentence}".split("*")
    assert text.startswith(parts[0])
    assert all(part in text for part in parts)
    assert text.count("\n") == 1


def test_a_wrong_count_is_found(copy: Path) -> None:
    path = copy / "cache_sizes.json"
    path.write_text(path.read_text(encoding="utf-8").replace("1152", "1153", 1), encoding="utf-8")
    with pytest.raises(CorpusError, match=r"^cache_sizes\.json: models\[0\]\..* is 1153; expected 1152$"):
        corpus.verify(copy)
