"""Models by their names on the hub: what is fetched, what is kept, and what is said when it fails.

The hub is the one of hub_server.py. huggingface_hub reads its settings when it is imported, so each scenario is a
process of its own; calls that share their settings share one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minopt.checkpoint.hub import find_model
from tests.checkpoint.metaseq_files import write_metaseq
from tests.conftest import build_reference
from tests.hub_server import Hub

INPUT_IDS = [[2, 5, 17, 40, 9], [2, 60, 33, 8, 4]]
TEXT_FILES = ["config.json", "generation_config.json", "merges.txt", "special_tokens_map.json", "tokenizer.json",
              "tokenizer_config.json", "vocab.json"]  # fmt: skip
OTHER_FILES = dict.fromkeys(
    ["README.md", "flax_model.msgpack", "tf_model.h5", "rust_model.ot", "original/model.safetensors"], b"not wanted"
)
WRITTEN_BYTES = 10 * 2**20  # by huggingface_hub at a time: what is cut before that is lost
TOKEN = "hf_of_the_test"

# Makes each of the calls given as JSON, and prints as JSON what came of it: logits and folder, or the error.
SCRIPT = f"""
import json, sys
import torch
import minopt
from minopt.checkpoint.hub import find_model

for call in json.loads(sys.argv[1]):
    try:
        with torch.inference_mode():
            logits = minopt.load_model(**call, device="cpu")(torch.tensor({INPUT_IDS}))
        folder = find_model(**(call | {{"local_files_only": True}}))
        print(json.dumps({{"logits": logits.tolist(), "folder": str(folder)}}))
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        print(json.dumps({{"kinds": kinds, "message": str(error)}}))
"""


@dataclass
class Outcome:
    """What came of one call: ``logits`` and ``folder``, or the ``message`` of an error and its classes' names."""

    logits: Any = None
    folder: str = ""
    kinds: tuple[str, ...] = ()
    message: str = ""

    def assert_logits_of(self, reference: Any) -> None:
        """That the model loaded computes what transformers does."""
        assert not self.message
        with torch.inference_mode():
            expected = reference(torch.tensor(INPUT_IDS)).logits
        torch.testing.assert_close(torch.tensor(self.logits), expected, atol=1e-5, rtol=1e-5)

    def assert_error(self, kind: str, name: str, *parts: str) -> None:
        """That it failed with an error of that kind, in one line that begins with the model's name."""
        assert kind in self.kinds, (self.kinds, self.message)
        assert self.message.startswith(f"{name}: ")
        assert len(self.message.splitlines()) == 1
        assert all(part in self.message for part in parts), self.message


def environment(url: str, home: Path, **settings: str) -> dict[str, str]:
    """This process's environment without anybody's hub, token or proxy, and with those of a scenario."""
    foreign = ("HF_", "HUGGING", "TRANSFORMERS_", "XDG_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign) and not k.lower().endswith("_proxy")}
    return kept | {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"} | settings


def call_load_model(url: str, home: Path, *calls: dict[str, Any], **settings: str) -> list[Outcome]:
    """``load_model`` with each of the arguments in turn, in one new process with these settings."""
    arguments = [sys.executable, "-c", SCRIPT, json.dumps(calls)]
    environ = environment(url, home, **settings)
    process = subprocess.run(arguments, env=environ, capture_output=True, encoding="utf-8", check=False)
    assert process.returncode == 0, process.stderr
    return [Outcome(**json.loads(line)) for line in process.stdout.splitlines()]


def run_generate(url: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line's ``generate`` in a new process."""
    command = [sys.executable, "-m", "minopt", "generate", "abc", "--device", "cpu", *arguments]
    return subprocess.run(command, env=environment(url, home), capture_output=True, encoding="utf-8", check=False)


def files_of(reference: Any, folder: Path, **options: Any) -> dict[str, bytes]:
    """The files that transformers writes for a model."""
    reference.save_pretrained(folder, **options)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def as_pickles(files: dict[str, bytes], folder: Path) -> dict[str, bytes]:
    """The same model as it was published before safetensors: pytorch_model*.bin, and its index if it has one."""
    renamed: dict[str, bytes] = {}
    for name, content in files.items():
        new_name = name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        if name.endswith(".safetensors"):
            torch.save(load_file(folder / name), folder / new_name)
            renamed[new_name] = (folder / new_name).read_bytes()
        elif name.endswith(".index.json"):
            text = content.decode().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
            renamed[new_name] = text.encode()
        else:
            renamed[name] = content
    return renamed


def tokenizer_files() -> dict[str, bytes]:
    """A byte-level BPE of single letters, in both forms that repositories have."""
    letters = "abcdefghijklmnopqrstuvwxyzĠ"
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*special, *letters])}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer = {
        "version": "1.0", "added_tokens": [{"id": vocab[t], "content": t} | flags for t in special],
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }  # fmt: skip
    names = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}
    contents = {"tokenizer.json": tokenizer, "tokenizer_config.json": names | {"add_bos_token": True},
                "special_tokens_map.json": names, "vocab.json": vocab}  # fmt: skip
    return {name: json.dumps(content).encode() for name, content in contents.items()} | {"merges.txt": b"#version: 0.2"}


