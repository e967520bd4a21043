"""Tiny randomly initialised models of real classes, saved as a person would have them in a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    BartConfig,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessor,
)

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:"]
WORDS = [*SPECIAL, *(f"w{i}" for i in range(57))]
SIDE = 16
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
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}ASSISTANT:"
)
TEXT_CHAT = "{% for message in messages %}USER: {{ message['content'] }} {% endfor %}ASSISTANT:"


def words(**options: object) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=SPECIAL[4:], **special, **options)


def llava(folder: Path) -> Path:
    """Image and text to text, with a chat template; the prompt is repeated in what it generates."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT, **ENDS), image_token_index=WORDS.index("<image>")
    )
    _liven(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    images = CLIPImageProcessor(size=SIZE, crop_size=SIZE)
    processor = LlavaProcessor(
        images, words(), patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=CHAT
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
