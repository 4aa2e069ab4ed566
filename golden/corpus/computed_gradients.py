"""What the float64 reference computes from cases of gradients; as in ``computed``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mla_spec.bounds.prefill_backward import prefill_backward_with_bound, sparse_prefill_backward_with_bound
from mla_spec.golden.cases.case import Parameters, Values
from mla_spec.golden.corpus.computed import PROFILE, Computed


def _prefill_backward(x: Values, parameters: Parameters) -> Iterator[Computed]:
    bounded = prefill_backward_with_bound(
        **x, softmax_scale=parameters["softmax_scale"], causal=parameters["causal"], profile=PROFILE
    )
    for name, gradient in zip(("q_grad", "k_grad", "v_grad"), bounded, strict=True):
        yield Computed(name, gradient.value, gradient.error)


def _sparse_prefill_backward(x: Values, parameters: Parameters) -> Iterator[Computed]:
    bounded = sparse_prefill_backward_with_bound(
        x["q"],
        x["kv"][:, 0],
        x["indices"][:, 0],
        x["out_grad"],
        head_dim_v=parameters["head_dim_v"],
        softmax_scale=parameters["softmax_scale"],
        profile=PROFILE,
        attn_sink=x["attn_sink"],
        lse_grad=x["lse_grad"].T,
    )
    q_grad, rows_grad = bounded
    yield Computed("q_grad", q_grad.value, q_grad.error)
    yield Computed("kv_grad", rows_grad.value[:, None], rows_grad.error[:, None])


COMPUTED: dict[str, Callable[[Values, Parameters], Iterator[Computed]]] = {
    "prefill_backward": _prefill_backward,
    "sparse_prefill_backward": _sparse_prefill_backward,
}
