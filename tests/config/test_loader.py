"""Recipes: extends, overrides, and errors that name the file, the key and the remedy."""

import tracemalloc
from pathlib import Path

import pytest
import yaml

from texttok_cli.config.loader import dump_recipe, load_recipe, merge, recipe_names
from texttok_cli.config.plain_yaml import parse_yaml
from texttok_cli.config.recipe import GeneratorRecipe, TokenizerRecipe
from texttok_cli.config.schema import ClassEmbedding, NoCondition, TextCondition
from texttok_cli.errors import RecipeError

MINIMAL = "model: {}\ndata: {train: [x]}\nschedule: {steps: 1}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL)
    return path


def test_every_shipped_recipe_loads() -> None:
    assert recipe_names()
    for name in recipe_names():
        assert load_recipe(name).reproduces, f"{name} does not say what it reproduces"


def test_defaults_are_the_papers(recipe: Path) -> None:
    loaded = load_recipe(str(recipe))
    assert (loaded.model.backbone.depth, loaded.model.backbone.width, loaded.model.backbone.heads) == (12, 768, 12)
    assert loaded.model.latent_dim == 8
    assert isinstance(loaded.model.condition, NoCondition)


def test_extends_merges_and_the_leaf_wins(recipe: Path) -> None:
    leaf = recipe.with_name("leaf.yaml")
    leaf.write_text("extends: mine\nmodel: {num_tokens: 7}\n")
    loaded = load_recipe(str(leaf))
    assert (loaded.model.num_tokens, loaded.data.train) == (7, ["x"])


def test_extending_oneself_by_another_way_is_an_error_too(recipe: Path) -> None:
    recipe.write_text(f"extends: ../{recipe.parent.name}/{recipe.stem}\n")
    with pytest.raises(RecipeError, match="extends itself"):
        load_recipe(str(recipe))


def test_extending_oneself_is_an_error(recipe: Path) -> None:
    recipe.write_text("extends: mine\n")
    with pytest.raises(RecipeError, match="extends itself"):
        load_recipe(str(recipe))


def test_another_discriminator_replaces_instead_of_merging() -> None:
    base = {"condition": {"source": "caption", "encoder": {"kind": "t5"}}, "n": 1}
    assert merge(base, {"condition": {"source": "none"}}) == {"condition": {"source": "none"}, "n": 1}
    assert merge(base, {"condition": {"encoder": {"max_tokens": 5}}})["condition"]["encoder"] == {"kind": "t5", "max_tokens": 5}


def test_another_size_of_a_backbone_keeps_what_is_not_its_size() -> None:
    base = {"backbone": {"size": "XL", "qk_norm": True, "depth": 3}}
    assert merge(base, {"backbone": {"size": "L"}}) == {"backbone": {"size": "L", "qk_norm": True}}
    assert merge(base, {"backbone": {"heads": 4}})["backbone"] == {**base["backbone"], "heads": 4}
    assert load_recipe("tiny/texttok-32-128", ["model.backbone.size=B"]).model.backbone.model_dump() == {
        **load_recipe("tiny/texttok-32-128").model.backbone.model_dump(),
        "depth": 12,
        "width": 768,
        "heads": 12,
    }


def test_overrides_reach_every_kind_of_value() -> None:
    loaded = load_recipe(
        "tiny/texttok-32-128", ["optimizer.lr=1e-3", "data.train=[a.tar, b.tar]", "objective.perceptual={net: stlpips-alex}"]
    )
    assert loaded.optimizer.lr == 1e-3
    assert loaded.data.train == ["a.tar", "b.tar"]
    assert loaded.objective.perceptual is not None and loaded.objective.perceptual.net == "stlpips-alex"
    assert isinstance(load_recipe("tiny/texttok-32-128", ["model.condition.source=none"]).model.condition, NoCondition)
    embedding = load_recipe("tiny/texttok-32-128", ["model.condition={source: class_embedding, num_classes: 9}"]).model.condition
    assert isinstance(embedding, ClassEmbedding)


