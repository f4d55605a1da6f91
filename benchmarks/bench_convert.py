"""Time and peak memory of converting a large checkpoint: 8 parts x 8 shards, 4.5 GB in float16, written here first.

    python benchmarks/bench_convert.py --hardware NAME [--folder DIR]

Needs 20 GB of disk. Each conversion runs in a process of its own; its peak is of resident pages, the process's own and
mapped ones alike, above what it held after importing minopt. The physical limit is to copy the output file by file.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import common
import torch
from torch import Tensor

PARTS, SHARDS = 8, 8
HIDDEN, LAYERS, HEADS, FFN, VOCAB, POSITIONS = 4096, 10, 32, 16384, 50272, 2048

CONVERSIONS = {
    "FSDP shards to Hugging Face, files of 2 GB": ("source", "hf", {}),
    "FSDP shards to Hugging Face, files of 500 MB": ("source", "hf500", {"max_shard_bytes": 500_000_000}),
    "FSDP shards to 8 metaseq parts": ("source", "parts", {"format": "metaseq", "parts": 8}),
    "Hugging Face to bfloat16, files of 2 GB": ("hf", "bfloat16", {"dtype": "bfloat16"}),
}

CHILD = """
import json, re, sys, time
from pathlib import Path
from minopt.checkpoint.convert import convert
from minopt.checkpoint.inspect import inspect_checkpoint

def resident(name):
    return 1000 * int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

source, destination, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
Path("/proc/self/clear_refs").write_text("5")
base, begin = resident("VmRSS"), time.perf_counter()
convert(source, destination, **options)
print(json.dumps({"seconds": time.perf_counter() - begin, "peak_bytes": resident("VmHWM") - base}))
"""


def part_tensors(part: int) -> Iterator[tuple[str, list[tuple[str, Tensor]]]]:
    """One part's tensors, by the module that FSDP wraps; what all parts hold is drawn alike."""
    own, shared = torch.Generator().manual_seed(1 + part), torch.Generator().manual_seed(0)

    def draw(*shape: int, generator: torch.Generator) -> Tensor:
        return torch.randint(-3000, 3000, shape, generator=generator, dtype=torch.int16).half() / 1e5

    C, F = HIDDEN, FFN
    yield (
        "",
        [
            ("decoder.embed_tokens.weight", draw(VOCAB // PARTS, C, generator=own)),
            ("decoder.embed_positions.weight", draw(POSITIONS + 2, C, generator=shared)),
            ("decoder.layer_norm.weight", draw(C, generator=shared)),
            ("decoder.layer_norm.bias", draw(C, generator=shared)),
        ],
    )
    for layer in range(LAYERS):
        yield (
            f"decoder.layers.{layer}",
            [
                ("self_attn.qkv_proj.weight", draw(3 * C // PARTS, C, generator=own)),
                ("self_attn.qkv_proj.bias", draw(3 * C // PARTS, generator=own)),
                ("self_attn.out_proj.weight", draw(C, C // PARTS, generator=own)),
                ("self_attn.out_proj.bias", draw(C, generator=shared)),
                ("self_attn_layer_norm.weight", draw(C, generator=shared)),
                ("self_attn_layer_norm.bias", draw(C, generator=shared)),
                ("fc1.weight", draw(F // PARTS, C, generator=own)),
                ("fc1.bias", draw(F // PARTS, generator=own)),
                ("fc2.weight", draw(C, F // PARTS, generator=own)),
                ("fc2.bias", draw(C, generator=shared)),
                ("final_layer_norm.weight", draw(C, generator=shared)),
                ("final_layer_norm.bias", draw(C, generator=shared)),
            ],
        )


def write_source(folder: Path) -> None:
    """Writes the shards as metaseq does, one part at a time."""
    folder.mkdir()
    settings = {"decoder_embed_dim": HIDDEN, "decoder_ffn_embed_dim": FFN, "decoder_layers": LAYERS,
                "decoder_attention_heads": HEADS, "activation_fn": "relu", "model_parallel_size": PARTS}  # fmt: skip
    for part in range(PARTS):
        models: list[dict[str, Tensor]] = [{"decoder.version": torch.tensor([3.0])} for _ in range(SHARDS)]
        groups: list[list[dict[str, object]]] = [[] for _ in range(SHARDS)]
        for path, tensors in part_tensors(part):
            flat = torch.cat([tensor.flatten() for _, tensor in tensors])
            size = math.ceil(flat.numel() / SHARDS)
            for shard in range(SHARDS):
                chunk = flat[shard * size : (shard + 1) * size]
                about = {"names": [name for name, _ in tensors], "shapes": [t.shape for _, t in tensors],
                         "numels": [t.numel() for _, t in tensors], "padding": size - chunk.numel()}  # fmt: skip
                key = f"{path}.flat_param_0" if path else "flat_param_0"
                models[shard][key] = torch.cat([chunk, chunk.new_zeros(size - chunk.numel())])
                groups[shard].append({"fsdp_path": path, "params": {"flat_param_0": about}})
        for shard in range(SHARDS):
            metadata = {"param_metadata": groups[shard], "buffer_names": ["decoder.version"]}
            content = {"cfg": {"model": settings}, "model": models[shard], "shard_metadata": metadata}
            torch.save(content, folder / f"checkpoint_last-model_part-{part}-shard{shard}.pt")


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def copy_seconds(folder: Path) -> float:
    """The time to copy a folder's files to the disk: the limit of any conversion that writes them."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as copy:
        begin = time.perf_counter()
        for path in folder.iterdir():
            with path.open("rb") as source, (Path(copy) / path.name).open("wb") as target:
                shutil.copyfileobj(source, target, 16_000_000)
                os.fsync(target.fileno())
        return time.perf_counter() - begin


def digest(path: Path) -> str:
    command = [sys.executable, "-m", "minopt", "inspect", "--hash", "--json", str(path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["digest"]


def main() -> None:
    """Writes the source, converts it in each way, and keeps the figures."""
    parser = common.parser(__doc__)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    args = parser.parse_args()
    largest = 2 * VOCAB * HIDDEN
    rows = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        write_source(Path(work) / "source")
        source_bytes = size_of(Path(work) / "source")
        expected = digest(Path(work) / "source")
        for name, (source, destination, options) in CONVERSIONS.items():
            target = Path(work) / destination
            command = [sys.executable, "-W", "error", "-c", CHILD, str(Path(work) / source), str(target)]
            child = subprocess.run([*command, json.dumps(options)], check=True, capture_output=True, text=True)
            row = json.loads(child.stdout.splitlines()[-1])
            shard = max(path.stat().st_size for path in target.iterdir())
            limit = copy_seconds(target)
            same = digest(target) == expected if "dtype" not in options else None
            rows[name] = {
                "seconds": round(row["seconds"], 2),
                "gb_per_second": round(size_of(target) / row["seconds"] / 1e9, 2),
                "copy_seconds": round(limit, 2),
                "peak_mb": round(row["peak_bytes"] / 1e6),
                "largest_file_mb": round(shard / 1e6),
                "bound_mb": round((shard + 2 * largest) / 1e6),
                "same_digest": same,
            }
            print(name, rows[name], flush=True)
            if destination != "hf":
                shutil.rmtree(target)
    result = common.machine("cpu") | {
        "source": f"{PARTS} parts x {SHARDS} shards", "source_mb": round(source_bytes / 1e6),
        "largest_tensor_mb": round(largest / 1e6), "conversions": rows,
    }  # fmt: skip
    common.keep("convert", args.hardware, result)


if __name__ == "__main__":
    main()
