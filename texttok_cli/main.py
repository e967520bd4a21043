"""The `texttok` command: registers the commands, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer

from texttok_cli import __version__
from texttok_cli.commands.bench import bench
from texttok_cli.commands.caption import caption
from texttok_cli.commands.decode import decode
from texttok_cli.commands.encode import encode
from texttok_cli.commands.eval import eval_
from texttok_cli.commands.sample import sample
from texttok_cli.commands.train import train
from texttok_cli.errors import TextTokError

app = typer.Typer(
    help="Language-guided image tokenization: images and their captions to a few tokens and back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(caption)
app.command()(encode)
app.command()(decode)
app.command()(train)
app.command()(sample)
app.command("eval")(eval_)
app.add_typer(bench, name="bench")


def _version(value: bool) -> None:
    if value:
        print(f"texttok {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Language-guided image tokenization: images and their captions to a few tokens and back."""


def main() -> None:
    """Run the command line; a person's mistake becomes one line on stderr and exit code 1, 2 for a usage error."""
    debug = "--debug" in sys.argv or bool(os.environ.get("TEXTTOK_DEBUG"))
    try:
        app()
    except TextTokError as err:
        if debug:
            raise
        _fail(str(err))
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as err:
        if debug:
            raise
        _fail(f"{err.filename2 or err.filename or 'file system'}: {err.strerror or err}")
    except RuntimeError as err:
        if debug or not _is_out_of_memory(err):
            raise
        _fail(
            "the GPU has not enough free memory: take a smaller batch (--batch-size; of train training.batch_size=), bf16, or --device cpu"
        )


def _is_out_of_memory(err: RuntimeError) -> bool:
    """Whether a GPU's memory ran out. torch is not imported for this: what did not load it can't have raised its errors."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(err, torch.OutOfMemoryError)


def _fail(message: str) -> NoReturn:
    from texttok_cli.console import one_line

    print(f"texttok: {one_line(message)}", file=sys.stderr)
    sys.exit(1)
