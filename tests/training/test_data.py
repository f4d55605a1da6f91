"""Fine-tuning data: published files and broken ones, templates of any text, and downloads that go wrong."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import resource
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from minopt.evaluation.squad import UNANSWERABLE
from minopt.evaluation.tasks import TASKS, Task
from minopt.training import data as module
from minopt.training.data import Example, cache_folder, read_data

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """A function that writes what a file is to hold, as JSON or as it is: ``write(name, content) -> path``."""
    folder = tmp_path_factory.mktemp("data")

    def write(name: str, content: Any) -> Path:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return write


def squad(context: str, *qas: dict[str, Any]) -> dict[str, Any]:
    """The content of a SQuAD file with one paragraph."""
    return {"version": "v2.0", "data": [{"title": "T", "paragraphs": [{"context": context, "qas": list(qas)}]}]}


def qa(question: str, *answers: tuple[str, int], key: str = "q", **more: Any) -> dict[str, Any]:
    """A question of SQuAD, with answers as pairs of text and place."""
    listed = [{"text": text, "answer_start": start} for text, start in answers]
    return {"question": question, "id": key, "answers": listed} | more


def cut(example: Example) -> str:
    """The part of a prompt that may be cut."""
    return example.prompt[slice(*example.context)]


def kept(example: Example) -> str:
    """The part of that which training keeps."""
    return example.prompt[slice(*example.answer)]


def test_a_question_becomes_the_prompt_completion_and_references_of_each_task(write: Write) -> None:
    path = write("a.json", squad("Ann met Bob.", qa(" Who? \n", ("Bob", 8), ("Ann", 0), ("Bob", 8))))
    assert read_data(path) == [
        Example("Ann met Bob.\nQuestion: Who?\nAnswer:", " Bob", ("Bob", "Ann"), "q", (0, 12), (8, 11))
    ]
    assert read_data(path, TASKS["squad-question"]) == [
        Example("answer: Bob context: Ann met Bob. question:", " Who?", ("Who?",), "q", (21, 33), (29, 32))
    ]
    assert read_data(path, Task("{{{question}}} {question}", "{answer}"), split="dev") == [
        Example("{Who?} Who?", "Bob", ("Bob", "Ann"), "q")
    ]
    assert read_data(path, Task("{question}", "{context}!")) == [
        Example("Who?", "Ann met Bob.!", ("Ann met Bob.",), "q")
    ]


@pytest.mark.parametrize("more", [{"is_impossible": True}, {"is_impossible": False}])
def test_a_question_without_an_answer_trains_to_a_word_or_is_left_out_where_the_answer_is_given(
    write: Write, more: dict[str, bool]
) -> None:
    told = {"plausible_answers": [{"text": "met", "answer_start": 4}]} | more
    path = write("v2.json", squad("unanswerable Bob", qa("Why?", key="1", **told), qa("Who?", ("Bob", 13), key="2")))
    first, second = read_data(path)
    assert first == Example("unanswerable Bob\nQuestion: Why?\nAnswer:", f" {UNANSWERABLE}", ("",), "1", (0, 16))
    assert second.id == "2"
    assert [e.id for e in read_data(path, TASKS["squad-question"])] == ["2"]
    asked = read_data(path, Task("{context}", "{question}"))
    assert [(e.references, kept(e)) for e in asked] == [(("Why?",), ""), (("Who?",), "Bob")]
    path = write("v2.json", squad("Ann met Bob.", qa("Why?", **told)))
    with pytest.raises(ValueError, match=r"^train_file: expected examples, got none for the template \(.*v2.json\)\. "):
        read_data(path, TASKS["squad-question"])


@pytest.mark.parametrize(
    ("text", "start", "place"),
    [("aba", 0, 0), ("aba", 10, 10), ("aba", 1, 0), ("aba", 3, 4), ("aba", 7, 4), ("aba", 8, 10), ("aba", 99, 10),
     ("aba", -5, 0), ("aba", 10**30, 10), (" aba ", 3, 4), ("   aba", 7, 10), ("ba a", 0, 1), ("Aba", 0, None),
     ("aba aba   aba!", 0, None)],
)  # fmt: skip
def test_an_answer_is_found_nearest_to_where_it_should_stand(
    write: Write, text: str, start: int, place: int | None
) -> None:
    path = write("a.json", squad("aba aba   aba", qa("?", (text, start))))
    for template, before in ((TASKS["squad"], 0), (TASKS["squad-question"], len(f"answer: {text.strip()} context: "))):
        (example,) = read_data(path, template)
        expected = (0, 0) if place is None else (before + place, before + place + len(text.strip()))
        assert (cut(example), example.answer) == ("aba aba   aba", expected)


@pytest.mark.parametrize(("split", "count"), [("train", 11877), ("dev", 5609)])
@pytest.mark.parametrize("task", TASKS)
def test_real_squad_is_read_whole_and_each_span_is_right(shared_data: Path, split: Any, count: int, task: str) -> None:
    path = shared_data / "squad" / f"{split}.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    real = [(q, p["context"]) for a in content["data"] for p in a["paragraphs"] for q in p["qas"]]
    examples = read_data(path, TASKS[task], split=split)
    assert len(examples) == len(real) == count
    for example, (question, context) in zip(examples, real, strict=True):
        first = question["answers"][0]
        assert (example.id, cut(example), kept(example)) == (question["id"], context, first["text"])
        assert example.answer[0] - example.context[0] == first["answer_start"]  # so in all of these
        if task == "squad":
            assert example.completion == " " + first["text"]
            assert set(example.references) == {a["text"] for a in question["answers"]}
        else:
            assert example.references == (question["question"].strip(),) == (example.completion[1:],)


texts = st.lists(
    st.sampled_from(["{question}", "{answer}", "{context}", "{", "}", "{{", "{0}", "%s", "\\1", " ", "\n", "a"])
    | st.text(max_size=5),
    max_size=8,
).map("".join)


@given(context=texts, question=texts, data=st.data())
def test_contexts_questions_and_answers_of_any_characters_are_taken_literally(
    write: Write, context: str, question: str, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(context)))
    answer = context[start : data.draw(st.integers(start, len(context)))]
    assume(answer.strip())
    path = write("any.json", squad(context, qa(question, (answer, start))))
    start += len(answer) - len(answer.lstrip())
    question, answer = question.strip(), answer.strip()
    (example,) = read_data(path)
    assert example.prompt == context + "\nQuestion: " + question + "\nAnswer:"
    assert (example.completion, example.references) == (" " + answer, (answer,))
    assert example.context == (0, len(context))
    assert example.answer == (start, start + len(answer))


GOOD = squad("Ann met Bob.", qa("Who?", ("Bob", 8), ("Ann", 0), key="1", is_impossible=False),
             qa("Why?", key="2", is_impossible=True, plausible_answers=[]),
             qa("Whom?", ("Bob", 8), key="3"))  # fmt: skip
UNREAD = ("title", "version", "plausible_answers")


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of each value in a JSON document but the whole."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def written(path: tuple[str | int, ...]) -> str:
    """A path as messages have it."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")


