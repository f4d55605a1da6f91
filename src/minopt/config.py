"""The configuration of an OPT model: the fields of its published config.json, frozen and checked.

Imports no torch, so that a configuration can be read and planned with anywhere.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from minopt.strangers import what_it_is

logger = logging.getLogger(__name__)

# Names as in transformers; model.py has the functions.
ACTIVATION_NAMES = ("relu", "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh",
                    "gelu_python_tanh", "quick_gelu", "silu", "swish", "relu2", "relu6", "leaky_relu", "hardswish",
                    "mish", "tanh", "sigmoid", "linear")  # fmt: skip

# The fields by which published sizes differ. Not the vocabulary: fine-tunes resize it.
_SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim", "word_embed_proj_dim",
          "max_position_embeddings", "do_layer_norm_before", "activation_function", "enable_bias",
          "layer_norm_elementwise_affine")  # fmt: skip

MOST_TEXT_BYTES = 20_000_000  # of a tokenizer's file: Galactica's has 2 MB

MOST_JSON_BYTES = 10_000_000  # of JSON that Python reads, which takes 20 times a file's size in memory

TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def is_int(value: object) -> bool:
    """Whether a value is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a finite number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def _is_size(value: Any) -> bool:
    return is_int(value) and 1 <= value < 2**31  # the product of two fits in 64 bits


# Fields, which values each may have, and how that reads in an error.
_RULES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (("vocab_size", "hidden_size", "num_hidden_layers", "ffn_dim", "max_position_embeddings", "word_embed_proj_dim",
      "num_attention_heads"), _is_size, "a positive integer"),
    (("do_layer_norm_before", "enable_bias", "layer_norm_elementwise_affine", "tie_word_embeddings",
      "_remove_final_layer_norm"), lambda value: isinstance(value, bool), "true or false"),
    (("dropout", "attention_dropout", "layerdrop"), lambda value: is_number(value) and 0 <= value <= 1, "in [0, 1]"),
    (("init_std",), lambda value: is_number(value) and value >= 0, "0 or more"),
    (("activation_function",), lambda value: value in ACTIVATION_NAMES, f"one of {list(ACTIVATION_NAMES)}"),
)  # fmt: skip


