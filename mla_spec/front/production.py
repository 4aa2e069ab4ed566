"""What a person asks of production laws."""

from __future__ import annotations

from mla_spec.judging.law import Production
from mla_spec.operations.workload import WorkloadError, read_workload
from mla_spec.text.terminal import UsageError


def production(budget: float | None, seed: int, workload: str | None) -> Production:
    """How large the cases are: ``budget`` seconds a law, or its default; ``workload`` is a file of recorded shapes.

    Raises:
        UsageError: the file cannot be read or a line of it is no case.
    """
    try:
        cases = () if workload is None else read_workload(workload)
    except WorkloadError as error:
        raise UsageError(f"--workload {error}") from error
    return Production(budget=Production.budget if budget is None else budget, seed=seed, workload=cases)
