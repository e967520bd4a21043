"""A tiny randomly initialised CoCa of open_clip: what it writes, and how its weights are found."""

from collections.abc import Iterator
from pathlib import Path

import hub_cache
import pytest
import tiny_models
import torch
from tiny_models import COCA_CONTEXT, pictures

from texttok_cli.captioners.base import CaptionInput, Written
from texttok_cli.captioners.coca import END, START, CoCa
from texttok_cli.errors import BackendError

open_clip = pytest.importorskip("open_clip")
coca_model = pytest.importorskip("open_clip.coca_model")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, empty whatever this machine has in its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.coca(tmp_path_factory.mktemp("coca"))


@pytest.fixture(scope="module")
def coca(weights: Path) -> CoCa:
    return CoCa("coca-tiny", str(weights), offline=True)


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
    theirs = coca.network.generate(pixels, seq_len=COCA_CONTEXT, generation_type="top_k", top_k=1)
    assert theirs.shape[1] == COCA_CONTEXT
    for mine, other in zip(coca._generate(pixels).tolist(), theirs.tolist(), strict=True):
        # Theirs puts an end where the room ends; up to there they must be the same.
        assert mine[: other.index(END)] == other[: other.index(END)]


def test_a_batch_gives_every_image_the_caption_it_gets_alone(coca: CoCa) -> None:
    captions = coca([CaptionInput(image) for image in pictures()])
    assert captions == [coca([CaptionInput(image)])[0] for image in pictures()]
    assert all(isinstance(caption, Written) and "<" not in caption.text for caption in captions)
    first, second, *_ = coca.network(pixels_of(coca), torch.full((3, 1), START), output_labels=False)["logits"]
    assert (first - second).abs().max() > 0.01, "the image plays a part"


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
    assert coca([CaptionInput(image) for image in pictures(2)]) == [Written("cat cat cat cat"), Written("cat cat cat cat cat cat")]


def test_text_reads_as_a_sentence_up_to_its_end(coca: CoCa) -> None:
    words = open_clip.get_tokenizer("coca-tiny").encode("a man's dog, asleep. it's red!")
    assert coca._read([START, *words, END, *words]) == Written("a man's dog, asleep. it's red!")
    assert coca._read([START, *words]) == Written("a man's dog, asleep. it's red!", complete=False)
    assert coca._read([START, END]) == Written("")


def test_it_is_recorded_without_its_path(coca: CoCa) -> None:
    assert (coca.backend, coca.model, coca.prompt) == ("coca", "coca-tiny/first-try.pt", None)


@pytest.mark.parametrize(
    ("name", "weights", "said"),
    [
        ("ViT-B-32", "openai", r"not a CoCa of open_clip's; it has .*coca_ViT-B-32"),
        ("nothing", "x", "not a CoCa of open_clip's"),
        ("coca_roberta-ViT-B-32", "x", "not a CoCa of open_clip's"),
        ("coca_ViT-B-32", "laion", "--weights laion: neither a file nor a tag of coca_ViT-B-32"),
        ("coca_ViT-B-32", "laion2b_s13b_b90k", "--offline: name a local file with --weights FILE"),
    ],
)
def test_what_is_not_to_be_had_is_one_line(name: str, weights: str, said: str) -> None:
    with pytest.raises(BackendError, match=said):
        CoCa(name, weights, offline=True)


def test_weights_that_are_cached_need_no_network(weights: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "coca-tiny", {"tag": {"hf_hub": "somebody/tiny/"}})
    hub_cache.put(cache, "somebody/tiny", "open_clip_pytorch_model.bin", weights)
    coca = CoCa("coca-tiny", "tag", offline=True)
    assert coca.model == "coca-tiny/tag"
    loaded = coca.network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in torch.load(weights).items())


def test_a_file_of_something_else_is_one_line(weights: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    torch.save({"weight": torch.zeros(2)}, other)
    for content in (other.read_bytes(), b"nothing of the kind"):
        other.write_bytes(content)
        with pytest.raises(BackendError, match=r"other.pt: could not be loaded as weights of coca-tiny"):
            CoCa("coca-tiny", str(other), offline=True)
