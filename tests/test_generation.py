"""Generators as the Python API offers them: what an image depends on, and which files belong together."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_generator import BY_CLASS, BY_TEXT, CLASSES, save_tiny_generator
from torch import Tensor

from texttok_cli import Generator, load_generator
from texttok_cli.checkpoint import load_tokenizer_file, save_tokenizer
from texttok_cli.data.labels import draw_label, find_class, spread_labels
from texttok_cli.diffusion import Guidance, Sampling, parse_cfg, sample
from texttok_cli.errors import CheckpointError, DataError, RecipeError, TextTokError
from texttok_cli.models.condition import Condition
from texttok_cli.models.layers import PackedLinear

FAST = {"steps": 3, "sampler": "ddim"}
UNSEEN = [{"class": name, "caption": f"{look} {name.partition('/')[2]}"} for name in CLASSES for look in ("a red", "a blue", "a pale")]


def write_captions(path: Path, rows: Sequence[dict[str, str]] = UNSEEN) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def near(a: Tensor, b: Tensor) -> bool:
    """Batches of another size round a few pixels differently."""
    return bool((a.int() - b.int()).abs().max() <= 1)


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    """Generators of each kind beside the tokenizers `text` and `plain`."""
    for name in ("text", "plain"):
        shutil.copy(models / f"{name}.safetensors", tmp_path)
    text, plain = tmp_path / "text.safetensors", tmp_path / "plain.safetensors"
    save_tiny_generator(tmp_path / "class.safetensors", text, BY_CLASS, captions=["a red rose", "a green rose"], class_counts=[1, 1, 2, 4])
    write_captions(tmp_path / "class.captions.jsonl")
    save_tiny_generator(tmp_path / "class-plain.safetensors", plain, BY_CLASS)
    save_tiny_generator(tmp_path / "prompt.safetensors", text, BY_TEXT)
    save_tiny_generator(tmp_path / "prompt-plain.safetensors", plain, BY_TEXT)
    return tmp_path


@pytest.fixture
def load(folder: Path) -> Callable[..., Generator]:
    return lambda name, **options: load_generator(folder / f"{name}.safetensors", device="cpu", **options)


def latents(generator: Generator, seeds: Sequence[int], class_ids: list[int] | None = None, cond: Condition | None = None) -> Tensor:
    return sample(
        generator.dit,
        Sampling("ddim", 3, parse_cfg("1.5")),
        seeds=seeds,
        class_ids=None if class_ids is None else torch.tensor(class_ids),
        cond=cond,
    )


def test_only_the_class_enters_the_generator_and_an_unseen_caption_the_detokenizer(load: Callable[..., Generator]) -> None:
    generator = load("class")
    images = generator.sample(classes=["flower/rose", "cat", 3], seeds=[5, 6, 7], **FAST)
    assert images.shape == (3, 3, 32, 32) and images.dtype == torch.uint8
    requests = generator.requests(classes=["flower/rose", "cat", 3], seeds=[5, 6, 7])
    assert [request.class_id for request in requests] == [2, 0, 3]
    captions = [str(request.text) for request in requests]
    for caption, name in zip(captions, ("flower/rose", "animal/cat", "machine/crane"), strict=True):
        assert {"class": name, "caption": caption} in UNSEEN
    z = latents(generator, [5, 6, 7], [2, 0, 3])
    assert near(images, generator.tokenizer.decode(z, captions))
    assert not near(images, generator.tokenizer.decode(z, ["something else"] * 3))


def test_captions_are_drawn_by_seed_and_all_are_used(load: Callable[..., Generator]) -> None:
    generator = load("class")
    drawn = [request.text for request in generator.requests(classes=["rose"], seeds=range(40))]
    assert set(drawn) == {"a red rose", "a blue rose", "a pale rose"}
    assert [request.text for request in generator.requests(classes=["rose"], seeds=[39, 3])] == [drawn[39], drawn[3]]


def test_one_text_embedding_serves_generator_and_detokenizer(load: Callable[..., Generator], monkeypatch: pytest.MonkeyPatch) -> None:
    generator = load("prompt")
    prompts = ["a small red boat on the sea", "a cat"]
    expected = generator.tokenizer.decode(latents(generator, [0, 1], cond=generator.tokenizer.text(prompts)), prompts)  # type: ignore[misc]
    generator = load("prompt")
    assert generator.text is generator.tokenizer.text and generator.text is not None
    encoder, asked = generator.text.encoder, []

    def counted(texts: Sequence[str]) -> Condition:
        asked.append(list(texts))
        return encoder(texts)

    monkeypatch.setattr(generator.text, "encoder", counted)
    images = generator.sample(prompts=prompts, **FAST)
    assert near(images, expected) and asked == [prompts]
    assert not near(images, generator.sample(prompts=prompts[::-1], seeds=[0, 1], **FAST))


def test_without_text_in_the_tokenizer(load: Callable[..., Generator]) -> None:
    by_class = load("class-plain")
    assert near(by_class.sample(classes=[1], seeds=[4], **FAST), by_class.tokenizer.decode(latents(by_class, [4], [1])))
    by_text = load("prompt-plain")
    assert by_text.text is not None and by_text.tokenizer.text is None
    expected = by_text.tokenizer.decode(latents(by_text, [4], cond=by_text.text(["a cat"])))
    assert near(by_text.sample(prompts="a cat", seeds=[4], **FAST), expected)


@pytest.mark.parametrize("how", [{"steps": 3, "sampler": "ddpm", "cfg": "3.8:power-cosine=4"}, {"steps": 4, "sampler": "dpm++2m"}])
def test_an_image_depends_on_its_seed_and_not_on_the_batch(how: dict[str, Any], load: Callable[..., Generator]) -> None:
    generator = load("class")
    together = generator.sample(classes="rose", seeds=range(5), **how)
    assert near(generator.sample(classes="rose", seeds=range(5), batch_size=2, **how), together)
    assert near(generator.sample(classes=["cat", "rose"], seeds=[9, 3], **how)[1:], together[3:4])
    assert not near(together[3], together[4])


def test_flow_models_and_their_default_sampler(folder: Path, load: Callable[..., Generator]) -> None:
    save_tiny_generator(folder / "flow.safetensors", folder / "plain.safetensors", BY_CLASS, process={"kind": "flow"})
    generator = load("flow")
    default = generator.sample(classes=[0], steps=3)
    assert near(default, generator.sample(classes=[0], steps=3, sampler="heun"))
    assert not near(default, generator.sample(classes=[0], steps=3, sampler="euler"))
    with pytest.raises(RecipeError, match="heun"):
        generator.sample(classes=[0], steps=3, sampler="ddpm")


def test_a_weaker_generator_guides(folder: Path, load: Callable[..., Generator]) -> None:
    text = folder / "text.safetensors"
    save_tiny_generator(folder / "weak.safetensors", text, BY_CLASS, seed=1)
    save_tiny_generator(folder / "renamed.safetensors", text, BY_CLASS, classes=["a", "b", "c", "d"])
    guided = load("class", guide=folder / "weak.safetensors").sample(classes=["rose"], cfg="2", **FAST)
    assert not near(guided, load("class").sample(classes=["rose"], cfg="2", **FAST))
    itself = load("class", guide=folder / "class.safetensors").sample(classes=["rose"], cfg="2", **FAST)
    assert near(itself, load("class").sample(classes=["rose"], cfg="1", **FAST))  # guided away from itself: not at all
    with pytest.raises(
        CheckpointError, match=r"class-plain: can't guide class: it makes the latents of tokenizer plain .* not of tokenizer text"
    ):
        load("class", guide=folder / "class-plain.safetensors")
    with pytest.raises(CheckpointError, match="other classes"):
        load("class", guide=folder / "renamed.safetensors")


def test_the_guide_is_the_model_that_was_named(folder: Path, load: Callable[..., Generator]) -> None:
    save_tiny_generator(folder / "weak.safetensors", folder / "text.safetensors", BY_CLASS, seed=1)
    guided, alone, weak = (
        load("class", guide=folder / "weak.safetensors"),
        load("class"),
        load("weak", captions=folder / "class.captions.jsonl"),
    )
    how = Sampling("ddim", 3, parse_cfg("2"))
    z = sample(alone.dit, how, seeds=[5], class_ids=torch.tensor([2]), guide=weak.dit)
    [request] = guided.requests(classes=["rose"], seeds=[5])
    image = guided.sample(classes=["rose"], seeds=[5], cfg="2", **FAST)
    assert near(image, guided.tokenizer.decode(z, str(request.text)))
    assert not near(image, alone.sample(classes=["rose"], seeds=[5], cfg="1", **FAST))


def test_each_prompt_has_the_seed_that_was_given_with_it(load: Callable[..., Generator]) -> None:
    requests = load("prompt").requests(prompts=["a cat", "a dog", "a boat"], seeds=[9, 3, 5])
    assert [(request.text, request.seed) for request in requests] == [("a cat", 9), ("a dog", 3), ("a boat", 5)]


def test_a_text_that_two_models_read_in_one_embedding_is_cut_once(load: Callable[..., Generator]) -> None:
    generator = load("prompt")
    generator.sample(prompts=["long " * 40, "a cat"], **FAST)
    assert generator.truncated == 1


def test_all_networks_have_the_precision_that_was_asked_for(folder: Path, load: Callable[..., Generator]) -> None:
    for precision, expected in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        generator = load("class", guide=folder / "class.safetensors", precision=precision)
        assert generator.guide is not None
        for network in (generator.dit, generator.guide, generator.tokenizer.model):
            linears = [module for module in network.modules() if isinstance(module, torch.nn.Linear | PackedLinear)]
            assert {linear.weight.dtype for linear in linears} == {expected}


def test_a_caption_that_was_trained_on_is_noticed(load: Callable[..., Generator]) -> None:
    requests = load("class").requests(classes=["rose"] * 12 + ["cat"] * 12)
    assert {request.text for request in requests if request.leaked} == {"a red rose"}
    assert all(request.leaked == (request.text == "a red rose") for request in requests)


def test_the_tokenizer_is_found_among_the_bundled(bundled: Path, tmp_path: Path) -> None:
    file = save_tiny_generator(tmp_path / "g.safetensors", bundled / "plain.safetensors", BY_CLASS)
    assert load_generator(file, device="cpu").tokenizer.info.name == "plain"


def test_the_tokenizer_beside_or_named(folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(folder / "class-plain.safetensors", alone / "g.safetensors")
    with pytest.raises(CheckpointError, match=r"g: makes the latents of tokenizer plain \(sha256 \w{12}\.\.\.\), .*--tokenizer") as error:
        load_generator(alone / "g.safetensors", device="cpu")
    assert "\n" not in str(error.value)
    named = load_generator(alone / "g.safetensors", tokenizer=folder / "plain.safetensors", device="cpu")
    shutil.copy(folder / "plain.safetensors", alone / "another-name.safetensors")
    beside = load_generator(alone / "g.safetensors", device="cpu")
    assert (named.tokenizer.info.name, beside.tokenizer.info.name) == ("plain", "another-name")
    assert torch.equal(named.sample(classes=[0], **FAST), beside.sample(classes=[0], **FAST))
    with pytest.raises(CheckpointError, match=r"g: makes the latents of tokenizer plain \(.*\), not of tokenizer text \("):
        load_generator(alone / "g.safetensors", tokenizer=folder / "text.safetensors", device="cpu")


def test_a_tokenizer_whose_detokenizer_was_trained_on_reads_the_same_latents(folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(folder / "class-plain.safetensors", alone / "g.safetensors")
    model, info = load_tokenizer_file(folder / "plain.safetensors")
    with torch.no_grad():
        model.to_pixels.bias.add_(0.1)
    save_tokenizer(alone / "sharper.safetensors", model, training={}, latents_of=[info.sha256])
    save_file({"weight": torch.zeros(1)}, alone / "another-program's.safetensors")
    generator = load_generator(alone / "g.safetensors", device="cpu")
    assert generator.tokenizer.info.name == "sharper"
    shutil.copy(folder / "plain.safetensors", alone / "the-very-one.safetensors")
    assert load_generator(alone / "g.safetensors", device="cpu").tokenizer.info.name == "the-very-one"
    guide = save_tiny_generator(alone / "guide.safetensors", alone / "sharper.safetensors", BY_CLASS)
    assert load_generator(alone / "g.safetensors", tokenizer=alone / "sharper.safetensors", guide=guide, device="cpu").guide is not None
    assert generator.sample(classes=[0], **FAST).shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    ("asked", "found"), [("flower/rose", 2), ("rose", 2), ("cat", 0), ("3", 3), (1, 1), ("machine/crane", 3), ("animal/crane", 1)]
)
def test_classes_by_name_and_id(asked: str | int, found: int) -> None:
    assert find_class(asked, CLASSES, 4) == found


def test_a_class_called_by_a_number_is_found_by_its_name_first() -> None:
    assert find_class("10", ["1", "10", "2"], 3) == 1
    assert find_class("0", ["1", "10", "2"], 3) == 0  # no class is called 0: an id
    assert find_class("2", None, 3) == 2


@pytest.mark.parametrize(
    ("asked", "names", "message"),
    [
        ("crane", CLASSES, "class 'crane' is ambiguous: animal/crane or machine/crane"),
        ("rosse", CLASSES, "no class 'rosse': did you mean flower/rose?"),
        ("flower/rosa", CLASSES, "no class 'flower/rosa': did you mean flower/rose?"),
        (
            "zebra",
            CLASSES,
            "no class 'zebra': there are 4, such as animal/cat, animal/crane, flower/rose; `texttok sample --list-classes` has all",
        ),
        ("4", CLASSES, "class 4: the ids are 0 to 3"),
        (
            "-1",
            CLASSES,
            "no class '-1': there are 4, such as animal/cat, animal/crane, flower/rose; `texttok sample --list-classes` has all",
        ),
        ("rose", None, "no class 'rose': this generator has no names, give an id from 0 to 3"),
    ],
)
def test_unknown_classes(asked: str, names: list[str] | None, message: str) -> None:
    with pytest.raises(DataError) as error:
        find_class(asked, names, 4)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("class", {"prompts": ["a cat"]}, "class: is a class model (4 classes): give it classes, not prompts"),
        ("prompt", {"prompts": ["caf\udce9"]}, r"prompt 'caf\udce9': is not Unicode text; write it as UTF-8"),
        ("prompt", {"classes": ["cat"]}, "prompt: is a text-to-image model: give it prompts, not classes"),
        ("class", {}, "give classes to a class model or prompts to a text-to-image model"),
        ("class", {"classes": []}, "0 classes or prompts and 0 seeds: give the same number of each, at least one"),
        ("class", {"classes": [0, 1], "seeds": [1]}, "2 classes or prompts and 1 seeds: give the same number of each, at least one"),
        ("class", {"classes": [0], "seeds": [-1]}, "a seed is a whole number from 0 to 4294967295, these go from -1 to -1"),
        ("class", {"classes": [0], "steps": 0}, "steps 0: sampling takes at least 1 step"),
        ("class", {"classes": [0], "cfg": "-2"}, "cfg '-2': the scale is negative; 1 means no guidance"),
    ],
)
def test_what_a_model_does_not_take(name: str, arguments: dict[str, Any], message: str, load: Callable[..., Generator]) -> None:
    with pytest.raises(TextTokError) as error:
        load(name).sample(**arguments)
    assert str(error.value) == message


def test_captions_that_are_missing_or_not_read(folder: Path, load: Callable[..., Generator], tmp_path: Path) -> None:
    few = write_captions(tmp_path / "few.jsonl", UNSEEN[:3])
    assert load("class", captions=few).requests(classes=["cat"])[0].text in {row["caption"] for row in UNSEEN[:3]}
    with pytest.raises(DataError, match=r"few\.jsonl: has no caption of class flower/rose"):
        load("class", captions=few).requests(classes=["rose"])
    (folder / "class.captions.jsonl").unlink()
    with pytest.raises(
        DataError, match=r"class: its detokenizer reads a caption.*\(FILE\.captions\.jsonl for FILE\.safetensors\).*--captions"
    ):
        load("class").requests(classes=["rose"])
    for name in ("class-plain", "prompt"):
        with pytest.raises(DataError, match="reads no captions of classes"):
            load(name, captions=few)
    few.write_text('{"class": "animal/cat", "caption": "a cat"}\n\n{"class": "animal/cat"}\n')
    with pytest.raises(DataError, match=r"few\.jsonl:3: not a line of the form"):
        load("class", captions=few)


def test_only_a_detokenizer_that_reads_captions_is_given_some(folder: Path, save_model: Callable[..., Path]) -> None:
    """Table 4d: of a model whose tokenizer alone reads text, and of one that reads the class in a sentence (Table 4a)."""
    encoder = {"kind": "hash", "dim": 16, "max_tokens": 24}
    for name, condition in (("first", {"source": "caption", "where": "tokenizer"}), ("sentence", {"source": "class_text"})):
        tokenizer = save_model(folder / f"{name}.safetensors", 2, {**condition, "encoder": encoder})
        save_tiny_generator(folder / f"of-{name}.safetensors", tokenizer, BY_CLASS, captions=["a photo of a rose"])
    first, sentence = (load_generator(folder / f"of-{name}.safetensors", device="cpu") for name in ("first", "sentence"))
    assert [request.text for request in first.requests(classes=["rose"])] == [None]
    assert first.sample(classes=["rose"], **FAST).shape == (1, 3, 32, 32)
    with pytest.raises(DataError, match="reads no captions of classes"):
        load_generator(folder / "of-first.safetensors", device="cpu", captions=folder / "class.captions.jsonl")
    (request,) = sentence.requests(classes=["rose"])
    assert (request.text, request.leaked) == ("a photo of a rose", False)


@pytest.mark.parametrize(("weights", "n"), [([1, 1, 1, 1], 10), ([1, 1, 2, 4], 16), ([1934, 18, 300, 7], 100), ([1, 1, 1], 2), ([0, 3], 5)])
def test_labels_are_spread_by_weight_and_evenly(weights: list[int], n: int) -> None:
    labels = spread_labels(weights, n)
    assert len(labels) == n
    for i, weight in enumerate(weights):
        share = n * weight / sum(weights)
        assert abs(labels.count(i) - share) < 1
        first_half = labels[: n // 2].count(i)
        assert abs(first_half - share / 2) <= 1.5
    if len(set(weights)) == 1:
        assert labels[: len(weights)] == list(range(len(weights)))[:n]


def test_what_is_left_over_goes_to_the_classes_nearest_to_one_more() -> None:
    assert spread_labels([50, 32, 18], 5).count(0) == 2 and spread_labels([50, 32, 18], 5).count(2) == 1  # 2.5, 1.6 and 0.9


def test_drawn_labels_are_uniform_and_of_the_seed_alone() -> None:
    counts = Counter(draw_label(10, seed) for seed in range(10_000))
    assert set(counts) == set(range(10)) and all(abs(count - 1000) < 4 * 30 for count in counts.values())  # 4 standard deviations
    assert [draw_label(1000, seed) for seed in range(4)] == [115, 323, 847, 594]


def test_labels_of_a_generator(load: Callable[..., Generator]) -> None:
    eight = range(5, 13)
    assert load("class").labels("equal", eight) == [0, 1, 2, 3, 0, 1, 2, 3]
    assert sorted(load("class").labels("proportional", eight)) == [0, 1, 2, 2, 3, 3, 3, 3]
    drawn = load("class").labels("random", eight)
    assert drawn == [load("class").labels("random", [seed])[0] for seed in eight] == [draw_label(4, seed) for seed in eight]
    with pytest.raises(DataError, match="use --labels equal"):
        load("class-plain").labels("proportional", eight)
    with pytest.raises(DataError, match="give it prompts"):
        load("prompt").labels("equal", eight)


@pytest.mark.parametrize(("name", "asked"), [("class", {"classes": [0, 1, 2, 3]}), ("prompt", {"prompts": ["a", "b", "c d", "e"]})])
def test_in_bf16_images_are_nearly_those_in_fp32(load: Callable[..., Generator], name: str, asked: dict[str, list]) -> None:
    exact, rounded = (load(name, precision=precision).sample(**asked, **FAST).float() for precision in ("fp32", "bf16"))
    assert 0 < (exact - rounded).abs().mean() < 3 < 20 < exact.std()


def test_numbers_and_tensors_do_for_classes_seeds_and_guidance(load: Callable[..., Generator]) -> None:
    """As a notebook or a training loop has them."""
    generator = load("class")
    images = generator.sample(classes=[1, 2], seeds=[3, 4], steps=2, cfg="1.5")
    assert near(generator.sample(classes=torch.tensor([1, 2]), seeds=torch.tensor([3, 4]), steps=2, cfg=1.5), images)
    assert near(generator.sample(classes=torch.tensor(2), seeds=4, steps=2, cfg=Guidance(1.5)), images[1:])
    with pytest.raises(DataError, match="batch_size is 0"):
        generator.sample(classes=1, batch_size=0)
