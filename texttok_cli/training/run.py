"""The run folder: resolved recipe, metrics.jsonl, and the training state an interrupted run goes on from.

OUT/recipe.yaml              what is being trained; another recipe in the same folder is refused
OUT/metrics.jsonl            one JSON object a line
OUT/state/step-00000500/     safetensors + JSON, written under another name and renamed when whole
OUT/grids/step-00000500.png  validation images above their reconstructions, or above samples of the same conditions
OUT/model.safetensors        the EMA weights: what `--model` of the other commands takes
OUT/models/step-00050000.safetensors   the same of earlier steps, if the recipe asks for them
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from texttok_cli import __version__
from texttok_cli.config.loader import dump_recipe
from texttok_cli.config.plain_yaml import parse_yaml
from texttok_cli.config.recipe import Recipe
from texttok_cli.config.schema import Config
from texttok_cli.data import save_png, to_image
from texttok_cli.errors import CheckpointError, RecipeError, TrainingError
from texttok_cli.files import load_safetensors, save_safetensors, write_text
from texttok_cli.training.sharding import split_like

if TYPE_CHECKING:
    from texttok_cli.training.engine import Engine
    from texttok_cli.training.report import Reporter


# How a run is carried out and watched, not what it trains: these may have other values when it goes on. (`accumulate`, `checkpointing`
# and `compile` change rounding, `accumulate` also which noise a KL bottleneck draws.)
HANDLING = {
    "data.cache",
    "data.val",
    "data.workers",
    "training.accumulate",
    "training.checkpointing",
    "training.compile",
    "training.export_every",
    "training.grid_images",
    "training.log_every",
    "training.save_every",
    "training.text_cache",
    "training.trackers",
    "training.val_every",
    "training.val_images",
    "training.val_latents",
    "training.val_rfid",
}
SAMPLING = "sampling"  # the section of a generator that no training depends on


class RunFolder:
    """Where one run keeps everything; made on the main process, read by all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.samples = 0  # training examples, known when the data is open: a state goes on with as many
        self.model_path = path / "model.safetensors"
        self.metrics_path = path / "metrics.jsonl"
        self.state_path = path / "state"

    @property
    def finished(self) -> bool:
        """Whether the run came to its end: the model is the last that it writes."""
        return self.model_path.exists()

    @property
    def newest_step(self) -> int:
        """The optimizer step of the newest state; 0 in a new folder."""
        states = self._states()
        return int(states[-1].name.removeprefix("step-")) if states else 0

    def model_at(self, step: int) -> Path:
        """The model file of an earlier step."""
        return self.path / "models" / f"step-{step:08d}.safetensors"

    def open(self, recipe: Recipe) -> list[str]:
        """Create the folder, or go on in it; which keys of HANDLING have another value from here on.

        RecipeError if something was trained in it by another recipe.
        """
        file = self.path / "recipe.yaml"
        if file.exists() and (self.metrics_path.exists() or self._states() or self.finished):
            try:  # by the schema: a field that is new since then has the value that it had before there was one
                said = parse_yaml(file.read_text(encoding="utf-8"))
                old = type(recipe).model_validate(said)
            except ValueError:  # no YAML, or not of the schema
                raise RecipeError(
                    f"{file}: is not a recipe of this task and version, so its run can't be resumed; choose another --out"
                ) from None
            keys = _differing_keys(old.model_dump(mode="json"), recipe.model_dump(mode="json"))
            if SAMPLING not in said["model"]:  # the run is older than the section
                keys = [key for key in keys if not key.startswith(f"model.{SAMPLING}.")]
            if others := [key for key in keys if key not in HANDLING]:
                raise RecipeError(f"{self.path}: holds a run of another recipe (differs in {', '.join(others)}); choose another --out")
            if keys and not self.finished:
                write_text(file, dump_recipe(recipe))
            return keys
        write_text(file, dump_recipe(recipe))
        return []

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with self.metrics_path.open("a", encoding="utf-8") as out:
            out.write(json.dumps({key: _json_number(value) for key, value in record.items()}, allow_nan=False) + "\n")

    def rewind_log(self, step: int) -> None:
        """Drop lines after `step`: the run goes on from there and writes them again."""
        if not self.metrics_path.exists():
            return
        lines = self._log_lines()
        write_text(self.metrics_path, "".join(line + "\n" for line in lines if _step_of(line) <= step))

    def validated(self, step: int) -> bool:
        """Whether the log has validation values of this step."""
        if not self.metrics_path.exists():
            return False
        return any(_step_of(line) == step and any(key.startswith("val_") for key in json.loads(line)) for line in self._log_lines())

    def _log_lines(self) -> list[str]:
        return self.metrics_path.read_text(encoding="utf-8", errors="replace").splitlines()

    def save_grid(self, step: int, above: Tensor, below: Tensor) -> None:
        """Draw two rows of images (B, 3, S, S) uint8, as OUT/grids/step-00000500.png."""
        rows = [torch.cat(list(row), dim=2) for row in (above, below)]  # (3, S, B*S) each
        save_png(self.path / "grids" / f"step-{step:08d}.png", to_image(torch.cat(rows, dim=1)))

    def save_state(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the state of optimizer step `step` and remove older ones; a kill at any moment leaves a whole one."""
        folder = self.state_path / f"step-{step:08d}"
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            save_safetensors(partial / "state.safetensors", tensors, {"texttok_state": 1, "step": step, "samples": self.samples})
        except BaseException:  # a full disk: give back what was taken of it
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
        for old in self._states():
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)  # some process may still have it open, which network file systems mind

    def load_state(self, optimizers: list[Optimizer]) -> tuple[int, dict[str, Tensor]]:
        """(step, tensors) of the newest state, with the optimizers filled; (0, {}) in a new folder.

        Raises TrainingError if it was trained on another number of examples: their order would be another.
        """
        states = self._states()
        if not states:
            return 0, {}
        meta, tensors = load_safetensors(states[-1] / "state.safetensors", error=CheckpointError)
        damaged = CheckpointError(f"{states[-1]}: is damaged; remove it, or the whole {self.path} to start again")
        samples = meta.get("samples", self.samples)
        if not isinstance(samples, int) or meta.get("step") != self.newest_step:
            raise damaged
        if samples != self.samples:
            raise TrainingError(
                f"{self.path}: was trained on {samples:,} examples, now there are {self.samples:,}: bring back the same data"
            )
        try:
            for i, optimizer in enumerate(optimizers):
                _restore_optimizer(optimizer, i, tensors)
        except (KeyError, IndexError, TypeError, ValueError):
            raise damaged from None
        return self.newest_step, {k: v for k, v in tensors.items() if not k.startswith("optimizer.")}

    def tracker_id(self) -> str:
        """By what trackers know this run: another when it begins again, without a state."""
        file = self.state_path / "tracker-id"
        if not self.newest_step or not file.is_file():
            write_text(file, uuid4().hex)
        return file.read_text(encoding="utf-8").strip()

    def _states(self) -> list[Path]:
        return sorted(p for p in self.state_path.glob("step-*") if p.name.removeprefix("step-").isdecimal())  # not .partial


def begin(run: RunFolder, recipe: Recipe, engine: Engine, report: Reporter) -> bool:
    """Open the run folder in all processes; whether there is anything left to train. RecipeError as `RunFolder.open`."""
    changed = run.open(recipe) if engine.is_main else []
    engine.wait()
    if engine.of_main(run.finished):
        report.message(f"{run.path}: is finished")
        return False
    if changed:
        report.message(f"{run.path}: goes on with another {', '.join(changed)}")
    if engine.is_main and recipe.training.trackers:
        engine.start_trackers(run.tracker_id(), run.path.resolve().name, recipe.model_dump(mode="json"))
    return True


def check_start(name: str, theirs: Config, ours: Config, *, same_tokenizer: bool = True) -> None:
    """RecipeError unless the model that `training.start_from` names is the recipe's, of the tokenizer that its latents are of."""
    said, asked = theirs.model_dump(), ours.model_dump()
    keys = [key for key in _differing_keys(said, asked) if key.partition(".")[0] != SAMPLING]
    differs = keys or ([] if same_tokenizer else ["its tokenizer"])
    if differs:
        raise RecipeError(f"training.start_from: {name} is another model than the recipe's (differs in {', '.join(differs)})")


def history(recipe: Recipe, step: int, started_from: str | None) -> dict[str, str | int]:
    """What a model file of this step says of its training; `started_from` is the sha256 of the model whose weights the run began with."""
    said: dict[str, str | int] = {
        "reproduces": recipe.reproduces,
        "steps": step,
        "images_seen": step * recipe.training.batch_size,
        "texttok": __version__,
    }
    return said | ({} if started_from is None else {"started_from_sha256": started_from})


def optimizer_tensors(optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Flat name -> tensor; groups are not saved: the recipe rebuilds them and the rate is a function of the step."""
    return {
        f"optimizer.{i}.{parameter}.{name}": torch.as_tensor(value)
        for i, optimizer in enumerate(optimizers)
        for parameter, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def _restore_optimizer(optimizer: Optimizer, index: int, tensors: Mapping[str, Tensor]) -> None:
    prefix = f"optimizer.{index}."
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(prefix):
            parameter, _, name = key.removeprefix(prefix).partition(".")
            state.setdefault(int(parameter), {})[name] = _laid_out_like(parameters[int(parameter)], value)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A parameter's moment as the optimizer had it: a shard, or in the parameter's own memory format, which fused optimizers need."""
    value = split_like(value, parameter)
    if isinstance(value, DTensor):
        return value
    if value.shape != parameter.shape:
        return value.clone()  # a count of steps, as it was read, keeps the whole file mapped: its disk space, on Windows the file itself
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def _json_number(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line).get("step", 0))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):  # the last line of a killed run, or damaged
        return float("inf")


def _differing_keys(a: Any, b: Any, prefix: str = "") -> list[str]:
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [] if a == b else [prefix]
    keys = list(dict.fromkeys([*a, *b]))
    return [key for k in keys for key in _differing_keys(a.get(k), b.get(k), f"{prefix}.{k}" if prefix else str(k))]
