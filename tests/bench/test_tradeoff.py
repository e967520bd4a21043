"""Specs of sweeps, a point and its time and score, points that are kept, and what follows from two curves."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from texttok_cli.bench.results import PointResult, TradeoffResult
from texttok_cli.bench.timing import Timer
from texttok_cli.bench.tradeoff import PointStore, Series, Setting, TextGain, load_spec, measure_point, settings, summarize, text_gain
from texttok_cli.config.loader import load_recipe, recipe_names
from texttok_cli.errors import DataError, RecipeError

Make = Callable[..., TradeoffResult]
SPECS = Path(__file__).parents[2] / "benchmarks" / "specs"
SETTING = Setting("A", 10, "ddim", "1.5")
SPEC = """
name: sweep
ref: photos/
images: 8
reference: B
series:
  - {name: A, generator: a.safetensors, steps: [5, 10], sampler: ddim, cfg: [1, "3.8:power-cosine=4"]}
  - {name: B, generator: b.safetensors, steps: 20, sampler: [ddim, "dpm++2m"], cfg: 1.5}
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_spec_is_every_combination_of_its_series(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path / "spec.yaml", SPEC))
    assert settings(spec.series[0]) == [Setting("A", steps, "ddim", cfg) for steps in (5, 10) for cfg in ("1", "3.8:power-cosine=4")]
    assert [(s.steps, s.sampler, s.cfg) for s in settings(spec.series[1])] == [(20, "ddim", "1.5"), (20, "dpm++2m", "1.5")]


