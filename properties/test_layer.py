"""Laws of the operation ``layer``: prefill and cached decode of a whole MLA layer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from mla_spec.bounds.error_bound import ErrorBound
from mla_spec.bounds.layer import layer_with_bound
from mla_spec.bounds.profile import Profile
from mla_spec.judging.law import Run, law
from mla_spec.operations.layer import LLAMA_4_SCALING, LayerCase, LayerDriver, LayerInputs
from mla_spec.properties.hazards import overwrite
from mla_spec.properties.layer_stages import Calls, made_layer, stage_named, traced
from mla_spec.properties.strategies.layer import (
    CHUNK,
    IN_CHUNKS,
    every_option,
    fitted,
    layer_cases,
    long_layers,
    rotating_layer,
)
from mla_spec.properties.strategies.sizes import narrowed
from mla_spec.reference.formats import format_of
from mla_spec.reference.typing import Array, IntArray
from mla_spec.subjects.allocation import Allocations
from mla_spec.subjects.driver import Result, Tensors, tensor_bits
from mla_spec.subjects.memory import share_memory
from mla_spec.subjects.near import there
from mla_spec.subjects.supports import Supports
from mla_spec.subjects.violation import Violation

LAYER = ("layer",)

EDGES = (512, 1024, 4096)
"""Positions at which a table may end; tokens are moved to both sides of one of them."""


def _needs_cache(supports: Supports) -> str:
    return "its layer has no cache" if supports.layer_cache == "none" else ""


def _needs_several(supports: Supports) -> str:
    return _needs_cache(supports) or ("its layer decodes one token a call" if supports.layer_max_decode == 1 else "")


def _needs_chunks(supports: Supports) -> str:
    return _needs_cache(supports) or ("" if supports.layer_chunks else "prefill of its layer continues no cache")


def _expected(run: Run, inputs: LayerInputs) -> tuple[Array, ErrorBound]:
    return layer_with_bound(inputs.hidden, inputs.positions, inputs.weights, inputs.config, run.profile)


def _run(layer: LayerDriver, method: str, inputs: LayerInputs, tokens: slice) -> Result:
    return layer.run(method, inputs.hidden[:, tokens], inputs.positions[:, tokens])


@law(needs=LAYER, cases=narrowed(layer_cases, max_steps=2), cost=2)
def test_layer_stages_agree_with_reference(run: Run, case: LayerCase) -> None:
    """Each stage that the layer hands out of a prompt and of decoded tokens, within a bound of its own.

    ``trace`` hands them out. A stage is allowed less error than the output, to which the errors of all stages add.
    """
    for got, want, bound in traced(run, case.build(), _calls(case)):
        run.within(got, want, bound, gate=False)


@law(needs=LAYER, cases=narrowed(layer_cases, max_steps=0), first=every_option)
def test_layer_prefill_agrees_with_reference(run: Run, case: LayerCase) -> None:
    """Prefill of a prompt, within the worst-case bound of the layer's profile."""
    inputs = case.build()
    want, bound = _expected(run, inputs)
    with stage_named(run, inputs, _calls(case)):
        run.within(_run(made_layer(run, inputs), "prefill", inputs, np.s_[:]), want, bound)


@law(needs=LAYER, cases=narrowed(layer_cases, min_steps=1), first=every_option, missing=_needs_cache)
def test_layer_decode_agrees_with_reference(run: Run, case: LayerCase) -> None:
    """Tokens decoded one by one after a prompt, against the reference over the whole sequence."""
    inputs = case.build()
    want, bound = _expected(run, inputs)
    run.meaningful(want, bound)
    layer = made_layer(run, inputs)
    calls = _calls(case)
    _run(layer, "prefill", inputs, calls[0][1])
    with stage_named(run, inputs, calls):
        for method, tokens in calls[1:]:
            got = _run(layer, method, inputs, tokens)
            run.within(got, want[:, tokens], bound[:, tokens], gate=False)


