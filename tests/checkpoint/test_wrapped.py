"""State dicts as people have them: wrapped, part of a larger model or of a training checkpoint, with a head beside."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from minopt import CheckpointError, convert, inspect_checkpoint, load, load_model
from minopt.cli import main
from tests.checkpoint.metaseq_files import metaseq_state, split_into_parts
from tests.checkpoint.sources import reference

Tensors = dict[str, Tensor]

EMBEDDINGS = "model.decoder.embed_tokens.weight"


def state() -> Tensors:
    return {key: tensor.clone() for key, tensor in reference().state_dict().items() if key != "lm_head.weight"}


def under(front: str, tensors: Tensors | None = None) -> Tensors:
    return {front + key: tensor for key, tensor in (tensors or state()).items()}


def write(folder: Path, content: Any, file: str = "pytorch_model.bin") -> Path:
    folder.mkdir(exist_ok=True)
    reference().config.save_pretrained(folder)
    (save_file if file.endswith(".safetensors") else torch.save)(content, folder / file)
    return folder


def expect_reference(path: Path, **options: Any) -> None:
    model = load_model(path, device="cpu", **options)
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), reference()(ids).logits, rtol=1e-5, atol=1e-5)


FRONTS = ("module.", "_orig_mod.", "pretrained_model.", "base_model.model.", "model.", "language_model.", "a.b-c.d_1.",
          "module.module._orig_mod.", "_forward_module.model.language_model.")  # fmt: skip


@pytest.mark.parametrize(("front", "file"), [
    *((front, "pytorch_model.bin") for front in FRONTS), ("module.", "model.safetensors"), ("module.", "any.pt")
])  # fmt: skip
def test_whatever_stands_in_front_of_all_names_is_taken_off_and_said_once(
    front: str, file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path / "m", under(front), file)
    expect_reference(folder)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f": {front}model.decoder." in record.getMessage()
    assert " is read as model.decoder." in record.getMessage()
    write(folder, under(front, {key.removeprefix("model."): t for key, t in state().items()}), file)
    expect_reference(folder)


@pytest.mark.parametrize("wrap", [
    lambda m: torch.nn.ModuleDict({"module": m}),
    lambda m: torch.compile(m),
    lambda m: nn.ModuleDict({"pretrained_model": torch.compile(nn.ModuleDict({"module": m}))}),
])  # fmt: skip
def test_names_that_wrappers_make(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    """Each layer wrapped on its own too, as for compilation by layer, FSDP and recomputation."""
    model = transformers.OPTForCausalLM.from_pretrained(write(tmp_path / "source", state()))
    layers = model.model.decoder.layers
    layers[0] = torch.compile(layers[0])
    layers[1] = nn.ModuleDict({"_fsdp_wrapped_module": nn.ModuleDict({"_checkpoint_wrapped_module": layers[1]})})
    tensors = wrap(model).state_dict()
    assert any("layers.1._fsdp_wrapped_module._checkpoint_wrapped_module.fc1" in key for key in tensors)
    expect_reference(write(tmp_path / "m", tensors))


@pytest.mark.parametrize("parts", [1, 2])
def test_metaseqs_names_may_be_wrapped_too(parts: int, tmp_path: Path) -> None:
    names = ["reshard.pt"] if parts == 1 else ["reshard-model_part-0.pt", "reshard-model_part-1.pt"]
    for name, part in zip(names, split_into_parts(metaseq_state(reference()), parts), strict=True):
        torch.save({"model": under("module.", part), "cfg": None}, tmp_path / name)
    path = write(tmp_path, {}, "ignored.txt") / names[0]
    expect_reference(path)
    assert inspect_checkpoint(path).kind.startswith("metaseq")


@pytest.mark.parametrize("nest", [
    lambda t: {"model": under("module.", t), "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "step": 3},
    lambda t: {"state_dict": under("model.", t), "epoch": 1, "optimizer_states": [{}], "callbacks": {}},
    lambda t: {"module": t, "param_shapes": [], "dp_world_size": 2},
    lambda t: {"trainer": {"state": {"net": {"weights": t}}}, "ema": {"decay": 0.9}},
])  # fmt: skip
def test_a_state_dict_within_a_training_checkpoint(nest: Callable[[Tensors], Any], tmp_path: Path) -> None:
    expect_reference(write(tmp_path / "m", nest(state())))
    expect_reference(write(tmp_path / "n", nest(state()), "last.pt") / "last.pt")


LARGER = {
    "vision_model.encoder.layers.0.self_attn.q_proj.weight": (3, 4),
    "vision_model.embed_positions.weight": (2, 3),
    "vision_model.encoder.layers.0.fc1.weight": (2, 2),
    "qformer.query": (2,),
    "language_projection.bias": (2,),
}


@pytest.mark.parametrize("head", ["language_model.lm_head.weight", "lm_head.weight", None])
def test_the_opt_of_a_larger_model_opens_and_the_rest_is_named(
    head: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = under("language_model.") | {key: torch.ones(shape) for key, shape in LARGER.items()}
    if head:
        tensors[head] = state()[EMBEDDINGS]
    folder = write(tmp_path / "m", tensors)
    expect_reference(folder)
    (message,) = caplog.messages
    assert "are left out: vision_model (3), qformer (1), language_projection (1)." in message
    if head:
        write(folder, tensors | {head: tensors[head] + 1})
        with pytest.raises(CheckpointError, match="differs from the token embeddings"):
            load_model(folder, device="cpu")


HEADS = {
    "score.weight": "score.weight: a classifier's head (OPTForSequenceClassification), which minopt.SequenceClassifier",
    "v_head.summary.weight": "v_head.summary.weight: TRL's value head",
    "qa_outputs.weight": "qa_outputs.weight: the head of OPTForQuestionAnswering, which minopt.QuestionAnswering",
    "lm_head.bias": "lm_head.bias: of a head that is more than the token table",
    "reward.weight": "1 unexpected (reward.weight)",
}


@pytest.mark.parametrize(("key", "front"), [
    *((key, "") for key in HEADS), ("score.weight", "module."), ("v_head.summary.weight", "pretrained_model."),
    ("reward.weight", "pretrained_model."),
])  # fmt: skip
def test_a_head_is_named_and_can_be_left_out(key: str, front: str, tmp_path: Path) -> None:
    head = key if key.startswith("v_head") else front + key  # TRL's is no part of the model that it wraps
    folder = write(tmp_path / "m", under(front) | {head: torch.ones(2)})
    with pytest.raises(CheckpointError) as caught:
        load_model(folder, device="cpu")
    assert HEADS[key].replace(key, head) in str(caught.value)
    pattern = str(caught.value).rpartition('--ignore "')[2].partition('"')[0]
    expect_reference(folder, ignore=[pattern])
    expect_reference(folder, ignore=["*" + key.partition(".")[0] + ".*"])


@pytest.mark.parametrize("ends", [
    ["layers.0.self_attn.bias", "layers.1.self_attn.bias", "layers.1.self_attn.masked_bias"],
    ["layers.0.self_attn.rotary_emb.inv_freq", "layers.1.self_attn.rotary_emb.inv_freq"],
    ["embed_positions.scale"], ["layers.0.bias"], ["layers.1.fc1.scale"], ["extra"],
])  # fmt: skip
def test_what_the_error_says_leaves_out_nothing_of_the_model(ends: list[str], tmp_path: Path) -> None:
    keys = [f"module.model.decoder.{end}" for end in ends]
    folder = write(tmp_path / "m", under("module.") | dict.fromkeys(keys, torch.ones(2)))
    with pytest.raises(CheckpointError, match=f"{len(keys)} unexpected") as caught:
        load_model(folder, device="cpu")
    patterns = re.findall('--ignore "(.*?)"', str(caught.value))
    assert len(patterns) == len({end.rpartition(".")[2] for end in ends})
    expect_reference(folder, ignore=patterns)


def test_constants_beside_the_weights_mean_nothing(tmp_path: Path) -> None:
    constants = {"model.decoder.embed_positions.position_ids": torch.arange(9), "model.decoder.version": torch.ones(1),
                 "model.decoder.embed_positions._float_tensor": torch.ones(1)}  # fmt: skip
    expect_reference(write(tmp_path / "m", state() | constants))


def test_ignore_is_one_option_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = reference().config
    model = transformers.OPTForSequenceClassification(config)
    model.model.load_state_dict(reference().model.state_dict())
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"score\.weight: a classifier"):
        convert(tmp_path / "m", tmp_path / "a")
    convert(tmp_path / "m", tmp_path / "a", ignore=["score.*"])
    expect_reference(tmp_path / "a")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(loaded.model.decoder.embed_tokens.weight, reference().model.decoder.embed_tokens.weight)
    assert loaded.config.architectures == ["OPTForCausalLM"]
    assert load(tmp_path / "m", ignore="score.*", device="cpu").tokenizer is None  # one pattern is a list of one
    assert inspect_checkpoint(tmp_path / "m", ignore=["score.*"]).is_sound
    assert not inspect_checkpoint(tmp_path / "m").is_sound
    assert main(["inspect", str(tmp_path / "m"), "--ignore", "score.*"]) == 0
    assert main(["convert", "--ignore", "score.*", str(tmp_path / "m"), str(tmp_path / "b")]) == 0
    assert main(["convert", str(tmp_path / "m"), str(tmp_path / "c")]) == 2
    assert '--ignore "score.*"' in capsys.readouterr().err


def test_a_pattern_that_leaves_nothing_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expect_reference(write(tmp_path / "m", state()), ignore=["nothing.*"])
    assert "ignore: no tensor is called nothing.*" in caplog.text


TWO = {
    "two models": (
        lambda t: t | under("ref_model."),
        "got 2 decoders, whose names begin with model.decoder., ref_model",
    ),
    "an average beside": (lambda t: {"model": t, "ema": dict(t)}, "got 2 dicts of them (model, ema). Save the one"),
    "an adapter": (
        lambda t: {key.replace("fc1.", "fc1.base_layer."): v for key, v in under("base_model.model.").items()}
        | {"base_model.model.model.decoder.layers.0.fc1.lora_A.default.weight": torch.ones(2, 2)},
        "They are an adapter's: merge it into the model first",
    ),
    "an adapter alone": (
        lambda t: {"base_model.model.model.decoder.layers.0.fc1.lora_A.weight": torch.ones(2, 2)},
        "They are an adapter's: merge it into the model first",
    ),
    "layers of another name": (
        lambda t: {key.replace("layers.", "blocks."): v for key, v in t.items()},
        "the tensors are of 0 layers, beside them model.decoder.blocks.0.self_attn.k_proj.weight, model.dec",
    ),
    "other names": (
        lambda t: {"foo.bar": torch.ones(2)},
        "expected model.decoder.embed_tokens.weight, model.decoder.layers.0.fc1.weight and so on, whatever stands in "
        "front, got foo.bar.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", TWO)
def test_names_that_do_not_fit_are_listed(what: str, tmp_path: Path) -> None:
    change, message = TWO[what]
    with pytest.raises(CheckpointError) as caught:
        load_model(write(tmp_path / "m", change(state())), device="cpu")
    assert message in str(caught.value)


def test_one_of_two_models_is_chosen_by_leaving_out_the_other(tmp_path: Path) -> None:
    other = under("ref_model.", {key: torch.zeros_like(t) for key, t in state().items()})
    expect_reference(write(tmp_path / "m", state() | other), ignore=["ref_model.*"])


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "30KB"}], ids=["one file", "shards"])
def test_the_opt_of_blip_2_as_transformers_writes_it(shards: dict[str, str], tmp_path: Path) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.Blip2Config(
        vision_config={**small, "image_size": 28, "patch_size": 14},
        qformer_config={**small, "vocab_size": 50, "encoder_hidden_size": 32},
        text_config=reference().config.to_dict(),
        num_query_tokens=2,
    )
    model = transformers.Blip2ForConditionalGeneration(config)
    model.language_model.load_state_dict(reference().state_dict())
    model.save_pretrained(tmp_path / "blip", **shards)
    expect_reference(tmp_path / "blip")
    convert(tmp_path / "blip", tmp_path / "opt")
    expect_reference(tmp_path / "opt")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "opt").model_type == "opt"
