"""A sweep with small systems: points measured, kept and gone on with, and images of one number that no batch changes."""

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_generator import BY_CLASS, BY_TEXT, save_tiny_generator
from tiny_inception import DIM, TinyInception

from texttok_cli.baselines import SDVAE
from texttok_cli.bench import sweep as sweep_module
from texttok_cli.bench import systems
from texttok_cli.bench.sweep import sweep
from texttok_cli.bench.systems import OriginalDiT, TexTokSystem, open_system
from texttok_cli.bench.tradeoff import Series, Setting, Spec
from texttok_cli.config.schema import GeneratorConfig
from texttok_cli.data import center_crop, to_tensor
from texttok_cli.errors import DataError, TextTokError
from texttok_cli.models.dit import DiT

Draw = Callable[..., Path]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "FidInception", TinyInception)
    monkeypatch.setattr(sweep_module, "POOL_DIM", DIM)


@pytest.fixture
def references(tmp_path: Path, draw: Draw) -> Path:
    for i in range(6):
        draw(tmp_path / "refs" / f"{i}.png", seed=i)
    return tmp_path / "refs"


@pytest.fixture
def generator(tmp_path: Path, models: Path) -> Path:
    return save_tiny_generator(tmp_path / "gen.safetensors", models / "plain.safetensors", BY_CLASS)


def make_spec(generator: Path, models: Path, **changes: Any) -> Spec:
    series = {
        "name": "A",
        "generator": str(generator),
        "tokenizer": str(models / "plain.safetensors"),
        "steps": [2, 3],
        "sampler": "ddim",
        "cfg": "2",
    }
    return Spec.model_validate({"name": "small", "images": 5, "batch_size": 2, "series": [series], **changes})


def run(spec: Spec, references: Path, out: Path) -> tuple[Any, list[str]]:
    said: list[str] = []
    result = sweep(
        spec,
        str(references),
        out,
        device=CPU,
        precision="fp32",
        offline=True,
        on_point=lambda done, total, note: said.append(f"{done}/{total} {note}"),
    )
    return result, said


