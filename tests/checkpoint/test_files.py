"""Files that want to run something, lie about their tensors or are damaged.

Each gives the right weights or a ``CheckpointError``, which is one printable line that names the file. Nothing that a
file names is run.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from minopt import CheckpointError, load_model
from tests.checkpoint.hostile_files import (
    EMPTY_DICT,
    EMPTY_LIST,
    EMPTY_TUPLE,
    NONE,
    POP,
    RUNS,
    SYSTEM,
    Weights,
    call,
    data,
    group,
    integer,
    listing,
    mapping,
    name,
    patched,
    program,
    recall,
    remember,
    sizes,
    stack_name,
    text,
    zip_file,
)
from tests.conftest import build_reference

BIN, METASEQ, SAFE = "pytorch_model.bin", "reshard.pt", "model.safetensors"
FC1, FC2 = "model.decoder.layers.0.fc1.weight", "model.decoder.layers.0.fc2.weight"
BIAS = "model.decoder.layers.0.fc2.bias"
FORMATS = pytest.mark.parametrize("is_legacy", [False, True], ids=["zip", "legacy"])

SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "ffn_dim": 32, "vocab_size": 40, "max_position_embeddings": 12}
REFERENCE = build_reference("125m", **SMALL)
TENSORS = {key: t.contiguous() for key, t in REFERENCE.state_dict().items() if key != "lm_head.weight"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that lacks its weights."""
    REFERENCE.config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def as_metaseq(is_legacy: bool = False) -> Weights:
    """The weights as metaseq names them."""
    names = {key: key.removeprefix("model.").replace("decoder.final_layer", "decoder.layer") for key in TENSORS}
    return Weights({names[key]: tensor for key, tensor in TENSORS.items()}, is_legacy)


def metaseq_object(weights: Weights, more: bytes = b"", **settings: bytes) -> bytes:
    """What a metaseq file holds; ``more`` are keys and values beside the weights."""
    settings = {"decoder_attention_heads": integer(4)} | settings
    cfg = mapping([(text("model"), mapping((text(key), value) for key, value in settings.items()))])
    return mapping([(text("cfg"), cfg), (text("model"), weights.state_dict()), (more, b"")])


def outcome(folder: Path, file: str = BIN, content: bytes | None = None) -> str:
    """What comes of a file: "right weights", "other weights", or the message of a proper refusal."""
    if content is not None:
        (folder / file).write_bytes(content)
    before = time.process_time()
    try:
        model = load_model(folder, device="cpu")
    except CheckpointError as error:
        message = str(error)
        assert message.isprintable(), message
        assert len(message) < 3000
        assert str(folder) in message
        return message
    finally:
        assert time.process_time() - before < 20
    right = all(torch.equal(t, TENSORS[f"model.decoder.{key}"]) for key, t in model.state_dict().items())
    return "right weights" if right else "other weights"


# --- nothing runs ---


@pytest.mark.parametrize("what", RUNS)
def test_each_payload_runs_where_nothing_guards(what: str, tmp_path: Path) -> None:
    """The control: the payload is one."""
    (tmp_path / BIN).write_bytes(Weights({}).file(RUNS[what](tmp_path / "ran")))
    with contextlib.suppress(Exception):
        torch.load(tmp_path / BIN, weights_only=False)
    assert (tmp_path / "ran").exists()


# Where an object stands, and what becomes of the file if it must be refused.
SEATS: dict[str, tuple[str, str, Callable[[Weights, bytes], bytes]]] = {
    "beside the weights": (BIN, "expected a dict from names to ordinary tensors, got extra: ",
                           lambda w, x: w.state_dict(more=text("extra") + x)),
    "for a weight": (BIN, rf"|a tensor without a storage|got {FC1}: ", lambda w, x: w.state_dict({FC1: x})),
    "for all": (BIN, "expected a dict from names to ordinary tensors, got |not that of its tensors", lambda _, x: x),
    "as a key": (BIN, r" as a key\)", lambda w, x: w.state_dict(more=x + NONE)),
    "dropped": (BIN, "", lambda w, x: x + POP + w.state_dict()),
    "a tensor's function": (BIN, f"got {FC1}: ", lambda w, x: w.state_dict({FC1: w.tensor(FC1, function=x)})),
    "a tensor's hooks": (BIN, "", lambda w, x: w.state_dict({FC1: w.tensor(FC1, hooks=x)})),
    "a storage's kind": (BIN, "a storage of an unknown type", lambda w, x: w.state_dict(
        {FC1: w.tensor(FC1, storage=w.storage(FC1, kind=x))})),
    "the state of all": (BIN, "", lambda w, x: w.state_dict() + x + b"b"),
    "metaseq's extra state": (METASEQ, "", lambda w, x: metaseq_object(w, text("extra_state") + x)),
    "metaseq's setting": (METASEQ, "", lambda w, x: metaseq_object(w, another=x)),
}  # fmt: skip


