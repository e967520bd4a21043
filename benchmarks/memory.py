"""Memory of `texttok encode` while it works through a folder: what it holds after every shard of 4,096 images (Linux).

    python benchmarks/memory.py FOLDER --model baseline-32-128 -o benchmarks/results/memory.json

Writes seconds, resident and peak memory as the kernel counts them (VmRSS and VmHWM of /proc/PID/status) for each shard when it appears.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from texttok_cli.files import write_json


def main(folder: Path, out: Annotated[Path, typer.Option("--out", "-o")], model: str = "baseline-32-128") -> None:
    """Encode FOLDER with MODEL, and look on."""
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as tokens:
        command = [sys.executable, "-m", "texttok_cli", "encode", str(folder), "--model", model, "-o", f"{tokens}/out", "--offline", "-q"]
        process, began, peak = subprocess.Popen(command), time.monotonic(), 0.0
        while process.poll() is None:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
            shards = len(list(Path(tokens).glob("out/shard-*")))
            if "VmHWM" in status and shards > (rows[-1]["shards"] if rows else 0):
                resident, peak = (int(status[key].split()[0]) / 1e3 for key in ("VmRSS", "VmHWM"))
                rows.append({"shards": shards, "seconds": round(time.monotonic() - began, 1), "rss_MB": resident, "peak_MB": peak})
            time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"texttok encode failed with exit code {process.returncode}")
    if not rows:
        raise SystemExit(f"{folder}: too few images for a shard of 4,096")
    write_json(out, {"model": model, "after_shard": rows})
    print(f"{len(rows)} shards; from {rows[0]['rss_MB']:.0f} to {rows[-1]['rss_MB']:.0f} MB, at most {rows[-1]['peak_MB']:.0f} MB")


if __name__ == "__main__":
    typer.run(main)
