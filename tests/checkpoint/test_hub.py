"""Models by their names on the hub: what is fetched, what is kept, and what is said when it fails.

The hub is the one of hub_server.py. huggingface_hub reads its settings when it is imported, so each scenario is a
process of its own; calls that share their settings share one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
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
TOKENIZER_FILES = {name: name.encode() for name in TEXT_FILES[2:]}  # one blob each
OTHER_FILES = dict.fromkeys(
    ["README.md", "flax_model.msgpack", "tf_model.h5", "rust_model.ot", "original/model.safetensors"], b"not wanted"
)
WRITTEN_BYTES = 10 * 2**20  # by huggingface_hub at a time: what is cut before that is lost
TOKEN = "hf_of_the_test"

# Makes each of the calls given as JSON, and prints as JSON what came of it: logits and folder, or the error.
SCRIPT = f"""
import json, sys, time
import torch
import minopt
from minopt.checkpoint.hub import find_model

def peak_bytes():
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

for call in json.loads(sys.argv[1]):
    begun = time.monotonic()
    try:
        logits = torch.tensor([])
        if "config_only" not in call:
            with torch.inference_mode():
                logits = minopt.load_model(**call, device="cpu")(torch.tensor({INPUT_IDS}))
            call |= {{"local_files_only": True}}
        print(json.dumps({{"logits": logits.tolist(), "folder": str(find_model(**call))}}))
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        costs = {{"seconds": time.monotonic() - begun, "peak_bytes": peak_bytes()}}
        print(json.dumps({{"kinds": kinds, "message": str(error)}} | costs))