@dataclass(frozen=True)
class OPTConfig:
    """Shape and options of an OPT decoder, under the names of the published ``config.json``.

    The defaults are opt-125m's. Everything is checked on construction; nothing changes afterwards. ``ValueError`` names
    each rule that the values break.
    """

    vocab_size: int = 50272  # rows of the token table, V: OPT has 50,265 tokens, padded to a multiple of 8
    hidden_size: int = 768  # width of the residual stream, C
    num_hidden_layers: int = 12  # L
    ffn_dim: int = 3072  # width of the feed-forward layer, F
    max_position_embeddings: int = 2048  # the longest sequence in tokens (the table has two rows more)
    do_layer_norm_before: bool = True  # pre-norm (every size but 350m) or post-norm (350m)
    # Width of the token table, E; None is hidden_size. Bias-free projections lie between the two if they differ (350m).
    word_embed_proj_dim: int | None = None
    num_attention_heads: int = 12  # H
    activation_function: str = "relu"  # "gelu" is Galactica's (the exact form); others are in ACTIVATION_NAMES
    dropout: float = 0.1  # of the outputs of attention and of the feed-forward, in training
    attention_dropout: float = 0.0  # of the attention weights, in training
    layerdrop: float = 0.0  # probability of skipping a layer, in training
    # Standard deviation of initial weights: OPT's, by section 2.2 of arXiv 2205.01068. The published files say 0.02,
    # the default of the converter's library.
    init_std: float = 0.006
    # Ids, or None where there is none. OPT begins a text with </s> (2), its bos and eos alike.
    pad_token_id: int | None = 1
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 2
    enable_bias: bool = True  # of linear layers (Galactica: no)
    layer_norm_elementwise_affine: bool = True  # whether norms have weight and bias (Galactica: no)
    tie_word_embeddings: bool = True  # the file's, kept; the head is always the token table, and saved as such
    _remove_final_layer_norm: bool = False  # of the decoder, in fine-tunes made before transformers 4.20.1
    # Keys of the file that mean nothing here, kept so that saving loses nothing; not compared.
    extra: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.word_embed_proj_dim is None:
            object.__setattr__(self, "word_embed_proj_dim", self.hidden_size)
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        if problems := self._problems():
            raise ValueError("OPTConfig: " + "; ".join(problems) + ".")

    def _problems(self) -> list[str]:
        values, problems = vars(self), []
        for names, fits, expected in _RULES:
            problems += [f"{name} must be {expected}, got {values[name]!r}" for name in names if not fits(values[name])]
        C, H = self.hidden_size, self.num_attention_heads
        if _is_size(C) and _is_size(H) and C % H:
            problems.append(f"hidden_size must be a multiple of num_attention_heads, got {C} and {H}")
        rows = self.vocab_size if _is_size(self.vocab_size) else float("inf")
        for name in TOKEN_IDS:
            ids = self.eos_token_ids if name == "eos_token_id" else (values[name],)
            if values[name] is not None and not all(is_int(i) and 0 <= i < rows for i in ids):
                wanted = f"a row of the vocabulary (0 to {rows - 1}) or null"
                problems.append(f"{name} must be {wanted}, got {values[name]!r}")
        return problems

    @property
    def head_dim(self) -> int:
        """Width of one attention head, D."""
        return self.hidden_size // self.num_attention_heads

    @property
    def embed_dim(self) -> int:
        """Width of the token table, E: ``word_embed_proj_dim`` with its default filled in."""
        assert self.word_embed_proj_dim is not None
        return self.word_embed_proj_dim

    @property
    def has_final_layer_norm(self) -> bool:
        """Whether a norm follows the last layer: in pre-norm models, but for old fine-tunes."""
        return self.do_layer_norm_before and not self._remove_final_layer_norm

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text, none to many."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @classmethod
    def preset(cls, name: str) -> OPTConfig:
        """The configuration of a published size, such as ``"opt-125m"``. ``ValueError`` lists the known ones."""
        if name not in _PRESETS:
            raise ValueError(f"OPTConfig.preset: unknown name {name!r}, expected one of {', '.join(_PRESETS)}.")
        return cls(**_PRESETS[name])

    @property
    def preset_name(self) -> str | None:
        """The published size of this shape, whatever its vocabulary; ``None`` where there is none."""
        shape = [getattr(self, name) for name in _SHAPE]
        return next((name for name in PRESETS if [getattr(OPTConfig.preset(name), f) for f in _SHAPE] == shape), None)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OPTConfig:
        """Builds a configuration from the content of a config.json; keys it does not know go to ``extra``.

        A larger model's (BLIP-2, say) gives the OPT's part. A token id that is no row of the token table, such as
        a pad of -1, means nothing: it becomes ``None``, with a warning. ``ValueError`` if ``model_type`` is not
        ``"opt"``, or the values break a rule.
        """
        if values.get("model_type") != "opt":
            inner = [v for v in values.values() if isinstance(v, dict) and v.get("model_type") == "opt"]
            if len(inner) == 1:
                return cls.from_dict(inner[0])
            classes = values.get("architectures")
            is_opt = isinstance(classes, list) and len(classes) > 0 and str(classes[0]).startswith("OPT")
            if values.get("model_type") is not None or not is_opt:
                raise ValueError(f'model_type: expected "opt", got {values.get("model_type")!r}.')
        known = {f.name for f in fields(cls)} - {"extra"}
        taken = {k: v for k, v in values.items() if k in known}
        for name in TOKEN_IDS:
            if name in taken:
                taken[name] = within_table(name, taken[name], taken.get("vocab_size", cls.vocab_size))
        return cls(**taken, extra={k: v for k, v in values.items() if k not in known and k != "model_type"})

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that transformers reads, ``extra`` included."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        if isinstance(self.eos_token_id, tuple):
            values["eos_token_id"] = list(self.eos_token_id)
        return {"architectures": ["OPTForCausalLM"], **self.extra, "model_type": "opt", **values}

    @classmethod
    def load(cls, path: str | Path) -> OPTConfig:
        """Reads a config.json, or the one in a folder. ``ValueError`` names a file that is none of an OPT."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        values = read_json(path)
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def check_text_size(path: Path, most_bytes: int = MOST_TEXT_BYTES) -> None:
    """Raises ``ValueError`` for a configuration or a tokenizer that is too large to be one, before it is read."""
    size = path.stat().st_size
    if size > most_bytes:
        raise ValueError(f"{path}: expected at most {most_bytes:,} bytes, got {size:,}. Fetch the file again.")


def read_json(path: Path, most_bytes: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most so many bytes. ``ValueError`` names a file that holds anything else."""
    check_text_size(path, most_bytes)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors alike
        got = f"got {what}" if (what := what_it_is(path)) else f"{error}. Fetch the file again."
        raise ValueError(f"{path}: expected JSON, {got}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}. Fetch the file again.")
    if isinstance(content.get("error"), str):
        raise ValueError(f"{path}: a server's error, saved as the file: {content['error'][:200]!r}. Fetch it again.")
    return content


