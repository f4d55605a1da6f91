"""Continues a text with a program that `minopt export` wrote: needs torch and tokenizers, and no minopt.

minopt export facebook/opt-125m program
python examples/infer_exported.py program "Today is a beautiful day and I want to"
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch._inductor
from tokenizers import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="that minopt export wrote")
    parser.add_argument("prompt", help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=30)
    args = parser.parse_args()

    manifest = json.loads((args.folder / "manifest.json").read_text())
    config = json.loads((args.folder / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    if "amx_tile" in manifest["instructions"]:
        torch.cpu._init_amx()  # Linux gives a process these registers when it asks for them
    program = torch._inductor.aoti_load_package(str(args.folder / "program.pt2"))

    ids = tokenizer.encode(args.prompt).ids
    capacity = len(ids) + args.max_new_tokens
    if capacity > manifest["max_length"]:
        raise SystemExit(f"prompt and new tokens are {capacity} together, the program has {manifest['max_length']}.")
    device, heads = manifest["device"], config["num_attention_heads"]
    size = (1, heads, capacity, config["hidden_size"] // heads)
    keys, values = (
        [torch.zeros(size, dtype=getattr(torch, manifest["dtype"]), device=device)
         for _ in range(config["num_hidden_layers"])] for _ in range(2)
    )  # fmt: skip

    ends = config["eos_token_id"]  # one, or several
    ends = ends if isinstance(ends, list) else [ends]
    new = ids  # the prompt first, then one token at a time
    while len(ids) < capacity:
        T, S = len(new), len(ids)
        mask = torch.ones(1, 1, T, S, dtype=torch.bool, device=device).tril(S - T)  # [1, 1, T, S], True = attend
        positions = torch.arange(S - T, S, device=device)[None]
        wanted = torch.tensor([T - 1], device=device)  # whose logits are wanted: the last token's
        logits = program(torch.tensor([new], device=device), positions, mask, wanted, keys, values)  # [1, vocabulary]
        new = [int(logits.argmax())]
        if new[0] in ends:
            break
        ids += new
    print(tokenizer.decode(ids))


if __name__ == "__main__":
    main()