"""


@dataclass
class Outcome:
    """What came of one call: ``logits`` and ``folder``, or the ``message`` of an error, its classes and its costs."""

    logits: Any = None
    folder: str = ""
    kinds: tuple[str, ...] = ()
    message: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0

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
AGAIN = {f"{label} again": LOADED[label] | more for label in ("all-formats", "pickle", "shards", "branch")
         for more in ({}, {"local_files_only": True})}  # fmt: skip
# A call, the error's kind, and what it says behind the model's name.
REFUSED: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "unknown": ({}, "FileNotFoundError", ["no such folder", "no such model on the hub"]),
    "not--a--name": ({}, "FileNotFoundError", ["not a name on the hub"]),
    "private": ({}, "FileNotFoundError", ["private", "hf auth login"]),
    "gated": ({}, "PermissionError", ["Accept the terms", "hf auth login"]),
    "pickle": ({"revision": "no-such-branch"}, "FileNotFoundError", ["no revision 'no-such-branch'"]),
    "no-model": ({}, "FileNotFoundError", ["expected weights (model.safetensors,", "got nothing from"]),
    "no-weights": ({}, "FileNotFoundError", ["expected weights (model.safetensors,", "got config.json from"]),
    "forbidden": ({}, "PermissionError", ["another login", "403", "hf auth login"]),
    "out-of-order": ({}, "ConnectionError", ["the hub refused", "500", "Try again"]),
    "silent": ({}, "ConnectionError", ["the connection to the hub failed", "disconnected", "Check the name and the"]),
    "never-fetched": ({"local_files_only": True}, "ConnectionError", ["not in the hub's cache", "switched off"]),
    "bare": ({"config_only": True}, "FileNotFoundError", ["expected a config.json, the hub has none there"]),
}


def call_of(name: str) -> dict[str, Any]:
    return {"name_or_path": f"tester/{name}"} | REFUSED[name][0]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    """The hub, with LOADED, AGAIN, a plan and REFUSED asked for in turn, in one process without a token."""
    folder = tmp_path_factory.mktemp("published")
    references = {"all-formats": build_reference("125m", seed=1), "pickle": build_reference("350m", seed=2),
                  "shards": build_reference("galactica", seed=3), "branch": build_reference("125m", seed=4),
                  "commit": build_reference("125m", seed=5)}  # fmt: skip
    files = {
        label: files_of(reference, folder / label, max_shard_size="20KB" if label == "shards" else "1GB")
        for label, reference in references.items()
    }
    references |= {"old-name": references["all-formats"], "pickled-shards": references["shards"]}
    references |= {"metaseq": references["pickle"], "metaseq-parts": references["commit"]}
    references |= {label: references[label.removesuffix(" again")] for label in AGAIN}
    wrong_pickle = {"pytorch_model.bin": b"not wanted"}
    (singleton,) = write_metaseq(folder / "singleton", references["metaseq"], stem="restored")
    parts = write_metaseq(folder / "parts", references["metaseq-parts"], parts=2)
    with Hub() as hub:
        hub.add("tester/all-formats", files["all-formats"] | wrong_pickle | TOKENIZER_FILES | OTHER_FILES)
        hub.add("tester/pickle", as_pickles(files["pickle"], folder / "pickle") | TOKENIZER_FILES | OTHER_FILES)
        hub.add("tester/shards", files["shards"] | OTHER_FILES)
        hub.add("tester/pickled-shards", as_pickles(files["shards"], folder / "shards") | OTHER_FILES)
        commit = hub.add("tester/history", files["commit"])
        hub.add("tester/history", files["branch"], ref="tries/second")
        hub.add("tester/history", files["all-formats"])
        hub.add("old-name", files["all-formats"])
        hub.add("tester/private", files["all-formats"], token=TOKEN)
        hub.add("tester/gated", files["all-formats"], token=TOKEN, gated=True)
        hub.add("tester/planned", files["pickle"])
        hub.add("tester/bare", {"model.safetensors": b"not wanted"})
        hub.add("tester/never-fetched", files["all-formats"])
        hub.add("tester/no-model", {"README.md": b"", "data.csv": b""})
        hub.add("tester/no-weights", {"config.json": files["pickle"]["config.json"]} | OTHER_FILES)
        hub.add("tester/metaseq", {"model/restored.pt": singleton.read_bytes(), "dict.txt": b""} | TOKENIZER_FILES)
        hub.add("tester/metaseq-parts", {path.name: path.read_bytes() for path in parts} | {"README.md": b""})
        hub.answer_only("tester/forbidden", 403)
        hub.answer_only("tester/out-of-order", 500)
        hub.answer_only("tester/silent", 0)
        plan = {"name_or_path": "tester/planned", "config_only": True}
        calls = LOADED | {"commit": LOADED["commit"] | {"revision": commit}} | AGAIN | {"plan": plan}
        calls |= {f"refused {name}": call_of(name) for name in REFUSED}
        home = tmp_path_factory.mktemp("home")
        outcomes = dict(zip(calls, call_load_model(hub.url, home, *calls.values()), strict=True))
        fetched = {name: hub.fetched(name) for name in hub.repositories}
        yield Published(hub, references, home, outcomes, fetched)


@pytest.mark.parametrize("label", [*LOADED, *AGAIN])
def test_what_is_published_in_any_format_is_loaded_and_what_is_cached_is_loaded_again(
    label: str, published: Published
) -> None:
    """A name without owner is one of the hub's oldest; weights of other revisions differ."""
    published.assert_loaded(label)


@pytest.mark.parametrize(
    ("label", "weights"),
    [
        ("all-formats", ["model.safetensors"]),
        ("pickle", ["pytorch_model.bin"]),
        ("shards", "model"),
        ("pickled-shards", "pytorch_model"),
        ("metaseq", ["model/restored.pt"]),
        ("metaseq-parts", ["reshard-model_part-0.pt", "reshard-model_part-1.pt"]),
        ("planned", []),
        ("bare", []),
    ],
)
def test_safetensors_are_preferred_and_each_file_is_fetched_once_and_no_others(
    label: str, weights: str | list[str], published: Published
) -> None:
    """The repositories also have flax_model.msgpack, tf_model.h5 and the like; a plan needs a configuration only."""
    repository = published.hub.repositories[f"tester/{label}"]
    files = repository.commits[repository.refs["main"]]
    if isinstance(weights, str):
        weights = [name for name in files if name.startswith(weights)]
        assert len(weights) > 3
    texts = ["config.json"] if label == "planned" else TEXT_FILES
    assert published.fetched[f"tester/{label}"] == sorted([*weights, *(name for name in texts if name in files)])


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_one_line_that_names_the_model(name: str, published: Published) -> None:
    """With the kind of error that ``find_model`` promises."""
    _, kind, parts = REFUSED[name]
    published.outcomes[f"refused {name}"].assert_error(kind, f"tester/{name}", *parts)
    assert published.fetched.get("tester/never-fetched") == []


