"""Captions a second of each captioner, and how often the offline classifier is right, into benchmarks/results/captions.json.

python benchmarks/captions.py DATA/photos128-val-0000.tar
python benchmarks/captions.py SHARD... --captioner vlm --model HuggingFaceTB/SmolVLM-Instruct     # others, with their weights
"""

from __future__ import annotations

import argparse
import platform
import time
from collections import Counter
from pathlib import Path
from typing import get_args

import torch
from PIL import Image

from texttok_cli import load_captioner, open_dataset
from texttok_cli.captioners.attributes import Attributes, measure, parse
from texttok_cli.captioners.base import CaptionFailed
from texttok_cli.captioners.classifier import Classifier
from texttok_cli.captioners.load import CaptionerName
from texttok_cli.captioners.run import caption_dataset
from texttok_cli.data import Dataset, load_image
from texttok_cli.files import write_json

RESULT = Path(__file__).parent / "results" / "captions.json"
OFFLINE: list[CaptionerName] = ["classifier", "class-text", "class-measured", "sidecar"]

# Classes of photos128 that ImageNet has too, with the labels (torchvision's spelling) that count as right. Only the same thing under
# another name, or its kinds (a crab is a Dungeness crab or ...), counts: a kangaroo is no wallaby, so it is not here.
SHARED: dict[str, tuple[str, ...]] = {
    "clothing/hoodie": ("sweatshirt",),
    "clothing/shoes": ("running shoe", "Loafer", "sandal", "clog", "cowboy boot"),
    "clothing/skirt": ("miniskirt", "overskirt", "hoopskirt"),
    "clothing/t-shirt": ("jersey",),  # the synset is "jersey, T-shirt, tee shirt"
    "flower/daisy": ("daisy",),
    "grocery/banana": ("banana",),
    "grocery/brown cap mushroom": ("mushroom", "agaric"),
    "grocery/cabbage": ("head cabbage",),
    "grocery/cucumber": ("cucumber",),
    "grocery/granny smith": ("Granny Smith",),
    "grocery/green bell pepper": ("bell pepper",),
    "grocery/lemon": ("lemon",),
    "grocery/orange": ("orange",),
    "grocery/orange bell pepper": ("bell pepper",),
    "grocery/pineapple": ("pineapple",),
    "grocery/pomegranate": ("pomegranate",),
    "grocery/red bell pepper": ("bell pepper",),
    "grocery/yellow bell pepper": ("bell pepper",),
    "grocery/zucchini": ("zucchini",),
    "object/accordion": ("accordion",),
    "object/airplane": ("airliner", "warplane"),
    "object/ant": ("ant",),
    "object/barrel": ("barrel", "rain barrel"),
    "object/beaver": ("beaver",),
    "object/binocular": ("binoculars",),
    "object/camera": ("Polaroid camera", "reflex camera"),
    "object/cannon": ("cannon",),
    "object/car seen from the side": (
        *("beach wagon", "cab", "convertible", "jeep", "limousine", "minivan", "Model T", "pickup", "racer", "sports car"),
    ),
    "object/cellphone": ("cellular telephone",),
    "object/cougar body": ("cougar",),
    "object/cougar face": ("cougar",),
    "object/crab": ("Dungeness crab", "rock crab", "fiddler crab", "king crab"),
    "object/crayfish": ("crayfish",),
    "object/crocodile": ("African crocodile",),
    "object/crocodile head": ("African crocodile",),
    "object/dalmatian": ("dalmatian",),
    "object/dragonfly": ("dragonfly",),
    "object/electric guitar": ("electric guitar",),
    "object/elephant": ("Indian elephant", "African elephant", "tusker"),
    "object/flamingo": ("flamingo",),
    "object/flamingo head": ("flamingo",),
    "object/grand piano": ("grand piano",),
    "object/laptop": ("laptop", "notebook"),
    "object/leopard": ("leopard",),
    "object/llama": ("llama",),
    "object/nautilus": ("chambered nautilus",),
    "object/pizza": ("pizza",),
    "object/platypus": ("platypus",),
    "object/revolver": ("revolver",),
    "object/rooster": ("cock",),
    "object/saxophone": ("sax",),
    "object/schooner": ("schooner",),
    "object/scorpion": ("scorpion",),
    "object/soccer ball": ("soccer ball",),
    "object/starfish": ("starfish",),
    "object/stop sign": ("street sign",),
    "object/strawberry": ("strawberry",),
    "object/tick": ("tick",),
    "object/trilobite": ("trilobite",),
    "object/umbrella": ("umbrella",),
}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", help="photos128-val")
    parser.add_argument("--captioner", action="append", choices=get_args(CaptionerName), help="instead of the offline ones; repeatable")
    parser.add_argument("--model")
    parser.add_argument("--endpoint")
    parser.add_argument("--images", type=int, default=256, help="captions a captioner's speed is measured on")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--note", default="", help="what else is to be known of the run, such as a shared machine")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    dataset = open_dataset(args.shards, caption_field="measured")
    result = {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "device": args.device},
        "torch": torch.__version__,
        "note": args.note,
        "data": {"shards": [Path(name).name for name in args.shards], "images": len(dataset)},
        "classifier": classifier_hits(dataset, args.device, args.batch_size),
        "attributes_like_the_shards": attribute_agreement(dataset),
        "captions_per_second": {name: speed(name, dataset, args) for name in args.captioner or OFFLINE},
    }
    write_json(args.out, result)
    for key in ("classifier", "attributes_like_the_shards", "captions_per_second"):
        print(key, {name: value for name, value in result[key].items() if name not in ("classes", "labels")})


