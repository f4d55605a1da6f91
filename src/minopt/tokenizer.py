"""Text to ids and back: byte-level BPE over the ``tokenizers`` library, from the files that OPT comes with."""

from __future__ import annotations

import codecs
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from torch import Tensor

from minopt.config import OPTConfig, read_json

logger = logging.getLogger(__name__)

# What OPT's own files declare (bos, eos and unk are one token), for a folder with vocab.json and merges.txt alone.
_OPT_TOKENS = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}

# Every name that transformers knows, in the order in which it numbers those that are new to the vocabulary.
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


# The files that a tokenizer is read from, in the order of preference; the last two are metaseq's names.
_FORMS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("gpt2-unified.json",),
          ("gpt2-vocab.json", "gpt2-merges.txt"))  # fmt: skip


class Tokenizer:
    """A byte-level BPE tokenizer with the special tokens and the post-processing of its files.

    OPT puts ``</s>`` (2) before every text and pads with ``<pad>`` (1); Galactica puts nothing.

    Args:
        backend: the tokenizer of the ``tokenizers`` library.
        settings: the content of a tokenizer_config.json: ``bos_token``, ``eos_token``, ``pad_token`` (each a
            string), and whatever else is to be saved again.

    Attributes:
        bos_token_id, eos_token_id, pad_token_id: ids, or ``None`` where the files name none.

    Raises:
        ValueError: if the backend is not a byte-level BPE.
    """

    def __init__(self, backend: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise ValueError(f"tokenizer: expected byte-level BPE, got the decoder {type(backend.decoder).__name__}.")
        self.backend = backend
        self.settings = dict(settings)
        self.bos_token_id = self._id("bos_token")
        self.eos_token_id = self._id("eos_token")
        self.pad_token_id = self._id("pad_token")

    def _id(self, name: str) -> int | None:
        token = _content(self.settings.get(name))
        return None if token is None else self.backend.token_to_id(token)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Reads ``tokenizer.json``, or ``vocab.json`` and ``merges.txt``, with the files beside them.

        Those are ``tokenizer_config.json``, ``special_tokens_map.json`` and ``added_tokens.json``, all optional; as in
        transformers, a config with ``added_tokens_decoder`` stands alone, else the other two add to it. metaseq's names
        are known too: ``gpt2-unified.json``, and ``gpt2-vocab.json`` with ``gpt2-merges.txt``.

        Raises:
            FileNotFoundError: if no form is there (any one of the files leads to all).
            ValueError: if a file cannot be read, or the vocabulary is GPT-2's.
        """
        folder = Path(folder)
        folder = folder.parent if folder.is_file() else folder
        files = next((form for form in _FORMS if all((folder / name).is_file() for name in form)), ())
        settings, added = _read_json(folder / "tokenizer_config.json"), {}
        if "added_tokens_decoder" not in settings:
            settings |= _read_json(folder / "special_tokens_map.json")
            added = _read_json(folder / "added_tokens.json")
        if len(files) == 2 or (files == ("gpt2-unified.json",) and not (folder / "tokenizer_config.json").is_file()):
            settings = _OPT_TOKENS | {"add_bos_token": True} | settings
        eos = None
        if len(files) == 1:
            backend = _open(folder / files[0], lambda path: tokenizers.Tokenizer.from_file(path))
            backend.no_truncation()  # transformers writes those of its last call into the file
            backend.no_padding()
        elif files:
            eos = _content(settings.get("eos_token")) if settings.get("add_eos_token") else None
            vocab = str(folder / files[0])
            _read_json(folder / files[0])  # an error names it; what is left then lies in the other file
            backend = tokenizers.Tokenizer(_open(folder / files[1], lambda path: models.BPE.from_file(vocab, path)))
            prefix_space = bool(settings.get("add_prefix_space", False))
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
            backend.decoder = decoders.ByteLevel()
        else:
            found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else "no such folder"
            raise FileNotFoundError(
                f"{folder}: expected tokenizer.json, or vocab.json and merges.txt, found {found}. "
                "Copy the tokenizer's files there."
            )
        _refuse_gpt2(backend, folder)
        try:
            _add_tokens(backend, settings, added, folder)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder}: its tokenizer's settings name tokens in a form that is none ({error}). "
                "Fetch tokenizer_config.json, special_tokens_map.json and added_tokens.json again."
            ) from None
        bos = _content(settings.get("bos_token")) if settings.get("add_bos_token") else None
        if bos is not None and backend.encode("a").ids[:1] == [backend.token_to_id(bos)]:
            bos = None  # the tokenizer.json puts it there itself, and maybe more
        if bos is not None or eos is not None:
            backend.post_processor = _frame(backend, bos, eos)
        return cls(backend, settings)

    @staticmethod
    def find(folder: Path) -> Path | None:
        """The folder of the tokenizer of weights in ``folder``: that one, or the one above; ``None`` without files."""
        for place in (folder, folder.resolve().parent):
            if any(all((place / name).is_file() for name in form) for form in _FORMS):
                return place
        return None

    @classmethod
    def beside(cls, weights: Path, folder: str | Path | None = None) -> Tokenizer | None:
        """The tokenizer of a model.

        Args:
            weights: the folder that holds the model's.
            folder: of the tokenizer's files; ``None`` is the one that ``find`` gives.

        Returns:
            ``None`` where ``find`` gives none.

        Raises:
            FileNotFoundError, ValueError: as ``load`` does.
        """
        found = cls.find(weights) if folder is None else Path(folder).expanduser()
        return None if found is None else cls.load(found)

    def warn_of_conflicts(self, config: OPTConfig, folder: Path) -> None:
        """Says where a model's config.json in ``folder`` names other tokens than the tokenizer does.

        Such files have been published (transformers issue 17431).
        """
        if len(self) > config.vocab_size:
            logger.warning(
                "%s: the tokenizer has %d tokens, the model %d rows for them. Is it this model's?",
                folder, len(self), config.vocab_size,
            )  # fmt: skip
        for name, known in (
            ("bos", (config.bos_token_id,)),
            ("eos", config.eos_token_ids),
            ("pad", (config.pad_token_id,)),
        ):
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
        settings = {name: _as_written(value) for name, value in self.settings.items()}
        text = json.dumps(settings, indent=2, ensure_ascii=False)
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
            add_bos: ``None`` as the files say; ``True`` puts ``bos`` before a text that does not begin with it, and
                nothing else; ``False`` adds nothing.

        Raises:
            ValueError: if the text is not valid Unicode, or ``add_bos`` asks for a token that there is not.
        """
        return self.encode_each([text], add_bos)[0]

    def encode_each(self, texts: Sequence[str], add_bos: bool | None = None) -> list[list[int]]:
        """Ids of several texts, together and so faster than one by one; see ``encode``, also for what it raises."""
        if add_bos and self.bos_token_id is None:
            raise ValueError("add_bos: the tokenizer's files name no bos_token. Leave add_bos out.")
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"text: not valid Unicode at character {error.start} ({error.reason}).") from None
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_bos is None)
        return [self._with_bos(encoding.ids) if add_bos else encoding.ids for encoding in encodings]

    def _with_bos(self, ids: list[int]) -> list[int]:
        assert self.bos_token_id is not None
        return ids if ids[:1] == [self.bos_token_id] else [self.bos_token_id, *ids]

    def encode_continuations(
        self, prompt: str, continuations: Sequence[str], add_bos: bool | None = None
    ) -> list[tuple[list[int], int]]:
        """Ids of a prompt followed by each continuation, as one text.

        Returns:
            For each the ids, and the index of the first that reaches into the continuation: a token may hold the end
            of the prompt, such as its last space, and the beginning of what follows.

        Raises:
            ValueError: as ``encode`` does.
        """
        pairs = []
        for continuation in continuations:
            text = prompt + continuation
            (ids,) = self.encode_each([text], add_bos)  # which checks both
            offsets = self.backend.encode(text, add_special_tokens=add_bos is None).offsets
            start = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(offsets))
            pairs.append((ids, start + len(ids) - len(offsets)))  # one more with a bos that was added here
        return pairs

    def encode_batch(self, texts: Sequence[str], add_bos: bool | None = None) -> tuple[Tensor, Tensor | None]:
        """Ids of several texts, padded on the left to one length.

        Returns:
            ``input_ids [B, T]`` and ``attention_mask [B, T]``, int64 on the CPU, 1 = real; the mask is ``None``
            where nothing had to be padded. See ``pad_left``.

        Raises:
            ValueError: as ``encode`` does, or if there is no text, or one without any token.
        """
        if isinstance(texts, str):
            raise ValueError("texts: expected a list of texts, got one. Put it into a list.")
        return pad_left(self.encode_each(texts, add_bos), self.pad_token_id)

    def decode(self, ids: Sequence[int] | Tensor, skip_special_tokens: bool = True) -> str:
        """Text of ids. Ids without a token give nothing; bytes that are not UTF-8 give U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def stream_decoder(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder that takes one id at a time; what it gives adds up to ``decode`` of them all."""
        return StreamDecoder(TokenBytes(self, skip_special_tokens))

    def stop_strings(self, strings: Sequence[str], prompt_length: int) -> StopStrings:
        """A criterion for ``minopt.generate``: ends rows whose new text, behind ``prompt_length`` ids, has a string."""
        return StopStrings(TokenBytes(self, skip_special_tokens=True), strings, prompt_length)


