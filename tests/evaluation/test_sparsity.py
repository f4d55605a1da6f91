"""Zeros behind relu are counted over all tokens of a text, layer by layer, and shown by ``minopt inspect``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minopt import DEMO, trace
from minopt.cli import main
from minopt.evaluation.sparsity import zeros_by_layer
from tests.conftest import build_ours, build_reference


@pytest.mark.parametrize("kind_of", ["125m", "350m"])
def test_each_window_of_a_text_counts(kind_of: str) -> None:
    model = build_ours(build_reference(kind_of))
    ids, expected = torch.randint(3, 96, (150,), generator=torch.Generator().manual_seed(0)), torch.zeros(3)
    for window in ids.split(64):  # the model's positions
        seen = trace(model, window[None], names=["layers.*.fc1.output"]).values
        expected += torch.stack([(seen[f"layers.{i}.fc1.output"] <= 0).sum() for i in range(3)])
    found = zeros_by_layer(model, ids.tolist())
    torch.testing.assert_close(torch.tensor(found), expected / (150 * 64))
    assert len(set(found)) == 3
    assert not any(layer.get_submodule("fc2")._forward_pre_hooks for layer in model.layers)


def test_inspect_shows_them_and_refuses_models_without(
    write_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (text := tmp_path / "text.txt").write_text("It was a dark and stormy night; the rain fell in torrents.")
    assert main(["inspect", str(DEMO), "--sparsity", str(text), "--json"]) == 0
    shares = json.loads(capsys.readouterr().out)["sparsity"]
    assert all(0.5 < share < 1 for share in shares)
    assert main(["inspect", str(DEMO), "--sparsity", str(text)]) == 0
    expected = ["layer zeros in fc2", *(f"{i} {share:.1%}" for i, share in enumerate(shares)),
                f"mean {sum(shares) / 4:.1%}"]  # fmt: skip
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[-6:]] == expected
    gelu, bare = write_checkpoint("galactica", "gelu"), write_checkpoint("125m")
    capsys.readouterr()
    for model, file, said in (
        (gelu, text, f"expected a model with relu, got gelu, behind which nothing is exactly zero ({gelu}). Leave it "
                     "out."),
        (bare, text, f"expected a model with a tokenizer, it has none ({bare}). Put its files beside the weights."),
        (bare, tmp_path / "no", "expected "),
    ):  # fmt: skip
        assert main(["inspect", str(model), "--sparsity", str(file)]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n"), err.startswith(f"minopt: error: --sparsity: {said}")) == ("", 1, True), err
