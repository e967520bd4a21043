"""`texttok decode`: token files to images."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

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
from texttok_cli.config import Precision
from texttok_cli.errors import DataError, TokenFileError, UsageError

if TYPE_CHECKING:
    from texttok_cli.inference import Tokenizer
    from texttok_cli.tokens import Tokens

RESERVED = re.compile(r"\A(con|prn|aux|nul|(?:com|lpt)[0-9¹²³])(?= *(?:\.|\Z))", re.IGNORECASE)  # Windows has no file of such a name


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
    IMAGE.rec.png beside it, and a folder of shards gives a folder NAME.rec; OUT is a folder, or for one image a .png file. Existing
    files of these names are replaced, but never the very image that was encoded.
    """
    from texttok_cli.console import emit, progress, say
    from texttok_cli.data import save_pngs
    from texttok_cli.tokens import select

    names = {path: _names(path) for path in tokens}
    target = _Target(out, names)
    for path in filter(Path.is_dir, tokens):
        _say_if_cut_off(path)
    tokenizers: dict[str, Tokenizer] = {}  # by the sha256 of the model whose tokens they decode
    with progress(quiet=quiet) as bar:
        task = bar.add_task("decoding", total=target.total, note="")
        for path, part in _parts(names):
            made_by = part.header.model_sha256
            if made_by not in tokenizers:
                tokenizers[made_by] = _load(part, path, model, device, precision, offline)
                _check(tokenizers[made_by], part, path)
                if made_by != tokenizers[made_by].info.sha256 and not quiet:  # often of the same name; its images look different
                    say(f"tokens of model {made_by[:12]}... are decoded by {tokenizers[made_by].info.name}, which was trained on from it")
            tokenizer = tokenizers[made_by]
            _check(tokenizer, part, path)
            for start in range(0, len(part), batch_size):
                chosen = select(part, range(start, min(start + batch_size, len(part))))
                images = tokenizer.decode_tokens(chosen, None if caption is None else [caption] * len(chosen))
                save_pngs([target.next(path, sha256) for sha256 in chosen.header.input_sha256], images)
                bar.advance(task, len(images))
    written = [str(path) for path in target.paths]
    emit({"images": len(written), "out": written if json or len(written) == 1 else str(out or "beside the tokens")}, as_json=json)


def _names(path: Path) -> list[str]:
    """Of all images of an input; no token is read."""
    from texttok_cli.token_folder import read_index
    from texttok_cli.tokens import load_token_header

    files = [path / shard.file for shard in read_index(path).shards] if path.is_dir() else [path]
    headers = map(load_token_header, files)
    return [name for header in headers for name in map(_name, header.ids, header.flipped)]


def _say_if_cut_off(folder: Path) -> None:
    from texttok_cli.console import say
    from texttok_cli.token_folder import read_index

    index = read_index(folder)
    if not index.complete:
        done = sum(shard.images for shard in index.shards)
        say(f"{folder}: its encoding was cut off; these are the {done:,} images that were done. Run the same `texttok encode` to go on")


def _parts(tokens: Iterable[Path]) -> Iterator[tuple[Path, Tokens]]:
    """Every token file of the inputs, with the input it came from."""
    from texttok_cli.token_folder import read_shards
    from texttok_cli.tokens import load_tokens

    for path in tokens:
        if path.is_dir():
            for part in read_shards(path):
                yield path, part
        else:
            yield path, load_tokens(path)


def _load(part: Tokens, path: Path, model: str | None, device: str, precision: Precision, offline: bool) -> Tokenizer:
    """The tokenizer that made these tokens, found by its hash or named by the person."""
    from texttok_cli.inference import find_model, find_model_by_hash, load_tokenizer

    header = part.header
    file = find_model(model, offline=offline) if model else find_model_by_hash(header.model_sha256, header.model_name, path)
    return load_tokenizer(file, device=device, precision=precision, offline=offline)


def _check(tokenizer: Tokenizer, part: Tokens, path: Path) -> None:
    try:
        tokenizer.check_tokens(part)
    except TokenFileError as err:
        raise TokenFileError(f"{path}: {err}") from None


