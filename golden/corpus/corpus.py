"""The corpus on disk: reading it, holding it against the reference, and making it anew.

``manifest.json`` lists the cases and their arrays; ``arrays/`` holds the arrays, ``cache_sizes.json`` and
``headline_figures.json`` exact counts. README.md describes the format.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from mla_spec.golden.cases.all import cases
from mla_spec.golden.cases.case import Case
from mla_spec.golden.corpus import arrays, figures
from mla_spec.golden.corpus.compare import compare
from mla_spec.golden.corpus.error import CorpusError
from mla_spec.golden.corpus.parameters import fault
from mla_spec.golden.corpus.recorded import ORIGIN, answers, recorded_cases
from mla_spec.golden.corpus.stored import StoredCase
from mla_spec.golden.corpus.swap import PENDING, roll_back, swap
from mla_spec.text.files import read_text
from mla_spec.text.terminal import shown

__all__ = ["CorpusError", "StoredCase", "load", "regenerate", "verify"]

FORMAT, VERSION = "mla-spec golden corpus", 1
MANIFEST, ARRAYS = "manifest.json", "arrays"
_FILES = (ARRAYS, *figures.DOCUMENTS, MANIFEST)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def installed() -> Path:
    """The corpus that belongs to this package."""
    return Path(__file__).parents[1]


# Reading


def load(directory: str | os.PathLike[str] | None = None) -> list[StoredCase]:
    """All cases of a corpus, every file checked; ``directory`` defaults to the installed corpus.

    Raises:
        CorpusError: a file is missing, damaged, unexpected, or not what the manifest says.
    """
    root = installed() if directory is None else Path(directory)
    roll_back(root, _FILES)
    manifest = _read_json(root, MANIFEST)
    for key, want in (("format", FORMAT), ("version", VERSION)):
        if not isinstance(manifest, dict) or manifest.get(key) != want:
            raise CorpusError(f"{MANIFEST}: {key} is not {want!r}, which this version reads")
    loaded: list[StoredCase] = []
    listed: set[str] = set()
    for number, entry in enumerate(_field(manifest, "cases", list, "the manifest")):
        case = _load_case(root, entry, f"case {number}")
        if any(case.name == other.name for other in loaded):
            raise CorpusError(f"{MANIFEST}: case {case.name!r} is listed twice")
        loaded.append(case)
        listed |= {f"{case.name}.{name}.npy" for name in (*case.inputs, *case.expected)}
    for extra in sorted(set(_names_in(root / ARRAYS)) - listed):
        raise CorpusError(f"{ARRAYS}/{extra}: unexpected; {MANIFEST} does not list it")
    return loaded


def _load_case(root: Path, entry: Any, where: str) -> StoredCase:
    name = _field(entry, "name", str, where)
    if not _NAME.fullmatch(name):
        raise CorpusError(f"{MANIFEST}: {where} is called {shown(name)}; expected letters, digits and -_. only")
    where = f"case {name!r}"
    values: dict[str, dict[str, NDArray[Any]]] = {"input": {}, "expected": {}}
    exact = []
    for array in _field(entry, "arrays", list, where):
        key, role = _field(array, "name", str, f"an array of {where}"), _field(array, "role", str, where)
        if role not in values or any(key in group for group in values.values()):
            raise CorpusError(
                f"{MANIFEST}: {where} lists array {shown(key)} twice or with an unknown role {shown(role)}"
            )
        values[role][key] = _load_array(root, array, name, key)
        if _comparison(array, role, f"array {key!r} of {where}") == "exact":
            exact.append(key)
    parameters = _field(entry, "parameters", dict, where)
    if wrong := fault(parameters):
        raise CorpusError(f"{MANIFEST}: {where}: {wrong}")
    sources = _field(entry, "sources", list, where)
    if not all(isinstance(source, str) for source in sources):
        raise CorpusError(f"{MANIFEST}: {where} has sources {shown(sources)}; expected strings")
    texts = {key: _field(entry, key, str, where) for key in ("operation", "purpose", "catches")}
    return StoredCase(
        name=name,
        sources=sources,
        parameters=parameters,
        inputs=values["input"],
        expected=values["expected"],
        exact=exact,
        **texts,
    )


def _comparison(array: Any, role: str, where: str) -> str:
    """How an expected array is compared; "" of an input."""
    found = array.get("comparison", "")
    if found not in (("exact", "bounded") if role == "expected" else ("",)):
        wanted = "'exact' or 'bounded'" if role == "expected" else "none, as it is an input"
        raise CorpusError(f"{MANIFEST}: {where} has comparison {shown(found)}; expected {wanted}")
    return str(found)


def _load_array(root: Path, entry: Any, case: str, key: str) -> NDArray[Any]:
    where = f"array {shown(key)} of case {case!r}"
    file, dtype = _field(entry, "file", str, where), _field(entry, "dtype", str, where)
    digest, shape = _field(entry, "sha256", str, where), _field(entry, "shape", list, where)
    if file != _file(case, key) or not _NAME.fullmatch(key):
        raise CorpusError(f"{MANIFEST}: {where} is in {shown(file)}; expected {_file(case, key)!r}")
    if dtype not in arrays.STORED_DTYPES:
        raise CorpusError(
            f"{MANIFEST}: {where} has dtype {shown(dtype)}; expected one of {', '.join(arrays.STORED_DTYPES)}"
        )
    for name, want in (("stored_as", arrays.STORED_DTYPES[dtype]), ("byte_order", "little")):
        if entry.get(name) != want:
            raise CorpusError(f"{MANIFEST}: {where} has {name} {shown(entry.get(name))}; expected {want!r}")
    if not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        raise CorpusError(f"{MANIFEST}: {where} has shape {shown(shape)}; expected a list of sizes")
    if len(shape) > 16 or math.prod(max(n, 1) for n in shape) > arrays.LARGEST_ARRAY:
        most = arrays.LARGEST_ARRAY
        raise CorpusError(f"{MANIFEST}: {where} has shape {shown(shape)}; expected at most {most} elements")
    stored = arrays.read(root / file, file, dtype, tuple(shape), digest)
    values: NDArray[Any] = arrays.decode(stored, dtype)
    return values


def _file(case: str, key: str) -> str:
    return f"{ARRAYS}/{case}.{key}.npy"


def _field(entry: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
        raise CorpusError(f"{MANIFEST}: {where} has no {key!r}; expected one of JSON type {_JSON_TYPES[kind]}")
    return entry[key]


_JSON_TYPES: dict[type, str] = {str: "string", list: "array", dict: "object"}


def _read_json(root: Path, name: str) -> Any:
    try:
        return json.loads(read_text(root / name))
    except FileNotFoundError as error:
        raise CorpusError(f"{name}: the file is missing in {root}; expected a golden corpus there") from error
    except OSError as error:
        raise CorpusError(f"{name}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{name}: not valid JSON in UTF-8: {error}") from error


def _names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _own_cases(root: Path, stored: list[StoredCase]) -> list[Case] | None:
    """The cases of a corpus that was made of recorded calls, with the dtypes of their files; None of ours."""
    manifest = _read_json(root, MANIFEST)
    if manifest.get("origin") != ORIGIN:
        return None
    made = []
    for entry, case in zip(manifest["cases"], stored, strict=True):
        dtypes = {array["name"]: array["dtype"] for array in entry["arrays"] if array["role"] == "input"}
        given = {name: value for name, value in vars(case).items() if name != "expected"}
        whole = {name: x.astype(dtypes[name]) for name, x in case.inputs.items() if x.dtype.kind == "i"}
        given |= {"inputs": {**case.inputs, **whole}, "dtypes": dtypes}
        made.append(Case(**given | {"sources": tuple(case.sources), "exact": tuple(case.exact)}))
    return made


def _documents(own: list[Case] | None) -> dict[str, Callable[[], Any]]:
    """What makes each document of a corpus."""
    return {**figures.DOCUMENTS, "bounds.json": partial(figures.bounds, own)}


# Verifying


def verify(directory: str | os.PathLike[str] | None = None) -> str:
    """Check every file, then hold the float64 reference against every expected array; a summary of three lines.

    Raises:
        CorpusError: as ``load``, or a result of the reference or a count differs; one sentence says where.
    """
    root = installed() if directory is None else Path(directory)
    stored = load(root)
    worst, worst_at = 0.0, "none"
    for case in stored:
        try:
            found = compare(case.operation, case.inputs, case.parameters, case.expected, case.exact)
        except CorpusError as error:
            raise CorpusError(f"case {case.name!r}: {error}") from error
        if found.ratio > worst:
            worst, worst_at = found.ratio, f"{case.name}, {found.name}"
    for name, make in _documents(_own_cases(root, stored)).items():
        difference = figures.first_difference(_read_json(root, name), make())
        if difference:
            raise CorpusError(f"{name}: {difference}")
    count = sum(len(case.inputs) + len(case.expected) for case in stored)
    size = sum(path.stat().st_size for path in (root / ARRAYS).iterdir())
    return "\n".join(
        [
            f"{len(stored)} cases, {count} arrays, {size} bytes: every file is as the manifest says",
            f"the float64 reference agrees: worst error/bound {worst:.3f} ({worst_at})",
            f"{' and '.join(figures.DOCUMENTS)} recomputed exactly",
        ]
    )


# Regenerating


def regenerate(directory: str | os.PathLike[str] | None = None, calls: str | None = None) -> str:
    """Make the whole corpus anew and put it in the place of the old one; a line for each file that changed.

    Of a corpus that was made of recorded ``calls`` the answers to its own inputs are made anew. A line says of each call that a
    corpus cannot have, why not.

    Everything is written to a folder beside the corpus first, and a few renames put it in place. On a failure or interrupt
    they are undone; after a kill, by the next ``load`` or ``regenerate``. One at a time may work on a corpus.

    Raises:
        CorpusError: python-flint is missing, the folder is no corpus or cannot be written, or ``calls`` holds none.
    """
    own, left_out = (None, []) if calls is None else recorded_cases(calls)
    root = installed() if directory is None else Path(directory)
    try:
        root.mkdir(exist_ok=True)
        roll_back(root, _FILES)
        if (root / ARRAYS).exists() and not (root / MANIFEST).exists():
            raise CorpusError(
                f"{root} has {ARRAYS} but no {MANIFEST}; expected a golden corpus or a folder without either"
            )
        if own is None and (root / MANIFEST).exists() and _read_json(root, MANIFEST).get("origin") == ORIGIN:
            own = _own_cases(root, load(root))
        pending = root / PENDING
        shutil.rmtree(pending, ignore_errors=True)
        pending.mkdir()
        try:
            _write(pending / "new", own)
            changes = list(_changes(root, pending / "new"))
            if changes:
                swap(root, _FILES)
        except BaseException:
            roll_back(root, _FILES)
            raise
        finally:
            if not (pending / "old").exists():
                shutil.rmtree(pending)
    except OSError as error:
        raise CorpusError(f"cannot write the corpus in {root}: {error.strerror}") from error
    return "\n".join([*(changes or ["nothing changed"]), *left_out])


def _write(root: Path, own: list[Case] | None) -> None:
    """Write a corpus to a folder that does not exist yet: ours, or one of recorded calls."""
    try:
        from mla_spec.golden.exact.expected import expected
    except ModuleNotFoundError as error:
        if error.name != "flint":
            raise
        raise CorpusError(
            "regenerating needs python-flint, which is not installed: pip install 'mla-spec[golden]'"
        ) from error
    (root / ARRAYS).mkdir(parents=True)
    entries = []
    for case in cases() if own is None else own:
        results = expected(case.operation, case.inputs, case.parameters) if own is None else answers(case, expected)
        listed = [_write_array(root, case, "input", name, x) for name, x in case.inputs.items()]
        listed += [_write_array(root, case, "expected", name, x) for name, x in results.items()]
        entries.append(
            {
                "name": case.name,
                "operation": case.operation,
                "purpose": case.purpose,
                "catches": case.catches,
                "sources": list(case.sources),
                "parameters": case.parameters,
                "arrays": listed,
            }
        )
    origin = {} if own is None else {"origin": ORIGIN}
    _write_json(root / MANIFEST, {"format": FORMAT, "version": VERSION, **origin, "cases": entries})
    for name, make in _documents(own).items():
        _write_json(root / name, make())


def _write_array(root: Path, case: Case, role: str, name: str, values: NDArray[Any]) -> dict[str, Any]:
    """Write one array and return its entry in the manifest."""
    dtype = str(values.dtype)
    if dtype == "float64" and role == "input":
        dtype = case.dtypes.get(name, case.dtype)
    stored = arrays.encode(values, dtype)
    arrays.write(root / _file(case.name, name), stored, dtype)
    entry = {
        "name": name,
        "role": role,
        "file": _file(case.name, name),
        "dtype": dtype,
        "stored_as": arrays.STORED_DTYPES[dtype],
        "byte_order": "little",
        "shape": list(stored.shape),
        "sha256": arrays.sha256(arrays.content(stored)),
    }
    if role == "expected":
        entry["comparison"] = "exact" if name in case.exact else "bounded"
    return entry


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    path.write_bytes(text.encode())


def _contents(root: Path) -> dict[str, bytes]:
    names = [MANIFEST, *figures.DOCUMENTS, *(f"{ARRAYS}/{name}" for name in _names_in(root / ARRAYS))]
    return {name: (root / name).read_bytes() for name in names if (root / name).is_file()}


def _changes(old: Path, new: Path) -> Iterator[str]:
    before, after = _contents(old), _contents(new)
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            yield f"{'added' if name not in before else 'removed' if name not in after else 'changed'} {name}"
