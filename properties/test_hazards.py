"""Laws of hazards, for every operation: see ``mla_spec.properties.hazards``."""

from __future__ import annotations

from mla_spec.judging.law import as_test
from mla_spec.properties.hazards import LAWS

globals().update({made.name: as_test(made, __name__) for made in LAWS})
