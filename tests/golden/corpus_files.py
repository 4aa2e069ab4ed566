"""What tests of the golden files do with copies of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mla_spec.golden.corpus import compare, corpus, figures
from mla_spec.golden.corpus.corpus import CorpusError, StoredCase

ARRAY = "arrays/decode-paged.out.npy"


def contents(root: Path) -> dict[str, bytes]:
    """All files of a corpus by name."""
    names = ["manifest.json", *figures.DOCUMENTS, *(f"arrays/{p.name}" for p in (root / "arrays").iterdir())]
    return {name: (root / name).read_bytes() for name in names}


def edit_manifest(root: Path, change: Callable[[Any], None]) -> None:
    path = root / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def entry_of(manifest: Any, file: str = ARRAY) -> Any:
    """The manifest's entry of an array."""
    return next(a for case in manifest["cases"] for a in case["arrays"] if a["file"] == file)


@cache
def stored_case(name: str) -> StoredCase:
    """A case of the installed corpus."""
    return next(case for case in corpus.load() if case.name == name)


def require_refusal(monkeypatch: pytest.MonkeyPatch, name: str, target: Any, attribute: str, value: Any) -> None:
    """A case agrees with the reference, and no longer does with the fault ``value`` in place of ``target.attribute``."""
    case = stored_case(name)
    arguments = (case.operation, case.inputs, case.parameters, case.expected, case.exact)
    compare.compare(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(target, attribute, value)
        with pytest.raises(CorpusError, match="but the reference gives"):
            compare.compare(*arguments)
