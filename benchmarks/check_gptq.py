"""What int4 and SmoothQuant cost in quality, of the embedded model; and what GPTQ takes at opt-1.3b's size.

    python benchmarks/check_gptq.py --calibration TEXT --books the-time-machine.txt peter-pan.txt [--hardware NAME]

"outliers": three channels 60 times as large behind each norm, the same function. Peaks: a process of its own converts
layers of random weights with the first 60,000 characters of the text.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import check_int8
import common
import torch
from bench_convert import CHILD

import minopt
from minopt import Tokenizer, convert, int4
from minopt.evaluation.perplexity import window_perplexity

parser = common.parser(__doc__)
parser.add_argument("--calibration", required=True, type=Path)
parser.add_argument("--books", nargs="+", required=True, type=Path)
args, tokenizer, folder = parser.parse_args(), Tokenizer.load(minopt.DEMO), tempfile.TemporaryDirectory()
place, result = Path(folder.name), {"topic": "gptq", **common.machine("cpu"), "perplexity": {}, "opt-1.3b": {}}
books = {book.stem: tokenizer.encode(book.read_text(encoding="utf-8")) for book in args.books}
with mock.patch.object(check_int8, "OUTLIERS", (3, 77, 200)):
    check_int8.plant(model := minopt.load_model(minopt.DEMO, device="cpu"))
minopt.save_model(model, place / "outliers", tokenizer)
ways = {"float32": (minopt.DEMO, 128, {})}
for group in (128, 64, 32):
    ways[f"int4, nearest, {group}"] = (minopt.DEMO, group, {"quantize": "int4"})
    ways[f"int4, GPTQ, {group}"] = (minopt.DEMO, group, {"quantize": "int4", "calibration": args.calibration})
for name, source in (("int8", minopt.DEMO), ("outliers, int8", place / "outliers")):
    ways[name] = (source, 128, {"quantize": "int8"})
    ways[f"{name}, smooth"] = (source, 128, {"quantize": "int8", "smooth": 0.5, "calibration": args.calibration})
for name, (source, group, options) in ways.items():
    with mock.patch.object(int4, "GROUP", group):
        convert(source, place / "new", force=True, **options)
    model = minopt.load(place / "new", device="cpu").model
    found = {book: window_perplexity(model, ids).perplexity for book, ids in books.items()}
    result["perplexity"][name] = {book: round(value, 4) for book, value in found.items()}
(place / "text.txt").write_text(args.calibration.read_text(encoding="utf-8")[:60_000])
options = json.dumps({"quantize": "int4", "calibration": str(place / "text.txt"), "tokenizer": minopt.DEMO})
for layers in (2, 6):
    source = common.write_model(place, "opt-1.3b", torch.float16, layers)
    command = [sys.executable, "-c", CHILD, str(source), str(place / f"int4-{layers}"), options]
    result["opt-1.3b"][f"{layers} layers"] = json.loads(subprocess.check_output(command, text=True))
common.keep("gptq", args.hardware, result)