@pytest.mark.parametrize("seat", SEATS)
@FORMATS
def test_nothing_runs_from_wherever_it_stands(is_legacy: bool, seat: str, folder: Path) -> None:
    file, refusal, write = SEATS[seat]
    weights = as_metaseq(is_legacy) if file == METASEQ else Weights(TENSORS, is_legacy)
    expected = rf"{refusal or 'right weights'}|operation (INST|OBJ), which torch.save does not write|damaged"
    for what, payload in RUNS.items():
        result = outcome(folder, file, weights.file(write(weights, payload(folder / "ran"))))
        assert not (folder / "ran").exists(), what
        assert re.search(expected, result), (what, result)


@pytest.mark.parametrize("part", ["magic", "version", "system", "keys"])
def test_nothing_runs_from_the_small_pickles_of_a_legacy_file(part: str, folder: Path) -> None:
    weights = Weights(TENSORS, is_legacy=True)
    for payload in RUNS.values():
        content = weights.legacy_file(program(weights.state_dict()), **{part: program(payload(folder / "ran"))})
        assert "cut short or not a checkpoint" in outcome(folder, BIN, content)
        assert not (folder / "ran").exists()


# --- what is no tensor, or lies outside of its storage ---

FITS = r"does not fit into its storage"
RANGE = "whose shape, strides or offset are not numbers in range"
NO_SIZE = "a storage whose key or size is none"
LIES: dict[str, tuple[str, Callable[[Weights], dict[str, bytes]]]] = {
    "one number past the end": (FITS, lambda w: {"offset": integer(1)}),
    "past all ends": (RANGE, lambda w: {"offset": integer(10**5000)}),
    "before the beginning": (RANGE, lambda w: {"offset": integer(-1)}),
    "wide strides": (FITS, lambda w: {"stride": sizes(17, 1)}),
    "20,000 dims": (RANGE, lambda w: dict.fromkeys(("shape", "stride"), sizes(*[1] * 20_000))),
    "floats for numbers": (RANGE, lambda w: {"shape": group(b"G" + struct.pack(">d", 32.0), integer(16))}),
    "no storage": ("a tensor without a storage", lambda w: {"storage": text("0")}),
    "a storage that is missing": (
        "is not there in full|not that of its tensors", lambda w: {"storage": w.storage(FC1, key=text("../data.pkl"))}
    ),
    "a storage of other numbers": (
        "is described in two ways",
        lambda w: {"storage": w.storage(FC1, kind=name("torch", "DoubleStorage")), "hooks": w.storage(FC1)},
    ),
    "a storage of more numbers than there are": (
        "is not there in full|is not as long as described", lambda w: {"storage": w.storage(FC1, numel=integer(513))}
    ),
    "a storage of 2**60 numbers": (NO_SIZE, lambda w: {"storage": w.storage(FC1, numel=integer(2**60))}),
    "a storage with a list for a key": (NO_SIZE, lambda w: {"storage": w.storage(FC1, key=EMPTY_LIST)}),
    "a storage of other numbers than OPT's": (
        "Storage'. Cast them first", lambda w: {"storage": w.storage(FC1, kind=name("torch", "QInt8Storage"))}
    ),
    "a storage of another library": ("of an unknown type", lambda w: {"storage": w.storage(FC1, kind=SYSTEM)}),
    "a view of a storage": (NO_SIZE, lambda w: {"storage": w.storage(FC1, view=sizes(1, 2))}),
    "an id that is another's": ("not a storage's", lambda w: {"storage": w.storage(FC1, word=text("module"))}),
    "on a device": ("right weights", lambda w: {"storage": w.storage(FC1, location=text("cuda:99"))}),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
@FORMATS
def test_a_tensor_that_is_described_wrongly_is_refused(is_legacy: bool, lie: str, folder: Path) -> None:
    message, changes = LIES[lie]
    weights = Weights(TENSORS, is_legacy)
    content = weights.file(weights.state_dict({FC1: weights.tensor(FC1, **changes(weights))}))
    assert re.search(message, outcome(folder, BIN, content))


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("special", "message"),
    [
        (lambda: torch.eye(3).to_sparse(), r"got x: torch\._utils\._rebuild_sparse_tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "QInt8Storage'. Cast them first"),
        (lambda: torch.empty(3, device="meta"), r"got x: torch\._utils\._rebuild_meta_tensor_no_storage"),
        (lambda: torch.ones(3, dtype=torch.complex64), "ComplexFloatStorage'. Cast them first"),
        (lambda: torch.ones(3).to(torch.float8_e4m3fn), "Storage'. Cast them first"),
        (lambda: torch.ones(3, dtype=torch.int64), r"1 unexpected \(x\)"),
    ],
    ids=["sparse", "quantized", "meta", "complex", "float8", "integers"],
)
def test_tensors_of_other_kinds_are_refused(special: Callable[[], Tensor], message: str, folder: Path) -> None:
    torch.save({**TENSORS, "x": special()}, folder / BIN)
    assert re.search(message, outcome(folder))


def one_storage() -> dict[str, Tensor]:
    """All tensors side by side in one storage, fc1 transposed."""
    flat = torch.cat([t.T.flatten() if key == FC1 else t.flatten() for key, t in TENSORS.items()])
    parts = dict(zip(TENSORS, flat.split([t.numel() for t in TENSORS.values()]), strict=True))
    return {key: part.view(16, 32).T if key == FC1 else part.view(TENSORS[key].shape) for key, part in parts.items()}


class Counted(Tensor):
    """A subclass of Tensor."""


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 5}])
@pytest.mark.parametrize("content", [
    TENSORS,
    one_storage(),
    {key: torch.nn.Parameter(tensor) for key, tensor in TENSORS.items()},
    REFERENCE.state_dict(),  # an OrderedDict with a _metadata, and the head a second time
    {key: tensor.as_subclass(Counted) for key, tensor in TENSORS.items()},
    {"state_dict": TENSORS, "rng": np.random.default_rng(0), "array": np.arange(3), 3: {1, 2}, (1, 2): frozenset(b"x")},
], ids=["plain", "one storage, transposed", "parameters", "module's", "subclass", "in a checkpoint"])  # fmt: skip
def test_what_torch_writes_opens(content: Any, options: dict[str, Any], folder: Path) -> None:
    torch.save(content, folder / BIN, **options)
    assert outcome(folder) == "right weights"


