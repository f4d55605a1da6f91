"""Loading: every Hugging Face layout, exact, typed, lean; and each way in which a folder can be wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from minopt import OPT, CheckpointError, generate, load_model
from minopt.checkpoint.checkpoint import open_checkpoint
from minopt.checkpoint.weights import read_weights
from tests.conftest import KINDS, build_reference

Write = Callable[..., Path]


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """What transformers reads from a folder, under its names."""
    return dict(transformers.OPTForCausalLM.from_pretrained(folder, dtype="auto").state_dict())


def expect_same_logits(model: OPT, folder: Path) -> None:
    reference = transformers.OPTForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected, got = reference(ids).logits, model(ids)
    assert (expected - got).abs().max() <= 1e-5 * expected.abs().max()


def rewrite_safetensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({key: t.clone() for key, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def as_pickle(folder: Path, legacy: bool = False) -> None:
    """Replaces model.safetensors by the pytorch_model.bin that older versions wrote, tied head included."""
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"]
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    (folder / "model.safetensors").unlink()


def as_shards(folder: Path, suffix: str) -> None:
    """Splits model.safetensors into three shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {}
    for number in range(3):
        part = dict(list(tensors.items())[number::3])
        name = f"{stem}-{number + 1:05}-of-00003.{suffix}"
        if suffix == "safetensors":
            save_file(part, folder / name, metadata={"format": "pt"})
        else:
            torch.save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


