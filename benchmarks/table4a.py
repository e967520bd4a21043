"""Table 4a at small scale: what a tokenizer is told of an image, everything else alike; PSNR on held-out images.

    python benchmarks/table4a.py --train SHARD... --val SHARD... [-o benchmarks/results/table4a.json] [--keys key=value ...]

Trains `tiny/texttok-32-128` once for each kind of condition, on the same images in the same order, each into its folder of runs/table4a:
run it again after an interruption. Any key of the recipe can be changed for all of them; where runs of other keys or images
are, it is refused: move runs/table4a away. The classifier's captions are written first, by `texttok caption`, for the training and the
held-out images.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

RUNS = Path("runs/table4a")
CAPTIONS = RUNS / "classifier.captions.jsonl"
CONDITIONS = {
    "none": ["model.condition={source: none}", "training.text_cache=false"],
    "class embedding": ["model.condition={source: class_embedding, num_classes: 207}", "training.text_cache=false"],
    "class text": ["model.condition.source=class_text"],
    "measured captions (class text and measured words)": ["data.caption_field=measured"],
    "classifier captions (`texttok caption`)": [f"data.captions={CAPTIONS}"],
}


def main() -> None:
    """Train, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", nargs="+", required=True)
    parser.add_argument("--val", nargs="+", required=True)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--keys", nargs="*", default=[], help="key=value of the recipe")
    arguments = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    texttok("caption", *arguments.train, *arguments.val, "-o", CAPTIONS, "--device", "cpu")
    rows = {}
    for name, changes in CONDITIONS.items():
        folder = RUNS / name.split(" (")[0].replace(" ", "-")
        data = [f"data.train={json.dumps(arguments.train)}", f"data.val={json.dumps(arguments.val)}", "training.val_images=100000"]
        texttok("train", "tiny/texttok-32-128", *data, *changes, *arguments.keys, "--out", folder)  # refuses a folder of another recipe
        log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in log if "val_psnr" in line][-1]
        images = [line["images"] for line in log if "images" in line][-1]
        rows[name] = {"steps": last["step"], "images": images, "val_psnr": last["val_psnr"], "val_ssim": last["val_ssim"]}
        print(f"{name}: {last['val_psnr']:.2f} dB after {images:,} images")
    if arguments.out:
        record = {"train": names(arguments.train), "val": names(arguments.val), "keys": arguments.keys, "conditions": rows}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def names(paths: list[str]) -> list[str]:
    """The files' names, without this machine's folders."""
    return [Path(path).name for path in paths]


def texttok(*arguments: object) -> None:
    """Run a command of the toolkit; its failure ends this script."""
    if subprocess.call([sys.executable, "-m", "texttok_cli", *map(str, arguments)]):
        raise SystemExit(f"texttok {arguments[0]} failed")


if __name__ == "__main__":
    main()
