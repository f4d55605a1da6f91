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

from minopt.config import OPTConfig, check_text_size, read_json
from minopt.strangers import what_it_is

logger = logging.getLogger(__name__)

# What OPT's own files declare (bos, eos and unk are one token), for a folder with vocab.json and merges.txt alone.
_OPT_TOKENS = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}

# Every name that transformers knows, in the order in which it numbers those that are new to the vocabulary.
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


# The files that a tokenizer is read from, in the order of preference; the last two are metaseq's names.
_FORMS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("gpt2-unified.json",),
          ("gpt2-vocab.json", "gpt2-merges.txt"))  # fmt: skip

TOKENIZER_FILES = (*(name for form in _FORMS for name in form), "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json")  # fmt: skip
"""All names that a tokenizer's files have."""


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

    def __repr__(self) -> str:
        ids = ", ".join(f"{name}={getattr(self, name)}" for name in ("bos_token_id", "eos_token_id", "pad_token_id"))
        return f"Tokenizer({len(self)} tokens, {ids})"

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
            for path in (place / name for form in _FORMS for name in form):
                if path.is_symlink() and not path.exists():
                    raise FileNotFoundError(f"{path}: a link to a file that is not there. Mend or remove the link.")
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

    def beginning(self, config: OPTConfig) -> int | None:
        """The token from which an empty text goes on: the tokenizer's bos or, if its files name none, the model's."""
        return config.bos_token_id if self.bos_token_id is None else self.bos_token_id

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
        """Ids of a prompt followed by each continuation, as one text.

        Returns:
            For each the ids, and the index of the first that reaches into the continuation: a token may hold the end
            of the prompt, such as its last space, and the beginning of what follows.

        Raises:
            ValueError: as ``encode`` does.
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

    def stream_decoder(self, skip_special_tokens: bool = True, stops: StopStrings | None = None) -> StreamDecoder:
        """A decoder that takes one id at a time; what it gives adds up to ``decode`` of them all.

        With ``stops`` it holds back what may be the beginning of one of their strings.
        """
        return StreamDecoder(TokenBytes(self, skip_special_tokens), stops)

    def stop_strings(self, strings: Sequence[str], prompt_length: int, skip_special_tokens: bool = True) -> StopStrings:
        """A criterion for ``minopt.generate``: ends rows whose new text, behind ``prompt_length`` ids, has a string.

        Strings may be special tokens, or hold some: they end a text whether it shows them or not.
        """
        shown, written = TokenBytes(self, skip_special_tokens), TokenBytes(self, False, written=True)
        # Some added tokens take the spaces beside them: a model that has read encoded texts does not write those.
        encoded = [
            b"".join(written[i] for i in ids).decode(errors="replace") for ids in self.encode_each(strings, False)
        ]
        pairs = [(text, string) for text, string in zip(encoded, strings, strict=True) if len(text) < len(string)]
        bare = [text for text, string in pairs if text and "".join(text.split()) == "".join(string.split())]
        return StopStrings(shown, written, [*strings, *bare], prompt_length)


class TokenBytes:
    """The bytes that each id stands for; none for ids without a token, and for special ones if those are skipped.

    Args:
        tokenizer: whose ids they are.
        skip_special_tokens: special tokens stand for nothing.
        written: added tokens stand for what is written in a text to get them, which a decoder may show otherwise.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, *, written: bool = False) -> None:
        self._backend = tokenizer.backend
        added = self._backend.get_added_tokens_decoder()
        self._known = {i: token.content.encode() for i, token in added.items()} if written else {}
        if skip_special_tokens:
            self._known |= {i: b"" for i, token in added.items() if token.special}

    def __getitem__(self, token_id: int) -> bytes:
        if token_id not in self._known:
            token = self._backend.id_to_token(token_id) or ""
            try:
                self._known[token_id] = bytes(_BYTE_OF_CHARACTER[character] for character in token)
            except KeyError:  # an added token outside the byte alphabet stands for itself
                self._known[token_id] = token.encode()
        return self._known[token_id]


