"""The schema (recipe, constructor argument and checkpoint header at once) and the recipe loader. Free of torch."""

from typing import Literal

# Not in schema.py, whose pydantic the command line's options can't wait for.
Precision = Literal["fp32", "bf16"]
Resize = Literal["tf1-bilinear", "clean", "legacy-pytorch"]  # how images reach the FID network's 299 pixels: see metrics/resize.py
LatentDtype = Literal["fp16", "fp32", "int8"]  # how latents are stored
DEFAULT_MODEL = "texttok-32-128"  # a bundled tokenizer
Labels = Literal["equal", "proportional", "random"]  # how classes are spread over samples: see Generator.labels
