import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from pictures import encoded, picture
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from texttok_cli.data import center_crop, load_image, normalize, to_image, to_rgb, to_tensor, to_uint8
from texttok_cli.errors import DataError

TIFF_TAGS = {"width": 256, "bits": 258, "photometric": 262}


def pixels(data: bytes) -> np.ndarray:
    image = load_image(data, name="x")
    assert image.mode == "RGB"
    return np.asarray(image)


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_rgb_is_kept_bit_for_bit(kind):
    assert np.array_equal(pixels(encoded(picture(), kind)), np.asarray(picture()))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_kinds_are_near(kind):
    assert np.abs(pixels(encoded(picture(), kind, quality=95)).astype(int) - np.asarray(picture())).mean() < 4


@pytest.mark.parametrize(("mode", "kind"), [("1", "PNG"), ("L", "PNG"), ("P", "PNG"), ("P", "GIF"), ("L", "JPEG")])
def test_palette_grey_and_bilevel(mode, kind):
    image = picture().convert(mode)
    shown = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(pixels(encoded(image, kind)) - shown).max() <= (8 if kind == "JPEG" else 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_lies_over_white(mode):
    image = Image.new(mode, (4, 4), (0, 0, 0, 64) if mode == "RGBA" else (0, 64))
    image.putpixel((1, 2), (10, 20, 30, 255) if mode == "RGBA" else (50, 255))
    shown = pixels(encoded(image))
    assert np.abs(shown[0, 0].astype(int) - round(255 * (1 - 64 / 255))).max() <= 1
    assert shown[2, 1].tolist() == ([10, 20, 30] if mode == "RGBA" else [50, 50, 50])


def test_transparent_colours_lie_over_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    assert pixels(encoded(palette, transparency=0))[0].tolist() == [[255, 255, 255], [0, 0, 255]]
    rgb = Image.new("RGB", (2, 1), (255, 0, 0))
    rgb.putpixel((1, 0), (0, 0, 255))
    assert pixels(encoded(rgb, transparency=(255, 0, 0)))[0].tolist() == [[255, 255, 255], [0, 0, 255]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_rounded_not_clipped(kind):
    values = np.array([[0, 257, 128 * 257 - 128, 200 * 257 + 128, 65535]], np.uint16)
    assert pixels(encoded(Image.fromarray(values), kind))[0, :, 0].tolist() == [0, 1, 128, 200, 255]


def test_a_loaded_image_and_premultiplied_grey_lie_over_white():
    loaded = Image.open(io.BytesIO(encoded(Image.new("RGB", (2, 1), "red"), transparency=(255, 0, 0))))
    loaded.load()
    assert np.asarray(to_rgb(loaded, name="x"))[0].tolist() == [[255, 255, 255]] * 2
    grey = Image.new("LA", (1, 1), (0, 102)).convert("La")  # black, three fifths of it see-through
    assert np.asarray(to_rgb(grey, name="x"))[0].tolist() == [[153, 153, 153]]


def test_the_transparent_colour_of_pngs_of_other_than_8_bits_lies_over_white():
    def png(depth: int, kind: int, row: bytes, *key: int) -> bytes:
        header, transparent = struct.pack(">IIBBBBB", 2, 1, depth, kind, 0, 0, 0), struct.pack(f">{len(key)}H", *key)
        chunks = {b"IHDR": header, b"tRNS": transparent, b"IDAT": zlib.compress(b"\0" + row), b"IEND": b""}
        return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks.items())

    assert pixels(png(2, 0, bytes([0b01_10_0000]), 1))[0, :, 0].tolist() == [255, 170]
    assert pixels(png(4, 0, bytes([0x5_7]), 5))[0, :, 0].tolist() == [255, 7 * 17]
    assert pixels(png(16, 0, struct.pack(">2H", 512, 600), 512))[0, :, 0].tolist() == [255, 2]
    assert pixels(png(16, 2, struct.pack(">6H", 512, 768, 2, 2, 3, 2), 512, 768, 2))[0].tolist() == [[255, 255, 255], [0, 0, 0]]


def tiff_of_16_bits(values: list[int], **tags: tuple[int, int]) -> bytes:
    """A TIFF of one row of grey, little-endian, and in it entries changed from a number to another."""
    data = encoded(Image.fromarray(np.array([values], "<u2")), "TIFF")
    for tag, (before, after) in tags.items():
        number = TIFF_TAGS[tag]
        [kind] = [kind for kind in (3, 4) if struct.pack("<HHII", number, kind, 1, before) in data]
        data = data.replace(struct.pack("<HHII", number, kind, 1, before), struct.pack("<HHII", number, kind, 1, after))
    return data


def test_tiffs_of_grey_where_white_is_zero_or_of_12_bits():
    assert pixels(tiff_of_16_bits([0, 257, 65535], photometric=(1, 0)))[0, :, 0].tolist() == [255, 254, 0]
    packed = np.frombuffer(bytes.fromhex("000 010 800 fff".replace(" ", "")), "<u2").tolist()
    assert pixels(tiff_of_16_bits(packed, width=(3, 4), bits=(16, 12)))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_is_no_damage_to_the_image(kind):
    whole = encoded(picture(), kind)
    assert np.array_equal(pixels(encoded(picture(), kind, exif=b"Exif\0\0no TIFF")), pixels(whole))


@pytest.mark.parametrize("values", [np.ones((2, 2), np.float32), np.full((2, 2), 70000, np.int32), np.full((2, 2), -1, np.int32)])
def test_pixels_of_no_agreed_range_are_refused(values):
    with pytest.raises(DataError, match=r"^x: .*no agreed range.*8 or 16 bits$"):
        load_image(encoded(Image.fromarray(values), "TIFF"), name="x")


def test_cmyk_white_stays_white():
    image = Image.new("CMYK", (16, 16), (0, 0, 0, 0))
    image.paste((0, 255, 255, 0), (0, 0, 8, 16))  # red
    for kind in ("JPEG", "TIFF"):
        shown = pixels(encoded(image, kind)).astype(int)
        assert np.abs(shown[8, 2] - [255, 0, 0]).max() <= 6
        assert np.abs(shown[8, 14] - 255).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(kind, orientation):
    # What each value asks of a viewer, from the EXIF standard: where the stored row 0 and column 0 belong.
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    upright = np.asarray(picture())
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    image = Image.fromarray(np.ascontiguousarray(stored[orientation](upright)))
    loaded = load_image(encoded(image, kind, exif=exif, **options), name="photo.x")
    shown = np.asarray(loaded)
    assert shown.shape == upright.shape
    assert np.abs(shown.astype(int) - upright).max() <= (6 if kind == "JPEG" else 0)
    assert np.array_equal(to_rgb(loaded, name="photo.x"), shown), "upright already"


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert pixels(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.9])
def test_a_cut_file_is_one_clear_line(kind, part):
    data = encoded(picture(size=(200, 150)), kind)
    with pytest.raises(DataError, match=r"\Aphoto\.x: (damaged or cut short|not an image)[^\n]+\Z"):
        load_image(data[: int(len(data) * part)], name="photo.x")