def test_hf_token_opens_private_and_gated_models(published: Published, tmp_path: Path) -> None:
    """The token is huggingface_hub's to find; it is passed on."""
    calls = [call_of("private"), call_of("gated")]
    for outcome in call_load_model(published.hub.url, tmp_path, *calls, HF_TOKEN=TOKEN):
        outcome.assert_logits_of(published.references["all-formats"])
        assert Path(outcome.folder).is_relative_to(tmp_path / "hub")


def test_offline_nobody_is_asked_and_what_another_program_has_cached_is_used(
    published: Published, tmp_path: Path
) -> None:
    """It left out the tokenizer's files, and of a second model the weights too."""
    fetch = (
        "from huggingface_hub import snapshot_download as fetch\n"
        "fetch('tester/all-formats', allow_patterns=['config.json', 'model.safetensors'])\n"
        "fetch('tester/pickle', allow_patterns=['config.json'])"
    )
    environ = environment(published.hub.url, tmp_path)
    subprocess.run([sys.executable, "-c", fetch], env=environ, check=True, capture_output=True)
    before = len(published.hub.requests)
    calls = [LOADED["all-formats"], LOADED["pickle"], call_of("private")]
    weights, config, cold = call_load_model(published.hub.url, tmp_path, *calls, HF_HUB_OFFLINE="1")
    assert published.hub.requests[before:] == []
    weights.assert_logits_of(published.references["all-formats"])
    config.assert_error("FileNotFoundError", "tester/pickle", "expected weights (model.safetensors,", "config.json")
    cold.assert_error("ConnectionError", "tester/private", "not in the hub's cache", "switched off")


def test_without_a_connection_the_cache_is_used(published: Published) -> None:
    """Without any switch; what the cache does not hold is an error that gives the cause."""
    with Hub() as gone:
        pass
    calls = [LOADED["all-formats"], LOADED["pickle"], call_of("private")]
    safetensors, pickle, cold = call_load_model(gone.url, published.home, *calls)
    safetensors.assert_logits_of(published.references["all-formats"])
    pickle.assert_logits_of(published.references["pickle"])
    cold.assert_error("ConnectionError", "tester/private", "no such folder", "the connection to the hub failed")


# What is answered badly, how, and what the error says.
BAD = {
    "hang": ("info", "hang", "timed out"),
    "page": ("info", "page", "its answer is not a hub's"),
    "drip": ("info", "drip", "almost nothing has come for 3 seconds"),
    "endless": ("info", "endless", "its list of files has no end"),
    "bomb": ("info", "bomb", "its list of files has no end"),
    "packed": ("info", "packed", "compressed in a way that was not asked for"),
    "pages": ("tree", "pages", "its list of files has no end"),
    "busy": ("tree", "busy", "status 429, it asks to wait 3600 seconds"),
    "late": ("tree", "late", "status 429, it asks to wait 3600 seconds"),
    "head": ("HEAD", "hang", "almost nothing has come for 3 seconds"),
    "stall": ("GET", "stall", "almost nothing has come for 3 seconds"),
    "away": ("GET", "away", "almost nothing has come for 3 seconds"),
    "large": ("", "", "config.json is larger than 20,000,000 bytes"),
}


def test_a_hub_that_is_slow_or_sends_without_end_is_one_line_in_seconds_and_a_copy_in_the_cache_is_used(
    published: Published,
) -> None:
    """With a token that is not valid, which the hub says."""
    hub = published.hub
    for label, (where, how, _) in BAD.items():
        config = bytes(21_000_000) if label == "large" else b"{}"
        hub.add(f"tester/{label}", {"config.json": config, "model.safetensors": b"{}"})
        hub.misbehave(f"tester/{label}", where, how)
    hub.misbehave("tester/shards", "info", "drip")
    calls = [*({"name_or_path": f"tester/{label}"} for label in BAD), LOADED["shards"], call_of("private")]
    settings = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_TOKEN": "hf_of_yesterday"}
    *outcomes, cached, private = call_load_model(hub.url, published.home, *calls, **settings)
    for label, outcome in zip(BAD, outcomes, strict=True):
        outcome.assert_error("ConnectionError", f"tester/{label}", "hub failed", "Check the name", BAD[label][2])
        assert outcome.seconds < 15, label  # huggingface_hub's own limits and retries take minutes
    assert outcomes[-1].peak_bytes - outcomes[0].peak_bytes < 150e6
    cached.assert_logits_of(published.references["shards"])
    private.assert_error("PermissionError", "tester/private", "Invalid credentials", "hf auth login")


