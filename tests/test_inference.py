"""Tokenizer and encode_dataset: inputs that agree, batches that don't matter, and refusals."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_generator import BY_CLASS, save_tiny_generator

from texttok_cli import inference
from texttok_cli.config.schema import TextCondition
from texttok_cli.data import Dataset, Item, open_dataset
from texttok_cli.data.texts import texts_for
from texttok_cli.errors import BackendError, CheckpointError, DataError, TokenFileError
from texttok_cli.files import sha256_file
from texttok_cli.inference import Tokenizer, encode_dataset, find_model, find_model_by_hash, load_tokenizer
from texttok_cli.tokens import Tokens

CAPTIONS = ["", "a", "a red flower", "one two three four five six seven eight nine ten", "a b c", "x y", "a red flower", "long " * 40]


@pytest.fixture
def tokenizer(models: Path) -> Tokenizer:
    return load_tokenizer(models / "text.safetensors", device="cpu")


def unexpected(image_id: str, reason: str) -> None:
    pytest.fail(f"{image_id}: {reason}")


@pytest.mark.parametrize("name", ["text", "plain"])
def test_the_batch_size_does_not_change_the_tokens(name: str, models: Path, tmp_path: Path, draw: Callable[..., Path]) -> None:
    """Tokenizer.encode and `texttok encode` promise 1e-4 in fp32 for any model; this tiny one, whose latents deviate by 0.4, is nearer."""
    tokenizer = load_tokenizer(models / f"{name}.safetensors", device="cpu")
    for i in range(8):
        draw(tmp_path / f"{i}.png", seed=i)
    dataset, texts = open_dataset([tmp_path]), CAPTIONS if name == "text" else None
    one, three, eight = (
        torch.cat([t.z for _, t in encode_dataset(tokenizer, dataset, texts, batch_size=size, on_error=unexpected)]) for size in (1, 3, 8)
    )
    assert one.shape == (8, 4, 8) and one.std() > 0.3 and (one[0] - one[1]).abs().max() > 0.01
    assert (one - three).abs().max() < 1e-5 and (one - eight).abs().max() < 1e-5
    images = [tokenizer.decode(one[i : i + 1], None if texts is None else texts[i]) for i in range(8)]
    assert (torch.cat(images).int() - tokenizer.decode(one, texts).int()).abs().max() <= 1  # rounding to uint8


def test_the_caption_matters_to_both_halves(tokenizer: Tokenizer, tmp_path: Path, draw: Callable[..., Path]) -> None:
    image = draw(tmp_path / "a.png")
    z = tokenizer.encode(image, "a red flower")
    assert (z - tokenizer.encode(image, "a dog")).abs().max() > 1e-3
    assert not torch.equal(tokenizer.decode(z, "a red flower"), tokenizer.decode(z, "a dog"))


def test_path_pil_and_tensor_agree(tokenizer: Tokenizer, tmp_path: Path, draw: Callable[..., Path]) -> None:
    path = draw(tmp_path / "a.png", size=(32, 32))
    tensor = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None]
    z = tokenizer.encode(path, "a")
    for image in (str(path), Image.open(path), [path], tensor):
        assert torch.equal(tokenizer.encode(image, ["a"]), z)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "RGBA", "LA", "I;16"])
def test_a_pil_image_of_any_size_turned_by_its_camera_agrees_with_its_file(mode: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (30, 44, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.fromarray(values).convert(mode).save(path, exif=exif)
    with Image.open(path) as image:
        assert image.mode == mode
        assert torch.equal(tokenizer.encode(image, "a"), tokenizer.encode(path, "a"))


def test_a_pil_image_of_floating_point_numbers_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="a PIL image: its pixels are floating point"):
        tokenizer.encode(Image.new("F", (32, 32)), "a")


def test_images_that_cannot_be_read_are_data_errors(tokenizer: Tokenizer, tmp_path: Path, draw: Callable[..., Path]) -> None:
    damaged = draw(tmp_path / "half.png", size=(64, 64), part=0.5)
    with pytest.raises(DataError, match=r"half.png: damaged or cut short"):
        tokenizer.encode(damaged, "a")
    with pytest.raises(DataError, match="a PIL image: damaged or cut short"):
        tokenizer.encode(Image.open(damaged), "a")
    with pytest.raises(DataError, match=r"none.png: No such file"):
        tokenizer.encode(tmp_path / "none.png", "a")
    with pytest.raises(DataError, match="Is a directory"):
        tokenizer.encode(str(tmp_path), "a")
    with pytest.raises(DataError, match="no image to encode"):
        tokenizer.encode([], [])


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 16, dtype=torch.uint8), torch.zeros(3, 32, 32).byte()])
def test_tensors_of_another_type_or_shape_are_refused(images: torch.Tensor, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"not torch.uint8 \(B, 3, 32, 32\)"):
        tokenizer.encode(images, ["a"] * len(images))


def test_latents_of_another_shape_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"latents are \(1, 5, 8\), not \(B, 4, 8\)"):
        tokenizer.decode(torch.zeros(1, 5, 8), "a")


def test_images_that_are_not_finite_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"images are not finite.*--cfg"):
        tokenizer.decode(torch.full((1, 4, 8), 1e38), "a")


def test_no_latents_and_latents_of_another_type(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"latents are \(0, 4, 8\), not \(B, 4, 8\)"):
        tokenizer.decode(torch.zeros(0, 4, 8), [])
    z = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0)).half()
    assert all(torch.equal(tokenizer.decode(again, "a"), tokenizer.decode(z, "a")) for again in (z.float(), z.double()))


def test_a_model_without_vector_quantisation_has_no_codes(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="text: has no codes"):
        tokenizer.encode_codes(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "a")
    with pytest.raises(DataError, match="text: has no codes"):
        tokenizer.lookup(torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize(("where", "reads"), [("both", True), ("detokenizer", True), ("tokenizer", False)])
def test_a_detokenizer_reads_text_where_it_is_conditioned_on_it(
    where: str, reads: bool, tmp_path: Path, save_model: Callable[..., Path]
) -> None:
    condition = {"source": "caption", "where": where, "encoder": {"kind": "hash", "dim": 16, "max_tokens": 24}}
    tokenizer = load_tokenizer(save_model(tmp_path / "m.safetensors", 0, condition), device="cpu")
    z = tokenizer.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "a red flower")
    assert tokenizer.detokenizer_reads_text == reads
    assert torch.equal(tokenizer.decode(z, "a red flower"), tokenizer.decode(z, "a dog")) != reads


def test_captions_must_match_the_model_and_the_images(tokenizer: Tokenizer, models: Path) -> None:
    z = torch.zeros(2, 4, 8)
    with pytest.raises(DataError, match=r"2 image\(s\) and 1 caption\(s\)"):
        tokenizer.decode(z, "a")
    with pytest.raises(DataError, match=r"--caption.*`texttok caption`.*--no-caption.*--model baseline-32-128"):
        tokenizer.decode(z)
    with pytest.raises(DataError, match="takes no captions"):
        load_tokenizer(models / "plain.safetensors", device="cpu").decode(z, ["a", "b"])


def test_the_text_of_an_image_is_of_the_source_that_the_model_has() -> None:
    both, named = Item("a.png", "a.png", "its caption", "animals/dog"), Item("b.png", "b.png", None, "cat")
    caption, class_text = (TextCondition.model_validate({"source": s, "encoder": {"kind": "hash"}}) for s in ("caption", "class_text"))
    assert texts_for([both], caption) == ["its caption"]
    assert texts_for([both, named], class_text) == ["a photo of a dog", "a photo of a cat"]
    with pytest.raises(DataError, match=r"^b\.png: has no caption"):
        texts_for([named], caption)


def test_a_key_without_captions_is_named() -> None:
    cond = TextCondition.model_validate({"source": "caption", "encoder": {"kind": "hash"}})
    in_shard, beside = Item("k0", "s.tar", size=1), Item("a.png", "a.png")
    assert texts_for([replace(in_shard, caption="a")], cond, caption_field="nope") == ["a"]
    with pytest.raises(DataError, match=r"^k0: its \.json has no caption under 'nope'; name another key with --caption-field"):
        texts_for([in_shard], cond, caption_field="nope")
    for item, field in ((in_shard, None), (beside, "nope")):
        with pytest.raises(DataError, match="has no caption; this model is conditioned on text"):
            texts_for([item], cond, caption_field=field)


@torch.no_grad()
def test_the_model_sees_and_makes_images_from_minus_one_to_one(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert tokenizer.text is not None
    expected = tokenizer.model.encode(pixels / 127.5 - 1, tokenizer.text(["a", "b", "c"])).z
    torch.testing.assert_close(tokenizer.encode(pixels, ["a", "b", "c"]), expected, rtol=1e-5, atol=1e-5)
    made = torch.linspace(-1.5, 1.5, 3 * 32 * 32).view(1, 3, 32, 32)
    monkeypatch.setattr(tokenizer.model, "decode", lambda z, cond: made)
    rounded = ((made.double() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert (tokenizer.decode(expected[:1], "a").int() - rounded.int()).abs().max() <= 1
    assert tokenizer.decode(expected[:1], "a").double().mean() == pytest.approx(float(rounded.double().mean()), abs=0.1)


def test_bf16_arithmetic_is_near_and_gives_fp32(models: Path, tmp_path: Path, draw: Callable[..., Path]) -> None:
    image = draw(tmp_path / "a.png")
    exact, rough = (load_tokenizer(models / "text.safetensors", device="cpu", precision=p).encode(image, "a") for p in ("fp32", "bf16"))
    assert rough.dtype == torch.float32
    assert 0 < (exact - rough).abs().max() < 0.1


# ------------------------------------------------------------------ datasets


@pytest.mark.parametrize("dtype", ["fp16", "fp32", "int8"])
def test_a_dataset_is_encoded_with_its_record(dtype: str, tokenizer: Tokenizer, tmp_path: Path, draw: Callable[..., Path]) -> None:
    for i in range(5):
        draw(tmp_path / f"{i}.png", seed=i, size=(40, 30 + i), part=0.5 if i == 1 else 1)
    failed: list[str] = []
    parts = list(
        encode_dataset(
            tokenizer,
            open_dataset([tmp_path]),
            list("abcde"),
            dtype=dtype,
            batch_size=2,
            on_error=lambda image_id, reason: failed.append(image_id),
            wanted=lambda index, digest: index != 3,
        )
    )
    assert failed == ["1.png"] and [indices for indices, _ in parts] == [[0, 2], [4]]
    header = parts[0][1].header
    assert (header.ids, header.captions, header.original_sizes) == (["0.png", "2.png"], ["a", "c"], [(40, 30), (40, 32)])
    assert header.input_sha256 == [sha256_file(tmp_path / name) for name in header.ids]
    assert (header.model_name, header.model_sha256, header.dtype) == ("text", tokenizer.info.sha256, dtype)
    assert (header.mean is not None) == (dtype == "int8")


def test_every_image_keeps_its_own_class_also_where_some_have_none(tokenizer: Tokenizer, tmp_path: Path, draw: Callable[..., Path]) -> None:
    for i in range(5):
        draw(tmp_path / f"{i}.png", seed=i)
    names = ["rose", "tulip", None, "oak", "elm"]
    items = [replace(item, class_name=name) for item, name in zip(open_dataset([tmp_path]).items, names, strict=True)]
    parts = [
        tokens for _, tokens in encode_dataset(tokenizer, Dataset(items), list("abcde"), batch_size=2, flips=True, on_error=unexpected)
    ]
    assert [part.header.class_names for part in parts] == [names[:2], names[:2], names[2:4], names[2:4], names[4:], names[4:]]


def test_int8_is_scaled_by_the_model_s_own_statistics(tokenizer: Tokenizer, tmp_path: Path, draw: Callable[..., Path]) -> None:
    draw(tmp_path / "a.png")
    with torch.no_grad():
        tokenizer.model.latent_mean.copy_(torch.linspace(-0.5, 0.25, 8))
        tokenizer.model.latent_std.copy_(torch.linspace(0.5, 1.5, 8))
    [(_, tokens)] = encode_dataset(tokenizer, open_dataset([tmp_path]), ["a"], dtype="int8", batch_size=1, on_error=unexpected)
    assert tokens.header.mean == pytest.approx(torch.linspace(-0.5, 0.25, 8).tolist())
    assert tokens.header.std == pytest.approx(torch.linspace(0.5, 1.5, 8).tolist())


@pytest.mark.parametrize(
    ("item_id", "caption", "reason"),
    [
        ("a.png", "half \ud83d", "a.png: its caption is not Unicode text"),
        ("a.png", "x" * 100_001, "a.png: its caption has 100,001 characters"),
        ("\udcff.png", "a", "its name is not Unicode text"),
    ],
)
def test_a_text_that_no_file_can_hold_is_refused_before_any_work(item_id: str, caption: str, reason: str, tokenizer: Tokenizer) -> None:
    dataset = Dataset([Item(item_id, "none")])
    with pytest.raises(DataError, match=reason):
        next(encode_dataset(tokenizer, dataset, [caption], batch_size=1, on_error=unexpected))


def test_tokens_make_the_way_back(tokenizer: Tokenizer, tmp_path: Path, draw: Callable[..., Path]) -> None:
    draw(tmp_path / "a.png")
    [(_, tokens)] = encode_dataset(tokenizer, open_dataset([tmp_path]), ["a dog"], dtype="fp32", batch_size=8, on_error=unexpected)
    assert isinstance(tokens, Tokens)
    assert torch.equal(
        tokenizer.decode(tokens.z, tokens.header.captions), tokenizer.decode(tokenizer.encode(tmp_path / "a.png", "a dog"), "a dog")
    )


# ------------------------------------------------------------------ models


def test_a_model_is_found_by_name_path_and_hash(bundled: Path) -> None:
    assert find_model("plain") == find_model(bundled / "plain.safetensors") == bundled / "plain.safetensors"
    assert find_model_by_hash(sha256_file(bundled / "other.safetensors"), "x", Path("t")) == bundled / "other.safetensors"
    with pytest.raises(CheckpointError, match=r"nope: no such model; bundled are other, plain, text.*; or give a file or hf://owner/name"):
        find_model("nope")
    with pytest.raises(CheckpointError, match=r"t: made with model x \(sha256 abababababab...\), which is not bundled.*--model"):
        find_model_by_hash("ab" * 32, "x", Path("t"))


CLASSES = {"source": "class_embedding", "num_classes": 3}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_class_embeddings_take_names_of_classes(
    precision: Any, tmp_path: Path, save_model: Callable[..., Path], draw: Callable[..., Path]
) -> None:
    tokenizer = load_tokenizer(save_model(tmp_path / "classes.safetensors", 0, CLASSES, ["a", "b", "c"]), device="cpu", precision=precision)
    z = tokenizer.encode(draw(tmp_path / "a.png"), "b")
    expected = tokenizer.model.resolve(None, torch.tensor([1]))
    assert expected is not None and torch.equal(tokenizer._condition("b", 1).tokens, expected.tokens)
    assert not torch.equal(z, tokenizer.encode(tmp_path / "a.png", "c"))
    assert not torch.equal(tokenizer.decode(z, "b"), tokenizer.decode(z, "c"))
    for wrong, message in (
        (None, "classes: needs the class of each image"),
        ("d", "image 0: class 'd' is not among the 3 training classes, such as 'a'"),
    ):
        with pytest.raises(DataError, match=message):
            tokenizer.encode(tmp_path / "a.png", wrong)


@pytest.mark.parametrize("classes", [None, ["a", "b", "c"]])
def test_class_embeddings_have_no_token_files(
    classes: list[str] | None,
    tmp_path: Path,
    save_model: Callable[..., Path],
    texttok: Callable[..., Any],
    bundled: Path,
    draw: Callable[..., Path],
) -> None:
    path, image = save_model(tmp_path / "classes.safetensors", 0, CLASSES, classes), draw(tmp_path / "a.png")
    told = "but not for encode, decode or sample"
    save_tiny_generator(tmp_path / "g.safetensors", path, BY_CLASS)
    assert texttok("encode", image, "-m", "plain").code == 0
    for command in (
        ("encode", image, "-m", path, "-o", tmp_path / "out"),
        ("encode", tmp_path, "-m", path, "-o", tmp_path / "out"),
        ("decode", tmp_path / "a.tok.safetensors", "-m", path, "-o", tmp_path / "out"),
        ("sample", "-m", tmp_path / "g.safetensors", "--class", "0", "-o", tmp_path / "out"),
    ):
        outcome = texttok(*command, "-q")
        assert outcome.code == 1 and outcome.err.startswith("texttok: classes: ") and told in outcome.err and outcome.err.count("\n") == 1
        assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match=told):
        next(encode_dataset(load_tokenizer(path), open_dataset([image]), None, batch_size=1, on_error=unexpected))


@pytest.mark.parametrize("variable", ["TEXTTOK_OFFLINE", "HF_HUB_OFFLINE"])
def test_the_hub_is_left_alone_offline(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[bool] = []

    def download(repo: str, filename: str, *, local_files_only: bool) -> str:
        asked.append(local_files_only)
        raise huggingface_hub.errors.LocalEntryNotFoundError("some lines\nof the hub's")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for name in ("TEXTTOK_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    missing = r"^hf://owner/name: model.safetensors is not in the local cache"
    with pytest.raises(CheckpointError, match=rf"{missing}, and the hub does not answer: check the network, or give a local file instead$"):
        find_model("hf://owner/name")
    monkeypatch.setenv(variable, "1")
    with pytest.raises(CheckpointError, match=rf"{missing}: run once without --offline, or give a local file instead$"):
        find_model("hf://owner/name")
    assert asked == [False, True]


def test_offline_holds_for_the_text_encoder_too(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    honest = inference.load_text_encoder
    monkeypatch.setattr(inference, "load_text_encoder", lambda cfg, **how: asked.append(how["offline"]) or honest(cfg, **how))
    for offline in (False, True):
        load_tokenizer(models / "text.safetensors", device="cpu", offline=offline)
    assert asked == [False, True]


def test_a_malformed_hub_name_is_one_line() -> None:
    with pytest.raises(CheckpointError, match=r"^hf://a/b/c/d: ") as error:
        find_model("hf://a/b/c/d", offline=True)
    assert "\n" not in str(error.value)


def test_latents_can_be_trained_on(tokenizer: Tokenizer, tmp_path: Path, draw: Callable[..., Path]) -> None:
    """In the caller's own graph, also on a CPU, where nothing copies them out of inference mode."""
    z, head = tokenizer.encode(draw(tmp_path / "a.png"), "a"), torch.nn.Linear(8, 1)
    head(z).sum().backward()
    assert head.weight.grad is not None
    z.requires_grad_().square().sum().backward()
    assert z.grad is not None


