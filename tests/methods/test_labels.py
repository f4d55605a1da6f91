"""Fine-tuning of classifiers and reward models: against transformers, in processes, resumed, and its bad input."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor

from minopt import LabelledText, Preference, SequenceClassifier
from minopt.cli import main
from minopt.distributed import World
from minopt.methods import labels
from minopt.training.batches import microbatches
from minopt.training.trainer import train
from tests.conftest import copy_of
from tests.training.small import distance, losses, model_of, reference_of, settings, text_of, together, tokenizer

NAMES = ["bad", "fair", "good"]


def texts(count: int, seed: int = 0) -> list[LabelledText]:
    """Texts whose last letter says their label."""
    draw = random.Random(seed)
    made = []
    for i in range(count):
        label = i % 3
        made.append(LabelledText(text_of(draw, 3, 28) + "xyz"[label], NAMES[label], f"t{i}"))
    return made


def pairs(count: int, seed: int = 0) -> list[Preference]:
    """Pairs of texts of which the better one has an x at its end."""
    draw = random.Random(seed)
    return [
        Preference(text_of(draw, 1, 12) + "x", text_of(draw, 1, 12), text_of(draw, 2, 20), f"p{i}")
        for i in range(count)
    ]


ALONE = World(0, 1, torch.device("cpu"))
DATA: dict[str, Any] = {"classification": texts, "reward": pairs}


def classifier_of(folder: Path, kind: str, task: str) -> Path:
    """A folder of transformers' classifier, all its parameters perturbed."""
    decoder = reference_of(kind)
    config = transformers.OPTConfig.from_dict(decoder.config.to_dict())
    config.num_labels = 3 if task == "classification" else 1
    if task == "classification":
        config.id2label, config.label2id = dict(enumerate(NAMES)), {name: i for i, name in enumerate(NAMES)}
    model = transformers.OPTForSequenceClassification(config)
    model.model = decoder.model
    torch.manual_seed(1)
    torch.nn.init.normal_(model.score.weight, std=0.3)
    model.save_pretrained(folder)
    tokenizer().save(folder)
    return folder


def their_loss(model: Any, task: str, batch: list[Any], smoothing: float) -> Tensor:
    """The mean loss of examples, one text at a time."""

    def logits(text: str) -> Tensor:
        return model(torch.tensor([tokenizer().encode(text)])).logits[0]

    if task == "classification":
        found = torch.stack([logits(e.text) for e in batch])
        return F.cross_entropy(found, torch.tensor([NAMES.index(e.label) for e in batch]), label_smoothing=smoothing)
    margins = torch.cat([logits(e.prompt + e.chosen) - logits(e.prompt + e.rejected) for e in batch])
    return -((1 - smoothing / 2) * F.logsigmoid(margins) + smoothing / 2 * F.logsigmoid(-margins)).mean()


@pytest.mark.parametrize(
    ("kind", "batching"), [("125m", "packed"), ("350m", "packed"), ("galactica", "packed"), ("125m", "padded")]
)
@pytest.mark.parametrize("task", DATA)
def test_losses_and_weights_are_those_of_a_loop_with_transformers(
    task: str, kind: str, batching: str, tmp_path: Path
) -> None:
    folder, data = classifier_of(tmp_path / "m", kind, task), DATA[task](22)
    given: Any = {"max_steps": 8, "learning_rate": 2e-4, "label_smoothing": 0.1, "weight_decay": 0.1}
    config = settings(tmp_path / "run", task=task, batching=batching, **given)
    train(str(folder), data, config)
    theirs = transformers.OPTForSequenceClassification.from_pretrained(folder, dropout=0.0).train()
    grouped = [[p for p in theirs.parameters() if (p.ndim >= 2) == is_matrix] for is_matrix in (True, False)]
    optimizer = torch.optim.AdamW([{"params": g, "weight_decay": 0.1 * (i == 0)} for i, g in enumerate(grouped)])
    if task == "classification":
        lengths = [len(tokenizer().encode(e.text)) + 1 for e in data]
    else:
        lengths = [sum(len(tokenizer().encode(e.prompt + t)) + 1 for t in (e.chosen, e.rejected)) for e in data]
    expected = []
    for step, (indices,) in enumerate(islice(microbatches(lengths, 4, 1, 42, grouped=False), 8)):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - step / 8)
        loss = their_loss(theirs, task, [data[i] for i in indices], 0.1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        expected.append(loss.item())
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) == 8
    ours = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    names = [name for name in theirs.state_dict() if not name.endswith("k_proj.bias")]  # which cancel in the softmax
    assert distance(*([model.state_dict()[name] for name in names] for model in (ours, theirs))) < 1e-4
    assert ours.config.id2label == theirs.config.id2label


