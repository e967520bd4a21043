"""The only file that imports Accelerate: device, processes, precision, wrapping, reductions, trackers."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    TorchDynamoPlugin,
    parse_flag_from_env,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.optim import Optimizer

from texttok_cli.config.recipe import TrainConfig
from texttok_cli.errors import BackendError, RecipeError
from texttok_cli.training.sharding import whole

# Hours that processes wait for one another before they take it for lost: for the main one while it validates or writes, and while it
# embeds a training set's captions.
VALIDATING, EMBEDDING = 1, 24


class Engine:
    """One process's view of a run, whether it is alone or one of many."""

    def __init__(self, cfg: TrainConfig, *, out: Path, device: str, sharding: bool = False) -> None:
        """`sharding`: the task can be trained with its weights split over processes (FSDP2), if so launched."""
        for tracker in cfg.trackers:
            if find_spec(tracker) is None:
                raise BackendError(f"training.trackers: {tracker} is not installed: pip install {tracker}")
        # Else one process can't train twice in different precisions, or on a GPU first and then on the CPU.
        AcceleratorState._reset_state(reset_partial_state=True)
        # Shapes are few (text lengths are rounded up), and a graph per shape is faster than one for all.
        dynamo = TorchDynamoPlugin(backend="inductor" if cfg.compile else "no", dynamic=False)
        if cfg.compile:
            torch._dynamo.config.recompile_limit = 64  # text lengths in steps of 8, each with and without a mask
        rounds = torch.backends.cuda.matmul.fp32_precision == "tf32"
        self.accelerator = Accelerator(
            # Not left to Accelerate: without an accelerator it takes every process of a launch for a run of its own.
            cpu=device == "cpu" or (device == "auto" and not torch.accelerator.is_available()),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=EMBEDDING if cfg.text_cache else VALIDATING))],
            mixed_precision="bf16" if cfg.precision == "bf16" else "no",
            dynamo_plugin=dynamo,
            log_with=list(cfg.trackers) or None,
            project_dir=str(out),
        )
        if not rounds and torch.backends.cuda.matmul.fp32_precision == "tf32":  # as Accelerate sets it on a GPU for compiled fp32
            torch.backends.cuda.matmul.allow_tf32 = False
        if self.accelerator.distributed_type == DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP"):
            # Accelerate looks for FSDP on accelerators only; FSDP2 itself runs over gloo as well.
            self.accelerator.state.distributed_type = DistributedType.FSDP
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None:
            if plugin.auto_wrap_policy is None:  # the launch names none: the whole model would be gathered at once
                plugin.auto_wrap_policy = transformer_auto_wrap_policy  # by what the model says must stay together
            plugin.cpu_ram_efficient_loading = False  # every process builds the model from the seed; that path can't take buffers
            if cfg.precision == "bf16":
                # Accelerate's policy would round times and latents to bf16, and sum gradients in it.
                plugin.mixed_precision_policy = MixedPrecisionPolicy(
                    param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
                )
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.is_main: bool = self.accelerator.is_main_process
        self.device: torch.device = self.accelerator.device
        if device not in ("auto", self.device.type):
            raise BackendError(f"--device {device}: training uses {self.device.type} on this machine; leave it out, or use cpu")
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != self.world_size:  # on MPS Accelerate takes every process for a run of its own, and all would write to one folder
            raise BackendError(f"{launched} processes can't train together on {self.device.type}: start one, or add --device cpu")
        self.sharded: bool = self.accelerator.is_fsdp2
        whole_models = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        if self.accelerator.distributed_type not in whole_models and not (sharding and self.sharded):
            kind = self.accelerator.distributed_type.value
            if sharding:
                raise RecipeError(f"a generator is trained with DDP or FSDP2, not {kind}: launch with --fsdp_version 2, or without it")
            raise RecipeError(f"a tokenizer is trained with DDP, not {kind}: R1 needs second derivatives; launch without it")
        if cfg.batch_size % (self.world_size * cfg.accumulate):
            parts = f"{self.world_size} processes x {cfg.accumulate} accumulated parts"
            raise RecipeError(f"training.batch_size {cfg.batch_size} is not a multiple of {parts}")
        self.batch_size = cfg.batch_size // self.world_size
        self.seed = cfg.seed

    def prepare(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> Any:
        """The module to call in a step: `model` on the device, in the run's precision, compiled and wrapped as asked.

        The module returned shares the parameters of `model`. With FSDP2 these become shards, and the optimizers are given the
        shards; each process then holds only its part of every weight, and `gathered` brings whole tensors back. It can be called
        until the run is `finishing`.
        """
        self._module = self.accelerator.prepare(model, *optimizers)[0] if self.sharded else self.accelerator.prepare(model)
        return weakref.proxy(self._module)

    @property
    def gathered_parts(self) -> int:
        """Into how many parts FSDP2 split the prepared model, of which one at a time is whole."""
        return sum(isinstance(module, FSDPModule) for module in self._module.modules())

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The run's precision, for a module that is not prepared."""
        context: contextlib.AbstractContextManager[None] = self.accelerator.autocast()
        return context

    def accumulate(self, module: Any, size: int, parts: int, backward: Callable[[slice], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Run `backward` on each of `parts` equal slices of a batch of `size`; the means of the scalars that it returns."""
        step = size // parts
        values: dict[str, Tensor] = {}
        for i in range(parts):
            # The last part's backward pass averages over processes what all have left in the gradients of `module`.
            with contextlib.nullcontext() if i == parts - 1 else self.accelerator.no_sync(module):
                part = backward(slice(i * step, (i + 1) * step))
            values = {name: values.get(name, 0.0) + value.detach() / parts for name, value in part.items()}
        return values

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss, averaged over processes by the wrapped module."""
        self.accelerator.backward(loss)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average over processes the gradients of a module that is not wrapped, in one transfer."""
        if self.world_size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "mean")
        for gradient, averaged in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(averaged.view_as(gradient))

    def averaged(self, values: Tensor) -> Tensor:
        """A tensor's mean over processes."""
        reduced: Tensor = self.accelerator.reduce(values, "mean")
        return reduced

    def summed(self, values: Tensor) -> Tensor:
        """A tensor's sum over processes."""
        reduced: Tensor = self.accelerator.reduce(values, "sum")
        return reduced

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Scalars averaged over all processes, as floats; one transfer."""
        stacked = torch.stack([v.detach().float().reshape(()).to(self.device) for v in values.values()])
        return dict(zip(values, self.averaged(stacked).tolist(), strict=True))

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of which some may be shards as whole ones, on the main process; all have to call it."""
        if not self.sharded:
            return dict(tensors)
        # One at a time: the whole state of a sharded model need not fit on its devices.
        moved = ((name, whole(tensor).cpu()) for name, tensor in tensors.items())
        return {name: tensor for name, tensor in moved if self.is_main}

    def of_main(self, number: int) -> int:
        """The main process's number, in all of them."""
        if self.world_size == 1:
            return number
        return int(self.summed(torch.tensor(float(number if self.is_main else 0), dtype=torch.float64, device=self.device)))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in some process: what all must decide alike."""
        if self.world_size == 1:
            return flag
        return bool(self.summed(torch.tensor(float(flag), device=self.device)) > 0)

    def seed_step(self, step: int) -> None:
        """Make what a step draws (the KL bottleneck's noise) a function of (seed, step, process): no state to save."""
        torch.manual_seed((self.seed * 1_000_003 + step) * 4096 + self.rank)

    def track(self, record: Mapping[str, Any], step: int) -> None:
        """Send numbers to the trackers."""
        self.accelerator.log(dict(record), step=step)

    def start_trackers(self, run_id: str, name: str, config: Mapping[str, Any]) -> None:
        """Open the trackers; call on the main process when the run folder is there. To wandb a run that goes on is the same by its id.

        What wandb's own variables say comes first.
        """
        own = {"id": run_id, "name": name, "resume": "allow"}
        variables = {"id": "WANDB_RUN_ID", "name": "WANDB_NAME", "resume": "WANDB_RESUME"}
        wandb = {key: value for key, value in own.items() if variables[key] not in os.environ}
        self.accelerator.init_trackers("texttok", init_kwargs={"wandb": {**wandb, "config": config, "allow_val_change": True}})

    @contextlib.contextmanager
    def finishing(self, *, together: type[Exception]) -> Iterator[None]:
        """Close the trackers at the end, and leave the process group unless this process failed: under NCCL that would wait for the
        others, who may be waiting for this one, while its launcher ends them all once it has exited. Exceptions of the type `together`
        are raised by all processes alike."""
        try:
            yield
        except together:
            self._leave()
            raise
        except Exception:
            for tracker in self.accelerator.trackers:
                tracker.finish()
            raise
        self._leave()

    def _leave(self) -> None:
        # DDP goes first: as the last to know the group it would wait for gloo's threads with the interpreter's lock in its hands, while
        # one of them may be waiting for that (seen on a machine at its limit: a process of a finished run that never ended).
        self._module = None
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def wait(self) -> None:
        """Let every process arrive here."""
        self.accelerator.wait_for_everyone()