def test_what_is_no_image_is_refused():
    with pytest.raises(DataError, match=r"^x: not an image"):
        load_image(b"%PDF-1.4 hello", name="x")


def test_formats_that_run_programs_are_not_opened():
    with pytest.raises(DataError, match=r"^x: not an image"):
        load_image(encoded(picture(), "EPS"), name="x")


@pytest.mark.parametrize("side", [20_000, 13_000, 10_001])  # over Pillow's error limit, over its warning limit, over ours
def test_a_bomb_is_refused_from_its_header(side, monkeypatch):
    monkeypatch.setattr(PngImageFile, "load", lambda self: pytest.fail("it was decoded"))
    data = bomb(side, side)
    with warnings.catch_warnings(), pytest.raises(DataError, match=r"^x: .*over the limit of 100,000,000.*scale it down"):
        warnings.simplefilter("error")
        load_image(data, name="x")


def test_no_bomb_warning_passes_on_any_thread():
    data = bomb(9_700, 9_700)  # within our limit, over the one Pillow warns at; cut short, so nothing large is decoded
    with warnings.catch_warnings(record=True) as seen, ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("always")
        futures = [pool.submit(load_image, data, name="x") for _ in range(8)]
        assert all("cut short" in str(future.exception()) for future in futures)
    assert not [warning for warning in seen if warning.category is Image.DecompressionBombWarning]


def adm_crop(image: Image.Image, size: int) -> np.ndarray:
    """The crop as the ADM paper's code describes it, on arrays: the independent half of the parity test."""
    while min(image.size) >= 2 * size:
        array = np.asarray(image)
        image = Image.fromarray(array).resize((array.shape[1] // 2, array.shape[0] // 2), resample=Image.BOX)
    scale = size / min(*image.size)
    array = np.asarray(image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC))
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize("size", [(32, 32), (33, 65), (64, 64), (63, 200), (129, 127), (500, 131), (20, 31), (301, 1000)])
def test_center_crop_is_adms(size):
    image = picture(3, size)
    cropped = center_crop(image, 32)
    assert cropped.size == (32, 32)
    assert np.array_equal(np.asarray(cropped), adm_crop(image, 32))


def test_a_random_crop_reaches_every_offset_alike():
    image = Image.fromarray(np.arange(35, dtype=np.uint8)[None, :, None].repeat(32, 0).repeat(3, 2))
    for upright in (image, image.transpose(Image.Transpose.TRANSPOSE)):
        firsts = [np.asarray(center_crop(upright, 32, at=at))[0, 0, 0] for at in np.arange(1 / 128, 1, 1 / 64)]
        assert [firsts.count(first) for first in range(4)] == [16] * 4


def test_center_crop_halves_by_plain_means():
    array = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    means = array.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert np.abs(np.asarray(center_crop(Image.fromarray(array), 32)) - means).max() <= 1  # two passes, each rounded


def test_a_thread_of_an_image_is_refused():
    with pytest.raises(DataError, match="too narrow"):
        center_crop(Image.new("RGB", (1, 100_000)), 256)


def test_to_tensor_is_channels_first():
    tensor = to_tensor(picture())
    assert tensor.dtype == torch.uint8
    assert tensor.shape == (3, 30, 40)
    assert tensor.is_contiguous()
    assert tensor[:, 7, 9].tolist() == list(picture().getpixel((9, 7)))


def test_to_image_is_the_inverse_of_to_tensor() -> None:
    assert np.array_equal(np.asarray(to_image(to_tensor(picture()))), np.asarray(picture()))


def test_every_byte_survives_normalize_and_back():
    values = torch.arange(256, dtype=torch.uint8)
    assert normalize(values).dtype == torch.float32
    assert (normalize(values).min(), normalize(values).max()) == (-1, 1)
    assert torch.equal(to_uint8(normalize(values)), values)


def test_to_uint8_rounds_half_up_and_clamps():
    levels = torch.tensor([-9.0, 0.4, 0.5, 1.49, 1.5, 254.5, 300.0])
    assert to_uint8(levels / 127.5 - 1).tolist() == [0, 0, 1, 1, 2, 255, 255]


def test_to_uint8_of_half_precision_is_that_of_its_float_values():
    images = (torch.rand(1000) * 2 - 1).bfloat16()
    assert torch.equal(to_uint8(images), to_uint8(images.float()))