def test_twins_differ_by_their_condition_only() -> None:
    text, twin = load_recipe("tiny/texttok-32-128"), load_recipe("tiny/baseline-32-128")
    assert isinstance(text.model.condition, TextCondition) and isinstance(twin.model.condition, NoCondition)
    same = {"model": text.model.model_copy(update={"condition": twin.model.condition}), "reproduces": twin.reproduces}
    same["training"] = text.training.model_copy(update={"text_cache": False})
    assert text.model_copy(update=same) == twin


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_token=3", "unknown key 'model.num_token'; did you mean 'num_tokens'?"),
        ("model.condition={source: caption, encodr: {}}", "unknown key 'model.condition.encodr'; did you mean 'encoder'?"),
        ("modle.num_tokens=3", "unknown key 'modle'; did you mean 'model'?"),
        ("model.image_size=100", "image_size 100 is not a multiple of patch_size 8"),
        ("model.backbone.size=XL", "size 'XL' is not one of S, B, L"),
        ("optimizer.lr=fast", "optimizer.lr: input should be a valid number"),
        ("model.condition={source: t5}", "model.condition"),
        ("model.condition={source: caption, encoder: {precision: fp16}}", "precision"),
        ("steps", "write it as key.subkey=value"),
    ],
)
def test_mistakes_are_one_clear_line(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as err:
        load_recipe(str(recipe), [override])
    assert message in str(err.value)
    assert "\n" not in str(err.value)


def test_how_a_model_is_sampled_is_checked_with_the_recipe() -> None:
    sampling = load_recipe("generator/dit-xl-32-256", ["model.sampling={sampler: ddim, cfg: 2.0}"]).model.sampling
    assert sampling.model_dump() == {"sampler": "ddim", "steps": 250, "cfg": "2"}
    for override, message in (
        ("model.sampling.cfg=strong", "model.sampling.cfg: cfg 'strong': 'strong' is not a number; give a scale such as 1.5"),
        ("model.sampling.sampler=heun", "sampling.sampler 'heun' is none of those of a ddpm model: null (its default), ddpm, ddim"),
        ("model.process={kind: flow}", "sampling.sampler 'ddpm' is none of those of a flow model: null (its default), heun, euler"),
        ("model.sampling.steps=0", "model.sampling.steps: input should be greater than or equal to 1"),
    ):
        with pytest.raises(RecipeError) as err:
            load_recipe("generator/dit-xl-32-256", [override])
        assert message in str(err.value) and "\n" not in str(err.value)


def test_a_recipe_that_is_not_there_lists_close_names() -> None:
    with pytest.raises(RecipeError, match="did you mean tiny/texttok-32-128"):
        load_recipe("tiny/textok-32-128")


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "\x00"])
def test_a_file_that_is_no_recipe(recipe: Path, text: str) -> None:
    recipe.write_text(text)
    with pytest.raises(RecipeError, match=r"mine\.yaml"):
        load_recipe(str(recipe))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [tokenizer]\n", r"task \['tokenizer'\] is not one of"),
        ("extends: 5\n", "extends names a recipe, or a list of them, not 5"),
        ("extends: [[base]]\n", "extends names a recipe"),
        ("extends: /\n", "extends '/', which is neither beside it"),
        ("model: {backbone: {size: [S]}}\n", r"model.backbone: size \['S'\] is not one of S, B"),
        ("data: {train: 2024-13-45}\n", "not readable as YAML: month must be in 1..12"),
        ("schedule: {steps: 0x" + "f" * 5000 + "}\n", "not readable as YAML: a number of 5,002 digits"),
        ("schedule: {steps: 1" + ":59" * 300 + ".5}\n", "not readable as YAML"),
        ("data: {train: !!bool x}\n", "not readable as YAML"),
        ("data: " + "[" * 3000 + "]" * 3000, "not readable as YAML: nested too deeply"),
        ("data: {train: x}\nmodel: {}\ndata: {train: y}\n", "not readable as YAML: .*the key 'data' stands twice"),
    ],
    ids=lambda value: value[:60],
)
def test_odd_values_are_one_clear_line(recipe: Path, text: str, message: str) -> None:
    recipe.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(recipe))


def test_a_key_over_one_that_is_merged_in_stands_once(recipe: Path) -> None:
    assert load_recipe(str(recipe), ["data={<<: {train: a, val: b}, train: c}"]).data.train == ["c"]


def test_an_override_that_is_no_value_is_one_clear_line(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"override 'schedule\.steps=2024-13-45': the value is not readable"):
        load_recipe(str(recipe), ["schedule.steps=2024-13-45"])