class TokenBytes:
    """The bytes that each id stands for; none for ids without a token, and for special ones if those are skipped."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._backend = tokenizer.backend
        added = self._backend.get_added_tokens_decoder()
        self._known = {i: b"" for i, token in added.items() if token.special and skip_special_tokens}

    def __getitem__(self, token_id: int) -> bytes:
        if token_id not in self._known:
            token = self._backend.id_to_token(token_id) or ""
            try:
                self._known[token_id] = bytes(_BYTE_OF_CHARACTER[character] for character in token)
            except KeyError:  # an added token outside the byte alphabet stands for itself
                self._known[token_id] = token.encode()
        return self._known[token_id]


class StreamDecoder:
    """Decodes ids one by one; holds back the bytes of an unfinished character until the next ids complete it."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this id completes, often ``""`` within a character of several tokens."""
        return self._utf8.decode(self._token_bytes[token_id])

    def finish(self) -> str:
        """What is left: U+FFFD if the last character never came whole, else ``""``."""
        return self._utf8.decode(b"", final=True)


class StopStrings:
    """Ends rows in which the newest token completes one of some strings.

    Strings are sought in bytes: a token may begin or end within one, and within a character.

    Args:
        token_bytes: what ids stand for.
        strings: at least one, none empty.
        prompt_length: ids at the beginning of each row in which nothing is sought.
    """

    def __init__(self, token_bytes: TokenBytes, strings: Sequence[str], prompt_length: int) -> None:
        self._token_bytes = token_bytes
        self._strings = [string.encode() for string in strings]
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: object = None) -> Tensor:
        """Whether each row ``[R, S]`` ends with its last token; ``[R]`` booleans."""
        rows = input_ids[:, self._prompt_length :].tolist()
        return torch.tensor([self._find(row) is not None for row in rows], device=input_ids.device)

    def cut(self, ids: Sequence[int]) -> str | None:
        """Text of new ids before the string that the last of them completes; ``None`` if it completes none."""
        begin = self._find(ids)
        text = b"".join(self._token_bytes[i] for i in ids)
        return None if begin is None else text[: len(text) + begin].decode(errors="replace")

    def _find(self, ids: Sequence[int]) -> int | None:
        """Where the string begins that the last id completes, in bytes from the end (below 0); the first of several."""
        newest = len(self._token_bytes[ids[-1]]) if ids else 0
        if newest == 0:
            return None
        needed, tail = newest + max(map(len, self._strings)), b""
        for i in reversed(ids):
            if len(tail) >= needed:
                break
            tail = self._token_bytes[i] + tail
        found = [tail.find(string, max(0, len(tail) - newest - len(string) + 1)) for string in self._strings]
        return min((at - len(tail) for at in found if at >= 0), default=None)

    def may_begin(self, text: str) -> int:
        """How many characters at the end of a text may be the beginning of a string."""
        data = text.encode()
        longest = max(
            (n for s in self._strings for n in range(1, min(len(s), len(data) + 1)) if data.endswith(s[:n])), default=0
        )
        return len(data[len(data) - longest :].decode(errors="ignore"))


