"""Draws what a token costs, from results of bench_inference.py: a row for each, a bar for each library and precision.

    python benchmarks/plot_inference.py benchmarks/results/inference_*.json --output FILE.png

Needs matplotlib. Drawn to be read at a width of 800 pixels.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

PANELS = {"decode1": "one text: ms a token", "decode8": "8 texts with 128 tokens each: ms a step"}
PRECISIONS = ("float32", "bfloat16", "int8")
# What a variant is called here, and its colour.
BARS = {
    "exported": ("minopt, exported", "#0b3c5d"),
    "minopt": ("minopt", "#1f77b4"),
    "ctranslate2": ("CTranslate2", "#f2a541"),
    "transformers": ("transformers", "#b8b8b8"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True, help="the picture")
    args = parser.parse_args(arguments)
    draw([json.loads(path.read_text()) for path in args.results]).savefig(args.output, dpi=200)
    print(f"wrote {args.output}")


def draw(results: Sequence[Mapping[str, Any]]) -> Figure:
    """A figure with a row for each result, and in it a panel for each group of ``PANELS``."""
    figure = Figure(figsize=(8, 0.7 + 2.8 * len(results)), layout="constrained")
    for row, result in zip(figure.subfigures(len(results), 1, squeeze=False)[:, 0], results, strict=True):
        for axes, group in zip(row.subplots(1, len(PANELS)), PANELS, strict=True):
            cases = {case["dtype"]: case["variants"] for case in result["cases"] if case["group"] == group}
            draw_panel(axes, cases)
            axes.set_title(PANELS[group], loc="left", fontsize=11, pad=12)
        row.supxlabel(
            f"opt-125m size, {result['threads']} threads, {result['device'].split(' (')[0]}, torch {result['torch']}",
            fontsize=8, color="#555555",
        )  # fmt: skip
    bars = {bar.get_label(): bar for row in figure.subfigs for axes in row.axes for bar in axes.containers}
    order = [name for name, _ in BARS.values() if name in bars]
    figure.legend([bars[name] for name in order], order, loc="outside upper center", ncols=len(order), frameon=False)
    return figure


def draw_panel(axes: Axes, cases: Mapping[str, Mapping[str, Any]]) -> None:
    """Bars of one group, those of a precision side by side."""
    precisions = [precision for precision in PRECISIONS if precision in cases]
    middles, place = [], 0.0
    for precision in precisions:
        names = [name for name in BARS if name in cases[precision]]
        middles.append(place + (len(names) - 1) / 2)
        for name in names:
            milliseconds = cases[precision][name]["median_ms"]
            bar = axes.bar(place, milliseconds, 0.92, color=BARS[name][1], label=BARS[name][0])
            axes.bar_label(bar, [f"{milliseconds:.1f}"], padding=2, fontsize=9.5)
            place += 1
        place += 0.8  # between precisions
    axes.set_xticks(middles, precisions, fontsize=11)
    axes.tick_params(axis="x", length=0)
    axes.set_yticks([])  # the bars carry their numbers
    axes.spines[["top", "right", "left"]].set_visible(False)


if __name__ == "__main__":
    main()