@given(place=st.sampled_from([*places(GOOD)]), new=st.sampled_from(["x", 3, 2.5, True, None, [], {}, "deleted"]))
def test_squad_with_anything_missing_or_of_another_type_is_read_or_the_path_to_that_is_named(
    write: Write, place: tuple[str | int, ...], new: Any
) -> None:
    content = copy.deepcopy(GOOD)
    holder: Any = content
    for key in place[:-1]:
        holder = holder[key]
    if new == "deleted":
        assume(isinstance(holder, dict))
        del holder[place[-1]]
    else:
        assume(type(new) is not type(holder[place[-1]]))
        holder[place[-1]] = new
    path = write("mutated.json", content)
    name = written(place)
    may_be_missing = ("qas[0].is_impossible", "qas[1].answers")
    if place[-1] in UNREAD or (new == "deleted" and name.endswith(may_be_missing)):
        assert len(read_data(path)) == 3
        return
    named = re.escape(name.replace("is_impossible", "answers") if new == "deleted" else name)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: {named}: expected .+, got .+\. ") as caught:
        read_data(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("ending", "mark"), [(".jsonl", b""), (".ndjson", b"\xef\xbb\xbf"), (".JSONL", b"")])
def test_lines_of_json_are_examples_with_their_texts_as_they_are(write: Write, ending: str, mark: bytes) -> None:
    lines = ['{"prompt": " {answer}\\n", "completion": " b\\n"}', "", " \r",
             '{"prompt": "", "completion": "c", "id": "x"}\r',
             '{"prompt": "\u2028\u0085é", "completion": "\\ud83d\\ude00", "more": 1}']  # fmt: skip
    path = write(f"a{ending}", mark + "\n".join(lines).encode())
    assert read_data(path) == [
        Example(" {answer}\n", " b\n", ("b",), "0"),
        Example("", "c", ("c",), "x"),
        Example("\u2028\u0085é", "😀", ("😀",), "2"),
    ]


