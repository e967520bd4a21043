"""The `texttok` command: start-up, exit codes, and errors as one line."""

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from one_line import one_line as one_line_of
from rich.console import Console

import texttok_cli
from texttok_cli import __version__, console
from texttok_cli import main as module
from texttok_cli.console import emit, one_line
from texttok_cli.errors import TokenFileError

Run = Callable[..., Any]


@pytest.mark.parametrize(
    "code",
    [
        "import texttok_cli",
        "import sys; sys.argv = ['texttok', '--help']; from texttok_cli.main import main; main()",
        "import sys; sys.argv = ['texttok', 'encode', '--help']; from texttok_cli.main import main; main()",
        "import sys; sys.argv = ['texttok', 'decode']; from texttok_cli.main import main; main()",
        "import sys; sys.argv = ['texttok', 'caption', '--help']; from texttok_cli.main import main; main()",
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code: str) -> None:
    report = "import atexit, sys; atexit.register(lambda: print('LOADED', *sorted({n.partition('.')[0] for n in sys.modules})))\n"
    run = subprocess.run([sys.executable, "-c", report + code], capture_output=True, text=True, check=False)
    loaded = set(run.stdout.rpartition("LOADED")[2].split())
    assert "texttok_cli" in loaded, run.stderr
    assert not loaded & {"torch", "numpy", "PIL", "transformers", "safetensors", "accelerate", "huggingface_hub", "matplotlib"}


def test_help_and_version(texttok: Run) -> None:
    run = texttok("--help")
    assert run.code == 0 and all(command in run.out for command in ("encode", "decode", "train"))
    assert texttok("-h").out == run.out
    run = texttok("--version")
    assert (run.code, run.out) == (0, f"texttok {texttok_cli.__version__}\n")


@pytest.mark.parametrize(
    "args",
    [["encod"], ["encode"], ["encode", "a.png", "--captoin", "x"], ["encode", "a.png", "--dtype", "fp8"], ["decode", "a", "-b", "0"]],
)
def test_usage_errors_end_with_2(args: list[str], texttok: Run) -> None:
    run = texttok(*args)
    assert run.code == 2 and run.out == "" and "Traceback" not in run.err and run.err


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["caption"], 2),  # no images
        (["caption", "p.png", "--captioner", "vlm"], 2),  # which one?
        (["encode", "p.png", "--caption", "a", "--no-caption"], 2),  # exclude each other
        (["encode", "none.png"], 1),
        (["decode", "p.png"], 1),  # another kind of file
        (["sample"], 2),  # of what?
        (["sample", "--class", "none", "-o", "out"], 1),  # the model says which classes there are
        (["eval", "--metric", "beauty"], 2),
        (["eval", "--metric", "psnr", "--data", "none"], 1),
        (["eval", "--samples", "p.png"], 1),
        (["bench", "latency", "--part", "none"], 2),
        (["train", "none"], 1),
    ],
)
def test_what_is_asked_for_wrongly_ends_with_2_and_what_can_not_be_done_with_1(
    args: list[str], code: int, texttok: Run, draw: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tmp_path / "p.png")
    monkeypatch.chdir(tmp_path)
    run = texttok(*args)
    assert run.code == code, run.err
    assert code == 2 or one_line_of(run.err)


