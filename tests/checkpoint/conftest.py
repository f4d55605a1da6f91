"""What the tests of hostile files share: where one is written, who loads it, what must not happen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import Tensor

from minopt.checkpoint.names import HF_HEAD, from_hf
from tests.checkpoint.hostile_files import CANARY, Weights, as_metaseq, metaseq_file
from tests.checkpoint.watched_loads import MOST_BYTES, MOST_SECONDS, Report, WatchedLoads, digest
from tests.conftest import build_reference

EMBEDDINGS = "model.decoder.embed_tokens.weight"
FC1, FC2 = "model.decoder.layers.0.fc1.weight", "model.decoder.layers.0.fc2.weight"
BIAS = "model.decoder.layers.0.fc2.bias"

# What a case may come to. WHOLE: right weights or refused; ANY: whatever weights or refused.
REFUSED, LOADED, WHOLE, ANY = {"refused"}, {"loaded"}, {"loaded", "refused"}, {"loaded", "refused", "other weights"}

BIN, METASEQ, SAFE = "pytorch_model.bin", "reshard.pt", "model.safetensors"

CONTAINERS = pytest.mark.parametrize("container", ["zip", "legacy"])


@dataclass(frozen=True)
class Place:
    """A folder without weights, the weights that belong there, and what shows that something ran."""

    folder: Path
    tensors: dict[str, Tensor]
    marker: Path

    def weights(self, container: str = "zip") -> Weights:
        """The weights as Hugging Face names them."""
        return Weights(self.tensors, legacy=container == "legacy")

    def metaseq(self, container: str = "zip") -> Weights:
        """The weights as metaseq names them."""
        return Weights(as_metaseq(self.tensors), legacy=container == "legacy")

    def expected(self) -> str:
        """The digest of the right weights."""
        return digest((str(from_hf(key)), tensor) for key, tensor in self.tensors.items() if key != HF_HEAD)


@dataclass(frozen=True)
class Sample:
    """What all places share."""

    folder: Path
    tensors: dict[str, Tensor]


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """A model small enough to be written hundreds of times."""
    small = {"num_hidden_layers": 1, "hidden_size": 16, "ffn_dim": 32, "vocab_size": 40, "max_position_embeddings": 12}
    reference = build_reference("125m", **small)
    folder = tmp_path_factory.mktemp("sample") / "model"
    reference.save_pretrained(folder)
    return Sample(folder, {key: tensor.contiguous() for key, tensor in reference.state_dict().items()})


@pytest.fixture(scope="session")
def search_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the one module that only files name."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / f"{CANARY}.py").write_text("class Anything:\n    pass\n\n\nclass RareStorage:\n    pass\n")
    return folder


@pytest.fixture(scope="session")
def warm_up(sample: Sample, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A folder of each kind, and one that is refused."""
    folders = []
    weights, metaseq = Weights(sample.tensors), Weights(as_metaseq(sample.tensors))
    files = {
        BIN: weights.file(weights.state_dict()),
        METASEQ: metaseq_file(metaseq),
        SAFE: (sample.folder / SAFE).read_bytes(),
        f"not/{BIN}": b"PK",
    }
    for file, content in files.items():
        folder = tmp_path_factory.mktemp("warm")
        path = folder / Path(file).name
        path.write_bytes(content)
        (folder / "config.json").write_text((sample.folder / "config.json").read_text())
        folders.append(folder)
    return folders


@pytest.fixture(scope="session")
def watched(search_path: Path, warm_up: list[Path]) -> Iterator[WatchedLoads]:
    """The process that loads by minopt."""
    loads = WatchedLoads(search_path, warm_up)
    yield loads
    loads.close()


@pytest.fixture(scope="session")
def unguarded(search_path: Path, warm_up: list[Path]) -> Iterator[WatchedLoads]:
    """The process that also loads by torch, without its guard."""
    loads = WatchedLoads(search_path, warm_up, unsafe=True)
    yield loads
    loads.close()


@pytest.fixture
def place(tmp_path: Path, sample: Sample) -> Place:
    """A folder with a config.json, into which a test writes weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((sample.folder / "config.json").read_text())
    return Place(folder, sample.tensors, tmp_path / "ran")


def broken_promises(report: Report, allowed: set[str], place: Place, file: str) -> list[str]:
    """What a load did that it must not."""
    outcome = report.outcome
    if outcome == "loaded" and report.digest != place.expected():
        outcome = "other weights"
    wrong = [f"{act}" for act in report.acts]
    if outcome not in allowed:
        expected = " or ".join(sorted(allowed))
        wrong.append(f"{outcome}, expected {expected}: {report.message[:500]} {report.trace}")
    if place.marker.exists():
        wrong.append("ran what the file holds")
    if report.outcome == "refused":
        if file not in report.message and str(place.folder) not in report.message:
            wrong.append(f"the message does not name {file}: {report.message[:500]}")
        if not report.message.isprintable() or len(report.message) > 3000:
            wrong.append(f"no line to print, of {len(report.message)} characters: {report.message[:500]!r}")
    if report.seconds > MOST_SECONDS:
        wrong.append(f"took {report.seconds:.1f} s")
    if report.growth_bytes > MOST_BYTES:
        wrong.append(f"took {report.growth_bytes / 1e6:.0f} MB")
    return wrong


def shown(wrong: dict[str, list[str]]) -> str:
    """Broken promises, by what broke them."""
    return "\n".join(f"{what}: {'; '.join(broken)}" for what, broken in wrong.items())


@dataclass(frozen=True)
class Keep:
    """Writes a file, loads, and says what promises broke."""

    place: Place
    watched: WatchedLoads

    def __call__(self, content: bytes, allowed: set[str], file: str = BIN) -> None:
        if broken := self.broken(content, allowed, file):
            pytest.fail("\n".join(broken), pytrace=False)

    def broken(self, content: bytes, allowed: set[str], file: str = BIN) -> list[str]:
        """The promises that break, without failing."""
        (self.place.folder / file).write_bytes(content)
        broken = broken_promises(self.watched.load(self.place.folder), allowed, self.place, file)
        self.place.marker.unlink(missing_ok=True)
        return broken

    def folder(self, allowed: set[str], file: str) -> None:
        """That a folder which is written already keeps them."""
        if broken := broken_promises(self.watched.load(self.place.folder), allowed, self.place, file):
            pytest.fail("\n".join(broken), pytrace=False)


@pytest.fixture
def keep(place: Place, watched: WatchedLoads) -> Keep:
    """That a file keeps the promises: ``keep(content, allowed, file name)``."""
    return Keep(place, watched)
