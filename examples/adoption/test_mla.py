"""All laws on one kernel, as tests of its own repository.

    cd examples/adoption && pytest

A waived law that fails is reported as xfailed, with the reason. A waiver that is not needed, or has expired, is an error: then it can
go. The same file serves `mla-spec check kernel.py:InHouse --waivers waivers.toml`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kernel import InHouse

from mla_spec import Options, parametrize_with_checks

WAIVERS = Path(__file__).with_name("waivers.toml")


@parametrize_with_checks([InHouse()], options=Options(examples=10), waivers=WAIVERS)
def test_mla(subject: object, check: Callable[[object], None]) -> None:
    check(subject)
