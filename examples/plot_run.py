"""Draws how runs of `minopt finetune` went: loss, learning rate, and what evaluations found.

    python examples/plot_run.py RUN [RUN ...] [--output FILE.png]

A RUN is the --output_dir of one. Curves of several runs share each axes, to compare them. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# What metrics.jsonl calls it, its title here, and what its axis counts. What no run has gets no axes.
PANELS = {
    "loss": ("training loss", "nats per token"),
    "learning_rate": ("learning rate", "per step"),
    "eval_loss": ("dev loss", "nats per token"),
    "eval_exact_match": ("dev exact match", "% of examples"),
    "eval_f1": ("dev F1", "%"),
    "eval_rouge_1": ("dev ROUGE-1", "0 to 1"),
    "eval_rouge_2": ("dev ROUGE-2", "0 to 1"),
    "eval_rouge_l": ("dev ROUGE-L", "0 to 1"),
}
MARKED = 60  # the most points that are drawn as such; a single one would be no line


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder that holds a metrics.jsonl")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the picture (curves.png in the first RUN)")
    args = parser.parse_args(arguments)
    names = [run.resolve().name for run in args.runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in args.runs]
    output = args.output or args.runs[0] / "curves.png"
    figure = draw({name: read_metrics(run) for name, run in zip(names, args.runs, strict=True)})
    try:
        figure.savefig(output, dpi=150)
    except (OSError, ValueError) as error:  # the latter of an ending that matplotlib does not know
        raise SystemExit(f"--output: {output} cannot be written ({error}). Name another file.") from None
    print(f"wrote {output}")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, but for a last one that was cut off, as by a kill."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    if not records:
        raise SystemExit(f"{path}: expected the metrics of a run, got none. Name the --output_dir of one.")
    return records


def draw(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """A figure with an axes for each metric that any run has, and a curve for each run."""
    panels = [key for key in PANELS if any(key in record for records in runs.values() for record in records)]
    figure = Figure(figsize=(8, 1 + 1.9 * len(panels)), layout="constrained")
    column = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for key, axes in zip(panels, column, strict=True):
        title, unit = PANELS[key]
        counts = {r["eval_examples"] for records in runs.values() for r in records if key in r and "eval_examples" in r}
        of = f", {' or '.join(f'{count:,.0f}' for count in sorted(counts))} examples" if counts else ""
        axes.set_title(f"{title}{of}", loc="left", fontsize="medium")
        axes.set_ylabel(unit)
        axes.yaxis.set_major_formatter("{x:.4g}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        for number, records in enumerate(runs.values()):
            # A step that was evaluated again after a resumption counts once; null is a gap in the curve.
            points = {r["step"]: math.nan if r[key] is None else r[key] for r in records if key in r}
            marker = "o" if len(points) <= MARKED else ""
            axes.plot(list(points), list(points.values()), f"C{number}", marker=marker, markersize=3, linewidth=1.3,
                      clip_on=False, zorder=3)  # fmt: skip
        if not key.endswith("loss"):
            zeros = all(not r[key] for records in runs.values() for r in records if key in r)
            axes.set_ylim(0, 1 if zeros else None)
    column[-1].set_xlabel("step")
    column[-1].set_xlim(left=0)
    column[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(column[0].get_lines(), list(runs), loc="outside upper right", ncols=3, frameon=False)
    return figure


if __name__ == "__main__":
    main()
