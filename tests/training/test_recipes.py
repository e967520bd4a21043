"""Every shipped recipe: loads, builds at its real size on the meta device, plans, and trains two steps at a tiny one."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import metrics, train

from texttok_cli import evaluate, load_tokenizer
from texttok_cli.checkpoint import read_generator_header, read_tokenizer_info
from texttok_cli.config.loader import load_recipe, recipe_names
from texttok_cli.config.recipe import GeneratorRecipe, TokenizerRecipe
from texttok_cli.config.schema import ClassEmbedding, PromptCondition, TextCondition
from texttok_cli.errors import CheckpointError
from texttok_cli.files import load_safetensors, save_safetensors
from texttok_cli.inference import PRETRAINED
from texttok_cli.models.dit import DiT
from texttok_cli.models.tokenizer import TexTok
from texttok_cli.training.optim import lr_scale
from texttok_cli.training.plan import count_flops, count_generator_flops, plan

# Parameters in millions with 128 tokens and T5-XL's width.
T5_XL = {"S": 53.92, "B": 175.34, "L": 611.59}
NAMES = [name for name in recipe_names() if isinstance(load_recipe(name), TokenizerRecipe)]
# DiT on 32 x 8 tokens with 1000 classes, without positions (the paper: XL 675 M).
DIT = {"L": 457.8, "XL": 674.8}
GENERATORS = [name for name in recipe_names() if isinstance(load_recipe(name), GeneratorRecipe)]


def millions(model: TexTok | DiT) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


def expected_millions(recipe: TokenizerRecipe) -> float:
    """Counted by hand: blocks, patches, tokens, projections; the bottleneck's extra."""
    cfg = recipe.model
    d, depth, n = cfg.backbone.width, cfg.backbone.depth, cfg.num_tokens
    hidden = int(d * cfg.backbone.mlp_ratio)
    block = 4 * d + (3 * d * d + 3 * d) + (d * d + d) + (d * hidden + hidden) + (hidden * d + d)
    if cfg.backbone.qk_norm:
        block += 2 * d // cfg.backbone.heads
    pixels = 3 * cfg.patch_size**2
    total = 2 * (depth * block + 2 * d) + (pixels * d + d) + (d * pixels + pixels)
    total += 2 * cfg.num_patches * d + 2 * n * d  # positions and learnable tokens
    out = cfg.latent_dim * (2 if cfg.bottleneck.kind == "kl" else 1)
    total += (d * out + out) + (cfg.latent_dim * d + d)
    if cfg.bottleneck.kind == "vq":
        total += cfg.bottleneck.codes * cfg.latent_dim
    if isinstance(cfg.condition, TextCondition | ClassEmbedding):
        width = cfg.condition.encoder.dim if isinstance(cfg.condition, TextCondition) else d
        halves = 2 if cfg.condition.where == "both" else 1
        total += halves * (width * d + d)
        if cfg.condition.mode == "cross_attention":
            total += halves * depth * (2 * d + (d * d + d) + (2 * d * d + 2 * d) + (d * d + d))
        if isinstance(cfg.condition, ClassEmbedding):
            total += cfg.condition.num_classes * d
    return total / 1e6


@pytest.mark.parametrize("name", NAMES)
def test_it_builds_at_its_real_size(name: str) -> None:
    recipe = load_recipe(name)
    model, flops = count_flops(recipe.model)
    assert millions(model) == pytest.approx(expected_millions(recipe), rel=1e-9)
    assert flops > 0


def test_sizes_are_those_of_table_4e() -> None:
    """The paper says 54 / 176 / 612 M. Ours of size B rounds to 175, and why is not known: the paper names no part that is missing.

    A learned position for each of 128 text tokens in both halves would give 54.06 / 175.53 / 611.85 M, which round to the paper's
    numbers, positions of the detokenizer's patch tokens would make L 613; the paper mentions neither.
    """
    for name, size in (("ablations/4e-small", "S"), ("tokenizer/texttok-128-256", "B"), ("ablations/4e-large", "L")):
        assert expected_millions(load_recipe(name)) == pytest.approx(T5_XL[size], abs=5e-3)


