"""Trains a small OPT from nothing on a folder of text files: the tokenizer, the model, and a report.

    python examples/pretrain.py FOLDER_OF_TXT OUT

The two validation books are kept out of both trainings. OUT is then a folder that `minopt generate --model OUT`
and transformers open. Stopped and started again with the same arguments, training goes on where it last saved.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm

from minopt import OPT, OPTConfig, Tokenizer, save_model

EOS = 2  # "</s>", which in OPT begins a text as well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="folder of .txt files, a paragraph a line")
    parser.add_argument("out", type=Path, help="folder to write the model to")
    parser.add_argument("--validation", nargs="+", help="names of the files kept out (default: the last two)")
    parser.add_argument("--steps", type=int, default=11000)
    parser.add_argument("--batch-size", type=int, default=4, help="sequences of max_position_embeddings a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--save-every", type=int, default=200, help="steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    files = sorted(args.texts.glob("*.txt"))
    held_out = args.validation or [path.name for path in files[-2:]]
    training_files = [path for path in files if path.name not in held_out]
    validation_files = [path for path in files if path.name in held_out]
    if not training_files or not validation_files:
        raise SystemExit(f"{args.texts}: expected .txt files, {held_out} among them, found {len(files)} file(s).")
    resumed = (args.out / "training_state.pt").exists()
    tokenizer = Tokenizer.load(args.out) if resumed else train_tokenizer(training_files, args.vocab_size)
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=256, num_hidden_layers=4, num_attention_heads=4, ffn_dim=1024,
        max_position_embeddings=1024, dropout=args.dropout,
    )  # fmt: skip
    torch.manual_seed(0)
    model = OPT(config, device=args.device)
    if not resumed:
        save_model(model, args.out, tokenizer, force=True)
    train(model, Paragraphs(training_files, tokenizer), args)

    bits = {path.name: round(bits_per_byte(model, tokenizer, path), 4) for path in validation_files}
    print("bits per byte:", bits)
    (args.out / "validation.json").write_text(json.dumps(bits, indent=2) + "\n")
    save_model(model.half(), args.out, tokenizer, force=True)


def train_tokenizer(files: list[Path], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with OPT's special tokens at OPT's ids."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train([str(path) for path in files], trainer)
    backend.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", EOS)])
    names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return Tokenizer(backend, names | {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True})


class Paragraphs:
    """All books as one row of ids, and where their paragraphs begin."""

    def __init__(self, files: list[Path], tokenizer: Tokenizer) -> None:
        ids: list[int] = []
        starts: list[int] = []
        for path in tqdm(files, desc="reading", unit="book"):
            for paragraph in path.read_text(encoding="utf-8").split("\n"):
                starts.append(len(ids))
                ids += tokenizer.encode(paragraph + "\n", add_bos=False)
            ids.append(EOS)
        self.ids = torch.tensor(ids)
        self.starts = torch.tensor(starts)

    def batch(self, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """``[rows, length]``: ``</s>``, then text from the paragraph at a random place."""
        at = torch.randint(len(self.ids) - length, (rows,), generator=generator)
        at = self.starts[torch.searchsorted(self.starts, at, right=True) - 1]
        text = torch.stack([self.ids[a : a + length - 1] for a in at.tolist()])
        return F.pad(text, (1, 0), value=EOS)


def train(model: OPT, data: Paragraphs, args: argparse.Namespace) -> None:
    """AdamW with OPT's betas, decay and clipping; bf16 products over float32 weights."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(0)
    state_file = args.out / "training_state.pt"
    first = 0
    if state_file.exists():
        state = torch.load(state_file, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"].cpu())
        first = state["step"]
    model.train()
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, unit="step")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * schedule(step, args.steps)
        ids = data.batch(args.batch_size, model.config.max_position_embeddings, generator).to(args.device)
        with torch.autocast(args.device, dtype=torch.bfloat16):
            logits = model(ids)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state | {"generator": generator.get_state()}, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").replace(state_file)
            print(f"step {step + 1} loss {loss.item():.4f}", flush=True)


def schedule(step: int, steps: int, warmup: int = 200) -> float:
    """Linear warm-up, then a cosine to a tenth (OPT's own floor)."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.inference_mode()
def bits_per_byte(model: OPT, tokenizer: Tokenizer, path: Path) -> float:
    """Bits that the model needs for a byte of the file, each token seen with at least half a window before it."""
    model.eval()
    text = path.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer.encode(text, add_bos=True))
    window = model.config.max_position_embeddings
    nats, begin, scored = 0.0, 0, 1
    while scored < len(ids):
        end = min(begin + window, len(ids))
        part = ids[begin:end].to(model.device)[None]
        new = end - scored
        log_probs = model.head(model.hidden_states(part)[:, -new - 1 : -1]).float().log_softmax(-1)
        nats -= log_probs.gather(-1, part[:, -new:, None]).sum().item()
        scored, begin = end, end - window // 2
    return nats / math.log(2) / len(text.encode())


if __name__ == "__main__":
    main()
