"""Training in one process: against a plain loop of transformers and torch, in all precisions, and what a run leaves."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import random
import string
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import minopt
from minopt import OPT, Tokenizer
from minopt.training import trainer
from minopt.training.batches import Order
from minopt.training.config import TrainingConfig
from minopt.training.data import Example
from minopt.training.evaluation import EvaluationResult
from minopt.training.trainer import TrainResult, train
from tests.conftest import build_ours, build_reference

VOCAB, EOS = 104, 2  # a token a character of ASCII, four special ones, and four rows without a token


@functools.cache
def tokenizer() -> Tokenizer:
    """One with a token for each character, made from files as OPT's are."""
    with tempfile.TemporaryDirectory() as folder:
        tokens = ["<s>", "<pad>", "</s>", "<unk>", "Ġ", "Ċ", *(chr(i) for i in range(33, 127))]
        (Path(folder) / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        return Tokenizer.load(folder)


def text_of(draw: random.Random, least: int, most: int) -> str:
    return "".join(draw.choices(string.ascii_lowercase[:8] + " ", k=draw.randint(least, most))).strip() or "a"


def examples(count: int, seed: int = 0) -> list[Example]:
    """Pairs of many lengths."""
    draw = random.Random(seed)
    made = []
    for i in range(count):
        prompt, completion = text_of(draw, 2, 28), text_of(draw, 1, 12)
        made.append(Example(prompt, " " + completion, (completion,), f"q{i}"))
    return made


def reference_of(kind: str = "125m", **changes: Any) -> Any:
    """transformers' small model for that tokenizer."""
    return build_reference(kind, **({"vocab_size": VOCAB, "eos_token_id": EOS} | changes))


def model_of(kind: str = "125m", **changes: Any) -> OPT:
    return build_ours(reference_of(kind, **changes))


def settings(folder: Path, **changes: Any) -> TrainingConfig:
    """A short run in float32 without dropout, each step of which is written."""
    values: dict[str, Any] = {
        "output_dir": folder, "src_length": 32, "tgt_length": 16, "per_device_train_batch_size": 4, "max_steps": 4,
        "learning_rate": 1e-3, "dropout": 0.0, "logging_steps": 1, "device": "cpu",
    }  # fmt: skip
    return TrainingConfig(**(values | changes))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder) if "loss" in line]