def test_what_aliases_blow_up_is_shown_short(recipe: Path) -> None:
    lists = "".join(f"  - &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(4))
    recipe.write_text(f"data:\n  train:\n  - &a0 [x]\n{lists}")
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(recipe))
    assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize("first", ["k: 1", "k: *b0"])
def test_aliases_that_stand_for_any_number_of_values_are_refused(first: str, recipe: Path) -> None:
    """Merging two such recipes took as long as their values are many."""
    recipe.write_text(f"b0: &b0 {{{first}}}\n" + "".join(f"b{i}: &b{i} {{p: *b{i - 1}, q: *b{i - 1}}}\n" for i in range(1, 40)))
    with pytest.raises(RecipeError, match="not readable as YAML: over 100,000 values, counting what aliases repeat"):
        load_recipe(str(recipe))


@pytest.mark.parametrize("kind", ["pairs", "omap"])
def test_aliases_in_pairs_of_yaml_count_too(kind: str, recipe: Path) -> None:
    recipe.write_text("b0: &b0 [x]\n" + "".join(f"b{i}: &b{i} !!{kind} [p: *b{i - 1}, q: *b{i - 1}]\n" for i in range(1, 40)))
    with pytest.raises(RecipeError, match="not readable as YAML: over 100,000 values"):
        load_recipe(str(recipe))


def test_a_list_that_holds_itself_takes_no_memory_before_it_is_refused() -> None:
    """Each of its rounds was taken in anew: a file of 150 kB took 40 GB."""
    text = f"&a [{'x, ' * 500}*a]"
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="over 100,000 values"):
            parse_yaml(text)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_a_task_that_aliases_blow_up_is_shown_short(recipe: Path) -> None:
    recipe.write_text(f"name: &long {'x' * 1000}\ntask: [{', '.join(100 * ['*long'])}]\n")
    with pytest.raises(RecipeError, match="is not one of tokenizer, generator") as caught:
        load_recipe(str(recipe))
    assert len(str(caught.value)) < 5_000


def test_a_recipe_that_others_extend_many_times_is_read_once(recipe: Path) -> None:
    for i in range(40):
        (recipe.parent / f"r{i}.yaml").write_text(f"extends: [r{i + 1}, ../{recipe.parent.name}/r{i + 1}]\n")
    (recipe.parent / "r40.yaml").write_text(f"extends: {recipe.stem}\n")
    assert load_recipe(recipe.parent / "r0.yaml") == load_recipe(recipe)


def test_the_dump_loads_as_the_same_recipe() -> None:
    for name, schema in (("tokenizer/texttok-32-256", TokenizerRecipe), ("generator/t2i-xl-32-256", GeneratorRecipe)):
        loaded = load_recipe(name)
        assert type(loaded) is schema and schema.model_validate(yaml.safe_load(dump_recipe(loaded))) == loaded


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.backbone.size=H", "size 'H' is not one of S, B, L, XL"),
        ("model={latents: {num_tokens: 65536}, backbone: {size: XL}}", "65,536 tokens of width 1,152 are more than any model here"),
        ("model.process.timesteps=20", "timesteps 20 are too few"),
        ("model.process={kind: flow, shift: 1001}", "shift: input should be less than or equal to 1000"),
        ("model.backbone.mlp_ratio=0.001", "model.backbone.mlp_ratio: input should be greater than or equal to 0.125"),
        ("model.condition.dropuot=0.2", "unknown key 'model.condition.dropuot'; did you mean 'dropout'?"),
        ("training.val_images=3", "unknown key 'training.val_images'; did you mean 'val_latents'?"),
        ("objective.l2=1", "unknown key 'objective'; known there: data, model, optimizer, reproduces, schedule, task, training"),
        ("task=decoder", "task 'decoder' is not one of tokenizer, generator"),
    ],
)
def test_mistakes_in_a_generators_recipe_are_one_clear_line(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as err:
        load_recipe("tiny/class-32-128", [override])
    assert message in str(err.value) and "\n" not in str(err.value)


def test_one_path_with_braces_needs_no_list() -> None:
    """As the README writes it: inside a YAML list the braces would have to be quoted."""
    loaded = load_recipe("tokenizer/texttok-32-256", ["data.train=shards/train-{000..127}.tar"])
    assert loaded.data.train == ["shards/train-{000..127}.tar"]
