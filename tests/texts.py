"""Strings of every kind for the tests of the tokenizer: the same ones on every run, none with a lone surrogate."""

from __future__ import annotations

import random
import sys
import unicodedata

SPECIAL_TOKENS = ("</s>", "<pad>", "<s>", "<unk>", "<mask>", "<|endoftext|>")

_ZWJ, _VS16, _KEYCAP = "\u200d", "\ufe0f", "\u20e3"

EMOJI = (
    "\U0001f600",
    "\U0001f44d" + "\U0001f3fd",  # a thumb and its skin tone
    _ZWJ.join("\U0001f468\U0001f469\U0001f467\U0001f466"),  # a family
    "\U0001f3f3" + _VS16 + _ZWJ + "\U0001f308",  # a rainbow flag
    "\U0001f9d1\U0001f3ff" + _ZWJ + "\U0001f680",  # an astronaut with a skin tone
    "\u2764" + _VS16,
    "1" + _VS16 + _KEYCAP,
    "\U0001f1ef\U0001f1f5",  # a flag of two regional indicators
    "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",  # a flag of tag characters
)

_MARKS = (
    "e\u0301",
    "a\u0308\u0323",
    "Z" + "".join(chr(0x300 + n) for n in range(40)),
    "\u0928\u093f\u092e\u094d",  # Devanagari with vowel signs
    "\u1112\u1161\u11ab",  # Hangul in separate letters
    "\u0e01\u0e33\u0e49",  # Thai
    "\u00e9",
    "\ufb01\u2126\u212b",  # what a normalisation would change
)

_RIGHT_TO_LEFT = (
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
    "abc \u202b\u05d0\u05d1\u05d2\u202c def",
    "\u200f\u200e\u2067x\u2069",
    "\u0627\u064e\u0644\u0652\u0639\u064e\u0631\u064e\u0628\u0650\u064a\u0651\u064e\u0629",
)

_SPACES = (
    " ", "  ", " " * 7, " " * 300, "\t", "\t\t\t", "\n", "\n\n", "\r\n", "\r\n\r\n", "\r", " \n ", "\n \t", "\u00a0",
    "\u00a0\u00a0 ", "\u2003", "\u3000", "\u200b", "\ufeff", "\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c",
    "\x1f",
)  # fmt: skip

_CODE = (
    "def f(x: int) -> str:\n    return f'{x!r}'  # comment\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] << 2; }",
    "SELECT * FROM t WHERE a <> 'it''s' AND b >= 1e-5;",
    "<div class=\"x\">&amp;&#x27;</div>",
    "\\begin{equation} \\alpha_{i}^{2} \\end{equation}",
    "{\"key\": [1, 2.5, null, true], \"s\": \"\\u00e9\"}",
    "https://example.org/a/b.html?q=1&r=%20x#frag",
    "http://user:pw@127.0.0.1:8080/~me/",
    "name.surname+tag@example.co.uk",
    "C:\\Windows\\System32\\drivers\\etc\\hosts",
    "0123456789", "3.14159265358979", "-1,234,567.89", "1e-300", "0xDEADBEEF", "\u00bd \u00b2 \u2167 \u0663\u0664",
    "9" * 200, "$5.00 \u20ac7 50% #1 @you", "12:34:56", "2020-02-29",
)  # fmt: skip

_WORDS = (
    "A photo of a cat", "Hello world", "I'm you're they've we'll he'd it's don't", "I'M YOU'RE", "don\u2019t",
    "o'clock", "'s", "''", "naive caf\u00e9", "antidisestablishmentarianism", "MiXeDcAsE", "snake_case_name",
    "a-b--c---d", "...", "!?!?", "a" * 3000, "ab" * 2000, "x" * 100 + "\u00fc" * 100, "\u6f22" * 500, "\u0120",
    "\u010a\u0109", "\u00c3\u00a9", "\U0001f600" * 200, "a b c d e f g", "word " * 400,
)  # fmt: skip


def _special() -> list[str]:
    """Special tokens in a text: alone, adjacent, with spaces on either side, cut off and nested."""
    texts = []
    for token in SPECIAL_TOKENS:
        texts += [
            token,
            token * 2,
            f" {token}",
            f"{token} ",
            f"  {token}  ",
            f"a{token}b",
            f"a {token} b",
            f"\n{token}\n",
        ]
        texts += [token[:-1], token[1:], f"<{token}>", token.upper(), token[:2] + " " + token[2:], f"{token}\u0301"]
        texts += [token + other for other in SPECIAL_TOKENS] + [f"{token} {other}" for other in SPECIAL_TOKENS]
    return texts


def _of_every_block(rng: random.Random) -> list[str]:
    """One text for each 64 code points that hold a character: some of them, side by side and among ASCII."""
    texts = []
    for start in range(0, sys.maxunicode + 1, 64):
        block = [chr(code) for code in range(start, start + 64)]
        block = [character for character in block if unicodedata.category(character) not in ("Cn", "Cs")]
        if not block or (0xF0000 <= start and start % 4096):  # the private planes are all alike
            continue
        some = rng.sample(block, min(len(block), 6))
        texts.append("".join(some[:3]) + rng.choice(["", " ", "a", "1", "\n"]) + " ".join(some[3:]))
    return texts


def _mixed(rng: random.Random, count: int) -> list[str]:
    """Fragments of every kind in random order, so that each meets the boundaries of the others."""
    short = [text for text in (*EMOJI, *_MARKS, *_RIGHT_TO_LEFT, *_SPACES, *_CODE, *_WORDS) if len(text) < 60]
    controls = [chr(code) for code in (*range(32), *range(127, 160))]
    pool = [short, list(SPECIAL_TOKENS), controls, ["\ufffd", "\ufffe", "\uffff", "\U0010ffff", "\u0378"]]
    weights = (12, 3, 2, 1)
    return ["".join(rng.choice(kind) for kind in rng.choices(pool, weights, k=rng.randint(1, 9))) for _ in range(count)]


def varied_texts(seed: int = 0) -> list[str]:
    """A few thousand texts: every script, emoji, marks, controls, white space, code, and special tokens written out."""
    rng = random.Random(seed)
    fixed = ["", *EMOJI, *_MARKS, *_RIGHT_TO_LEFT, *_SPACES, *_CODE, *_WORDS, *_special()]
    fixed += [f"a{space}b" for space in _SPACES] + [f"{space}a {space}" for space in _SPACES]
    fixed += [chr(code) for code in range(256)]
    return fixed + _of_every_block(rng) + _mixed(rng, 800)