# --- pickles that no pickler writes ---

DEEP = 200_000  # what follows a nesting by recursion in C ends the process
ODD: dict[str, tuple[str, Callable[[Weights], bytes]]] = {
    "numbers that collide": (r"\(int as a key\)", lambda w: w.state_dict(
        more=b"".join(integer(i * (2**61 - 1)) + NONE for i in range(40_000)))),
    "a tuple of 2**20,000 leaves": ("extra: tuple", lambda w: w.state_dict(
        more=text("extra") + NONE + (remember(0) + recall(0) + b"\x86") * 20_000)),
    "a dict that holds itself": ("expected a dict from names to ordinary tensors, got x: dict", lambda w:
        EMPTY_DICT + remember(0) + text("x") + recall(0) + b"s"),
    "a remembered number of 2**32 - 1": ("right weights", lambda w: NONE + remember(2**32 - 1) + POP + w.state_dict()),
    "bytes beyond the file": ("its pickle asks for", lambda w: b"\x8e" + struct.pack("<Q", 2**60) + b"abc"),
    "a text of -1 bytes": ("damaged pickle", lambda w: b"T" + struct.pack("<i", -1)),
    "a number of 10 million digits": ("right weights", lambda w: integer(2**30_000_000) + POP + w.state_dict()),
    "nothing to pop": ("damaged pickle, IndexError", lambda w: POP),
    "nothing remembered": ("damaged pickle, KeyError", lambda w: recall(7)),
    "an unknown operation": ("damaged pickle", lambda w: b"\xff"),
    "items of a list": ("damaged pickle, TypeError", lambda w: EMPTY_LIST + NONE + NONE + b"s"),
    "values appended to a text": ("damaged pickle, AttributeError", lambda w: text("x") + NONE + b"a"),
    "a look-alike of a name": (f"got {FC1}: ", lambda w: w.state_dict(
        {FC1: w.tensor(FC1, function=stack_name("torch._utils", "_r\u0435build_tensor_v2"))})),
    "a tensor of too few arguments": (f"got {FC1}: ", lambda w: w.state_dict(
        {FC1: call(name("torch._utils", "_rebuild_tensor_v2"), w.storage(FC1), integer(0))})),
    "a tensor": ("got StoredTensor", lambda w: w.tensor(FC1)),
    "an empty dict": ("got nothing", lambda w: EMPTY_DICT),
    "bytes for a key": (r"\(bytes as a key\)", lambda w: w.state_dict(more=data(b"x") + w.tensor(BIAS))),
    "a key of escapes": ("unexpected", lambda w: w.state_dict(more=text("a\nb\x1b[2J\u202e\ud800") + w.tensor(BIAS))),
    "20,000 layers of one tensor": ("19999 unexpected", lambda w: w.state_dict(
        more=w.tensor(BIAS) + remember(9) + POP
        + b"".join(text(f"model.decoder.layers.{i}.fc2.bias") + recall(9) for i in range(1, 20_000)))),
    "two models": ("expected one model's tensors, got 2 dicts of them", lambda w: mapping(
        [(text("a"), w.state_dict()), (text("b"), w.state_dict())])),
}  # fmt: skip


