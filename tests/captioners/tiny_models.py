"""Tiny randomly initialised models of real classes, saved as a person would have them in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GemmaConfig,
    GPT2Config,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    T5Config,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:"]
FLORENCE_TASK = "Describe with a paragraph what is shown in the image."  # its processor's words for <MORE_DETAILED_CAPTION>
WORDS = [*SPECIAL, "Question:", "Answer:", "describe", "en", *FLORENCE_TASK.split(), *(f"w{i}" for i in range(43))]
SIDE = 16
QUERIES = 3
COCA_CONTEXT = 12
SIZE = {"height": SIDE, "width": SIDE}
TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": len(WORDS)}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CHAT = (
    "<s>{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}ASSISTANT:"
)
TEXT_CHAT = "{% for message in messages %}USER: {{ message['content'] }} {% endfor %}ASSISTANT:"


def pictures(count: int = 3) -> list[Image.Image]:
    drawn = np.random.default_rng(0).integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
    return [Image.fromarray(pixels).resize((24, 20)) for pixels in drawn]


def words(*, starts: bool = False, **options: object) -> PreTrainedTokenizerFast:
    """A word a token; with `starts` a start token before every text."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if starts:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=SPECIAL[4:], **special, **options)


def llava(folder: Path) -> Path:
    """Image and text to text; template and tokenizer both write a start token. The prompt is repeated in what it generates."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT, **ENDS), image_token_index=WORDS.index("<image>")
    )
    model = _liven(LlavaForConditionalGeneration(config))
    with torch.no_grad():  # words only: an image mark among what is written would be taken for another image
        model.lm_head.weight[: len(SPECIAL)] = 0
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size=SIZE, crop_size=SIZE)
    processor = LlavaProcessor(
        images,
        words(starts=True),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    processor.save_pretrained(folder)
    return folder


def blip(folder: Path) -> Path:
    """Image to text; without a chat template."""
    torch.manual_seed(0)
    text = {**TEXT, "encoder_hidden_size": 32, "projection_dim": 32, "max_position_embeddings": 320, "sep_token_id": 2, **ENDS}
    _liven(BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=VISION))).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size=SIZE), words()).save_pretrained(folder)
    return folder


def encoder_decoder(folder: Path) -> Path:
    """Image to text by two parts, each with its own processor, as vit-gpt2-image-captioning is."""
    torch.manual_seed(3)
    decoder = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=len(WORDS), n_positions=320, **ENDS)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**VISION), decoder, decoder_start_token_id=1, **ENDS)
    _liven(VisionEncoderDecoderModel(config=config)).save_pretrained(folder)
    ViTImageProcessor(size=SIZE).save_pretrained(folder)
    words().save_pretrained(folder)
    return folder


def florence2(folder: Path) -> Path:
    """Image to text, told what to do by a task token."""
    torch.manual_seed(0)
    text = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, **ENDS}
    text |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": len(WORDS), "max_position_embeddings": 400}
    text |= {"decoder_start_token_id": 2, "forced_eos_token_id": 2}
    stages = {"depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True]}
    vision = {**stages, "embed_dim": [16, 32], "num_heads": [2, 2], "num_groups": [2, 2], "window_size": 2, "projection_dim": 32}
    config = Florence2Config(vision_config=vision, text_config=BartConfig(**text), image_token_id=WORDS.index("<image>"), **ENDS)
    _liven(Florence2ForConditionalGeneration(config)).save_pretrained(folder)
    images = CLIPImageProcessor(size=SIZE, crop_size=SIZE)
    images.image_seq_length = 5  # 2 x 2 places and their mean
    Florence2Processor(images, words(extra_special_tokens={"image_token": "<image>"})).save_pretrained(folder)
    return folder


def blip2(folder: Path) -> Path:
    """Image and text to text without a chat template, by a decoder, which repeats the prompt."""
    text = OPTConfig(
        hidden_size=32, ffn_dim=32, word_embed_proj_dim=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(WORDS), **ENDS
    )
    config = Blip2Config(text_config=text, **_querying())
    _liven(Blip2ForConditionalGeneration(config)).save_pretrained(folder)
    Blip2Processor(BlipImageProcessor(size=SIZE), words(), num_query_tokens=QUERIES).save_pretrained(folder)
    return folder


def instructblip(folder: Path) -> Path:
    """Image and text to text without a chat template, by an encoder and a decoder; the text goes to the querying part too."""
    text = T5Config(d_model=32, d_ff=32, d_kv=16, num_layers=1, num_heads=2, vocab_size=len(WORDS), decoder_start_token_id=0, **ENDS)
    config = InstructBlipConfig(text_config=text, **_querying())
    _liven(InstructBlipForConditionalGeneration(config)).save_pretrained(folder)
    InstructBlipProcessor(BlipImageProcessor(size=SIZE), words(), words(), num_query_tokens=QUERIES).save_pretrained(folder)
    return folder


def _querying() -> dict[str, object]:
    torch.manual_seed(0)
    return {
        "vision_config": VISION,
        "qformer_config": {**TEXT, "encoder_hidden_size": 32, "cross_attention_frequency": 1},
        "num_query_tokens": QUERIES,
        "image_token_index": WORDS.index("<image>"),
    }


def paligemma(folder: Path) -> Path:
    """Image and text to text, told what to do by a task in words; the prompt is repeated in what it generates."""
    torch.manual_seed(0)
    vision = SiglipVisionConfig(**VISION, vision_use_head=False, projection_dim=32)
    text = GemmaConfig(**TEXT, head_dim=16, num_key_value_heads=1, **ENDS)
    config = PaliGemmaConfig(vision_config=vision, text_config=text, image_token_id=WORDS.index("<image>"), projection_dim=32)
    _liven(PaliGemmaForConditionalGeneration(config)).save_pretrained(folder)
    images = SiglipImageProcessor(size=SIZE)
    images.image_seq_length = 4
    PaliGemmaProcessor(images, words(extra_special_tokens={"image_token": "<image>"})).save_pretrained(folder)
    return folder


def coca(folder: Path) -> Path:
    """A weights file of open_clip's for a CoCa that is then known to it as coca-tiny."""
    text = {"context_length": COCA_CONTEXT, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    vision = {"image_size": SIDE, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "attentional_pool": True}
    config = {
        "embed_dim": 32,
        "multimodal_cfg": {**text, "mlp_ratio": 2, "dim_head": 16, "n_queries": 4, "attn_pooler_heads": 2},
        "vision_cfg": {**vision, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {**text, "embed_cls": True, "output_tokens": True},
        "custom_text": True,
    }
    (folder / "coca-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("coca-tiny")
    torch.nn.init.normal_(model.text_decoder.text_projection)  # open_clip leaves this one as the memory happens to be
    torch.save(_liven(model).state_dict(), folder / "first-try.pt")
    return folder / "first-try.pt"


def language_model(folder: Path, *, chats: bool = True) -> Path:
    """Text to text."""
    torch.manual_seed(0)
    _liven(LlamaForCausalLM(LlamaConfig(**TEXT, **ENDS))).save_pretrained(folder)
    words(**({"chat_template": TEXT_CHAT} if chats else {})).save_pretrained(folder)
    return folder


def _liven(model: torch.nn.Module) -> torch.nn.Module:
    """Far enough from the initial near-zeros that every input shows in the output."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model
