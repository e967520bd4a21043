"""Token files: round trips, every field checked."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tokens import MEAN, STD, concatenate, make, make_codes

from texttok_cli.errors import TokenFileError
from texttok_cli.files import load_safetensors, save_safetensors
from texttok_cli.tokens import Tokens, code_dtype, load_token_header, load_tokens, save_tokens, select


@pytest.mark.parametrize("captions", [None, ["", "a dog"]])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_float_round_trip(dtype: str, captions: list[str] | None, tmp_path: Path) -> None:
    tokens = make(dtype=dtype, captions=captions)
    save_tokens(tmp_path / "a", tokens)
    again = load_tokens(tmp_path / "a")
    assert again.header == tokens.header == load_token_header(tmp_path / "a")
    assert again.z.dtype == torch.float32
    assert torch.equal(again.z, tokens.z.half().float() if dtype == "fp16" else tokens.z)


def test_int8_is_within_its_step_clips_at_four_std_and_is_stable(tmp_path: Path) -> None:
    tokens = make(50, dtype="int8")
    tokens.z[0, 0] = torch.tensor([100.0, -100.0, 0.0])
    save_tokens(tmp_path / "a", tokens)
    again = load_tokens(tmp_path / "a").z
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    inside = (tokens.z - mean).abs() <= 4 * std
    assert ((again - tokens.z).abs() <= 4 * std / 254 * 1.001)[inside].all() and inside.sum() > 590
    assert again[0, 0].tolist() == [0.5 + 4 * 1.0, -1.0 - 4 * 0.25, 0.0]
    save_tokens(tmp_path / "b", load_tokens(tmp_path / "a"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_int8_of_a_channel_that_never_varies_is_its_mean(tmp_path: Path) -> None:
    tokens = make(dtype="int8", std=[1.0, 0.0, 2.0])
    tokens.z[..., 1] = -1.0
    tokens.z[0, 0, 1] = 7.0
    save_tokens(tmp_path / "a", tokens)
    assert (load_tokens(tmp_path / "a").z[..., 1] == -1.0).all()


def test_bytes_are_those_of_tokens_and_of_captions_in_utf8() -> None:
    assert [make(dtype=dtype).token_bytes for dtype in ("fp32", "fp16", "int8")] == [96, 48, 24]
    assert make(captions=["\u732b", "ab"]).caption_bytes == 5 and make(captions=None).caption_bytes == 0


@pytest.mark.parametrize(("dtype", "value"), [("fp32", float("nan")), ("fp16", float("inf")), ("int8", float("nan")), ("fp16", 70_000.0)])
def test_latents_that_cannot_be_kept_are_not_written(dtype: str, value: float, tmp_path: Path) -> None:
    tokens = make(dtype=dtype)
    tokens.z[1, 2, 0] = value
    with pytest.raises(TokenFileError, match="the tokens of i1 hold a value"):
        save_tokens(tmp_path / "a", tokens)
    assert not list(tmp_path.iterdir())


def test_latents_and_header_agree_on_the_number_of_images() -> None:
    with pytest.raises(ValueError, match="of 2 images"):
        replace(make(2), z=torch.zeros(3, 4, 3))


def test_select_and_concatenate_are_inverse() -> None:
    tokens = make(5)
    parts = [select(tokens, [0]), select(tokens, range(1, 5))]
    assert [part.header.ids for part in parts] == [["i0"], ["i1", "i2", "i3", "i4"]]
    again = concatenate(parts)
    assert again.header == tokens.header and torch.equal(again.z, tokens.z)
    assert select(make(3, captions=None), [2]).header.captions is None


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]
WRONG: dict[str, tuple[Change, str]] = {
    "another kind": (lambda h, t: h.pop("texttok_tokens"), "another kind of file"),
    "a newer format": (lambda h, t: h.update(texttok_tokens=3), "this texttok reads 2; update texttok"),
    "an unknown field": (lambda h, t: h.update(color="red"), "header.color: Extra inputs"),
    "no ids": (lambda h, t: h.pop("ids"), "header.ids: Field required"),
    "a model by path": (lambda h, t: h.update(model_name="../m"), "header.model_name"),
    "a model without a name": (lambda h, t: h.update(model_name=""), "header.model_name"),
    "a hash": (lambda h, t: h.update(model_sha256="AB" * 32), "header.model_sha256"),
    "a type": (lambda h, t: h.update(dtype="fp64"), "header.dtype"),
    "another type": (lambda h, t: h.update(dtype="fp16"), "its tokens are F32, its header says fp16"),
    "an image size": (lambda h, t: h.update(image_size=0), "header.image_size"),
    "too few ids": (lambda h, t: h["ids"].pop(), "flipped has 2 entries for 1 images"),
    "too few captions": (lambda h, t: h["captions"].pop(), "captions has 1 entries for 2 images"),
    "too few hashes": (lambda h, t: h["input_sha256"].pop(), "input_sha256 has 1 entries"),
    "too few sizes": (lambda h, t: h["original_sizes"].pop(), "original_sizes has 1 entries"),
    "a caption that is none": (lambda h, t: h.update(captions=["a", None]), "header.captions.1"),
    "an endless caption": (lambda h, t: h.update(captions=["a", "x" * 100_001]), "header.captions.1"),
    "an input's hash": (lambda h, t: h["input_sha256"].__setitem__(0, "x" * 64), "header.input_sha256.0"),
    "an original size": (lambda h, t: h["original_sizes"].__setitem__(0, [-1, 5]), "header.original_sizes.0.0"),
    "int8 without scale": (lambda h, t: h.update(dtype="int8"), "mean and std go with dtype int8"),
    "a scale without int8": (lambda h, t: h.update(mean=MEAN, std=STD), "mean and std go with dtype int8"),
    "half a scale without int8": (lambda h, t: h.update(mean=MEAN), "mean and std go with dtype int8"),
    "a scale of other channels": (
        lambda h, t: (h.update(dtype="int8", mean=MEAN, std=STD[:2]), t.update(z=t["z"].to(torch.int8))),
        "mean and std are not of its 3 channels",
    ),
    "a scale that is not finite": (
        lambda h, t: (h.update(dtype="int8", mean=MEAN, std=[1.0, float("nan"), 1.0]), t.update(z=t["z"].to(torch.int8))),
        "header.std.1",
    ),
    "another number of latents": (lambda h, t: t.update(z=t["z"][:1]), "its tensors are not one z of 2 images"),
    "flat latents": (lambda h, t: t.update(z=t["z"].flatten(1)), "its tensors are not one z of 2 images"),
    "no tokens": (lambda h, t: t.update(z=t["z"][:, :0]), "its tensors are not one z of 2 images"),
    "another tensor": (lambda h, t: t.update(y=t["z"]), "its tensors are not one z of 2 images"),
    "no latents": (lambda h, t: t.update(y=t.pop("z")), "its tensors are not one z of 2 images"),
    "codes without integers": (lambda h, t: h.update(codes=8), "codes 8 and dtype fp32 don't go together"),
    "integers without codes": (lambda h, t: h.update(dtype="int16"), "codes None and dtype int16 don't go together"),
    "too few flips": (lambda h, t: h["flipped"].pop(), "flipped has 1 entries"),
    "too few classes": (lambda h, t: h.update(class_names=["a"]), "class_names has 1 entries"),
    "not finite": (lambda h, t: t["z"][1, 0].fill_(float("nan")), "the tokens of i1 hold a value"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_token_file_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    change, reason = WRONG[case]
    path = tmp_path / "a"
    save_tokens(path, make())
    header, tensors = load_safetensors(path, error=TokenFileError)
    change(header, tensors)
    save_safetensors(path, {name: tensor.clone() for name, tensor in tensors.items()}, header)
    with pytest.raises(TokenFileError) as error:
        load_tokens(path)
    assert str(error.value).startswith(f"{path}: ") and reason in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("codes", "dtype", "size"), [(2, "int16", 2), (32_768, "int16", 2), (32_769, "int32", 4), (1 << 20, "int32", 4)])
def test_codes_are_kept_in_as_many_bytes_as_they_need(codes: int, dtype: str, size: int, tmp_path: Path) -> None:
    assert code_dtype(codes) == dtype
    tokens = make_codes(codes=codes, dtype=dtype)
    save_tokens(tmp_path / "a", tokens)
    again = load_tokens(tmp_path / "a")
    assert again.header == tokens.header and again.z.dtype == torch.int64 and torch.equal(again.z, tokens.z)
    assert tokens.token_bytes == 2 * 4 * size
    assert tokens.token_bits == 2 * 4 * math.ceil(math.log2(codes))


@pytest.mark.parametrize("code", [-1, 1000])
def test_codes_that_the_codebook_does_not_have_are_neither_written_nor_read(code: int, tmp_path: Path) -> None:
    tokens = make_codes()
    save_tokens(tmp_path / "a", tokens)
    header, tensors = load_safetensors(tmp_path / "a", error=TokenFileError)
    changed = tensors["codes"].clone()
    changed[1, 2] = code
    save_safetensors(tmp_path / "a", {"codes": changed}, header)
    with pytest.raises(TokenFileError, match="the codes of i1 are not all in 0 to 999"):
        load_tokens(tmp_path / "a")
    with pytest.raises(TokenFileError, match="the codes of i1 are not all in 0 to 999"):
        save_tokens(tmp_path / "b", Tokens(changed.long(), tokens.header))


def test_a_file_of_format_1_is_read_as_one_without_classes_and_flips(tmp_path: Path) -> None:
    save_tokens(tmp_path / "a", make())
    header, tensors = load_safetensors(tmp_path / "a", error=TokenFileError)
    old = {key: value for key, value in header.items() if key not in ("codes", "flipped", "class_names")} | {"texttok_tokens": 1}
    save_safetensors(tmp_path / "a", {"z": tensors["z"].clone()}, old)
    assert load_tokens(tmp_path / "a").header == make().header
