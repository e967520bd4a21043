"""The `texttok` command: registers the commands, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from typing import Annotated, Any, NoReturn

import typer

from texttok_cli import __version__
from texttok_cli.commands.bench import bench
from texttok_cli.commands.caption import caption
from texttok_cli.commands.decode import decode
from texttok_cli.commands.encode import encode
from texttok_cli.commands.eval import eval_
from texttok_cli.commands.sample import sample
from texttok_cli.commands.train import train
from texttok_cli.errors import TextTokError, UsageError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
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
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the locale can't write; stderr escapes it anyway
        sys.stdout.reconfigure(errors="backslashreplace")
    # The hub's library would report each of its retries before the line that says what could not be downloaded.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # SIGHUP: the terminal or the connection is gone; under nohup it is ignored, and stays so.
    numbers = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None]
    before = {number: signal.signal(number, _leave) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    try:
        _run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, frame: Any) -> None:
    """Leave as Ctrl-C does, so that what is done is kept."""
    signal.signal(number, signal.SIG_IGN)  # `timeout` signals twice, and the second must not cut off the saving
    sys.exit(128 + number)


def _run() -> None:
    debug = "--debug" in sys.argv or bool(os.environ.get("TEXTTOK_DEBUG"))
    try:
        _run_app()
    except TextTokError as err:
        if debug:
            raise
        _fail(str(err), 2 if isinstance(err, UsageError) else 1)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):  # Python flushes both once more
            os.dup2(nowhere, descriptor)
        sys.exit(141)
    except OSError as err:
        if debug:
            raise
        _fail(f"{err.filename2 or err.filename or 'file system'}: {err.strerror or err}")
    except RuntimeError as err:
        line = _remedy(err)
        if debug or line is None:
            raise
        _fail(line)


def _run_app() -> None:
    """Typer and Rich make a broken pipe exit code 1, and Python meets one as late as its last flush: here both raise BrokenPipeError."""
    try:
        app()
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):
            raise end.__context__ from None
        print(end="", flush=True)
        raise


def _remedy(err: RuntimeError) -> str | None:
    """A line for an error of torch that is no bug. torch is not imported for this: what did not load it can't have raised its errors."""
    if "torch" in sys.modules:
        from texttok_cli.models.devices import out_of_memory

        if out_of_memory(err):
            return (
                "the device does not have enough free memory: use a smaller batch (--batch-size, or training.batch_size= for train), bf16,"
                " or another --device"
            )
    if missing := re.search(r"The operator '(\S+)' is not currently implemented for the MPS device", str(err)):
        return f"this torch has no {missing[1]} for mps: update torch, set PYTORCH_ENABLE_MPS_FALLBACK=1, or use --device cpu"
    inductor = sys.modules.get("torch._inductor.exc")
    if inductor is not None and isinstance(err, inductor.TritonMissing | inductor.GPUTooOldForTriton):  # of Windows; of before 2017
        reason = str(err).partition(". ")[0]
        return f"torch can't compile the model for this GPU ({reason}): set training.compile=false"
    dynamo = sys.modules.get("torch._dynamo.exc")
    if dynamo is not None and isinstance(err, dynamo.BackendCompilerFailed):  # InductorError is one
        reason = str(err.inner_exception).partition("\n")[0]
        folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "torchinductor_USER in the temporary folder")  # torch sets it
        return (
            f"torch can't compile the model ({reason}); a run that was killed may have left a broken cache: remove the folder {folder},"
            " or set training.compile=false"
        )
    return None


def _fail(message: str, code: int = 1) -> NoReturn:
    from texttok_cli.console import one_line

    print(f"texttok: {one_line(message)}", file=sys.stderr)
    sys.exit(code)
