"""Adapters are merged as peft merges them, whatever they change, and however the checkpoint is read."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import minopt
from minopt import CheckpointError, convert, load, load_model
from minopt.checkpoint.checkpoint import open_checkpoint
from minopt.checkpoint.inspect import fingerprint
from minopt.checkpoint.names import shard_dim, to_hf
from minopt.checkpoint.tensors import Share
from minopt.checkpoint.weights import read_weights
from minopt.cli import main
from tests.conftest import build_reference, copy_of, error

LINEAR = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's: of tied layers, and of saved embeddings


def write(folder: Path, kind: str = "125m", dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """Writes a model and an adapter, every tensor of which is perturbed; returns peft's model of both."""
    base = transformers.OPTForCausalLM.from_pretrained(kind) if "/" in kind else build_reference(kind, dtype=dtype)
    base.save_pretrained(folder / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **({"r": 4} | settings))).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder / "adapter")
    return model


def merged(model: Any) -> dict[str, Tensor]:
    """The weights of peft's own merge, by transformers' names."""
    state: dict[str, Tensor] = model.merge_and_unload().state_dict()
    return state


def draw(seed: int) -> dict[str, Any]:
    """A random kind of OPT and a random LoRA for it."""
    rng = random.Random(seed)
    kind = rng.choice(["125m", "350m", "galactica"])
    targets: Any = rng.choice([
        rng.sample(LINEAR, rng.randint(1, 4)), rng.sample(LINEAR, 2), "all-linear",
        r".*\.layers\.[02]\.(fc1|self_attn\.[qk]_proj)", ["layers.1.fc2", "self_attn.v_proj"],
    ])  # fmt: skip
    if kind == "350m" and isinstance(targets, list):
        targets += rng.choice([[], ["project_in", "project_out"]])
    settings: dict[str, Any] = {
        "kind": kind, "target_modules": targets, "r": rng.randint(1, 8), "lora_alpha": rng.choice([1, 8, 16.5]),
        "use_rslora": rng.random() < 0.5, "bias": rng.choice(["none", "all", "lora_only"]),
        "rank_pattern": rng.choice([{}, {"fc1": 3, "q_proj": 2}, {r"layers\.1\.fc\d": 5, "v_proj": 1}]),
        "alpha_pattern": rng.choice([{}, {"fc2": 3}, {"self_attn.q_proj": 2, r".*\.k_proj": 7}]),
        "modules_to_save": rng.choice([None, ["embed_tokens"], ["final_layer_norm"], ["fc2", "embed_positions"]]),
    }  # fmt: skip
    if settings["modules_to_save"] == ["embed_tokens"]:
        settings["ensure_weight_tying"] = True
    if isinstance(targets, list) and "project_in" not in targets:
        settings |= rng.choice([{}, {"layers_to_transform": [0, 2]}, {"layers_to_transform": 1},
                                {"layers_to_transform": [1], "layers_pattern": "layers"}])  # fmt: skip
        settings["exclude_modules"] = rng.choice([None, ["layers.0.fc1"], r".*\.2\..*"])
    if settings["bias"] == "none" and kind == "125m":  # peft merges it into biases, which projections lack
        settings["lora_bias"] = rng.random() < 0.5
    return settings


