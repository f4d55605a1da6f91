"""Text in, text out, on the checkpoint that the package carries."""

from __future__ import annotations

import codecs
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import minopt
from minopt import GenerationConfig, Tokenizer
from minopt.checkpoint.checkpoint import open_checkpoint
from minopt.generation import texts as module
from minopt.generation.continuous import SCORES_IN_TOKENS
from minopt.stops import Pieces
from tests.test_tokenizer import STOP_ALPHABET, STOP_TEXTS, first_stop, stop_ids, write_marked

PROMPTS = ["It was a dark night", "The captain", "“I will go,” said the old man, and he", ""]


@pytest.fixture(scope="module")
def lm() -> minopt.LanguageModel:
    return minopt.load(minopt.DEMO, device="cpu")


@pytest.fixture(scope="module")
def reference() -> Any:
    """transformers' model of the same files."""
    return transformers.OPTForCausalLM.from_pretrained(minopt.DEMO, dtype=torch.float32).eval()


def ids_of(lm: minopt.LanguageModel, text: str) -> list[int]:
    assert lm.tokenizer is not None
    return lm.tokenizer.encode(text)


def test_the_embedded_checkpoint_is_small_long_and_known_to_transformers(lm: minopt.LanguageModel) -> None:
    weights = Path(minopt.DEMO) / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    assert lm.model.config.max_position_embeddings >= 1024
    assert lm.tokenizer is not None
    assert lm.tokenizer.encode("x")[0] == lm.model.config.bos_token_id == 2
    assert transformers.AutoConfig.from_pretrained(minopt.DEMO).model_type == "opt"


def test_text_is_that_of_transformers(lm: minopt.LanguageModel, reference: Any) -> None:
    """Through its own tokenizer, model and generate, one prompt at a time and as a padded batch."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minopt.DEMO)
    expected = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        output = reference.generate(ids, max_new_tokens=30, do_sample=False)
        expected.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    assert [lm.generate(prompt, max_new_tokens=30) for prompt in PROMPTS] == expected
    assert lm.generate(PROMPTS, max_new_tokens=30) == expected


def test_details_tell_tokens_log_probabilities_and_why_it_stopped(lm: minopt.LanguageModel) -> None:
    """In a padded batch, before any rule, whatever was chosen."""
    assert lm.tokenizer is not None
    options: dict[str, Any] = {"max_new_tokens": 8, "suppress_tokens": ids_of(lm, " the"), "top_logprobs": 3}
    for prompt, record in zip(PROMPTS, lm.generate(PROMPTS, return_details=True, **options), strict=True):
        assert lm.tokenizer.decode(record.token_ids) == record.text
        assert (len(record.token_ids), record.stop_reason) == (8, "length")
        ids = torch.tensor([lm.tokenizer.encode(prompt) + list(record.token_ids)])
        logprobs = lm.model(ids)[0, -9:-1].log_softmax(-1)
        assert torch.allclose(torch.tensor(record.logprobs), logprobs[range(8), ids[0, -8:]], atol=1e-4)
        values, tokens = logprobs.topk(3)
        assert [[token for token, _ in step] for step in record.top_logprobs] == tokens.tolist()
        assert torch.allclose(torch.tensor([[v for _, v in step] for step in record.top_logprobs]), values, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 3, "temperature": 1.5}])
def test_a_stream_adds_up_to_the_text(
    lm: minopt.LanguageModel, options: dict[str, object], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a look each step too, or with one every eighth as on a GPU."""
    monkeypatch.setattr(module, "steps_between_looks", lambda request: steps)
    for prompt in PROMPTS:
        pieces = lm.stream(prompt, max_new_tokens=40, **options)
        assert isinstance(pieces, Iterator)
        parts = list(pieces)
        assert len(parts) > 10
        assert "".join(parts) == lm.generate(prompt, max_new_tokens=40, **options)


