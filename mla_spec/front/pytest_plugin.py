"""The pytest plugin: chooses subjects for the laws. Imports neither torch nor numpy until a law runs."""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from mla_spec.front.waived import OUTCOMES
from mla_spec.subjects.exits import loud_exits
from mla_spec.text.files import read_text

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from mla_spec.judging.law import Law, Production
    from mla_spec.judging.waivers import Waivers


_WAIVER = "mla_waiver"
_SAID: list[tuple[str, str]] = []
"""Waivers and the verdicts of cells that they cover, of the whole session."""


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
    group.addoption(
        "--mla-waivers",
        default=None,
        metavar="FILE",
        help="expected failures of laws, with reasons and last days; docs/waivers.md shows such a file",
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
    group.addoption(
        "--mla-quick", action="store_true", help="elementary laws alone, on small cases; docs/quick_check.md says which"
    )
    group.addoption("--mla-examples", type=int, metavar="N", help="generated cases per law (25; 8 with --mla-quick)")
    group.addoption(
        "--mla-minimise-seconds",
        type=float,
        metavar="S",
        help="seconds in which a smaller failing case is looked for, per law and dtype (60; 10 with --mla-quick)",
    )
    group.addoption(
        "--mla-no-minimise", action="store_true", help="report the first failing case as it is, for slow subjects"
    )
    group.addoption("--mla-seed", type=int, metavar="N", help="seed of the generation (another each time, and printed)")
    group.addoption("--mla-timeout", type=float, default=300, metavar="S", help="seconds a call may take (300)")
    group.addoption("--mla-under", default="", metavar="COMMAND", help="run subjects under it, e.g. a sanitizer")
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
    from mla_spec.judging.check import judge
    from mla_spec.judging.isolation import WorkerPool
    from mla_spec.judging.law import Options
    from mla_spec.judging.plan import plan
    from mla_spec.judging.session import Asked, run_in
    from mla_spec.subjects.find import UnknownSubject, resolve_subject

    config = request.config
    _require_within_limits(config)
    waivers = _waivers(config)
    options = Options(
        examples=config.getoption("--mla-examples"),
        quick=config.getoption("--mla-quick"),
        minimise=not config.getoption("--mla-no-minimise"),
        minimise_seconds=config.getoption("--mla-minimise-seconds"),
        seed=_seed(config),
        device=config.getoption("--mla-device"),
        threads=config.getoption("--mla-threads"),
        compile=config.getoption("--mla-compile"),
        production=_production(config),
        spec=(request.param,),
    )
    try:
        if config.getoption("--mla-in-process"):
            subject: Any = resolve_subject(request.param)
            yield lambda law: report_to_pytest(judge(law, subject, options, waivers), waivers)
            return
        with WorkerPool(timeout=config.getoption("--mla-timeout"), under=config.getoption("--mla-under")) as pool:
            asked = Asked(options, None, pool.describe(options).result())

            def check(law: Law) -> None:
                cells = plan([(asked.spec, asked.dtypes)], [law.name], options.seed)
                judged = run_in(pool, cells, {asked.spec: asked}, lambda cell: None)
                report_to_pytest([(cell, waivers.apply(cell, record)) for cell, record in judged], waivers)

            yield check
    except UnknownSubject as error:
        raise pytest.UsageError(str(error)) from error


def _require_within_limits(config: pytest.Config) -> None:
    from mla_spec.front.limits import require_within_limits
    from mla_spec.text.terminal import UsageError

    names = ("examples", "seed", "threads", "timeout", "budget", "minimise_seconds", "under")
    try:
        require_within_limits({name: config.getoption(f"--mla-{name.replace('_', '-')}") for name in names})
    except UsageError as error:
        raise pytest.UsageError(f"--mla-{str(error).removeprefix('--')}") from error


def _waivers(config: pytest.Config) -> Waivers:
    """The waivers of ``--mla-waivers``."""
    from mla_spec.judging.waivers import WaiverError, Waivers, read_waivers

    path = config.getoption("--mla-waivers")
    try:
        return Waivers() if path is None else read_waivers(path)
    except WaiverError as error:
        raise pytest.UsageError(f"--mla-waivers {error}") from error


_SEED = pytest.StashKey[int]()


def _seed(config: pytest.Config) -> int:
    """The seed that was given, or one for the whole session."""
    from mla_spec.judging.law import new_seed

    given: int | None = config.getoption("--mla-seed")
    if _SEED not in config.stash:
        config.stash[_SEED] = new_seed() if given is None else given
    return config.stash[_SEED]


def _production(config: pytest.Config) -> Production | None:
    """What the options ask of production laws."""
    from mla_spec.front.production import production
    from mla_spec.text.terminal import UsageError

    workload, budget = config.getoption("--mla-workload"), config.getoption("--mla-budget")
    if not config.getoption("--mla-production") and workload is None:
        return None
    try:
        return production(budget, _seed(config), workload)
    except UsageError as error:
        raise pytest.UsageError(f"--mla-{str(error).removeprefix('--')}") from error


def read_xfails(path: str) -> list[str]:
    """Ids in a waiver file, comments and blank lines dropped; UsageError when it cannot be read."""
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise pytest.UsageError(f"--mla-xfails: cannot read {path}: {reason}") from error
    lines = (raw.partition("#")[0].strip() for raw in text.splitlines())
    return [_current_id(line) for line in lines if line]


def _current_id(line: str) -> str:
    """An id with the law's name of today."""
    from mla_spec.judging.renamed import current_name

    name, bracket, subject = line.partition("[")
    return current_name(name) + bracket + subject


def _deselect_all_but_elementary(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out laws that are no part of a quick check."""
    from mla_spec.installed import quick_laws

    laws = {item: getattr(getattr(item, "function", None), "law", None) for item in items}
    left_out = [item for item, law in laws.items() if law is not None and law.name not in quick_laws()]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--mla-quick"):
        _deselect_all_but_elementary(config, items)
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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What the test said of waivers goes with its report, from workers of xdist too."""
    report = yield
    report.user_properties += [(_WAIVER, outcome) for outcome in OUTCOMES]
    OUTCOMES.clear()
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        said: Any = [value for name, value in report.user_properties if name == _WAIVER]
        _SAID.extend((waiver, verdict) for waiver, verdict in said)


def pytest_sessionstart() -> None:
    _SAID.clear()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A waiver that is not needed fails the session."""
    if session.exitstatus == pytest.ExitCode.OK and _needless(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.getoption("--mla-quick"):
        terminalreporter.write_line("mla-spec: a quick check: docs/quick_check.md says what it leaves out")
    if _SEED in config.stash:
        terminalreporter.write_line(f"mla-spec: --mla-seed {config.stash[_SEED]} gives these cases again")
    failed = sum(verdict in ("fail", "crashed", "incomplete") for _, verdict in _SAID)
    if _SAID:
        terminalreporter.write_line(f"mla-spec: {failed} cells fail as {len({w for w, _ in _SAID})} waivers expect")
    for sentence in _needless(config):
        terminalreporter.write_line(f"mla-spec: {sentence}", red=True)


def _needless(config: pytest.Config) -> list[str]:
    """Waivers that are not needed; a part of the tests cannot tell."""
    part = config.option.keyword or config.option.maxfail or any("::" in each for each in config.args)
    if not _SAID or part or hasattr(config, "workerinput"):
        return []
    from mla_spec.judging.waivers import needless

    return needless(_SAID)
