"""OPTConfig: published sizes, rules, and config.json in and out."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from minopt import OPT, OPTConfig, Tokenizer
from minopt.config import ACTIVATION_NAMES
from minopt.model import ACTIVATIONS as FUNCTIONS
from tests.conftest import KINDS, SIZE

OPT_SIZES = ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b", "175b")
GALACTICA_SIZES = ("125m", "1.3b", "6.7b", "30b", "120b")
PRESETS = [f"opt-{size}" for size in OPT_SIZES] + [f"galactica-{size}" for size in GALACTICA_SIZES]
SHAPES = {  # layers, heads, hidden size
    "125m": (12, 12, 768), "350m": (24, 16, 1024), "1.3b": (24, 32, 2048), "2.7b": (32, 32, 2560),
    "6.7b": (32, 32, 4096), "13b": (40, 40, 5120), "30b": (48, 56, 7168), "66b": (64, 72, 9216),
    "120b": (96, 80, 10240), "175b": (96, 96, 12288),
}  # fmt: skip


# Of the published files.
PARAMETERS = {"opt-125m": 125_239_296, "opt-350m": 331_196_416, "opt-1.3b": 1_315_758_080, "opt-6.7b": 6_658_473_984}


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "config.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("name", PRESETS)
def test_each_size_is_that_of_the_papers(name: str) -> None:
    """arXiv 2205.01068 (OPT) and 2211.09085 (Galactica); the narrow table of 350m is in its config.json alone."""
    config, (family, size) = OPTConfig.preset(name), name.split("-")
    is_opt = family == "opt"
    assert (config.num_hidden_layers, config.num_attention_heads, config.hidden_size) == SHAPES[size]
    assert config.ffn_dim == 4 * config.hidden_size
    assert config.do_layer_norm_before == (size != "350m")
    assert config.embed_dim == (512 if size == "350m" else config.hidden_size)
    assert (config.enable_bias, config.layer_norm_elementwise_affine) == (is_opt, is_opt)
    assert config.activation_function == ("relu" if is_opt else "gelu")
    assert (config.vocab_size, config.bos_token_id) == ((50272, 2) if is_opt else (50000, 0))
    assert (config.max_position_embeddings, config.eos_token_ids, config.pad_token_id) == (2048, (2,), 1)
    count = sum(p.numel() for p in OPT(config, device="meta").parameters())
    assert count == PARAMETERS.get(name, count)
    assert count == pytest.approx(float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]], rel=0.06)
    assert (config == OPTConfig()) == (name == "opt-125m")


def test_an_unknown_preset_is_answered_with_the_known_names() -> None:
    with pytest.raises(ValueError, match=r"unknown name 'opt-3b'") as error:
        OPTConfig.preset("opt-3b")
    assert all(name in str(error.value) for name in PRESETS)


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "ffn_dim", "max_position_embeddings",
         "word_embed_proj_dim", "num_attention_heads")  # fmt: skip
FLAGS = ("do_layer_norm_before", "enable_bias", "layer_norm_elementwise_affine", "tie_word_embeddings",
         "_remove_final_layer_norm")  # fmt: skip
BROKEN_RULES: list[tuple[dict[str, Any], str]] = [
    *(
        ({"word_embed_proj_dim": 768, name: value}, f"{name} must be a positive integer, got {value!r}")
        for name in SIZES
        for value in (0, -1, 1.5, "12", True)
    ),
    ({"hidden_size": 100}, "hidden_size must be a multiple of num_attention_heads, got 100 and 12"),
    *(({name: 1}, f"{name} must be true or false, got 1") for name in FLAGS),
    *(
        ({name: value}, f"{name} must be in [0, 1], got {value!r}")
        for name in ("dropout", "attention_dropout", "layerdrop")
        for value in (-0.1, 1.1, "0.1", None, math.nan)
    ),
    *(
        ({"init_std": value}, f"init_std must be 0 or more, got {value!r}")
        for value in (-0.02, None, math.nan, math.inf)
    ),
    ({"activation_function": "prelu"}, f"activation_function must be one of {list(ACTIVATION_NAMES)}, got 'prelu'"),
    *(
        ({name: value}, f"{name} must be a row of the vocabulary (0 to 50271) or null, got {value!r}")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id")
        for value in (-1, 50272, 1.0, True)
    ),
    *(
        ({name: (1, 2)}, f"{name} must be a row of the vocabulary (0 to 50271) or null, got (1, 2)")
        for name in ("pad_token_id", "bos_token_id")
    ),
    ({"eos_token_id": [2, 50272]}, "eos_token_id must be a row of the vocabulary (0 to 50271) or null, got (2, 50272)"),
]


@pytest.mark.parametrize(("values", "message"), BROKEN_RULES, ids=[message for _, message in BROKEN_RULES])
def test_each_broken_rule_is_named_with_its_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^OPTConfig: ") as error:
        OPTConfig(**values)
    assert str(error.value) == f"OPTConfig: {message}."


def test_all_broken_rules_are_named_at_once() -> None:
    wrong = {"vocab_size": 0, "hidden_size": 100, "dropout": 2, "init_std": -1, "activation_function": "prelu"}
    with pytest.raises(ValueError, match=r"^OPTConfig: ") as error:
        OPTConfig(**wrong)
    assert str(error.value) == (
        "OPTConfig: vocab_size must be a positive integer, got 0; dropout must be in [0, 1], got 2; init_std must be 0 "
        f"or more, got -1; activation_function must be one of {list(ACTIVATION_NAMES)}, got 'prelu'; hidden_size must "
        "be a multiple of num_attention_heads, got 100 and 12."
    )


def test_derived_values() -> None:
    config = OPTConfig(hidden_size=1024, num_attention_heads=16, word_embed_proj_dim=512, do_layer_norm_before=False)
    assert (config.head_dim, config.embed_dim, config.has_final_layer_norm) == (64, 512, False)
    assert OPTConfig(hidden_size=24).embed_dim == 24
    assert not OPTConfig(_remove_final_layer_norm=True).has_final_layer_norm


@pytest.mark.parametrize(("given", "ids"), [(None, ()), (2, (2,)), ([2, 5], (2, 5)), ((7,), (7,)), ([], ())])
def test_there_may_be_no_eos_one_or_several(given: Any, ids: tuple[int, ...]) -> None:
    config = OPTConfig(eos_token_id=given)
    assert config.eos_token_ids == ids
    written = json.loads(json.dumps(config.to_dict()))
    assert OPTConfig.from_dict(written).eos_token_ids == ids
    assert written["eos_token_id"] == (list(given) if isinstance(given, tuple) else given)


def test_unknown_keys_survive_reading_and_writing() -> None:
    strange = {"_name_or_path": "somewhere", "prefix": "</s>", "architectures": ["OPTForSequenceClassification"],
               "extra": {"nested": [1, 2]}, "torch_dtype": "float16", "id2label": {"0": "no"}}  # fmt: skip
    values = {"model_type": "opt", "hidden_size": 24, **strange}
    config = OPTConfig.from_dict(values)
    assert dict(config.extra) == strange
    assert config.to_dict() | values == config.to_dict()


@pytest.mark.parametrize("changes", [{}, {"eos_token_id": [2, 5]}, {"eos_token_id": None, "pad_token_id": None},
                                     {"_remove_final_layer_norm": True}])  # fmt: skip
def test_transformers_reads_back_what_it_wrote(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    written = transformers.OPTConfig(**(SIZE | KINDS[kind] | changes | {"layerdrop": 0.25, "init_std": 0.03}))
    written.save_pretrained(tmp_path)
    config = OPTConfig.load(tmp_path)
    assert config == OPTConfig.load(str(tmp_path / "config.json"))
    again = tmp_path / "again"
    again.mkdir()
    write(again, json.dumps(config.to_dict()))
    first, second = (transformers.OPTConfig.from_pretrained(f).to_dict() for f in (tmp_path, again))
    assert second.pop("architectures") == ["OPTForCausalLM"]
    del first["architectures"], first["_name_or_path"], second["_name_or_path"]
    assert second == first
    read = config.to_dict()
    assert {name: read[name] for name in KINDS[kind] | changes} == KINDS[kind] | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps({"model_type": "gpt2"}), r"model_type: expected \"opt\", got 'gpt2'"),
        (json.dumps({"hidden_size": 24}), r"model_type: expected \"opt\", got None"),
        ("{'model_type': 'opt'}", "expected JSON, .*Fetch the file again"),
        ("", "expected JSON, "),
        (b"\xff\xfe\x00", "expected JSON, "),
        ("[1, 2]", "expected a JSON object, got list"),
        (json.dumps({"model_type": "opt", "vocab_size": 0}), "vocab_size must be a positive integer, got 0"),
        ('{"model_type": "opt", "init_std": NaN}', "init_std must be 0 or more, got nan"),
    ],
)
def test_a_file_that_is_no_opt_configuration_is_named_in_one_line(
    content: str | bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape("config.json")):
        OPTConfig.load(tmp_path)
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{message}") as error:
        OPTConfig.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_configuration_equals_and_hashes_by_what_the_model_reads() -> None:
    config = OPTConfig.preset("opt-350m")
    again = OPTConfig.from_dict(config.to_dict())
    assert again == config
    assert hash(again) == hash(config)
    assert again != OPTConfig.preset("opt-125m")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1024  # type: ignore[misc]


def test_each_activation_has_its_function() -> None:
    assert tuple(FUNCTIONS) == ACTIVATION_NAMES


@pytest.mark.parametrize("given", [-1, 50272, 10**6, [2, 50272], [50272], [], 2, None])
@pytest.mark.parametrize("name", ["pad_token_id", "bos_token_id", "eos_token_id"])
def test_a_token_id_beyond_the_table_is_left_out_of_a_file_and_said(
    name: str, given: Any, caplog: pytest.LogCaptureFixture
) -> None:
    if isinstance(given, list) and name != "eos_token_id":
        return
    config = OPTConfig.from_dict({"model_type": "opt", name: given})
    within = [i for i in (given if isinstance(given, list) else [given]) if i == 2]
    expected = None if not within and given != [] else tuple(given and within) if isinstance(given, list) else given
    assert getattr(config, name) == expected
    said = given not in (2, None, [])
    assert [f"{name}: {given} is no row of the token table (0 to 50271), so it is left out."] * said == caplog.messages


def test_the_configuration_of_an_opt_within_a_larger_model() -> None:
    """As BLIP-2's config.json has it."""
    text = {"model_type": "opt", "hidden_size": 48, "ffn_dim": 64, "word_embed_proj_dim": 48}
    whole = {"model_type": "blip-2", "vision_config": {"model_type": "blip_2_vision_model"}, "text_config": text}
    assert OPTConfig.from_dict(whole) == OPTConfig.from_dict(text)
    assert OPTConfig.from_dict({"architectures": ["OPTForCausalLM"]}) == OPTConfig()
    assert OPTConfig.from_dict({"architectures": ["OPTModel"]}) == OPTConfig()
    with pytest.raises(ValueError, match="expected \"opt\", got 'blip-2'"):
        OPTConfig.from_dict(whole | {"text_config": {"model_type": "t5"}})


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_text_that_is_too_large_is_not_read(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(10**11)  # of no blocks
    with pytest.raises(ValueError, match=rf"{name}: expected at most [12]0,000,000 bytes, got 100,000,000,000\."):
        (OPTConfig.load if name == "config.json" else Tokenizer.load)(tmp_path)