LAYOUTS = {
    "safetensors": lambda folder: None,
    "safetensors shards": lambda folder: as_shards(folder, "safetensors"),
    "bin": as_pickle,
    "legacy bin": lambda folder: as_pickle(folder, legacy=True),
    "bin shards": lambda folder: as_shards(folder, "bin"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_gives_the_reference_weights_exactly(layout: str, kind: str, write_checkpoint: Write) -> None:
    folder = write_checkpoint(kind)
    expected = state_of(folder)
    LAYOUTS[layout](folder)
    model = load_model(folder, device="cpu")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[f"model.decoder.{name}"]), name
    assert not model.training
    expect_same_logits(model, folder)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stored", ["float32", "float16", "float32 norms beside float16"])
def test_tensors_are_cast_as_they_are_read(layout: str, stored: str, write_checkpoint: Write) -> None:
    folder = write_checkpoint("350m", dtype=torch.float32 if stored == "float32" else torch.float16)
    if "norms" in stored:
        rewrite_safetensors(folder, lambda ts: {k: t.float() if "norm" in k else t for k, t in ts.items()})
    expected = load_file(folder / "model.safetensors")
    LAYOUTS[layout](folder)
    for asked in ("auto", "float32", "float16", "bfloat16", torch.float64):
        dtype = {"auto": torch.float32}.get(asked) or (asked if asked == torch.float64 else getattr(torch, asked))
        for name, parameter in load_model(folder, device="cpu", dtype=asked).named_parameters():
            assert torch.equal(parameter, expected[f"model.decoder.{name}"].to(dtype)), name
            assert parameter.dtype == dtype


@pytest.mark.parametrize(("table", "head"), [
    ([], []), ([], [torch.float16]), ([], [torch.bfloat16]), ([torch.bfloat16], []),
    ([torch.float16], [torch.bfloat16]), ([], [torch.float16, torch.bfloat16, torch.float32]),
    ([torch.bfloat16, torch.float32], [torch.float32]),
])  # fmt: skip
def test_a_stored_head_is_the_table_or_differs_by_rounding(
    table: list[torch.dtype], head: list[torch.dtype], write_checkpoint: Write, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the two have been cast to; a difference that training makes is another matter, however small."""
    folder, key = write_checkpoint(), "model.decoder.embed_tokens.weight"

    def cast(tensor: torch.Tensor, dtypes: list[torch.dtype]) -> torch.Tensor:
        for dtype in dtypes:
            tensor = tensor.to(dtype)
        return tensor

    rewrite_safetensors(folder, lambda ts: ts | {key: cast(ts[key], table), "lm_head.weight": cast(ts[key], head)})
    expected = load_file(folder / "model.safetensors")[key].float()
    assert torch.equal(load_model(folder, device="cpu").embed_tokens.weight, expected)
    assert ("differs from the token embeddings by rounding" in caplog.text) == (table != head)
    rewrite_safetensors(
        folder, lambda ts: ts | {"lm_head.weight": ts["lm_head.weight"].float() + 1e-3 * torch.randn(ts[key].shape)}
    )
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the token embeddings; OPT's head"):
        load_model(folder, device="cpu")


def test_a_table_stored_under_the_heads_name_alone_is_taken(write_checkpoint: Write) -> None:
    folder = write_checkpoint()
    expected = load_model(folder, device="cpu").embed_tokens.weight.clone()
    key = "model.decoder.embed_tokens.weight"
    rewrite_safetensors(folder, lambda ts: {"lm_head.weight" if k == key else k: t for k, t in ts.items()})
    assert torch.equal(load_model(folder, device="cpu").embed_tokens.weight, expected)


def test_weights_are_mapped_and_training_leaves_the_file_alone(write_checkpoint: Write) -> None:
    folder = write_checkpoint()
    before = (folder / "model.safetensors").read_bytes()
    model = load_model(folder, device="cpu").train()
    model(torch.tensor([[2, 5, 6]])).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_revision_of_a_local_folder_is_refused(write_checkpoint: Write) -> None:
    with pytest.raises(ValueError, match="a local model has no revisions, got 'main'"):
        load_model(write_checkpoint(), revision="main")


def test_tensors_that_share_memory_in_a_file_come_apart(write_checkpoint: Write) -> None:
    """And a view of a larger one becomes whole: the model can be trained."""
    folder = write_checkpoint()
    tensors = load_file(folder / "model.safetensors")
    names = [f"model.decoder.layers.{i}.fc1.weight" for i in range(2)]
    tensors[names[1]] = tensors[names[0]]
    tensors["model.decoder.layers.2.fc1.bias"] = torch.zeros(64, 2).t()[0]
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    model = load_model(folder, device="cpu")
    kept = model.layers[1].fc1.weight.clone()
    with torch.no_grad():
        model.layers[0].fc1.weight.zero_()
        model.layers[2].fc1.bias.copy_(torch.arange(64))
    assert torch.equal(model.layers[1].fc1.weight, kept)


# --- what can be wrong ---


def truncate(path: Path, keep: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def change_config(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))


def without_shard(folder: Path) -> None:
    as_shards(folder, "safetensors")
    (folder / "model-00002-of-00003.safetensors").unlink()


def drop(*names: str) -> Callable[[Path], None]:
    return lambda folder: rewrite_safetensors(
        folder, lambda ts: {k: t for k, t in ts.items() if k.removeprefix("model.decoder.") not in names}
    )


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        r"expected weights \(model\.safetensors, .*got config\.json, generation_config\.json\. Is this a model's",
    ),
    "truncated safetensors": (
        lambda f: truncate(f / "model.safetensors"),
        r"model\.safetensors: cut short or not safetensors .*Fetch the file again",
    ),
    "shard missing": (without_shard, r"1 of the 3 files in .* are missing: model-00002-of-00003\.safetensors"),
    "index without map": (
        lambda f: (as_shards(f, "safetensors"), (f / "model.safetensors.index.json").write_text("{}")),
        r"index\.json: expected a weight_map",
    ),
    "a key in two shards": (
        lambda f: (as_shards(f, "safetensors"), shutil.copy(*sorted(f.glob("model-*"))[:2])),
        r"stored in several of its files: model\.decoder\.\S+, .* and \d+ more\. Fetch the files again",
    ),
    "tensor missing": (drop("layers.1.fc1.weight"), r"1 missing \(layers\.1\.fc1\.weight\).*belong together"),
    "many missing": (
        drop(*(f"layers.{i}.self_attn.{p}_proj.weight" for i in range(3) for p in "qkv")),
        r"9 missing \(layers\.0\.self_attn\.k_proj\.weight, [^)]* and 4 more\)",
    ),
    "final norm missing": (
        drop("final_layer_norm.weight", "final_layer_norm.bias"),
        r'2 missing \(final_layer_norm.*"_remove_final_layer_norm": true',
    ),
    "tensor unexpected": (
        lambda f: rewrite_safetensors(f, lambda ts: ts | {"score.weight": torch.zeros(2)}),
        r"1 unexpected \(score\.weight: a classifier's head .*SequenceClassifier\.load opens\)\. To load all "
        r"else, leave them out: ignore=\['score\.\*'\] \(--ignore \"score\.\*\"\)\.",
    ),
    "tensor of integers": (
        lambda f: rewrite_safetensors(f, lambda ts: {k: t.int() if "fc1.bias" in k else t for k, t in ts.items()}),
        r"3 of the wrong shape or kind \(layers\.0\.fc1\.bias: expected float64, .*got int32",
    ),
    "stored twice": (
        lambda f: rewrite_safetensors(
            f, lambda ts: ts | {"decoder.layers.0.fc1.bias": ts["model.decoder.layers.0.fc1.bias"]}
        ),
        r"1 tensor stored twice \(decoder\.layers\.0\.fc1\.bias and model\.decoder\.layers\.0\.fc1\.bias\)",
    ),
    "config of another width": (
        lambda f: change_config(f, ffn_dim=80),
        r"of the wrong shape or kind \(.*fc1\.\w+: expected \[80.*\], got \[64.*and \d+ more\)",
    ),
    "config of more layers": (
        lambda f: change_config(f, num_hidden_layers=4),
        r"num_hidden_layers is 4 in config\.json, the tensors are of 3 layers",
    ),
    "config not JSON": (
        lambda f: (f / "config.json").write_text("{'model_type': 'opt'}"),
        r"config\.json: expected JSON",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_clear_line(fault: str, write_checkpoint: Write) -> None:
    folder = write_checkpoint()
    break_it, message = BROKEN[fault]
    break_it(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_model(folder, device="cpu")
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "", "white space", "~nobody-of-this-name/m"])
def test_a_folder_that_is_not_there(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_model(name)


@pytest.mark.parametrize("device", ["cuda:77", "tpu", "nonsense:1", "xpu", "mps", "meta"])
def test_a_device_that_is_not_there(device: str, write_checkpoint: Write) -> None:
    with pytest.raises(ValueError, match=f"device: '{device}' is not available here") as caught:
        load_model(write_checkpoint(), device=device)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float8", "int8", torch.int64, "f32", torch.float8_e4m3fn])
def test_a_dtype_that_is_none(dtype: object, write_checkpoint: Write) -> None:
    with pytest.raises(ValueError, match="dtype: expected auto, float32, bfloat16, float16, float64, got"):
        load_model(write_checkpoint(), device="cpu", dtype=dtype)  # type: ignore[arg-type]


# --- a real size ---

PEAK = """
import gc, json, os, sys, threading, time
import torch
from minopt import load_model

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], resident())
        time.sleep(0.001)

