"""The token file (`*.tok.safetensors`): raw latents or codes with the text and the model they belong to. Reading it executes nothing.

Letters: n images, N latent tokens, d latent channels, K codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from texttok_cli.config.schema import Config
from texttok_cli.errors import TokenFileError
from texttok_cli.files import load_safetensors, parse_header, read_header, save_safetensors

FORMAT = 2  # 1 knew neither codes nor classes nor mirrored copies; it is read as a file that has none
MAX_IMAGES = 1_000_000
MAX_TEXT = 100_000  # characters of an id or a caption
SUFFIX = ".tok.safetensors"
TokenDtype = Literal["fp16", "fp32", "int8", "int16", "int32"]  # the last two: codes
_STORED = {"fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8, "int16": torch.int16, "int32": torch.int32}
_NAMES = {"fp16": "F16", "fp32": "F32", "int8": "I8", "int16": "I16", "int32": "I32"}

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[^/\\]{1,256}$")]  # never a path
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Side = Annotated[int, Field(ge=1)]
# Sums of the squares of float32 stay far below 1e100, and the square of what is below it is finite.
Number = Annotated[float, Field(ge=-1e100, le=1e100)]
Channels = Annotated[list[Number], Field(min_length=1, max_length=4096)]


class TokenHeader(Config):
    """What a token file says of its tokens; lists hold one entry an image."""

    texttok_tokens: int  # version of this format
    model_name: Name
    model_sha256: Sha256
    dtype: TokenDtype
    codes: int | None = Field(None, ge=2, le=1 << 20)  # K of the codebook that the tokens are indices into; None: they are latents
    image_size: int = Field(ge=1, le=65536)
    ids: list[Text] = Field(min_length=1, max_length=MAX_IMAGES)
    flipped: list[bool]  # the mirrored image was encoded; it has the id of the other
    captions: list[Text] | None  # None: the model takes no text. "": the empty condition
    class_names: list[Text | None] | None = None  # of the data set, if it has classes
    input_sha256: list[Sha256]  # of the image files' bytes
    original_sizes: list[tuple[Side, Side]]  # (w, h) before the centre crop
    mean: Channels | None = None  # int8 alone: z = mean + 4 std q / 127
    std: Channels | None = None

    @model_validator(mode="after")
    def _lists_agree(self) -> TokenHeader:
        for name in _columns(self):
            if len(getattr(self, name)) != len(self.ids):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {len(self.ids)} images")
        if {self.mean is not None, self.std is not None} != {self.dtype == "int8"}:
            raise ValueError("mean and std go with dtype int8, and int8 needs both")
        if (self.codes is not None or self.dtype in ("int16", "int32")) and (self.codes is None or self.dtype != code_dtype(self.codes)):
            raise ValueError(f"codes {self.codes} and dtype {self.dtype} don't go together")
        return self


def code_dtype(codes: int) -> Literal["int16", "int32"]:
    """How codes of a codebook of this size are stored."""
    return "int16" if codes <= 1 << 15 else "int32"


@dataclass(frozen=True)
class Tokens:
    """Latents z (n, N, d) float32, raw (not standardised), or of a VQ model codes z (n, N) int64; and what they belong to."""

    z: Tensor
    header: TokenHeader

    def __post_init__(self) -> None:
        form = "(n, N, d)" if self.header.codes is None else "(n, N)"
        if self.z.ndim != form.count(",") + 1 or len(self.z) != len(self.header.ids):
            raise ValueError(f"tokens are {tuple(self.z.shape)}, not {form} of {len(self.header.ids)} images")

    def __len__(self) -> int:
        return len(self.header.ids)

    @property
    def token_bytes(self) -> int:
        """Bytes of the tokens as stored, without any header."""
        return self.z.numel() * _STORED[self.header.dtype].itemsize

    @property
    def token_bits(self) -> int:
        """Bits of the tokens: as stored, or of codes what each needs to name one of K."""
        codes = self.header.codes
        return 8 * self.token_bytes if codes is None else self.z.numel() * (codes - 1).bit_length()

    @property
    def caption_bytes(self) -> int:
        """UTF-8 bytes of the captions, which decoding needs too."""
        return sum(len(caption.encode()) for caption in self.header.captions or [])


def save_tokens(path: str | Path, tokens: Tokens) -> None:
    """Write a token file atomically, in the header's dtype. TokenFileError if a token can't be kept in it."""
    path, header = Path(path), tokens.header
    if header.codes is not None:
        _check_codes(path, tokens.z, header)
        stored = tokens.z.to(_STORED[header.dtype])
    elif header.mean is not None and header.std is not None:
        _check_finite(path, tokens.z, header.ids)
        stored = quantize_int8(tokens.z.float(), torch.tensor(header.mean), torch.tensor(header.std))
    else:
        stored = tokens.z.to(_STORED[header.dtype])
        _check_finite(path, stored, header.ids)
    save_safetensors(path, {_tensor_name(header): stored}, header.model_dump(mode="json"))


def load_tokens(path: str | Path) -> Tokens:
    """A token file, every field checked. TokenFileError, one line, for anything that is not a whole token file."""
    path = Path(path)
    header = load_token_header(path)
    _, tensors = load_safetensors(path, error=TokenFileError)
    if header.codes is not None:
        codes = tensors["codes"].long()
        _check_codes(path, codes, header)
        return Tokens(codes, header)
    z = tensors["z"].float()
    if header.mean is not None and header.std is not None:
        z = dequantize_int8(z, torch.tensor(header.mean), torch.tensor(header.std))
    _check_finite(path, z, header.ids)
    return Tokens(z, header)


def load_token_header(path: Path) -> TokenHeader:
    """The header alone, checked against the file's size and tensors; no token is read."""
    meta, tensors = read_header(path, error=TokenFileError)
    meta = _as_format_2(meta)
    header = parse_header(meta, TokenHeader, key="texttok_tokens", version=FORMAT, path=path, error=TokenFileError)
    name = _tensor_name(header)
    info = tensors.get(name)
    sides = 3 if header.codes is None else 2
    if info is None or len(tensors) != 1 or len(info.shape) != sides or info.shape[0] != len(header.ids) or 0 in info.shape:
        raise TokenFileError(f"{path}: its tensors are not one {name} of {len(header.ids)} images")
    if info.dtype != _NAMES[header.dtype]:
        raise TokenFileError(f"{path}: its tokens are {info.dtype}, its header says {header.dtype}")
    if header.mean is not None and not len(header.mean) == len(header.std or []) == info.shape[2]:
        raise TokenFileError(f"{path}: mean and std are not of its {info.shape[2]} channels")
    return header