def test_a_setting_that_is_given_twice_is_one_point(tmp_path: Path) -> None:
    text = SPEC.replace("steps: 20", "steps: [2, 2]").replace("cfg: 1.5", 'cfg: [1.5, "1.50", 2, 2.0]')
    found = settings(load_spec(write(tmp_path / "spec.yaml", text)).series[1])
    assert found == [Setting("B", 2, sampler, cfg) for sampler in ("ddim", "dpm++2m") for cfg in ("1.5", "2")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("reference: B", "reference: C"), "reference 'C' is not one of the series: A, B"),
        (("name: B", "name: A"), "two series have the same name"),
        (("steps: 20", "steps: 0"), r"series\.1\.steps\.0: .*greater than or equal to 1"),
        (("name: sweep", "name: ../evil"), "name: String should match pattern"),
        (("name: sweep", "name: ."), "name: String should match pattern"),
        (("name: sweep", 'name: "a\\0"'), "name: String should match pattern"),
        (("images: 8", "image: 8"), "image: Extra inputs"),
        (("images: 8", "images: ["), "not YAML"),
        (("images: 8", "images: 2024-13-45"), "not YAML: month must be in 1..12"),
        (("images: 8", "images: 8\nimages: 9"), "the key 'images' stands twice"),
    ],
)
def test_a_wrong_spec_is_one_line_with_its_key(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_spec(write(tmp_path / "spec.yaml", SPEC.replace(*change)))
    assert "\n" not in str(caught.value) and "spec.yaml" in str(caught.value)
    with pytest.raises(RecipeError, match="No such file"):
        load_spec(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", sorted(SPECS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_spec_names_the_runs_of_recipes(path: Path) -> None:
    """A run is called as its recipe, or by the --out of the commands on top of the spec."""
    spec, recipes = load_spec(path), [name.rpartition("/")[2] for name in recipe_names()]
    assert spec.name == path.stem
    for series in spec.series:
        assert settings(series)
        for file in filter(None, (series.generator, series.tokenizer)):
            run = Path(file).parent.name
            assert not file.startswith("runs/") or run in recipes or f"--out runs/{run}\n" in path.read_text(), file


@pytest.mark.parametrize("size", [256, 512])
def test_figure_4_names_generators_with_their_tokenizers_and_samples_them_as_their_recipes_do(size: int) -> None:
    _, *textok = load_spec(SPECS / f"tradeoff-imagenet-{size}.yaml").series
    for tokens, series in zip((32, 64, 128, 256), textok, strict=True):
        generator, tokenizer = (Path(str(file)).parent.name for file in (series.generator, series.tokenizer))
        assert (series.name, generator, tokenizer) == (f"TexTok-{tokens} + DiT-XL", f"dit-xl-{tokens}-{size}", f"texttok-{tokens}-{size}")
        assert series.captions is not None
        sampling = load_recipe(f"generator/{generator}").model.sampling
        assert (series.sampler, max(series.steps), series.cfg) == ([sampling.sampler], sampling.steps, [sampling.cfg])


def test_a_point_has_the_median_batch_s_time_and_all_its_samples_are_scored() -> None:
    seen: list[int] = []
    clock = iter([0.0, 4.0, 10.0, 12.0, 20.0, 26.0, 30.0, 30.1])  # batches take 4, 2, 6, and the last, of one image, 0.1

    class Fixed(Timer):
        def once(self, work: Callable[[], object]) -> float:
            before = next(clock)
            work()
            return next(clock) - before

    def sample(setting: Setting, numbers: Sequence[int]) -> torch.Tensor:
        assert setting == SETTING
        return torch.tensor(list(numbers), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)

    def score(batches: Iterator[tuple[Sequence[int], torch.Tensor]]) -> float:
        for numbers, images in batches:
            assert images[:, 0, 0, 0].tolist() == list(numbers)
            seen.extend(numbers)
        return 5.0

    point = measure_point(SETTING, sample, score, Fixed(), images=7, batch_size=2)
    assert seen == list(range(7))
    assert (point.seconds_per_image, point.fid, point.images) == (2.0, 5.0, 7)
    clock = iter([0.0, 4.0])
    point = measure_point(SETTING, sample, score, Fixed(), images=4, batch_size=32)  # one batch, which is short
    assert (point.seconds_per_image, point.images) == (1.0, 4)


def test_points_are_kept_by_setting_and_identity(tmp_path: Path) -> None:
    store, identity = PointStore(tmp_path / "points"), {"images": 8, "reference": "ab"}
    point = PointResult(series="A", steps=10, sampler="ddim", cfg="1.5", seconds_per_image=1.0, fid=2.0, images=8)
    assert store.load(SETTING, identity) is None
    store.save(SETTING, identity, point)
    assert store.load(SETTING, identity) == point
    for other in (
        Setting("B", 10, "ddim", "1.5"),
        Setting("A", 11, "ddim", "1.5"),
        Setting("A", 10, "ddpm", "1.5"),
        Setting("A", 10, "ddim", "2"),
    ):
        assert store.load(other, identity) is None
    assert store.load(SETTING, {**identity, "images": 9}) is None
    store.path(SETTING, identity).write_text("{}")
    with pytest.raises(DataError, match="remove it to measure it again"):
        store.load(SETTING, identity)


def test_the_summary_is_against_the_best_setting_of_the_reference(tradeoff_result: Make) -> None:
    result = tradeoff_result(
        ("SD-VAE + DiT", 50, 5.0, 9.0),
        ("SD-VAE + DiT", 250, 20.0, 6.0),  # the reference's best: 6.0 at 20 s
        ("TexTok-32", 50, 0.5, 6.5),
        ("TexTok-32", 250, 2.0, 6.0),  # the fastest that is no worse
        ("TexTok-256", 250, 19.0, 4.5),  # the best that takes no longer
        ("TexTok-256", 500, 40.0, 3.0),
        tokens={"SD-VAE + DiT": 1024, "TexTok-32": 32, "TexTok-256": 256},
    )
    summary = summarize(result)
    assert summary is not None and summary.speedup is not None and summary.gain is not None
    assert (summary.speedup.value, summary.speedup.chosen.fid) == (10.0, 6.0)
    assert (summary.gain.value, summary.gain.chosen.seconds) == (25.0, 19.0)
    assert summarize(result.model_copy(update={"reference": None})) is None


def test_the_reference_s_best_setting_need_not_be_its_slowest_and_it_is_not_compared_with_itself(tradeoff_result: Make) -> None:
    points = [("SD-VAE + DiT", 250, 20.0, 8.0), ("SD-VAE + DiT", 50, 4.0, 6.0), ("SD-VAE + DiT", 100, 8.0, 6.5)]
    tokens = {"SD-VAE + DiT": 1024, "TexTok-32": 32}
    summary = summarize(tradeoff_result(*points, ("TexTok-32", 50, 1.0, 6.0), ("TexTok-32", 99, 5.0, 3.0), tokens=tokens))
    assert summary is not None and summary.speedup is not None and summary.gain is not None
    assert (summary.speedup.value, summary.gain.value) == (4.0, 0.0)
    worse = summarize(tradeoff_result(*points, ("TexTok-32", 50, 4.5, 7.0), tokens=tokens))
    assert worse is not None and (worse.speedup, worse.gain) == (None, None)


def test_text_s_gain_is_the_mean_over_numbers_of_tokens(tradeoff_result: Make) -> None:
    result = tradeoff_result(
        ("Baseline-32", 50, 1.0, 8.0),
        ("Baseline-32", 99, 1.0, 4.0),
        ("Baseline-32", 250, 1.0, 5.0),
        ("TexTok-32", 50, 1.0, 3.0),  # 25 %, best against best
        ("Baseline-64", 50, 1.0, 2.0),
        ("TexTok-64", 50, 1.0, 1.0),  # 50 %
        ("TexTok-128", 50, 1.0, 0.5),  # has no twin
        tokens={"Baseline-32": 32, "TexTok-32": 32, "Baseline-64": 64, "TexTok-64": 64, "TexTok-128": 128},
        cfg="1",
    )
    assert text_gain(result) == TextGain(37.5, guided=False)
    assert text_gain(tradeoff_result(("TexTok-32", 5, 1.0, 3.0), tokens={"TexTok-32": 32})) is None


def test_text_s_gain_leaves_guidance_out_where_it_can(tradeoff_result: Make) -> None:
    """The paper's is of Table 1, which has none."""
    tokens = {"Baseline-32": 32, "TexTok-32": 32}
    guided = tradeoff_result(("Baseline-32", 50, 1.0, 4.0), ("TexTok-32", 50, 1.0, 1.0), tokens=tokens, cfg="2:power-cosine=4")
    plain = tradeoff_result(("Baseline-32", 50, 1.0, 8.0), ("TexTok-32", 50, 1.0, 6.0), tokens=tokens, cfg="1")
    both = guided.model_copy(update={"points": [*guided.points, *plain.points]})
    assert text_gain(guided) == TextGain(75, guided=True)
    assert text_gain(both) == text_gain(plain) == TextGain(25, guided=False)
    half = guided.model_copy(update={"points": [*guided.points, plain.points[0]]})  # the other has no point without guidance
    assert text_gain(half) == TextGain(75, guided=True)


def test_a_series_needs_settings() -> None:
    with pytest.raises(ValueError, match="steps"):
        Series(name="A", generator="g", steps=[], sampler=["ddim"], cfg=["1"])
