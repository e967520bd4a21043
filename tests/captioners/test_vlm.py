"""Tiny randomly initialised models of each kind, saved and captioned with, offline."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import FLORENCE_TASK, pictures
from transformers import AutoConfig, LlavaForConditionalGeneration, LlavaProcessor

from texttok_cli.captioners.base import CaptionFailed, CaptionInput, Written
from texttok_cli.captioners.prompts import Prompt, load_prompt
from texttok_cli.captioners.vlm import VisionLanguageModel
from texttok_cli.errors import BackendError

Run = Callable[..., Any]
Draw = Callable[..., Path]
PROMPT = Prompt("caption", 1, "w1 w2 w3")
# What each kind is told beside the image, and what is recorded as its prompt.
TOLD = {
    "llava": ("<s> USER: <image> <image> <image> <image> w1 w2 w3 ASSISTANT:", PROMPT.text),
    "blip": (None, None),
    "encoder_decoder": (None, None),
    "florence2": (" ".join([*["<image>"] * 5, "<s>", FLORENCE_TASK, "</s>"]), "<MORE_DETAILED_CAPTION>"),
    "blip2": ("<image> <image> <image> Question: w1 w2 w3 Answer:", PROMPT.text),
    "instructblip": ("<image> <image> <image> w1 w2 w3", PROMPT.text),
    "paligemma": ("<image> <image> <image> <image> <s> describe en", "<image>describe en"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vlm")
    return {kind: getattr(tiny_models, kind)(folder / kind) for kind in TOLD}


@pytest.fixture(scope="module")
def chatting(folders: dict[str, Path]) -> VisionLanguageModel:
    return load(folders["llava"])


def load(folder: Path | str, **options: Any) -> VisionLanguageModel:
    defaults: dict[str, Any] = {"max_tokens": 8, "offline": True}
    return VisionLanguageModel(str(folder), PROMPT, **{**defaults, **options})


def subjects(count: int = 3) -> list[CaptionInput]:
    return [CaptionInput(image) for image in pictures(count)]


@pytest.mark.parametrize("kind", list(TOLD))
def test_each_kind_is_told_in_its_form_and_captions_every_image_by_itself(kind: str, folders: dict[str, Path]) -> None:
    captioner = load(folders[kind])
    captions = captioner(subjects())
    assert captions == [captioner([subject])[0] for subject in subjects()]
    for written in captions:
        assert isinstance(written, Written) and 0 < len(written.text.split()) <= 8 and "w1 w2 w3" not in written.text
    assert (captioner.backend, captioner.model, captioner.prompt and captioner.prompt.text) == ("vlm", kind, TOLD[kind][1])

    inputs = captioner.processor.inputs(pictures(), captioner._text)
    asked = inputs.get("input_ids")
    assert (None if asked is None else " ".join(captioner.processor.tokenizer.decode(asked[0]).split())) == TOLD[kind][0]
    found = captioner.network.generate(**inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)
    first, second, _ = found.logits[0]
    assert (first - second).abs().max() > 0.01, "the image plays a part"


def test_a_caption_is_what_the_model_writes_behind_the_chat(chatting: VisionLanguageModel, folders: dict[str, Path]) -> None:
    processor = LlavaProcessor.from_pretrained(folders["llava"])
    inputs = processor(text="USER: <image> w1 w2 w3 ASSISTANT:", images=pictures(1), return_tensors="pt")
    ids = inputs["input_ids"]
    assert ids[0, 0] == 1  # one <s>, from the tokenizer here and from the template there
    model = LlavaForConditionalGeneration.from_pretrained(folders["llava"], dtype=torch.float32)
    for _ in range(8):  # greedy by hand, without a cache
        following = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[:, -1:].argmax(dim=-1)
        ids = torch.cat([ids, following], dim=1)
    assert chatting(subjects(1)) == [Written(processor.tokenizer.decode(ids[0, -8:]), complete=False)]


def test_the_end_of_a_text_and_the_limit_of_tokens_are_told_apart(folders: dict[str, Path]) -> None:
    captioner = load(folders["blip"])
    captioner.network.generate = lambda **_: torch.tensor([[1, 8, 9, 2, 0, 0, 0, 0], [1, *range(8, 15)], [1, 8, 9, 10, 11, 12, 13, 2]])
    assert [written.complete for written in captioner(subjects())] == [True, False, True]


def test_thoughts_are_no_part_of_a_caption(chatting: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    written = ["<think>\nw1?\n</think>\n\nw2 w3", "<think> w1?", "w2 w3"]
    monkeypatch.setattr(chatting.processor.tokenizer, "batch_decode", lambda *_, **__: written)
    first, second, third = chatting(subjects())
    assert [first, third] == [Written("w2 w3", complete=False)] * 2 and isinstance(second, CaptionFailed)
    monkeypatch.setattr(chatting, "_text", f"{chatting._text} <think>")  # then thoughts have no opening mark of their own
    first, second, third = chatting(subjects())
    assert first == Written("w2 w3", complete=False) and isinstance(second, CaptionFailed) and isinstance(third, CaptionFailed)


def test_bf16_and_a_device_map(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForImageTextToText

    right, asked = AutoModelForImageTextToText.from_pretrained, []
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *args, **how: asked.append(how) or right(*args, **how))
    captioner = load(folders["llava"], dtype=torch.bfloat16, device_map="auto")
    assert asked[0]["dtype"] == torch.bfloat16 and asked[0]["device_map"] == "auto" and asked[0]["trust_remote_code"] is False
    assert captioner.network.dtype == torch.bfloat16
    assert all(isinstance(written, Written) and written.text for written in captioner(subjects()))


def test_an_image_that_is_refused_fails_alone(chatting: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(chatting.processor.whole.image_processor)
    right = kind.__call__

    def narrow(self: Any, images: Any, **options: Any) -> Any:
        if any(image.width > 100 * image.height for group in images for image in (group if isinstance(group, list) else [group])):
            raise ValueError("absolute aspect ratio must be\nsmaller than 100")
        return right(self, images, **options)

    monkeypatch.setattr(kind, "__call__", narrow)
    first, last = subjects(2)
    outcomes = chatting([first, CaptionInput(Image.new("RGB", (300, 2))), last])
    assert isinstance(outcomes[1], CaptionFailed)
    assert str(outcomes[1]) == "the model's processor refuses it: absolute aspect ratio must be smaller than 100"
    assert [outcomes[0], outcomes[2]] == chatting([first, last])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("MPS backend out of memory (MPS allocated: 8.89 GB)")])
def test_too_little_memory_names_the_remedy(error: Exception, chatting: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> None:
        raise error

    monkeypatch.setattr(chatting.network, "generate", full)
    with pytest.raises(BackendError, match=r"3 images at once; use a smaller --batch-size$"):
        chatting(subjects())


def half(folder: Path) -> None:
    """The files with one weight taken out."""
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "lm_head" in name or "q_proj" in name))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def text_only(folder: Path) -> None:
    AutoConfig.for_model("bert", hidden_size=8).save_pretrained(folder)


def needs_code(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "their_own", "auto_map": {"AutoConfig": "theirs.Config"}}')
    (folder / "theirs.py").write_text("raise SystemExit('their code was run')")


def no_queries(folder: Path) -> None:
    """As repositories were before the processor knew how many places an image takes: the image would get lost."""
    file = folder / "processor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_query_tokens": None}))


@pytest.mark.parametrize(
    ("kind", "harm"), [("llava", half), ("llava", cut), ("llava", text_only), ("llava", needs_code), ("blip2", no_queries)]
)
def test_a_folder_that_is_no_whole_model_is_one_line(
    kind: str, harm: Callable[[Path], None], folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders[kind], tmp_path / "broken")
    harm(tmp_path / "broken")
    with pytest.raises(BackendError, match=r"broken: ") as error:
        load(tmp_path / "broken")
    assert "\n" not in str(error.value)


def test_models_that_are_not_there_or_no_captioners_are_one_line(tmp_path: Path) -> None:
    for name in (str(tmp_path), "nobody/no-such-model", str(tiny_models.language_model(tmp_path / "lm"))):
        with pytest.raises(BackendError, match=rf"--model {name}: not a captioning model") as err:
            load(name)
        assert "\n" not in str(err.value)


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
