"""Options that several commands share, written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from texttok_cli.config import Precision

CaptionFieldOption = Annotated[str | None, typer.Option(help="Which key of a shard's .json is the caption: measured, longest, ...")]
OutOption = Annotated[Path | None, typer.Option("--out", "-o", metavar="OUT", help="Where to write.")]
DeviceOption = Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="Where to compute; auto uses a GPU if there is one.")]
PrecisionOption = Annotated[Precision, typer.Option(help="Precision of the model.")]
BatchSizeOption = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images per forward pass.")]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Never download anything.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no messages except errors.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Results as one JSON object on stdout.")]
# In every command for its help alone: main reads it, as it must before a command is parsed.
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def given_options(context: typer.Context) -> dict[str, str]:
    """The options that stand on the command line: argument of the command -> as a person writes it."""
    sources = {parameter: context.get_parameter_source(str(parameter.name)) for parameter in context.command.params}
    return {str(parameter.name): parameter.opts[0] for parameter, source in sources.items() if source and source.name == "COMMANDLINE"}
