"""Training in one process: against a plain loop of transformers and torch, in all precisions, and what a run leaves."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import minopt
from minopt import OPT
from minopt.evaluation.answers import EvaluationResult
from minopt.training import method, trainer
from minopt.training.batches import microbatches
from minopt.training.config import TrainingConfig
from minopt.training.data import Example
from minopt.training.trainer import train
from tests.training.small import (
    break_gradients,
    distance,
    examples,
    is_as_built,
    lines,
    losses,
    model_of,
    reference_of,
    rows_of,
    settings,
    tokenizer,
    watched,
)


def plain_losses(
    reference: Any, data: list[Example], config: TrainingConfig, *, on_prompts: bool = False, times: float = 1.0
) -> list[float]:
    """Losses of a loop as anyone writes it: padded batches, labels of -100, AdamW, a schedule of transformers'."""
    rows, total = rows_of(data), config.max_steps
    decayed = [p for n, p in reference.named_parameters() if not n.endswith("bias") and "layer_norm" not in n]
    others = [p for n, p in reference.named_parameters() if n.endswith("bias") or "layer_norm" in n]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate * times, betas=(0.9, 0.95), eps=1e-8)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, int(config.warmup_ratio * total), total)
    size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    order = microbatches([len(ids) for ids, _ in rows], size, 1, config.seed, grouped=False)
    found = []
    for (indices,) in islice(order, total):
        batch = [rows[i] for i in indices]
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [1] * (width - len(ids)) for ids, _ in batch])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch])
        labels = ids.masked_fill(mask == 0, -100)
        if not on_prompts:
            for row, (_, start) in zip(labels, batch, strict=True):
                row[:start] = -100
        logits = reference(ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=config.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reference.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        found.append(loss.item())
    return found


RECIPE = {"max_steps": 50, "learning_rate": 3e-3, "weight_decay": 0.1, "warmup_ratio": 0.1, "adam_beta2": 0.95}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1, "batching": "padded"},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_learning_is_that_of_transformers_with_adamw(kind: str, way: str, tmp_path: Path) -> None:
    config, data = settings(tmp_path / "run", **(RECIPE | WAYS[way])), examples(23)
    train(model_of(kind), data, config, tokenizer=tokenizer())
    ours = torch.tensor(losses(tmp_path / "run"))
    theirs = plain_losses(reference_of(kind, dropout=0.0).train(), data, config)
    assert ours.tolist() == pytest.approx(theirs, rel=1e-4)
    if kind == "125m" and way == "plain":  # the comparison can fail, and there is something to learn
        assert ours[-5:].mean() < 0.7 * ours[:5].mean()
        for change in ({"times": 1.1}, {"on_prompts": True}):
            other = torch.tensor(plain_losses(reference_of(dropout=0.0).train(), data, config, **change))
            assert (other / ours - 1).abs().max() > 1e-2, change


@pytest.mark.parametrize(("precision", "error"), [("fp16", 0.05), ("bf16", 0.2)])  # eight times the rounding
def test_sixteen_bits_learn_as_float32_does_on_weights_of_float32(precision: str, error: float, tmp_path: Path) -> None:
    seen, dtypes, linear = {}, set[torch.dtype](), F.linear

    def watch(*args: Any, **options: Any) -> Tensor:
        output = linear(*args, **options)
        dtypes.add(output.dtype)
        return output

    for name, changes in (("float32", {}), (precision, {precision: True})):
        model, config = model_of(), settings(tmp_path / name, max_steps=20, learning_rate=3e-3, **changes)
        with mock.patch.object(F, "linear", watch), watched() as seen[name]:
            assert train(model, examples(12), config, tokenizer=tokenizer()).skipped_steps == 0
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert dtypes == {torch.float32, torch.float16 if precision == "fp16" else torch.bfloat16}
    found, expected = losses(tmp_path / precision), losses(tmp_path / "float32")
    assert found == pytest.approx(expected, rel=0.05)
    assert found != expected
    assert found[-1] < 0.8 * found[0]
    # The scale of the losses is out of the gradients again before they are clipped.
    assert distance(seen[precision].gradients[0], seen["float32"].gradients[0]) < error
    assert {g.dtype for g in seen[precision].gradients[0]} == {torch.float32}


