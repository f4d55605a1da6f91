"""Writes quickstart.ipynb with the outputs of a run: `python examples/build_quickstart.py`."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

NOTEBOOK = Path(__file__).parent / "quickstart.ipynb"

CELLS = [
    "# minopt: a quick start\n"
    "\n"
    "Load a model, continue a text, look inside. The small model that minopt carries makes this run anywhere, offline; "
    'put `"facebook/opt-125m"`, another name, or a folder in its place for a real one.',
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
    "## What the model thinks comes next\n"
    "\n"
    "The model maps ids to logits; the softmax of the last row is the distribution of the next token.",
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
    "A list is one batch; shorter prompts are padded on the left, and each gets what it would get alone. "
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


def main() -> None:
    cells = [new_code_cell(c.strip()) if c.startswith("\n") else new_markdown_cell(c) for c in CELLS]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # stable, so that a rebuild changes only what changed
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = new_notebook(cells=cells, metadata=metadata)
    NotebookClient(notebook, timeout=300).execute()
    for cell in notebook.cells:
        cell.metadata.clear()  # times of execution
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