class _Target:
    """Where decoded images go: a PNG file, a folder, or beside their token files."""

    def __init__(self, out: Path | None, names: Mapping[Path, Sequence[str]]) -> None:
        """`names`: of the images of each input. UsageError if `out` can't be the file of them, DataError if two would be one file."""
        from texttok_cli.data.items import IMAGE_SUFFIXES
        from texttok_cli.files import check_can_be_folder, check_distinct

        self.out, self.counts = out, {source: len(own) for source, own in names.items()}
        self.total = sum(self.counts.values())
        self.paths: dict[Path, Path] = {}  # of every image -> the input it comes from
        self.image_suffixes = IMAGE_SUFFIXES
        self.is_within = cache(_is_within)  # of this run alone: another one may find other links
        suffix = "" if out is None or out.is_dir() else out.suffix.lower()
        self.is_file = suffix == ".png" and self.total == 1
        if suffix in IMAGE_SUFFIXES and not self.is_file:
            raise UsageError(f"{out}: name a folder for the {self.total:,} image(s), or for one image a .png file")
        if out is not None and not self.is_file:
            check_can_be_folder(out, else_name=", or for one image a .png file")
        self._left = {source: iter([self._claim(source, name) for name in own]) for source, own in names.items()}
        check_distinct(self.paths)

    def next(self, source: Path, input_sha256: str) -> Path:
        """Where the next image of this input goes. DataError rather than over the file that was encoded, or for more images than listed."""
        from texttok_cli.files import sha256_file

        path = next(self._left[source], None)
        if path is None:
            raise DataError(f"{source}: has more images than at first: it is still being written; run the same command again")
        if path.is_file() and sha256_file(path) == input_sha256:
            raise DataError(f"{path}: is the very image that was encoded; choose another --out")
        return path

    def _claim(self, source: Path, name: str) -> Path:
        path = self._path(source, name)
        if path in self.paths:
            raise DataError(f"{source}: its {name} and an image of {self.paths[path]} are both {path}; decode them into different folders")
        self.paths[path] = source
        return path

    def _path(self, source: Path, image_id: str) -> Path:
        if self.out is not None and self.is_file:
            return self.out
        place = source.resolve() if source.is_dir() else source  # the folder may be called `.`
        name = place.name.removesuffix(".safetensors").removesuffix(".tok")
        if self.out is None and not source.is_dir() and self.counts[source] == 1:
            return place.with_name(f"{name}.rec.png")
        *folders, last = safe_parts(image_id)
        root = self.out or place.with_name(f"{name}.rec")
        folder = root.joinpath(*folders)
        if not self.is_within(folder, root):
            raise DataError(f"{folder}: a link leads out of {root}: remove it, or choose another --out")
        stem = last[: last.rindex(".")] if Path(last).suffix.lower() in self.image_suffixes else last
        path = folder / f"{stem}.png"
        # a.png and a.jpg of one folder: the second keeps its whole name.
        return folder / f"{last}.png" if self.paths.get(path) == source else path


def _name(image_id: str, flipped: bool) -> str:
    """The id under which an image is written; that of its mirrored copy: dog.png -> dog.mirrored.png."""
    path = PurePosixPath(image_id)
    return str(path.with_name(f"{path.stem}.mirrored{path.suffix}")) if flipped and path.name else image_id


def _is_within(folder: Path, root: Path) -> bool:
    """Wherever links in the root, which may have come with the tokens, lead."""
    # Not by Path.resolve, which raises a RuntimeError for links in a circle until Python 3.13; there no file can be written either way.
    return Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(root))


def safe_parts(image_id: str) -> list[str]:
    """An id, which may be any path or text, as the parts of a path that stays inside its folder and that every system takes."""
    parts = [re.sub(r'[<>:"|?*\x00-\x1f]', "_", part.rstrip(". ")) for part in re.split(r"[/\\]", image_id)]
    return [RESERVED.sub(r"\1_", part) for part in parts if part] or ["image"]
