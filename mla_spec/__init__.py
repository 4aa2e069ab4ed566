"""Conformance suite for Multi-head Latent Attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mla_spec.bounds.kernel_presets import presets as presets
    from mla_spec.bounds.profile import Accumulator as Accumulator
    from mla_spec.bounds.profile import Profile as Profile
    from mla_spec.bounds.profile import RopeProfile as RopeProfile
    from mla_spec.exchange.record import record as record
    from mla_spec.front.parametrize import parametrize_with_checks as parametrize_with_checks
    from mla_spec.judging.audit import audit as audit
    from mla_spec.judging.check import check_subject as check_subject
    from mla_spec.judging.law import Options as Options
    from mla_spec.judging.law import Production as Production
    from mla_spec.judging.verdict import Record as Record
    from mla_spec.reference.config import Llama4Scaling as Llama4Scaling
    from mla_spec.reference.config import LongRopeScaling as LongRopeScaling
    from mla_spec.reference.config import MLAConfig as MLAConfig
    from mla_spec.reference.config import RopeConfig as RopeConfig
    from mla_spec.reference.config import YarnScaling as YarnScaling
    from mla_spec.reference.indexer import IndexerConfig as IndexerConfig
    from mla_spec.subjects.supports import Supports as Supports
    from mla_spec.subjects.violation import Unsupported as Unsupported

_EXPORTS = {
    "Accumulator": "mla_spec.bounds.profile",
    "Profile": "mla_spec.bounds.profile",
    "RopeProfile": "mla_spec.bounds.profile",
    "presets": "mla_spec.bounds.kernel_presets",
    "record": "mla_spec.exchange.record",
    "audit": "mla_spec.judging.audit",
    "parametrize_with_checks": "mla_spec.front.parametrize",
    "check_subject": "mla_spec.judging.check",
    "Options": "mla_spec.judging.law",
    "Production": "mla_spec.judging.law",
    "Record": "mla_spec.judging.verdict",
    "Llama4Scaling": "mla_spec.reference.config",
    "LongRopeScaling": "mla_spec.reference.config",
    "MLAConfig": "mla_spec.reference.config",
    "RopeConfig": "mla_spec.reference.config",
    "YarnScaling": "mla_spec.reference.config",
    "IndexerConfig": "mla_spec.reference.indexer",
    "Supports": "mla_spec.subjects.supports",
    "Unsupported": "mla_spec.subjects.violation",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'mla_spec' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
