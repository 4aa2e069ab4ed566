"""Runs cells on Ray: as many at once as its machines have room for. A cell whose worker or machine is lost runs again."""

from __future__ import annotations

import functools
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from mla_spec.judging.isolation import WorkerPool
from mla_spec.judging.law import Options
from mla_spec.judging.verdict import Record
from mla_spec.subjects.description import Description


class NoCluster(Exception):
    """Ray is not installed, or cannot be reached; the text is one sentence."""


class RayPool:
    """What ``WorkerPool`` is, on a cluster; a context manager.

    Each task has a processor, or a GPU where laws run on one, and judges its cell in a process of its own there. Files of
    subjects must have the same path on every machine.

    Args:
        address: of a running cluster, or "local" for one on this machine that ends with the pool.

    Raises:
        NoCluster: Ray is not installed, or there is no cluster at ``address``.
    """

    def __init__(self, address: str, device: str, timeout: float) -> None:
        try:
            import ray
        except ImportError as error:
            raise NoCluster("--ray needs Ray, which is not installed: pip install 'mla-spec[ray]'") from error
        self._ray: Any = ray
        try:
            ray.init(address=None if address == "local" else address, log_to_driver=False, logging_level="ERROR")
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            raise NoCluster(f"--ray {address}: no cluster can be reached: {first}") from error
        gpus = 0 if device == "cpu" else 1
        self._task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=-1)(_run)
        self._timeout = timeout

    def submit(self, law: str, subject_name: str, options: Options, signature: str | None = None) -> Future[Record]:
        """Run a law on the subject that ``options.spec`` names, where and when there is room."""
        future: Future[Record] = self._send("submit", law, subject_name, _found_everywhere(options), signature)
        return future

    def describe(self, options: Options, signature: str | None = None) -> Future[Description]:
        """What the subject that ``options.spec`` names declares."""
        future: Future[Description] = self._send("describe", _found_everywhere(options), signature)
        return future

    def _send(self, method: str, *arguments: Any) -> Any:
        return self._task.remote(self._timeout, method, arguments).future()

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *error: object) -> None:
        self._ray.shutdown()


@functools.cache
def _pool(timeout: float) -> WorkerPool:
    """The pool of this process of Ray, which serves one task at a time and then the next."""
    return WorkerPool(1, timeout)


def _run(timeout: float, method: str, arguments: tuple[Any, ...]) -> Any:
    return getattr(_pool(timeout), method)(*arguments).result()


def _found_everywhere(options: Options) -> Options:
    """The same with the whole path of a subject's file: tasks run in other folders."""
    assert options.spec is not None
    path, colon, name = options.spec[0].rpartition(":")
    if not path.endswith(".py"):
        return options
    return replace(options, spec=(f"{Path(path).resolve()}{colon}{name}", *options.spec[1:]))
