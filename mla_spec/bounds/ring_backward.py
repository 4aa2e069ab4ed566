"""The worst-case error of gradients through attention to parts of the keys that are merged by their LSEs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mla_spec.bounds.attention_backward import Gradients
from mla_spec.bounds.merge_backward import merge_backward_with_bound
from mla_spec.bounds.prefill import prefill_with_bound
from mla_spec.bounds.prefill_backward import prefill_backward_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.reference.formats import format_of
from mla_spec.reference.typing import Array


def ring_backward_with_bound(
    parts: Sequence[dict[str, Any]], out_grad: Array, *, profile: Profile
) -> tuple[Gradients, ...]:
    """Gradients of the q, k and v of each part, for the gradient of the merged output, and their worst-case errors.

    Parts compute their outputs and LSEs with errors, which the merge inherits. Its gradients then arrive with errors at the
    backward pass of each part. The gradients of q are to be added over the parts.

    Args:
        parts: for each, the arguments of ``prefill`` by name; the queries of all are the same.
        out_grad: of the merged output, [tokens, h, dv].
    """
    forward = [prefill_with_bound(**part, profile=profile) for part in parts]
    outs, lses = np.stack([x.out for x in forward]), np.stack([x.lse for x in forward])
    # An LSE that was returned in float64 may be passed on in float32.
    u = format_of("float64" if profile.dtype == "float64" else "float32").unit_roundoff
    passed_on = np.where(np.isneginf(lses), 0.0, 2 * u * np.abs(lses))
    outs_grad, lses_grad = merge_backward_with_bound(
        outs,
        lses,
        out_grad,
        profile,
        out_errors=np.stack([x.out_error.total for x in forward]),
        lse_errors=np.stack([x.lse_error.total for x in forward]) + passed_on,
    )
    return tuple(
        prefill_backward_with_bound(
            **part,
            out_grad=do.value,
            out_grad_error=do.error,
            lse_grad=dlse.value,
            lse_grad_error=dlse.error,
            profile=profile,
        )
        for part, do, dlse in ((part, outs_grad[i], lses_grad[i]) for i, part in enumerate(parts))
    )