def whole(tensor: Tensor) -> Tensor:
    """A copy of a tensor, of all its parts."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


@dataclass
class Seen:
    """What happens in a run, a value a step: gradients before clipping, weights and the scale of losses after it."""

    step: int = -1
    gradients: list[list[Tensor]] = field(default_factory=list)
    weights: list[list[Tensor]] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)


@contextmanager
def watched() -> Iterator[Seen]:
    """Looks on, and changes nothing."""
    seen, clip, take_step = Seen(), trainer.clip_gradients, trainer._Run._step

    def watch_clip(parameters: Any, max_norm: float) -> Tensor:
        parameters = list(parameters)
        seen.gradients.append([whole(p.grad) for p in parameters])
        return clip(parameters, max_norm)

    def watch_step(run: Any, order: Order, total: int) -> bool:
        seen.step = run.step
        stopped = take_step(run, order, total)
        seen.weights.append([whole(p) for p in run.module.parameters()])
        seen.scales.append(run.scaler.get_scale())
        return stopped

    clipping = mock.patch.object(trainer, "clip_gradients", watch_clip)
    with clipping, mock.patch.object(trainer._Run, "_step", watch_step):
        yield seen


def break_gradients(model: OPT, when: Callable[[], bool]) -> None:
    """Makes a NaN of the gradient of one token's vector, the bos', and of nothing else."""

    def spoil(gradient: Tensor) -> Tensor:
        if not when():
            return gradient
        gradient = gradient.clone()
        gradient[0, 0] = float("nan")
        return gradient

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(spoil)

    model.embed_tokens.register_forward_hook(watch)


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """How far apart two sets of gradients are, as a part of the norm of all."""
    apart = torch.stack([(f - e).norm() for f, e in zip(found, expected, strict=True)]).norm()
    return (apart / torch.stack([e.norm() for e in expected]).norm()).item()


def rows_of(data: list[Example]) -> list[tuple[list[int], int]]:
    """The ids of examples, and where their completions begin."""
    rows = []
    for example in data:
        prompt = tokenizer().encode(example.prompt)
        rows.append((prompt + tokenizer().encode(example.completion, add_bos=False) + [EOS], len(prompt)))
    return rows


def plain_losses(
    reference: Any, data: list[Example], config: TrainingConfig, *, on_prompts: bool = False, times: float = 1.0
) -> list[float]:
    """Losses of a loop as anyone writes it: padded batches, labels of -100, AdamW, a schedule of transformers'."""
    rows, total = rows_of(data), config.max_steps
    decayed = [p for n, p in reference.named_parameters() if not n.endswith("bias") and "layer_norm" not in n]
    others = [p for n, p in reference.named_parameters() if n.endswith("bias") or "layer_norm" in n]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate * times, betas=(0.9, 0.95), eps=1e-8)
    warmup = int(config.warmup_ratio * total)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, warmup, total)
    size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    order = Order(tuple(len(ids) for ids, _ in rows), size, config.seed, grouped=False)
    found = []
    for step in range(total):
        batch = [rows[i] for i in order.examples(step)]
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


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"label_smoothing": 0.1, "batching": "padded"},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    ],
    ids=["plain", "smoothed", "accumulated"],
)
def test_learning_is_that_of_transformers_with_adamw(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    config, data = settings(tmp_path / "run", **(RECIPE | changes)), examples(23)
    train(model_of(kind), data, config, tokenizer=tokenizer())
    reference = reference_of(kind, dropout=0.0)
    assert losses(tmp_path / "run") == pytest.approx(plain_losses(reference.train(), data, config), rel=1e-4)


def test_a_plain_loop_that_differs_in_rate_or_labels_parts_from_it(tmp_path: Path) -> None:
    """What shows that the comparison above can fail; it learns too."""
    config, data = settings(tmp_path / "run", **RECIPE), examples(23)
    train(model_of(), data, config, tokenizer=tokenizer())
    ours = torch.tensor(losses(tmp_path / "run"))
    assert ours[-5:].mean() < 0.7 * ours[:5].mean()
    for change in ({"times": 1.1}, {"on_prompts": True}):
        other = torch.tensor(plain_losses(reference_of(dropout=0.0).train(), data, config, **change))
        assert (other / ours - 1).abs().max() > 1e-2, change


@pytest.mark.parametrize("batching", ["packed", "grouped", "padded"])
def test_every_way_of_batching_gives_each_example_once_an_epoch(batching: str, tmp_path: Path) -> None:
    taken: list[int] = []
    collate = trainer.collate

    def watch(tokens: Any, indices: Any, *, packed: bool) -> Any:
        taken.extend(indices)
        return collate(tokens, indices, packed=packed)

    config = settings(tmp_path / "run", batching=batching, max_steps=-1, num_train_epochs=2, learning_rate=0.0)
    with mock.patch.object(trainer, "collate", watch):
        result = train(model_of(), examples(30), config, tokenizer=tokenizer())
    assert (result.steps, sorted(taken[:30]), sorted(taken[30:])) == (16, list(range(30)), list(range(30)))
    assert taken[:30] != taken[30:]


@pytest.mark.parametrize(("precision", "error"), [("fp16", 0.05), ("bf16", 0.2)])  # eight times the rounding
def test_sixteen_bits_learn_as_float32_does_on_weights_of_float32(precision: str, error: float, tmp_path: Path) -> None:
    data, seen, dtypes = examples(12), {}, set[torch.dtype]()
    linear = F.linear

    def watch(*args: Any, **options: Any) -> Tensor:
        output = linear(*args, **options)
        dtypes.add(output.dtype)
        return output

    for name, changes in (("float32", {}), (precision, {precision: True})):
        model = model_of()
        config = settings(tmp_path / name, max_steps=20, learning_rate=3e-3, **changes)
        with mock.patch.object(F, "linear", watch), watched() as seen[name]:
            result = train(model, data, config, tokenizer=tokenizer())
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert result.skipped_steps == 0
    assert dtypes == {torch.float32, torch.float16 if precision == "fp16" else torch.bfloat16}
    found, expected = losses(tmp_path / precision), losses(tmp_path / "float32")
    assert found == pytest.approx(expected, rel=0.05)
    assert found != expected
    assert found[-1] < 0.8 * found[0]
    # The scale of the losses is out of the gradients again before they are clipped.
    assert distance(seen[precision].gradients[0], seen["float32"].gradients[0]) < error
    assert {g.dtype for g in seen[precision].gradients[0]} == {torch.float32}


@pytest.mark.parametrize("changes", [{}, {"fp16": True}, {"bf16": True}], ids=["float32", "fp16", "bf16"])
def test_a_step_whose_gradients_are_not_finite_changes_nothing_and_is_counted(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    model = model_of()
    with watched() as seen:
        break_gradients(model, lambda: seen.step == 2)
        config = settings(tmp_path / "run", weight_decay=0.1, **changes)
        result = train(model, examples(12), config, tokenizer=tokenizer())
    same = [all(map(torch.equal, a, b)) for a, b in pairwise(seen.weights)]
    assert same == [False, True, False]
    assert result.skipped_steps == 1
    assert [line["skipped_steps"] for line in lines(tmp_path / "run")] == [0, 0, 1, 1]
    assert [line["grad_norm"] is None for line in lines(tmp_path / "run")] == [False, False, True, False]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    if "fp16" in changes:
        assert seen.scales == [65536.0, 65536.0, 32768.0, 32768.0]


def test_nineteen_such_steps_in_a_row_are_borne_twice_and_twenty_are_not(tmp_path: Path) -> None:
    model = model_of(dropout=0.1)
    with watched() as seen:
        break_gradients(model, lambda: seen.step not in (0, 20))
        config = settings(tmp_path / "run", max_steps=40)
        assert train(model, examples(12), config, tokenizer=tokenizer()).skipped_steps == 38
        config = settings(tmp_path / "other", max_steps=60, recompute=True)
        with pytest.raises(ValueError, match=r"20 steps in a row were not finite.* Lower --learning_rate") as error:
            train(model, examples(12), config, tokenizer=tokenizer())
    assert "\n" not in str(error.value)
    assert len(lines(tmp_path / "other")) == 40
    assert is_as_built(model)  # though the run has failed


def is_as_built(model: OPT) -> bool:
    """Whether a model is in evaluation mode, unpatched, and works."""
    assert torch.isfinite(model(torch.tensor([[2, 5, 6]]))).all()
    unpatched = all("forward" not in vars(layer) and layer._compiled_call_impl is None for layer in model.layers)
    restored = all(layer.dropout == model.config.dropout for layer in model.layers)
    return unpatched and restored and not any(module.training for module in model.modules())


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


@pytest.mark.parametrize("changes", [{}, {"batching": "padded"}, {"recompute": True}],
                         ids=["packed", "padded", "recomputed"])  # fmt: skip
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
    breaks = [reason for reason in counters["graph_break"] if "_attend_apart" not in reason]  # which is not traced
    assert not breaks
    assert is_as_built(model)
    train(model_of(num_hidden_layers=2), examples(8), settings(tmp_path / "plain", **changes), tokenizer=tokenizer())
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    torch._dynamo.reset()


def weights(model: OPT) -> list[Tensor]:
    return list(model.state_dict().values())


def test_a_seed_decides_all_and_torchs_own_random_numbers_are_left_alone(tmp_path: Path) -> None:
    models = []
    for number, seed in enumerate((7, 7, 8)):
        models.append(model_of(attention_dropout=0.1))
        config = settings(tmp_path / str(number), seed=seed, dropout=0.1)
        torch.manual_seed(number)
        before = torch.get_rng_state()
        train(models[-1], examples(4), config, tokenizer=tokenizer())  # all in each step, whatever the order
        assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, weights(models[0]), weights(models[1])))
    assert losses(tmp_path / "0") == losses(tmp_path / "1")
    assert not all(map(torch.equal, weights(models[0]), weights(models[2])))


