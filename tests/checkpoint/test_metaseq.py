"""metaseq's checkpoints load to the bit: one file, parts, shards, whatever their cfg; and each way to be wrong is told.

The files are written by ``metaseq_files``, which shares no code with the reader.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from minopt import OPT, CheckpointError, OPTConfig, load_model
from minopt.checkpoint import files, names
from minopt.checkpoint.config import resolve_config
from minopt.checkpoint.errors import MissingFileError
from minopt.checkpoint.find import find_files
from tests.checkpoint.metaseq_files import foreign_modules, write_metaseq
from tests.conftest import KINDS, build_ours, build_reference

REFERENCES = {kind: build_reference(kind) for kind in KINDS}
EXPECTED = {kind: build_ours(reference) for kind, reference in REFERENCES.items()}


def expect_equal(model: OPT, kind: str) -> None:
    expected = EXPECTED[kind]
    assert dataclasses.replace(model.config, init_std=expected.config.init_std) == expected.config
    state = model.state_dict()
    assert list(state) == list(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(state[name], tensor), name


# Options of ``write_metaseq``. Seven shards leave padding everywhere, 97 some of padding alone.
WAYS: list[dict[str, Any]] = [
    {}, {"shards": 1}, {"shards": 97}, {"parts": 2}, {"parts": 4, "shards": 7}, {"parts": 4, "shards": 97},
    {"config": "dict", "shards": 3}, {"config": "class", "parts": 2}, {"config": "omegaconf", "parts": 2, "shards": 3},
    {"fused": False}, {"fused": False, "shards": 7}, {"legacy": True, "shards": 7, "config": "class"}, {"legacy": True},
    {"views": True}, {"shards": 7, "wrap": False}, {"shards": 7, "shape": list}, {"stem": "restored"},
    {"head": "whole"}, {"head": "slice"}, {"head": "whole", "parts": 4}, {"head": "slice", "parts": 4},
]  # fmt: skip


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    for kind, how in itertools.product(KINDS, WAYS):
        if kind != "350m" or how.get("parts", 1) == 1:  # metaseq keeps a model with projections in one part
            yield kind, how
    for parts, shards, wrap in itertools.product((1, 4), (1, 7), (True, False)):
        yield "125m", {"parts": parts, "shards": shards, "wrap": wrap, "metadata": False}
    yield "125m", {"stem": "checkpoint_1_6000.pt", "parts": 2}
    yield "125m", {"pattern": "reshard-model_part-{part}.pt", "shards": 1, "wrap": False, "metadata": False, "parts": 2}


@pytest.mark.parametrize(("kind", "how"), list(cases()), ids=str)
def test_each_kind_of_file_gives_the_weights_to_the_bit(kind: str, how: dict[str, Any], tmp_path: Path) -> None:
    write_metaseq(tmp_path, REFERENCES[kind], **how)
    expect_equal(load_model(tmp_path, device="cpu"), kind)


@pytest.mark.parametrize("how", [{}, {"parts": 2}, {"parts": 2, "shards": 3}], ids=str)
def test_any_file_of_a_set_leads_to_all_of_it_and_each_is_parsed_once(
    how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, parsed, read = write_metaseq(tmp_path, REFERENCES["125m"], **how), Counter[Path](), files.read_torch
    monkeypatch.setattr(files, "read_torch", lambda path: parsed.update([path]) or read(path))
    for path in [tmp_path, *paths]:
        expect_equal(load_model(path, device="cpu"), "125m")
        assert parsed == Counter(paths)
        parsed.clear()


@pytest.mark.parametrize("how", [{"mixed_norms": True}, {"parts": 4, "mixed_norms": True}, {"parts": 2, "shards": 7}],
                         ids=str)  # fmt: skip
def test_float16_files_with_or_without_float32_norms_are_cast_as_asked(how: dict[str, Any], tmp_path: Path) -> None:
    write_metaseq(tmp_path, REFERENCES["125m"], dtype=torch.float16, **how)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        model = load_model(tmp_path, device="cpu", dtype=dtype)
        for name, tensor in EXPECTED["125m"].state_dict().items():
            stored = tensor if "norm" in name and how.get("mixed_norms") else tensor.half()
            assert torch.equal(model.state_dict()[name], stored.to(dtype)), name


def test_values_and_keys_and_queries_in_another_order_do_not_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: K, V, Q read as Q, K, V gives another model."""
    monkeypatch.setattr(names, "FUSED", ("q_proj", "k_proj", "v_proj"))
    write_metaseq(tmp_path, REFERENCES["125m"], parts=2)
    with pytest.raises(AssertionError, match="self_attn"):
        expect_equal(load_model(tmp_path, device="cpu"), "125m")