@dataclass
class Published:
    """A hub with models on it, transformers' own of each, and what came of loading all of them once.

    Attributes:
        home: the ``HF_HOME`` of those calls, warm now.
        fetched: by repository, the files that were asked for.
    """

    hub: Hub
    references: dict[str, Any]
    home: Path
    outcomes: dict[str, Outcome]
    fetched: dict[str, list[str]]

    def assert_loaded(self, label: str) -> None:
        """That a call gave the model that was published, from this ``HF_HOME``."""
        self.outcomes[label].assert_logits_of(self.references[label])
        assert Path(self.outcomes[label].folder).is_relative_to(self.home / "hub")


LOADED: dict[str, dict[str, Any]] = {
    "all-formats": {"name_or_path": "tester/all-formats"},
    "pickle": {"name_or_path": "tester/pickle"},
    "shards": {"name_or_path": "tester/shards"},
    "pickled-shards": {"name_or_path": "tester/pickled-shards"},
    "old-name": {"name_or_path": "old-name"},
    "branch": {"name_or_path": "tester/history", "revision": "tries/second"},
    "commit": {"name_or_path": "tester/history", "revision": "(set below)"},
    "metaseq": {"name_or_path": "tester/metaseq"},
    "metaseq-parts": {"name_or_path": "tester/metaseq-parts"},
}
REFUSED: dict[str, dict[str, Any]] = {
    "unknown": {"name_or_path": "tester/unknown"},
    "unknown-old-name": {"name_or_path": "unknown"},
    "not-a-name": {"name_or_path": "tester/not--a--name"},
    "private": {"name_or_path": "tester/private"},
    "gated": {"name_or_path": "tester/gated"},
    "revision": {"name_or_path": "tester/pickle", "revision": "no-such-branch"},
    "no-model": {"name_or_path": "tester/no-model"},
    "no-weights": {"name_or_path": "tester/no-weights"},
    "forbidden": {"name_or_path": "tester/forbidden"},
    "out-of-order": {"name_or_path": "tester/out-of-order"},
    "silent": {"name_or_path": "tester/silent"},
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    """The hub, with each of LOADED and then each of REFUSED asked for once, in one process without a token."""
    folder = tmp_path_factory.mktemp("published")
    references = {"all-formats": build_reference("125m", seed=1), "pickle": build_reference("350m", seed=2),
                  "shards": build_reference("galactica", seed=3), "branch": build_reference("125m", seed=4),
                  "commit": build_reference("125m", seed=5)}  # fmt: skip
    files = {
        label: files_of(reference, folder / label, max_shard_size="20KB" if label == "shards" else "1GB")
        for label, reference in references.items()
    }
    assert sum(name.endswith(".safetensors") for name in files["shards"]) > 2
    references |= {"old-name": references["all-formats"], "pickled-shards": references["shards"]}
    references |= {"metaseq": references["pickle"], "metaseq-parts": references["commit"]}
    wrong_pickle = {"pytorch_model.bin": b"not wanted"}
    (singleton,) = write_metaseq(folder / "singleton", references["metaseq"], stem="restored")
    parts = write_metaseq(folder / "parts", references["metaseq-parts"], parts=2)
    with Hub() as hub:
        hub.add("tester/all-formats", files["all-formats"] | wrong_pickle | tokenizer_files() | OTHER_FILES)
        hub.add("tester/pickle", as_pickles(files["pickle"], folder / "pickle") | tokenizer_files() | OTHER_FILES)
        hub.add("tester/shards", files["shards"] | OTHER_FILES)
        hub.add("tester/pickled-shards", as_pickles(files["shards"], folder / "shards") | OTHER_FILES)
        commit = hub.add("tester/history", files["commit"])
        hub.add("tester/history", files["branch"], ref="tries/second")
        hub.add("tester/history", files["all-formats"])
        hub.add("old-name", files["all-formats"])
        hub.add("tester/private", files["all-formats"], token=TOKEN)
        hub.add("tester/gated", files["all-formats"], token=TOKEN, gated=True)
        hub.add("tester/no-model", {"README.md": b"", "data.csv": b""})
        hub.add("tester/no-weights", {"config.json": files["pickle"]["config.json"]} | OTHER_FILES)
        hub.add("tester/metaseq", {"model/restored.pt": singleton.read_bytes(), "dict.txt": b""} | tokenizer_files())
        hub.add("tester/metaseq-parts", {path.name: path.read_bytes() for path in parts} | {"README.md": b""})
        hub.answer_only("tester/forbidden", 403)
        hub.answer_only("tester/out-of-order", 500)
        hub.answer_only("tester/silent", 0)
        calls = LOADED | {"commit": LOADED["commit"] | {"revision": commit}} | REFUSED
        home = tmp_path_factory.mktemp("home")
        outcomes = dict(zip(calls, call_load_model(hub.url, home, *calls.values()), strict=True))
        fetched = {name: hub.fetched(name) for name in hub.repositories}
        yield Published(hub, references, home, outcomes, fetched)


def test_safetensors_are_preferred_and_no_other_weights_are_fetched(published: Published) -> None:
    """The repository also has pytorch_model.bin, flax_model.msgpack and tf_model.h5."""
    published.assert_loaded("all-formats")
    assert published.fetched["tester/all-formats"] == sorted([*TEXT_FILES, "model.safetensors"])


def test_pickles_are_fetched_where_there_are_no_safetensors(published: Published) -> None:
    """The repository also has flax_model.msgpack and tf_model.h5."""
    published.assert_loaded("pickle")
    assert published.fetched["tester/pickle"] == sorted([*TEXT_FILES, "pytorch_model.bin"])


@pytest.mark.parametrize(("label", "stem"), [("shards", "model"), ("pickled-shards", "pytorch_model")])
def test_all_shards_are_fetched(published: Published, label: str, stem: str) -> None:
    """With their index, and nothing of other frameworks."""
    published.assert_loaded(label)
    repository = published.hub.repositories[f"tester/{label}"]
    weights = [name for name in repository.commits[repository.refs["main"]] if name.startswith(stem)]
    assert len(weights) > 3
    assert published.fetched[f"tester/{label}"] == sorted([*weights, "config.json", "generation_config.json"])


@pytest.mark.parametrize("label", ["metaseq", "metaseq-parts"])
def test_repositories_of_metaseqs_files_are_loaded(published: Published, label: str) -> None:
    """One with its file in a folder beside the tokenizer's, as tutorials of 2022 clone; one with parts."""
    published.assert_loaded(label)
    assert not {"dict.txt", "README.md"} & set(published.fetched[f"tester/{label}"])


def test_a_name_without_owner_is_one_of_the_hub(published: Published) -> None:
    """As the hub's oldest models are named."""
    published.assert_loaded("old-name")


@pytest.mark.parametrize("label", ["branch", "commit"])
def test_the_revision_asked_for_is_loaded(published: Published, label: str) -> None:
    """Its weights differ from those of main."""
    published.assert_loaded(label)


@pytest.mark.parametrize(
    ("label", "kind", "parts"),
    [
        ("unknown", "FileNotFoundError", ["no such folder", "no such model on the hub"]),
        ("unknown-old-name", "FileNotFoundError", ["no such folder", "no such model on the hub"]),
        ("not-a-name", "FileNotFoundError", ["not a name on the hub"]),
        ("private", "FileNotFoundError", ["private", "hf auth login"]),
        ("gated", "PermissionError", ["Accept the terms", "hf auth login"]),
        ("revision", "FileNotFoundError", ["no revision 'no-such-branch'"]),
        ("no-model", "FileNotFoundError", ["expected weights (model.safetensors,", "got nothing from"]),
        ("no-weights", "FileNotFoundError", ["expected weights (model.safetensors,", "got config.json from"]),
        ("forbidden", "PermissionError", ["another login", "403", "hf auth login"]),
        ("out-of-order", "ConnectionError", ["the hub refused", "500", "Try again"]),
        (
            "silent",
            "ConnectionError",
            ["the hub cannot be reached", "disconnected", "Check the name and the connection"],
        ),
    ],
    ids=list(REFUSED),
)
def test_a_refusal_is_one_line_that_names_the_model(
    published: Published, label: str, kind: str, parts: list[str]
) -> None:
    """With the kind of error that ``find_model`` promises."""
    published.outcomes[label].assert_error(kind, REFUSED[label]["name_or_path"], *parts)


def test_hf_token_opens_private_and_gated_models(published: Published, tmp_path: Path) -> None:
    """The token is huggingface_hub's to find; it is passed on."""
    calls = [REFUSED["private"], REFUSED["gated"]]
    for outcome in call_load_model(published.hub.url, tmp_path, *calls, HF_TOKEN=TOKEN):
        outcome.assert_logits_of(published.references["all-formats"])
        assert Path(outcome.folder).is_relative_to(tmp_path / "hub")


def test_a_token_that_is_not_valid_is_a_permission_error(published: Published, tmp_path: Path) -> None:
    """Which says what the hub has said."""
    (outcome,) = call_load_model(published.hub.url, tmp_path, REFUSED["private"], HF_TOKEN="hf_of_yesterday")
    outcome.assert_error("PermissionError", "tester/private", "Invalid credentials", "hf auth login")


@pytest.mark.parametrize("switch", [{"HF_HUB_OFFLINE": "1"}, {"local_files_only": True}], ids=["setting", "argument"])
def test_offline_asks_nobody_and_loads_what_the_cache_holds(published: Published, switch: dict[str, Any]) -> None:
    """Either switch will do; what the cache does not hold is an error that names the switch's effect."""
    settings = {key: value for key, value in switch.items() if key.isupper()}
    arguments = {key: value for key, value in switch.items() if not key.isupper()}
    labels = ["all-formats", "pickle", "shards", "branch"]
    calls = [call | arguments for call in (*(LOADED[label] for label in labels), REFUSED["private"])]
    before = len(published.hub.requests)
    *warm, cold = call_load_model(published.hub.url, published.home, *calls, **settings)
    assert published.hub.requests[before:] == []
    for label, outcome in zip(labels, warm, strict=True):
        outcome.assert_logits_of(published.references[label])
    cold.assert_error("ConnectionError", "tester/private", "not in the hub's cache", "switched off")


def test_offline_a_cache_that_another_program_filled_in_part_is_used(published: Published, tmp_path: Path) -> None:
    """It left out the tokenizer's files, and in a second cache the weights too."""
    fetch = "from huggingface_hub import snapshot_download as fetch; fetch('tester/all-formats', allow_patterns={})"
    call = LOADED["all-formats"] | {"local_files_only": True}
    for home, more in ((tmp_path / "weights", ["model.safetensors"]), (tmp_path / "config", [])):
        environ = environment(published.hub.url, home)
        subprocess.run(
            [sys.executable, "-c", fetch.format(["config.json", *more])], env=environ, check=True, capture_output=True
        )
    (weights,) = call_load_model(published.hub.url, tmp_path / "weights", call)
    weights.assert_logits_of(published.references["all-formats"])
    (config,) = call_load_model(published.hub.url, tmp_path / "config", call)
    config.assert_error(
        "FileNotFoundError", "tester/all-formats", "expected weights (model.safetensors,", "got config.json"
    )


def test_without_a_connection_the_cache_is_used(published: Published) -> None:
    """Without any switch; what the cache does not hold is an error that gives the cause."""
    with Hub() as gone:
        pass
    calls = [LOADED["all-formats"], LOADED["pickle"], REFUSED["private"]]
    safetensors, pickle, cold = call_load_model(gone.url, published.home, *calls)
    safetensors.assert_logits_of(published.references["all-formats"])
    pickle.assert_logits_of(published.references["pickle"])
    cold.assert_error(
        "ConnectionError", "tester/private", "no such folder", "cannot be reached", "no copy", "Check the"
    )


BAD = {
    "hang": ("info", "hang", "timed out"),
    "drip": ("info", "drip", "almost nothing has come for 3 seconds"),
    "endless": ("info", "endless", "its list of files has no end"),
    "page": ("info", "page", "its answer is not a hub's"),
    "busy": ("tree", "busy", "status 429, it asks to wait 3600 seconds"),
    "head": ("HEAD", "hang", "almost nothing has come for 3 seconds"),
    "body": ("GET", "stall", "almost nothing has come for 3 seconds"),
}
SHORT = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}