REFUSED: list[tuple[Callable[[Any], Any], str]] = [
    (lambda lm: lm.stream("x", max_new_tokens=2000), "max_new_tokens 2000"),
    (lambda lm: lm.stream("x", do_sample=True, seed=1, generator=torch.Generator()), "give a seed or a generator, not"),
    (lambda lm: lm.stream("x", num_beams=2), r"^num_beams: a stream has one continuation, got 2\. Set it to 1, or use"),
    (lambda lm: lm.stream("x", do_sample=True, num_return_sequences=3), r"^num_return_sequences: a stream has one"),
    (lambda lm: lm.stream("x", output_logprobs=True), "output_logprobs: cannot be returned"),
    (lambda lm: lm.stream("x", top_logprobs=2), "top_logprobs: cannot be returned"),
    (lambda lm: lm.stream("x", output_scores=True), "output_scores: cannot be returned"),
    (lambda lm: lm.stream(["a", "b"]), r"got list\. A list of texts goes to generate"),
    (lambda lm: lm.generate("x", output_scores=True), "output_scores: cannot be returned with texts"),
    (lambda lm: lm.generate("x", output_logprobs=True), r"output_logprobs: .* Use generate with return_details=True"),
    (lambda lm: lm.generate(["x"], top_logprobs=3), r"top_logprobs: .* Use generate with return_details=True"),
    *(
        (lambda lm, given=given: lm.generate("a", skip_special_tokens=given), f"skip_special_tokens: .*, got {given!r}")
        for given in ("no", None, 0)
    ),
    (lambda lm: lm.generate_each("ab"), r"prompts: expected a list of texts, got one\. Put it into a list"),
    (lambda lm: lm.tokenizer.encode_batch("abc"), "texts: expected a list of texts, got one"),
    (lambda lm: lm.tokenizer.encode_batch([]), "texts: expected at least one"),
    *(
        (lambda lm, given=given: lm.generate(given), "prompt: expected a text")
        for given in (None, 5, [["a"]], [None], b"a")
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_makes_no_sense_is_refused_before_anything_runs(
    lm: minopt.LanguageModel, call: Callable[[Any], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(lm)


def test_nothing_gives_nothing(lm: minopt.LanguageModel) -> None:
    assert lm.generate([]) == lm.score([]) == lm.score("The", []) == []
    beginning = lm.score("")
    assert (beginning.token_ids, beginning.logprobs, beginning.total) == ((2,), (None,), 0)
    assert math.isnan(beginning.mean)


def attributes(model: torch.nn.Module) -> list[dict[str, Any]]:
    """What each module of a model has, its parameters, buffers and hooks too."""
    return [{k: dict(v) if isinstance(v, dict) else v for k, v in vars(m).items()} for m in model.modules()]


def test_a_call_leaves_nothing_on_the_model(lm: minopt.LanguageModel) -> None:
    plain = minopt.load(minopt.DEMO, device="cpu", optimize=False)
    for of in (lm, plain):
        before = attributes(of.model)
        state = {name: t.clone() for name, t in of.model.state_dict().items()}
        of.generate(["The", "A dark"], max_new_tokens=3, num_beams=2)
        list(of.stream("The", max_new_tokens=3))
        of.score("The", [" sea"])
        assert attributes(of.model) == before
        assert all(torch.equal(t, state[name]) for name, t in of.model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in plain.model.parameters())


def test_rows_without_a_token_are_never_generated(lm: minopt.LanguageModel) -> None:
    """OPT's table is padded from 50,265 to 50,272 rows; here the padding is made the most probable of all."""
    config = dataclasses.replace(lm.model.config, vocab_size=lm.model.config.vocab_size + 8)
    model = minopt.OPT(config).eval()
    state = dict(lm.model.state_dict())
    table = state["embed_tokens.weight"]
    state["embed_tokens.weight"] = torch.cat([table, 3 * table[200:201].expand(8, -1)])
    model.load_state_dict(state)
    ids = torch.tensor([lm.tokenizer.encode(PROMPTS[0])])  # type: ignore[union-attr]
    model.embed_tokens.weight.data[2048:] = 100 * model.hidden_states(ids)[0, -1]
    free = minopt.generate(model, ids, max_new_tokens=3).sequences[0, -3:]
    assert free[0] >= 2048
    record = minopt.LanguageModel(model, lm.tokenizer).generate(PROMPTS[0], max_new_tokens=20, return_details=True)
    assert max(record.token_ids) < 2048


def without_bos(bos: int | None, **settings: Any) -> minopt.LanguageModel:
    """A model with a tokenizer that puts nothing in front of a text, and a config that names some bos."""
    lm = minopt.load(minopt.DEMO, device="cpu", optimize=False)
    assert lm.tokenizer is not None
    backend = tokenizers.Tokenizer.from_str(lm.tokenizer.backend.to_str())
    backend.post_processor = tokenizers.processors.ByteLevel()
    model = minopt.OPT(dataclasses.replace(lm.model.config, bos_token_id=bos)).eval()
    model.load_state_dict(lm.model.state_dict())
    return minopt.LanguageModel(model, Tokenizer(backend, settings))


@pytest.mark.parametrize(("settings", "first"), [({"bos_token": "</s>"}, 2), ({}, 5)], ids=["named", "not named"])
def test_an_empty_text_begins_as_the_tokenizer_says_and_else_as_the_model_does(
    settings: dict[str, Any], first: int
) -> None:
    """Generated, streamed, scored, in a list with others."""
    lm = without_bos(5, **settings)
    assert lm.tokenizer is not None
    assert lm.tokenizer.encode("") == []
    expected = minopt.generate(lm.model, torch.tensor([[first]]), max_new_tokens=6).sequences[0, 1:]
    record = lm.generate("", max_new_tokens=6, return_details=True)
    assert record.token_ids == tuple(expected.tolist())
    assert "".join(lm.stream("", max_new_tokens=6)) == record.text
    assert lm.generate(["", "The sea"], max_new_tokens=6, show_progress=False)[0] == record.text
    (scored,) = lm.score("", [record.text])
    assert scored.logprobs == pytest.approx(record.logprobs, abs=1e-4)
    assert lm.score("", [record.text], add_bos=False)[0].logprobs[0] is None
    headless = without_bos(None)
    with pytest.raises(ValueError, match="prompt: empty, and the model has no beginning-of-text token"):
        headless.generate("")
    assert headless.score("", ["a"])[0].logprobs == (None,)


def test_files_that_name_different_tokens_are_pointed_out(
    lm: minopt.LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = dataclasses.replace(lm.model.config, bos_token_id=0, eos_token_id=(2, 7), pad_token_id=None)
    model = minopt.OPT(config)
    minopt.LanguageModel(model, lm.tokenizer).save(tmp_path / "saved")
    minopt.load(tmp_path / "saved", device="cpu")
    (message,) = caplog.messages
    assert "bos_token_id is 0 in config.json and 2 in the tokenizer's files" in message


# --- Stop strings --------------------------------------------------------------------------------------------------

SEARCH = settings(
    max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@functools.cache
def small_lm(folder: str | Path) -> minopt.LanguageModel:
    """A model that takes next to no time, of the vocabulary of a tokenizer's files."""
    tokenizer = Tokenizer.load(folder)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "ffn_dim": 8}
    torch.manual_seed(0)
    config = minopt.OPTConfig(vocab_size=len(tokenizer) + 7, max_position_embeddings=256, **size)
    return minopt.LanguageModel(minopt.OPT(config).eval(), tokenizer)


@pytest.fixture(params=["demo", "opt"])
def scripted(request: pytest.FixtureRequest) -> minopt.LanguageModel:
    """With the embedded tokenizer, then with the real one of OPT where its files are."""
    if request.param == "demo":
        return small_lm(minopt.DEMO)
    return small_lm(request.getfixturevalue("shared_data") / "opt-tokenizer")


class Script:
    """A rule that leaves, of each row, the next token of what is written for its prompt; then the end of text.

    Prompts must end in "=0", "=1", ..., which says whose they are, and scripts must hold no digits.
    """

    def __init__(self, tokenizer: Tokenizer, scripts: Sequence[Sequence[int]]) -> None:
        self.scripts = {tokenizer.encode(str(n))[-1]: script for n, script in enumerate(scripts)}
        self.steps = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps += 1
        forced = torch.full_like(scores, -torch.inf)
        for row, ids in enumerate(input_ids.tolist()):
            at = max(i for i, token in enumerate(ids) if token in self.scripts)
            script, step = self.scripts[ids[at]], len(ids) - 1 - at
            forced[row, script[step] if step < len(script) else 2] = 0
        return forced


def by_definition(
    tokenizer: Tokenizer, script: Sequence[int], strings: Sequence[str], min_new_tokens: int
) -> tuple[str, tuple[int, ...], str]:
    """Text, tokens and reason: decoded after each token, until the newest one completes a string."""
    for count in range(max(1, min_new_tokens), len(script) + 1):
        text = first_stop(tokenizer, script[:count], strings)
        if text is not None:
            return text, tuple(script[:count]), "stop"
    return tokenizer.decode(script), (*script, 2), "eos"


def script_of(data: st.DataObject, tokenizer: Tokenizer) -> list[int]:
    """Tokens of ``STOP_ALPHABET``, as text is written and at random, characters in parts among them; no eos."""
    pool = st.lists(st.sampled_from([i for i in stop_ids(tokenizer) if i != 2]), max_size=5)
    written = st.text(STOP_ALPHABET, max_size=8).map(lambda text: tokenizer.encode(text, add_bos=False))
    return [i for ids in data.draw(st.lists(pool | written, max_size=3)) for i in ids]


WAYS: list[dict[str, Any]] = [
    {},
    {"prompt_lookup_num_tokens": 3},
    {"do_sample": True, "seed": 1, "num_return_sequences": 2},
    {"num_beams": 3},
    {"num_beams": 2, "do_sample": True, "seed": 1},
]


@SEARCH
@given(data=st.data(), strings=STOP_TEXTS, way=st.sampled_from(WAYS), min_new_tokens=st.integers(0, 5))
def test_stop_strings_end_and_cut_texts_as_defined(
    scripted: minopt.LanguageModel, data: st.DataObject, strings: list[str], way: dict[str, Any], min_new_tokens: int
) -> None:
    """In padded batches of prompts that hold the strings themselves; tokens are kept, the reason is "stop"."""
    tokenizer = scripted.tokenizer
    assert tokenizer is not None
    scripts = [script_of(data, tokenizer) for _ in range(3)]
    begins = {tokenizer.decode(script)[:1] for script in scripts}
    strings = strings + [f"{n}{begin}" for n in range(3) for begin in begins]  # over the end of a prompt
    prompts = [f"{strings[0] * n}={n}" for n in range(3)]
    results = scripted.generate(
        prompts, stop_strings=strings, logits_processor=Script(tokenizer, scripts), return_details=True,
        max_new_tokens=max(map(len, scripts)) + 5, min_new_tokens=min_new_tokens, show_progress=False,
        batch_size=data.draw(st.sampled_from([1, 2, 3])), **way,
    )  # fmt: skip
    for script, result in zip(scripts, results, strict=True):
        expected = by_definition(tokenizer, script, strings, min_new_tokens)
        for record in result if isinstance(result, list) else [result]:
            assert (record.text, record.token_ids, record.stop_reason) == expected


@SEARCH
@given(data=st.data(), strings=STOP_TEXTS, min_new_tokens=st.integers(0, 5))
def test_a_stream_holds_back_what_may_begin_a_stop_string_and_nothing_else(
    scripted: minopt.LanguageModel, data: st.DataObject, strings: list[str], min_new_tokens: int
) -> None:
    """After each token it has given all whole characters but those; in the end, the text of generate."""
    tokenizer = scripted.tokenizer
    assert tokenizer is not None
    script = script_of(data, tokenizer)
    options: dict[str, Any] = {
        "stop_strings": strings, "min_new_tokens": min_new_tokens, "max_new_tokens": len(script) + 5,
    }  # fmt: skip
    rule = Script(tokenizer, [script])
    given_by: dict[int, str] = {}
    for piece in scripted.stream(strings[0] + "=0", logits_processor=rule, **options):
        assert piece
        given_by[rule.steps] = given_by.get(rule.steps, "") + piece
    text, token_ids, _ = by_definition(tokenizer, script, strings, min_new_tokens)
    token_bytes, whole = Pieces(tokenizer, True), b""
    for count, token_id in enumerate(token_ids[:-1], start=1):
        whole += token_bytes.shown(token_bytes[token_id]).encode("latin-1")
        beginnings = [s.encode()[:n] for s in strings for n in range(len(s.encode()))]
        held = max((len(beginning) for beginning in beginnings if whole.endswith(beginning)), default=0)
        so_far = "".join(piece for step, piece in given_by.items() if step <= count)
        assert so_far == codecs.getincrementaldecoder("utf-8")("replace").decode(whole[: len(whole) - held])
    assert "".join(given_by.values()) == text
    assert scripted.generate(strings[0] + "=0", logits_processor=Script(tokenizer, [script]), **options) == text


# What is written, and by what it is to end: strings that are special or added tokens, hold some, or a part of one.
SPECIAL_STOPS: list[tuple[str, list[str], str | None, str | None]] = [
    ("a cat<|user|> b", ["<|user|>"], "a cat", "a cat"),
    ("a cat\n<|user|> b", ["\n<|user|>"], "a cat", "a cat"),
    ("a\n cat<|user|>\n b", ["\n<|user|>"], None, None),
    ("a</s> cat[END_REF]. b", ["zz", "[END_REF]."], "a cat", "a</s> cat"),
    ("a</s>b</s>", ["</s>"], "a", "a"),
    ("a <tool> b", ["<tool>"], "a ", "a "),
    ("a <tool> b", ["ol> b"], "a <to", "a <to"),
    ("a<|user|>b c", ["ab"], "", None),
    ("a<|user|>b c", ["r|>b"], None, "a<|use"),
    ("a<|user|><|user|>", ["<|user|><|user|>", "x"], "a", "a"),
    ("a  <wide>  b", ["  <wide> "], "a", "a"),
    ("a \u00e9t\u00e9 b", ["\u00e9t\u00e9"], "a ", "a "),
]  # fmt: skip


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> minopt.LanguageModel:
    """With a tokenizer that has special and other added tokens."""
    return small_lm(write_marked(tmp_path_factory.mktemp("marked")))


@pytest.mark.parametrize("way", [*WAYS, {"stream": True}, {"batch_size": 2}], ids=str)
@pytest.mark.parametrize("skip", [True, False], ids=["hidden", "shown"])
@pytest.mark.parametrize(("written", "strings", "hidden", "shown"), SPECIAL_STOPS)
def test_special_tokens_are_text_to_stop_strings_whether_they_are_shown_or_not(
    marked: minopt.LanguageModel, written: str, strings: list[str], hidden: str | None, shown: str | None, skip: bool,
    way: dict[str, Any],
) -> None:  # fmt: skip
    tokenizer = marked.tokenizer
    assert tokenizer is not None
    script = tokenizer.encode(written, add_bos=False)
    options: dict[str, Any] = {"stop_strings": strings, "max_new_tokens": len(script) + 3, "eos_token_id": 0,
                               "skip_special_tokens": skip, "show_progress": False, **way}  # fmt: skip
    expected = hidden if skip else shown
    if expected is None:
        expected = tokenizer.decode([*script, 2, 2, 2], skip_special_tokens=skip)
    rule = Script(tokenizer, [script, script])
    if options.pop("stream", False):
        del options["show_progress"]
        assert "".join(marked.stream("x=0", logits_processor=rule, **options)) == expected
        return
    found = marked.generate(["x=0", "longer =1"], logits_processor=rule, echo=True, **options)
    for prompt, texts in zip(["x=0", "longer =1"], found, strict=True):
        assert set([texts] if isinstance(texts, str) else texts) == {prompt + expected}


def test_special_tokens_are_shown_if_asked_for(lm: minopt.LanguageModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 3, "sequence_bias": [[[2], 1000.0]]}
    for skip, count in ((True, 0), (False, 1)):
        options["skip_special_tokens"] = skip
        text = lm.generate(PROMPTS[0], **options)
        assert text.count("</s>") == count
        assert text == "".join(lm.stream(PROMPTS[0], **options))


# --- Many prompts --------------------------------------------------------------------------------------------------

MANY = [*PROMPTS, "A", "It was " * 12, "The sea", "“" * 30, "The captain"]


@pytest.mark.parametrize(
    "limits", [{}, {"batch_size": 2}, {"max_batch_tokens": 90}, {"batch_size": 3, "max_batch_tokens": 60}]
)
def test_many_prompts_give_what_each_gives_alone_in_their_order(
    lm: minopt.LanguageModel, limits: dict[str, int]
) -> None:
    alone = [lm.generate(prompt, max_new_tokens=12, return_details=True) for prompt in MANY]
    together = lm.generate(MANY, max_new_tokens=12, return_details=True, show_progress=False, **limits)
    for one, other in zip(alone, together, strict=True):
        assert (one.text, one.token_ids, one.stop_reason) == (other.text, other.token_ids, other.stop_reason)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    beams = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2, "stop_strings": [" a", "e,"]}
    expected = [lm.generate(prompt, **beams) for prompt in MANY]
    assert lm.generate(MANY, show_progress=False, **beams, **limits) == expected


def prefills(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A list that fills with the shapes of prompts that models begin with."""
    shapes, read = [], minopt.OPT.read

    def spied(model: minopt.OPT, input_ids: Tensor, position_ids: Tensor, mask: Any, wanted: Any, cache: Any) -> Tensor:
        if wanted is not None:
            shapes.append(tuple(input_ids.shape))
        return read(model, input_ids, position_ids, mask, wanted, cache)

    monkeypatch.setattr(minopt.OPT, "read", spied)
    return shapes


def test_batches_keep_their_limits_with_new_tokens_copies_and_scores_counted(
    lm: minopt.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, width = prefills(monkeypatch), len(ids_of(lm, "The sea"))
    one = width + 4 + SCORES_IN_TOKENS
    beams = width + 3 * (one - width)  # beams share the prompt
    for options, rows in (
        ({}, [5]),
        ({"batch_size": 2}, [2, 2, 1]),
        ({"max_batch_tokens": 3 * one}, [3, 2]),
        ({"max_batch_tokens": 3 * one - 1}, [2, 2, 1]),
        ({"max_batch_tokens": 4 * one, "do_sample": True, "num_return_sequences": 2}, [2, 2, 1]),
        ({"max_batch_tokens": 4 * one - 1, "do_sample": True, "num_return_sequences": 2}, [1] * 5),
        ({"max_batch_tokens": 2 * beams, "num_beams": 3}, [2, 2, 1]),
        ({"max_batch_tokens": 2 * beams - 1, "num_beams": 3}, [1] * 5),
        ({"prompt_lookup_num_tokens": 2}, [1] * 5),  # rows would wait for each other's drafts
        ({"prompt_lookup_num_tokens": 2, "batch_size": 3}, [3, 2]),
        ({"prompt_lookup_num_tokens": 2, "max_batch_tokens": 4096}, [5]),
    ):
        shapes.clear()
        lm.generate(["The sea"] * 5, max_new_tokens=4, show_progress=False, **options)
        assert shapes == [(count, width) for count in rows]
    shapes.clear()
    lm.generate(["The sea " * 700] * 3, max_new_tokens=4, truncate_prompt=True, max_batch_tokens=3 * 1032)
    assert shapes == [(3, 1020)]


def test_a_seed_draws_anew_in_each_batch_and_repeats(lm: minopt.LanguageModel) -> None:
    options = {"do_sample": True, "max_new_tokens": 10, "batch_size": 2, "show_progress": False}
    texts = lm.generate(["The"] * 6, seed=4, **options)
    assert len(set(texts)) == 6
    assert lm.generate(["The"] * 6, seed=4, **options) == texts
    assert lm.generate(["The"] * 6, seed=5, **options) != texts
    assert lm.generate(["The"] * 6, generator=torch.Generator().manual_seed(4), **options) == texts


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("x" * 1020, "positions, the model has 1024"),
        (7, "prompt: expected a text, got int"),
        ("a\ud800", "text: not valid Unicode at character 1"),
    ],
)
def test_one_bad_prompt_refuses_all_before_anything_runs(
    lm: minopt.LanguageModel, bad: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = prefills(monkeypatch)
    with pytest.raises(ValueError, match=message):
        lm.generate(["a", "b", bad, "c" * 30], batch_size=1)
    with pytest.raises(ValueError, match=message):
        lm.generate_each(["a", bad], batch_size=1)  # before the first result is asked for
    assert shapes == []


def test_a_bar_is_drawn_for_more_than_one_batch_only(
    lm: minopt.LanguageModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minopt.progress.on_terminal", lambda: True)
    generate = functools.partial(lm.generate, ["a", "b", "c"], max_new_tokens=2)
    for call, unit in ((generate, "prompt"), (functools.partial(lm.score, ["a", "b", "c"]), "text")):
        call(batch_size=2)
        output = capsys.readouterr()
        assert (output.out, "3/3" in output.err, unit in output.err) == ("", True, True)
        call(batch_size=2, show_progress=False)
        call()
        assert capsys.readouterr().err == ""
    list(lm.generate_each(["a", "b"], batch_size=1, max_new_tokens=2))
    assert capsys.readouterr().err == ""


def test_results_come_one_by_one_the_longest_prompt_first(
    lm: minopt.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = prefills(monkeypatch)
    options: dict[str, Any] = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2}
    results = lm.generate_each(MANY, batch_size=2, output_logprobs=True, **options)
    assert shapes == []
    found = [next(results)]
    assert len(shapes) == 1
    found += results
    lengths = [len(ids_of(lm, MANY[index])) for index, _ in found]
    assert all(min(lengths[n : n + 2]) >= max(lengths[n + 2 : n + 4]) for n in range(0, len(MANY) - 3, 2))
    assert [index for index, _ in lm.generate_each(MANY, in_order=True, max_new_tokens=1)] == [*range(len(MANY))]
    expected = lm.generate(MANY, return_details=True, show_progress=False, **options)
    for index, records in found:
        assert [record.token_ids for record in records] == [record.token_ids for record in expected[index]]
        assert all(len(record.logprobs) == len(record.token_ids) for record in records)
    ((_, (record,)),) = lm.generate_each(["The"], max_new_tokens=2)
    assert (record.logprobs, record.score, record.top_logprobs) == ((), None, ())
    assert list(lm.generate_each([])) == []


def test_several_continuations_come_as_lists_with_echo_and_details(lm: minopt.LanguageModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 5, "num_beams": 4, "num_return_sequences": 3}
    plain = lm.generate(PROMPTS, **options)
    assert [len(set(texts)) for texts in plain] == [3] * len(PROMPTS)
    assert lm.generate(PROMPTS[0], **options) == plain[0]
    detailed = lm.generate(PROMPTS, echo=True, return_details=True, **options)
    for prompt, texts, records in zip(PROMPTS, plain, detailed, strict=True):
        assert [record.text for record in records] == [prompt + text for text in texts]
        scores = [record.score for record in records]
        assert scores == sorted(scores, reverse=True)
        assert scores == pytest.approx([sum(r.logprobs) / len(r.logprobs) for r in records], rel=1e-4)
    sampled = lm.generate("The", do_sample=True, num_return_sequences=4, seed=1, max_new_tokens=5)
    assert len(set(sampled)) == 4


@pytest.mark.parametrize("add_bos", [None, False])
def test_the_end_of_a_long_prompt_is_kept_after_the_bos_that_the_tokenizer_put_there(
    lm: minopt.LanguageModel, add_bos: bool | None
) -> None:
    text = "It was a dark night. " * 250
    ids = ids_of(lm, text)
    kept = ids[-1020:] if add_bos is False else [2, *ids[-1019:]]
    expected = minopt.generate(lm.model, torch.tensor([kept]), max_new_tokens=4).sequences[0, -4:].tolist()
    options: dict[str, Any] = {"max_new_tokens": 4, "truncate_prompt": True, "add_bos": add_bos}
    alone, both = (lm.generate(given, return_details=True, **options) for given in (text, ["The sea", text]))
    assert list(alone.token_ids) == list(both[1].token_ids) == expected
    assert both[0].text == lm.generate("The sea", max_new_tokens=4, add_bos=add_bos)


def test_rules_and_criteria_of_the_user_act_on_every_batch(lm: minopt.LanguageModel) -> None:
    """The reason of a criterion is "stop" too, and nothing is cut for it."""
    options: dict[str, Any] = {"max_new_tokens": 20, "return_details": True, "show_progress": False}
    plain = lm.generate(PROMPTS, **options)
    first = sorted({record.token_ids[0] for record in plain})

    def ban(input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.tensor(first), -torch.inf)

    banned = lm.generate(PROMPTS, logits_processor=ban, batch_size=2, **options)
    excluded = lm.generate(PROMPTS, suppress_tokens=first, **options)
    assert [record.token_ids for record in banned] == [record.token_ids for record in excluded]
    last = plain[0].token_ids[4]
    options |= {"stopping_criteria": [lambda ids, _: ids[:, -1] == last], "stop_strings": "zzz"}
    found = lm.generate(PROMPTS, batch_size=3, **options)
    for record, whole in zip(found, plain, strict=True):
        end = whole.token_ids.index(last) + 1 if last in whole.token_ids else None
        assert (record.token_ids, record.stop_reason) == (whole.token_ids[:end], "stop" if end else "length")
        assert record.text == lm.tokenizer.decode(record.token_ids)  # type: ignore[union-attr]


# --- Scores --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def expected_logprobs(reference: Any, ids: list[int]) -> list[float]:
    """Of all tokens but the first, by transformers' model."""
    logprobs = reference(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("limits", [{}, {"batch_size": 2}])
def test_scores_of_texts_are_those_of_transformers(
    lm: minopt.LanguageModel, reference: Any, add_bos: bool | None, limits: dict[str, int]
) -> None:
    """Each token has one but the first, whose is None; in the order of the texts."""
    assert lm.tokenizer is not None
    texts = [text for text in MANY if text]
    found = lm.score(texts, add_bos=add_bos, show_progress=False, **limits)
    for text, scored in zip(texts, found, strict=True):
        ids = lm.tokenizer.encode(text, add_bos)
        assert (scored.text, scored.token_ids, scored.logprobs[0]) == (text, tuple(ids), None)
        expected = expected_logprobs(reference, ids)
        assert scored.logprobs[1:] == pytest.approx(expected, abs=1e-4)
        assert scored.total == pytest.approx(sum(expected), abs=1e-3)
        if expected:
            assert scored.mean == pytest.approx(sum(expected) / len(expected), abs=1e-4)
        else:
            assert math.isnan(scored.mean)
        assert lm.score(text, add_bos=add_bos).logprobs == pytest.approx(scored.logprobs, abs=1e-4)


@pytest.mark.parametrize("add_bos", [None, False])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_continuation_has_the_scores_of_its_tokens_in_the_whole_text(
    lm: minopt.LanguageModel, reference: Any, prompt: str, add_bos: bool | None
) -> None:
    """Those that generating it gave; the first token of a text without a beginning token has none."""
    record = lm.generate(prompt, max_new_tokens=15, repetition_penalty=1.3, return_details=True, add_bos=add_bos)
    texts = [record.text, " sea", "\u00e9 \u201c\u6f22\u5b57\u201d", "s"]
    found = lm.score(prompt, texts, add_bos=add_bos, batch_size=3, show_progress=False)
    if prompt or add_bos is None:
        assert found[0].token_ids == record.token_ids
        assert found[0].logprobs == pytest.approx(record.logprobs, abs=1e-4)
    for text, scored in zip(texts, found, strict=True):
        ids = lm.tokenizer.encode(prompt + text, add_bos)  # type: ignore[union-attr]
        expected = [None, *expected_logprobs(reference, ids)][len(ids) - len(scored.token_ids) :]
        assert scored.text == text
        assert list(scored.token_ids) == ids[len(ids) - len(scored.token_ids) :]
        assert [value is None for value in scored.logprobs] == [value is None for value in expected]
        assert [v or 0 for v in scored.logprobs] == pytest.approx([v or 0 for v in expected], abs=1e-4)


@pytest.mark.parametrize("add_bos", [None, False])
def test_perplexity_of_a_text_within_the_positions_is_that_of_its_score(
    lm: minopt.LanguageModel, add_bos: bool | None
) -> None:
    mean = lm.score(PROMPTS[2], add_bos=add_bos).mean
    assert lm.perplexity(PROMPTS[2], add_bos=add_bos) == pytest.approx(math.exp(-mean), rel=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm: lm.score("The", [" sea", ""]), r"^score: expected some text, got '', which has no tokens\.$"),
        (lambda lm: lm.score(["a", ""], add_bos=False), "score: expected some text, got '', which has no tokens"),
        (lambda lm: lm.score(["a"], ["b"]), r"^score: expected one prompt and a list of continuations\.$"),
        (lambda lm: lm.score("a", "b"), "score: expected one prompt and a list of continuations"),
        (lambda lm: lm.score("a", [None]), "continuation: expected a text, got NoneType"),
        (lambda lm: lm.score(["a", 3]), "text: expected a text, got int"),
        (lambda lm: lm.score(["a", "x" * 1024]), "text: 1025 tokens, the model has 1024 positions"),
        (lambda lm: lm.score(["a"], batch_size=0), "batch_size: expected an integer of at least 1, got 0"),
        (lambda lm: lm.score("a\ud800"), "text: not valid Unicode at character 1"),
        (lambda lm: lm.perplexity(3), "text: expected a text, got int"),
        (lambda lm: lm.perplexity(""), r"^perplexity: expected a text of at least two tokens, got ''\.$"),
        (lambda lm: lm.perplexity("a", add_bos=False), "perplexity: expected a text of at least two tokens, got 'a'"),
        (lambda lm: lm.perplexity("abc", window=1025), "window: expected 2 to the model's 1024 positions, got 1025"),
        (lambda lm: lm.perplexity("abc", window=8, stride=9), "stride: expected 1 to the window's 8 tokens, got 9"),
        (lambda lm: lm.score(None), "expected a text"),
        (lambda lm: lm.score("a", 5), "expected one prompt and a list of continuations"),
    ],
)
def test_what_has_no_score_is_refused_before_anything_runs(
    lm: minopt.LanguageModel, call: Callable[[Any], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> Tensor:
        raise AssertionError("the model has run")

    monkeypatch.setattr(minopt.OPT, "hidden_states", fail)
    with pytest.raises(ValueError, match=message):
        call(lm)


def test_without_a_tokenizer_every_method_on_text_says_so(lm: minopt.LanguageModel) -> None:
    bare = minopt.LanguageModel(lm.model, None)
    for call in (bare.generate, bare.generate_each, bare.stream, bare.score, bare.perplexity):
        with pytest.raises(ValueError, match=r"tokenizer: the model's folder has none .* or call minopt\.generate"):
            call(["x"] if call == bare.generate_each else "x")


# --- generation_config.json ----------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {
    "max_new_tokens": 14, "min_new_tokens": 3, "num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.4,
    "early_stopping": True, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "eos_token_id": [2, 299],
    "pad_token_id": 1, "bad_words_ids": [[300], [301, 302]], "suppress_tokens": [303], "sequence_bias": [[[304], -2.5]],
}  # fmt: skip


def test_a_folders_options_hold_here_as_in_transformers_and_are_saved_for_both(
    lm: minopt.LanguageModel, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    lm.save(folder)
    assert minopt.load(folder, device="cpu").generation_defaults == {}
    transformers.GenerationConfig(**OPTIONS, bos_token_id=2).save_pretrained(folder)
    lm = minopt.load(folder, device="cpu")
    assert {name: lm.generation_defaults[name] for name in OPTIONS} == OPTIONS
    reference = transformers.OPTForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt in PROMPTS[:3]:
        ids = torch.tensor([ids_of(lm, prompt)])
        expected = reference.generate(ids)[:, ids.shape[1] :].tolist()
        records = lm.generate(prompt, return_details=True)
        assert [list(r.token_ids) for r in records] == [
            row[: len(r.token_ids)] for row, r in zip(expected, records, strict=True)
        ]
        assert len(records) == len(expected) == 2
    with pytest.raises(ValueError, match=r"num_beams: a stream has one continuation, got 3\."):
        lm.stream("The")
    lm.save(tmp_path / "again")
    assert minopt.load(tmp_path / "again", device="cpu").generate(PROMPTS[0]) == lm.generate(PROMPTS[0])
    written = transformers.GenerationConfig.from_pretrained(tmp_path / "again")
    assert {name: getattr(written, name) for name in OPTIONS} == OPTIONS
    assert written.bos_token_id == 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert tokenizer("The sea")["input_ids"] == ids_of(lm, "The sea")


def test_options_given_by_hand_are_saved_with_the_models_tokens(lm: minopt.LanguageModel, tmp_path: Path) -> None:
    """As Python has them, in tuples; the tokens are the model's where no option names others."""
    config = GenerationConfig(stop_strings=("\u00e9", "b"), bad_words_ids=((5, 6),), do_sample=True, temperature=0.3)
    options = {name: getattr(config, name) for name in ("stop_strings", "bad_words_ids", "do_sample", "temperature")}
    minopt.LanguageModel(lm.model, lm.tokenizer, options).save(tmp_path / "saved")
    written = transformers.GenerationConfig.from_pretrained(tmp_path / "saved")
    assert (written.bos_token_id, written.eos_token_id, written.pad_token_id) == (2, 2, 1)
    assert (written.stop_strings, written.bad_words_ids) == (["\u00e9", "b"], [[5, 6]])
    assert (written.do_sample, written.temperature) == (True, 0.3)
    again = minopt.load(tmp_path / "saved", device="cpu")
    assert GenerationConfig(**again.generation_defaults) == config.replace(eos_token_id=2, pad_token_id=1)


def test_a_config_goes_before_the_files_defaults_and_after_single_options(lm: minopt.LanguageModel) -> None:
    own = minopt.LanguageModel(lm.model, lm.tokenizer, {"max_new_tokens": 9, "no_repeat_ngram_size": 1})
    config = minopt.GenerationConfig(max_new_tokens=7)
    assert own.generate("The sea", config=config) == lm.generate("The sea", max_new_tokens=7)
    assert own.generate("The sea", config=config, max_new_tokens=3) == lm.generate("The sea", max_new_tokens=3)


def test_what_an_object_is_is_said_in_a_line_or_a_few() -> None:
    lm = minopt.load(minopt.DEMO, device="cpu")
    assert repr(lm) == (
        f"LanguageModel({type(lm.decoder).__name__} of 4 layers, hidden size 256, vocabulary of 2048, on cpu; "
        "tokenizer: Tokenizer(2048 tokens, bos_token_id=2, eos_token_id=2, pad_token_id=1))"
    )
    assert repr(lm.model.new_cache(2, 9)) == "KVCache(2 rows, 0 of 9 tokens, torch.float32, cpu)"
    assert repr(open_checkpoint(Path(minopt.DEMO))) == f"Checkpoint({minopt.DEMO!r}, 68 tensors)"
    for thing in (lm.model, minopt.load_model(minopt.DEMO, device="cpu"), minopt.GenerationConfig()):
        assert len(repr(thing)) < 2500