def test_nineteen_steps_in_a_row_whose_gradients_are_not_finite_are_skipped_twice_and_twenty_end_the_run(
    tmp_path: Path,
) -> None:
    model = model_of(dropout=0.1)
    with watched() as seen:
        break_gradients(model, lambda: seen.step not in (0, 20))
        config = settings(tmp_path / "run", max_steps=40, weight_decay=0.1)
        assert train(model, examples(12), config, tokenizer=tokenizer()).skipped_steps == 38
        changed = [not all(map(torch.equal, a, b)) for a, b in pairwise(seen.weights)]
        assert changed == [step == 20 for step in range(1, 40)]
        nulls = [line["step"] for line in lines(tmp_path / "run") if line["grad_norm"] is None]
        assert nulls == [step for step in range(1, 41) if step not in (1, 21)]
        config = settings(tmp_path / "other", max_steps=60, recompute=True)
        with pytest.raises(ValueError, match=r"^[^\n]*20 steps in a row were not finite.* Lower --learning_rate.*$"):
            train(model, examples(12), config, tokenizer=tokenizer())
    assert len(lines(tmp_path / "other")) == 40
    assert is_as_built(model)  # though the run has failed


@contextmanager
def kept_bytes(model: OPT) -> Iterator[dict[int, int]]:
    """Sizes of what is kept for backward passes, without parameters."""
    sizes: dict[int, int] = {}
    own = {p.data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            sizes[len(sizes)] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes


@pytest.mark.parametrize("changes", [{}, {"bf16": True}, {"batching": "padded"}], ids=["float32", "bf16", "padded"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputed_layers_keep_less_and_train_to_the_same_last_bit(
    dropout: float, changes: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    seen, kept = {}, {}
    for recompute in (False, True):
        model = model_of(kind, attention_dropout=dropout)
        config = settings(tmp_path / str(recompute), recompute=recompute, dropout=dropout, **changes)
        with watched() as seen[recompute], kept_bytes(model) as kept[recompute]:
            train(model, examples(12), config, tokenizer=tokenizer())
        assert is_as_built(model)
    for found, expected in zip(seen[True].gradients, seen[False].gradients, strict=True):
        assert all(map(torch.equal, found, expected))
    assert losses(tmp_path / "True") == losses(tmp_path / "False")
    inputs = 3 * 4 * 4 * 48 * 32 * 4  # of 3 layers, in 4 steps of 4 texts of at most 48 tokens, 32 numbers each
    assert sum(kept[True].values()) + inputs < 0.5 * sum(kept[False].values())


@pytest.mark.parametrize("changes", [{}, {"batching": "padded", "recompute": True}], ids=str)
def test_compiled_layers_give_the_same_losses(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, gradients too, but not turned into C++, which would take a minute."""
    model = model_of(num_hidden_layers=2)
    config = settings(tmp_path / "compiled", compile=True, **changes)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        train(model, examples(8), config, tokenizer=tokenizer())
    counters = torch._dynamo.utils.counters
    assert counters["aot_autograd"]["ok"] > 0
    assert not [reason for reason in counters["graph_break"] if "_attend_apart" not in reason]  # which is not traced
    assert is_as_built(model)
    train(model_of(num_hidden_layers=2), examples(8), settings(tmp_path / "plain", **changes), tokenizer=tokenizer())
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    torch._dynamo.reset()


def test_a_seed_decides_all_and_torchs_own_random_numbers_are_left_alone(tmp_path: Path) -> None:
    found = []
    for number, seed in enumerate((7, 7, 8)):
        model, config = model_of(attention_dropout=0.1), settings(tmp_path / str(number), seed=seed, dropout=0.1)
        torch.manual_seed(number)
        before = torch.get_rng_state()
        train(model, examples(4), config, tokenizer=tokenizer())  # all in each step, whatever the order
        assert torch.equal(torch.get_rng_state(), before)
        found.append((losses(tmp_path / str(number)), (tmp_path / str(number) / "model.safetensors").read_bytes()))
    assert found[0] == found[1] != found[2]


def test_dropout_is_the_models_own_unless_told_otherwise(tmp_path: Path) -> None:
    found = {}
    for name, own, given in (("own", 0.3, None), ("given", 0.0, 0.3), ("none", 0.3, 0.0), ("never", 0.0, None)):
        model = model_of(dropout=own)
        train(model, examples(8), settings(tmp_path / name, dropout=given), tokenizer=tokenizer())
        assert is_as_built(model)
        found[name] = losses(tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["dropout"] == own
    assert found["own"] == found["given"] != found["none"] == found["never"]


def test_a_run_leaves_a_model_that_opens_everywhere_and_files_that_tell_its_result(kind: str, tmp_path: Path) -> None:
    model, folder = model_of(kind), tmp_path / "run"
    config = settings(
        folder, max_steps=-1, num_train_epochs=2, do_eval=True, evaluation_strategy="steps", eval_steps=2,
        weight_decay=0.1, warmup_ratio=0.2, logging_steps=2,
    )  # fmt: skip
    options = {"tokenizer": tokenizer(), "eval_data": examples(5, seed=1)}
    result = train(model, examples(10), config, **options)
    ids = torch.tensor([[2, 9, 30, 41, 7], [2, 8, 8, 50, 60]])
    lm = minopt.load(folder, device="cpu", dtype="float32", optimize=False)
    reference = transformers.OPTForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(lm.model(ids), model(ids))
        torch.testing.assert_close(reference(ids).logits, model(ids), rtol=1e-5, atol=1e-5)
    assert lm.tokenizer is not None
    assert lm.tokenizer.encode("ab c") == tokenizer().encode("ab c")
    assert transformers.AutoTokenizer.from_pretrained(folder)("ab c")["input_ids"] == tokenizer().encode("ab c")

    records = lines(folder)
    steps = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "eval_loss" in r]
    assert [r["step"] for r in steps] == [r["step"] for r in evaluations] == [2, 4, 6]
    assert [r["epoch"] for r in steps] == pytest.approx([2 / 3, 4 / 3, 2], abs=1e-6)
    assert [r["learning_rate"] for r in steps] == pytest.approx([0.5e-3, 1e-3 * 3 / 4, 1e-3 / 4])
    assert set(steps[0]) == {"step", "epoch", "loss", "learning_rate", "grad_norm", "skipped_steps",
                             "tokens_per_second", "time"}  # fmt: skip
    assert (result.steps, result.skipped_steps, result.loss) == (6, 0, steps[-1]["loss"])
    assert result.output_dir == folder
    assert set(result.metrics) == {"loss", "perplexity", "examples", "exact_match", "f1"}
    assert {f"eval_{name}": value for name, value in result.metrics.items()}.items() <= evaluations[-1].items()
    assert json.loads((folder / "predictions.json").read_text()) == result.predictions
    assert set(result.predictions) == {f"q{i}" for i in range(5)}
    record = json.loads((folder / "run.json").read_text())
    assert (record["settings"], record["global_batch_size"]) == (config.to_dict(), 4)
    assert not list(folder.glob(".model*"))
    assert train(model_of(kind), examples(10), config, **options) == result  # a finished run says it again


def test_tokens_a_second_are_those_of_training_whatever_evaluation_and_saving_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that saving, evaluating and steps set on, each once."""
    clock, tokens = [0.0], []

    def ticking(call: Any, seconds: float) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            clock[0] += seconds
            result = call(*args, **options)
            if seconds == 1:
                tokens.append(args[0].tokens_seen)
            return result

        return wrapped

    monkeypatch.setattr(trainer.Run, "_step", ticking(trainer.Run._step, 1))
    monkeypatch.setattr(trainer.RunFolder, "save", ticking(trainer.RunFolder.save, 1000))
    better = (EvaluationResult({"loss": 1.0, "f1": float(n)}, {}) for n in range(9))
    monkeypatch.setattr(method, "evaluate", ticking(lambda *args, **options: next(better), 1000))
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: clock[0])
    config = settings(tmp_path / "run", evaluation_strategy="steps", eval_steps=1, save_steps=3)
    train(model_of(), examples(12), config, tokenizer=tokenizer(), eval_data=examples(2))
    assert [line["tokens_per_second"] for line in lines(tmp_path / "run") if "loss" in line] == pytest.approx(tokens)


def test_a_mean_that_is_written_is_over_all_tokens_since_the_one_before(tmp_path: Path) -> None:
    """Not over steps, whose numbers of tokens differ."""
    for every in (1, 3):
        config = settings(tmp_path / str(every), logging_steps=every, max_steps=6)
        train(model_of(), examples(9), config, tokenizer=tokenizer())
    rows = rows_of(examples(9))
    order = islice(microbatches([len(ids) for ids, _ in rows], 4, 1, 42, grouped=False), 6)
    counts = torch.tensor([float(sum(len(rows[i][0]) - rows[i][1] for i in indices)) for (indices,) in order])
    sums = torch.tensor(losses(tmp_path / "1")) * counts
    expected = [(sums[at : at + 3].sum() / counts[at : at + 3].sum()).item() for at in (0, 3)]
    assert losses(tmp_path / "3") == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("scores", "best"), [([10, 30, 20, 30, 15], 2), ([math.nan, 1, math.nan, 0.5, 0], 2), ([1, 2, 3, 4, 5], 5)]
)
def test_the_best_checkpoint_stays_and_best_is_written_on_improvement_alone(
    scores: list[float], best: int, tmp_path: Path
) -> None:
    left, folder = iter(scores), tmp_path / "run"

    def evaluate(*args: Any, **options: Any) -> EvaluationResult:
        return EvaluationResult({"loss": 1.0, "f1": next(left)}, {"q0": "a"})

    config = settings(folder, max_steps=5, evaluation_strategy="steps", eval_steps=1, keep_last=1, save_steps=1)
    with mock.patch.object(method, "evaluate", evaluate), watched() as seen:
        result = train(model_of(), examples(12), config, tokenizer=tokenizer(), eval_data=examples(2))
    found = {path.name for path in (folder / "checkpoints").glob("step-*")}
    assert found == {f"step-0000000{step}" for step in (best, 5)}
    model = minopt.load(folder / "best", device="cpu", dtype="float32").model
    assert all(map(torch.equal, model.parameters(), seen.weights[best - 1]))
    assert result.metrics["f1"] == scores[-1]  # of the last evaluation, as the folder's model is the last
    # Where the best model is the last, it takes no room of its own.
    files = [folder / "model.safetensors", folder / "best" / "model.safetensors"]
    assert files[0].samefile(files[1]) == (best == 5)


@pytest.mark.parametrize(("strategy", "at"), [("no", []), ("steps", [2, 4, 6]), ("epoch", [3, 6])])
@pytest.mark.parametrize("do_eval", [False, True])
def test_evaluation_comes_when_the_strategy_says_and_once_at_the_end(
    strategy: str, at: list[int], do_eval: bool, tmp_path: Path
) -> None:
    config = settings(tmp_path / "run", max_steps=7, evaluation_strategy=strategy, eval_steps=2, do_eval=do_eval)
    train(model_of(), examples(12), config, tokenizer=tokenizer(), eval_data=examples(2))
    assert [line["step"] for line in lines(tmp_path / "run") if "eval_loss" in line] == at + [7] * do_eval


def test_a_finished_run_that_keeps_no_checkpoint_is_its_model_and_not_begun_anew(tmp_path: Path) -> None:
    config = settings(tmp_path / "run", max_steps=3, save_steps=1, keep_last=0)
    train(model_of(), examples(4), config, tokenizer=tokenizer())
    assert not (tmp_path / "run" / "checkpoints").exists()
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    message = r"finished after step 3 and kept no checkpoint to go on from\. Name another"
    with pytest.raises(FileExistsError, match=message):
        train(model_of(), examples(4), config, tokenizer=tokenizer())
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    train(model_of(), examples(4), config.replace(resume="never"), tokenizer=tokenizer())
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_what_does_not_fit_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    model, data = model_of(), examples(4)
    config = settings(tmp_path / "run", max_steps=1, do_eval=True)
    for changes, eval_data, message in (
        ({"max_eval_samples": 2}, "a text", "--max_eval_samples: counts examples, and --dev_file is a text"),
        ({}, None, "--dev_file: expected one to evaluate on, got none"),
        ({}, [data[0], data[0]], "eval_data: expected a different id for each example, got some more than once"),
        ({"src_length": 60}, data, "expected at most 64 tokens together, the model's positions, got 76"),
    ):
        with pytest.raises(ValueError, match=message):
            train(model, data, config.replace(**changes), tokenizer=tokenizer(), eval_data=eval_data)
    with pytest.raises(ValueError, match="tokenizer: expected the model's, got None"):
        train(model, data, config, eval_data=data)
    with pytest.raises(ValueError, match=r"layerdrop: expected 0, got 0\.5"):
        train(model_of(layerdrop=0.5), data, config, tokenizer=tokenizer(), eval_data=data)
    model.layers[0].fc1 = torch.nn.Sequential(model.layers[0].fc1)  # as adapters do
    with pytest.raises(ValueError, match=r"expected an OPT's own parameters, these differ: layers\.0\.fc1"):
        train(model, data, config, tokenizer=tokenizer(), eval_data=data)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"recompute": True}, {"compile": True}, {"bf16": True}], ids=str)
