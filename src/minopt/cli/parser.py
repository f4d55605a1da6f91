"""What the verbs' parsers share: either spelling of a flag, and one line for what is wrong with a command."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, NoReturn

from minopt.cli.common import tell_error

# Flags of other programs that mean the same. A verb that has a flag of that name itself keeps it.
ALIASES = {
    "--model-name-or-path": "--model", "--model-dir": "--model", "--output-path": "--destination",
    "--tgt-length": "--max-new-tokens", "--resume-from-checkpoint": "--resume", "--save-total-limit": "--keep-last",
    "--label-smoothing-factor": "--label-smoothing", "--eval-strategy": "--evaluation-strategy",
}  # fmt: skip

# Flags of other programs whose nearest one has another name.
_NEARER = {"--max-length": "--max-new-tokens", "--min-length": "--min-new-tokens",
           "--src-length": "--truncate-prompt"}  # fmt: skip

# What argparse says, and what it says here.
_WORDS = (
    (r"expected one argument", "expected a value, got none"),
    (r"ignored explicit argument (.*)", r"expected no value, got \1"),
    (r"invalid int value: (.*)", r"expected an integer, got \1"),
    (r"invalid float value: (.*)", r"expected a number, got \1"),
    (r"the following arguments are required: (.*)", r"\1: expected a value, got none"),
    (
        r"unrecognized arguments: (.*)",
        r"\1: expected nothing more. A text stands in quotes, and behind -- if it begins "
        "with a hyphen",
    ),
)


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, names the nearest right word, and shows no page of usage."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})
        self.add_argument("--debug", action="store_true", default=argparse.SUPPRESS,
                          help="show the traceback of an error (also: MINOPT_DEBUG=1)")  # fmt: skip
        self.set_defaults(when_out_of_memory="--dtype bfloat16, or with --input a smaller --max-batch-tokens")

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        for theirs, ours in _WORDS:
            message = re.sub(rf"\b{theirs}$", ours, message)
        end = "" if message.endswith("?") else "."
        tell_error(f"{message}{end} See {self.prog} --help.", says=os.environ.get("RANK", "0") == "0")
        self.exit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            expected = " or ".join(action.choices)
            raise argparse.ArgumentError(action, f"expected {expected}, got {value!r}{_meant(value, action.choices)}")

    def flags(self) -> dict[str, str]:
        """The flag of each argument that has one."""
        return {
            a.dest: next(f for f in a.option_strings if f.startswith("--")) for a in self._actions if a.option_strings
        }

    def spelt(self, words: Sequence[str]) -> list[str]:
        """A command with its flags as the parser knows them: ``--max_new_tokens=3`` as ``--max-new-tokens=3``.

        A value that begins with a hyphen is joined to its flag, for argparse would take it for another: ``-1e-3``,
        ``---``. What stands behind a ``--`` stays. Ends with an error at the first flag that there is not.
        """
        end = words.index("--") if "--" in words else len(words)
        found: list[str] = []
        named: dict[str, str] = {}
        unflagged = self._unflagged()
        known = [*self._option_string_actions, *(f"--{name}" for name in unflagged)]
        rest = iter(words[:end])
        for word in rest:
            if not re.match(r"--?[A-Za-z]\S*$", word) and not re.match(r"--?[A-Za-z][\w-]*=", word):
                if word.startswith("-") and len(word) > 1 and found and self._takes_value(found[-1]):
                    found[-1] += f"={word}"
                else:
                    found.append(word)
                continue
            flag, equals, value = word.partition("=")
            flag = flag.replace("_", "-") if flag.startswith("--") else flag
            if flag not in known and ALIASES.get(flag) in known:
                flag = ALIASES[flag]
            if flag not in known:
                self.error(f"{flag}: no such flag{_meant(_NEARER.get(flag, flag), known)}")
            if flag in self._option_string_actions:
                found.append(flag + equals + value)
            else:  # `minopt inspect --model X`
                named.update((flag[2:], given) for given in ([value] if equals else islice(rest, 1)))
        values = [named[name] for name in unflagged if name in named]
        in_front = bool(named) and unflagged[0] in named  # `export --destination X MODEL` names the second alone
        return [*(values if in_front else []), *found, *([] if in_front else values), *words[end:]]

    def refuse_command(self, word: str, commands: Iterable[str]) -> NoReturn:
        """Ends with an error for a first word that is none of the commands."""
        if word.startswith("-"):
            self.error(f"{word}: expected a command before its flags: {', '.join(commands)}")
        self.error(f"{word}: no such command{_meant(word, commands)}")

    def _unflagged(self) -> list[str]:
        return [action.dest for action in self._actions if not action.option_strings]

    def _takes_value(self, flag: str) -> bool:
        action = self._option_string_actions.get(flag)
        return action is not None and action.nargs is None

    def in_flags(self, text: str) -> str:
        """A message of the library with flags in place of Python's arguments: ``top_k must`` as ``--top-k must``."""
        flags = self.flags()

        def flag(match: re.Match[str]) -> str:
            name = match[0].removeprefix("--")
            return flags.get(name, match[0].replace("_", "-") if match[0].startswith("--") else name)

        text = re.sub(r"\b(\w+)=True\b", lambda match: flags.get(match[1], match[0]), text.removeprefix("generation: "))
        several = r"(?:--)?\b[a-z0-9]+(?:_[a-z0-9]+)+\b"
        return re.sub(rf"(?<![\w./\\'\"=-])(?:{several}|[a-z]+(?=: | must | acts ))(?![/\\'\"]|\.\w)", flag, text)


def _meant(word: str, words: Iterable[str]) -> str:
    """A question for the nearest of several words; nothing if none is near."""
    words, bare = [w for w in words if isinstance(w, str)], word.strip("-")
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.75)
    near = near or [w for w in words if len(bare) > 2 and bare in w][:3]
    near = near or [w for w in words if len(w.strip("-")) > 2 and w.strip("-") in bare][:1]
    near = near or (difflib.get_close_matches(word, words, n=1) if len(bare) > 2 else [])
    return f". Did you mean {' or '.join(near)}?" if near else ""