peaks = []
for folder, dtype in json.loads(sys.argv[1]):
    gc.collect()
    before, peak, done = resident(), [0], threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    model = load_model(folder, device="cpu", dtype=dtype)
    for parameter in model.parameters():
        parameter.sum()  # pages of a mapping count once they are used
    done.set()
    thread.join()
    peaks.append(peak[0] - before)
    del model, parameter
print(json.dumps(peaks))
"""


def test_a_full_size_checkpoint_gives_the_reference_tokens_and_takes_no_more_memory_than_its_weights(
    tmp_path: Path,
) -> None:
    """Of opt-125m's shape: at most 1.15 times the larger of file and weights, mapped pages included, plus 32 MB."""
    folder, half = tmp_path / "opt-125m", tmp_path / "bin16"
    torch.manual_seed(0)
    reference = transformers.OPTForCausalLM(transformers.OPTConfig()).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    reference.save_pretrained(folder)
    ids = torch.randint(10, 50000, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected = reference.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)
    got = generate(load_model(folder, device="cpu"), ids, mask, max_new_tokens=12, eos_token_id=()).sequences
    assert torch.equal(got, expected)
    if not Path("/proc/self/statm").exists():
        pytest.skip("reads resident memory from Linux's /proc")
    reference.half().config.save_pretrained(half)
    torch.save(reference.state_dict(), half / "pytorch_model.bin")
    small = tmp_path / "small"
    build_reference("125m").save_pretrained(small)  # loaded first: imports and the allocator are no model's
    loads = [(folder, "float32"), (folder, "bfloat16"), (half, "float16"), (half, "float32")]
    program = [sys.executable, "-c", PEAK, json.dumps([(str(f), dtype) for f, dtype in [(small, "float32"), *loads]])]
    peaks = json.loads(subprocess.run(program, check=True, capture_output=True, text=True).stdout)
    for (source, dtype), peak in zip(loads, peaks[1:], strict=True):
        stored = next(p for p in source.iterdir() if p.suffix in (".safetensors", ".bin")).stat().st_size
        weights = 125_239_296 * getattr(torch, dtype).itemsize
        assert peak <= 1.15 * max(stored, weights) + 32e6, (source, dtype)


def test_the_kinds_are_those_of_the_reference() -> None:
    """The three kinds differ where they should, or the tests above would test one kind three times."""
    names = {kind: {k.removeprefix("model.decoder.") for k in build_reference(kind).state_dict()} for kind in KINDS}
    assert "project_in.weight" in names["350m"]
    assert "final_layer_norm.weight" not in names["350m"]
    assert "layers.0.fc1.bias" not in names["galactica"]


@pytest.mark.parametrize("quantize", [None, "int8"], ids=["mapped", "int8"])
def test_weights_that_are_let_go_are_gone_and_none_is_copied_for_them(
    write_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, quantize: str | None
) -> None:
    """While one is packed, nothing else holds it; and the pages of one that is gone may be another's next."""
    checkpoint = open_checkpoint(write_checkpoint())
    monkeypatch.setattr("minopt.checkpoint.weights._WORTH_A_FILE", 0)
    copies: list[Tensor] = []
    clone = Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda t, **options: copies.append(t) or clone(t, **options))
    for _, weight in read_weights(checkpoint, torch.device("cpu"), None, apart=True, quantize=quantize):
        alive = weakref.ref(weight)
        del weight
        assert alive() is None
    assert quantize or copies == []
