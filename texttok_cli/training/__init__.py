"""Training: one loop over Accelerate; a task owns what a step is."""

from __future__ import annotations

import warnings
from pathlib import Path


def train(recipe: str | Path, *overrides: str, out: str | Path, device: str = "auto", offline: bool = False) -> Path:
    """`texttok train` in Python: RECIPE and key=value as the command takes them; returns the model file, resumes what is in `out`.

    Says nothing: the numbers are in OUT/metrics.jsonl as they come. What of the data can't be used is a UserWarning each. Raises
    RecipeError, DataError, CheckpointError, BackendError and TrainingError for what a person can mend, loop.Interrupted when SIGINT or
    SIGTERM has made it save and stop.
    """
    from texttok_cli.config.loader import load_recipe
    from texttok_cli.training.report import Reporter
    from texttok_cli.training.session import run_training

    report = Reporter(lambda message: None, lambda *progress: None, warnings.warn)
    return run_training(load_recipe(str(recipe), overrides), Path(out), report, offline=offline, device=device)
