"""All laws on one kernel, as tests of its own repository.

    cd examples/adoption && pytest

``pytest.ini`` names the file of waivers. A waived test that fails is reported as xfailed, one that passes as xpassed: then
its line can go.
"""

from __future__ import annotations

from collections.abc import Callable

from kernel import InHouse

from mla_spec import Options, parametrize_with_checks


@parametrize_with_checks([InHouse()], options=Options(examples=10))
def test_mla(subject: object, check: Callable[[object], None]) -> None:
    check(subject)
