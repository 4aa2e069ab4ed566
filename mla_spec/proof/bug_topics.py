"""In which parts of a computation a planted bug is wrong: by the steps that its class overrides, and the words of its docstring.

This is the answer against which what a report finds out is held. It knows nothing of reports.
"""

from __future__ import annotations

import re
from typing import Any, Final

STEPS: Final[dict[str, str]] = {
    "visible": "mask",
    "masked": "mask",
    "packed_visible": "mask",
    "layer_visible": "mask",
    "visible_on_rank": "mask",
    "gather": "reads",
    "gather_batch": "reads",
    "gather_packed": "reads",
    "key_count": "reads",
    "sequences": "batch",
    "scores": "scores",
    "softmax_scale": "scores",
    "temperature": "queries",
    "softmax": "softmax",
    "merge_ranks": "softmax",
    "weighted_values": "values",
    "rotate": "rotation",
    "angles": "rotation",
    "cos_sin": "rotation",
    "cos_sin_factor": "rotation",
    "frequencies": "rotation",
    "layer_rope": "rotation",
    "rms_norm": "norm",
    "k_pe_norm": "norm",
    "project_query": "queries",
    "project_latent": "latent",
    "project_output": "output",
}
"""What is wrong where a step is overridden; steps of bugs that are merely their base's tell as much of these."""

WORDS: Final[dict[str, str]] = {
    "reads": r"pages?\b|block table|table row|slots?\b|pool|gather",
    "mask": r"\bmask|causal|\bsees?\b|window|(first|last|own) key",
    "scores": r"softmax.scale|\bscale|scaled|scores?\b|q kᵀ|log₂|powers? of 2",
    "softmax": r"softmax|maxim|splits?\b|merged?|row sum|\bweights\b|averaged|underflow",
    "lse": r"\bLSEs?\b",
    "values": r"\bvalues\b|\bV\b|P·V",
    "heads": r"\bheads?\b",
    "rotation": r"\brope\b|rotat|rotary|positions?\b|angles?\b|YaRN|LongRoPE|\bcos\b|frequenc|\bpairs\b",
    "norm": r"\bnorm|\beps\b|RMS",
    "queries": r"\bquer(y|ies) (is|are|compress)",
    "latent": r"\blatents?\b|k_pe|cached row",
    "output": r"o_proj",
    "cache": r"\bcache (grows|is emptied)|decode (step|path)|cached before|empties|grows by a block|\breset\b",
    "batch": r"sequences?\b|\bbatch\b",
    "gradient": r"gradient|backward|\bd[QKVDS]\b",
    "strides": r"contiguous|stride|adjacent|offset|address|32.bits?|31 bits|step from (row|token)",
    "memory": r"in place|buffer|shares? |overwrit|written|writes|in the memory|memory|reads? (one|an) element|cleared",
    "state": r"\bkept\b|\bplan\b|first (seen|call|use)|key under which|stays? the same|live on|once for each|copies",
    "bytes": r"counted|allocated|as values|kept (once|in)|is as wide|slices of wider",
    "rounding": r"rounded|bfloat16|float(8|16|32|64)|cut off|precision|order of the sums|squares|last bit|too (small|large)|format",
    "size": r"\d{2,}|beyond|eight|four\b|tile|power of two|blocks? of|long contexts",
}
"""Words by which an author says in which part a bug is."""


def topics_of(bug: Any) -> frozenset[str]:
    """The parts in which a planted bug is wrong; topics of ``mla_spec.judging.finding``."""
    text = " ".join((bug.make.__doc__ or "").split())
    steps = {STEPS[name] for name in vars(bug.make) if name in STEPS}
    return frozenset(steps | {topic for topic, words in WORDS.items() if re.search(words, text)})
