"""What ids stand for, byte by byte: texts that are shown while they grow, and strings that end them."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from minopt.tokenizer import Tokenizer


def _byte_alphabet() -> dict[str, int]:
    """Which byte each character of a byte-level token stands for: GPT-2's alphabet.

    Printable Latin-1 stands for itself; the other 68 bytes, in order, for the characters from U+0100.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()


class Pieces(dict[int, str]):
    """What each id stands for: a string with one character for each byte (Latin-1).

    An added token that is not shown as it is written, such as a skipped special one, is one character from U+10000 on.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._backend, self._shown = tokenizer.backend, dict[str, str]()
        self._added = self._backend.get_added_tokens_decoder()
        for i, token in self._added.items():
            shown = "" if skip_special_tokens and token.special else self._read(i)
            self[i] = shown if shown == _latin(token.content) else chr(0x10000 + i)
            self._shown[self[i]] = shown

    def __missing__(self, token_id: int) -> str:
        return self.setdefault(token_id, self._read(token_id))

    def _read(self, token_id: int) -> str:
        token = self._backend.id_to_token(token_id) or ""
        if all(character in _BYTE_OF_CHARACTER for character in token):
            return "".join(chr(_BYTE_OF_CHARACTER[character]) for character in token)
        return _latin(token)  # an added token outside the byte alphabet stands for itself

    def shown(self, pieces: str) -> str:
        """The bytes that the text shows of pieces."""
        return re.sub("[\U00010000-\U0010ffff]", lambda token: self._shown[token[0]], pieces)

    def written(self, text: str) -> str:
        """The pieces of a text in which added tokens are written out."""
        pieces = _latin(text)
        for i, token in sorted(self._added.items(), key=lambda item: -len(item[1].content)):
            # Some tokens take the spaces beside them: a model that has read encoded texts does not write those.
            spelling = r"\s*" * token.lstrip + re.escape(_latin(token.content)) + r"\s*" * token.rstrip
            pieces = self[i].join(re.split(spelling, pieces, flags=re.ASCII))
        return pieces


class StreamDecoder:
    """Decodes ids one by one; holds back an unfinished character, and what may begin one of ``stops``."""

    def __init__(self, pieces: Pieces, stops: StopStrings | None = None) -> None:
        self._pieces, self._stops, self._ids, self._held = pieces, stops, list[int](), ""
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this id completes, often ``""`` within a character of several tokens."""
        self._ids.append(token_id)
        self._held += self._pieces.shown(self._pieces[token_id])
        ready = len(self._held) - (0 if self._stops is None else self._stops.may_begin(self._ids))
        text, self._held = self._utf8.decode(self._held[:ready].encode("latin-1")), self._held[ready:]
        return text


class StopStrings:
    """Ends rows in which the newest token completes one of some strings; nothing is sought in their first ids.

    A string is sought in the bytes that the text shows: a token may begin or end within it. A string that holds added
    tokens is also sought among the ids, of which the text may not show all.
    """

    def __init__(self, pieces: Pieces, strings: Sequence[str], prompt_length: int) -> None:
        self._pieces, self._prompt_length = pieces, prompt_length
        self._shown = [_latin(string) for string in strings]
        self._written = [pieces.written(string) for string in strings if pieces.written(string) != _latin(string)]

    def __call__(self, input_ids: Tensor, scores: object = None) -> Tensor:
        """Whether each row ``[R, S]`` ends with its last token; ``[R]`` booleans."""
        rows = input_ids[:, self._prompt_length :].tolist()
        return torch.tensor([self.cut(self._newest(row)) is not None for row in rows], device=input_ids.device)

    def cut(self, ids: Sequence[int]) -> str | None:
        """Text of new ids before the string that the last of them completes; ``None`` if it completes none."""
        before, text = ("".join(map(self._pieces.__getitem__, part)) for part in (ids[:-1], ids))
        begins = [len(self._pieces.shown(text[:at])) for at in _completed(self._written, before, text)]
        before, text = self._pieces.shown(before), self._pieces.shown(text)
        begins += _completed(self._shown, before, text)
        return text[: min(begins)].encode("latin-1").decode(errors="replace") if begins else None

    def may_begin(self, ids: Sequence[int]) -> int:
        """How many bytes at the end of the shown text of ids may belong to a string that begins there."""
        text = "".join(map(self._pieces.__getitem__, self._newest(ids)))
        held = [_begun(string, text) for string in self._written]
        held += [_begun(string, self._pieces.shown(text)) for string in self._shown]
        return max(len(self._pieces.shown(end)) for end in held)

    def _newest(self, ids: Sequence[int]) -> Sequence[int]:
        """The last ids, as many as can hold a string that ends in the last one."""
        count, shown = 1, 0
        while count < len(ids) and shown < max(map(len, self._shown)):
            count += 1
            shown += len(self._pieces.shown(self._pieces[ids[-count]]))
        return ids[-count:]


def _completed(strings: Sequence[str], before: str, text: str) -> list[int]:
    """Where those strings begin in a text that were not whole in the text before its newest token."""
    places = (text.find(string, max(0, len(before) - len(string) + 1)) for string in strings)
    return [at for at in places if at >= 0]


def _begun(string: str, text: str) -> str:
    """The longest end of a text with which a string begins, but the whole string."""
    lengths = range(min(len(string) - 1, len(text)), 0, -1)
    return next((string[:n] for n in lengths if text.endswith(string[:n])), "")


def _latin(text: str) -> str:
    """One character for each byte of a text's UTF-8."""
    return text.encode().decode("latin-1")