def test_what_is_inferred_has_its_source_beside_it() -> None:
    root = Path(__file__).parents[2]
    for file in [*root.glob("recipes/**/*.yaml"), *root.glob("texttok_cli/config/*.py")]:
        for line in file.read_text(encoding="utf-8").splitlines():
            for said in line.split("[I]")[1:]:
                assert any(map(str.isalnum, said)), f"{file.name}: {line}"


def test_the_twins_differ_by_their_condition_alone() -> None:
    for tokens in (32, 64, 128, 256):
        for size in (256, 512):
            text, twin = (load_recipe(f"tokenizer/{kind}-{tokens}-{size}").model_dump() for kind in ("texttok", "baseline"))
            assert {key for key in text["model"] if text["model"][key] != twin["model"][key]} == {"condition"}
            assert {key for key in text if text[key] != twin[key]} == {"model", "reproduces"}


@pytest.mark.parametrize(("size", "t5", "dim", "multipliers"), [(256, "xl", 2048, [1, 2]), (512, "xxl", 4096, [0.5, 1, 2])])
def test_tokenizers_are_trained_as_their_sources_say(size: int, t5: str, dim: int, multipliers: list[float]) -> None:
    """Sec. 4.1, and what base/tokenizer infers: a slip in a number would show nowhere else."""
    for tokens in (32, 64, 128, 256):
        recipe = load_recipe(f"tokenizer/texttok-{tokens}-{size}")
        model, loss, rate = recipe.model, recipe.objective, recipe.schedule
        assert (model.image_size, model.num_patches, model.num_tokens, model.latent_dim) == (size, 1024, tokens, 8)
        assert (model.backbone.depth, model.backbone.width, model.backbone.heads, model.backbone.mlp_ratio) == (12, 768, 12, 4)
        condition = model.condition
        assert (condition.source, condition.mode, condition.where) == ("caption", "in_context", "both")
        assert (condition.encoder.name, condition.encoder.dim, condition.encoder.max_tokens) == (f"google/t5-v1_1-{t5}", dim, 128)
        assert (loss.l2, loss.perceptual.net, loss.perceptual.weight, loss.perceptual.start) == (1, "lpips-vgg", 0.1, 0)
        gan = loss.adversarial
        assert (gan.kind, gan.weight, gan.start, gan.ramp, gan.adaptive) == ("non_saturating", 0.1, 80_000, 0, False)
        assert (gan.r1, gan.r1_every, gan.lecam, gan.lecam_decay) == (10, 1, 1e-4, 0.999)
        discriminator = gan.discriminator
        assert (discriminator.base, discriminator.multipliers) == (128, [*multipliers, 4, 4, 4, 4])
        assert (discriminator.lr, discriminator.betas) == (1e-4, (0, 0.99))
        assert (recipe.optimizer.kind, recipe.optimizer.lr, recipe.optimizer.betas) == ("adam", 1e-4, (0, 0.99))
        assert (recipe.optimizer.weight_decay, recipe.optimizer.grad_clip, recipe.training.ema) == (0, None, 0.999)
        assert rate.steps * recipe.training.batch_size / 1_281_167 == pytest.approx(270, rel=2e-3)
        assert (recipe.training.batch_size, rate.warmup, rate.decay, rate.decay_fraction) == (256, 5000, "cosine", 1)


@pytest.mark.parametrize(("kind", "size"), [("dit-l", 256), ("dit-xl", 256), ("dit-xl", 512), ("t2i-xl", 256)])
def test_generators_are_trained_as_their_sources_say(kind: str, size: int) -> None:
    """Sec. 4.1, and what base/generator infers."""
    recipe = load_recipe(f"generator/{kind}-32-{size}")
    model, rate = recipe.model, recipe.schedule
    assert (model.latents.num_tokens, model.latents.latent_dim, model.condition.dropout) == (32, 8, 0.1)
    process = model.process
    assert (process.kind, process.timesteps, process.beta_start, process.beta_end) == ("ddpm", 1000, 1e-4, 0.02)
    assert process.learned_sigma
    if isinstance(model.condition, PromptCondition):
        assert model.condition.encoder == load_recipe(f"tokenizer/texttok-32-{size}").model.condition.encoder
    assert (recipe.optimizer.kind, recipe.optimizer.lr, recipe.optimizer.betas) == ("adamw", 5e-4, (0.9, 0.999))
    assert (recipe.optimizer.weight_decay, recipe.optimizer.grad_clip, recipe.training.ema) == (0, None, 0.9999)
    assert (recipe.training.batch_size, rate.warmup, rate.decay, rate.decay_fraction) == (1024, 5000, "cosine", 1)


