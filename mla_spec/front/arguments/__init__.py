"""The arguments of each command of ``mla-spec``."""

from __future__ import annotations

from mla_spec.front.arguments.checks import (
    add_answer,
    add_campaign,
    add_check,
    add_explain,
    add_export,
    add_judge,
    add_map,
    add_replay,
)
from mla_spec.front.arguments.proofs import (
    add_coverage,
    add_profile,
    add_profiles,
    add_selftest,
    add_sensitivity,
    add_soundness,
)
from mla_spec.front.arguments.reports import (
    add_diff,
    add_dump,
    add_merge,
    add_report,
    add_statement,
)
from mla_spec.front.arguments.texts import (
    add_adapters,
    add_book,
    add_cache,
    add_contract,
    add_embed,
    add_golden,
    add_laws,
    add_models,
    add_new,
    add_signatures,
)

COMMANDS = (
    add_check,
    add_explain,
    add_export,
    add_answer,
    add_judge,
    add_replay,
    add_map,
    add_merge,
    add_report,
    add_statement,
    add_diff,
    add_dump,
    add_campaign,
    add_soundness,
    add_sensitivity,
    add_selftest,
    add_coverage,
    add_laws,
    add_contract,
    add_profiles,
    add_profile,
    add_adapters,
    add_signatures,
    add_new,
    add_models,
    add_cache,
    add_embed,
    add_golden,
    add_book,
)
"""What adds each command, in the order of the help."""