GOOD_LINE = b'{"prompt": "a", "completion": "b"}\n\n'  # the next one is the third


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "all of it: expected an object, got a list. A .json holds SQuAD (v1.1 or v2.0), a .jsonl"),
        (squad("c", qa("?", ("c", True))), "data[0].paragraphs[0].qas[0].answers[0].answer_start: expected a whole nu"),
        (squad("c", qa("?", (" \n", 0))), "data[0].paragraphs[0].qas[0].answers[0].text: expected an answer, got a bl"),
        (squad("c", qa("?")), "data[0].paragraphs[0].qas[0].answers: expected one or more, got none. A question witho"),
        (squad("c\ud800", qa("?")), "data[0].paragraphs[0].context: expected characters, got half of one at 1 of the "),
        (b'{"data": [}', "expected JSON, got an error: Expecting value: line 1 column 11 (char 10). "),
        (b"[" * 200_000, "expected JSON, got an error: "),
        (b'{"data": ' + b"9" * 5000 + b"}", "expected JSON, got an error: Exceeds the limit"),
        (GOOD_LINE + b"[1]", "line 3: all of it: expected an object, got a list. "),
        (GOOD_LINE + b'{"prompt": "a"}', "line 3: completion: expected a text, got nothing. A .json holds SQuAD"),
        (GOOD_LINE + b'{"prompt": 1, "completion": "a"}', "line 3: prompt: expected a text, got a whole number. "),
        (GOOD_LINE + b'{"prompt": "a", "completion": ""}', "line 3: completion: expected a text to train on, got an"),
        (GOOD_LINE + b'{"prompt": "a", "completion": "b", "id": null}', "line 3: id: expected a text, got null. "),
        (GOOD_LINE + b'{"prompt": "a"', "line 3: expected JSON, got an error: Expecting ',' delimiter"),
    ],
)  # fmt: skip
def test_what_is_not_of_the_format_is_one_line_with_the_place_of_what_is_wrong(
    write: Write, content: Any, message: str
) -> None:
    path = write("a.jsonl" if message.startswith("line") else "dev.json", content)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {message}')}") as caught:
        read_data(path, split="dev")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "a.raw", "A.TXT"])