def test_a_model_of_mapped_tensors_can_be_trained(tmp_path: Path) -> None:
    path = write_metaseq(tmp_path, REFERENCES["125m"])[0]
    content = path.read_bytes()
    model = load_model(tmp_path, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    shifted = EXPECTED["125m"].state_dict()["layers.1.self_attn.v_proj.weight"] + 1
    assert torch.equal(model.layers[1].self_attn.v_proj.weight, shifted)
    assert path.read_bytes() == content


# Configuration.


def published(name: str, **changes: Any) -> Any:
    """A reference with a published width, thin enough to build: only heads and activation are not in its tensors."""
    preset = OPTConfig.preset(name)
    sizes = {field: getattr(preset, field) for field in ("hidden_size", "num_hidden_layers", "num_attention_heads",
             "ffn_dim", "word_embed_proj_dim", "do_layer_norm_before", "activation_function", "enable_bias",
             "layer_norm_elementwise_affine")}  # fmt: skip
    return build_reference("125m", dtype=torch.float16, **(sizes | changes))


def test_without_any_configuration_a_published_size_is_known_by_its_tensors(tmp_path: Path) -> None:
    write_metaseq(tmp_path, published("opt-125m"), config=None, parts=2, shards=3)
    config = load_model(tmp_path, device="cpu", dtype="float16").config
    assert (config.num_attention_heads, config.activation_function, config.vocab_size) == (12, "relu", 96)
    assert config.preset_name is None  # its table of positions is short
    assert dataclasses.replace(config, max_position_embeddings=2048).preset_name == "opt-125m"


def test_flat_files_of_a_published_size_need_neither_metadata_nor_configuration(tmp_path: Path) -> None:
    """As the parts of 2022 were: all the vocabulary and positions, flattened, and nothing that says so."""
    reference = published("opt-125m", vocab_size=50272, max_position_embeddings=2048)
    pattern = "reshard-model_part-{part}.pt"
    write_metaseq(tmp_path, reference, parts=2, shards=1, wrap=False, metadata=False, config=None, pattern=pattern)
    model = load_model(tmp_path, device="cpu", dtype="float16")
    assert model.config.preset_name == "opt-125m"
    for key, tensor in reference.state_dict().items():
        if key != names.HF_HEAD:
            assert torch.equal(model.state_dict()[str(names.from_hf(key))], tensor), key


def test_an_unknown_size_without_configuration_asks_for_one_and_takes_it(tmp_path: Path) -> None:
    write_metaseq(tmp_path / "m", REFERENCES["125m"], config=None)
    with pytest.raises(CheckpointError, match=r"of no published size \(hidden_size 32, 3 layers\).*--model-config"):
        load_model(tmp_path / "m")
    REFERENCES["125m"].config.save_pretrained(tmp_path / "c")
    for given in (tmp_path / "c", tmp_path / "c" / "config.json", str(tmp_path / "c"), EXPECTED["125m"].config):
        expect_equal(load_model(tmp_path / "m", device="cpu", model_config=given), "125m")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("opt-125m", "num_hidden_layers is 12 in the given configuration, the tensors are of 3 layers"),
        (OPTConfig(num_hidden_layers=3), "the tensors are not those of the given configuration: "),
        ("opt-3b", "model_config: opt-3b: no such file, and OPTConfig.preset: unknown name 'opt-3b'"),
    ],
)  # fmt: skip
def test_a_given_configuration_that_does_not_fit_is_an_error(given: Any, message: str, tmp_path: Path) -> None:
    write_metaseq(tmp_path, REFERENCES["125m"])
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, model_config=given)