@pytest.mark.parametrize("task", DATA)
def test_a_language_model_becomes_a_classifier_that_is_measured_kept_and_opened(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "dev")}
    for seed, file in enumerate(files.values()):
        file.write_text("\n".join(json.dumps(vars(example)) for example in DATA[task](36, seed)) + "\n")
    reference_of("125m").save_pretrained(tmp_path / "lm")
    tokenizer().save(tmp_path / "lm")
    flags = [*f"--task {task} --device cpu --src-length 40 --tgt-length 8 --dev-file".split(), str(files["dev"])]
    run = f"finetune --model {tmp_path}/lm --output-dir {tmp_path}/run --train-file {files['train']} --max-steps 60"
    run = [*run.split(), *["--learning-rate", "3e-3", "--dropout", "0", "--do-train", "--do-eval"]]
    assert main([*run, *flags]) == 0
    assert "ignored" not in capsys.readouterr().err
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval_accuracy"] > 0.9
    assert main(["finetune", "--model", str(tmp_path / "run"), "--do-eval", *flags]) == 0
    shown = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(shown["accuracy"]) == pytest.approx(last["eval_accuracy"], abs=1e-4)
    assert float(shown["loss"]) == pytest.approx(last["eval_loss"], abs=1e-4)

    theirs, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "run", output_loading_info=True
    )
    assert not any(report.values())
    data = DATA[task](36, 1)
    with torch.no_grad():
        loss = their_loss(theirs, task, data, 0.0).item()
    assert loss == pytest.approx(last["eval_loss"], rel=1e-4)
    ours = SequenceClassifier.load(tmp_path / "run", device="cpu")
    predictions = json.loads((tmp_path / "run" / "predictions.json").read_text())
    if task == "classification":
        assert theirs.config.problem_type == "single_label_classification"
        assert ours.labels == tuple(NAMES) == tuple(theirs.config.id2label.values())
        said = [found.label for found in ours.classify([e.text for e in data])]
        right = [name == e.label for name, e in zip(said, data, strict=True)]
    else:
        each = [ours.rewards([e.prompt + e.chosen, e.prompt + e.rejected]) for e in data]
        right = [chosen > rejected for chosen, rejected in each]
        said = ["chosen" if one else "rejected" for one in right]
    assert predictions == {e.id: name for e, name in zip(data, said, strict=True)}
    assert sum(right) / 36 == pytest.approx(last["eval_accuracy"])
    step = next((tmp_path / "run" / "checkpoints").glob("step-*"))
    opened = SequenceClassifier.load(step, device="cpu")
    assert torch.equal(opened.score.weight, ours.score.weight)
    assert opened.labels == ours.labels


def test_a_run_warns_of_what_does_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = settings(tmp_path / "run", task="classification", max_steps=1, do_eval=True)
    options: Any = {"tokenizer": tokenizer(), "eval_data": texts(3)}
    train(model_of(), texts(4), config, **options)
    assert "ignored" not in caplog.text
    train(model_of(), texts(4), config.replace(num_beams=2, output_dir=str(tmp_path / "other")), **options)
    assert "--num_beams: ignored, acts only where answers are generated, and for --dev_file none are." in caplog.text


def test_a_model_whose_rewards_are_all_alike_prefers_nothing() -> None:
    model = SequenceClassifier(model_of(), 1, tokenizer=tokenizer()).eval()
    torch.nn.init.zeros_(model.score.weight)
    config = settings(Path("run"), task="reward")
    tokens = labels.encode(pairs(6), tokenizer(), config, model.labels, "--dev_file", ALONE)
    found = labels.measured(model, tokens, pairs(6), config, ALONE)
    assert found is not None
    assert found.metrics == {"loss": pytest.approx(0.6931472), "accuracy": 0.0, "examples": 6.0}


RUNS = (("classification", "fsdp", "classifier"), ("reward", "ddp", "classifier"), ("reward", "fsdp", "lm"))


def run_in_processes(folder: Path, world: World) -> list[Any]:
    found = []
    for task, way, start in RUNS:
        config = settings(
            folder / f"{world.size}-{task}-{way}", task=task, parallel=way, max_steps=2, do_eval=True,
            per_device_train_batch_size=4 // world.size,
        )  # fmt: skip
        name = "lm" if start == "lm" else task
        result = train(str(folder / name), DATA[task](11), config, eval_data=DATA[task](7, 1))
        weights = load_file(config.output_dir + "/model.safetensors")
        found.append((losses(Path(config.output_dir)), weights, result.metrics, result.predictions))
    return found


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    for task in DATA:
        classifier_of(tmp_path / task, "350m", task)
    reference_of("125m").save_pretrained(tmp_path / "lm")
    tokenizer().save(tmp_path / "lm")
    work = partial(run_in_processes, tmp_path)
    alone, two = work(ALONE), together(2, tmp_path, work)
    for i, (loss, weights, metrics, predictions) in enumerate(alone):
        for process in two:
            assert process[i][0] == pytest.approx(loss, rel=1e-5)
            assert process[i][2] == pytest.approx(metrics, rel=1e-4)
            assert process[i][3] == predictions
            assert weights.keys() == process[i][1].keys()
            names = [name for name in weights if not name.endswith("k_proj.bias")]
            assert distance(*([tensors[name] for name in names] for tensors in (process[i][1], weights))) < 1e-4


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    folder = classifier_of(tmp_path / "m", "125m", "classification")
    config = settings(tmp_path / "whole", task="classification", max_steps=4, save_steps=2, dropout=0.1)
    train(str(folder), texts(11), config)
    step = tmp_path / "whole" / "checkpoints" / "step-00000002"
    train(str(folder), texts(11), config.replace(output_dir=str(tmp_path / "rest"), resume=str(step)))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "rest"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    start = load_file(folder / "model.safetensors")
    assert not torch.equal(one["score.weight"], start["score.weight"])


