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

INSIDE = [
    "# Look inside the model, change it, train it a little\n"
    "\n"
    "This notebook takes one attention head of the package's small model (4 layers of 4 heads, trained on old "
    "novels). It shows what the head looks at, removes it, and measures what that changes. Then it trains a LoRA, "
    "which needs peft (`pip install 'minopt[peft]'`), and compares the model before and after. "
    "[docs/other_programs.md](../docs/other_programs.md) has the lines for other programs.",
    """
import matplotlib.pyplot as plt
import torch

import minopt

lm = minopt.load(minopt.DEMO, optimize=False, device="cpu")  # the plain model: it can be traced and changed
config = lm.model.config
prompt = "He opened the door, and the two men looked at each"
ids = torch.tensor([lm.tokenizer.encode(prompt)])
seen = minopt.trace(lm, ids)
print(seen)
print("residual stream:", len(seen.residual), "tensors", list(seen.residual[0].shape))
print("attention weights:", len(seen.attention), "tensors", list(seen.attention[0].shape))
""",
    "## Which head looks at the previous token?\n"
    "\n"
    "Each row of a head's weights says how much one token takes from each earlier one. The weights just below the "
    "diagonal belong to the previous token. Their mean, for each head, in percent:",
    """
def previous(weights):  # [tokens, tokens]; the first rows have few tokens to choose from
    return weights.diagonal(-1)[3:].mean().item()


print("        " + "".join(f"  head {head}" for head in range(config.num_attention_heads)))
for layer, weights in enumerate(seen.attention):
    print(f"layer {layer} " + "".join(f"{previous(head):8.0%}" for head in weights[0]))
""",
    "In this sentence, head 2 of layer 3 (both counted from 0) looks at the previous token more than any other head"
    " does. These are its weights. `</s>` is the token with which each text begins.",
    """
layer, head = 3, 2
tokens = [lm.tokenizer.decode([i], skip_special_tokens=False) for i in ids[0].tolist()]
labels = [token.replace(" ", "·") for token in tokens]  # a dot is a space

figure, axes = plt.subplots(figsize=(6.4, 5.6), layout="constrained")
image = axes.imshow(seen.attention[layer][0, head], cmap="Blues", vmin=0, vmax=1)
axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right", rotation_mode="anchor")
axes.set_yticks(range(len(labels)), labels)
axes.set_xlabel("the token that is looked at")
axes.set_ylabel("the token that looks")
axes.set_title(f"attention weights of layer {layer}, head {head}", fontsize=10, loc="left")
figure.colorbar(image, ax=axes, shrink=0.7)
plt.show()
""",
    "The picture says more than the mean does. *the* and *door* look at *opened*, *at* and *each* look at *looked*: "
    "here the head finds the verb. Does the model need this to continue the sentence?",
    "## Remove the head\n"
    "\n"
    "The input of `out_proj` holds the results of all heads side by side, `head_dim` numbers each. A patch sets "
    "those of one head to zero. The weights of the model stay as they are.",
    """
def without(layer, head):
    def cut(results):  # [batch, tokens, heads x head_dim]
        results[..., head * config.head_dim : (head + 1) * config.head_dim] = 0
        return results

    return minopt.trace(lm, ids, names=[], patch={f"layers.{layer}.self_attn.out_proj.input": cut})


whole = seen.logits[0, -1].softmax(-1)
patched = without(layer, head).logits[0, -1].softmax(-1)
shown = [*dict.fromkeys([*whole.topk(6).indices.tolist(), *patched.topk(6).indices.tolist()])]

figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
rows = torch.arange(len(shown))
for shift, values, color, label in (
    (-0.2, whole, "#3b6ea5", "whole model"),
    (0.2, patched, "#c4622d", "head removed"),
):
    bars = axes.barh(rows + shift, values[shown], height=0.38, color=color, label=label)
    axes.bar_label(bars, fmt="{:.1%}", padding=3, fontsize=8)
axes.set_yticks(rows, [repr(lm.tokenizer.decode([i])) for i in shown])
axes.invert_yaxis()
axes.margins(x=0.12)
axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
axes.set_xlabel("probability of the next token")
axes.set_title("… the two men looked at each", fontsize=10, loc="left")
axes.legend(frameon=False, fontsize=9)
axes.spines[["top", "right"]].set_visible(False)
plt.show()
""",
    "Without the head, *other* becomes half as probable, and *of* three times as probable: the model makes less "
    "of the words before *each*. As a control, here is the probability of *other* with each of the 16 heads "
    "removed in turn.",
    """
other = lm.tokenizer.encode(" other", add_bos=False)[0]
print(f"whole model: {whole[other]:.0%}. With one head removed:")
print("        " + "".join(f"  head {head}" for head in range(config.num_attention_heads)))
for layer in range(config.num_hidden_layers):
    values = [without(layer, head).logits[0, -1].softmax(-1)[other] for head in range(config.num_attention_heads)]
    print(f"layer {layer} " + "".join(f"{value:8.0%}" for value in values))
""",
    "In layer 3 this head matters most, in layers 0 and 2 no head matters as much. Heads 0 and 1 of layer 1 matter "
    "more, but all later layers read what they write. So the table says which heads the model needs here, and not "
    "what each is for.",
    "## Train a LoRA\n"
    "\n"
    "Twelve lines of a ship's log are the training data. Four other lines are held out. They measure the model "
    "before and after.",
    """
import json
import math
import tempfile
from pathlib import Path

log = '''
Monday, 3 March. Wind south-west, fresh. Course north by east. Sailed 112 miles. All well on board.
Tuesday, 4 March. Wind south-west, strong. Course north by east. Sailed 131 miles. Two sails torn.
Wednesday, 5 March. Wind west, a gale. Hove to all night. Sailed 40 miles. One man hurt.
Thursday, 6 March. Wind west, less. Course north. Sailed 87 miles. Sails mended.
Friday, 7 March. Wind north-west, light. Course north by east. Sailed 65 miles. All well on board.
Saturday, 8 March. No wind. Fog all day. Sailed 9 miles. Rang the bell.
Monday, 10 March. Wind south, fresh. Course north-east. Sailed 120 miles. Saw a ship to the east.
Tuesday, 11 March. Wind south, fresh. Course north-east. Sailed 126 miles. All well on board.
Wednesday, 12 March. Wind south-east, light. Course north. Sailed 58 miles. Rain all night.
Friday, 14 March. Wind east, strong. Course north by west. Sailed 98 miles. One sail torn.
Saturday, 15 March. Wind east, fresh. Course north. Sailed 104 miles. Saw land to the north.
Sunday, 16 March. Wind south-east, light. Came to anchor in the bay. All well on board.
'''.strip().split("\\n")
held_out = [
    "Sunday, 9 March. Wind south, light. Course north-east. Sailed 61 miles. Fog at night.",
    "Thursday, 13 March. Wind south-east, strong. Course north. Sailed 117 miles. All well on board.",
    "Monday, 17 March. Wind west, fresh. Left the bay. Course south by west. Sailed 76 miles.",
    "Tuesday, 18 March. Wind north-west, a gale. Course south. Sailed 134 miles. One sail torn.",
]
novel = "The old man sat down by the fire, and his wife looked out of the window at the dark street."

scratch = tempfile.TemporaryDirectory()  # removed at the end
folder = Path(scratch.name)
lines = [json.dumps({"prompt": "", "completion": line}) for line in log]
_ = (folder / "log.jsonl").write_text("\\n".join(lines))
""",
    "`minopt finetune` is a command. This cell runs it, and keeps its progress in a file. The weights of the model "
    "do not change: only adapters of rank 8 beside `q_proj` and `v_proj` are trained and written, as peft has them.",
    """
import sys

!"{sys.executable}" -m minopt finetune --model "{minopt.DEMO}" --train-file "{folder}/log.jsonl" \\
  --output-dir "{folder}/lora" --lora-rank 8 --learning-rate 2e-3 --max-steps 60 --per-device-train-batch-size 4 \\
  --logging-steps 20 --keep-last 0 --device cpu 2> "{folder}/progress.txt"

for line in (folder / "lora" / "metrics.jsonl").read_text().splitlines():
    print("step {step}: loss {loss:.1f}".format(**json.loads(line)))
print(*sorted(path.name for path in (folder / "lora").glob("[!.]*")), sep="\\n")
""",
    "## Load the adapter, and evaluate\n"
    "\n"
    "`adapter=` merges the LoRA while the model is read. Perplexity is a mean over tokens; lower is better.",
    """
trained = minopt.load(minopt.DEMO, adapter=folder / "lora", optimize=False, device="cpu")


def perplexity(model, texts):
    scored = model.score(texts)
    return math.exp(-sum(text.total for text in scored) / sum(len(text.logprobs) for text in scored))


for name, texts in (("training lines", log), ("held-out lines", held_out), ("a line of a novel", [novel])):
    print(f"{name:17}  before {perplexity(lm, texts):3.0f}  after {perplexity(trained, texts):3.0f}")

before, after = (math.exp(model.score("Wednesday, 19 March.", [" Wind"])[0].total) for model in (lm, trained))
print(f'" Wind" follows the date with a probability of {before:.2%} before, {after:.0%} after')
""",
    "Lines of the log that were not in the training data have become about as probable as those that were. The line"
    " of a novel has become less probable: the adapter learned the log and lost some of the novels. Fewer steps or "
    "a lower learning rate lose less. `lm` is still the model as it was, and `minopt convert --adapter` would write"
    " the merged model.",
]

NOTEBOOKS = {"quickstart": QUICKSTART, "decoding": DECODING, "inside": INSIDE}


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
