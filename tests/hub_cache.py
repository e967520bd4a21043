"""The local cache of the Hugging Face hub's library."""

import shutil
from pathlib import Path


def put(cache: Path, repo: str, name: str, file: Path) -> Path:
    """Put a file there as if it had been downloaded."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    path = folder / "snapshots" / ("0" * 40) / name
    for parent in (path.parent, folder / "refs"):
        parent.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("0" * 40)
    shutil.copy(file, path)
    return path