@law(needs=LAYER, cases=long_layers, missing=_needs_cache)
def test_layer_of_thousands_of_cached_tokens(run: Run, case: LayerCase) -> None:
    """The end of a long prompt, its second chunk, and tokens decoded one by one and several at once, see all that is cached.

    Of a prompt of hundreds of tokens all are judged.
    """
    inputs = case.build()
    judged = case.steps + (case.prompt if case.prompt < 600 else 3)
    want, bound = layer_with_bound(
        inputs.hidden, inputs.positions, inputs.weights, inputs.config, run.profile, last=judged
    )
    run.meaningful(want, bound)
    layer = made_layer(run, inputs)
    first = case.prompt + case.steps - judged
    cut = case.prompt - CHUNK if case.prompt in IN_CHUNKS and run.supports.layer_chunks else 0
    prompt = [("prefill", slice(0, cut))] * bool(cut) + [("prefill", slice(cut, case.prompt))]
    calls = [*prompt, ("decode", slice(case.prompt, case.prompt + 1))]
    for method, tokens in (*calls, *_decoded(run, case.prompt + 1, case.prompt + case.steps)):
        got = _run(layer, method, inputs, tokens)
        seen = slice(max(first, tokens.start) - first, max(tokens.stop - first, 0))
        run.within(got[:, max(first, tokens.start) - tokens.start :], want[:, seen], bound[:, seen], gate=False)


def _across_temperatures(supports: Supports, profile: Profile) -> list[LayerCase]:
    """Tokens decoded on both sides of a position from which queries have another temperature, where the subject has one."""
    if not supports.llama_4_scaling:
        return []
    start = LLAMA_4_SCALING.original_max_position_embeddings - 6
    return [
        fitted(replace(case, llama_4_scaling=True, start=start, prompt=4, steps=4), supports)
        for case in rotating_layer(supports, profile)
    ]


@law(
    needs=LAYER,
    cases=narrowed(layer_cases, min_steps=2, max_steps=8),
    missing=_needs_several,
    cost=2,
    first=_across_temperatures,
)
def test_layer_decodes_several_tokens_at_once(run: Run, case: LayerCase) -> None:
    """Decoding up to eight tokens in one call, as for MTP, is causal among them, aligned to the end of the cache."""
    inputs = case.build()
    want, bound = _expected(run, inputs)
    run.meaningful(want, bound)
    layer = made_layer(run, inputs)
    calls = [_calls(case)[0], *_decoded(run, case.prompt, case.prompt + case.steps)]
    _run(layer, "prefill", inputs, calls[0][1])
    with stage_named(run, inputs, calls):
        for method, tokens in calls[1:]:
            got = _run(layer, method, inputs, tokens)
            run.within(got, want[:, tokens], bound[:, tokens], gate=False)


def _decoded(run: Run, start: int, end: int) -> Calls:
    """Tokens of as few calls of decode as the subject allows."""
    most = run.supports.layer_max_decode or end - start
    return [("decode", slice(t, min(t + most, end))) for t in range(start, end, most)]


@law(needs=LAYER, cases=narrowed(layer_cases, min_prompt=2), missing=_needs_chunks, cost=2)
def test_layer_prefill_in_chunks(run: Run, case: LayerCase) -> None:
    """A prompt that comes in two calls of prefill, and then decoded tokens: what the second sees includes the first."""
    inputs = case.build()
    want, bound = _expected(run, inputs)
    run.meaningful(want, bound)
    layer = made_layer(run, inputs)
    cut = 1 + case.seed % (case.prompt - 1)
    chunks = [("prefill", slice(0, cut)), ("prefill", slice(cut, case.prompt)), *_calls(case)[1:]]
    with stage_named(run, inputs, chunks):
        for method, tokens in chunks:
            got = _run(layer, method, inputs, tokens)
            run.within(got, want[:, tokens], bound[:, tokens], gate=False)


@law(needs=LAYER, cases=narrowed(layer_cases, min_prompt=2, max_steps=0), missing=_needs_cache, cost=2)
def test_prefill_equals_token_by_token_decode(run: Run, case: LayerCase) -> None:
    """One prefill gives what decoding the same tokens one by one gives."""
    inputs = case.build()
    _, bound = _expected(run, inputs)
    whole = _run(made_layer(run, inputs), "prefill", inputs, np.s_[:])
    layer = made_layer(run, inputs)
    for t in range(case.prompt):
        one = slice(t, t + 1)
        got = _run(layer, "prefill" if t == 0 else "decode", inputs, one)
        run.same_function(got, whole[:, one], bound[:, one], f"token {t}: decode differs from prefill")


