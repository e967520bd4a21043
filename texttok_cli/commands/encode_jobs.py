"""Where the tokens of `texttok encode` go: one file an image, or the shards of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from texttok_cli.console import say
from texttok_cli.errors import TokenFileError
from texttok_cli.token_folder import writing
from texttok_cli.tokens import load_token_header, save_tokens, select

if TYPE_CHECKING:
    from texttok_cli.data import Dataset
    from texttok_cli.inference import Tokenizer
    from texttok_cli.tokens import TokenDtype, Tokens


class Job:
    """What has been encoded, and where it goes; a context that keeps what is done when the run is cut off."""

    def __init__(self) -> None:
        self.encoded = self.mirrored = self.cropped = self.token_bytes = self.token_bits = self.caption_bytes = 0
        self.replaced: set[str] = set()  # ids whose earlier tokens were of another picture, in a folder also caption or class
        self.others: set[str] = set()  # ids in the folder that are not among the inputs
        self.same: set[str] = set()  # those of them whose picture, caption and class are those of an input

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Nothing is open."""

    def _count(self, tokens: Tokens) -> None:
        if all(tokens.header.flipped):
            self.mirrored += len(tokens)  # of images that count already
            return
        self.encoded += len(tokens)
        self.cropped += sum(width != height for width, height in tokens.header.original_sizes)
        self.token_bytes += tokens.token_bytes
        self.token_bits += tokens.token_bits
        self.caption_bytes += tokens.caption_bytes


class Files(Job):
    """One token file an image."""

    def __init__(self, files: list[Path], tokenizer: Tokenizer, dtype: TokenDtype) -> None:
        super().__init__()
        self.files, self.tokenizer, self.dtype = files, tokenizer, dtype
        self.there: set[Path] = set()  # those of the files that are written or were before
        self.of_others: set[Path] = set()  # those that hold another picture's tokens

    def has(self, index: int, sha256: str, caption: str | None) -> bool:
        """Whether the file is there, made of this picture and caption by this model."""
        if not self.files[index].exists():
            return False
        try:
            header = load_token_header(self.files[index])
        except TokenFileError:
            return False  # damaged: written again
        recorded = (header.input_sha256, header.captions, header.model_sha256, header.dtype)
        same = recorded == ([sha256], None if caption is None else [caption], self.tokenizer.info.sha256, self.dtype)
        if same:
            self.there.add(self.files[index])
        elif header.input_sha256 != [sha256]:  # another caption of the same picture is no surprise
            self.of_others.add(self.files[index])
        return same

    def add(self, indices: list[int], tokens: Tokens) -> None:
        """Write the tokens of the images `indices`."""
        self._count(tokens)
        for i, index in enumerate(indices):
            save_tokens(self.files[index], select(tokens, [i]))
            self.there.add(self.files[index])
            if self.files[index] in self.of_others:
                self.replaced.add(tokens.header.ids[i])

    @property
    def out(self) -> list[str]:
        """The files that are there."""
        return [str(file) for file in self.files if file in self.there]

    def say_replaced(self) -> None:
        """Tell which tokens gave way to those of another picture, if any."""
        if self.replaced:
            say(
                f"replaced: the tokens of {len(self.replaced):,} other picture(s) that had the same file name,"
                f" such as {min(self.replaced)}; to keep both, choose another -o"
            )


class Folder(Job):
    """Shards and an index in one folder."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, dtype: TokenDtype, flips: bool, dataset: Dataset) -> None:
        super().__init__()
        self.flips, self.dataset = flips, dataset
        self._writing = writing(folder, model_name=tokenizer.info.name, model_sha256=tokenizer.info.sha256, dtype=dtype)

    def __enter__(self) -> Folder:
        self.folder = self._writing.__enter__()
        dropped = self.folder.dropped
        if dropped:
            lost = sum(shard.images for shard in dropped)
            say(
                f"{self.out}: {len(dropped):,} shard(s) missing or damaged, such as {dropped[0].file}; of the {lost:,} image(s) in there,"
                " those among these inputs are encoded again, any others are lost"
            )
        return self

    def has(self, index: int, sha256: str, caption: str | None) -> bool:
        """Whether the folder has the tokens of this picture, caption and class, and with `flips` of its mirrored copy."""
        item = self.dataset.items[index]
        return self.folder.has(item.id, sha256, caption, item.class_name, flips=self.flips)

    def add(self, indices: list[int], tokens: Tokens) -> None:
        """Take the tokens; a shard is written whenever it is full."""
        self._count(tokens)
        self.folder.add(tokens)

    def __exit__(self, kind: type[BaseException] | None, *what: Any) -> None:
        self._writing.__exit__(kind, *what)
        if kind is None:
            self.replaced = self.folder.replaced
            ids = {item.id for item in self.dataset.items}
            self.others, self.same = self.folder.ids - ids, self.folder.same_as(ids)

    @property
    def out(self) -> str:
        """The folder."""
        return str(self.folder.path)

    def say_replaced(self) -> None:
        """Tell which tokens gave way to those of another picture, caption or class, if any."""
        if self.replaced:
            say(
                f"replaced in {self.out}: the tokens of {len(self.replaced):,} image(s) that had the same id but another picture,"
                f" caption or class, such as {min(self.replaced)}; to keep both, encode all inputs in one run into a new folder"
            )
