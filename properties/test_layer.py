"""Laws of the operation ``layer``: prefill and cached decode of a whole MLA layer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mla_spec.harness.cases import LayerCase, LayerInputs
from mla_spec.harness.driver import LayerDriver, Result, tensor_bits
from mla_spec.harness.laws import Run, law
from mla_spec.properties.layer_strategies import layer_cases
from mla_spec.properties.strategies import narrowed
from mla_spec.reference.error_bound import ErrorBound
from mla_spec.reference.formats import format_of
from mla_spec.reference.layer_bound import layer_with_bound
from mla_spec.reference.typing import Array

LAYER = ("layer",)


def _expected(run: Run, inputs: LayerInputs) -> tuple[Array, ErrorBound]:
    return layer_with_bound(inputs.hidden, inputs.positions, inputs.weights, inputs.config, run.profile)


def _run(layer: LayerDriver, method: str, inputs: LayerInputs, tokens: slice) -> Result:
    return layer.run(method, inputs.hidden[:, tokens], inputs.positions[:, tokens])


def _make(run: Run, inputs: LayerInputs) -> LayerDriver:
    return run.driver.layer(inputs.weights, inputs.config)


@law(needs=LAYER, cases=narrowed(layer_cases, max_steps=0))
def test_layer_prefill_agrees_with_reference(run: Run, case: LayerCase) -> None:
    """Prefill of a prompt, within the worst-case bound of the layer's profile."""
    inputs = case.build()
    want, bound = _expected(run, inputs)
    run.within(_run(_make(run, inputs), "prefill", inputs, np.s_[:]), want, bound)


@law(needs=LAYER, cases=narrowed(layer_cases, min_steps=1))
def test_layer_decode_agrees_with_reference(run: Run, case: LayerCase) -> None:
    """Tokens decoded one by one after a prompt, against the reference over the whole sequence."""
    inputs = case.build()
    want, bound = _expected(run, inputs)
    run.meaningful(want, bound)
    layer = _make(run, inputs)
    _run(layer, "prefill", inputs, np.s_[: case.prompt])
    for t in range(case.prompt, case.prompt + case.steps):
        one = slice(t, t + 1)
        got = _run(layer, "decode", inputs, one)
        run.within(got, want[:, one], bound[:, one], gate=False)


@law(needs=LAYER, cases=narrowed(layer_cases, min_steps=2, max_steps=8))
def test_layer_decodes_several_tokens_at_once(run: Run, case: LayerCase) -> None:
    """Decoding up to eight tokens in one call, as for MTP, is causal among them, aligned to the end of the cache."""
    inputs = case.build()
    want, bound = _expected(run, inputs)
    run.meaningful(want, bound)
    layer = _make(run, inputs)
    _run(layer, "prefill", inputs, np.s_[: case.prompt])
    rest = slice(case.prompt, None)
    got = _run(layer, "decode", inputs, rest)
    run.within(got, want[:, rest], bound[:, rest], gate=False)


@law(needs=LAYER, cases=narrowed(layer_cases, min_prompt=2, max_steps=0))
def test_prefill_equals_token_by_token_decode(run: Run, case: LayerCase) -> None:
    """One prefill gives what decoding the same tokens one by one gives."""
    inputs = case.build()
    _, bound = _expected(run, inputs)
    whole = _run(_make(run, inputs), "prefill", inputs, np.s_[:])
    layer = _make(run, inputs)
    for t in range(case.prompt):
        one = slice(t, t + 1)
        got = _run(layer, "prefill" if t == 0 else "decode", inputs, one)
        run.same_function(got, whole[:, one], bound[:, one], f"token {t}: decode differs from prefill")


@law(needs=LAYER, cases=narrowed(layer_cases, min_prompt=2, max_steps=0))
def test_future_tokens_are_ignored(run: Run, case: LayerCase) -> None:
    """Changing the last token of a prompt changes no bit of the tokens before it."""
    inputs = case.build()
    changed = inputs.hidden.copy()
    changed[:, -1] = -2 * changed[:, -1]
    want = _run(_make(run, inputs), "prefill", inputs, np.s_[:])
    got = _run(_make(run, inputs), "prefill", replace(inputs, hidden=changed), np.s_[:])
    run.same_bits(got[:, :-1], want[:, :-1], "only the last token, which these do not see, was changed")


@law(needs=LAYER, cases=narrowed(layer_cases, min_steps=1))
def test_reset_empties_the_cache(run: Run, case: LayerCase) -> None:
    """After reset, a layer that held a longer sequence gives the same bits as a new one."""
    inputs = case.build()
    fresh = _run(_make(run, inputs), "prefill", inputs, np.s_[: case.prompt])
    layer = _make(run, inputs)
    _run(layer, "prefill", inputs, np.s_[:])
    layer.reset()
    again = _run(layer, "prefill", inputs, np.s_[: case.prompt])
    run.same_bits(again, fresh, "the layer was used before and reset")


@law(needs=LAYER, cases=narrowed(layer_cases, min_steps=1))
def test_cache_bytes_are_exact(run: Run, case: LayerCase) -> None:
    """The cache holds kv_lora_rank + qk_rope_head_dim numbers per token, and nothing else."""
    inputs = case.build()
    row = inputs.config.cache_dim * format_of(case.dtype).itemsize
    page = run.supports.cache_page

    def require(layer: LayerDriver, tokens: int) -> None:
        want = case.batch * -(-tokens // page) * page * row
        got = layer.cache_bytes()
        run.require(
            got == want,
            f"cache_bytes after {tokens} tokens: got {got}, want {want} = {case.batch} sequences × "
            f"{-(-tokens // page) * page} tokens × {inputs.config.cache_dim} × {format_of(case.dtype).itemsize} B",
        )

    layer = _make(run, inputs)
    require(layer, 0)
    _run(layer, "prefill", inputs, np.s_[: case.prompt])
    require(layer, case.prompt)
    for t in range(case.prompt, case.prompt + case.steps):
        _run(layer, "decode", inputs, slice(t, t + 1))
        require(layer, t + 1)
    layer.reset()
    require(layer, 0)


@law(needs=LAYER, cases=layer_cases)
def test_layer_does_not_modify_its_inputs(run: Run, case: LayerCase) -> None:
    """Neither weights nor hidden states change in a prefill."""
    inputs = case.build()
    layer = _make(run, inputs)
    tensors = layer.weights | {"hidden": run.driver.tensor(inputs.hidden)}
    before = {name: tensor_bits(x) for name, x in tensors.items()}
    positions = run.driver.tensor(inputs.positions.astype(float)).long()
    run.driver.guard(lambda: layer.layer.prefill(tensors["hidden"], positions))
    for name, x in tensors.items():
        changed = int((tensor_bits(x) != before[name]).sum())
        run.require(changed == 0, f"prefill changed {changed} of {x.numel()} elements of {name}")