def test_what_is_too_long_is_cut_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = settings(tmp_path / "run", src_length=3, tgt_length=3)
    long = [LabelledText("abcdefgh", 0), LabelledText("abc", 1)]
    tokens = labels.encode(long, tokenizer(), config.replace(task="classification"), ("a", "b"), "--train_file", ALONE)
    kept = [[tokenizer().decode(text.ids[:-1]) for text in row] for row in tokens.rows]
    assert kept == [["abcde"], ["abc"]]
    assert [int(text.ids[-1]) for (text,) in tokens.rows] == [0, 1]
    tokens = labels.encode(
        [Preference("efgh", "ij", "abcd")], tokenizer(), config.replace(task="reward"), ("r",), "", ALONE
    )
    assert [[tokenizer().decode(text.ids[:-1]) for text in row] for row in tokens.rows] == [["defgh", "bcdij"]]
    assert tokens.rows[0][0].ids[0] == tokenizer().bos_token_id
    config = settings(tmp_path / "run", task="reward", src_length=3, tgt_length=3, max_steps=1)
    train(model_of(), [Preference("efgh", "ij", "abcd")], config, tokenizer=tokenizer())
    assert "--train_file: 2 texts are cut to 6 tokens (--src_length, --tgt_length)." in caplog.text


ROW = {"text": "a", "label": "good"}
PAIR = {"chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("task", "rows", "message"),
    [
        ("classification", [{"prompt": "a", "completion": "b"}], "line 1: text: expected a text, got nothing. For"),
        ("classification", [ROW, {"text": "a"}], "line 2: label: expected a name or a whole number, got None"),
        ("classification", [ROW | {"label": True}], "label: expected a name or a whole number, got True"),
        ("classification", [ROW | {"label": 0.5}], "got 0.5"),
        ("classification", [ROW | {"text": " "}], "line 1: text: expected words, got an empty text"),
        ("classification", [ROW], "--train-file: expected two labels or more, all names or all"),
        ("classification", [ROW, ROW | {"label": 1}], "on without gaps, got 'good', 1"),
        ("classification", [ROW | {"label": n} for n in (1, 2)], "got 1, 2. Change them"),
        ("reward", [ROW], "chosen: expected a text, got nothing. For --task reward, a .jsonl or .ndjson holds"),
        ("reward", [PAIR | {"rejected": ""}], "line 1: rejected: expected words, got an empty text"),
        ("reward", [PAIR | {"prompt": 3}], "line 1: prompt: expected a text, got a whole number"),
    ],
)  # fmt: skip
def test_a_file_that_is_wrong_is_refused(
    task: str, rows: list[Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference_of("125m").save_pretrained(tmp_path / "lm")
    tokenizer().save(tmp_path / "lm")
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["finetune", "--task", task, "--model", str(tmp_path / "lm"), "--output-dir", str(tmp_path / "run"),
               "--train-file", str(tmp_path / "train.jsonl"), "--src-length", "40", "--tgt-length", "8"]  # fmt: skip
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_labels_and_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder, rater = (classifier_of(tmp_path / task, "125m", task) for task in DATA)
    reader = tokenizer()
    config = settings(tmp_path / "run", task="classification")
    reward = config.replace(task="reward")
    bad = [LabelledText("a", "good", "1"), LabelledText("b", "awful", "2"), LabelledText("c", 3, "3")]
    wide = copy_of(folder, tmp_path / "wide")
    values = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(values | {"id2label": {"0": "a", "1": "b"}}))
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: train(str(folder), bad, config),
         "--train_file: expected labels bad, fair, good, or 0 to 2, got 'awful' (2), 3 (3), with"),
        (lambda: train(model_of(), texts(4), config.replace(do_eval=True), tokenizer=reader, eval_data=bad[1:]),
         "--dev_file: expected labels bad, fair, good, or 0 to 2, got 'awful' (1), 3 (2)"),
        (lambda: train(str(rater), texts(4), config), "classification: expected a model of two labels or more, one"),
        (lambda: train(str(folder), pairs(4), reward),
         "--task reward: expected a model of one output, got one of bad, fair, good, problem_type"),
        (lambda: train(str(folder), pairs(4), config), "expected a list of minopt.LabelledText, got Preference"),
        (lambda: train(str(wide), [LabelledText("x", "a")], config),
         "expected a head of {'weight': [2, 32]}, by word_embed"),
        (lambda: config.replace(lora_rank=4), "--task classification and --lora_rank: expected one of them, got both"),
        (lambda: config.replace(prompt_template="{question}", completion_template="{answer}"), "and --prompt_template"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    assert main(["finetune", "--task", "classification", "--model", str(folder), "--output-dir", str(tmp_path)]) == 2