@pytest.mark.parametrize("what", ODD)
def test_an_odd_pickle_is_refused(what: str, folder: Path) -> None:
    message, write = ODD[what]
    weights = Weights(TENSORS)
    assert re.search(message, outcome(folder, BIN, weights.file(write(weights))))


@pytest.mark.parametrize("texts", [["x" * 20_000], ["x" * 900] * 20])
def test_a_pickle_is_not_read_beyond_its_limit(texts: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one large value, or in many."""
    monkeypatch.setattr("minopt.checkpoint.pickles._MOST_PICKLE_BYTES", 10_000)
    content = Weights(TENSORS).file(listing(*map(text, texts)))
    assert "its pickle asks for" in outcome(folder, BIN, content)


# --- files that are put together wrongly ---


def records() -> dict[str, bytes]:
    return Weights(TENSORS).records(program(Weights(TENSORS).state_dict()))


def archive(**changes: bytes) -> bytes:
    """The weights' archive, some of its files replaced; ``data_0`` stands for data/0."""
    return zip_file(records() | {f"archive/{key.replace('_', '/')}": new for key, new in changes.items()})


def legacy(**parts: Any) -> bytes:
    weights = Weights(TENSORS, is_legacy=True)
    return weights.legacy_file(program(weights.state_dict()), **parts)


CONTAINERS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "something before": ("right weights", lambda: b"PK\3\4" + archive()),
    "a comment": ("right weights", lambda: zip_file(records(), comment=b"a comment")),
    "a compressed pickle": ("archive/data.pkl' in it is compr", lambda: zip_file(records(), "archive/data.pkl")),
    "a compressed storage": ("archive/data/0' in it is compressed", lambda: zip_file(records(), "archive/data/0")),
    "no pickle": ("a checkpoint has one data.pkl", lambda: zip_file({"a/x": b""})),
    "two pickles": ("a checkpoint has one data.pkl", lambda: zip_file({"a/data.pkl": b"", "b/data.pkl": b""})),
    "a storage too short": ("the storage '0' is not there in full", lambda: archive(data_0=b"abc")),
    "big-endian": ("its numbers are big-endian", lambda: archive(byteorder=b"big")),
    "a storage beyond the file": ("not where the archive's index says", lambda: patched(archive(), 42, 10**8)),
    "a storage of 4 GB": ("not where the archive's index says", lambda: patched(archive(), 20, 2**32 - 2, 2**32 - 2)),
    "a legacy file": ("right weights", legacy),
    "another magic number": ("not a file of torch.save", lambda: legacy(magic=program(integer(7)))),
    "a big-endian legacy file": ("its numbers are big-endian", lambda: legacy(system=program(EMPTY_DICT))),
    "a storage too many": ("not that of its tensors", lambda: legacy(keys=program(listing(text("99"))))),
    "a storage of another size": ("is not as long as described", lambda: legacy(counts={0: 2**60})),
    "a pickle alone": ("not a file of torch.save", lambda: program(Weights(TENSORS).state_dict())),
}  # fmt: skip