def test_every_point_is_measured_once_and_kept(
    generator: Path, models: Path, references: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(generator, models)
    first, said = run(spec, references, tmp_path / "out")
    assert [(p.series, p.steps, p.images) for p in first.points] == [("A", 2, 5), ("A", 3, 5)]
    assert all(p.fid > 0 and p.seconds_per_image > 0 for p in first.points) and first.points[0].fid != first.points[1].fid
    assert (first.tokens, first.protocol["reference"], first.protocol["n_reference"]) == ({"A": 4}, "refs", 6)
    assert [line.partition(" ")[0] for line in said] == ["0/2", "1/2", "2/2"]
    monkeypatch.setattr(TexTokSystem, "sample", lambda *_: pytest.fail("measured again"))
    again, _ = run(spec, references, tmp_path / "out")
    assert again.points == first.points


def test_a_point_of_other_samples_is_another_point(models: Path, references: Path, tmp_path: Path) -> None:
    counted = save_tiny_generator(tmp_path / "gen.safetensors", models / "plain.safetensors", BY_CLASS, class_counts=[1, 1, 1, 9])
    run(make_spec(counted, models), references, tmp_path / "out")
    result, _ = run(make_spec(counted, models, images=6), references, tmp_path / "out")
    assert [p.images for p in result.points] == [6, 6]
    assert len(list((tmp_path / "out" / "points").iterdir())) == 4
    first = make_spec(counted, models).series[0].model_dump(mode="json")
    for changes in ({"seed": 1}, {"batch_size": 5}, {"series": [{**first, "labels": "proportional"}]}):
        before = len(list((tmp_path / "out" / "points").iterdir()))
        run(make_spec(counted, models, **changes), references, tmp_path / "out")
        assert len(list((tmp_path / "out" / "points").iterdir())) == before + 2


def test_the_fid_is_of_all_samples_against_the_references_at_the_samples_size(
    generator: Path, models: Path, tmp_path: Path, draw: Draw
) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    for i in range(6):
        draw(tmp_path / "refs" / f"{i}.png", seed=i, size=(100, 80))
    result, _ = run(make_spec(generator, models), tmp_path / "refs", tmp_path / "out")
    system, network = opened(make_spec(generator, models).series[0], seed=0), TinyInception(offline=True)
    cropped = torch.stack([to_tensor(center_crop(Image.open(tmp_path / "refs" / f"{i}.png"), 32)) for i in range(6)])
    for point in result.points:
        samples = system.sample(Setting("A", point.steps, "ddim", "2"), range(5))
        a, b = (network(images).pool.double().numpy() for images in (samples, cropped))
        root = linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
        expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
        assert point.fid == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"generator": "none.safetensors"}, "none.safetensors"),
        ({"sampler": "heun"}, "B: sampler 'heun' is none of those of a ddpm model"),
        ({"sampler": "euclid"}, "B: sampler 'euclid' is none of those of a ddpm model"),
        ({"cfg": "-1"}, "B: .*negative"),
        ({"steps": 5000}, "B: steps 5000"),
        ({"prompts": "none.txt"}, "leave out prompts"),
    ],
)
def test_a_later_series_is_looked_at_before_the_first_point(
    change: dict[str, Any], message: str, generator: Path, models: Path, references: Path, tmp_path: Path
) -> None:
    first = make_spec(generator, models).series[0].model_dump(mode="json")
    spec = make_spec(generator, models, series=[first, {**first, "name": "B", **change}])
    with pytest.raises(TextTokError, match=message):
        run(spec, references, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_reference_is_too_few(generator: Path, models: Path, tmp_path: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "open_system", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(DataError, match=r"one\.png: holds one image"):
        run(make_spec(generator, models), draw(tmp_path / "one.png"), tmp_path / "out")


def test_a_system_is_gone_before_the_next_is_opened_and_opened_only_for_what_is_missing(
    generator: Path, models: Path, references: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[weakref.ref[systems.System]] = []

    def spied(series: Series, **options: Any) -> systems.System:
        assert [ref() for ref in opened] == [None] * len(opened)
        system = open_system(series, **options)
        opened.append(weakref.ref(system))
        return system

    monkeypatch.setattr(sweep_module, "open_system", spied)
    first = make_spec(generator, models).series[0].model_dump(mode="json")
    spec = make_spec(generator, models, series=[first, {**first, "name": "B"}])
    result, _ = run(spec, references, tmp_path / "out")
    assert len(opened) == 4 and len(result.points) == 4  # looked at, then measured
    run(spec, references, tmp_path / "out")
    assert len(opened) == 6  # looked at


def series(generator: Path | str, **changes: Any) -> Series:
    return Series.model_validate({"name": "A", "generator": str(generator), "steps": 2, "sampler": "ddim", "cfg": "2", **changes})


def opened(given: Series, images: int = 5, seed: int = 7) -> systems.System:
    return open_system(given, images=images, seed=seed, device=CPU, precision="fp32", offline=True)


def check_batches_don_t_matter(system: systems.System) -> None:
    setting = Setting("A", 2, "ddim", "2")
    whole = system.sample(setting, range(5))
    parts = [system.sample(setting, numbers) for numbers in (range(2), range(2, 5))]
    assert whole.shape == (5, 3, system.image_size, system.image_size) and whole.dtype == torch.uint8
    assert (torch.cat(parts).int() - whole.int()).abs().max() <= 1
    assert (whole[0].int() - whole[1].int()).abs().max() > 1


def test_a_sample_hangs_on_its_number_alone(generator: Path, models: Path) -> None:
    check_batches_don_t_matter(opened(series(generator, tokenizer=str(models / "plain.safetensors"))))


def test_a_text_model_takes_the_first_prompts(models: Path, tmp_path: Path) -> None:
    tokenizer = str(models / "text.safetensors")
    given = save_tiny_generator(tmp_path / "t2i.safetensors", models / "text.safetensors", BY_TEXT)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\na hen\na cow\na pig\na fox\n")
    system = opened(series(given, tokenizer=tokenizer, prompts=str(prompts)))
    assert isinstance(system, TexTokSystem) and [r.text for r in system.requests] == ["a cat", "a dog", "a hen", "a cow", "a pig"]
    check_batches_don_t_matter(system)
    cache = system.generator.tokenizer.text
    system.sample(Setting("s", 2, "ddim", "1"), [0])  # pays for its text again
    assert system.generator.tokenizer.text is not cache and system.generator.text is not None
    with pytest.raises(DataError, match="has 6 prompts, but a point has 9 images"):
        opened(series(given, tokenizer=tokenizer, prompts=str(prompts)), images=9)
    with pytest.raises(DataError, match="name a file of prompts"):
        opened(series(given, tokenizer=tokenizer))


def test_a_class_model_takes_no_prompts(generator: Path, models: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a class model: leave out prompts"):
        opened(series(generator, tokenizer=str(models / "plain.safetensors"), prompts=str(tmp_path / "p.txt")))


def test_the_original_dit_is_a_system_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its map is decoded by SD-VAE; here by a stand-in that repeats each of its values 8 x 8 times."""
    cfg = GeneratorConfig.model_validate(
        {
            "latents": {"kind": "grid", "size": 4},
            "backbone": {"depth": 1, "width": 32, "heads": 2},
            "condition": {"num_classes": 3, "source": "class"},
        }
    )
    torch.manual_seed(0)
    dit = DiT(cfg).eval()
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    (tmp_path / "DiT.pt").write_bytes(b"weights")

    class Decoder(SDVAE):
        def __init__(self) -> None:
            self.info = type("Info", (), {"sha256": "ab"})()

        def decode(self, z: torch.Tensor, captions: Sequence[str] | None = None) -> torch.Tensor:
            big = z[:, :3].repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
            return (128 + 40 * big).clamp(0, 255).to(torch.uint8)

    monkeypatch.setattr(systems, "load_dit", lambda path, device: dit)
    monkeypatch.setattr(systems, "load_baseline", lambda name, **_: Decoder() if name == "baseline:sd-vae" else object())
    system = opened(series(f"baseline:dit={tmp_path / 'DiT.pt'}"))
    assert isinstance(system, OriginalDiT)
    assert (system.tokens, system.image_size, system.labels) == (16, 32, [0, 1, 2, 0, 1])
    check_batches_don_t_matter(system)
    with pytest.raises(DataError, match="is not SD-VAE"):
        opened(series(f"baseline:dit={tmp_path / 'DiT.pt'}", tokenizer="baseline:taesd=x"))
    given = {"labels": "proportional", "captions": "c.jsonl", "prompts": "p.txt"}
    for key, named in (("labels", "labels: proportional"), ("captions", "captions"), ("prompts", "prompts")):
        with pytest.raises(DataError, match=f"leave out {named}$"):
            opened(series(f"baseline:dit={tmp_path / 'DiT.pt'}", **{key: given[key]}))