@pytest.mark.parametrize("name", ["125m", "opt-125m", "facebook/opt-125m", "OPT-125M"])
def test_a_preset_may_be_named_in_each_usual_way(name: str) -> None:
    assert resolve_config(name) == OPTConfig.preset("opt-125m")


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Opens a file, changes what it holds, and writes it again."""
    with foreign_modules():
        content = torch.load(path, weights_only=False)
        change(content)
        torch.save(content, path)


def contradict(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: vars(content["cfg"]["model"]).update(fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_embed_dim": 48}, "hidden_size is 48 in its cfg and 32 in its tensors"),
        ({"decoder_layers": 4, "decoder_ffn_embed_dim": 1},
         "ffn_dim is 1 in its cfg and 64 in its tensors; num_hidden_layers is 4 in its cfg and 3 in its tensors"),
        ({"disable_bias": True}, "enable_bias is False in its cfg and True in its tensors"),
        ({"alibi": True}, "alibi instead of learned positions"),
        ({"no_scale_embedding": False}, "its cfg scales embeddings"),
        ({"activation_fn": "swiglu"}, "activation_function must be one of"),
        ({"decoder_attention_heads": 5}, "hidden_size must be a multiple of num_attention_heads, got 32 and 5"),
    ],
)  # fmt: skip
def test_a_cfg_that_contradicts_the_tensors_is_an_error_that_shows_both(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_metaseq(tmp_path, REFERENCES["125m"])[0]
    rewrite(path, contradict(**fields))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(tmp_path)
    assert str(path) in str(caught.value)
    assert "--model-config" in str(caught.value)
    if "decoder_attention_heads" not in fields:
        expect_equal(load_model(tmp_path, device="cpu", model_config=EXPECTED["125m"].config), "125m")


def test_the_cfgs_word_on_pre_norm_is_not_taken(tmp_path: Path) -> None:
    """It was false in models that are pre-norm and true in one that is not; the decoder's norm tells."""
    for kind in ("125m", "350m"):
        path = write_metaseq(tmp_path / kind, REFERENCES[kind])[0]
        rewrite(path, contradict(decoder_normalize_before=kind == "350m"))
        expect_equal(load_model(path, device="cpu"), kind)


def test_a_config_json_beside_may_not_contradict(tmp_path: Path) -> None:
    write_metaseq(tmp_path, REFERENCES["125m"])
    REFERENCES["125m"].config.save_pretrained(tmp_path)
    expect_equal(load_model(tmp_path, device="cpu"), "125m")
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"num_attention_heads": 4', '"num_attention_heads": 8'))
    with pytest.raises(CheckpointError, match=r"config\.json: num_attention_heads is 8 there and 4 in the cfg"):
        load_model(tmp_path)


def test_older_files_keep_the_configuration_in_args(tmp_path: Path) -> None:
    path = write_metaseq(tmp_path, REFERENCES["350m"])[0]
    rewrite(path, lambda content: content.update(args=content.pop("cfg")["model"]))
    expect_equal(load_model(tmp_path, device="cpu"), "350m")


# What can be wrong.


def write_parts(folder: Path, **how: Any) -> list[Path]:
    return write_metaseq(folder, REFERENCES["125m"], **({"parts": 4} | how))


def in_model(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], None]:
    def in_content(content: dict[str, Any]) -> None:
        change(content["model"])

    return in_content


