"""The schema (recipe, constructor argument and checkpoint header at once) and the recipe loader. Free of torch."""

from typing import Literal

# Not in schema.py, whose pydantic the command line's options can't wait for.
Precision = Literal["fp32", "bf16"]
Labels = Literal["equal", "proportional", "random"]  # how classes are spread over samples: see Generator.labels
