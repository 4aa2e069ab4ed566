"""The pytest plugin: chooses subjects for the laws. Imports neither torch nor numpy until a law runs."""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mla_spec.subjects.exits import loud_exits

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from mla_spec.judging.law import Law, Production


class StaleXfail(UserWarning):
    """An id in the --mla-xfails file names no collected test."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mla-spec", "conformance of Multi-head Latent Attention")
    group.addoption(
        "--mla-impl",
        action="append",
        default=[],
        metavar="SUBJECT",
        help="subject under test: a shipped name, package.module:object or file.py:object; repeatable. "
        "The environment variable MLA_IMPL (comma-separated) does the same. Default: all that can run here.",
    )
    group.addoption("--mla-device", default="cpu", metavar="DEVICE", help="torch device of the tensors (cpu)")
    group.addoption(
        "--mla-xfails",
        default=None,
        metavar="FILE",
        help="tests expected to fail: one `test_name` or `test_name[subject]` per line, # comments",
    )
    group.addoption("--mla-threads", type=int, default=1, metavar="N", help="threads of torch on the CPU (1)")
    group.addoption(
        "--mla-compile",
        default=None,
        metavar="BACKEND",
        help="also check what torch.compile makes of operations with this backend, e.g. inductor",
    )
    group.addoption(
        "--mla-production",
        action="store_true",
        help="also check whole published widths at loads that grow with --mla-budget",
    )
    group.addoption(
        "--mla-budget",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds that each law of --mla-production may take (60)",
    )
    group.addoption(
        "--mla-workload",
        default=None,
        metavar="FILE",
        help="--mla-production with recorded shapes, a JSON object a line",
    )
    group.addoption("--mla-examples", type=int, default=100, metavar="N", help="generated cases per law (100)")
    group.addoption("--mla-seed", type=int, default=0, metavar="N", help="seed of the generation (0)")
    group.addoption("--mla-timeout", type=float, default=300, metavar="S", help="seconds a case may take (300)")
    group.addoption("--mla-in-process", action="store_true", help="no worker process, for debuggers")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> Generator[None]:
    """From here on modules of the user are imported, and may import a subject that ends the process."""
    watch = ExitStack()
    watch.enter_context(loud_exits())
    early_config.add_cleanup(watch.close)
    yield


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "mla_check" in metafunc.fixturenames:
        metafunc.parametrize("mla_check", _subject_specs(metafunc.config), indirect=True, scope="session")


def _subject_specs(config: pytest.Config) -> list[str]:
    chosen: list[str] = config.getoption("--mla-impl")
    if not chosen:
        chosen = [spec for spec in os.environ.get("MLA_IMPL", "").split(",") if spec.strip()]
    if chosen:
        return [spec.strip() for spec in chosen]
    from mla_spec.subjects.find import available_subjects

    return available_subjects()


@pytest.fixture(scope="session")
def mla_check(request: pytest.FixtureRequest) -> Iterator[Callable[[Law], None]]:
    """Runs a law on the subject of this test, in a worker process, and makes its record the outcome."""
    from mla_spec.front.parametrize import report_to_pytest
    from mla_spec.judging.isolation import WorkerPool
    from mla_spec.judging.law import Options
    from mla_spec.judging.run import run_law
    from mla_spec.subjects.find import UnknownSubject, resolve_subject

    config = request.config
    options = Options(
        examples=config.getoption("--mla-examples"),
        seed=config.getoption("--mla-seed"),
        device=config.getoption("--mla-device"),
        threads=config.getoption("--mla-threads"),
        compile=config.getoption("--mla-compile"),
        production=_production(config),
        spec=(request.param,),
    )
    try:
        if config.getoption("--mla-in-process"):
            subject: Any = resolve_subject(request.param)
            yield lambda law: report_to_pytest(run_law(law, subject, options))
            return
        with WorkerPool(timeout=config.getoption("--mla-timeout")) as pool:
            name = pool.describe(options).result().name
            yield lambda law: report_to_pytest(pool.submit(law.name, name, options).result())
    except UnknownSubject as error:
        raise pytest.UsageError(str(error)) from error


def _production(config: pytest.Config) -> Production | None:
    """What the options ask of production laws."""
    from mla_spec.front.production import production
    from mla_spec.text.terminal import UsageError

    workload, budget = config.getoption("--mla-workload"), config.getoption("--mla-budget")
    if not config.getoption("--mla-production") and workload is None:
        return None
    if not budget > 0:
        raise pytest.UsageError(f"--mla-budget must be positive, got {budget}")
    try:
        return production(budget, config.getoption("--mla-seed"), workload)
    except UsageError as error:
        raise pytest.UsageError(f"--mla-{str(error).removeprefix('--')}") from error


def read_xfails(path: str) -> list[str]:
    """Ids in a waiver file, comments and blank lines dropped; UsageError when it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise pytest.UsageError(f"--mla-xfails: cannot read {path}: {error.strerror}") from error
    lines = (raw.partition("#")[0].strip() for raw in text.splitlines())
    return [_current_id(line) for line in lines if line]


def _current_id(line: str) -> str:
    """An id with the law's name of today."""
    from mla_spec.judging.renamed import current_name

    name, bracket, subject = line.partition("[")
    return current_name(name) + bracket + subject


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = config.getoption("--mla-xfails")
    if path is None:
        return
    stale = set(waived := read_xfails(path))
    for item in items:
        names = {item.name, getattr(item, "originalname", item.name)}
        for name in names & set(waived):
            item.add_marker(pytest.mark.xfail(reason=f"waived in {path}", strict=False))
            stale.discard(name)
    for name in sorted(stale):
        warnings.warn(StaleXfail(f"{path}: {name!r} names no collected test"), stacklevel=1)