def _tensor_name(header: TokenHeader) -> str:
    return "z" if header.codes is None else "codes"


def _as_format_2(meta: dict[str, Any]) -> dict[str, Any]:
    if meta.get("texttok_tokens") != 1 or not isinstance(meta.get("ids"), list):
        return meta
    return {**meta, "texttok_tokens": 2, "codes": None, "flipped": [False] * len(meta["ids"]), "class_names": None}


def quantize_int8(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """round(127 clip((z - mean) / (4 std), -1, 1)); z (..., d), mean and std (d,)."""
    # A channel that never varied has std 0, and only its mean to say: 0 / tiny, not 0 / 0.
    scale = (4 * std).clamp_min(torch.finfo(std.dtype).tiny)
    return (127 * ((z - mean) / scale).clamp(-1, 1)).round().to(torch.int8)


def dequantize_int8(q: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The inverse of `quantize_int8`, within 4 std / 254 of what was not clipped."""
    return mean + 4 * std * q.float() / 127


def _check_codes(path: Path, codes: Tensor, header: TokenHeader) -> None:
    assert header.codes is not None
    bad = (~((codes >= 0) & (codes < header.codes)).all(1)).nonzero().flatten()
    if len(bad):
        raise TokenFileError(f"{path}: the codes of {header.ids[int(bad[0])]} are not all in 0 to {header.codes - 1}")


def _check_finite(path: Path, z: Tensor, ids: Sequence[str]) -> None:
    bad = (~z.flatten(1).isfinite().all(1)).nonzero().flatten()
    if len(bad):
        raise TokenFileError(f"{path}: the tokens of {ids[int(bad[0])]} hold a value that is not finite or too large for the dtype")


def select(tokens: Tokens, chosen: Sequence[int]) -> Tokens:
    """Some of the images, by index."""
    columns = {name: [getattr(tokens.header, name)[i] for i in chosen] for name in _columns(tokens.header)}
    return Tokens(tokens.z[list(chosen)], tokens.header.model_copy(update=columns))


def joined(headers: Sequence[TokenHeader]) -> TokenHeader:
    """One header of the images of all, in order; the headers are of one model and dtype."""
    columns = {name: [value for header in headers for value in getattr(header, name)] for name in _columns(headers[0])}
    return headers[0].model_copy(update=columns)


def _columns(header: TokenHeader) -> list[str]:
    """The fields with an entry an image."""
    names = ("ids", "flipped", "captions", "class_names", "input_sha256", "original_sizes")
    return [name for name in names if getattr(header, name) is not None]
