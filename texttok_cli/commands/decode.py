"""`texttok decode`: token files to images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from texttok_cli.commands.options import (
    BatchSizeOption,
    DebugOption,
    DeviceOption,
    JsonOption,
    OfflineOption,
    OutOption,
    PrecisionOption,
    QuietOption,
)

if TYPE_CHECKING:
    from torch import Tensor

    from texttok_cli.inference import Tokenizer
    from texttok_cli.tokens import Tokens


def decode(
    tokens: Annotated[list[Path], typer.Argument(metavar="TOKENS...", help="Token files, or folders of token shards.")],
    out: OutOption = None,
    caption: Annotated[str | None, typer.Option(help="Decode with this text instead of the recorded one.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", metavar="M", help="Needed only if the file's model is not bundled.")] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "fp32",
    batch_size: BatchSizeOption = 32,
    offline: OfflineOption = False,
    quiet: QuietOption = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Turn tokens back into images.

    A token file carries its captions and names its model, so nothing else is needed. Without OUT, IMAGE.tok.safetensors gives
    IMAGE.rec.png beside it and a folder of shards a folder NAME.rec; OUT is a folder, or for one image a .png file.
    """
    from texttok_cli.console import emit, progress
    from texttok_cli.tokens import select

    total = sum(_count(path) for path in tokens)
    target = _Target(out, total)
    tokenizer: Tokenizer | None = None
    with progress(quiet=quiet) as bar:
        task = bar.add_task("decoding", total=total, note="")
        for path, part in _parts(tokens):
            if tokenizer is None or tokenizer.info.sha256 != part.header.model_sha256:
                tokenizer = _load(part, path, model, device, precision, offline)
            for start in range(0, len(part), batch_size):
                chosen = select(part, slice(start, start + batch_size))
                images = tokenizer.decode(chosen.z, _captions(chosen, caption))
                for image_id, image in zip(chosen.header.ids, images, strict=True):
                    target.save(path, image_id, image)
                bar.advance(task, len(images))
    written = [str(path) for path in target.written]
    emit({"images": total, "out": written if json or total == 1 else str(out or "beside the token files")}, as_json=json)


def _count(path: Path) -> int:
    from texttok_cli.tokens import load_token_header, read_index

    return sum(shard.images for shard in read_index(path).shards) if path.is_dir() else len(load_token_header(path).ids)


def _parts(tokens: list[Path]) -> Iterator[tuple[Path, Tokens]]:
    """Every token file of the inputs, with the input it came from."""
    from texttok_cli.tokens import load_tokens, read_shards

    for path in tokens:
        if path.is_dir():
            for part in read_shards(path):
                yield path, part
        else:
            yield path, load_tokens(path)


def _load(part: Tokens, path: Path, model: str | None, device: str, precision: Literal["fp32", "bf16"], offline: bool) -> Tokenizer:
    """The tokenizer that made these tokens, found by its hash or named by the person."""
    from texttok_cli.errors import TokenFileError
    from texttok_cli.inference import find_model, find_model_by_hash, load_tokenizer

    header = part.header
    file = find_model(model, offline=offline) if model else find_model_by_hash(header.model_sha256, header.model_name, path)
    tokenizer = load_tokenizer(file, device=device, precision=precision, offline=offline)
    if tokenizer.info.sha256 != header.model_sha256:
        raise TokenFileError(
            f"{path}: was made with model {header.model_name} (sha256 {header.model_sha256[:12]}...), not with"
            f" {tokenizer.info.name} ({tokenizer.info.sha256[:12]}...)"
        )
    return tokenizer


def _captions(part: Tokens, override: str | None) -> list[str] | None:
    if part.header.captions is None or override is None:
        return part.header.captions
    return [override] * len(part)


class _Target:
    """Where decoded images go: a PNG file, a folder, or beside their token files."""

    def __init__(self, out: Path | None, total: int) -> None:
        self.out, self.total = out, total
        self.written: dict[Path, Path] = {}  # image -> the token file it came from

    def save(self, source: Path, image_id: str, image: Tensor) -> None:
        """Write one uint8 image (3, S, S) as PNG, atomically. DataError rather than over another image of this run."""
        from PIL import Image

        from texttok_cli.errors import DataError
        from texttok_cli.files import atomic_path

        path = self._path(source, image_id)
        if path in self.written:
            raise DataError(f"{source}: {path} was just written from {self.written[path]}; decode them into different folders")
        with atomic_path(path) as temporary:
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(temporary, format="PNG")
        self.written[path] = source

    def _path(self, source: Path, image_id: str) -> Path:
        if self.out is not None and self.total == 1 and self.out.suffix.lower() == ".png":
            return self.out
        name = source.name.removesuffix(".safetensors").removesuffix(".tok")
        if self.out is None and not source.is_dir() and _count(source) == 1:
            return source.with_name(f"{name}.rec.png")
        # An id may be a path (of a folder's or a list's image): what is written stays inside the folder.
        parts = [part for part in PurePosixPath(image_id).parts if part not in ("/", "..")]
        folder = self.out or source.with_name(f"{name}.rec")
        return folder.joinpath(*parts).with_suffix(".png")
