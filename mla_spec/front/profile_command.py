"""The commands ``mla-spec profiles`` and ``mla-spec profile``."""

from __future__ import annotations

import argparse

from mla_spec.bounds.kernel_presets import KERNELS
from mla_spec.bounds.profile_presets import PRESETS
from mla_spec.front.device import require_device
from mla_spec.text.terminal import UsageError


def profiles() -> str:
    """Every preset, what it declares, and where that is said."""
    lines = []
    for name, kernel in KERNELS.items():
        lines += [f"{name}: {kernel.what}", f"    source: {kernel.source}"]
        lines += [f"    {profile.describe()}" for profile in kernel.profiles]
    lines += ["", "of one dtype:"]
    lines += [f"{name}: {profile.describe()}" for name, profile in PRESETS.items()]
    lines += ["", "A subject declares one with `profile = mla_spec.presets(NAME)`."]
    return "\n".join(lines)


def propose(options: argparse.Namespace) -> int:
    """Print what ``proof.propose`` finds; 0 where every dtype satisfies a preset, else 1."""
    from mla_spec.proof.propose import proposal
    from mla_spec.subjects.description import declared_by
    from mla_spec.subjects.process import apart
    from mla_spec.subjects.violation import BrokenSubject, SubjectCrashed, UnknownSubject, Violation

    require_device(options.device)
    unsatisfied = False
    try:
        with apart(options.subject, options.device) as subject:
            for dtype in options.dtype or declared_by(subject).supports.dtypes:
                for line in proposal(subject, dtype, count=options.cases, seed=options.seed, device=options.device):
                    print(line)
                    unsatisfied |= "no preset is satisfied" in line
    except (ValueError, UnknownSubject, BrokenSubject, SubjectCrashed, Violation) as error:
        raise UsageError(str(error)) from error
    return int(unsatisfied)
