"""Other heads on the decoder: OPT as a classifier or a reward model, and as one that marks answers in a text.

The folders are those of transformers' ``OPTForSequenceClassification`` and ``OPTForQuestionAnswering``.

Shapes: B batch, T tokens, K labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from minopt.checkpoint.errors import CheckpointError
from minopt.checkpoint.find import Found, find_files
from minopt.checkpoint.hub import find_model
from minopt.checkpoint.huggingface import stored_tensors
from minopt.checkpoint.save import Head, save_model
from minopt.checkpoint.tensors import SourceTensor
from minopt.config import OPTConfig, is_int
from minopt.generation.batches import cut_batches
from minopt.loading import load
from minopt.model import OPT
from minopt.text import LanguageModel
from minopt.tokenizer import Tokenizer, pad_left
from minopt.wrapped import decoder_of

_H = TypeVar("_H", bound="ModelWithHead")

SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


@dataclass(frozen=True)
class ClassifiedText:
    """A text and what a classifier says of it."""

    text: str
    label: str  # the most probable
    probabilities: Mapping[str, float]  # of each label


class ModelWithHead(nn.Module):
    """A decoder, ``model``, and a linear layer on its hidden states, with a name as in transformers' class."""

    ARCHITECTURE: ClassVar[str]
    HEAD: ClassVar[str]
    model: OPT
    settings: Mapping[str, Any]  # what config.json says of the head

    def __init__(self, model: OPT | LanguageModel, rows: int, bias: bool, tokenizer: Tokenizer | None) -> None:
        super().__init__()
        decoder = decoder_of(model).as_opt()
        self.model, self.tokenizer = decoder, tokenizer or getattr(model, "tokenizer", None)
        head = nn.Linear(decoder.config.embed_dim, rows, bias, device=decoder.device, dtype=decoder.dtype)
        nn.init.normal_(head.weight, std=decoder.config.init_std)  # as OPT's linear layers, and as in transformers
        if bias:
            nn.init.zeros_(head.bias)
        setattr(self, self.HEAD, head)
        self.train(decoder.training)

    @classmethod
    def load(cls: type[_H], name_or_path: str | Path, **options: Any) -> _H:
        """Opens a folder of transformers' class.

        Args:
            name_or_path, **options: see ``minopt.load``. By default the model is fast and for inference only;
                ``optimize=False`` gives one that can be trained.

        Raises:
            FileNotFoundError, OSError: as ``minopt.load`` does.
            ValueError: as ``minopt.load`` does; also if the folder has not this head.
        """
        if options.get("optimize") == "compile":
            raise ValueError(
                'optimize: expected True or False, got "compile", which has no hidden states. Leave it out.'
            )
        given = {name: options.pop(name) for name in ("revision", "local_files_only") if name in options}
        path = find_model(name_or_path, **given)
        found = find_files(path)
        stored = cls.stored(found)
        if not stored and not found.missing:
            raise CheckpointError(
                f"{found.where}: expected {cls.HEAD}.weight, as in {cls.ARCHITECTURE}, got a model without it. To "
                f"start from a language model: minopt.{cls.__name__}(minopt.load(..., optimize=False), ...)."
            )
        ignore = [*options.pop("ignore", ()), *(tensor.name for tensor in stored.values())]
        lm = load(path, ignore=ignore, **options)
        made = cls(lm, **cls._told(lm.decoder.config, found.where))
        head: nn.Linear = getattr(made, cls.HEAD)
        check_head(stored, {name: parameter.shape for name, parameter in head.named_parameters()}, found.where)
        head.load_state_dict({name: tensor.read(head.weight.dtype) for name, tensor in stored.items()})
        return made.eval()

    @classmethod
    def stored(cls, found: Found) -> dict[str, SourceTensor]:
        """The head's parameters in a checkpoint, whatever stands in front of their names; none of another's."""
        ends = ((key.split(".")[-2:], key, tensor) for key, tensor in stored_tensors(found).items())
        return {e[1]: replace(t, name=key) for e, key, t in ends if e in ([cls.HEAD, "weight"], [cls.HEAD, "bias"])}

    @classmethod
    def _told(cls, config: OPTConfig, where: object) -> dict[str, Any]:
        """What config.json says for ``__init__``."""
        return {}

    def save(self, folder: str | Path, *, force: bool = False) -> None:
        """Writes a folder that transformers opens; see ``minopt.save_model``, also for what it raises."""
        head = getattr(self, self.HEAD)
        tensors = {f"{self.HEAD}.{name}": parameter.detach() for name, parameter in head.named_parameters()}
        written = Head(self.ARCHITECTURE, tensors, self.settings)
        save_model(self.model, folder, self.tokenizer, force=force, head=written)

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts, which have to be some and to fit into the model."""
        if self.tokenizer is None:
            raise ValueError("tokenizer: the model's folder has none. Add its files there, or call the model with ids.")
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise ValueError(f"texts: expected a list of texts, got {type(texts).__name__}. Put it into a list.")
        for number, text in enumerate(texts, 1):
            if not isinstance(text, str) or not text.strip():
                got = "an empty one" if isinstance(text, str) else type(text).__name__
                raise ValueError(f"texts: expected words, got {got} ({number} of {len(texts)}). Leave it out.")
        rows, most = self.tokenizer.encode_each(texts), self.model.config.max_position_embeddings
        if long := next((number for number, row in enumerate(rows, 1) if len(row) > most), None):
            raise ValueError(f"texts: expected at most {most} tokens, the model's positions, got {len(rows[long - 1])} "
                             f"({long} of {len(texts)}). Shorten it.")  # fmt: skip
        return rows


class SequenceClassifier(ModelWithHead):
    """An OPT that sorts texts, or rates them: ``score``, a linear layer without bias, on the last token of a text.

    A new one shares its decoder with the model, and has random numbers in ``score``, drawn as OPT's own.

    Args:
        model: a language model; to train, ``minopt.load(..., optimize=False)``, whose tokenizer comes along.
        labels: their names, or how many there are. One makes a regression, such as a reward model.
        problem_type: as in transformers: ``"single_label_classification"``, which ``None`` is with two labels or more,
            ``"multi_label_classification"`` or ``"regression"``.
        tokenizer: for ``classify`` and ``rewards``.
    """

    ARCHITECTURE, HEAD = "OPTForSequenceClassification", "score"
    score: nn.Linear

    def __init__(
        self, model: OPT | LanguageModel, labels: int | Sequence[str] = 2, problem_type: str | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:  # fmt: skip
        names, known = label_names(labels), (None, MULTI_LABEL, REGRESSION, SINGLE_LABEL)
        if problem_type not in known[: 3 + (len(names) > 1)]:
            raise ValueError(f"problem_type: expected {', '.join(map(str, known))} (of two labels or more), got "
                             f"{problem_type!r} of {len(names)}. Leave it out.")  # fmt: skip
        super().__init__(model, len(names), False, tokenizer)
        self.labels, self.problem_type, self.settings = names, problem_type, label_settings(names, problem_type)

    @classmethod
    def _told(cls, config: OPTConfig, where: object) -> dict[str, Any]:
        return {"labels": labels_of(config, where), "problem_type": config.extra.get("problem_type")}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The scores of the last real token of each row.

        transformers takes the last id that is not ``pad_token_id``, whatever the mask says. That is another token where
        a text ends with this id, or where padding has another one.

        Args:
            input_ids: ``[B, T]``, padded anywhere.
            attention_mask: ``[B, T]``, 1 or True = real; ``None`` says that none is padding.

        Returns:
            ``[B, K]`` in the model's dtype: logits, or the values of a regression.

        Raises:
            ValueError: if shapes do not fit, a row has no real token, or rows look padded and there is no mask.
        """
        h = self.model.hidden_states(input_ids, attention_mask)  # checks shapes
        if attention_mask is None:
            pad = self.model.config.pad_token_id
            if pad is not None and bool((input_ids[:, [0, -1]] == pad).any()):
                raise ValueError(f"attention_mask: expected one, for rows begin or end with the padding token {pad}, "
                                 "got None, which says that all are real. Give it, of ones if they are.")  # fmt: skip
            return self.score(h[:, -1])
        if not bool(attention_mask.any(1).all()):
            raise ValueError("attention_mask: expected a real token in each row, got a row of padding. Leave it out.")
        slots = torch.arange(h.shape[1], device=h.device)
        return self.score(h[torch.arange(len(h), device=h.device), (attention_mask.bool() * slots).amax(1)])

    def classify(self, texts: Sequence[str], **limits: Any) -> list[ClassifiedText]:
        """Says of each text which label it has, and how probable each is.

        Args:
            texts: any number of them.
            **limits: ``batch_size`` and ``max_batch_tokens`` of ``generation.batches.cut_batches``.

        Returns:
            A ``ClassifiedText`` for each, in order. The probabilities add up to 1; those of a
            ``"multi_label_classification"`` are independent.

        Raises:
            ValueError: for a regression, without a tokenizer, or for a text that is empty or too long.
        """
        if self.problem_type == REGRESSION or len(self.labels) == 1:
            raise ValueError("classify: expected a model with labels, got a regression. Call rewards, or it with ids.")
        scores = self._scores(texts, limits)
        found = scores.sigmoid() if self.problem_type == MULTI_LABEL else scores.softmax(1)
        return [
            ClassifiedText(text, self.labels[int(row.argmax())], dict(zip(self.labels, row.tolist(), strict=True)))
            for text, row in zip(texts, found, strict=True)
        ]

    def rewards(self, texts: Sequence[str], **limits: Any) -> list[float]:
        """The number that a reward model, or another regression, gives to each text; else as ``classify``."""
        if len(self.labels) > 1:
            raise ValueError(f"rewards: expected a model of one output, got {len(self.labels)} labels. Call classify.")
        return [value for (value,) in self._scores(texts, limits).tolist()]

    @torch.inference_mode()
    def _scores(self, texts: Sequence[str], limits: Mapping[str, Any]) -> Tensor:
        """``[texts, K]``, float32, on the CPU."""
        rows = self._encoded(texts)
        scores = torch.empty(len(rows), len(self.labels))
        for batch in cut_batches(list(map(len, rows)), **limits):
            scores[batch] = self.scores_of([rows[i] for i in batch])
        return scores

    def scores_of(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Scores of ids ``[rows, K]``, float32, on the CPU."""
        ids, mask = pad_left(rows, self.model.config.pad_token_id)
        mask = torch.ones_like(ids) if mask is None else mask
        return self(ids.to(self.model.device), mask.to(self.model.device)).float().cpu()


class QuestionAnswering(ModelWithHead):
    """An OPT that marks answers: ``qa_outputs`` scores each token as an answer's first and as its last one."""

    ARCHITECTURE, HEAD = "OPTForQuestionAnswering", "qa_outputs"
    qa_outputs: nn.Linear

    def __init__(self, model: OPT | LanguageModel, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(model, 2, True, tokenizer)
        self.settings = {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The scores of each token as the first and as the last one of an answer, ``[B, T]`` both.

        Args and errors are those of ``OPT.hidden_states``.
        """
        start, end = self.qa_outputs(self.model.hidden_states(input_ids, attention_mask)).unbind(-1)
        return start, end


def check_head(stored: Mapping[str, SourceTensor], expected: Mapping[str, Sequence[int]], where: object) -> None:
    """Refuses a stored head of other shapes than the configuration's."""
    wanted, got = ({k: [*s] for k, s in of.items()} for of in (expected, {k: t.shape for k, t in stored.items()}))
    if wanted != got:
        raise CheckpointError(f"{where}: expected a head of {wanted}, by word_embed_proj_dim and id2label of "
                              f"config.json, got {got}. Do config and weights belong together?")  # fmt: skip


def label_names(labels: int | Sequence[str]) -> tuple[str, ...]:
    """Names of labels: as given, or as transformers calls so many; ``ValueError`` if that is none."""
    given = [f"LABEL_{i}" for i in range(labels)] if isinstance(labels, int) and is_int(labels) else labels
    if not isinstance(given, (list, tuple)) or not given or len({n for n in given if isinstance(n, str)}) < len(given):
        raise ValueError(f"labels: expected how many, at least 1, or their names, each once, got {labels!r}.")
    return tuple(given)


def labels_of(config: OPTConfig, where: object) -> tuple[str, ...]:
    """The names of the labels in a configuration; transformers' two if it has none."""
    named, count = config.extra.get("id2label"), config.extra.get("num_labels", 2)
    try:
        by_id = {int(key): name for key, name in (named or {}).items()}
        return label_names([by_id[i] for i in range(len(by_id))] if named is not None else count)
    except (AttributeError, LookupError, TypeError, ValueError):
        raise CheckpointError(
            f"{where}: id2label: expected a name for each label from 0 on, got {named!r}. Fetch config.json again."
        ) from None


def label_settings(labels: Sequence[str], problem_type: str | None) -> dict[str, Any]:
    """What config.json says of labels, as transformers writes it."""
    numbered = {str(i): name for i, name in enumerate(labels)}
    ids = {name: i for i, name in enumerate(labels)}
    # The last even if None: in its place may stand that of the classifier from which the decoder comes.
    return {"id2label": numbered, "label2id": ids, "problem_type": problem_type}
