"""The figures of the book: ``python docs/book/figures.py`` writes them into ``docs/book/figures/``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mla_spec import MLAConfig, Profile, RopeConfig
from mla_spec.bounds.attention import attention_with_bound
from mla_spec.front.cache_report import compared_sizes
from mla_spec.proof.emulated import EmulatedAttention
from mla_spec.reference.cache import latent_cache_size
from mla_spec.reference.formats import round_to
from mla_spec.reference.published import published_model
from mla_spec.reference.rope import rope_frequencies

FOLDER = Path(__file__).parent / "figures"
STYLE = {
    "svg.hashsalt": "mla-spec",
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
BLUE, ORANGE, GRAY = "#2563eb", "#d97706", "#6b7280"


def cache(axes: Axes) -> None:
    """Bytes per token of DeepSeek-V3 in bfloat16."""
    model, config = published_model("DeepSeek-V3"), MLAConfig.published("DeepSeek-V3")
    assert model.num_cached_layers is not None
    sizes = [latent_cache_size(config), *compared_sizes(model)]
    kilobytes = [size.bytes_per_token("bfloat16", model.num_cached_layers) / 1000 for size in sizes]
    colors = [BLUE] + [GRAY] * (len(sizes) - 1)
    bars = axes.barh([size.attention for size in sizes], kilobytes, color=colors)
    axes.bar_label(bars, [f"{size:,.0f} KB" for size in kilobytes], padding=4)
    axes.invert_yaxis()
    axes.set_xlim(0, 6000)
    axes.set_xlabel("KB per token, 61 layers, bfloat16")


def yarn(axes: Axes) -> None:
    """Frequencies of the 32 pairs of DeepSeek-V3."""
    rope = MLAConfig.published("DeepSeek-V3").rope
    assert rope is not None
    plain = rope_frequencies(RopeConfig(dim=rope.dim, theta=rope.theta))
    low, high = rope.yarn_correction_range()
    axes.axvspan(low, high, color=GRAY, alpha=0.15, lw=0)
    axes.semilogy(plain, "o", ms=4, color=GRAY, label="theta^(−2i/r)")
    axes.semilogy(rope_frequencies(rope), "o", ms=4, color=BLUE, label="with YaRN, factor 40")
    axes.text((low + high) / 2, 0.4, "blended", ha="center")
    axes.set_xlabel("pair i")
    axes.set_ylabel("radians per position")
    axes.legend(frameon=False, loc="lower left")


def bound(axes: Axes) -> None:
    """Errors of two kernels in bfloat16, one of which has lost the last of 256 keys."""
    rng = np.random.default_rng(1)
    q, k, v = (round_to(rng.standard_normal((n, 1, d)), "bfloat16") for n, d in ((2, 192), (256, 192), (256, 128)))
    profile, scale = Profile.default("bfloat16"), 192**-0.5
    exact = attention_with_bound(q, k, v, softmax_scale=scale, profile=profile, causal=False)
    order = np.argsort(exact.out_error.total.ravel())
    for name, keys, color in (("last key lost", 255, ORANGE), ("honest", 256, BLUE)):
        attention = EmulatedAttention(profile)
        seqlens = np.array([keys])
        out, _ = attention.attend(q[None], k[None], v[None], softmax_scale=scale, cache_seqlens=seqlens, causal=False)
        axes.plot(np.abs(out[0] - exact.out).ravel()[order], ".", ms=3, color=color, label=name)
    axes.plot(exact.out_error.total.ravel()[order], color="black", lw=1.5, label="bound")
    axes.set_yscale("log")
    axes.set_ylim(1e-6, 1e-1)
    axes.set_xlabel("elements of the output, by their bound")
    axes.set_ylabel("error")
    axes.legend(frameon=False, loc="lower right")


FIGURES: dict[str, Callable[[Axes], None]] = {"cache": cache, "yarn": yarn, "bound": bound}


def draw(name: str, folder: Path = FOLDER) -> Path:
    """Draw one figure into a folder; the same bytes each time with the same matplotlib."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 3 if name == "cache" else 3.6), layout="constrained")
        FIGURES[name](figure.add_subplot())
        path = folder / f"{name}.svg"
        figure.savefig(path, metadata={"Date": None, "Creator": None}, facecolor="white")
    return path


if __name__ == "__main__":
    for figure_name in FIGURES:
        print(draw(figure_name))