def set_metadata(**fields: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["shard_metadata"]["param_metadata"][1]["params"]["flat_param_0"].update(fields)

    return change


def copy_over(source: Path, target: Path) -> None:
    shutil.copy(source, target)


BROKEN: dict[str, tuple[dict[str, Any], Callable[[list[Path]], object], str]] = {
    "a part is missing": ({}, lambda ps: ps[1].unlink(), r"1 of the 4 files of reshard are missing: reshard-model_pa"),
    "the last part is missing": ({}, lambda ps: ps[3].unlink(),
                                 r"the 3 parts of reshard have 24 of the 32 rows.* 4 parts are expected; missing: "
                                 r"reshard-model_part-3\.pt"),
    "a shard is missing": ({"shards": 7, "parts": 2}, lambda ps: ps[9].unlink(),
                           r"1 of the 14 files of checkpoint_last are missing: .*model_part-1-shard2\.pt"),
    "the last shard of each part is missing": (
        {"shards": 7, "parts": 2}, lambda ps: [ps[6].unlink(), ps[13].unlink()],
        r"its 6 shards hold .* numbers of flat_param_0 \(padding not counted\), expected .* Is a shard missing"),
    "a part is there twice": ({}, lambda ps: copy_over(ps[1], ps[1].with_name("reshard-model_part-01.pt")),
                              r"reshard-model_part-1\.pt: reshard-model_part-01\.pt is the same part and shard"),
    "a part is a copy of another": ({}, lambda ps: copy_over(ps[1], ps[2]),
                                    r"reshard-model_part-2\.pt: holds the same numbers as reshard-model_part-1\.pt"),
    "a shard is a copy of another": ({"shards": 3, "parts": 1}, lambda ps: copy_over(ps[0], ps[1]),
                                     r"shard1\.pt: holds the same numbers as checkpoint_last-model_part-0-shard0\.pt"),
    "a replicated tensor differs": (
        {}, lambda ps: rewrite(ps[2], in_model(lambda m: m["decoder.layers.1.fc2.bias"].__setitem__(5, 7.0))),
        r"layers\.1\.fc2\.bias: every model parallel part holds it, and .*part-0\.pt and .*part-2\.pt hold different"),
    "parts with different tensors": (
        {}, lambda ps: rewrite(ps[1], in_model(lambda m: m.pop("decoder.layers.1.fc2.bias"))),
        r"part-1\.pt: reshard-model_part-0\.pt and this do not hold the same tensors: layers\.1\.fc2\.bias"),
    "parts of different widths": (
        {}, lambda ps: rewrite(ps[1], in_model(
            lambda m: m.update({"decoder.layers.1.fc1.bias": torch.zeros(8)}))),
        r"part-1\.pt: layers\.1\.fc1\.bias is \[8\].*, and \[16\].* in reshard-model_part-0\.pt"),
    "fused and apart": (
        {"parts": 1}, lambda ps: rewrite(ps[0], in_model(
            lambda m: m.update({"decoder.layers.1.self_attn.q_proj.bias": torch.zeros(32)}))),
        r"1 tensor stored twice \(decoder\.\S+\.qkv_proj\.bias and decoder\.\S+\.q_proj\.bias\)"),
    "a fused projection that is not three": (
        {"parts": 1}, lambda ps: rewrite(ps[0], in_model(
            lambda m: m.update({"decoder.layers.1.self_attn.qkv_proj.bias": torch.zeros(95)}))),
        r"qkv_proj\.bias holds 3 tensors, so its first dim must be divisible by 3; its shape is \[95\]"),
    "another head than the table": (
        {"parts": 1, "head": "whole"}, lambda ps: rewrite(ps[0], in_model(
            lambda m: m["decoder.output_projection.weight"].add_(1.0))),
        r"decoder\.output_projection\.weight differs from the token embeddings"),
    "a part's head is another": (
        {"head": "slice"}, lambda ps: rewrite(ps[3], in_model(
            lambda m: m["decoder.output_projection.weight"].add_(1.0))),
        r"decoder\.output_projection\.weight differs from the token embeddings"),
    "metadata that does not add up": (
        {"shards": 3, "parts": 1}, lambda ps: [rewrite(p, set_metadata(numels=[5] * 12)) for p in ps],
        r"shard0\.pt: its shard_metadata does not add up \(numels that are not those of the shapes\)"),
    "more padding than numbers": ({"shards": 3, "parts": 1}, lambda ps: rewrite(ps[0], set_metadata(padding=10**9)),
                                  r"shard0\.pt: decoder\.\S+\.flat_param_0 must be .* with 1000000000 of padding"),
    "metadata of another shard": (
        {"shards": 3, "parts": 1}, lambda ps: rewrite(ps[1], set_metadata(names=[*map(str, range(12))])),
        r"shard1\.pt: its shard_metadata is not that of checkpoint_last-model_part-0-shard0\.pt"),
    "whole tensors in shards": (
        {"parts": 1}, lambda ps: [copy_over(ps[0], ps[0].with_name(f"a-shard{i}.pt")) for i in range(2)]
        and ps[0].unlink(),
        r"a-shard0\.pt: one of 2 shards, but its tensors are whole"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_does_not_belong_together_is_refused_in_one_clear_line(what: str, tmp_path: Path) -> None:
    how, damage, message = BROKEN[what]
    paths = write_parts(tmp_path / "model", **how)
    expect_equal(load_model(tmp_path / "model", device="cpu"), "125m")
    damage(paths)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(tmp_path / "model", device="cpu")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, MissingFileError) == ("missing" in what and "shard of each" not in what
                                                          and "tensor" not in what)  # fmt: skip


def test_other_files_of_torch_beside_a_model_are_let_be(tmp_path: Path) -> None:
    """A training run leaves them: they are no checkpoints, whatever their names end with."""
    write_metaseq(tmp_path, REFERENCES["125m"])
    torch.save({"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}, tmp_path / "optimizer.pt")
    torch.save(argparse.Namespace(seed=1), tmp_path / "training_args.pt")
    torch.save(torch.zeros(5, dtype=torch.uint8), tmp_path / "rng_state.pt")
    (tmp_path / "notes.pt").write_text("not a file of torch")
    expect_equal(load_model(tmp_path, device="cpu"), "125m")


def test_another_architecture_is_told(tmp_path: Path) -> None:
    tensors = {"model.layers.0.mlp.gate_proj.weight": torch.zeros(4, 4), "model.embed_tokens.weight": torch.zeros(4, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not an OPT's checkpoint: expected the matrices embed_positions"):
        load_model(tmp_path)
    torch.save({"model": {"bert.encoder.layer.0.attention.self.query.weight": torch.zeros(4)}}, tmp_path / "reshard.pt")
    with pytest.raises(CheckpointError, match=r"none of its tensors is called as an OPT's.* minopt opens OPT and Gala"):
        load_model(tmp_path / "reshard.pt")


def test_the_kind_follows_from_what_a_file_holds(tmp_path: Path) -> None:
    """A Hugging Face state dict is one whatever its file is called, and so is metaseq's."""
    reference = REFERENCES["125m"]
    torch.save(reference.state_dict(), tmp_path / "reshard.pt")
    reference.config.save_pretrained(tmp_path)
    assert find_files(tmp_path).kind == "Hugging Face, pickle"
    expect_equal(load_model(tmp_path, device="cpu"), "125m")
    (path,) = write_metaseq(tmp_path / "b", reference)
    path.rename(tmp_path / "b" / "pytorch_model.bin")
    assert find_files(tmp_path / "b" / "pytorch_model.bin").kind == "metaseq, one file"
    expect_equal(load_model(tmp_path / "b" / "pytorch_model.bin", device="cpu"), "125m")
