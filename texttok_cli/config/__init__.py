"""The schema (recipe, constructor argument and checkpoint header at once) and the recipe loader. Free of torch."""

from typing import Literal

Precision = Literal["fp32", "bf16"]  # not in schema.py, whose pydantic the command line's options can't wait for