def _rotary_layers(supports: Supports, profile: Profile) -> SearchStrategy[LayerCase]:
    """Layers with rotary embedding, and without a temperature that depends on each position."""
    rotary = replace(supports, rope_optional=False, llama_4_scaling=False)
    cases: SearchStrategy[LayerCase] = layer_cases(rotary, profile, min_prompt=2)
    return cases


def _needs_positions(supports: Supports) -> str:
    return "" if supports.rope_layouts else "its layers have no rotary embedding"


@law(needs=LAYER, cases=_rotary_layers, missing=_needs_positions, cost=2)
def test_layer_depends_on_relative_positions_only(run: Run, case: LayerCase) -> None:
    """All positions moved by as much, of a prompt and of what is decoded after it, outputs stay."""
    inputs = case.build()
    if inputs.config.rope is None or inputs.config.llama_4_scaling is not None:
        run.trivial("nothing depends on positions, or a temperature depends on each")
    middle = int(inputs.positions.mean())
    most = run.supports.layer_max_positions
    last = 2 * middle if most is None else most - 1 - (int(inputs.positions.max()) - middle)
    later = [edge for edge in EDGES if edge > middle and (most is None or edge <= last)] or [last]
    if later == [middle]:
        run.trivial("no later position is left")
    edge = later[case.seed % len(later)]
    moved = replace(inputs, positions=inputs.positions + edge - middle)
    want, bound = _expected(run, inputs)
    _, moved_bound = _expected(run, moved)
    run.meaningful(want, bound)
    both = bound.plus("the same at moved positions", moved_bound.total)
    layers = made_layer(run, inputs), made_layer(run, moved)
    for method, tokens in _calls(case):
        here, there = (_run(layer, method, each, tokens) for layer, each in zip(layers, (inputs, moved), strict=True))
        run.require(not np.isnan(here.value).any(), f"{method} output has NaN")
        run.within(there, here.value, both[:, tokens], gate=False)


@law(needs=LAYER, cases=narrowed(layer_cases, min_prompt=2, max_steps=0))
def test_future_tokens_are_ignored(run: Run, case: LayerCase) -> None:
    """Changing the last token of a prompt changes no bit of the tokens before it."""
    inputs = case.build()
    changed = inputs.hidden.copy()
    changed[:, -1] = -2 * changed[:, -1]
    want = _run(made_layer(run, inputs), "prefill", inputs, np.s_[:])
    got = _run(made_layer(run, inputs), "prefill", replace(inputs, hidden=changed), np.s_[:])
    run.same_bits(got[:, :-1], want[:, :-1], "only the last token, which these do not see, was changed")


@law(needs=LAYER, cases=narrowed(layer_cases, min_steps=1), missing=_needs_cache)
def test_reset_empties_the_cache(run: Run, case: LayerCase) -> None:
    """After reset, a layer that held a longer sequence, and fewer of them, gives the same bits as a new one."""
    inputs = case.build()
    fresh = _run(made_layer(run, inputs), "prefill", inputs, np.s_[: case.prompt])
    layer = made_layer(run, inputs)
    layer.run("prefill", inputs.hidden[:1], inputs.positions[:1])
    layer.reset()
    _run(layer, "prefill", inputs, np.s_[:])
    layer.reset()
    again = _run(layer, "prefill", inputs, np.s_[: case.prompt])
    run.same_bits(again, fresh, "the layer was used before and reset")


