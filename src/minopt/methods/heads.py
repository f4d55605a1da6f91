"""Other heads on the decoder: OPT as a classifier or a reward model, and as a reader that marks answers in a text.

The folders are those of transformers' ``OPTForSequenceClassification`` and ``OPTForQuestionAnswering``.

Shapes: B batch, T tokens, E word_embed_proj_dim, K labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

MULTI_LABEL, SINGLE_LABEL, REGRESSION = "multi_label_classification", "single_label_classification", "regression"


@dataclass(frozen=True)
class ClassifiedText:
    """A text and what a classifier says of it."""

    text: str
    label: str  # the most probable
    probabilities: Mapping[str, float]  # of each label; they add up to 1, but where a text may have several labels


@dataclass(frozen=True)
class MarkedAnswer:
    """The part of a context that answers a question."""

    text: str
    start: int  # its place: context[start:end]
    end: int
    probability: float  # that it begins where it does, times that it ends where it does


class ModelWithHead(nn.Module):
    """A decoder, ``model``, and a linear layer on its hidden states."""

    ARCHITECTURE: ClassVar[str]  # transformers' class
    HEAD: ClassVar[str]  # the linear layer's name, as there
    model: OPT

    def __init__(self, model: OPT | LanguageModel, rows: int, bias: bool, tokenizer: Tokenizer | None) -> None:
        super().__init__()
        decoder = decoder_of(model)
        if not isinstance(decoder, OPT):
            raise ValueError(f"optimize: expected True or False, got a program, which has no hidden states for "
                             f"{self.HEAD}. Load it without optimize=\"compile\".")  # fmt: skip
        self.model, self.tokenizer = decoder, tokenizer or getattr(model, "tokenizer", None)
        head = nn.Linear(decoder.config.embed_dim, rows, bias, device=decoder.device, dtype=decoder.dtype)
        nn.init.normal_(head.weight, std=decoder.config.init_std)  # as OPT's linear layers, and transformers' heads
        if bias:
            nn.init.zeros_(head.bias)
        setattr(self, self.HEAD, head)
        self.train(decoder.training)

    @classmethod
    def load(cls: type[_H], name_or_path: str | Path, **options: Any) -> _H:
        """Opens a folder of transformers' class, or of ``save``.

        Args:
            name_or_path, **options: see ``minopt.load``. By default it is fast and for inference only;
                ``optimize=False`` gives a model that can be trained.

        Raises:
            FileNotFoundError, OSError: as ``minopt.load`` does.
            ValueError: as ``minopt.load`` does; also if the folder is a language model's, or another head's.
        """
        at = {name: options.pop(name) for name in ("revision", "local_files_only") if name in options}
        path = find_model(name_or_path, **at)
        found = find_files(path)
        tensors = cls.stored(found)
        if not tensors and not found.missing:
            raise CheckpointError(
                f"{found.where}: expected {cls.HEAD}.weight, as in {cls.ARCHITECTURE}, got a model without it. To "
                f"start from a language model: minopt.{cls.__name__}(minopt.load(..., optimize=False), ...)."
            )
        ignored = options.pop("ignore", ())
        ignored = [ignored] if isinstance(ignored, str) else [*ignored]
        lm = load(path, ignore=[*(tensor.name for tensor in tensors.values()), *ignored], **options)
        made = cls(lm, **cls._told(lm.decoder.config, found.where))
        made.fill_head(tensors, found.where)
        return made.eval()

    @classmethod
    def stored(cls, found: Found) -> dict[str, SourceTensor]:
        """The head's parameters in a checkpoint, whatever wrapper stands in front of their names; none of another's."""
        names = {f"{cls.HEAD}.{name}": name for name in ("weight", "bias")}
        ends = ((".".join(key.split(".")[-2:]), tensor) for key, tensor in stored_tensors(found).items())
        return {names[end]: tensor for end, tensor in ends if end in names}

    @classmethod
    def _told(cls, config: OPTConfig, where: object) -> dict[str, Any]:
        """Arguments that config.json gives."""
        return {}

    def fill_head(self, tensors: Mapping[str, SourceTensor], where: object) -> None:
        """Reads the head; ``ValueError`` if it is of another shape."""
        head = getattr(self, self.HEAD)
        expected = {name: list(parameter.shape) for name, parameter in head.named_parameters()}
        if expected != (got := {name: list(tensor.shape) for name, tensor in tensors.items()}):
            raise CheckpointError(f"{where}: expected {self.HEAD} of {expected}, by config.json's word_embed_proj_dim "
                                  f"and id2label, got {got}. Do config and weights belong together?")  # fmt: skip
        head.load_state_dict({name: tensor.read(head.weight.dtype) for name, tensor in tensors.items()})

    def settings(self) -> dict[str, Any]:
        """What config.json says of the head."""
        return {}

    def save(self, folder: str | Path, *, force: bool = False) -> None:
        """Writes a folder that transformers opens as its class; see ``minopt.save_model``, also for what it raises."""
        head = getattr(self, self.HEAD)
        tensors = {f"{self.HEAD}.{name}": parameter.detach() for name, parameter in head.named_parameters()}
        written = Head(self.ARCHITECTURE, tensors, self.settings())
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

    A new one has random numbers in ``score``, drawn as OPT's own, and shares its decoder with the model.

    Args:
        model: a language model; to train, ``minopt.load(..., optimize=False)``, whose tokenizer comes along.
        labels: their names, or how many there are. One label makes a regression, such as a reward model.
        problem_type: ``"single_label_classification"``, ``"multi_label_classification"``, ``"regression"``, or
            ``None``, which is the last for one label and else the first; as in transformers.
        tokenizer: for ``classify`` and ``rewards``.
    """

    ARCHITECTURE, HEAD = "OPTForSequenceClassification", "score"
    score: nn.Linear

    def __init__(
        self, model: OPT | LanguageModel, labels: int | Sequence[str] = 2, problem_type: str | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:  # fmt: skip
        names = label_names(labels)
        known = (None, SINGLE_LABEL, MULTI_LABEL, REGRESSION)
        if problem_type not in known or (problem_type == SINGLE_LABEL and len(names) == 1):
            raise ValueError(f"problem_type: expected {', '.join(map(str, known))}, the second for two labels or more, "
                             f"got {problem_type!r} for {len(names)}.")  # fmt: skip
        super().__init__(model, len(names), False, tokenizer)
        self.labels, self.problem_type = names, problem_type

    @classmethod
    def _told(cls, config: OPTConfig, where: object) -> dict[str, Any]:
        labels = labels_of(config, where) or 2  # transformers' default
        return {"labels": labels, "problem_type": config.extra.get("problem_type")}

    def settings(self) -> dict[str, Any]:
        """What config.json says of the labels, as transformers writes it."""
        found: dict[str, Any] = {"id2label": {str(i): name for i, name in enumerate(self.labels)},
                                 "label2id": {name: i for i, name in enumerate(self.labels)}}  # fmt: skip
        return found | ({"problem_type": self.problem_type} if self.problem_type else {})

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The scores of the last real token of each row.

        transformers takes the last token that is not ``pad_token_id``, and looks at no mask: with a mask that agrees,
        that is the same one. It is another where a text itself ends with that token, or where padding is another one.

        Args:
            input_ids: ``[B, T]``, padded anywhere.
            attention_mask: ``[B, T]``, 1 or True = real; ``None`` says that none is padding.

        Returns:
            ``[B, K]`` in the model's dtype: logits, or values in a regression.

        Raises:
            ValueError: if shapes do not fit, a row has no real token, or rows look padded and there is no mask.
        """
        h = self.model.hidden_states(input_ids, attention_mask)  # checks shapes
        pad = self.model.config.pad_token_id
        if attention_mask is None:
            if pad is not None and bool((input_ids[:, [0, -1]] == pad).any()):
                raise ValueError(f"attention_mask: expected one, for rows begin or end with the padding token {pad}, "
                                 "got None, which says that all are real. Give it, of ones if they are.")  # fmt: skip
            return self.score(h[:, -1])
        if not bool(attention_mask.any(1).all()):
            raise ValueError("attention_mask: expected a real token in each row, got a row of padding. Leave it out.")
        return self.score(h[torch.arange(len(h), device=h.device), _last_real(attention_mask)])

    def classify(self, texts: Sequence[str], **limits: Any) -> list[ClassifiedText]:
        """Says of each text which label it has, and how probable each is.

        Args:
            texts: any number; special tokens are added as in ``Tokenizer.encode``.
            **limits: ``batch_size`` and ``max_batch_tokens`` of ``generation.batches.cut_batches``.

        Returns:
            A ``ClassifiedText`` for each, in order. With several labels to a text (``problem_type``), each probability
            is one of its own: those above 0.5 hold.

        Raises:
            ValueError: for a regression, without a tokenizer, or for a text that is empty or too long.
        """
        if self.problem_type == REGRESSION or len(self.labels) == 1:
            raise ValueError("classify: expected a model with labels, got a regression, whose outputs are numbers. "
                             "Call rewards, or the model with ids.")  # fmt: skip
        scores = self._scores(texts, limits)
        found = scores.sigmoid() if self.problem_type == MULTI_LABEL else scores.softmax(1)
        return [
            ClassifiedText(text, self.labels[int(row.argmax())], dict(zip(self.labels, row.tolist(), strict=True)))
            for text, row in zip(texts, found, strict=True)
        ]

    def rewards(self, texts: Sequence[str], **limits: Any) -> list[float]:
        """The one number that a reward model, or another regression, gives to each text; else as ``classify``."""
        if len(self.labels) > 1:
            raise ValueError(f"rewards: expected a model of one output, got {len(self.labels)} labels. Call classify.")
        return [value for (value,) in self._scores(texts, limits).tolist()]

    @torch.inference_mode()
    def _scores(self, texts: Sequence[str], limits: Mapping[str, Any]) -> Tensor:
        """``[texts, K]``, float32, on the CPU."""
        rows = self._encoded(texts)
        scores = torch.empty(len(rows), len(self.labels))
        for batch in cut_batches(list(map(len, rows)), **limits):
            ids, mask = pad_left([rows[i] for i in batch], self.model.config.pad_token_id)
            mask = torch.ones_like(ids) if mask is None else mask
            scores[batch] = self(ids.to(self.model.device), mask.to(self.model.device)).float().cpu()
        return scores


class QuestionAnswering(ModelWithHead):
    """An OPT that marks answers: ``qa_outputs`` scores each token as an answer's first and as its last one.

    A new one has random numbers in it; for the arguments see ``SequenceClassifier``.
    """

    ARCHITECTURE, HEAD = "OPTForQuestionAnswering", "qa_outputs"
    qa_outputs: nn.Linear

    def __init__(self, model: OPT | LanguageModel, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(model, 2, True, tokenizer)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The scores of each token as the first and as the last one of an answer, ``[B, T]`` both.

        Args and errors are those of ``OPT.hidden_states``; rows of padding have numbers without a meaning.
        """
        start, end = self.qa_outputs(self.model.hidden_states(input_ids, attention_mask)).unbind(-1)
        return start, end

    @torch.inference_mode()
    def answer(self, question: str, context: str, *, max_answer_tokens: int = 30) -> MarkedAnswer:
        """The most probable answer in a context of at most so many tokens; question and context are read as a pair.

        Raises:
            ValueError: if a text is empty, the two are longer than the model's positions, or there is no tokenizer.
        """
        self._encoded([question, context])
        if not is_int(max_answer_tokens) or max_answer_tokens < 1:
            raise ValueError(f"max_answer_tokens: expected an integer of at least 1, got {max_answer_tokens!r}.")
        assert self.tokenizer is not None
        encoding = self.tokenizer.backend.encode(question, context)
        ids = torch.tensor([encoding.ids], device=self.model.device)
        places = [i for i, of in enumerate(encoding.sequence_ids) if of == 1]
        first, last = (scores[0, places].float().softmax(0) for scores in self(ids))
        both = (first[:, None] * last).triu().tril(max_answer_tokens - 1)  # [T, T]: ends at or after its beginning
        begin, end = divmod(int(both.argmax()), len(places))
        start, stop = encoding.offsets[places[begin]][0], encoding.offsets[places[end]][1]
        text = context[start:stop]
        start += len(text) - len(text.lstrip())
        return MarkedAnswer(text.strip(), start, start + len(text.strip()), float(both[begin, end]))


def label_names(labels: int | Sequence[str]) -> tuple[str, ...]:
    """Names of labels: as given, or as transformers calls so many; ``ValueError`` if that is none."""
    if is_int(labels) and isinstance(labels, int) and labels >= 1:
        return tuple(f"LABEL_{i}" for i in range(labels))
    names = () if isinstance(labels, (int, str)) or not isinstance(labels, Sequence) else tuple(labels)
    if not names or not all(isinstance(name, str) for name in names) or len({*names}) < len(names):
        raise ValueError(f"labels: expected how many there are, at least 1, or their names, each once, got {labels!r}.")
    return names


def labels_of(config: OPTConfig, where: object) -> tuple[str, ...] | None:
    """The names of the labels in a configuration; ``None`` if it has none."""
    named, count = config.extra.get("id2label"), config.extra.get("num_labels")
    try:
        if named is None:
            return None if count is None else label_names(count)
        by_id = {int(key): name for key, name in named.items()}
        if count not in (None, len(by_id)):
            raise ValueError
        return label_names([by_id[i] for i in range(len(by_id))])
    except (AttributeError, LookupError, TypeError, ValueError):
        raise CheckpointError(f"{where}: id2label: expected a name for each label from 0 on, got {named!r}, num_labels "
                              f"{count!r} (config.json). Fetch config.json again.") from None  # fmt: skip


def _last_real(mask: Tensor) -> Tensor:
    """The index ``[B]`` of the last real token of each row."""
    return (mask.bool() * torch.arange(mask.shape[1], device=mask.device)).amax(1)
