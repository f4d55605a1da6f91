"""From a name to a folder on this machine, by way of the Hugging Face hub where it is not one already."""

from __future__ import annotations

import logging
import re
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from minopt.checkpoint.divided import METADATA
from minopt.checkpoint.errors import MissingFileError, first_line, some
from minopt.checkpoint.find import LAYOUTS, METASEQ, PICKLES, SAFETENSORS, check_link, no_weights, parts_of
from minopt.checkpoint.hub_watch import HubWatch
from minopt.config import PRESETS
from minopt.progress import say_on_terminal
from minopt.strangers import unfinished_run

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_TEXT_FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
               "merges.txt", "added_tokens.json", "special_tokens_map.json", "gpt2-vocab.json", "gpt2-merges.txt",
               "gpt2-unified.json", "adapter_config.json"]  # fmt: skip

# "owner/name", or the name alone of one of the hub's oldest models.
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

_FILE_SUFFIXES = (".pt", ".pt2", ".pth", ".bin", ".ckpt", ".safetensors", ".json", ".txt")

# By what they are called, in full and in short; 175b is not there.
_PUBLISHED = {key: f"facebook/{name}" for name in PRESETS if name != "opt-175b" for key in (name, f"facebook/{name}")}

logger = logging.getLogger(__name__)


def find_model(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    config_only: bool = False,
) -> Path:
    """Where a model lies: a local folder or file, or the folder of it in the hub's cache, filled first if need be.

    Args:
        name_or_path: see ``minopt.load_model``.
        revision: branch, tag or commit on the hub.
        local_files_only: ask nobody.
        config_only: fetch a config.json and nothing else.

    Raises:
        FileNotFoundError: if there is no such folder or repository, or no model in it.
        ValueError: if a folder holds several models, or is asked for a revision.
        PermissionError: if the hub wants another login.
        ConnectionError: if the hub cannot be reached and the cache has no copy, or a download breaks off.
    """
    if not isinstance(name_or_path, (str, Path)):
        raise ValueError(
            f"model: expected a folder or a name on the hub, got {type(name_or_path).__name__}. Save a model first: "
            "minopt.save_model(model, folder)."
        )
    if name_or_path == "":
        raise FileNotFoundError("model: no such folder: expected a folder or a name on the hub, got an empty text.")
    try:
        path = Path(name_or_path).expanduser()
    except RuntimeError:  # ~name of nobody
        path = Path(name_or_path)
    if path.exists() and revision is not None:
        raise ValueError(f"{path}: what lies on this machine has no revisions, got {revision!r}. Leave revision out.")
    if path.is_dir():
        return _model_folder(path)
    check_link(path)
    if path.exists() or parts_of(path) is not None:
        is_program = path.name in ("program.pt2", "manifest.json")
        return path.parent if is_program and (path.parent / "manifest.json").is_file() else path
    if path.suffix.lower() in _FILE_SUFFIXES:
        raise FileNotFoundError(f"{name_or_path}: no such file. Check the path.")
    if isinstance(name_or_path, Path) or not _HUB_NAME.fullmatch(name_or_path):
        raise FileNotFoundError(f"{name_or_path}: no such folder, and not the name of a model on the hub (owner/name).")
    if name_or_path.lower() in PRESETS:
        raise FileNotFoundError(f"{name_or_path}: no such folder, and a name on the hub has an owner."
                                f"{_meant(name_or_path)}")  # fmt: skip
    if config_only:
        folder, _ = _snapshot(name_or_path, revision, local_files_only, ["config.json"])
        if not (folder / "config.json").is_file():
            raise MissingFileError(f"{name_or_path}: expected a config.json, the hub has none there. Name a size.")
        return folder
    return _download(name_or_path, revision, local_files_only)


def _meant(name: str) -> str:
    """A question about a published name that is like another one."""
    like = get_close_matches(name.lower(), _PUBLISHED, n=1, cutoff=0.8)
    return f" Did you mean {_PUBLISHED[like[0]]}?" if like and _PUBLISHED[like[0]] != name else ""


def _model_folder(path: Path) -> Path:
    """``path`` if it is a model's folder, else the only one in it (a training run's parent, say)."""
    if _is_model(path):
        return path
    inner = [p for p in sorted(path.glob("[!.]*/")) if _is_model(p)]
    if len(inner) > 1:
        raise ValueError(f"{path}: holds {len(inner)} models ({some([p.name for p in inner])}). Name one of them.")
    if not inner or unfinished_run(path) is not None:
        raise no_weights(path)
    return inner[0]