def test_a_persons_mistake_is_one_line_and_debug_shows_where(texttok: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = texttok("decode", "none.tok.safetensors")
    assert (run.code, run.out, run.err) == (1, "", "texttok: none.tok.safetensors: no such file\n")
    monkeypatch.setattr(sys, "argv", ["texttok", "decode", "none.tok.safetensors", "--debug"])
    with pytest.raises(TokenFileError):  # Python shows the traceback
        module.main()
    monkeypatch.setenv("TEXTTOK_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", sys.argv[:-1])
    with pytest.raises(TokenFileError):
        module.main()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "a/b"), "texttok: a/b: Permission denied\n"),
        (IsADirectoryError(21, "Is a directory", ".x.tmp", None, "x"), "texttok: x: Is a directory\n"),
        (OSError(28, "No space left on device"), "texttok: file system: No space left on device\n"),
        (OSError("something else"), "texttok: file system: something else\n"),
    ],
)
def test_what_the_file_system_refuses_is_one_line(error: OSError, line: str, texttok: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(module, "app", fail)
    run = texttok()
    assert (run.code, run.err) == (1, line)


def test_a_hub_that_does_not_answer_is_one_line(draw: Callable[..., Path], tmp_path: Path) -> None:
    """However often its library tries again."""
    code = "import time; time.sleep = lambda seconds: None; from texttok_cli.main import main; main()"
    options = ("encode", draw(tmp_path / "img.png"), "--caption", "a", "--model", "hf://nobody/none")
    unset = ("HF_HUB_OFFLINE", "TEXTTOK_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_VERBOSITY")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1", "HF_HOME": str(tmp_path / "hub")}
    run = subprocess.run([sys.executable, "-c", code, *options], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "not in the local cache, and the hub does not answer" in one_line_of(run.stderr)


def test_a_device_without_memory_is_one_line(texttok: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    of_mps = RuntimeError("MPS backend out of memory (MPS allocated: 8.89 GiB, max allowed: 9.07 GiB). Tried to allocate 6.25 MiB")
    errors: list[RuntimeError] = [of_mps, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), RuntimeError("a bug")]

    def fail() -> None:
        raise errors[0]

    monkeypatch.setattr(module, "app", fail)
    for _ in range(2):
        run = texttok()
        assert run.code == 1 and run.err.count("\n") == 1 and "--batch-size" in run.err
        last = errors.pop(0)
    errors.insert(0, last)
    monkeypatch.setattr(sys, "argv", ["texttok", "--debug"])
    with pytest.raises(torch.OutOfMemoryError):
        module.main()
    errors.pop(0)
    with pytest.raises(RuntimeError, match="a bug"):
        module.main()


def test_a_broken_compile_cache_is_one_line(texttok: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.exc import InductorError

    def fail() -> None:
        raise InductorError(OSError("/tmp/torchinductor_me/a.so: file too short\nmore"), None)

    monkeypatch.setattr(module, "app", fail)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/torchinductor_me")
    run = texttok()
    assert run.code == 1 and run.err.count("\n") == 1 and "more" not in run.err
    assert "(/tmp/torchinductor_me/a.so: file too short)" in run.err
    assert "remove the folder /tmp/torchinductor_me, or set training.compile=false" in run.err
    monkeypatch.setenv("TEXTTOK_DEBUG", "1")
    with pytest.raises(InductorError):
        module.main()


def test_what_torch_lacks_on_mps_is_one_line(texttok: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise NotImplementedError(
            "The operator 'aten::_upsample_bilinear2d_aa_backward.grad_input' is not currently implemented for the MPS device. If you"
            " want this op to be considered for addition please comment on https://github.com/pytorch/pytorch/issues/141287"
        )

    monkeypatch.setattr(module, "app", fail)
    run = texttok()
    lacks = "texttok: this torch has no aten::_upsample_bilinear2d_aa_backward.grad_input for mps"
    assert run.code == 1 and run.err == f"{lacks}: update torch, set PYTORCH_ENABLE_MPS_FALLBACK=1, or use --device cpu\n"
    monkeypatch.setattr(sys, "argv", ["texttok", "--debug"])
    with pytest.raises(NotImplementedError):
        module.main()


def test_a_gpu_without_triton_is_one_line(texttok: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As any of Windows is, where recipes that compile would otherwise end in a traceback."""
    from torch._inductor.exc import TritonMissing

    def fail() -> None:
        raise TritonMissing(None)

    monkeypatch.setattr(module, "app", fail)
    run = texttok()
    line = "texttok: torch can't compile the model for this GPU (Cannot find a working triton installation): set training.compile=false\n"
    assert run.code == 1 and run.err == line


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(module, "app", fail)
    with pytest.raises(ZeroDivisionError):
        module.main()


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="rights don't bind the superuser")
def test_a_read_only_folder_is_one_line(texttok: Run, bundled: Path, draw: Callable[..., Path], tmp_path: Path) -> None:
    image = draw(tmp_path / "in" / "img.png")
    image.parent.chmod(0o500)
    run = texttok("encode", image, "--caption", "a", "--model", "text", "--device", "cpu", "--quiet")
    image.parent.chmod(0o700)
    assert run.code == 1 and run.err.count("\n") == 1 and "Permission denied" in run.err


def test_a_full_disk_is_one_line(texttok: Run, bundled: Path, draw: Callable[..., Path], tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    image = draw(tmp_path / "img.png")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        run = texttok("encode", image, "--caption", "a", "--model", "text", "--device", "cpu", "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.code == 1 and run.err.count("\n") == 1
    assert run.err.startswith(f"texttok: {tmp_path / 'img.tok.safetensors'}: ") and "too large" in run.err
    assert [path.name for path in tmp_path.iterdir()] == ["img.png"]


@pytest.mark.parametrize("option", ["--version", "--help"])  # by print, and by Rich
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_away_ends_quietly(option: str, unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = "from texttok_cli.main import main; main()"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    run = subprocess.run([sys.executable, "-c", code, option], stdout=writer, stderr=subprocess.PIPE, env=environment, check=False)
    os.close(writer)
    assert (run.returncode, run.stderr) == (141, b"")


COMMAND = shutil.which("texttok", path=Path(sys.executable).parent)


@pytest.mark.skipif(COMMAND is None, reason="texttok is not installed in this environment")
def test_the_installed_command_works_away_from_the_repository(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run([str(COMMAND), "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, f"texttok {__version__}\n", "")


@pytest.mark.skipif(COMMAND is None, reason="texttok is not installed in this environment")
def test_a_shell_completes_options() -> None:
    asked = {"_TEXTTOK_COMPLETE": "complete_bash", "COMP_WORDS": "texttok encode --capt", "COMP_CWORD": "2"}
    run = subprocess.run([str(COMMAND)], env=os.environ | asked, capture_output=True, text=True, check=False)
    assert (run.stdout.split(), run.stderr) == (["--caption", "--captions", "--caption-field"], "")


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process without asking it")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_to_end_lets_what_is_done_be_kept(name: str, code: int) -> None:
    script = f"""
import signal
from texttok_cli import main

def work():
    try:
        signal.raise_signal(signal.{name})
    finally:
        signal.raise_signal(signal.{name})  # as `timeout` sends two
        print("kept")

signal.signal(signal.{name}, signal.SIG_DFL)
main.app = work
main.main()
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (code, "kept\n", "")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGHUP")
def test_under_nohup_a_terminal_that_closes_ends_nothing() -> None:
    script = """
import signal
from texttok_cli import main

signal.signal(signal.SIGHUP, signal.SIG_IGN)
main.app = lambda: (signal.raise_signal(signal.SIGHUP), print("goes on"))
main.main()
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "goes on\n", "")


def test_a_name_that_the_locale_can_t_write_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1", write_through=True))
    monkeypatch.setattr(module, "app", lambda: emit({"out": "\u00fc\u732b"}, as_json=False))
    module.main()
    assert written.getvalue() == b"out  \xfc\\u732b\n"


def test_messages_are_one_line_whatever_they_hold() -> None:
    assert one_line("caf\u00e9 \u732b a\nb\x1b[31m\u2028c\\n") == "caf\u00e9 \u732b a\\nb\\x1b[31m\\u2028c\\n"


def test_results_and_tables_move_no_cursor_and_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Names of models, classes and samples come out of files, which may be anybody's."""
    emit({"model": "a\x1b]0;title\x07", "files": ["b\x1b[2J"]}, as_json=False)
    console.print_columns([["", "c\nd"], ["e\x1b[31m", "[red]:cat:[/red]"]])
    console.say(":cat:.png [red]")
    out, err = capsys.readouterr()
    assert out == "model  a\\x1b]0;title\\x07\nfiles  b\\x1b[2J\n           c\\nd\ne\\x1b[31m  [red]:cat:[/red]\n"
    assert err == ":cat:.png [red]\n"


@pytest.mark.parametrize("width", [80, 200])
def test_a_narrow_terminal_shortens_the_bar_and_the_note_but_no_number(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(console, "stderr", Console(file=written, width=width, soft_wrap=True, highlight=False))
    with console.progress(quiet=False) as bar:
        bar.add_task("embedding captions", total=1510, completed=1510, note="")
        bar.add_task("training", total=10_000, completed=10_000, note="l2 0.09968  perceptual 0.1234  lr_scale 0.2")
    above, below = written.getvalue().splitlines()
    assert "1510/1510" in above and "10000/10000" in below and "left" in below and below.count("0:00:00") == 1
    assert ("l2 0.09968  perceptual 0.1234  lr_scale 0.2" in below) == (width == 200) and "l2 0." in below


def test_bars_that_never_were_leave_no_empty_line(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(console, "stderr", Console(file=written, width=80))
    with console.progress(quiet=False):
        pass
    assert written.getvalue() == ""
