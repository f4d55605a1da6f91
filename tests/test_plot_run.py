"""The script that draws runs: each metric that there is, a curve for each run, one clear line for what is missing."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
from matplotlib.image import imread

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "plot_run.py"
SPEC = importlib.util.spec_from_file_location("plot_run", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
plot_run = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(plot_run)

LOSSES: list[dict[str, Any]] = [
    {"step": 10, "loss": 5.5, "learning_rate": 3e-5, "grad_norm": 1.0},
    {"step": 20, "loss": None, "learning_rate": 2e-5, "grad_norm": None},
    {"step": 30, "loss": 4.5, "learning_rate": 1e-5, "grad_norm": 1.0},
]
ANSWERS = [
    {"step": 20, "eval_loss": 9.0, "eval_perplexity": 9.0, "eval_exact_match": 10.0, "eval_f1": 20.0},
    {"step": 20, "eval_loss": 5.0, "eval_perplexity": 9.0, "eval_exact_match": 30.0, "eval_f1": 40.0},
]
QUESTIONS = [{"step": 30, "eval_loss": 4.0, "eval_examples": 2.0, "eval_rouge_l": 0.25}]


def write(folder: Path, records: list[dict[str, Any]], tail: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return folder


def curves(figure: Any) -> dict[str, list[list[tuple[int, float]]]]:
    """What is drawn under each title, a list of points a run; a gap is a NaN."""
    return {axes.get_title(loc="left"): [[*zip(line.get_xdata(), line.get_ydata(), strict=True)]
            for line in axes.get_lines()] for axes in figure.axes}  # fmt: skip


def test_each_metric_that_any_run_has_is_drawn_for_each_that_has_it() -> None:
    figure = plot_run.draw({"answers": LOSSES + ANSWERS, "questions": LOSSES[:1] + QUESTIONS})
    drawn = curves(figure)
    assert list(drawn) == ["training loss", "learning rate", "dev loss, 2 examples",
                           "dev exact match", "dev F1", "dev ROUGE-L, 2 examples"]  # fmt: skip
    (first, gap, last), other = drawn["training loss"]
    assert (first, last, other) == ((10, 5.5), (30, 4.5), [(10, 5.5)])
    assert math.isnan(gap[1])
    assert drawn["learning rate"][0] == [(10, 3e-5), (20, 2e-5), (30, 1e-5)]
    assert drawn["dev loss, 2 examples"] == [[(20, 5.0)], [(30, 4.0)]]  # the later of two evaluations of a step
    assert drawn["dev exact match"] == [[(20, 30.0)], []]
    assert drawn["dev F1"] == [[(20, 40.0)], []]
    assert drawn["dev ROUGE-L, 2 examples"] == [[], [(30, 0.25)]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["answers", "questions"]
    first_color, other_color = (line.get_color() for line in figure.axes[0].get_lines())
    assert first_color != other_color
    for axes in figure.axes:
        assert [line.get_color() for line in axes.get_lines()] == [first_color, other_color]
    assert {axes.get_xlim() for axes in figure.axes} == {figure.axes[0].get_xlim()}


def test_axes_have_labels_and_single_points_and_zeros_are_seen() -> None:
    zeros = [{"step": step, "eval_loss": 9.0, "eval_f1": 0.0, "eval_examples": 200.0} for step in (10, 20)]
    many = [{"step": step, "loss": 1.0, "learning_rate": 1e-5} for step in range(500)]
    figure = plot_run.draw({"zeros": [*LOSSES, *zeros], "one": LOSSES[:1], "many": many})
    assert all(axes.get_ylabel() for axes in figure.axes)
    assert figure.axes[-1].get_xlabel() == "step"
    assert list(curves(figure))[2:] == ["dev loss, 200 examples", "dev F1, 200 examples"]
    assert figure.axes[3].get_ylim() == (0, 1)
    assert not any(line.get_clip_on() for axes in figure.axes for line in axes.get_lines())  # 0 lies on the edge
    assert [line.get_marker() for line in figure.axes[0].get_lines()][1:] == ["o", ""]


@pytest.mark.parametrize(
    ("records", "tail"),
    [(LOSSES[1:2], ""), (ANSWERS, ""), (LOSSES + ANSWERS, '{"step": 40, "lo')],
    ids=["null alone", "evaluations alone", "cut off"],
)
def test_a_run_becomes_a_picture_beside_its_metrics(
    records: list[dict[str, Any]], tail: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write(tmp_path / "run", records, tail)
    plot_run.main([str(run)])
    assert capsys.readouterr().out == f"wrote {run / 'curves.png'}\n"
    picture = imread(run / "curves.png")
    assert picture.shape[1] == 1200
    assert picture.std() > 0.01  # not a blank sheet


def test_runs_are_told_apart_by_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/run", "b/run", "b/other"):
        write(Path(name), LOSSES)
    drawn = []
    draw = plot_run.draw
    monkeypatch.setattr(plot_run, "draw", lambda runs: (drawn.append(list(runs)), draw(runs))[1])
    plot_run.main(["a/run", "b/other", "--output", "both.png"])
    plot_run.main(["a/run", "b/run"])
    assert drawn == [["run", "other"], ["a/run", "b/run"]]
    assert [str(path) for path in sorted(Path().rglob("*.png"))] == ["a/run/curves.png", "both.png"]


def test_what_is_missing_is_one_line(tmp_path: Path) -> None:
    run, empty = write(tmp_path / "run", LOSSES), write(tmp_path / "empty", [])
    result = subprocess.run([sys.executable, SCRIPT, run, tmp_path], capture_output=True, text=True, check=False)
    line = "metrics.jsonl: expected the metrics of a run, got none. Name the --output_dir of one."
    assert (result.returncode, result.stdout, result.stderr) == (1, "", f"{tmp_path}/{line}\n")
    with pytest.raises(SystemExit, match=f"^{empty}/{line}$"):
        plot_run.main([str(run), str(empty)])
    for output in (tmp_path / "nowhere" / "x.png", tmp_path / "x.unknown"):
        with pytest.raises(SystemExit, match=rf"--output: {output} cannot be written \(.*\). Name another file."):
            plot_run.main([str(run), "--output", str(output)])
