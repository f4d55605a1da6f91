"""LoRA (Hu et al. 2021, arXiv 2106.09685) by peft, as a method of training: adapters train, weights stay."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor, nn

from minopt.atomic import replacing
from minopt.checkpoint.checkpoint import Checkpoint
from minopt.checkpoint.errors import some
from minopt.checkpoint.names import to_hf
from minopt.evaluation.tasks import seed_of
from minopt.interop import need
from minopt.model import OPT
from minopt.training import method
from minopt.training.weights import fill, gathered, local, save, whole

peft: Any = need("peft", "peft")

_NAME = "default"  # that peft gives an adapter


class Method(method.Method):
    """Trains adapters in float32 beside the frozen weights, and writes them as peft does over transformers' OPT."""

    def build(self) -> nn.Module:
        config, model = self.config, self.model
        linear = {name.rpartition(".")[2]: None for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        targets = [name.strip() for name in config.lora_target_modules.split(",") if name.strip()]
        if (unknown := [name for name in targets if name not in linear]) or not targets:
            raise ValueError(
                f"--lora_target_modules: expected some of {', '.join(linear)}, got {some(unknown) or 'none'}. Name "
                "linear modules of the model."
            )
        self.lora = peft.LoraConfig(
            task_type="CAUSAL_LM", base_model_name_or_path=config.model_name_or_path, r=config.lora_rank,
            lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=targets,
        )  # fmt: skip
        self.trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.tuner = peft.LoraModel(model, self.lora, _NAME)
        for name, parameter in model.named_parameters():
            if _is_adapters(name):  # peft makes them in the dtype of the weights
                parameter.data = parameter.data.float()
        if model.device.type != "meta":
            self._draw()
        model.train()
        return super().build()

    def fill(self, checkpoint: Checkpoint) -> None:
        names = {name: _plain(name) for name, _ in self.model.named_parameters() if not _is_adapters(name)}
        fill(self.model, checkpoint, self.world, names)
        for module in self.model.modules():
            if not self.is_sharded and isinstance(module, peft.tuners.lora.LoraLayer):
                module.lora_A.to_empty(device=self.world.device)
                module.lora_B.to_empty(device=self.world.device)
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        """Draws A as peft does, in all processes alike; B is 0, so that a run begins with the model as it is."""
        generator = torch.Generator().manual_seed(seed_of(self.config.seed))
        for name, parameter in self.model.named_parameters():
            if _is_adapters(name):
                numbers = torch.zeros(parameter.shape)
                if ".lora_A." in name:
                    nn.init.kaiming_uniform_(numbers, a=math.sqrt(5), generator=generator)
                own, numbers = local(parameter, numbers)
                own.copy_(numbers)

    @torch.no_grad()
    def _merged(self) -> Iterator[tuple[str, Tensor]]:
        """The weights of the model with its adapters merged, whole, by its own names. All processes take each."""
        layers = dict(self.model.named_modules())
        for name, parameter in self.model.named_parameters():
            if _is_adapters(name):
                continue
            numbers, layer = whole(parameter), layers[name.rpartition(".")[0].removesuffix(".base_layer")]
            if name.endswith(".base_layer.weight"):
                a, b = (whole(part[_NAME].weight) for part in (layer.lora_A, layer.lora_B))
                numbers = numbers.float() + layer.scaling[_NAME] * (b @ a)
            yield _plain(name), numbers

    def whole(self, dtype: torch.dtype | None = None) -> OPT:
        return gathered(self.model.config, self._merged(), self.world.device, dtype or self.evaluation_dtype)

    def save(self, folder: Path) -> None:
        """Writes peft's folder; with ``--merge`` a whole model, for which each process gathers it."""
        if self.config.merge:
            save(self.whole(torch.float32), folder, self.tokenizer, self.world)
            return
        state = {
            f"base_model.model.{to_hf(name.replace(f'.{_NAME}.', '.'))}": whole(parameter).detach().cpu().contiguous()
            for name, parameter in self.model.named_parameters() if _is_adapters(name)
        }  # fmt: skip

        def write() -> None:
            with replacing(folder) as new:
                new.mkdir()
                self.tokenizer.save(new)
                safetensors.save_file(state, new / "adapter_model.safetensors", metadata={"format": "pt"})
                self.lora.save_pretrained(new)

        self.world.first(write)

    def close(self) -> None:
        """Merges the adapters into the weights, but where those are sharded."""
        super().close()
        self.tuner.unload() if self.is_sharded else self.tuner.merge_and_unload()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.trainable)


def _is_adapters(name: str) -> bool:
    return ".lora_" in name


def _plain(name: str) -> str:
    """The name of a weight before peft has put its module into another."""
    return name.replace(".base_layer.", ".")