@pytest.mark.parametrize("seed", range(20))
def test_random_adapters_are_merged_as_peft_merges_them(seed: int, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if seed % 4 == 3 else torch.float32
    model = write(tmp_path, dtype=dtype, **draw(seed))
    ours = load_model(tmp_path / "base", adapter=tmp_path / "adapter", device="cpu", dtype=dtype)
    ids = torch.randint(4, 90, (2, 9))
    logits, state = model(ids).logits, merged(model)
    for name, weight in ours.named_parameters():
        theirs = state[to_hf(name)]
        assert weight.dtype == theirs.dtype == dtype
        if dtype == torch.float32:
            assert error(weight, theirs) <= 1e-6, name
        else:  # cast once, from a sum that may differ in its last bit
            assert (weight == theirs).float().mean() > 0.999, name
            assert torch.allclose(weight.float(), theirs.float(), rtol=2**-7, atol=0), name
    if dtype == torch.float32:
        assert error(ours(ids), logits) < 1e-5


def test_a_drawn_adapter_changes_something_and_its_scaling_matters(tmp_path: Path) -> None:
    state = merged(write(tmp_path, target_modules=["fc1"], use_rslora=True))
    base, right = load_model(tmp_path / "base"), load_model(tmp_path / "base", adapter=tmp_path / "adapter")
    name = "layers.0.fc1.weight"
    assert error(base.get_parameter(name), state[to_hf(name)]) > 1e-2
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_rslora": true', '"use_rslora": false'))
    wrong = load_model(tmp_path / "base", adapter=tmp_path / "adapter")
    assert error(right.get_parameter(name), state[to_hf(name)]) <= 1e-6
    assert error(wrong.get_parameter(name), state[to_hf(name)]) > 1e-2


def test_a_change_to_a_tied_table_counts_once_as_in_the_trained_model(tmp_path: Path) -> None:
    """peft's own merge adds it twice, once for the table and once for the head."""
    model = write(tmp_path, "350m", target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    ids = torch.randint(4, 90, (2, 9))
    ours = load_model(tmp_path / "base", adapter=tmp_path / "adapter", device="cpu")
    assert error(ours(ids), model(ids).logits) < 1e-5
    table = load_model(tmp_path / "base", device="cpu").embed_tokens.weight
    assert error(ours.embed_tokens.weight, table) > 1e-2


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A model with an adapter that changes tensors of all kinds, and the weights of peft's merge."""
    folder = tmp_path_factory.mktemp("lora")
    state = merged(write(folder, target_modules=LINEAR, bias="all", modules_to_save=["embed_tokens"],
                         ensure_weight_tying=True))  # fmt: skip
    return folder, state


def test_every_way_to_read_a_share_gives_the_same_numbers(everything: tuple[Path, dict[str, Tensor]]) -> None:
    folder, state = everything
    checkpoint = open_checkpoint(folder / "base", adapter=folder / "adapter")
    for name, tensor in checkpoint.tensors.items():
        whole = tensor.read()
        assert error(whole, state[to_hf(name)]) <= 1e-6, name
        assert tensor.map() is None or torch.equal(tensor.map(), whole)
        part = torch.empty(tensor.numel - 5)
        tensor.read_into(part, 3)
        assert torch.allclose(part, whole.view(-1)[3:-2], atol=1e-6), name
        assert torch.allclose(tensor.rows(5, 11).read(torch.float64).float(), whole[5:11], atol=1e-6), name
        if whole.ndim == 2:
            assert torch.allclose(tensor.columns(3, 9), whole[:, 3:9], atol=1e-6), name
            assert torch.allclose(tensor.rows(2, 30).columns(3, 9), whole[2:30, 3:9], atol=1e-6), name
    shares = [dict(read_weights(checkpoint, torch.device("cpu"), None, share=Share(i, 2))) for i in range(2)]
    for name, weight in shares[0].items():
        dim = shard_dim(name)
        joined = weight if dim is None else torch.cat([share[name] for share in shares], dim)
        assert error(joined, state[to_hf(name)]) <= 1e-6, name


def test_processes_that_see_other_adapters_are_told_apart(everything: tuple[Path, Any], tmp_path: Path) -> None:
    folder = everything[0]
    other = copy_of(folder / "adapter", tmp_path / "other")
    tensors = load_file(other / "adapter_model.safetensors")
    tensors[next(key for key in tensors if "lora_B" in key)][0, 0] += 1
    save_file(tensors, other / "adapter_model.safetensors")
    seen = {fingerprint(open_checkpoint(folder / "base", adapter=path)) for path in (None, folder / "adapter", other)}
    assert len(seen) == 3


@pytest.mark.parametrize(
    "options",
    [{}, {"optimize": False}, {"offload": "disk"}, {"quantize": "int8"}],
    ids=["fast", "plain", "disk", "int8"],
)
def test_each_form_loads_what_convert_writes_and_transformers_opens(
    options: dict[str, Any], everything: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, state = everything
    convert(folder / "base", tmp_path / "merged", adapter=folder / "adapter")
    theirs = transformers.OPTForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    assert max(error(theirs[name], weight) for name, weight in state.items()) <= 1e-6
    ids = torch.randint(4, 90, (2, 9))
    ours = load(folder / "base", adapter=folder / "adapter", device="cpu", **options).model(ids)
    assert error(ours, load(tmp_path / "merged", device="cpu", **options).model(ids)) < 1e-6


def test_a_base_in_metaseqs_parts_and_an_adapter_in_a_pickle(everything: tuple[Path, Any], tmp_path: Path) -> None:
    folder, state = everything
    convert(folder / "base", tmp_path / "parts", format="metaseq", parts=2)
    adapter = copy_of(folder / "adapter", tmp_path / "adapter")
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    ours = load_model(tmp_path / "parts", adapter=adapter, device="cpu")
    assert max(error(w, state[to_hf(name)]) for name, w in ours.named_parameters()) <= 1e-6


def test_a_head_beside_the_old_table_is_compared_with_that_one(everything: tuple[Path, Any], tmp_path: Path) -> None:
    folder, state = everything
    base = copy_of(folder / "base", tmp_path / "base")
    stored = load_file(base / "model.safetensors")
    for head, is_fine in ((stored["model.decoder.embed_tokens.weight"].clone(), True), (torch.ones(96, 32), False)):
        save_file(stored | {"lm_head.weight": head}, base / "model.safetensors")
        if is_fine:
            ours = load_model(base, adapter=folder / "adapter", device="cpu")
            assert error(ours.embed_tokens.weight, state["lm_head.weight"]) <= 1e-6
        else:
            with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the token embeddings"):
                load_model(base, adapter=folder / "adapter", device="cpu")


def test_the_command_line_merges_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, minopt.DEMO, target_modules="all-linear")
    base, adapter, new = (str(path) for path in (minopt.DEMO, tmp_path / "adapter", tmp_path / "new"))
    (tmp_path / "text.txt").write_text("It was a bright cold day in April. " * 40)
    assert main(["convert", base, new, "--adapter", adapter, "--dtype", "float32"]) == 0
    printed = []
    for model in (["--model", base, "--adapter", adapter], ["--model", new], ["--model", base]):
        capsys.readouterr()
        assert main(["generate", "It was", "--max-new-tokens", "8", *model]) == 0
        assert main(["evaluate", "--task", "perplexity", "--data", str(tmp_path / "text.txt"), *model]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]


def settings(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = load_file(folder / "adapter_model.safetensors")
        change(found)
        save_file(found, folder / "adapter_model.safetensors")

    return apply


A = "base_model.model.model.decoder.layers.1.fc1.lora_A.weight"
BAD: dict[str, Callable[[Path], Any]] = {
    "1 missing (model.decoder.layers.1.fc1.lora_A.weight). It was made for BASE": tensors(lambda t: t.pop(A)),
    "1 unexpected (model.decoder.layers.1.fc9.lora_A.weight)": tensors(
        lambda t: t.update({A.replace("fc1", "fc9"): torch.ones(4, 32)})
    ),
    "1 unexpected (score.weight: a classifier's head": tensors(
        lambda t: t.update({"base_model.model.score.weight": torch.ones(2, 32)})
    ),
    "1 of the wrong shape or kind (model.decoder.layers.1.fc1.lora_A.weight: expected [4, 32], got [4, 48])": tensors(
        lambda t: t.update({A: torch.ones(4, 48)})
    ),
    "fc1.lora_A.weight: expected a float dtype": tensors(lambda t: t.update({A: torch.ones(4, 32).int()})),
    "2 unexpected (model.decoder.layers.0.fc1.lora_A.weight": settings(layers_to_transform=[1, 2]),
    "got LOHA. If peft can merge it (merge_and_unload), do": settings(peft_type="LOHA"),
    "got PROMPT_TUNING": settings(peft_type="PROMPT_TUNING"),
    "got one with DoRA": settings(use_dora=True),
    "got one with trainable_token_indices": settings(trainable_token_indices=[5]),
    "init_lora_weights pissa, which changes the model's own weights": settings(init_lora_weights="pissa"),
    "settings of a LoRA, got some that make no sense": settings(target_modules="fc1("),
    "some that make no sense (division by zero)": settings(r=0),
    "adapter_config.json: expected JSON": lambda folder: (folder / "adapter_config.json").write_text("{"),
    "adapter_model.safetensors or adapter_model.bin, got neither": lambda folder: (
        folder / "adapter_model.safetensors"
    ).unlink(),
    "which has none": lambda folder: (folder / "adapter_config.json").unlink(),
    "which has a whole model's, which is loaded alone": lambda folder: (folder / "adapter_config.json").rename(
        folder / "config.json"
    ),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    write(folder, target_modules=["fc1"], base_model_name_or_path="BASE")
    return folder


@pytest.mark.parametrize("message", BAD)
def test_what_is_wrong_with_an_adapter_is_said_in_one_line(message: str, small: Path, tmp_path: Path) -> None:
    adapter = copy_of(small / "adapter", tmp_path / "adapter")
    settings(base_model_name_or_path="BASE")(adapter)
    BAD[message](adapter)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_model(small / "base", adapter=adapter)
    assert "\n" not in str(caught.value)
    assert str(adapter) in str(caught.value)


def test_an_adapter_of_another_size_or_that_is_not_there(small: Path, tmp_path: Path) -> None:
    build_reference("125m", hidden_size=48, num_hidden_layers=2).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"2 unexpected .*; 2 of the wrong shape or kind .*expected \[4, 48\]"):
        load_model(tmp_path / "other", adapter=small / "adapter")
    with pytest.raises(FileNotFoundError, match=r"nothing, which is not there\.$"):
        load_model(small / "base", adapter=tmp_path / "nothing")
    file = small / "adapter" / "adapter_model.safetensors"
    with pytest.raises(FileNotFoundError, match=r"which is a file\. Name the folder that it is in\.$"):
        load_model(small / "base", adapter=file)


@pytest.mark.parametrize("targets", [{"modules_to_save": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]},
                                     {"target_modules": ["fc1", "embed_tokens"]}])  # fmt: skip
def test_head_and_table_may_not_come_apart(targets: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, **({"target_modules": ["fc1"]} | targets))
    with pytest.raises(CheckpointError, match="without ensure_weight_tying, so that head and token table differ"):
        load_model(tmp_path / "base", adapter=tmp_path / "adapter")


def test_int8_weights_and_programs_take_no_adapter(small: Path, tmp_path: Path) -> None:
    convert(small / "base", tmp_path / "int8", quantize="int8")
    with pytest.raises(CheckpointError, match="expected weights in floats to merge an adapter into, got int8"):
        load(tmp_path / "int8", adapter=small / "adapter")
    (tmp_path / "program").mkdir()
    for name in ("manifest.json", "config.json"):
        (tmp_path / "program" / name).write_text("{}")
    with pytest.raises(ValueError, match="program is an exported program, to which it does not apply"):
        load(tmp_path / "program", adapter=small / "adapter")


def test_an_adapter_named_as_a_model_says_what_to_type(small: Path, tmp_path: Path) -> None:
    adapter = copy_of(small / "adapter", tmp_path / "adapter")
    settings(base_model_name_or_path="facebook/opt-125m")(adapter)
    with pytest.raises(FileNotFoundError, match=r"an adapter for facebook/opt-125m\. Name that model") as caught:
        load(adapter)
    assert f"--model facebook/opt-125m --adapter {adapter}" in str(caught.value)