def test_what_is_evaluated_has_nothing_of_training_and_the_fast_form_answers_as_the_plain_model(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, evaluate = [], method.evaluate

    def watch(model: OPT, *args: Any, **options: Any) -> Any:
        seen.append((any("forward" in vars(layer) for layer in model.layers), model.training, model.dtype))
        plain = OPT(model.config, dtype=model.dtype).eval()
        plain.load_state_dict(model.state_dict())
        found, expected = (evaluate(form, *args, **options) for form in (model, plain))
        assert found is not None
        assert expected is not None
        if model.dtype == torch.float32:
            assert found.predictions == expected.predictions
            assert found.metrics == pytest.approx(expected.metrics, rel=1e-5)
        return found

    monkeypatch.setattr(method, "evaluate", watch)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    config = settings(tmp_path / "run", max_steps=1, do_eval=True, **changes)
    train(model_of(), examples(4), config, tokenizer=tokenizer(), eval_data=examples(2))
    assert seen == [(False, False, torch.bfloat16 if "bf16" in changes else torch.float32)]


def test_an_earlier_checkpoint_of_the_run_itself_is_gone_on_from(tmp_path: Path) -> None:
    config = settings(tmp_path / "run", max_steps=6, save_steps=2, keep_last=3)
    train(model_of(), examples(8), config, tokenizer=tokenizer())
    expected = (tmp_path / "run" / "model.safetensors").read_bytes()
    for name in ("step-00000004", "step-00000006"):  # damaged
        (tmp_path / "run" / "checkpoints" / name / ".metadata").unlink()
    with pytest.raises(ValueError, match="Use another checkpoint"):
        train(model_of(), examples(8), config, tokenizer=tokenizer())
    again = config.replace(resume=str(tmp_path / "run" / "checkpoints" / "step-00000002"))
    (tmp_path / "run" / "model.safetensors").unlink()
    train(model_of(), examples(8), again, tokenizer=tokenizer())
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == expected
