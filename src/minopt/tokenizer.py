"""Text to ids and back: byte-level BPE over the ``tokenizers`` library, from the files that OPT comes with."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from torch import Tensor

from minopt.config import OPTConfig, check_text_size, read_json
from minopt.strangers import what_it_is

logger = logging.getLogger(__name__)

# The files that a tokenizer is read from, in the order of preference; the last two are metaseq's names.
_FORMS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("gpt2-unified.json",),
          ("gpt2-vocab.json", "gpt2-merges.txt"))  # fmt: skip

TOKENIZER_FILES = (*(name for form in _FORMS for name in form), "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json")  # fmt: skip
"""All names that a tokenizer's files have."""

# The settings of OPT's own files, for a folder without settings.
_OPT_SETTINGS = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>",
                 "add_bos_token": True}  # fmt: skip

# The names of special tokens in transformers, in the order in which it numbers those that are new to the vocabulary.
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A byte-level BPE tokenizer with the special tokens and the post-processing of its files.

    OPT puts ``</s>`` (2) before every text and pads with ``<pad>`` (1); Galactica puts nothing.

    Args:
        backend: the tokenizer of the ``tokenizers`` library, a byte-level BPE.
        settings: the content of a tokenizer_config.json: ``bos_token``, ``eos_token``, ``pad_token`` (each a string),
            and all else that is to be saved again.

    Attributes:
        bos_token_id, eos_token_id, pad_token_id: ids, or ``None`` where the files name none.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise ValueError(f"tokenizer: expected byte-level BPE, got the decoder {type(backend.decoder).__name__}.")
        self.backend, self.settings = backend, dict(settings)
        self.bos_token_id, self.eos_token_id, self.pad_token_id = (
            None if (token := _content(settings.get(name))) is None else backend.token_to_id(token)
            for name in ("bos_token", "eos_token", "pad_token")
        )

    def __repr__(self) -> str:
        ids = ", ".join(f"{name}={getattr(self, name)}" for name in ("bos_token_id", "eos_token_id", "pad_token_id"))
        return f"Tokenizer({len(self)} tokens, {ids})"

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Reads the files in a folder (any one of them leads to it), under their names in transformers or in metaseq.

        Settings beside them are optional. As in transformers, ``special_tokens_map.json`` and ``added_tokens.json``
        count only if ``tokenizer_config.json`` has no ``added_tokens_decoder``.

        Raises:
            FileNotFoundError: if the files are not there.
            ValueError: if a file cannot be read, or the vocabulary is GPT-2's.
        """
        folder = Path(folder)
        folder = folder.parent if folder.is_file() else folder
        files = _files_in(folder)
        if not files:
            found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no such folder"
            raise FileNotFoundError(
                f"{folder}: expected tokenizer.json, or vocab.json and merges.txt, found {found}. "
                "Copy the tokenizer's files there."
            )

        def read(name: str) -> dict[str, Any]:
            return read_json(folder / name) if (folder / name).is_file() else {}

        settings, added = read("tokenizer_config.json"), dict[str, Any]()
        has_settings = (folder / "tokenizer_config.json").is_file()  # which may be empty
        is_silent = len(files) == 2 or (files == ("gpt2-unified.json",) and not has_settings)
        if "added_tokens_decoder" not in settings:
            settings, added = settings | read("special_tokens_map.json"), read("added_tokens.json")
        if is_silent:
            settings = _OPT_SETTINGS | settings
        backend = _read_backend([folder / name for name in files], bool(settings.get("add_prefix_space", False)))
        # The same merges under other ids: GPT-2 numbers "<|endoftext|>" 50256, OPT 50260, with its specials from 0.
        if backend.token_to_id("<|endoftext|>") == 50256 and backend.token_to_id("</s>") is None:
            raise ValueError(
                f"{folder}: this is GPT-2's vocabulary (<|endoftext|> is 50256, there is no </s>); OPT numbers the "
                "same tokens otherwise, so its output would be garbage. Use the vocab.json of a facebook/opt-* model."
            )
        try:
            _add_tokens(backend, settings, added, folder)
        except (AttributeError, KeyError, TypeError) as error:
            what = f"{folder}: tokenizer_config.json, special_tokens_map.json or added_tokens.json"
            raise ValueError(f"{what} names tokens in an unknown form ({error}). Fetch them again.") from None
        _add_frame(backend, settings, with_eos=len(files) == 2)
        return cls(backend, settings)

    @staticmethod
    def find(folder: Path) -> Path | None:
        """The folder of the tokenizer of weights in ``folder``: that one, or the one above; ``None`` without files."""
        for place in (folder, folder.resolve().parent):
            for path in (place / name for form in _FORMS for name in form):
                if path.is_symlink() and not path.exists():
                    raise FileNotFoundError(f"{path}: a link to a file that is not there. Repair or remove the link.")
            if _files_in(place):
                return place
        return None

    @classmethod
    def beside(cls, weights: Path, folder: str | Path | None = None) -> Tokenizer | None:
        """The tokenizer in ``folder``; if that is ``None``, the one that ``find`` gives for ``weights``, if any."""
        found = cls.find(weights) if folder is None else Path(folder).expanduser()
        return None if found is None else cls.load(found)

    def beginning(self, config: OPTConfig) -> int | None:
        """The token from which an empty text goes on: the tokenizer's bos or, if its files name none, the model's."""
        return config.bos_token_id if self.bos_token_id is None else self.bos_token_id

    def warn_of_conflicts(self, config: OPTConfig, folder: Path) -> None:
        """Warns if the config.json in ``folder`` and the tokenizer name other tokens (transformers issue 17431)."""
        if len(self) > config.vocab_size:
            what = f"the tokenizer has {len(self)} tokens, the model {config.vocab_size} rows for them"
            logger.warning("%s: %s. Is it this model's?", folder, what)
        own = {"bos": (config.bos_token_id,), "eos": config.eos_token_ids, "pad": (config.pad_token_id,)}
        for name, known in own.items():
            token_id = getattr(self, f"{name}_token_id")
            if token_id is not None and known not in ((), (None,)) and token_id not in known:
                logger.warning(
                    "%s: %s_token_id is %s in config.json and %s in the tokenizer's files. Texts begin as the "
                    "tokenizer says; padding and the end of generation follow config.json.",
                    folder, name, known[0], token_id,
                )  # fmt: skip

    def save(self, folder: str | Path) -> None:
        """Writes ``tokenizer.json`` and ``tokenizer_config.json``, which transformers reads too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        text = json.dumps({name: _plain(value) for name, value in self.settings.items()}, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    def __len__(self) -> int:
        """One more than the highest id that has a token: OPT's 50,265, where the model's table has 50,272 rows."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def ids_without_token(self, vocab_size: int) -> tuple[int, ...]:
        """Rows of a model's vocabulary that stand for no text: OPT's table is padded from 50,265 to 50,272."""
        used = set(self.backend.get_vocab(with_added_tokens=True).values())
        return tuple(i for i in range(vocab_size) if i not in used)

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Ids of a text.

        Args:
            text: special tokens written in it (``"</s>"``) become their ids, as in transformers.
            add_bos: ``None`` adds what the files say; ``True`` puts ``bos`` before a text that does not begin with it,
                and nothing else; ``False`` adds nothing.

        Raises:
            ValueError: if the text is not valid Unicode, or ``add_bos`` asks for a token that there is not.
        """
        return self.encode_each([text], add_bos)[0]

    def encode_each(self, texts: Sequence[str], add_bos: bool | None = None) -> list[list[int]]:
        """Ids of several texts, together and so faster than one by one; see ``encode``."""
        self.check(texts, add_bos)
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_bos is None)
        return [self._with_bos(encoding.ids) if add_bos else encoding.ids for encoding in encodings]

    def check(self, texts: Sequence[str], add_bos: bool | None = None) -> None:
        """Raises what ``encode`` would raise."""
        if add_bos and self.bos_token_id is None:
            raise ValueError("add_bos: the tokenizer's files name no bos_token. Leave add_bos out.")
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"text: not valid Unicode at character {error.start} ({error.reason}).") from None

    def _with_bos(self, ids: list[int]) -> list[int]:
        assert self.bos_token_id is not None
        return ids if ids[:1] == [self.bos_token_id] else [self.bos_token_id, *ids]

    def encode_continuations(
        self, prompt: str, continuations: Sequence[str], add_bos: bool | None = None
    ) -> list[tuple[list[int], int]]:
        """Ids of a prompt followed by each continuation, as one text; raises as ``encode`` does.

        Returns:
            For each the ids, and the index of the first that reaches into the continuation: a token may hold the end
            of the prompt, such as its last space, and the beginning of what follows.
        """
        texts = [prompt + continuation for continuation in continuations]
        self.check(texts, add_bos)
        pairs = []
        for encoding in self.backend.encode_batch(texts, add_special_tokens=add_bos is None):
            ids, offsets = self._with_bos(encoding.ids) if add_bos else encoding.ids, encoding.offsets
            start = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(offsets))
            pairs.append((ids, start + len(ids) - len(offsets)))  # one more with a bos that was added here
        return pairs

    def encode_batch(self, texts: Sequence[str], add_bos: bool | None = None) -> tuple[Tensor, Tensor | None]:
        """Ids of several texts, padded on the left to one length; raises as ``encode`` and ``pad_left`` do."""
        if isinstance(texts, str):
            raise ValueError("texts: expected a list of texts, got one. Put it into a list.")
        return pad_left(self.encode_each(texts, add_bos), self.pad_token_id)

    def decode(self, ids: Sequence[int] | Tensor, skip_special_tokens: bool = True) -> str:
        """Text of ids. Ids without a token give nothing; bytes that are not UTF-8 give U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int | None) -> tuple[Tensor, Tensor | None]:
    """Stacks rows of ids, shorter ones padded on the left, so that each row ends with its newest token.

    The id of padding (``None`` is 0) changes nothing, for it is masked. ``ValueError`` if there is no row, or an empty
    one.

    Returns:
        ``input_ids [B, T]`` and ``attention_mask [B, T]``, int64 on the CPU, 1 = real; no mask without padding.
    """
    if not all(rows) or not rows:
        raise ValueError("texts: expected at least one, each of at least one token.")
    width = max(map(len, rows))
    paddings = [width - len(row) for row in rows]
    input_ids = torch.tensor([[pad_token_id or 0] * n + list(row) for n, row in zip(paddings, rows, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (width - n) for n in paddings])
    return input_ids, mask if any(paddings) else None


def _files_in(folder: Path) -> tuple[str, ...]:
    """The first of ``_FORMS`` whose files are all there."""
    return next((form for form in _FORMS if all((folder / name).is_file() for name in form)), ())


def _read_backend(paths: Sequence[Path], add_prefix_space: bool) -> tokenizers.Tokenizer:
    """The library's tokenizer of a tokenizer.json, or of a vocabulary and its merges."""
    if len(paths) == 2:
        read_json(paths[0])  # an error names it; if there is none, the next one is about the other file
    check_text_size(paths[-1])
    try:
        if len(paths) == 1:
            backend = tokenizers.Tokenizer.from_file(str(paths[0]))
            backend.no_truncation()  # transformers writes those of its last call into the file
            backend.no_padding()
            return backend
        backend = tokenizers.Tokenizer(models.BPE.from_file(*map(str, paths)))
    except Exception as error:  # the library raises bare Exception
        what = f"but {what}" if (what := what_it_is(paths[-1])) else f"{error}. Fetch the file again."
        raise ValueError(f"{paths[-1]}: not a tokenizer file, {what}") from None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_frame(backend: tokenizers.Tokenizer, settings: Mapping[str, Any], with_eos: bool) -> None:
    """Has bos put before each text and eos after it if the settings ask for them and the backend does not do it yet."""
    bos = _content(settings.get("bos_token")) if settings.get("add_bos_token") else None
    eos = _content(settings.get("eos_token")) if settings.get("add_eos_token") and with_eos else None
    if bos is not None and backend.encode("a").ids[:1] == [backend.token_to_id(bos)]:
        bos = None  # the tokenizer.json puts it there itself, and maybe more
    if tokens := [token for token in (bos, eos) if token is not None]:
        single = [token for token in (bos, "$A", eos) if token is not None]
        pair = single + [token for token in (bos, "$B:1", eos) if token is not None]
        ids = [(token, backend.token_to_id(token)) for token in tokens]
        backend.post_processor = processors.TemplateProcessing(single, pair, ids)


