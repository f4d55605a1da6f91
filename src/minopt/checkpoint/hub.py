"""From a name to a folder on this machine, downloaded from the Hugging Face hub if it is not there yet."""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path

from minopt.checkpoint.divided import METADATA
from minopt.checkpoint.errors import MissingFileError, first_line, some
from minopt.checkpoint.find import LAYOUTS, METASEQ, PICKLES, SAFETENSORS, check_link, no_weights, parts_of
from minopt.checkpoint.hub_watch import HubWatch
from minopt.config import PRESETS
from minopt.progress import say_on_terminal
from minopt.strangers import MANIFEST, unfinished_run
from minopt.tokenizer import TOKENIZER_FILES

_TEXT_FILES = ("config.json", "generation_config.json", "adapter_config.json", *TOKENIZER_FILES)

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
    """Where a model lies: a local folder or file, or its folder in the hub's cache, downloaded if it is not there yet.

    A hub that sends almost nothing is given up, see ``HubWatch``; then a copy in the cache is used.

    Args:
        name_or_path: see ``minopt.load_model``.
        revision: branch, tag or commit on the hub.
        local_files_only: use only files that are already in the local cache.
        config_only: download a config.json and nothing else.

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
    path = Path(name_or_path)
    with suppress(RuntimeError):  # "~name" of nobody
        path = path.expanduser()
    if path.exists() and revision is not None:
        raise ValueError(f"{path}: a local model has no revisions, got {revision!r}. Leave revision out.")
    if path.is_dir():
        return _model_folder(path)
    check_link(path)
    if path.exists() or parts_of(path) is not None:
        is_program = path.name in ("program.pt2", MANIFEST) and (path.parent / MANIFEST).is_file()
        return path.parent if is_program else path
    name = str(name_or_path)
    if path.suffix.lower() in _FILE_SUFFIXES:
        raise FileNotFoundError(f"{name}: no such file. Check the path.")
    if isinstance(name_or_path, Path) or not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"{name}: no such folder, and not the name of a model on the hub (owner/name).")
    if name.lower() in PRESETS:
        raise FileNotFoundError(f"{name}: no such folder, and a name on the hub is owner/name.{_meant(name)}")
    folder = _find_on_hub(name, revision, local_files_only, config_only)
    if config_only:
        if not (folder / "config.json").is_file():
            raise MissingFileError(f"{name}: expected a config.json, the hub has none there. Name a size.")
        return folder
    if _has_weights(folder) or any(folder.glob(f"*/{METASEQ}")):
        return _model_folder(folder)
    raise no_weights(folder, name)


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
    return any((folder / name).is_file() for name in ("config.json", METADATA)) or _has_weights(folder)


def _has_weights(folder: Path) -> bool:
    return any((folder / layout).is_file() for layout in LAYOUTS) or any(folder.glob(METASEQ))


def _find_on_hub(name: str, revision: str | None, local_files_only: bool, config_only: bool) -> Path:
    """The folder of a model in the cache, with the weights of one format, or with all that the cache has of it."""
    from huggingface_hub import HfApi, constants, snapshot_download  # 190 ms to import, and only needed here
    from huggingface_hub.errors import RevisionNotFoundError

    if local_files_only or constants.HF_HUB_OFFLINE:
        folder = _cached(name, revision)
        if folder is None:
            raise ConnectionError(f"{name}: not in the hub's cache, and asking the hub is switched off. Load it once "
                                  f"with a connection.{_meant(name)}")  # fmt: skip
        return folder
    say_on_terminal(f"minopt: {name}: contacting the hub ({constants.ENDPOINT})")
    try:
        with HubWatch():
            files = [file.rfilename for file in HfApi().model_info(name, revision=revision).siblings or ()]
    except Exception as error:  # of any kind, if the answer is not a hub's
        folder = None if isinstance(error, RevisionNotFoundError) else _cached(name, revision)
        if folder is None:
            raise _explained(name, revision, error) from None
        logger.warning("%s: the hub cannot be asked (%s); the copy in its cache is used.", name, first_line(error))
        return folder
    published = (patterns for patterns in (SAFETENSORS, PICKLES) if {*patterns[:2]} & {*files})  # the first, if any
    weights = next(published, (METASEQ, f"*/{METASEQ}"))
    patterns = ["config.json"] if config_only else [*_TEXT_FILES, *weights]
    try:
        with HubWatch():
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise _explained(name, revision, error) from None


def _cached(name: str, revision: str | None) -> Path | None:
    """The folder of a model in the cache, which may lack files: that is for the reader of the folder to say."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except HFValidationError as error:
        raise _explained(name, revision, error) from None
    except LocalEntryNotFoundError as error:
        incomplete = getattr(error, "snapshot_path", None)
        return None if incomplete is None else Path(incomplete)


def _explained(name: str, revision: str | None, error: Exception) -> Exception:
    """An error of huggingface_hub's as one line that says what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    log_in, reason = "hf auth login", first_line(error)
    for kind, ours, text in (
        (errors.GatedRepoError, PermissionError,
         f"its owners want to be asked first. Accept the terms on its page, then log in: {log_in}."),
        (errors.RepositoryNotFoundError, FileNotFoundError,
         f"no such folder, and no such model on the hub (or it is private: log in with {log_in}).{_meant(name)}"),
        (errors.RevisionNotFoundError, FileNotFoundError,
         f"no revision {revision!r} on the hub. Use a branch, a tag or a commit."),
        (errors.HFValidationError, FileNotFoundError, f"no such folder, and not a name on the hub ({error})."),
    ):  # fmt: skip
        if isinstance(error, kind):
            return ours(f"{name}: {text}")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        reason = f"{status}: {(error.server_message or reason).splitlines()[0]}"
        if status in (401, 403):
            return PermissionError(f"{name}: the hub wants another login ({reason}). Log in: {log_in}.")
        return ConnectionError(f"{name}: the hub refused ({reason}). Try again later.")
    if isinstance(error, OSError) and error.errno is not None:
        return error  # the disk's: full, or not to be written
    if isinstance(error, (ValueError, LookupError, TypeError, AttributeError, AssertionError)):
        reason = f"its answer is not a hub's: {reason}"
    return ConnectionError(f"{name}: no such folder, and the connection to the hub failed ({reason}). Check the name "
                           f"and the connection, then try again.{_meant(name)}")  # fmt: skip