def test_a_download_that_was_cut_or_reset_goes_on_and_what_has_come_is_not_taken_for_the_model(
    write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """By itself or, where huggingface_hub gives up, with the next call: the first then fails in one line."""
    large = write_checkpoint(name="large", hidden_size=512, vocab_size=6000)
    weights = (large / "model.safetensors").read_bytes()
    assert len(weights) > 2 * WRITTEN_BYTES
    cut, reset = {"name_or_path": "tester/cut"}, {"name_or_path": "tester/reset"}
    with Hub() as hub:
        hub.add("tester/cut", large)
        hub.cut("tester/cut", "model.safetensors")
        hub.add("tester/reset", write_checkpoint(max_shard_size="20KB"))
        hub.cut("tester/reset", "model.safetensors", reset=True)
        calls = [cut, cut, reset, reset | {"local_files_only": True}, reset]
        first, second, broken, partial, whole = call_load_model(hub.url, tmp_path / "home", *calls)
        first_range, *more_ranges = hub.ranges("tester/cut", "model.safetensors")
        fetched = hub.fetched("tester/reset")
    if first.message:
        first.assert_error("ConnectionError", "tester/cut", "connection to the hub failed", "try again")
    assert first_range is None
    assert len(more_ranges) == 1
    assert int(more_ranges[0].removeprefix("bytes=").removesuffix("-")) >= WRITTEN_BYTES
    assert (Path(second.folder) / "model.safetensors").read_bytes() == weights
    broken.assert_error("ConnectionError", "tester/reset", "connection to the hub failed", "try again")
    assert {"ConnectionError", "FileNotFoundError"} & set(partial.kinds)  # by huggingface_hub's version
    whole.assert_logits_of(build_reference("125m"))
    assert fetched.count("config.json") == 1


def test_a_cache_that_cannot_be_written_is_not_blamed_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> str:
        raise OSError(28, "No space left on device", "/home/of/a/user/blob")

    described = SimpleNamespace(siblings=[])
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: described)
    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: '/home/of/a/user/blob'$"):
        find_model("tester/model")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x.pt", "no such file. Check the path."),
        ("out/model.safetensors", "no such file. Check the path."),
        ("C:\\models\\opt", "no such folder, and not the name"),
        ("models/opt/125m", "no such folder, and not the name"),
        ("./opt-125m", "no such folder, and not the name"),
        ("opt-125m", "no such folder, and a name on the hub is owner/name. Did you mean facebook/opt-125m?"),
        (
            "Galactica-125m",
            "no such folder, and a name on the hub is owner/name. Did you mean facebook/galactica-125m?",
        ),
    ],
)
def test_a_name_that_is_a_path_or_lacks_its_owner_is_said_so_and_nobody_is_asked(
    name: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError) as error:
        find_model(name)
    assert str(error.value).startswith(f"{name}: {said}")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudoterminal")
def test_a_terminal_shows_that_the_hub_is_contacted_and_a_misspelt_name_is_mended(
    published: Published, tmp_path: Path
) -> None:
    """In one line, with exit code 2."""
    import pty

    command = [sys.executable, "-m", "minopt", "generate", "abc", "--model", "facebok/opt-125M"]
    terminal, stderr = pty.openpty()
    environ = environment(published.hub.url, tmp_path)
    assert subprocess.run(command, env=environ, stderr=stderr, check=False).returncode == 2
    os.close(stderr)
    contacted, error = os.read(terminal, 10_000).decode().splitlines()
    os.close(terminal)
    assert contacted == f"minopt: facebok/opt-125M: contacting the hub ({published.hub.url})"
    assert error.startswith("minopt: error: facebok/opt-125M: no such folder, and no such model on the hub")
    assert error.endswith("Did you mean facebook/opt-125m?")