def _add_tokens(
    backend: tokenizers.Tokenizer, settings: Mapping[str, Any], added: Mapping[str, int], folder: Path
) -> None:
    """Declares the tokens that the files name: numbered ones first, each at its number, then the special ones."""
    special = _special_tokens(settings)
    names = {_content(token) for token in special}
    numbered = {i: AddedToken(text, special=text in names, normalized=text not in names) for text, i in added.items()}
    numbered |= backend.get_added_tokens_decoder()
    numbered |= {int(i): _added_token(token) for i, token in settings.get("added_tokens_decoder", {}).items()}
    for token_id, token in sorted(numbered.items()):
        token.special = token.special or token.content in names
        add = backend.add_special_tokens if token.special else backend.add_tokens
        add([token])
        if (found := backend.token_to_id(token.content)) != token_id:
            raise ValueError(
                f"{folder}: added token {token.content!r} should have id {token_id}, but got {found}. Its vocabulary "
                "and its added tokens are of different models."
            )
    known = {token.content for token in numbered.values()}  # a name alone must not undo their lstrip, rstrip, ...
    backend.add_special_tokens([_added_token(token) for token in special if _content(token) not in known])


def _special_tokens(settings: Mapping[str, Any]) -> list[Any]:
    """The special tokens that the settings name, under transformers' names, then under their own, then in a list."""
    own = [name for name in settings if name.endswith("_token") and name not in _SPECIAL_TOKENS]
    named = [settings.get(name) for name in (*_SPECIAL_TOKENS, *own)]
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    named += extra if isinstance(extra, list) else extra.values()
    return [token for token in named if isinstance(token, (str, dict))]  # "add_bos_token" is True, and no token


def _added_token(token: Any) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True, normalized=False)
    names = ("single_word", "lstrip", "rstrip", "special", "normalized")
    flags = {"special": True} | {name: bool(token[name]) for name in names if name in token}
    return AddedToken(token["content"], **flags)


def _content(token: Any) -> str | None:
    """The text of a special token, which files give as a string or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _plain(value: Any) -> Any:
    """A setting with special tokens as strings: transformers reads no bare objects, tokenizer.json has their flags."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value["content"] if isinstance(value, dict) and "content" in value else value