def test_a_hub_that_is_slow_or_sends_without_end_is_one_line_in_seconds(tmp_path: Path) -> None:
    """Within huggingface_hub's own time limits, not after its retries; and a copy in the cache is used."""
    model = build_reference("125m", seed=1)
    files = files_of(model, tmp_path / "files")
    with Hub() as hub:
        calls = []
        for label, (where, how, _) in BAD.items():
            hub.add(f"tester/{label}", files)
            hub.misbehave(f"tester/{label}", where, how)
            calls.append({"name_or_path": f"tester/{label}"})
        hub.add("tester/cached", files)
        cached = {"name_or_path": "tester/cached"}
        (first,) = call_load_model(hub.url, tmp_path / "home", cached)
        hub.misbehave("tester/cached", "info", "hang")
        begun = time.monotonic()
        *outcomes, again = call_load_model(hub.url, tmp_path / "home", *calls, cached, **SHORT)
        seconds = time.monotonic() - begun
    for label, outcome in zip(BAD, outcomes, strict=True):
        outcome.assert_error("ConnectionError", f"tester/{label}", "hub", BAD[label][2])
    first.assert_logits_of(model)
    again.assert_logits_of(model)
    assert seconds < 90  # with huggingface_hub's own limits, the first alone would not end


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x.pt", "no such file. Check the path."),
        ("out/model.safetensors", "no such file. Check the path."),
        ("C:\\models\\opt", "no such folder, and not the name"),
        ("models/opt/125m", "no such folder, and not the name"),
        ("./opt-125m", "no such folder, and not the name"),
        ("opt-125m", "no such folder, and a name on the hub has an owner. Did you mean facebook/opt-125m?"),
        ("Galactica-125m", "no such folder, and a name on the hub has an owner. Did you mean facebook/galactica-125m?"),
    ],
)  # fmt: skip
def test_a_name_that_is_a_path_or_lacks_its_owner_is_said_so_and_nobody_is_asked(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError) as error:
        find_model(name)
    assert str(error.value).startswith(f"{name}: {said}")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudoterminal")
