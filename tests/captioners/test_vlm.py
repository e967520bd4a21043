"""Tiny randomly initialised models, one that chats (LLaVA) and one that only captions (BLIP), saved and captioned with, offline."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from texttok_cli.captioners.base import CaptionFailed, Subject, Written
from texttok_cli.captioners.prompts import Prompt
from texttok_cli.captioners.vlm import VisionLanguageModel
from texttok_cli.errors import BackendError

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
WORDS = ["user", ":", "assistant", "describe", "the", "image", "say", "more", *(f"w{i}" for i in range(40))]
TEMPLATE = (
    "<s>{% for m in messages %}{{ m['role'] }} : {% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
SIDE = 16


def scaled(model: Any) -> Any:
    """Far enough from the initial near-zeros that the image and the prompt decide what is written."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model.eval()


def llava_tokenizer() -> PreTrainedTokenizerFast:
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlm") / "tiny-llava"
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**shape, image_size=SIDE, patch_size=8)
    text = LlamaConfig(**shape, num_key_value_heads=2, vocab_size=len(SPECIAL + WORDS), pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=4, vision_feature_layer=-1)
    model = scaled(LlavaForConditionalGeneration(config))
    with torch.no_grad():  # words only: an image mark among what is written would be taken for another image
        model.lm_head.weight[: len(SPECIAL)] = 0
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    LlavaProcessor(
        images,
        llava_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vlm") / "tiny-blip"
    torch.manual_seed(0)
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "[DEC]", *WORDS]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}, bos_token="[DEC]")
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {"bos_token_id": 5, "sep_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
    text = {**shape, **marks, "vocab_size": len(words), "encoder_hidden_size": 32}
    # The vision part's default range of initial weights is 1e-10: every image would look alike.
    config = BlipConfig(
        text_config=text, vision_config={**shape, "image_size": SIDE, "patch_size": 8, "initializer_range": 0.02}, projection_dim=16
    )
    scaled(BlipForConditionalGeneration(config)).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": SIDE, "width": SIDE}), tokenizer).save_pretrained(folder)
    return folder


def pictures(count: int = 3) -> list[Image.Image]:
    drawn = np.random.default_rng(0).integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
    return [Image.fromarray(pixels).resize((24, 20)) for pixels in drawn]


@pytest.fixture(scope="module")
def chatting(llava: Path) -> VisionLanguageModel:
    return load(llava)


PROMPT = Prompt("caption", 1, "describe the image")


def load(folder: Path, **options: Any) -> VisionLanguageModel:
    defaults: dict[str, Any] = {"max_tokens": 8, "offline": True}
    return VisionLanguageModel(str(folder), PROMPT, **{**defaults, **options})


def texts(captioner: VisionLanguageModel, images: list[Image.Image]) -> list[str]:
    outcomes = captioner([Subject(image) for image in images])
    assert all(isinstance(outcome, Written) for outcome in outcomes)
    return [outcome.text for outcome in outcomes if isinstance(outcome, Written)]


def test_a_chat_model_is_known_by_its_folder_and_keeps_the_prompt(chatting: VisionLanguageModel) -> None:
    assert (chatting.backend, chatting.model, chatting.prompt) == ("vlm", "tiny-llava", PROMPT)


def test_a_caption_is_what_the_model_writes_behind_the_chat(chatting: VisionLanguageModel, llava: Path) -> None:
    image = pictures(1)[0]
    caption = texts(chatting, [image])[0]
    processor = LlavaProcessor.from_pretrained(llava)
    inputs = processor(text="user : <image> describe the image assistant :", images=image, return_tensors="pt")
    assert inputs["input_ids"][0, 0] == 1  # one <s>, from the tokenizer here and from the template there
    model = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32)
    ids = inputs["input_ids"]
    expected: list[int] = []
    while len(expected) < 8 and 2 not in expected:  # greedy by hand, without a cache
        logits = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1]
        expected.append(int(logits.argmax()))
        ids = torch.cat([ids, ids.new_tensor([expected[-1:]])], dim=1)
    assert caption == processor.tokenizer.decode(expected, skip_special_tokens=True).strip()


@pytest.mark.parametrize("kind", ["llava", "blip"])
def test_a_batch_gives_every_image_the_caption_it_gets_alone(kind: str, request: pytest.FixtureRequest) -> None:
    captioner = load(request.getfixturevalue(kind))
    images = pictures()
    captions = texts(captioner, images)
    assert captions == [texts(captioner, [image])[0] for image in images]
    assert len(set(captions)) == 3
    assert all(0 < len(caption.split()) <= 8 for caption in captions)


def test_an_image_to_text_model_gets_no_instruction(blip: Path) -> None:
    captioner = load(blip)
    assert captioner.prompt is None


def test_bf16_loads_as_bf16(llava: Path) -> None:
    captioner = load(llava, dtype=torch.bfloat16, device_map="auto")
    assert captioner.network.dtype == torch.bfloat16
    assert texts(captioner, pictures(1))


def test_an_image_that_is_refused_fails_alone(chatting: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(chatting.processor.whole.image_processor)
    right = kind.__call__

    def narrow(self: Any, images: Any, **options: Any) -> Any:
        if any(image.width > 100 * image.height for group in images for image in (group if isinstance(group, list) else [group])):
            raise ValueError("absolute aspect ratio must be\nsmaller than 100")
        return right(self, images, **options)

    monkeypatch.setattr(kind, "__call__", narrow)
    first, last = pictures(2)
    outcomes = chatting([Subject(first), Subject(Image.new("RGB", (300, 2))), Subject(last)])
    assert isinstance(outcomes[1], CaptionFailed)
    assert str(outcomes[1]) == "the model's processor refuses it: absolute aspect ratio must be smaller than 100"
    assert [outcomes[0], outcomes[2]] == chatting([Subject(first), Subject(last)])


def test_too_little_memory_names_the_remedy(chatting: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(chatting.network, "generate", full)
    with pytest.raises(BackendError, match=r"3 images at once; take a smaller --batch-size$"):
        chatting([Subject(image) for image in pictures()])


def half(folder: Path) -> None:
    """Llava's files with one weight taken out."""
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


@pytest.mark.parametrize("harm", [half, cut, text_only, needs_code])
def test_a_folder_that_is_no_whole_model_is_one_line(harm: Callable[[Path], None], llava: Path, tmp_path: Path) -> None:
    shutil.copytree(llava, tmp_path / "broken")
    harm(tmp_path / "broken")
    with pytest.raises(BackendError, match=r"broken: ") as error:
        load(tmp_path / "broken")
    assert "\n" not in str(error.value)


def test_a_model_that_is_not_there_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"no/such-model: "):
        load(Path("no/such-model"))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(BackendError, match=r"nothing: "):
        load(tmp_path / "nothing")