def _is_model(folder: Path) -> bool:
    return (
        any((folder / name).is_file() for name in ("config.json", METADATA))
        or _has_weights(folder)
        or any(folder.glob(METASEQ[0]))
    )


def _download(name: str, revision: str | None, local_files_only: bool) -> Path:
    """Fetches safetensors if the repository has them, else pickles, else metaseq's files; nothing else's weights."""
    for patterns in (SAFETENSORS, PICKLES):
        folder, local_files_only = _snapshot(name, revision, local_files_only, [*_TEXT_FILES, *patterns])
        if _has_weights(folder):
            break
    else:
        folder, _ = _snapshot(name, revision, local_files_only, [*_TEXT_FILES, *METASEQ, f"*/{METASEQ[0]}"])
    if _has_weights(folder) or list(folder.glob(METASEQ[0])) or list(folder.glob(f"*/{METASEQ[0]}")):
        return _model_folder(folder)
    raise no_weights(folder, name)


def _has_weights(folder: Path) -> bool:
    return any((folder / layout).is_file() for layout in LAYOUTS)


def _snapshot(name: str, revision: str | None, local_files_only: bool, patterns: list[str]) -> tuple[Path, bool]:
    """The folder in the cache, filled if the hub can be asked, and whether it is no use to ask it again."""
    from huggingface_hub import constants  # 190 ms to import, and only needed here

    if local_files_only or constants.HF_HUB_OFFLINE:
        hint = "asking the hub is switched off. Load it once with a connection."
        return _cached(name, revision, patterns, f"{name}: not in the hub's cache, and {hint}"), True
    say_on_terminal(f"minopt: {name}: contacting the hub ({constants.ENDPOINT})")
    watch = HubWatch()
    try:
        folder = _fetched(name, revision, patterns, watch)
    except _UnreachableError as error:
        hint = f"the hub cannot be reached ({error}), and its cache has no copy. Check the name and the connection."
        folder = _cached(name, revision, patterns, f"{name}: no such folder, {hint}")
    if watch.asked and not watch.answered:
        logger.warning("%s: the hub does not answer; the copy in its cache is used.", name)
    return folder, not watch.answered


class _UnreachableError(Exception):
    """The hub has not described a model."""


def _cached(name: str, revision: str | None, patterns: list[str], otherwise: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))
    except HFValidationError as error:
        raise FileNotFoundError(f"{name}: no such folder, and not a name on the hub ({error}).") from None
    except LocalEntryNotFoundError as error:
        if incomplete := getattr(error, "snapshot_path", None):
            return Path(incomplete)  # lacks something that was listed: what that is, the reader of the folder says
        raise ConnectionError(otherwise + _meant(name)) from None


def _fetched(name: str, revision: str | None, patterns: list[str], watch: HubWatch) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        with watch:
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise PermissionError(
            f"{name}: its owners want to be asked first. Accept the terms on its page, then log in: hf auth login."
        ) from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"{name}: no such folder, and no such model on the hub (or it is private: log in with hf auth login)."
            f"{_meant(name)}"
        ) from None
    except RevisionNotFoundError:
        raise FileNotFoundError(
            f"{name}: no revision {revision!r} on the hub. Use a branch, a tag or a commit."
        ) from None
    except HFValidationError as error:
        raise FileNotFoundError(f"{name}: no such folder, and not a name on the hub ({error}).") from None
    except Exception as error:  # what an answer that is none of a hub's makes of huggingface_hub is of any kind
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
        if isinstance(cause, HfHubHTTPError) and watch.reason is None:
            raise _refusal(name, cause) from None
        if isinstance(error, OSError) and error.errno is not None and watch.reason is None:
            raise  # the disk's: full, or not to be written
        reason = first_line(cause or error)
        if not isinstance(error, (OSError, HfHubHTTPError.__bases__[0])):  # the HTTPError of httpx, or of httpx2
            reason = f"its answer is not a hub's: {reason}"
        reason = watch.reason or reason
        if not watch.files_asked:
            raise _UnreachableError(reason) from None
        raise ConnectionError(f"{name}: the connection to the hub failed ({reason}). Try again.") from None


def _refusal(name: str, error: HfHubHTTPError) -> OSError:
    """What the hub's "no" means: another login at 401 and 403, its own trouble otherwise."""
    status = error.response.status_code
    reason = f"{status}: {(error.server_message or first_line(error)).splitlines()[0]}"
    if status in (401, 403):
        return PermissionError(f"{name}: the hub wants another login ({reason}). Log in: hf auth login.")
    return ConnectionError(f"{name}: the hub refused ({reason}). Try again later.")
