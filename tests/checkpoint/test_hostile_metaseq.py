"""What a reader believes of a metaseq file beside its tensors, and of a config.json: settings, layouts, counts, names.

Under the promises of test_hostile_files.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.checkpoint.conftest import BIN, LOADED, METASEQ, REFUSED, WHOLE, Keep, Place, shown
from tests.checkpoint.hostile_files import (
    EMPTY_DICT,
    EMPTY_LIST,
    EMPTY_TUPLE,
    MARK,
    NONE,
    OS_SYSTEM,
    POP,
    TRUE,
    Weights,
    build,
    call,
    data,
    deep_list,
    deep_tuple,
    dict_tower,
    integer,
    list_tower,
    listing,
    mapping,
    metaseq_file,
    metaseq_object,
    name,
    real,
    recall,
    remember,
    sizes,
    text,
    tower,
)

# In place of a number, a name, a list or a dict.
VALUES: dict[str, bytes] = {
    "nothing": NONE,
    "true": TRUE,
    "zero": integer(0),
    "minus one": integer(-1),
    "2**31": integer(2**31),
    "2**62": integer(2**62),
    "2**64": integer(2**64),
    "5000 digits": integer(10**5000),
    "half": real(0.5),
    "nan": real(float("nan")),
    "infinity": real(float("inf")),
    "text": text("x"),
    "text of a number": text("4"),
    "text of 1 MB": text("x" * 1_000_000),
    "text of escapes": text("\x1b[2J\n\r\u202e\ud800"),
    "bytes": data(b"\xff"),
    "name": OS_SYSTEM,
    "called": call(OS_SYSTEM, text("true")),
    "enumerated": call(name("some", "Enumeration"), text("\x1b[2J")),
    "empty list": EMPTY_LIST,
    "empty tuple": EMPTY_TUPLE,
    "empty dict": EMPTY_DICT,
    "tuple with 2**64 leaves": tower(64),
    "list with 2**64 leaves": list_tower(64),
    "dict with 2**64 leaves": dict_tower(64),
    "enumerated with 2**64 leaves": name("some", "Enumeration") + tower(64) + b"R",
    "state with 2**64 leaves": build(call(name("some", "Leaf")), mapping([(text("_val"), tower(64))])),
    "tuple 2,000 deep": deep_tuple(2_000),
    "list 2,000 deep": deep_list(2_000),
    "list that holds itself": EMPTY_LIST + remember(5) + recall(5) + b"a",
    "dict that holds itself": EMPTY_DICT + remember(5) + text("model") + recall(5) + b"s",
    "content of itself": call(name("some", "Node")) + remember(5) + mapping([(text("_content"), recall(5))]) + b"b",
    "value of itself": call(name("some", "Leaf")) + remember(5) + mapping([(text("_val"), recall(5))]) + b"b",
}

SETTINGS = ["decoder_attention_heads", "activation_fn", "dropout", "attention_dropout", "decoder_embed_dim",
            "decoder_layers", "decoder_ffn_embed_dim", "decoder_input_dim", "disable_bias", "disable_affine_ln",
            "alibi", "no_scale_embedding", "max_target_positions"]  # fmt: skip


def with_setting(weights: Weights, key: str, value: bytes) -> bytes:
    """A metaseq file with one setting more, or again."""
    model = metaseq_object(weights) + text("cfg")
    right = {"decoder_attention_heads": integer(4), "activation_fn": text("relu")}
    settings = mapping((text(name), x) for name, x in (right | {key: value}).items())
    return weights.file(model + mapping([(text("model"), settings)]) + b"s")


@pytest.mark.parametrize("key", SETTINGS)
def test_a_senseless_setting_is_refused_or_passed_over(key: str, place: Place, keep: Keep) -> None:
    wrong = {}
    for what, value in VALUES.items():
        if broken := keep.broken(with_setting(place.metaseq(), key, value), WHOLE, METASEQ):
            wrong[what] = broken
    assert not wrong, shown(wrong)


def test_a_senseless_configuration_is_refused_or_passed_over(place: Place, keep: Keep) -> None:
    """At each depth of it, and where older files have it."""
    weights = place.metaseq()
    wrong = {}
    for what, value in VALUES.items():
        broken = []
        for content in (
            text("cfg") + value,
            text("cfg") + mapping([(text("model"), value)]),
            text("cfg") + mapping([(text("model"), mapping([(value, NONE)]))]),
            text("cfg") + NONE + b"s" + text("args") + value,
            text("shard_metadata") + value,
        ):
            broken += keep.broken(weights.file(metaseq_object(weights) + content + b"s"), WHOLE, METASEQ)
        if broken:
            wrong[what] = broken
    assert not wrong, shown(wrong)


def flat_file(tensors: dict[str, Tensor], changes: dict[str, bytes], depth: int = 0) -> bytes:
    """A shard that holds all numbers as one tensor, and says what they are; some of that replaced.

    Args:
        tensors: as metaseq names them.
        changes: by key.
        depth: 0 for the fields of the flat tensor, 1 for those of its group, 2 for those of the whole.
    """
    weights = Weights({"flat_param_0": torch.cat([tensor.flatten() for tensor in tensors.values()])})
    about = {
        "names": listing(*map(text, tensors)),
        "shapes": listing(*(sizes(tensor.shape) for tensor in tensors.values())),
        "numels": listing(*(integer(tensor.numel()) for tensor in tensors.values())),
        "padding": integer(0),
    }
    fields = [about, {}, {}]
    fields[0] |= changes if depth == 0 else {}
    described = mapping((text(key), value) for key, value in fields[0].items())
    fields[1] |= {"fsdp_path": text(""), "params": mapping([(text("flat_param_0"), described)])}
    fields[1] |= changes if depth == 1 else {}
    group = mapping((text(key), value) for key, value in fields[1].items())
    fields[2] |= {"param_metadata": listing(group)} | (changes if depth == 2 else {})
    metadata = mapping((text(key), value) for key, value in fields[2].items())
    return weights.file(metaseq_object(weights) + text("shard_metadata") + metadata + b"s")


@pytest.mark.parametrize(
    ("key", "depth"),
    [("names", 0), ("shapes", 0), ("numels", 0), ("padding", 0), ("fsdp_path", 1), ("params", 1),
     ("param_metadata", 2)],
)  # fmt: skip
def test_a_senseless_layout_is_refused(key: str, depth: int, place: Place, keep: Keep) -> None:
    tensors = dict(place.metaseq().tensors)
    keep(flat_file(tensors, {}), LOADED, METASEQ)
    rest = list(tensors.values())[1:]
    first_numel = next(iter(tensors.values())).numel()
    values = VALUES | {
        "list of it": listing(*(VALUES["tuple with 2**64 leaves"] for _ in tensors)),
        "list of lists of it": listing(*(listing(VALUES["list with 2**64 leaves"]) for _ in tensors)),
        "list of text": listing(*map(text, "x" * len(tensors))),
        "list of huge numbers": listing(*(integer(10**5000) for _ in tensors)),
        "a shape that wraps": listing(sizes([2**63, 2, first_numel]), *(sizes(t.shape) for t in rest)),
        "a shape below none": listing(sizes([-1, -first_numel]), *(sizes(t.shape) for t in rest)),
        "a shape of truths": listing(listing(TRUE, integer(first_numel)), *(sizes(t.shape) for t in rest)),
        "numbers of a shape of nothing": listing(sizes([0, 2**62]), *(sizes(t.shape) for t in rest)),
        "100,000 things": EMPTY_LIST + MARK + text("x") * 100_000 + b"e",
        "100,000 shapes": EMPTY_LIST + MARK + sizes([0]) * 100_000 + b"e",
    }
    wrong = {}
    for what, value in values.items():
        allowed = WHOLE if what in ("zero", "empty tuple", "empty dict", "nothing", "text of 1 MB") else REFUSED
        allowed = WHOLE if key == "fsdp_path" and what in ("empty list", "zero") else allowed
        allowed = WHOLE if what == "a shape of truths" else allowed
        if broken := keep.broken(flat_file(tensors, {key: value}, depth), allowed, METASEQ):
            wrong[what] = broken
    assert not wrong, shown(wrong)


NAMES: dict[str, list[str]] = {
    "a part far off": ["reshard-model_part-0.pt", "reshard-model_part-99999999999.pt"],
    "a shard far off": ["run-shard0.pt", "run-shard99999999999.pt"],
    "both far off": ["run-model_part-0-shard0.pt", "run-model_part-99999-shard99999.pt"],
    "a part of 200 digits": ["reshard-model_part-0.pt", f"reshard-model_part-{'9' * 200}.pt"],
    "a part of zeros": ["reshard-model_part-0.pt", "reshard-model_part-00.pt"],
    "a part in other digits": ["reshard-model_part-0.pt", "reshard-model_part-\u0661.pt"],
    "a name of escapes": ["\x1b[2J\n.pt"],
    "a name of bytes": [b"\xff\xfe.pt".decode("utf-8", "surrogateescape")],
    "a name of nothing": [".pt"],
    "a name that takes long to match": ["-shard0" * 30 + "x.pt"],
}


@pytest.mark.parametrize("names", NAMES)
def test_names_of_parts_are_not_counted_upon(names: str, place: Place, keep: Keep) -> None:
    for file in NAMES[names]:
        (place.folder / file).write_bytes(metaseq_file(place.metaseq()))
    keep.folder(WHOLE if len(NAMES[names]) == 1 else REFUSED, "")


def changed(place: Place, **tensors: torch.Tensor) -> Weights:
    """The weights with some tensors of another shape; ``a__b`` stands for ``a.b``."""
    weights = place.metaseq()
    return replace(weights, tensors=weights.tensors | {key.replace("__", "."): t for key, t in tensors.items()})


COUNTS: dict[str, Callable[[Place], bytes]] = {
    "positions of 2**48 numbers": lambda p: zero_shaped(p, "decoder.embed_positions.weight", (0, 2**48)),
    "2**48 positions": lambda p: zero_shaped(p, "decoder.embed_positions.weight", (2**48, 0)),
    "2**48 tokens": lambda p: zero_shaped(p, "decoder.embed_tokens.weight", (2**48, 0)),
    "tokens of 2**48 numbers": lambda p: zero_shaped(p, "decoder.embed_tokens.weight", (0, 2**48)),
    "2**48 units": lambda p: zero_shaped(p, "decoder.layers.0.fc1.weight", (2**48, 0)),
    "units of 2**48 numbers": lambda p: zero_shaped(p, "decoder.layers.0.fc1.weight", (0, 2**48)),
    "2**48 rows of attention": lambda p: zero_shaped(p, "decoder.layers.0.self_attn.qkv_proj.weight", (3 * 2**46, 0)),
    "no rows of attention": lambda p: zero_shaped(p, "decoder.layers.0.self_attn.qkv_proj.weight", (0, 16)),
    "a head of 2**48 rows": lambda p: zero_shaped(p, "decoder.output_projection.weight", (2**48, 0)),
    "a norm of no dims": lambda p: zero_shaped(p, "decoder.layers.0.fc1.bias", ()),
    "20,000 layers": lambda p: many_layers(p.metaseq(), "decoder.layers.{}.fc2.bias", 20_000),
}


def zero_shaped(place: Place, key: str, shape: tuple[int, ...]) -> bytes:
    """A metaseq file in which one tensor has a shape that holds no numbers, or one."""
    weights = changed(place, **{key.replace(".", "__"): torch.zeros(1)})
    steps = [1] * len(shape)
    state = weights.state_dict({key: weights.tensor(key, size=sizes(shape), stride=sizes(steps))})
    return weights.file(metaseq_object(weights) + text("model") + state + b"s")


def many_layers(weights: Weights, key: str, count: int) -> bytes:
    """A file in which one tensor goes by the names of so many layers."""
    one = next(iter(weights.tensors))
    more = b"".join(text(key.format(1 + i)) + recall(9) for i in range(count))
    model = weights.state_dict() + MARK + weights.tensor(one) + remember(9) + POP + more + b"u"
    if not key.startswith("decoder"):
        return weights.file(model)
    return weights.file(metaseq_object(weights) + text("model") + model + b"s")


@pytest.mark.parametrize("count", COUNTS)
def test_shapes_are_not_counted_upon(count: str, place: Place, keep: Keep) -> None:
    keep(COUNTS[count](place), REFUSED, METASEQ)
    (place.folder / "config.json").unlink()
    keep(COUNTS[count](place), REFUSED, METASEQ)


def test_layers_that_share_one_tensor_are_not_built(place: Place, keep: Keep) -> None:
    """Neither a configuration nor names cost as much as layers do."""
    config = json.loads((place.folder / "config.json").read_text())
    (place.folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 20_001}))
    keep(many_layers(place.weights(), "model.decoder.layers.{}.fc2.bias", 20_000), REFUSED)


def test_a_config_of_absurd_sizes_is_refused(place: Place, keep: Keep) -> None:
    config = json.loads((place.folder / "config.json").read_text())
    weights = place.weights()
    (place.folder / BIN).write_bytes(weights.file(weights.state_dict()))
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim", "vocab_size",
                "max_position_embeddings", "word_embed_proj_dim"):  # fmt: skip
        for value in (2**31, 2**40, 2**62, 2**63, 2**100, 10**30, 0, -1, 0.5, "x", None, [], {}, True):
            (place.folder / "config.json").write_text(json.dumps(config | {key: value}))
            keep.folder(WHOLE if value is None else REFUSED, "")


def test_a_config_of_other_things_is_refused(place: Place, keep: Keep) -> None:
    weights = place.weights()
    config = (place.folder / "config.json").read_text()
    (place.folder / BIN).write_bytes(weights.file(weights.state_dict()))
    for content in ("", "{", "[" * 200_000, '{"a":' * 200_000, '{"hidden_size": ' + "9" * 100_000 + "}", '"\\ud800"',
                    "NaN",
                    config.replace('"opt"', '"\\ud800\\u001b[2J"'), config.replace('"relu"', '"\\u001b[2J\\n"'),
                    config.replace('"relu"', "[" * 500 + "]" * 500), config.replace('"relu"', f'"{"x" * 3_000_000}"'),
                    config.replace("0.1", "NaN"), config.replace("0.1", "1e999")):  # fmt: skip
        (place.folder / "config.json").write_text(content)
        keep.folder(REFUSED, "config.json")
    (place.folder / "config.json").write_bytes(b"\xff\xfe\x00{")
    keep.folder(REFUSED, "config.json")
