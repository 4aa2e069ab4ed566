"""Uses a short time on a machine with a GPU well: ``python tests/gpu/lane.py --device cuda --out DIR``, from the source tree.

Nothing is installed and no network is used. Each step of ``steps.py`` runs under its own time limit, and all of them under
one. What they give is written as it comes, so that whatever is killed leaves what it had:

- ``results.jsonl``: one line for the run, and one a step when it ends;
- ``records.jsonl``: what the commands append, one record a line, as it is made;
- ``lane.log``: what the commands print.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from steps import ROOT, Setting, Step, default_jobs, steps

OUTSIDE = {"properties": "properties", "golden": "golden", "planted_bugs": "tests/planted_bugs"}
"""Packages of ``mla_spec`` that lie elsewhere in the source tree, and where."""

BRIEF = ("law", "subject", "verdict", "cases", "worst", "seconds")
"""What results keep of a record that passes, or does not apply."""

GRACE = 5.0
"""Seconds of the whole limit that are kept for writing."""

LOG_TAIL = 4000

VERDICTS = (0, 1, 3)
"""Exit codes of a module that did its work: all is well, something is not, incomplete. A script has 0 alone."""


def link_tree(target: Path) -> None:
    """A folder ``mla_spec`` in ``target`` that holds the package as it would be installed, of links."""
    package = target / "mla_spec"
    package.mkdir(parents=True)
    for path in (ROOT / "mla_spec").iterdir():
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    for name, place in OUTSIDE.items():
        (package / name).symlink_to(ROOT / place)


def unpack_wheels(brought: Path, target: Path) -> None:
    """The wheels that were brought along, importable from ``target``."""
    target.mkdir()
    for wheel in sorted(brought.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)


@contextmanager
def environment(setting: Setting) -> Iterator[dict[str, str]]:
    """Variables of every step: the package is found, by processes that a step starts too."""
    with tempfile.TemporaryDirectory() as temporary:
        tree, wheels = Path(temporary) / "tree", Path(temporary) / "wheels"
        link_tree(tree)
        unpack_wheels(setting.brought, wheels)
        paths = [str(tree), str(wheels), *filter(None, [os.environ.get("PYTHONPATH")])]
        yield os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "MLA_SPEC_BROUGHT": str(setting.brought.resolve()),
        }


class Lane:
    """Runs steps, and writes what comes of them into a folder."""

    def __init__(self, out: Path, limit: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.results, self.records, self.log = (out / n for n in ("results.jsonl", "records.jsonl", "lane.log"))
        for path in (self.results, self.records, self.log):
            path.write_text("", encoding="utf-8")
        self.end = time.monotonic() + limit - GRACE

    def write(self, content: dict[str, Any]) -> None:
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def run(self, step: Step, variables: dict[str, str]) -> None:
        """Run a step, as long as it and the lane may take, and write its result."""
        limit = min(step.limit, self.end - time.monotonic())
        reason = step.left_out or ("" if limit > 1 else "no time was left")
        if reason:
            self.write(self._result(step) | {"status": "left out", "reason": reason})
            return
        log, records = self.log.stat().st_size, self.records.stat().st_size
        start = time.monotonic()
        code = self._process(step, variables, limit)
        printed = _since(self.log, log)
        self.write(
            self._result(step)
            | {
                "status": "killed" if code is None else "done" if code in _good_codes(step) else "failed",
                "reason": f"took more than {limit:.0f} s" if code is None else "",
                "exit": code,
                "seconds": round(time.monotonic() - start, 1),
                "records": [_brief(record) for record in _records(_since(self.records, records))],
                "data": _data(printed),
                "log": printed[-LOG_TAIL:],
            }
        )

    def _result(self, step: Step) -> dict[str, Any]:
        given = {"environment": step.environment, "expected": step.expected}
        return {"step": step.name, "title": step.title, "command": _shown(step), **given, "records": [], "seconds": 0.0}

    def _process(self, step: Step, variables: dict[str, str], limit: float) -> int | None:
        """The exit code of the step's command; None where it was killed, with all that it had started."""
        command = [*step.command, *(("--records", str(self.records)) if "mla_spec.front.cli" in step.command else ())]
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"\n+ {step.name}: {_shown(step)}\n")
            file.flush()
            environment = variables | step.environment
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                return process.wait(limit)
            except subprocess.TimeoutExpired:
                return None
            finally:
                _kill_group(process)


def _good_codes(step: Step) -> tuple[int, ...]:
    return VERDICTS if "-m" in step.command else (0,)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _shown(step: Step) -> str:
    """The command as a person would type it with the package installed."""
    words = [word for word in step.command if word != sys.executable]
    text = " ".join(words).replace("-m mla_spec.front.cli", "mla-spec").replace(f"{ROOT}{os.sep}", "")
    return text if text.startswith("mla-spec") else f"python {text}"


def _since(path: Path, offset: int) -> str:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read().decode("utf-8", errors="replace")


def _records(text: str) -> list[dict[str, Any]]:
    """What was found, without the lines that tell of the run."""
    lines = [json.loads(line) for line in _whole_lines(text)]
    return [line for line in lines if line.get("type", "verdict") == "verdict"]


def _whole_lines(text: str) -> list[str]:
    """Without a last line that was being written when its writer was killed."""
    return text.split("\n")[:-1]


def _brief(record: dict[str, Any]) -> dict[str, Any]:
    """What results keep of a record: all of it where something was found."""
    if record.get("verdict") in ("pass", "unsupported"):
        return {name: record[name] for name in BRIEF}
    if record.get("killed"):
        return {name: value for name, value in record.items() if name != "records"}
    return record


def _data(printed: str) -> Any:
    """What a step printed as JSON in its last line, if it did."""
    lines = printed.strip().splitlines()
    try:
        return json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="torch device (cuda)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--limit", type=float, default=540, help="seconds that all steps may take (540)")
    parser.add_argument("--brought", type=Path, default=ROOT / "tests" / "gpu" / "brought", help="third-party files")
    parser.add_argument("--jobs", type=int, help="worker processes")
    parser.add_argument("--step", action="append", default=[], help="only this step; repeatable")
    parser.add_argument("--rehearse", action="store_true", help="few laws and small counts")
    options = parser.parse_args()
    setting = Setting(options.device, options.brought, options.jobs or default_jobs(options.device), options.rehearse)
    planned = steps(setting)
    unknown = set(options.step) - {step.name for step in planned}
    if unknown:
        parser.error(f"unknown step {', '.join(unknown)}; known are {', '.join(step.name for step in planned)}")
    lane = Lane(options.out, options.limit)
    with environment(setting) as variables:
        lane.write({"run": {"device": options.device, "limit": options.limit, "jobs": setting.jobs} | _when(options)})
        for step in planned:
            if not options.step or step.name in options.step:
                print(f"{step.name}: {step.left_out or step.title}", flush=True)
                lane.run(step, variables)
    return 0


def _when(options: argparse.Namespace) -> dict[str, Any]:
    return {"date": time.strftime("%Y-%m-%d", time.gmtime()), "rehearsal": options.rehearse}


if __name__ == "__main__":
    sys.exit(main())