def test_the_plan_adds_up() -> None:
    numbers = plan(load_recipe("tokenizer/texttok-32-256"))
    assert numbers["images_seen"] == 1_350_000 * 256
    assert numbers["token_bytes_per_image_fp16"] == 512
    assert numbers["tokenizer_parameters_M"] == pytest.approx(175.2, abs=0.2)
    assert numbers["discriminator_parameters_M"] == pytest.approx(23.9, abs=0.3)
    assert numbers["tokenizer_training_GFLOP_per_image"] == pytest.approx(3 * numbers["tokenizer_forward_GFLOP_per_image"])


def train_two_steps(name: str, run: Path, pictures: Path, *more: str) -> Path:
    """Of the recipe at a tiny size; returns the model file."""
    recipe = load_recipe(name)
    overrides = [
        "model.image_size=32",
        "model.patch_size=8",
        "model.num_tokens=4",
        "model.backbone={depth: 1, width: 32, heads: 2}",
        f"data.train=[{pictures}]",
        "data.workers=0",
        "objective.perceptual=null",
        "schedule={steps: 2, warmup: 0}",
        "training={batch_size: 2, compile: false, log_every: 1, text_cache: false, start_from: null, detokenizer_only: false}",
    ]
    if recipe.objective.adversarial is not None:
        overrides += ["objective.adversarial={start: 0, discriminator: {base: 4, multipliers: [1, 1]}}"]
    if isinstance(recipe.model.condition, TextCondition):
        overrides += ["model.condition.encoder={kind: hash, name: null, dim: 16, precision: fp32}"]
    if isinstance(recipe.model.condition, ClassEmbedding):
        overrides += ["model.condition.num_classes=2"]
    if recipe.model.bottleneck.kind == "vq":
        overrides += ["model.bottleneck.codes=16"]
    train(name, run, *overrides, *more)
    return run / "model.safetensors"


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_two_steps_at_a_tiny_size_and_is_measured(name: str, tmp_path: Path, pictures: Path) -> None:
    model = train_two_steps(name, tmp_path / "run", pictures)
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    [result] = evaluate(["psnr"], model=load_tokenizer(model, device="cpu"), data=pictures, device="cpu").results
    assert result.value is not None and result.card.n == 14
    source = load_recipe(name).model.condition.source
    assert result.card.text is None if source == "none" else result.card.text.startswith(f"{source}: ")


def test_a_model_on_class_embeddings_is_measured_with_the_ids_of_its_training(
    texttok: Callable[..., Any], tmp_path: Path, pictures: Path
) -> None:
    """As its training's validation has it; also on images of one class, whose rank among the classes of these is another."""
    harder = ("optimizer.lr=0.1", "training.ema=0", "training.precision=fp32", "training.val_rfid=false", f"data.val=[{pictures}]")
    model = train_two_steps("ablations/4a-class-embedding", tmp_path / "run", pictures, *harder)
    assert read_tokenizer_info(model).header.classes == ["even", "odd"]

    def measured(data: Path) -> float:
        outcome = texttok("eval", "--protocol", "recon", "--metric", "psnr", "-m", model, "--data", data, "--json")
        [result] = json.loads(outcome.out)["results"]
        assert result["card"]["text"] == "class_embedding: the images' classes"
        return float(result["value"])

    [validated] = metrics(tmp_path / "run", "val_psnr")
    assert measured(pictures) == pytest.approx(validated["val_psnr"], abs=1e-4)
    parts = {name: listed(tmp_path / f"{name}.jsonl", pictures, {name: name}) for name in ("even", "odd")}
    assert (measured(parts["even"]) + measured(parts["odd"])) / 2 == pytest.approx(validated["val_psnr"], abs=1e-4)
    swapped = listed(tmp_path / "swapped.jsonl", pictures, {"even": "odd", "odd": "even"})
    assert abs(measured(swapped) - validated["val_psnr"]) > 1e-3