def classifier_hits(dataset: Dataset, device: str, batch_size: int) -> dict[str, object]:
    """Of the images of classes that both label sets have: how often a right label is the first, and among the first five."""
    classifier = Classifier(device=device)
    indices = [i for i, item in enumerate(dataset.items) if item.class_name in SHARED]
    total, first, five = Counter[str](), Counter[str](), Counter[str]()
    for start in range(0, len(indices), batch_size):
        chosen = indices[start : start + batch_size]
        best = classifier.top([image_of(dataset, i) for i in chosen], 5)
        for i, labels in zip(chosen, best, strict=True):
            name = str(dataset.items[i].class_name)
            hits = [label in SHARED[name] for label, _ in labels]
            total[name] += 1
            first[name] += hits[0]
            five[name] += any(hits)
    n = total.total()
    per_class = {name: {"n": total[name], "top1": first[name], "top5": five[name]} for name in sorted(total)}
    scores = {"n": n, "num_classes": len(total), "top1": first.total() / n, "top5": five.total() / n}
    return {"model": classifier.model, **scores, "classes": per_class, "labels": SHARED}


def attribute_agreement(dataset: Dataset) -> dict[str, float]:
    """How often our measured words are those of the shards' `measured` captions, attribute by attribute."""
    same, n = Counter[str](), 0
    for i, item in enumerate(dataset.items):
        known = parse(item.caption or "")
        if known is not None:
            n += 1
            ours = measure(image_of(dataset, i))
            same.update(field for field, a, b in zip(Attributes._fields, ours, known[1], strict=True) if a == b)
            same["main colour"] += ours.middle.split(" and ")[0] == known[1].middle.split(" and ")[0]
    return {"n": n, **{field: same[field] / n for field in ("main colour", *Attributes._fields)}}


def speed(name: CaptionerName, dataset: Dataset, args: argparse.Namespace) -> dict[str, float]:
    """Captions a second, images read and decoded, after one batch to warm up."""
    captioner = load_captioner(name, model=args.model, endpoint=args.endpoint, device=args.device)
    indices = list(range(min(args.images, len(dataset))))
    list(caption_dataset(captioner, dataset, indices[: args.batch_size], batch_size=args.batch_size))
    begin = time.perf_counter()
    outcomes = [outcome for part in caption_dataset(captioner, dataset, indices, batch_size=args.batch_size) for _, outcome, _ in part]
    seconds = time.perf_counter() - begin
    failed = sum(isinstance(outcome, CaptionFailed) for outcome in outcomes)
    return {"captions_per_second": (len(outcomes) - failed) / seconds, "n": len(outcomes), "failed": failed, "batch_size": args.batch_size}


def image_of(dataset: Dataset, index: int) -> Image.Image:
    """An RGB image."""
    return load_image(dataset.read(index), name=dataset.items[index].id)


if __name__ == "__main__":
    main()