def _cache_bytes(run: Run, case: LayerCase, tokens: int) -> tuple[int, str]:
    """Bytes of the cache of so many tokens a sequence, and how they come about."""
    page = run.supports.cache_page
    rounded = -(-tokens // page) * page
    width = _cached_width(run, case)
    formula = f"{case.batch} sequences × {rounded} tokens × {width} × {format_of(case.dtype).itemsize} B"
    return case.batch * rounded * _row_bytes(run, case), formula


def _cached_width(run: Run, case: LayerCase) -> int:
    """Numbers of a token: its latent and k_pe, or keys and values of all heads, or none."""
    config = case.config
    expanded = config.num_heads * (config.qk_head_dim + config.v_head_dim)
    return {"latent": config.cache_dim, "expanded": expanded, "none": 0}[run.supports.layer_cache]


def _row_bytes(run: Run, case: LayerCase) -> int:
    return _cached_width(run, case) * format_of(case.dtype).itemsize


@law(needs=LAYER, cases=narrowed(layer_cases, min_steps=1), missing=_needs_cache)
def test_cache_bytes_are_exact(run: Run, case: LayerCase) -> None:
    """The cache holds kv_lora_rank + qk_rope_head_dim numbers per token, or the declared expanded ones, and nothing else."""
    inputs = case.build()

    def require(layer: LayerDriver, tokens: int) -> None:
        want, formula = _cache_bytes(run, case, tokens)
        got = layer.cache_bytes()
        run.require(got == want, f"cache_bytes after {tokens} tokens: got {got}, want {want} = {formula}")

    layer = made_layer(run, inputs)
    require(layer, 0)
    _run(layer, "prefill", inputs, np.s_[: case.prompt])
    require(layer, case.prompt)
    for t in range(case.prompt, case.prompt + case.steps):
        _run(layer, "decode", inputs, slice(t, t + 1))
        require(layer, t + 1)
    layer.reset()
    require(layer, 0)


@law(needs=LAYER, cases=narrowed(layer_cases, min_steps=1, max_steps=1), cost=3)
def test_layer_allocates_only_its_cache(run: Run, case: LayerCase) -> None:
    """From call to call a layer keeps no more of torch's memory, the only one seen, than the rows of its cache take.

    Measured when it is used again after reset: tables and workspaces that are made once exist then. What a layer keeps over
    a reset, and does not grow, counts as preallocated.
    """
    inputs = case.build()
    layer = made_layer(run, inputs)
    calls = _calls(case)
    sizes = [_cache_bytes(run, case, tokens.stop) for _, tokens in calls]
    prompt = case.batch * case.prompt * _row_bytes(run, case)
    excess = there(_excess, layer, inputs.hidden, inputs.positions, calls, [want for want, _ in sizes], prompt)
    if excess is not None:
        number, event, kept, allowed = excess
        want, formula = sizes[number]
        raise Violation(
            f"since its {event} a layer of {calls[number][1].stop} tokens keeps {kept} B more, "
            f"want at most {allowed}; the cache takes {want} = {formula}"
        )


def _excess(
    layer: LayerDriver,
    hidden: Array,
    positions: IntArray,
    calls: Calls,
    sizes: list[int],
    prompt: int,
) -> tuple[int, str, int, int] | None:
    """The first call after which a layer that was used before and reset keeps more than its cache takes; None where none is.

    Runs beside the layer, whose allocations it counts.

    Args:
        sizes: bytes of the cache after each call.
        prompt: bytes of the rows of the prompt alone.

    Returns:
        The number of the call, what more is kept since ("reset" or "prefill"), how many bytes that is, and how many it may be.
    """
    memory = Allocations()

    def called(method: str, tokens: slice) -> None:
        with memory:
            layer.run(method, hidden[:, tokens], positions[:, tokens])

    for method, tokens in calls:
        called(method, tokens)
    layer.reset()
    since = [("reset", memory.live, 0)]
    for number, (method, tokens) in enumerate(calls):
        called(method, tokens)
        for event, before, counted in since:
            if memory.exceeds(before + sizes[number] - counted):
                return number, event, memory.live - before, sizes[number] - counted
        if method == "prefill":
            since.append(("prefill", memory.live, prompt))
    return None


def _calls(case: LayerCase) -> Calls:
    """The prompt, and the tokens after it one by one."""
    steps = [("decode", slice(t, t + 1)) for t in range(case.prompt, case.prompt + case.steps)]
    return [("prefill", slice(0, case.prompt)), *steps]


def _with_other_options(case: LayerCase, supports: Supports) -> LayerCase:
    """Of equal shapes, with other weights, another rotary embedding and another eps, as far as the subject has them."""
    other = replace(case, seed=case.seed + 2, theta=case.theta / 2)
    if supports.latent_norm_eps is None:
        other = replace(other, latent_norm_eps=0.1)
    if supports.yarn and case.layout != "none" and case.longrope == "none":
        other = replace(other, yarn="deepseek-v3" if case.yarn == "none" else "none")
    made: LayerCase = fitted(other, supports)
    return made


@law(
    needs=LAYER,
    cases=narrowed(layer_cases, min_steps=1, max_steps=1),
    cost=2,
    first=lambda supports, profile: [
        replace(case, steps=min(case.steps, 1)) for case in rotating_layer(supports, profile)
    ],
)
def test_layers_are_independent(run: Run, case: LayerCase) -> None:
    """Layers that a subject makes of equal shapes each have their own weights, options and cache, used in turn."""
    cases = [case, _with_other_options(case, run.supports), replace(case, seed=case.seed + 1)]
    inputs = [each.build() for each in cases]
    expected = [_expected(run, each) for each in inputs]
    layers = [made_layer(run, each) for each in inputs]
    for method, tokens in _calls(case):
        for layer, each, (want, bound) in zip(layers, inputs, expected, strict=True):
            run.within(_run(layer, method, each, tokens), want[:, tokens], bound[:, tokens], gate=False)


@law(needs=LAYER, cases=layer_cases)
def test_layer_does_not_modify_its_inputs(run: Run, case: LayerCase) -> None:
    """Neither weights nor hidden states change in a prefill."""
    inputs = case.build()
    layer = made_layer(run, inputs)
    tensors = layer.weights | {"hidden": run.driver.tensor(inputs.hidden)}
    before = {name: tensor_bits(x) for name, x in tensors.items()}
    positions = run.driver.tensor(inputs.positions.astype(float)).long()
    layer.call("prefill", tensors["hidden"], positions)
    for name, x in tensors.items():
        changed = int((tensor_bits(x) != before[name]).sum())
        run.require(changed == 0, f"prefill changed {changed} of {x.numel()} elements of {name}")


@law(needs=LAYER, cases=narrowed(layer_cases, min_steps=1), cost=2)
def test_layer_output_is_not_aliased(run: Run, case: LayerCase) -> None:
    """What a call returned shares no memory with hidden states, and stays as it is when the layer is called again."""
    inputs = case.build()
    layer = made_layer(run, inputs)
    kept: list[tuple[str, Tensor, IntArray]] = []
    for method, tokens in [*_calls(case), *_calls(case)]:
        if method == "prefill" and kept:
            layer.reset()
        hidden = run.driver.tensor(inputs.hidden[:, tokens])
        at = run.driver.integers(inputs.positions[:, tokens], torch.int64)
        out = layer.call(method, hidden, at)
        run.driver.result(out, f"{method} output", hidden.shape)
        run.require(not share_memory(out, hidden), f"the output of {method} shares memory with hidden")
        for earlier, x, bits in kept:
            changed = int((tensor_bits(x) != bits).sum())
            run.require(changed == 0, f"{method} changed {changed} of {x.numel()} elements that {earlier} had returned")
        kept.append((method, out, tensor_bits(out)))


@law(needs=LAYER, cases=narrowed(layer_cases, max_steps=0), cost=2)
def test_layer_reads_its_tensors_anew(run: Run, case: LayerCase) -> None:
    """Other hidden states and positions in the same tensors, written as kernels write, give what they should."""
    first, other = case.build(), replace(case, seed=case.seed + 1).build()
    spread: IntArray = first.positions + np.arange(first.positions.shape[-1])  # a common shift would change nothing
    if spread.max() >= (run.supports.layer_max_positions or np.inf):
        spread = first.positions[:, ::-1]
    layer = made_layer(run, first)
    tensors = _tokens(run, other)
    for inputs in (replace(first, hidden=other.hidden, positions=spread), first):
        overwrite(tensors, _tokens(run, inputs))
        out = layer.call("prefill", tensors["hidden"], tensors["positions"])
        got = run.driver.result(out, "prefill output", inputs.hidden.shape)
        run.within(got, *_expected(run, inputs))
        layer.reset()


def _tokens(run: Run, inputs: LayerInputs) -> Tensors:
    """Hidden states and positions as tensors."""
    positions = run.driver.integers(inputs.positions, torch.int64)
    return {"hidden": run.driver.tensor(inputs.hidden), "positions": positions}