def test_a_terminal_shows_that_the_hub_is_contacted_and_a_misspelt_name_is_mended(tmp_path: Path) -> None:
    """Into a file nothing is written but the error."""
    import pty

    with Hub() as hub:
        command = [sys.executable, "-m", "minopt", "generate", "abc", "--model", "facebok/opt-125M"]
        terminal, stderr = pty.openpty()
        subprocess.run(command, env=environment(hub.url, tmp_path), stderr=stderr, check=False)
        os.close(stderr)
        shown = os.read(terminal, 10_000).decode().splitlines()
        os.close(terminal)
        piped = run_generate(hub.url, tmp_path, "--model", "facebok/opt-125M").stderr.splitlines()
    assert shown[0] == f"minopt: facebok/opt-125M: contacting the hub ({hub.url})"
    assert shown[1:] == piped
    assert piped[0].endswith("Did you mean facebook/opt-125m?")


def test_what_is_cached_is_not_fetched_again(published: Published) -> None:
    """A second call asks what main is, and for no file."""
    before = len(published.hub.requests)
    for outcome in call_load_model(published.hub.url, published.home, LOADED["all-formats"], LOADED["pickle"]):
        assert not outcome.message
    assert not any("/resolve/" in request.path for request in published.hub.requests[before:])


def test_a_download_that_was_cut_goes_on_where_it_stopped(
    write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """By itself or, where huggingface_hub gives up, with the next call: the first then fails in one line."""
    folder = write_checkpoint(hidden_size=512, vocab_size=6000)
    assert (folder / "model.safetensors").stat().st_size > 2 * WRITTEN_BYTES
    call = {"name_or_path": "tester/large"}
    with Hub() as hub:
        hub.add("tester/large", folder)
        hub.cut("tester/large", "model.safetensors")
        first, second = call_load_model(hub.url, tmp_path / "home", call, call)
        first_range, *more_ranges = hub.ranges("tester/large", "model.safetensors")
    if first.message:
        first.assert_error("ConnectionError", "tester/large", "connection to the hub failed", "Try again")
    assert first_range is None
    assert len(more_ranges) == 1
    assert int(more_ranges[0].removeprefix("bytes=").removesuffix("-")) >= WRITTEN_BYTES
    assert (Path(second.folder) / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_connection_that_is_reset_is_one_line_and_the_next_call_completes(
    write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """What had come whole is kept; without a connection, what is there is not taken for the model."""
    folder = write_checkpoint(max_shard_size="20KB")
    call = {"name_or_path": "tester/model"}
    reference = build_reference("125m")
    with Hub() as hub:
        hub.add("tester/model", folder)
        hub.cut("tester/model", "model.safetensors", reset=True)
        calls = [call, call | {"local_files_only": True}, call]
        broken, partial, whole = call_load_model(hub.url, tmp_path / "home", *calls)
        fetched = hub.fetched("tester/model")
    broken.assert_error("ConnectionError", "tester/model", "connection to the hub failed", "Try again")
    assert {"ConnectionError", "FileNotFoundError"} & set(partial.kinds)  # by huggingface_hub's version
    whole.assert_logits_of(reference)
    assert fetched.count("config.json") == 1


def test_a_cache_that_cannot_be_written_is_not_blamed_on_the_hub(published: Published, tmp_path: Path) -> None:
    """The system's own error comes through, with the path in it."""
    home = tmp_path / "home"
    home.write_text("a file where HF_HOME should be")
    (outcome,) = call_load_model(published.hub.url, home, LOADED["all-formats"])
    assert "OSError" in outcome.kinds
    assert "ConnectionError" not in outcome.kinds
    assert str(home) in outcome.message


def test_the_command_line_generates_from_a_name(published: Published, tmp_path: Path) -> None:
    """Fetching tokenizer and model into ``HF_HOME``."""
    process = run_generate(published.hub.url, tmp_path, "--model", "tester/all-formats", "--max-new-tokens", "4")
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip()
    assert (tmp_path / "hub" / "models--tester--all-formats").is_dir()


def test_the_command_line_reports_an_unknown_name_in_one_line(published: Published, tmp_path: Path) -> None:
    """With exit code 2, and no traceback."""
    process = run_generate(published.hub.url, tmp_path, "--model", "tester/unknown")
    assert (process.returncode, process.stdout) == (2, "")
    (line,) = process.stderr.splitlines()
    assert line.startswith("minopt: error: tester/unknown: no such folder, and no such model on the hub")


def test_a_plan_fetches_a_configuration_and_nothing_else(write_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_checkpoint(dtype=torch.float16)
    with Hub() as hub:
        hub.add("tester/planned", {path.name: path.read_bytes() for path in folder.iterdir()})
        hub.add("tester/bare", {"model.safetensors": b"not looked at"})
        outcomes = []
        for name in ("tester/planned", "tester/bare"):
            command = [sys.executable, "-m", "minopt", "plan", name, "--memory", "2GB", "--device", "cuda"]
            outcomes.append(subprocess.run(command, env=environment(hub.url, tmp_path / "home"), capture_output=True,
                                           encoding="utf-8", check=False))  # fmt: skip
        assert hub.fetched("tester/planned") == ["config.json"]
        assert hub.fetched("tester/bare") == []
    planned, bare = outcomes
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.startswith("tester/planned as float16, 1 x 64 tokens")
    assert bare.returncode == 2
    said = "minopt: error: tester/bare: expected a config.json, the hub has none there. Name a size."
    assert bare.stderr.splitlines()[-1] == said  # the library tells of the download before