def within_table(name: str, ids: Any, rows: Any) -> Any:
    """Drops ids outside of the token table, with a warning. Such an id cannot occur in a text."""
    if not is_int(rows) or not (is_int(ids) or (isinstance(ids, list) and all(map(is_int, ids)))):
        return ids  # of a wrong type, which OPTConfig refuses
    given = ids if isinstance(ids, list) else [ids]
    kept = [i for i in given if 0 <= i < rows]
    if kept == given:
        return ids
    logger.warning("%s: %s is no row of the token table (0 to %d), so it is left out.", name, ids, rows - 1)
    return kept or None


def _presets() -> dict[str, dict[str, Any]]:
    # Table 1 of arXiv 2205.01068 (350m: embeddings of width 512, post-norm: metaseq issue 388), and table 5
    # of arXiv 2211.09085 (Galactica), whose models have neither biases nor norm weights (transformers PR 20390).
    opt = {"125m": (768, 12, 12), "350m": (1024, 24, 16), "1.3b": (2048, 24, 32), "2.7b": (2560, 32, 32),
           "6.7b": (4096, 32, 32), "13b": (5120, 40, 40), "30b": (7168, 48, 56), "66b": (9216, 64, 72),
           "175b": (12288, 96, 96)}  # fmt: skip
    galactica = {"125m": (768, 12, 12), "1.3b": (2048, 24, 32), "6.7b": (4096, 32, 32), "30b": (7168, 48, 56),
                 "120b": (10240, 96, 80)}  # fmt: skip

    def shape(hidden_size: int, layers: int, heads: int) -> dict[str, Any]:
        return {"hidden_size": hidden_size, "num_hidden_layers": layers, "num_attention_heads": heads,
                "ffn_dim": 4 * hidden_size}  # fmt: skip

    presets = {f"opt-{size}": shape(*numbers) for size, numbers in opt.items()}
    presets["opt-350m"] |= {"word_embed_proj_dim": 512, "do_layer_norm_before": False}
    plain = {"vocab_size": 50000, "bos_token_id": 0, "activation_function": "gelu", "attention_dropout": 0.1,
             "enable_bias": False, "layer_norm_elementwise_affine": False}  # fmt: skip
    return presets | {f"galactica-{size}": shape(*numbers) | plain for size, numbers in galactica.items()}


_PRESETS = _presets()

PRESETS = tuple(_PRESETS)
"""The names that ``OPTConfig.preset`` knows."""
