"""Writes the notebooks with the outputs of a run: `python examples/build_notebooks.py [name ...]`."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

FOLDER = Path(__file__).parent

# Text that begins with a newline is code.
QUICKSTART = [
    "# minopt: a quick start\n"
    "\n"
    "Load a model, continue a text, look inside. This notebook uses the package's small model and runs offline. "
    'For a real model, replace `minopt.DEMO` by `"facebook/opt-125m"`, another name, or a folder.',
    """
import minopt

lm = minopt.load(minopt.DEMO)  # or: minopt.load("facebook/opt-125m")
lm.model.config
""",
    "## Thirty greedy tokens",
    """
prompt = "The old man sat down by the fire and"
print(lm.generate(prompt, max_new_tokens=30, echo=True))
""",
    "## The distribution of the next token\n"
    "\n"
    "The model maps token ids to logits. The softmax of the last row is the distribution of the next token.",
    """
import matplotlib.pyplot as plt
import torch

ids = torch.tensor([lm.tokenizer.encode(prompt)])
with torch.inference_mode():
    probabilities = lm.model(ids)[0, -1].softmax(-1)
top = probabilities.topk(12)
labels = [repr(lm.tokenizer.decode([i])) for i in top.indices.tolist()]

figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
bars = axes.barh(labels[::-1], top.values.flip(0), color="#3b6ea5")
axes.bar_label(bars, fmt="{:.1%}", padding=3, fontsize=8)
axes.margins(x=0.12)
axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
axes.set_xlabel("probability of the next token")
axes.set_title(f"… {prompt[-24:]}", fontsize=10, loc="left")
axes.spines[["top", "right"]].set_visible(False)
plt.show()
""",
    "## Several texts at once\n"
    "\n"
    "A list runs in batches. Shorter prompts are padded on the left; each gives the same text as alone. "
    "`return_details=True` adds token ids, log-probabilities and the reason for stopping.",
    """
prompts = ["It was a dark night", "“My dear,” said", "The ship"]
for record in lm.generate(prompts, max_new_tokens=12, echo=True, return_details=True):
    print(f"{sum(record.logprobs):7.2f}  {record.stop_reason}  {record.text!r}")
""",
    "## Sampling, as a stream",
    """
for piece in lm.stream("Once upon a time", max_new_tokens=60, do_sample=True, temperature=0.8, top_p=0.95, seed=7):
    print(piece, end="", flush=True)
""",
    "## Save\n\nThe folder opens in transformers as well.",
    """
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    lm.save(Path(folder) / "my-opt")
    print(*sorted(path.name for path in (Path(folder) / "my-opt").iterdir()), sep="\\n")
""",
]


DECODING = [
    "# Ways to continue a text\n"
    "\n"
    "A model gives a distribution of the next token. There are several ways to make a text from it. This notebook "
    "compares them on the small model of the package (3.9 M parameters, trained on novels of a century ago). "
    "[docs/generation.md](../docs/generation.md) has every option.",
    """
import minopt

lm = minopt.load(minopt.DEMO)  # or: minopt.load("facebook/opt-125m")
prompt = "The old man opened the door of the house, and"

ways = {
    "greedy": {},
    "greedy, no 3-gram twice": {"no_repeat_ngram_size": 3},
    "greedy, repetition penalty": {"repetition_penalty": 1.2},
    "5 beams": {"num_beams": 5},
    "5 beams, no 3-gram twice": {"num_beams": 5, "no_repeat_ngram_size": 3},
    "sampling, top 50": {"do_sample": True, "seed": 1},
    "sampling, top_p 0.9": {"do_sample": True, "top_p": 0.9, "top_k": 0, "seed": 1},
    "sampling, min_p 0.1": {"do_sample": True, "min_p": 0.1, "top_k": 0, "seed": 1},
}
for name, options in ways.items():
    record = lm.generate(prompt, max_new_tokens=40, return_details=True, **options)
    print(f"{name}  (log-probability {sum(record.logprobs):.1f})\\n   {record.text.strip()}\\n")
""",
    "Greedy decoding takes the most probable token each time and soon repeats itself. Beam search finds texts that are "
    "more probable as a whole, which does not make them better. Sampled texts are less "
    "probable and read more like a book.",
    "## Beams\n"
    "\n"
    "Each step keeps eight hypotheses. The result is the best eight, best first. The cache stores the prompt once for "
    "all beams. Left: the best beam starts with less probable tokens than greedy decoding and is more probable in the "
    "end. Right: the eight beams differ only in their last tokens.",
    """
