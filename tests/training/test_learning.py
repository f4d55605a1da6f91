"""The whole path: train on real questions, save, load, generate, score."""

from __future__ import annotations

import json
from pathlib import Path

import minopt
from minopt.cli import main
from minopt.evaluation.squad import score
from minopt.training.data import Example, read_data


def shortest_questions(source: Path, count: int, target: Path) -> None:
    """Writes the questions of the shortest paragraphs, in SQuAD's format."""
    articles = json.loads(source.read_text(encoding="utf-8"))["data"]
    pairs = [(p["context"], qa) for article in articles for p in article["paragraphs"] for qa in p["qas"]]
    pairs.sort(key=lambda pair: len(pair[0]))
    paragraphs = [{"context": context, "qas": [qa]} for context, qa in pairs[:count]]
    target.write_text(json.dumps({"version": "1.1", "data": [{"title": "", "paragraphs": paragraphs}]}))


def test_64_squad_questions_are_learned_to_exact_answers(shared_data: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "data.json", tmp_path / "run"
    shortest_questions(shared_data / "squad" / "train.json", 64, data)
    flags = "--src_length 400 --tgt_length 32 --num_train_epochs 20 --learning_rate 2e-3 --lr_scheduler_type cosine"
    flags += " --warmup_ratio 0.1 --dropout 0 --do_train --do_eval --device cpu"
    files = ["--train_file", str(data), "--dev_file", str(data), "--output_dir", str(run)]
    assert main(["finetune", "--model_name_or_path", minopt.DEMO, *files, *flags.split()]) == 0

    examples = read_data(data)
    assert not isinstance(examples, str)
    assert len(examples) == 64
    before, after = (answers(folder, examples) for folder in (minopt.DEMO, run))
    references = {example.id: example.references for example in examples}
    assert score(before, references)["exact_match"] < 5
    assert score(after, references)["exact_match"] >= 95
    assert json.loads((run / "predictions.json").read_text(encoding="utf-8")) == after


def answers(model: str | Path, examples: list[Example]) -> dict[str, str]:
    """What a model, loaded anew, says greedily."""
    lm = minopt.load(model, device="cpu")
    texts = lm.generate([example.prompt for example in examples], max_new_tokens=32, show_progress=False)
    return {example.id: text.strip() for example, text in zip(examples, texts, strict=True)}