@pytest.mark.parametrize("what", CONTAINERS)
def test_a_file_that_is_put_together_wrongly_is_refused(what: str, folder: Path) -> None:
    message, write = CONTAINERS[what]
    assert re.search(message, outcome(folder, BIN, write()))


def safetensors(**entry: object) -> bytes:
    """A .safetensors file whose header says something else of one tensor."""
    whole = save(TENSORS)
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header[FC1] |= entry
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + whole[8 + length :]


SAFE_LIES: list[bytes | dict[str, object]] = [
    b"", bytes(8), struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 9) + b'{"a": 1.0',
    struct.pack("<Q", 30_000_000) + b"{" * 40_000_000, safetensors()[:-1], archive(),
    {"data_offsets": [10**9, 10**9 + 2048]}, {"data_offsets": [4096, 2048]}, {"shape": [2**32, 2**32]},
    {"shape": [-32, -16]}, {"dtype": "F64"}, {"dtype": "I32"}, {"dtype": "F4"},
]  # fmt: skip


@pytest.mark.parametrize("lie", SAFE_LIES, ids=lambda lie: str(lie)[:30] if isinstance(lie, dict) else None)
def test_a_safetensors_file_that_lies_is_refused(lie: bytes | dict[str, object], folder: Path) -> None:
    content = safetensors(**lie) if isinstance(lie, dict) else lie
    assert re.search(r"model\.safetensors: |1 of the wrong shape or kind", outcome(folder, SAFE, content))
    assert outcome(folder, SAFE, safetensors()) == "right weights"