def pad_left(rows: Sequence[Sequence[int]], pad_token_id: int | None) -> tuple[Tensor, Tensor | None]:
    """Stacks rows of ids, shorter ones padded on the left, so that each row ends with its newest token.

    Args:
        rows: at least one, each of at least one id.
        pad_token_id: what to pad with; ``None`` pads with 0. Padding is masked, so its id changes nothing.

    Returns:
        ``input_ids [B, T]`` and ``attention_mask [B, T]``, int64, 1 = real; ``None`` for a mask without padding.

    Raises:
        ValueError: if there is no row, or an empty one.
    """
    if not all(rows) or not rows:
        raise ValueError("texts: expected at least one, each of at least one token.")
    width = max(map(len, rows))
    pad = 0 if pad_token_id is None else pad_token_id
    input_ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], dtype=torch.long)
    if all(len(row) == width for row in rows):
        return input_ids, None
    return input_ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def _byte_alphabet() -> dict[str, int]:
    """Which byte each character of a byte-level token stands for: GPT-2's alphabet.

    Printable Latin-1 stands for itself; the other 68 bytes, in order, for the characters from U+0100.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()


def _frame(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> processors.TemplateProcessing:
    """Puts ``bos`` before a text and ``eos`` after it, each where given."""
    tokens = [token for token in (bos, eos) if token is not None]
    single = [token for token in (bos, "$A", eos) if token is not None]
    pair = single + [token for token in (bos, "$B:1", eos) if token is not None]
    return processors.TemplateProcessing(single, pair, [(token, backend.token_to_id(token)) for token in tokens])


def _content(token: Any) -> str | None:
    """The text of a special token, which files give as a string or as an object."""
    return token.get("content") if isinstance(token, dict) else token


def _as_written(value: Any) -> Any:
    """A setting with special tokens as strings: transformers reads no bare objects, tokenizer.json has their flags."""
    if isinstance(value, list):
        return [_as_written(item) for item in value]
    return value["content"] if isinstance(value, dict) and "content" in value else value


def _added_token(token: Any) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True, normalized=False)
    flags = {name: bool(token.get(name, False)) for name in ("single_word", "lstrip", "rstrip")}
    special, normalized = bool(token.get("special", True)), bool(token.get("normalized", True))
    return AddedToken(token["content"], special=special, normalized=normalized, **flags)


def _special_tokens(settings: Mapping[str, Any]) -> list[Any]:
    """The special tokens that the settings name, under transformers' names, then under their own, then in a list."""
    own = [name for name in settings if name.endswith("_token") and name not in _SPECIAL_TOKENS]
    named = [settings.get(name) for name in (*_SPECIAL_TOKENS, *own)]
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    named += extra if isinstance(extra, list) else extra.values()
    return [token for token in named if isinstance(token, (str, dict))]  # "add_bos_token" is True, and no token


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
        if backend.token_to_id(token.content) != token_id:
            raise ValueError(
                f"{folder}: added token {token.content!r} should have id {token_id}, but got "
                f"{backend.token_to_id(token.content)}. Its vocabulary and its added tokens are of different models."
            )
    known = {token.content for token in numbered.values()}  # a name alone must not undo their lstrip, rstrip, ...
    backend.add_special_tokens([_added_token(token) for token in special if _content(token) not in known])


def _refuse_gpt2(backend: tokenizers.Tokenizer, folder: Path) -> None:
    # The same merges under other ids: GPT-2 numbers "<|endoftext|>" 50256, OPT 50260, with its specials from 0.
    if backend.token_to_id("<|endoftext|>") == 50256 and backend.token_to_id("</s>") is None:
        raise ValueError(
            f"{folder}: this is GPT-2's vocabulary (<|endoftext|> is 50256, there is no </s>); OPT numbers the same "
            "tokens differently, so its output would be garbage. Use the vocab.json of a facebook/opt-* repository."
        )


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _open(path: Path, read: Any) -> Any:
    try:
        return read(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: not a tokenizer file, {error}. Fetch the file again.") from None
