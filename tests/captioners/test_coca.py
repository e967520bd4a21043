"""A tiny randomly initialised CoCa of open_clip: what it writes, and how its weights are found."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from texttok_cli.captioners.base import Subject, Written
from texttok_cli.captioners.coca import END, START, CoCa
from texttok_cli.errors import BackendError

open_clip = pytest.importorskip("open_clip")
coca_model = pytest.importorskip("open_clip.coca_model")
CONTEXT = 12
TEXT = {"context_length": CONTEXT, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
TINY = {
    "embed_dim": 32,
    "multimodal_cfg": {**TEXT, "mlp_ratio": 2, "dim_head": 16, "n_queries": 4, "attn_pooler_heads": 2},
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "attentional_pool": True,
                   "attn_pooler_heads": 2, "output_tokens": True},
    "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    "custom_text": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coca")
    (folder / "coca-tiny.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("coca-tiny")
    with torch.no_grad():  # far from the initial zeros, so that the image decides what is written
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    torch.save(model.state_dict(), folder / "first-try.pt")
    return folder / "first-try.pt"


@pytest.fixture(scope="module")
def coca(weights: Path) -> CoCa:
    return CoCa("coca-tiny", str(weights), offline=True)


def pictures(count: int = 4) -> list[Image.Image]:
    drawn = np.random.default_rng(0).integers(0, 256, (count, 40, 50, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in drawn]


def pixels_of(coca: CoCa) -> torch.Tensor:
    return torch.stack([coca.prepare(image) for image in pictures()])


@pytest.fixture
def own_generate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """open_clip's `generate`, with what it needs of transformers where version 5 has moved or dropped some of its imports."""
    generation = pytest.importorskip("transformers.generation")
    for name in ("LogitsProcessorList", "RepetitionPenaltyLogitsProcessor", "MinLengthLogitsProcessor", "StoppingCriteriaList"):
        monkeypatch.setattr(coca_model, name, getattr(generation, name), raising=False)
    monkeypatch.setattr(coca_model, "MaxLengthCriteria", generation.MaxLengthCriteria, raising=False)
    monkeypatch.setitem(coca_model.GENERATION_TYPES, "top_k", generation.TopKLogitsWarper)
    monkeypatch.setattr(coca_model, "_has_transformers", True)
    yield


def test_it_writes_what_open_clips_generate_writes(coca: CoCa, own_generate: None) -> None:
    pixels = pixels_of(coca)
    theirs = coca.network.generate(pixels, seq_len=CONTEXT, generation_type="top_k", top_k=1)
    ours = coca._generate(pixels)
    end = END
    assert theirs.shape[1] == CONTEXT
    for mine, other in zip(ours.tolist(), theirs.tolist(), strict=True):
        # Theirs puts an end where the room ends; up to there they must be the same.
        assert mine[: other.index(end)] == other[: other.index(end)]


def test_a_batch_gives_every_image_the_caption_it_gets_alone(coca: CoCa) -> None:
    images = pictures()
    captions = coca([Subject(image) for image in images])
    assert captions == [coca([Subject(image)])[0] for image in images]
    assert len({caption.text for caption in captions}) > 1
    assert all(isinstance(caption, Written) and "<" not in caption.text for caption in captions)


def test_the_end_comes_not_too_early_and_ends_each_row(coca: CoCa, monkeypatch: pytest.MonkeyPatch) -> None:
    cat, end = open_clip.get_tokenizer("coca-tiny").encode("cat")[0], END
    right = coca.network.forward

    def forced(image: torch.Tensor, text: torch.Tensor | None = None, **options: object) -> dict[str, torch.Tensor]:
        out = right(image, text, **options)
        if text is not None:  # the first image always wants to end, the second after seven tokens; both have "cat" next
            out["logits"] = torch.zeros_like(out["logits"])
            out["logits"][:, :, cat] = 1
            out["logits"][0, :, end] = 2
            out["logits"][1, :, end] = 2 if text.shape[1] >= 7 else 0
        return out

    monkeypatch.setattr(coca.network, "forward", forced)
    assert coca([Subject(image) for image in pictures(2)]) == [Written("cat cat cat cat"), Written("cat cat cat cat cat cat")]


def test_text_reads_as_a_sentence_and_nothing_is_a_failure(coca: CoCa) -> None:
    words = open_clip.get_tokenizer("coca-tiny").encode("a man's dog, asleep. it's red!")
    assert coca._read([START, *words, END, END]) == Written("a man's dog, asleep. it's red!")
    assert coca._read([START, END]) == Written("")


def test_it_is_recorded_without_its_path(coca: CoCa) -> None:
    assert (coca.backend, coca.model, coca.prompt) == ("coca", "coca-tiny/first-try.pt", None)


@pytest.mark.parametrize(
    ("name", "weights"), [("ViT-B-32", "openai"), ("nothing", "x"), ("coca_roberta-ViT-B-32", "x"), ("coca_ViT-B-32", "laion")]
)
def test_what_is_not_to_be_had_is_one_line(name: str, weights: str) -> None:
    with pytest.raises(BackendError):
        CoCa(name, weights, offline=True)


def test_a_file_of_something_else_is_one_line(weights: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    torch.save({"weight": torch.zeros(2)}, other)
    for content in (other.read_bytes(), b"nothing of the kind"):
        other.write_bytes(content)
        with pytest.raises(BackendError, match=r"other.pt"):
            CoCa("coca-tiny", str(other), offline=True)