@pytest.mark.parametrize("precision", ["fp16", torch.bfloat16])
def test_a_precision_that_there_is_not_is_refused(precision: Any, models: Path) -> None:
    """Nothing would compute in it, and a report would say that it did."""
    with pytest.raises(BackendError, match=r"precision .*: there are fp32 and bf16"):
        load_tokenizer(models / "text.safetensors", precision=precision)


@pytest.mark.parametrize(
    ("images", "captions", "message"),
    [
        (np.zeros((1, 3, 32, 32), np.uint8), ["a"], "ndarray: is not an image; give paths"),
        ([torch.zeros(3, 32, 32, dtype=torch.uint8)], ["a"], "Tensor: is not an image; give paths"),
        (torch.zeros(0, 3, 32, 32, dtype=torch.uint8), [], "no image to encode"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), ["a", None], "None: is not a caption"),
    ],
)
def test_what_python_could_hand_over_by_mistake_is_named(images: Any, captions: Any, message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=message):
        tokenizer.encode(images, captions)


def test_a_data_set_without_all_captions_is_refused(tokenizer: Tokenizer, tmp_path: Path, draw: Callable[..., Path]) -> None:
    draw(tmp_path / "a.png")
    dataset = open_dataset(tmp_path)
    for captions, message in (([dataset.items[0].caption], r"a\.png: its caption is None"), (["a", "b"], r"1 image\(s\) and 2 caption")):
        with pytest.raises(DataError, match=message):
            next(encode_dataset(tokenizer, dataset, captions))  # type: ignore[arg-type]


def test_without_a_place_for_errors_a_damaged_image_ends_it(tokenizer: Tokenizer, tmp_path: Path, draw: Callable[..., Path]) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"none")
    with pytest.raises(DataError, match=r"b\.png: not an image"):
        list(encode_dataset(tokenizer, open_dataset(tmp_path), ["", ""]))


def test_tokens_decode_by_their_own_model_alone(models: Path, draw: Callable[..., Path], tmp_path: Path) -> None:
    text, plain = (load_tokenizer(models / f"{name}.safetensors", device="cpu") for name in ("text", "plain"))
    dataset = open_dataset(draw(tmp_path / "a.png"))
    [(_, tokens)] = encode_dataset(text, dataset, ["a red ramp"])
    assert torch.equal(text.decode_tokens(tokens), text.decode(tokens.z, ["a red ramp"]))
    assert torch.equal(text.decode_tokens(tokens, ["blue"]), text.decode(tokens.z, ["blue"]))
    with pytest.raises(TokenFileError, match=r"^was made with model text \(sha256 [0-9a-f]{12}\.\.\.\), not with plain \("):
        plain.decode_tokens(tokens)