import itertools
import os

import matplotlib.pyplot as plt

options = {"max_new_tokens": 24, "no_repeat_ngram_size": 3, "return_details": True}
records = lm.generate(prompt, num_beams=8, num_return_sequences=8, **options)
greedy = lm.generate(prompt, **options)

shared = len(os.path.commonprefix([record.token_ids for record in records]))
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for name, record, color in (("best beam", records[0], "#3b6ea5"), ("greedy", greedy, "#c4622d")):
    sums = list(itertools.accumulate(record.logprobs))
    left.plot(range(1, len(sums) + 1), sums, color=color, label=name)
left.axvspan(0.5, shared + 0.5, color="#3b6ea5", alpha=0.08, label=f"all beams alike ({shared} tokens)")
left.set_xlabel("new tokens")
left.set_ylabel("log-probability so far")
left.set_title("the best beam and the greedy text", fontsize=10, loc="left")
left.legend(frameon=False, fontsize=9)

endings = [f"… {lm.tokenizer.decode(list(record.token_ids[shared:]))}" for record in records]
right.plot([sum(record.logprobs) for record in records], range(len(records)), "o", color="#3b6ea5")
right.set_yticks(range(len(records)), endings)
right.invert_yaxis()
right.set_xlabel("log-probability of the text")
right.set_ylabel(f"its end, behind the {shared} shared tokens")
right.set_title("where the eight beams part", fontsize=10, loc="left")
right.grid(axis="y", alpha=0.3)
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
plt.show()

for record in records[:3]:
    print(f"{record.score:.3f}  {record.text!r}")
""",
    "The score is the sum divided by `length ** length_penalty`. Here texts may end at a full stop. Log-probabilities "
    "are negative, so a higher `length_penalty` favours longer texts.",
    """
stop = lm.tokenizer.encode(".", add_bos=False)
for length_penalty in (0.0, 0.5, 1.0, 2.0):
    (best,) = lm.generate([prompt], num_beams=8, max_new_tokens=60, eos_token_id=stop, early_stopping="never",
                          length_penalty=length_penalty, return_details=True)
    print(f"{length_penalty}  {len(best.token_ids):2} tokens, score {best.score:8.4f}  {best.text!r}")
""",
    "## Constraints, and your own rules\n"
    "\n"
    "A rule is a function: it takes the tokens so far and their scores, and returns new scores. This rule excludes "
    "tokens that contain an `e`.",
    """
import torch

without_e = torch.tensor(["e" not in lm.tokenizer.decode([i]).lower() for i in range(len(lm.tokenizer))])


def lipogram(input_ids, scores):
    return scores.masked_fill(~without_e, -torch.inf)


print(lm.generate("It was a dark night, and", logits_processor=lipogram, max_new_tokens=30, no_repeat_ngram_size=2))
print()
print(lm.generate('"Where is he?" said', stop_strings=['"', "\\n"], max_new_tokens=60))
""",
    "## Scores of given texts\n\nWhich continuation is more probable? The prompt is read once for all of them.",
    """
answers = [" the sea.", " the garden.", " the ceiling."]
for scored in sorted(lm.score("The ship sailed out upon", answers), key=lambda scored: -scored.total):
    print(f"{scored.total:7.2f}  {scored.text}")

print(f"perplexity {lm.perplexity('It was the best of times, it was the worst of times.'):.1f}")
""",
    "## Many prompts\n"
    "\n"
    "A list of any length runs in batches of similar length. Results come in the order of the prompts. "
    "`minopt generate --input` does the same with a file.",
    """
prompts = [f"On the {day} day of the week, the captain" for day in ("first", "second", "third", "fourth", "last")]
for text in lm.generate(prompts, max_new_tokens=12, echo=True):
    print(text)
""",
]

NOTEBOOKS = {"quickstart": QUICKSTART, "decoding": DECODING}


def main() -> None:
    for name in sys.argv[1:] or NOTEBOOKS:
        write(name, NOTEBOOKS[name])


def write(name: str, texts: list[str]) -> None:
    cells = [new_code_cell(c.strip()) if c.startswith("\n") else new_markdown_cell(c) for c in texts]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # stable, so that a rebuild changes only what changed
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = new_notebook(cells=cells, metadata=metadata)
    NotebookClient(notebook, timeout=300).execute()
    for cell in notebook.cells:
        cell.metadata.clear()  # times of execution
    nbformat.write(notebook, FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    main()