class StreamDecoder:
    """Decodes ids one by one; holds back what the next ids may change.

    That is the bytes of an unfinished character, and with ``stops`` what may be the beginning of a stop string.
    """

    def __init__(self, token_bytes: TokenBytes, stops: StopStrings | None = None) -> None:
        self._token_bytes, self._stops = token_bytes, stops
        self._ids: list[int] = []
        self._held = b""
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this id completes, often ``""`` within a character of several tokens."""
        self._held += self._token_bytes[token_id]
        ready = len(self._held)
        if self._stops is not None:
            self._ids.append(token_id)
            ready -= self._stops.may_begin(self._ids)
        text, self._held = self._utf8.decode(self._held[:ready]), self._held[ready:]
        return text

    def finish(self) -> str:
        """What was held back, U+FFFD for a last character that never came whole; mostly ``""``."""
        held, self._held = self._held, b""
        return self._utf8.decode(held, final=True)


class StopStrings:
    """Ends rows in which the newest token completes one of some strings.

    Strings are sought in bytes: a token may begin or end within one, and within a character. They are sought in the
    text as it is shown, and with its special tokens, of which they may hold some: each whole, if they are not shown.

    Args:
        shown: what ids stand for in the text that is shown.
        written: what they stand for in a text that is encoded.
        strings: at least one, none empty.
        prompt_length: ids at the beginning of each row in which nothing is sought.
    """

    def __init__(self, shown: TokenBytes, written: TokenBytes, strings: Sequence[str], prompt_length: int) -> None:
        self._shown, self._written = shown, written
        self._strings = [string.encode() for string in strings]
        self._longest = max(map(len, self._strings))
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: object = None) -> Tensor:
        """Whether each row ``[R, S]`` ends with its last token; ``[R]`` booleans."""
        rows = input_ids[:, self._prompt_length :].tolist()
        return torch.tensor([self._find(row) is not None for row in rows], device=input_ids.device)

    def cut(self, ids: Sequence[int]) -> str | None:
        """Text of new ids before the string that the last of them completes; ``None`` if it completes none."""
        place = self._find(ids)
        if place is None:
            return None
        at, offset = place
        text = b"".join(self._shown[i] for i in ids[:at]) + self._shown[ids[at]][:offset]
        return text.decode(errors="replace")

    def may_begin(self, ids: Sequence[int]) -> int:
        """How many bytes at the end of the shown text of ids may belong to a string that begins there."""
        places = [
            _place(view, ids, n)
            for view in (self._shown, self._written)
            for tail, borders in [self._tail(view, ids, self._longest)]
            for s in self._strings
            for n in range(1, min(len(s), len(tail) + 1))
            if n in borders and tail.endswith(s[:n])
        ]
        if not places:
            return 0
        at, offset = min(places)
        return len(self._shown[ids[at]][offset:]) + sum(len(self._shown[i]) for i in ids[at + 1 :])

    def _find(self, ids: Sequence[int]) -> tuple[int, int] | None:
        """The token, and the byte in it, at which a string begins that the last id completes; the first of several."""
        places = []
        for view in (self._shown, self._written) if ids else ():
            newest = len(view[ids[-1]])
            tail, borders = self._tail(view, ids, newest + self._longest if newest else 0)
            for s in self._strings:
                for end in range(min(newest, len(tail) - len(s) + 1)):
                    begin = end + len(s)
                    if tail.startswith(s, len(tail) - begin) and begin in borders and end in borders:
                        places.append(_place(view, ids, begin))
        return min(places, default=None)

    def _tail(self, view: TokenBytes, ids: Sequence[int], least: int) -> tuple[bytes, set[int]]:
        """The last bytes of ids, at least so many, and the distances from the end where a string may begin or end."""
        tail, borders = b"", {0}
        for i in reversed(ids):
            if len(tail) >= least:
                break
            # A token that is not shown as it is written may be in a string whole, or not at all.
            step = 1 if view[i] == self._shown[i] else len(view[i])
            borders.update(range(len(tail) + step, len(tail) + len(view[i]) + 1, step))
            tail = view[i] + tail
        return tail, borders


def _place(view: TokenBytes, ids: Sequence[int], back: int) -> tuple[int, int]:
    """The token, and the byte in it, so many bytes before the end of ids."""
    at = len(ids)
    while back > 0:
        at -= 1
        back -= len(view[ids[at]])
    return at, -back


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
    check_text_size(path)
    try:
        return read(str(path))
    except Exception as error:  # the library raises bare Exception
        what = what_it_is(path)
        raise ValueError(
            f"{path}: not a tokenizer file, {f'but {what}' if what else f'{error}. Fetch the file again.'}"
        ) from None