@pytest.mark.parametrize(
    "named",
    ["../out.safetensors", "/etc/passwd", "", "..", "a/../b", "\x00", "\ud800", "x" * 5000, "\n\x1b[2J", None, []],
)
def test_an_index_names_files_of_its_folder_alone(named: object, folder: Path) -> None:
    save_file(TENSORS, folder / "one.safetensors")
    save_file(TENSORS, folder.parent / "out.safetensors")
    for shard, result in (("one.safetensors", "right weights"), (named, r"must lie in the folder|missing|is no")):
        (folder / f"{SAFE}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, shard)}))
        assert re.search(result, outcome(folder))


@pytest.mark.parametrize("target", ["itself", "gone", ".", "/dev/zero", "fifo"])
@pytest.mark.parametrize("file", [BIN, METASEQ, SAFE])
def test_a_weight_file_that_is_no_file_is_refused(file: str, target: str, folder: Path) -> None:
    """Nothing waits for what never comes."""
    if target == "fifo":
        os.mkfifo(folder / file)
    else:
        (folder / file).symlink_to(file if target == "itself" else target)
    assert outcome(folder) != "right weights"


# --- what metaseq's files say beside their tensors ---

VALUES = {
    "nothing": NONE, "minus one": integer(-1), "5000 digits": integer(10**5000), "text": text("x\x1b[2J\n"),
    "name": SYSTEM, "called": call(SYSTEM, text("true")), "list": EMPTY_LIST, "dict": EMPTY_DICT,
    "tuple of 2**64 leaves": NONE + (remember(5) + recall(5) + b"\x86") * 64,
    "tuple 20,000 deep": EMPTY_TUPLE + b"\x85" * 20_000,
    "itself": EMPTY_DICT + remember(5) + text("_content") + recall(5) + b"s",
    "content of itself": call(name("some", "Node")) + remember(5) + mapping([(text("_content"), recall(5))]) + b"b",
}  # fmt: skip


@pytest.mark.parametrize("value", VALUES)
def test_a_senseless_setting_of_metaseqs_is_refused_or_passed_over(value: str, folder: Path) -> None:
    """A number, the whole of a configuration, and the description of flat tensors."""
    weights = as_metaseq()
    for key in ("decoder_attention_heads", "activation_fn", "decoder_layers", "disable_bias"):
        assert (
            outcome(folder, METASEQ, weights.file(metaseq_object(weights, **{key: VALUES[value]}))) != "other weights"
        )
    for key in ("cfg", "args", "shard_metadata"):
        content = weights.file(metaseq_object(weights, text(key) + VALUES[value]))
        assert outcome(folder, METASEQ, content) == "right weights"


@pytest.mark.parametrize("key", ["names", "shapes", "numels", "padding", "fsdp_path", "params", "param_metadata"])
def test_a_senseless_description_of_a_flat_tensor_is_refused(key: str, folder: Path) -> None:
    tensors = as_metaseq().tensors
    flat = Weights({"flat_param_0": torch.cat([tensor.flatten() for tensor in tensors.values()])})

    def content(changes: dict[str, bytes]) -> bytes:
        about = {
            "names": listing(*map(text, tensors)),
            "shapes": listing(*(sizes(*t.shape) for t in tensors.values())),
            "numels": listing(*(integer(t.numel()) for t in tensors.values())),
            "padding": integer(0),
        }
        params = mapping([(text("flat_param_0"), mapping((text(k), v) for k, v in (about | changes).items()))])
        unit = {"fsdp_path": text(""), "params": params} | changes
        metadata = {"param_metadata": listing(mapping((text(k), v) for k, v in unit.items()))} | changes
        described = mapping((text(k), v) for k, v in metadata.items())
        return flat.file(metaseq_object(flat, text("shard_metadata") + described))

    assert outcome(folder, METASEQ, content({})) == "right weights"
    for value in VALUES.values():
        assert METASEQ in outcome(folder, METASEQ, content({key: value}))


@pytest.mark.parametrize(
    "names",
    [["part-model_part-0.pt", f"part-model_part-{'9' * 200}.pt"], ["run-shard0.pt", "run-shard9999.pt"],
     ["a-model_part-0.pt", "a-model_part-00.pt"], ["a-model_part-0-shard0.pt", "a-model_part-9999-shard9999.pt"]],
)  # fmt: skip
def test_names_of_parts_are_not_counted_upon(names: list[str], folder: Path) -> None:
    for file in names:
        result = outcome(folder, file, as_metaseq().file(metaseq_object(as_metaseq())))
    assert result != "right weights"


@pytest.mark.filterwarnings("ignore:invalid escape")
@pytest.mark.parametrize("form", ["zip", "legacy", "metaseq", "safetensors"])
def test_a_damaged_file_gives_a_model_or_one_line(form: str, folder: Path) -> None:
    """Cut anywhere it is refused; a few bytes that are other ones than they were harm nothing."""
    whole = {"zip": archive, "legacy": legacy, "safetensors": safetensors,
             "metaseq": lambda: as_metaseq().file(metaseq_object(as_metaseq()))}[form]()  # fmt: skip
    file = {"metaseq": METASEQ, "safetensors": SAFE}.get(form, BIN)
    assert outcome(folder, file, whole) == "right weights"
    rng = random.Random(0)
    for _ in range(30):
        assert file in outcome(folder, file, whole[: rng.randrange(len(whole))])
    results = set()
    for turn in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 1, 8])):
            at = rng.randrange(len(whole) if turn % 3 else 4000)  # more often in what comes before the numbers
            damaged[at] = rng.randrange(256)
        results.add(outcome(folder, file, bytes(damaged)))
    assert len(results) > 10