def listed(manifest: Path, pictures: Path, classes: dict[str, str]) -> Path:
    """A manifest of the pictures in the folders that are named, with these classes."""
    rows = [
        {"image": str(path), "class": classes[path.parent.name]} for path in sorted(pictures.rglob("*.png")) if path.parent.name in classes
    ]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def test_a_model_whose_file_does_not_name_its_classes_is_written_anew_by_its_run(
    texttok: Callable[..., Any], tmp_path: Path, pictures: Path
) -> None:
    model = train_two_steps("ablations/4a-class-embedding", tmp_path / "run", pictures)
    whole = model.read_bytes()
    header, tensors = load_safetensors(model, error=CheckpointError)
    save_safetensors(model, tensors, {key: value for key, value in header.items() if key != "classes"})
    outcome = texttok("eval", "--metric", "psnr", "-m", model, "--data", pictures)
    assert outcome.code == 1 and outcome.err.count("\n") == 1
    assert "does not say of which classes: remove the file and run the same `texttok train` again" in outcome.err
    model.unlink()
    train_two_steps("ablations/4a-class-embedding", tmp_path / "run", pictures)
    assert model.read_bytes() == whole


# ------------------------------------------------------------------ generators


def expected_generator_millions(recipe: GeneratorRecipe) -> float:
    """Counted by hand: blocks with their modulations, the embeddings of latents, time and condition, the output."""
    cfg = recipe.model
    d, depth, channels = cfg.backbone.width, cfg.backbone.depth, cfg.latents.latent_dim
    hidden = int(d * cfg.backbone.mlp_ratio)
    block = (3 * d * d + 3 * d) + (d * d + d) + (d * hidden + hidden) + (hidden * d + d) + (6 * d * d + 6 * d)
    outputs = channels if cfg.process.kind == "flow" else 2 * channels  # with the learned variance
    total = (channels * d + d) + (256 * d + d) + (d * d + d) + (2 * d * d + 2 * d) + (outputs * d + outputs)
    heads = 2 * d // cfg.backbone.heads if cfg.backbone.qk_norm else 0
    block += heads
    if isinstance(cfg.condition, PromptCondition):
        block += 2 * (d * d + d) + (2 * d * d + 2 * d) + heads
        total += (cfg.condition.encoder.dim * d + d) + cfg.condition.null_tokens * d
    else:
        total += (cfg.condition.num_classes + 1) * d
    return (total + depth * block) / 1e6


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_builds_at_its_real_size(name: str) -> None:
    recipe = load_recipe(name)
    model, flops = count_generator_flops(recipe.model)
    assert millions(model) == pytest.approx(expected_generator_millions(recipe), rel=1e-9)
    assert flops > 0


def test_there_is_a_generator_for_every_row_of_tables_1_to_3() -> None:
    tables = {f"generator/dit-l-{n}-{size}{twin}" for n in (32, 64, 128, 256) for size in (256, 512) for twin in ("", "-baseline")}
    tables |= {f"generator/dit-xl-{n}-{size}" for n in (32, 64, 128, 256) for size in (256, 512)}
    tables |= {f"generator/t2i-xl-{n}-256{twin}" for n in (32, 64, 128) for twin in ("", "-baseline")}
    assert tables < set(GENERATORS)
    for name in tables:
        recipe = load_recipe(name)
        kind, size, tokens = name.removeprefix("generator/").split("-")[:3]
        assert recipe.model.latents.num_tokens == int(tokens)
        if kind == "dit":
            assert millions(count_generator_flops(recipe.model)[0]) == pytest.approx(DIT[size.upper()], abs=0.1)


def test_twins_differ_in_what_they_reproduce_alone() -> None:
    for name in GENERATORS:
        if name.endswith("-baseline"):
            twin, text = (load_recipe(n).model_dump() for n in (name, name.removesuffix("-baseline")))
            assert {key for key in text if text[key] != twin[key]} == {"reproduces"}


def test_a_row_is_sampled_as_its_table_says() -> None:
    """Without guidance in Table 1, with it in the others."""
    for name in GENERATORS:
        recipe = load_recipe(name)
        sampling = recipe.model.sampling
        if name.startswith("tiny/"):
            continue
        assert (sampling.sampler, sampling.steps) == ("ddpm", 250), name
        constant = {"dit-l": "1", "vanilla": "1.5"}
        guidance = next((cfg for part, cfg in constant.items() if part in name), "3.8:power-cosine=4")
        assert sampling.cfg == guidance, name
        if recipe.reproduces.startswith("Table 1"):
            assert "without guidance" in recipe.reproduces and guidance == "1", name


