"""`texttok train`: a recipe to a model file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from texttok_cli.commands.options import DebugOption, DeviceOption, JsonOption, OfflineOption, OutOption, QuietOption


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of one that comes with texttok.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. training.batch_size=64")] = None,
    out: OutOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe and its model's parameters, FLOPs and state; train nothing.")
    ] = False,
    device: DeviceOption = "auto",
    offline: OfflineOption = False,
    quiet: QuietOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a tokenizer or a generator as a recipe says. Rerun the same command to resume an interrupted run.

    A tokenizer is trained on images, a generator on folders of tokens that `texttok encode DATASET -o FOLDER` wrote.
    """
    from texttok_cli.config.loader import dump_recipe, load_recipe
    from texttok_cli.console import emit, progress, say, stdout

    resolved = load_recipe(recipe, overrides or [])
    if dry_run:
        from texttok_cli.training.plan import plan

        if not json:
            stdout.print(dump_recipe(resolved), markup=False)
        emit(plan(resolved), as_json=json)
        return
    from texttok_cli.metrics.processes import Processes
    from texttok_cli.models.devices import pick_device
    from texttok_cli.training.loop import Interrupted
    from texttok_cli.training.report import Reporter
    from texttok_cli.training.session import run_training

    if device != "auto":
        pick_device(device)  # says so if this machine has none
    speaks = Processes().rank == 0
    folder = out or Path("runs") / Path(recipe).stem
    with progress(quiet=quiet or not speaks) as bar:
        tasks: dict[str, int] = {}

        def on_progress(what: str, done: int, total: int, values: dict[str, float]) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total, note="")
            shown = ("l2", "perceptual", "mse", "vlb", "lr_scale")
            note = {"note": "  ".join(f"{k} {v:.4g}" for k, v in values.items() if k in shown)} if values else {}
            bar.update(tasks[what], completed=done, **note)  # type: ignore[arg-type]

        report = Reporter(say if speaks and not quiet else lambda _: None, on_progress, say)
        try:
            model = run_training(resolved, folder, report, offline=offline, device=device)
        except Interrupted as stop:
            if speaks:
                say(f"texttok: {stop}")
            raise typer.Exit(130) from None
    if speaks:
        emit({"model": str(model), "run": str(folder), "skipped": len(report.unusable)}, as_json=json)