def test_a_text_comes_as_it_is_in_the_file(write: Write, name: str) -> None:
    assert read_data(write(name, "\ufeff é\r\n\n😀\r\u2028 ".encode())) == " é\r\n\n😀\r\u2028 "


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.csv", b"a,b", ValueError, "expected a name that ends in .json, .jsonl, .ndjson, .txt, .raw, got {path}. "),
        ("a", b"a,b", ValueError, "expected a name that ends in .json, "),
        ("none.json", None, FileNotFoundError, "expected squad, squad-v2 or a file (.json, .jsonl, .ndjson, .txt, "
         ".raw), got nothing of that name ({path}). Check the path."),
        ("", None, FileNotFoundError, "expected squad, squad-v2 or a file (.json, .jsonl, .ndjson, .txt, .raw), got a "
         "folder ({path}). "),
        ("a.txt", b"", ValueError, "expected data, got an empty file ({path}). "),
        ("a.json", b"\xef\xbb\xbf \n", ValueError, "expected data, got an empty file ({path}). "),
        ("a.txt", b"ab\xff", ValueError, "expected UTF-8, got 'utf-8' codec can't decode byte 0xff in position 2"),
        ("a.json", b'{"data": []}', ValueError, "expected examples, got none for the template ({path}). "),
        ("a.jsonl", b'{"prompt": "", "completion": "a", "id": "x"}\n' * 2, ValueError, "expected a different id for "
         "each example, got 'x' more than once ({path}). "),
        ("a.json", json.dumps(squad("c", *[qa("?", ("c", 0), key="\n" + str(n % 7)) for n in range(14)])).encode(),
         ValueError, r"expected a different id for each example, got '\n0', '\n1', '\n2', '\n3', '\n4' and 2 more "
         "more than once ({path}). "),
    ],
)  # fmt: skip
@pytest.mark.parametrize("split", ["train", "dev"])
def test_a_file_that_cannot_be_used_is_one_line_that_names_it(
    write: Write, tmp_path: Path, name: str, content: bytes | None, error: type[Exception], message: str, split: Any
) -> None:
    path = tmp_path / name if content is None else write(name, content)
    expected = f"{split}_file: {message.replace('{path}', str(path))}"
    with pytest.raises(error, match=f"^{re.escape(expected)}") as caught:
        read_data(path, split=split)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["prompt", "completion"])