def test_dropout_is_the_models_own_unless_told_otherwise(tmp_path: Path) -> None:
    found = {}
    for name, own, given in (("own", 0.3, None), ("given", 0.0, 0.3), ("none", 0.3, 0.0), ("never", 0.0, None)):
        model = model_of(dropout=own)
        train(model, examples(8), settings(tmp_path / name, dropout=given), tokenizer=tokenizer())
        assert is_as_built(model)
        found[name] = losses(tmp_path / name)
    assert found["own"] == found["given"] != found["none"] == found["never"]


@dataclass(frozen=True)
class Run:
    """A run with evaluations, and what it was begun with."""

    model: OPT
    result: TrainResult
    config: TrainingConfig
    folder: Path


@pytest.fixture
def run(kind: str, tmp_path: Path) -> Run:
    model, folder = model_of(kind), tmp_path / "run"
    config = settings(
        folder, max_steps=-1, num_train_epochs=2, do_eval=True, evaluation_strategy="steps", eval_steps=2,
        weight_decay=0.1, warmup_ratio=0.2, logging_steps=2,
    )  # fmt: skip
    result = train(model, examples(10), config, tokenizer=tokenizer(), eval_data=examples(5, seed=1))
    return Run(model, result, config, folder)


@torch.no_grad()
def test_the_folder_opens_in_minopt_and_in_transformers_to_the_models_logits(run: Run) -> None:
    ids = torch.tensor([[2, 9, 30, 41, 7], [2, 8, 8, 50, 60]])
    expected = run.model(ids)
    lm = minopt.load(run.folder, device="cpu", dtype="float32", optimize=False)
    assert torch.equal(lm.model(ids), expected)
    assert lm.tokenizer is not None
    assert lm.tokenizer.encode("ab c") == tokenizer().encode("ab c")
    reference = transformers.OPTForCausalLM.from_pretrained(run.folder, dtype=torch.float32).eval()
    torch.testing.assert_close(reference(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(run.folder)("ab c")["input_ids"] == tokenizer().encode("ab c")


def test_the_result_and_the_files_of_a_run_tell_the_same(run: Run) -> None:
    result, records = run.result, lines(run.folder)
    steps = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "eval_loss" in r]
    assert [r["step"] for r in steps] == [r["step"] for r in evaluations] == [2, 4, 6]
    assert [r["epoch"] for r in steps] == pytest.approx([2 / 3, 4 / 3, 2], abs=1e-6)
    assert [r["learning_rate"] for r in steps] == pytest.approx([0.5e-3, 1e-3 * 3 / 4, 1e-3 / 4])
    assert set(steps[0]) == {"step", "epoch", "loss", "learning_rate", "grad_norm", "skipped_steps",
                             "tokens_per_second", "time"}  # fmt: skip
    assert all(r["grad_norm"] > 0 for r in steps)
    assert (result.steps, result.skipped_steps, result.loss) == (6, 0, steps[-1]["loss"])
    assert result.output_dir == run.folder
    names = {"loss", "perplexity", "examples", "exact_match", "f1"}
    assert set(result.metrics) == names
    assert {f"eval_{name}": value for name, value in result.metrics.items()} == {
        name: value for name, value in evaluations[-1].items() if name not in ("step", "time")
    }
    assert json.loads((run.folder / "predictions.json").read_text()) == result.predictions
    assert set(result.predictions) == {f"q{i}" for i in range(5)}
    record = json.loads((run.folder / "run.json").read_text())
    assert record["settings"] == run.config.to_dict()
    assert record["global_batch_size"] == 4
    assert not list(run.folder.glob(".model*"))


def test_tokens_a_second_are_those_of_training_whatever_evaluation_and_saving_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that saving, evaluating and steps set on, each once."""
    clock, tokens = [0.0], []
    take_step, save = trainer._Run._step, trainer.Checkpoints.save

    def watch_step(*args: Any) -> bool:
        stopped = take_step(*args)
        clock[0] += 1
        tokens.append(args[0].tokens_seen)
        return stopped

    def watch_save(*args: Any) -> Path:
        clock[0] += 1000
        return save(*args)

    def evaluate(*args: Any, **options: Any) -> EvaluationResult:
        clock[0] += 1000
        return EvaluationResult({"loss": 1.0}, clock[0], {})  # ever better

    config = settings(tmp_path / "run", evaluation_strategy="steps", eval_steps=1, save_steps=3)
    monkeypatch.setattr(trainer._Run, "_step", watch_step)
    monkeypatch.setattr(trainer.Checkpoints, "save", watch_save)
    monkeypatch.setattr(trainer, "evaluate", evaluate)
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: clock[0])
    train(model_of(), examples(12), config, tokenizer=tokenizer(), eval_data=examples(2))
    found = [line["tokens_per_second"] for line in lines(tmp_path / "run") if "loss" in line]
    assert found == pytest.approx(tokens)


def test_a_mean_that_is_written_is_over_all_tokens_since_the_one_before(tmp_path: Path) -> None:
    """Not over steps, whose numbers of tokens differ."""
    for every in (1, 3):
        config = settings(tmp_path / str(every), logging_steps=every, max_steps=6)
        train(model_of(), examples(9), config, tokenizer=tokenizer())
    rows = rows_of(examples(9))
    order = Order(tuple(len(ids) for ids, _ in rows), 4, 42, grouped=False)
    counts = torch.tensor([float(sum(len(rows[i][0]) - rows[i][1] for i in order.examples(s))) for s in range(6)])
    sums = torch.tensor(losses(tmp_path / "1")) * counts
    expected = [(sums[at : at + 3].sum() / counts[at : at + 3].sum()).item() for at in (0, 3)]
    assert losses(tmp_path / "3") == pytest.approx(expected, rel=1e-6)


def test_the_best_checkpoint_stays_and_best_is_written_on_improvement_alone(tmp_path: Path) -> None:
    scores = iter([10.0, 30.0, 20.0, 30.0, 15.0])

    def evaluate(*args: Any, **options: Any) -> EvaluationResult:
        score = next(scores)
        return EvaluationResult({"loss": 1.0, "f1": score}, score, {"q0": "a"})

    folder = tmp_path / "run"
    config = settings(folder, max_steps=5, evaluation_strategy="steps", eval_steps=1, keep_last=1, save_steps=1)
    with mock.patch.object(trainer, "evaluate", evaluate), watched() as seen:
        result = train(model_of(), examples(12), config, tokenizer=tokenizer(), eval_data=examples(2))
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*")) == ["step-00000002", "step-00000005"]
    best = minopt.load(folder / "best", device="cpu", dtype="float32").model
    for found, expected in zip(best.parameters(), seen.weights[1], strict=True):
        assert torch.equal(found, expected)
    assert result.metrics["f1"] == 15.0  # of the last evaluation, as the folder's model is the last


@pytest.mark.parametrize(("strategy", "at"), [("no", []), ("steps", [2, 4, 6]), ("epoch", [3, 6])])
@pytest.mark.parametrize("do_eval", [False, True])
def test_evaluation_comes_when_the_strategy_says_and_once_at_the_end(
    strategy: str, at: list[int], do_eval: bool, tmp_path: Path
) -> None:
    config = settings(tmp_path / "run", max_steps=7, evaluation_strategy=strategy, eval_steps=2, do_eval=do_eval)
    train(model_of(), examples(12), config, tokenizer=tokenizer(), eval_data=examples(2))
    found = [line["step"] for line in lines(tmp_path / "run") if "eval_loss" in line]
    assert found == at + [7] * do_eval


def test_a_text_is_learned_whole(tmp_path: Path) -> None:
    text = "abc def gh " * 20
    config = settings(tmp_path / "run", learning_rate=1e-2, max_steps=30, do_eval=True)
    result = train(model_of(), text, config, tokenizer=tokenizer(), eval_data=text)
    assert set(result.metrics) == {"loss", "perplexity", "examples"}
    assert result.predictions == {}
    assert result.metrics["loss"] < 0.3 * losses(tmp_path / "run")[0]
    assert not (tmp_path / "run" / "predictions.json").exists()


def test_float16_on_a_cpu_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "minopt"):
        train(model_of(), examples(4), settings(tmp_path / "run", max_steps=1, fp16=True), tokenizer=tokenizer())
    assert caplog.text.count("--bf16 is several times faster") == 1


def test_a_finished_run_says_again_what_it_found(tmp_path: Path) -> None:
    data = examples(4)
    config = settings(tmp_path / "run", do_eval=True)
    first, second = (
        train(model_of(), data, config, tokenizer=tokenizer(), eval_data=data) for _ in range(2)
    )  # fmt: skip
    assert first.metrics == second.metrics != {}
    assert first.predictions == second.predictions
    assert first.loss == second.loss


def test_an_evaluation_without_a_number_is_never_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([math.nan, 1.0, math.nan, 0.5])
    evaluate = trainer.evaluate

    def with_score(*args: Any, **options: Any) -> Any:
        return dataclasses.replace(evaluate(*args, **options), score=next(scores))

    monkeypatch.setattr(trainer, "evaluate", with_score)
    config = settings(
        tmp_path / "run", max_steps=4, evaluation_strategy="steps", eval_steps=1, keep_last=1, save_steps=1
    )
    train(model_of(), examples(4), config, tokenizer=tokenizer(), eval_data=examples(2))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")) == [
        "step-00000002",
        "step-00000004",
    ]


def test_the_best_model_takes_no_room_of_its_own_where_it_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = trainer.evaluate
    for name, scores in (("last", iter([1.0, 2.0])), ("first", iter([2.0, 1.0]))):

        def with_score(*args: Any, scores: Any = scores, **options: Any) -> Any:
            return dataclasses.replace(evaluate(*args, **options), score=next(scores))

        monkeypatch.setattr(trainer, "evaluate", with_score)
        config = settings(tmp_path / name, max_steps=2, evaluation_strategy="steps", eval_steps=1)
        train(model_of(), examples(4), config, tokenizer=tokenizer(), eval_data=examples(2))
        files = [tmp_path / name / folder / "model.safetensors" for folder in (".", "best")]
        assert files[0].samefile(files[1]) == (name == "last")
        assert (files[0].read_bytes() == files[1].read_bytes()) == (name == "last")


def test_a_finished_run_that_keeps_no_checkpoint_is_its_model_and_not_begun_anew(tmp_path: Path) -> None:
    config = settings(tmp_path / "run", max_steps=3, save_steps=1, keep_last=0)
    train(model_of(), examples(4), config, tokenizer=tokenizer())
    assert not (tmp_path / "run" / "checkpoints").exists()
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(
        FileExistsError, match=r"finished after step 3 and kept no checkpoint to go on from\. Name another"
    ):
        train(model_of(), examples(4), config, tokenizer=tokenizer())
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    train(model_of(), examples(4), config.replace(resume="never"), tokenizer=tokenizer())
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_a_model_that_could_not_be_saved_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    model = model_of()
    model.layers[0].fc1 = torch.nn.Sequential(model.layers[0].fc1)  # as adapters do
    with pytest.raises(ValueError, match=r"expected an OPT's own parameters, these differ: layers\.0\.fc1"):
        train(model, examples(4), settings(tmp_path / "run", max_steps=1), tokenizer=tokenizer())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"recompute": True}, {"compile": True}, {"bf16": True}], ids=str)
def test_what_is_evaluated_is_a_plain_model(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, evaluate = [], trainer.evaluate

    def watch(model: OPT, *args: Any, **options: Any) -> Any:
        seen.append((any("forward" in vars(layer) for layer in model.layers), model.training, model.dtype))
        return evaluate(model, *args, **options)

    monkeypatch.setattr(trainer, "evaluate", watch)
    monkeypatch.setattr(torch, "compile", lambda function: lambda *args, **kwargs: function(*args, **kwargs))
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


def test_limits_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    config = settings(tmp_path / "run", max_eval_samples=2, do_eval=True)
    with pytest.raises(ValueError, match="--max_eval_samples: counts examples, and --dev_file is a text"):
        train(model_of(), examples(4), config, tokenizer=tokenizer(), eval_data="a text")