def test_a_bundled_generator_is_that_of_its_recipe() -> None:
    for name, recipe in (("class-32-128", "tiny/class-32-128-flow"), ("t2i-32-128", "tiny/t2i-32-128-short")):
        assert read_generator_header(PRETRAINED / f"{name}.safetensors").model == load_recipe(recipe).model


def test_an_ablation_of_table_4_differs_in_what_it_is_about_alone() -> None:
    about = {
        "4a-25-words": set(),  # by its captions alone, and what these may be
        "4a-class-text": {("source",)},
        "4b-t5-small": {("encoder", key) for key in ("name", "dim")},
        "4b-t5-xxl": {("encoder", key) for key in ("name", "dim")},
        "4c-cross-attention": {("mode",)},
        "4d-tokenizer-only": {("where",)},
    }
    whole = load_recipe("tokenizer/texttok-128-256").model_dump()
    for name, keys in about.items():
        ablation = load_recipe(f"ablations/{name}").model_dump()
        assert ablation["data"]["max_words"] == (25 if name == "4a-25-words" else 75), name
        ablation["data"]["max_words"] = whole["data"]["max_words"]
        assert {key for key in whole if key not in ("model", "reproduces") and whole[key] != ablation[key]} == set(), name
        assert {key for key in whole["model"] if whole["model"][key] != ablation["model"][key]} <= {"condition"}, name
        assert set(_differing(whole["model"]["condition"], ablation["model"]["condition"])) == keys, name


def _differing(a: dict, b: dict, *prefix: str) -> Iterator[tuple[str, ...]]:
    for key in a.keys() | b.keys():
        if isinstance(a.get(key), dict) and isinstance(b.get(key), dict):
            yield from _differing(a[key], b[key], *prefix, key)
        elif a.get(key) != b.get(key):
            yield (*prefix, key)


def test_a_bottleneck_of_another_kind_is_trained_as_the_default() -> None:
    whole = load_recipe("tokenizer/texttok-128-256").model_dump()
    for name, keys in (("kl", {"bottleneck"}), ("vq", {"bottleneck", "latent_dim"})):
        other = load_recipe(f"ablations/{name}").model_dump()
        assert {key for key in whole if whole[key] != other[key]} == {"model", "reproduces"}, name
        assert {key for key in whole["model"] if whole["model"][key] != other["model"][key]} == keys, name


def test_the_vanilla_setting_differs_in_optimisation_and_guidance_alone() -> None:
    ours, vanilla = (load_recipe(f"generator/dit-xl-256-256{suffix}") for suffix in ("", "-vanilla"))
    assert vanilla.model.model_copy(update={"sampling": ours.model.sampling}) == ours.model
    assert (vanilla.optimizer.lr, vanilla.training.batch_size, lr_scale(0, vanilla.schedule)) == (1e-4, 256, 1.0)
    assert lr_scale(vanilla.schedule.steps - 1, vanilla.schedule) == 1.0
    for recipe in (ours, vanilla):
        assert recipe.schedule.steps * recipe.training.batch_size / 1_281_167 == pytest.approx(350, rel=2e-3)


def test_the_tiny_generators_are_of_the_bundled_size() -> None:
    for name in ("tiny/class-32-128-flow", "tiny/t2i-32-128"):
        assert plan(load_recipe(name))["generator_parameters_M"] <= 12


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_trains_two_steps_at_a_tiny_size(name: str, tmp_path: Path, store: Path, models: Path) -> None:
    recipe = load_recipe(name)
    overrides = [
        "model.latents.num_tokens=4",
        "model.backbone={depth: 1, width: 32, heads: 2}",
        f"data={{train: [{store}], tokenizer: {models / 'text.safetensors'}}}",
        "schedule={steps: 2, warmup: 0}",
        "training={batch_size: 2, compile: false, log_every: 1, text_cache: false, start_from: null}",
    ]
    if isinstance(recipe.model.condition, PromptCondition):
        overrides += ["model.condition.encoder={kind: hash, name: null, dim: 16, max_tokens: 24, precision: fp32}"]
    else:
        overrides += ["model.condition.num_classes=2"]
    train(name, tmp_path / "run", *overrides)
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
