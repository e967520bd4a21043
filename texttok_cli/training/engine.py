"""The only file that imports Accelerate: device, processes, precision, wrapping, reductions."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from torch import Tensor, nn

from texttok_cli.config.schema import TrainConfig
from texttok_cli.errors import RecipeError


class Engine:
    """One process's view of a run, whether it is alone or one of many."""

    def __init__(self, cfg: TrainConfig, *, cpu: bool = False) -> None:
        # Shapes are few (text lengths are rounded up), and a graph per shape is faster than one for all.
        dynamo = TorchDynamoPlugin(backend="inductor" if cfg.compile else "no", dynamic=False)
        self.accelerator = Accelerator(cpu=cpu, mixed_precision="bf16" if cfg.precision == "bf16" else "no", dynamo_plugin=dynamo)
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.is_main: bool = self.accelerator.is_main_process
        self.device: torch.device = self.accelerator.device
        if cfg.batch_size % self.world_size:
            raise RecipeError(f"training.batch_size {cfg.batch_size} is not a multiple of the {self.world_size} processes")
        self.batch_size = cfg.batch_size // self.world_size

    def prepare(self, model: nn.Module) -> Any:
        """The module to call in a step: on the device, autocast, compiled and wrapped as asked; shares its parameters."""
        return self.accelerator.prepare(model)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss, averaged over processes by the wrapped module."""
        self.accelerator.backward(loss)

    def mean(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Scalars averaged over all processes, as floats; one transfer."""
        stacked = torch.stack([v.detach().float().reshape(()) for v in values.values()])
        return dict(zip(values, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))

    def wait(self) -> None:
        """Let every process arrive here."""
        self.accelerator.wait_for_everyone()
