"""Images and what is known of them: sources, pixels, batches."""

from texttok_cli.data.images import center_crop, load_image, normalize, save_png, save_pngs, to_image, to_rgb, to_tensor, to_uint8
from texttok_cli.data.items import Dataset, Item, Skipped, evenly_spaced
from texttok_cli.data.loader import Batch, EvalBatch, TrainLoader, eval_batches
from texttok_cli.data.sources import SAMPLE_SET, open_dataset

__all__ = [
    "SAMPLE_SET",
    "Batch",
    "Dataset",
    "EvalBatch",
    "Item",
    "Skipped",
    "TrainLoader",
    "center_crop",
    "eval_batches",
    "evenly_spaced",
    "load_image",
    "normalize",
    "open_dataset",
    "save_png",
    "save_pngs",
    "to_image",
    "to_rgb",
    "to_tensor",
    "to_uint8",
]