@pytest.mark.parametrize(
    ("text", "got"),
    [("{title}", "{title}"), ("{}", "{}"), ("{ answer }", "{ answer }"), ("{answer!s:>9}", "{answer!s:>9}"),
     ("{answer.x}", "{answer.x}"), ("{answer[0]}", "{answer[0]}"), ("{answer:{question}}", "{answer:{question}}"),
     ("{answer", "expected '}' before"), ("answer}", "Single '}' encountered"), ("{question} {name}", "{name}")],
)  # fmt: skip
def test_a_template_with_anything_but_plain_fields_is_an_error_that_names_them(
    option: str, text: str, got: str
) -> None:
    message = f"--{option}_template: expected no fields but {{context}}, {{question}}, {{answer}}, got {got}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
        Task(**{"prompt": "{question}", "completion": "{answer}"} | {option: text})
    assert repr(text) in str(caught.value)
    assert str(caught.value).endswith("Write {{ and }} for braces.")


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        ("{{question}}", "{answer}", "--prompt_template: expected one field or more, {context} and {answer} at most "
         "once each, got none (in '{{question}}'). The fields are {context}, {question}, {answer}."),
        ("{context}{context}", "{answer}", "--prompt_template: expected one field or more, {context} and {answer} at "
         "most once each, got {context}, {context} (in "),
        ("{answer}{answer}", "{question}", "--prompt_template: expected one field or more"),
        ("{question}", "{{}}", "--completion_template: expected one field, got none (in '{{}}'). The fields are "),
        ("{question}", "{answer} {answer}", "--completion_template: expected one field, got {answer}, {answer} (in "),
        ("{answer} {question}", "{answer}", "--completion_template: expected a field that is not "
         "in --prompt_template, got {answer} (in '{answer}' and '{answer} {question}'). "),
    ],
)  # fmt: skip
def test_a_template_that_breaks_a_rule_is_an_error_that_names_it(prompt: str, completion: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Task(prompt, completion)


class Server(ThreadingHTTPServer):
    """A stand-in for the site of SQuAD: answers each GET with a status and a body, of which it sends so much."""

    status, sent, asked = 200, None, ()
    body = json.dumps(squad("Ann met Bob. " * 20_000, qa("Who?", ("Bob", 8)))).encode()

    def stop(self) -> None:
        """Refuses connections from now on."""
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked = (*self.server.asked, self.path)
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body[: self.server.sent])


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """With the digests of what it serves, and an empty cache."""
    server = Server(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setattr(module, "SQUAD_URL", f"http://127.0.0.1:{server.server_port}/dataset/")
    for name in module._SQUAD_SHA256:
        monkeypatch.setitem(module._SQUAD_SHA256, name, hashlib.sha256(server.body).hexdigest())
    monkeypatch.setenv("MINOPT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    yield server
    server.stop()


@pytest.mark.parametrize(
    ("source", "split", "name"),
    [("squad", "train", "train-v1.1.json"), ("squad", "dev", "dev-v1.1.json"), ("squad-v2", "train", "train-v2.0.json"),
     (Path("squad-v2"), "dev", "dev-v2.0.json")],
)  # fmt: skip
def test_a_published_file_is_downloaded_once_and_then_read_without_asking(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str], source: str | Path, split: Any, name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("minopt.training.data.on_terminal", lambda: True)
    Path(source).mkdir()  # a folder of that name is none of its business
    (example,) = read_data(source, split=split)
    assert (server.asked, example.completion) == ((f"/dataset/{name}",), " Bob")
    assert "100%" in capfd.readouterr().err
    cached = tmp_path / "home" / "squad"
    assert [(p.name, p.read_bytes()) for p in cached.iterdir()] == [(name, server.body)]
    server.stop()
    assert read_data(source, split=split) == [example]


def test_a_file_that_is_called_squad_is_not_the_published_one(server: Server) -> None:
    Path("squad").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^train_file: expected a name that ends in .json, .*, got squad\. "):
        read_data("squad")
    assert server.asked == ()


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [("404", "HTTP Error 404: Not Found"), ("503", "HTTP Error 503: Service Unavailable"), ("cut", "invalid hash val"),
     ("wrong", "invalid hash value"), ("gone", "<urlopen error "), ("full", "[Errno 27] File too large"),
     ("home", "[Errno 20] Not a directory")],
)  # fmt: skip
def test_a_download_that_fails_is_one_line_and_leaves_nothing(
    server: Server, tmp_path: Path, trouble: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    cached = tmp_path / "home" / "squad"
    good, limits = server.body, resource.getrlimit(resource.RLIMIT_FSIZE)
    if trouble.isdigit():
        server.status = int(trouble)
    elif trouble == "cut":
        server.sent = len(good) // 2
    elif trouble == "wrong":
        server.body = good[:-1] + b" "
    elif trouble == "gone":
        server.stop()
    elif trouble == "home":
        (tmp_path / "home").write_bytes(b"")
    else:  # what a full disk does to a file that grows
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, limits[1]))
    start = f"dev_file: {module.SQUAD_URL}dev-v1.1.json cannot be downloaded to {cached} ({reason}"
    try:
        with pytest.raises(OSError, match=f"^{re.escape(start)}") as caught:
            read_data("squad", split="dev", show_progress=False)
        assert trouble != "gone" or capfd.readouterr() == ("", "")  # silent on request
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value).endswith("Try again, or fetch the file by hand and give its path.")
    assert "\n" not in str(caught.value)
    assert trouble == "home" or list(cached.iterdir()) == []
    if trouble not in ("gone", "home"):
        server.status, server.body, server.sent = 200, good, None
        assert len(read_data("squad", split="dev", show_progress=False)) == 1


@pytest.mark.parametrize(
    ("home", "shared", "expected"),
    [("/a/b", "/x", "/a/b"), ("~/a", "/x", "HOME/a"), ("", "/x", "/x/minopt"), (None, "~/x", "HOME/x/minopt"),
     (None, "", "HOME/.cache/minopt"), (None, None, "HOME/.cache/minopt")],
)  # fmt: skip
def test_downloads_are_kept_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: str | None, shared: str | None, expected: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in (("MINOPT_HOME", home), ("XDG_CACHE_HOME", shared)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected.replace("HOME", str(tmp_path)))
