"""Model files: round trip, and refusal of whatever is not one."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_generator import BY_CLASS, CLASSES, save_tiny_generator

from texttok_cli.checkpoint import (
    caption_hash,
    find_tokenizer_file,
    load_generator_file,
    load_tokenizer_file,
    model_name,
    read_tokenizer_info,
    save_tokenizer,
)
from texttok_cli.errors import CheckpointError
from texttok_cli.files import load_safetensors, save_safetensors, sha256_file
from texttok_cli.models.dit import DiT


def test_fp32_round_trip_is_exact(models: Path, tmp_path: Path) -> None:
    model, info = load_tokenizer_file(models / "text.safetensors")
    save_tokenizer(tmp_path / "again.safetensors", model, training={"steps": 3})
    again, named = load_tokenizer_file(tmp_path / "again.safetensors")
    assert named.name == "again" and named.header.training == {"steps": 3} and named.header.model == info.header.model
    assert info.sha256 == sha256_file(models / "text.safetensors")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())


def test_a_loaded_model_computes_in_fp32_and_is_frozen(models: Path) -> None:
    model, _ = load_tokenizer_file(models / "plain.safetensors")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {v.dtype for v in model.state_dict().values()} == {torch.float32}


def test_bf16_halves_the_weights_and_keeps_the_statistics(models: Path, tmp_path: Path) -> None:
    model, _ = load_tokenizer_file(models / "text.safetensors")
    save_tokenizer(tmp_path / "bf16.safetensors", model, training={}, dtype=torch.bfloat16)
    assert (tmp_path / "bf16.safetensors").stat().st_size < 0.6 * (models / "text.safetensors").stat().st_size
    again, _ = load_tokenizer_file(tmp_path / "bf16.safetensors")
    assert {value.dtype for value in again.state_dict().values()} == {torch.float32}
    for name, value in model.state_dict().items():
        exact = name in ("latent_mean", "latent_std")
        assert torch.equal(again.state_dict()[name], value if exact else value.bfloat16().float())


def test_a_compiled_model_is_saved_under_its_own_names(models: Path, tmp_path: Path) -> None:
    model, _ = load_tokenizer_file(models / "text.safetensors")
    save_tokenizer(tmp_path / "again.safetensors", torch.compile(model, backend="eager"), training={})
    again, _ = load_tokenizer_file(tmp_path / "again.safetensors")
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())


def test_a_model_prepared_for_inference_in_bf16_is_not_saved(models: Path, tmp_path: Path) -> None:
    """Its packed layers, where a CPU has them, have other names: the file could not be read again."""
    model, _ = load_tokenizer_file(models / "text.safetensors")
    model.to_pixels = torch.nn.Sequential(model.to_pixels)  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match=r"m\.safetensors: the model can't be saved.*load it with precision fp32"):
        save_tokenizer(tmp_path / "m.safetensors", model, training={})
    assert not list(tmp_path.iterdir())


def damaged(models: Path, tmp_path: Path, change: Any) -> Path:
    """A copy of the model file after `change(header, tensors)`."""
    header, tensors = load_safetensors(models / "text.safetensors", error=CheckpointError)
    change(header, tensors)
    save_safetensors(tmp_path / "m.safetensors", tensors, header)
    return tmp_path / "m.safetensors"


CHANGES = {
    "task": (lambda h, t: h.update(task="generator"), "is a generator, but a tokenizer is needed"),
    "newer": (lambda h, t: h.update(texttok_model=2), "texttok_model is 2, this texttok reads 1; update texttok"),
    "no model": (lambda h, t: h.pop("texttok_model"), "another kind of file (no 'texttok_model' in its header)"),
    "unknown key": (lambda h, t: h["model"].update(num_token=4), "header.model.num_token: Extra inputs are not permitted"),
    "impossible": (lambda h, t: h["model"].update(patch_size=7), "header.model: image_size 32 is not a multiple of patch_size 7"),
    "not what the weights are": (lambda h, t: h["model"].update(num_tokens=5), "2 tensors differ, first latent_pos"),
    "a huge model": (lambda h, t: h["model"]["backbone"].update(depth=256, width=16384, heads=1), "weights don't fit the header"),
    "a shape": (lambda h, t: t.update(patch_pos=torch.zeros(15, 32)), "1 tensors differ, first patch_pos"),
    "a tensor too few": (lambda h, t: t.pop("patch_pos"), "1 tensors differ, first patch_pos"),
    "a tensor too many": (lambda h, t: t.update(extra=torch.zeros(1)), "1 tensors differ, first extra"),
    "a tensor too many, of another type": (lambda h, t: t.update(extra=torch.zeros(1, dtype=torch.int64)), "1 tensors differ, first extra"),
    "a type": (lambda h, t: t.update(patch_pos=torch.zeros(16, 32, dtype=torch.int32)), "1 tensors differ, first patch_pos"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_wrong_model_file_is_refused_in_one_line(case: str, models: Path, tmp_path: Path) -> None:
    change, reason = CHANGES[case]
    path = damaged(models, tmp_path, change)
    with pytest.raises(CheckpointError) as error:
        load_tokenizer_file(path)
    assert str(error.value).startswith(f"{path}: ") and reason in str(error.value) and "\n" not in str(error.value)


def test_half_a_model_file_and_a_torch_pickle_are_refused(models: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    data = (models / "text.safetensors").read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cut short"):
        load_tokenizer_file(path)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_tokenizer_file(path)


def test_who_a_tokenizer_is_can_be_read_without_its_weights(models: Path) -> None:
    assert read_tokenizer_info(models / "text.safetensors") == load_tokenizer_file(models / "text.safetensors")[1]


@pytest.mark.parametrize(("said", "meant"), [(None, []), ("ab" * 32, ["ab" * 32])])
def test_a_model_of_before_its_latents_could_be_several_models_is_read(
    said: object, meant: list[str], models: Path, tmp_path: Path
) -> None:
    assert read_tokenizer_info(damaged(models, tmp_path, lambda h, t: h.update(latents_of=said))).header.latents_of == meant


def test_a_tokenizer_is_found_by_its_hash_rather_than_by_its_latents_among_files_of_any_kind(models: Path, tmp_path: Path) -> None:
    own, sharper, other = models / "text.safetensors", tmp_path / "sharper.safetensors", tmp_path / "other.safetensors"
    model, info = load_tokenizer_file(own)
    save_tokenizer(sharper, model, training={}, latents_of=["ab" * 32, info.sha256])
    other.write_bytes(b"something else")
    assert find_tokenizer_file([other, sharper, own], info.sha256) == own
    assert find_tokenizer_file([other, sharper], info.sha256) == sharper
    assert find_tokenizer_file([other, sharper, own], "cd" * 32) is None


def test_a_file_names_the_classes_that_condition_its_model(save_model: Callable[..., Path], tmp_path: Path, models: Path) -> None:
    path = save_model(tmp_path / "classes.safetensors", 0, {"source": "class_embedding", "num_classes": 2}, ["b", "a"])
    assert read_tokenizer_info(path).header.classes == ["b", "a"]
    header, tensors = load_safetensors(path, error=CheckpointError)
    save_safetensors(path, tensors, {key: value for key, value in header.items() if key != "classes"})  # of before
    assert read_tokenizer_info(path).header.classes is None
    assert "classes" not in load_safetensors(models / "text.safetensors", error=CheckpointError)[0]
    for wrong, message in ((path, "classes has 1 entries, the model 2 classes"), (models / "text.safetensors", "the model no classes")):
        header, tensors = load_safetensors(wrong, error=CheckpointError)
        save_safetensors(path, tensors, {**header, "classes": ["a"]})
        with pytest.raises(CheckpointError, match=message):
            read_tokenizer_info(path)


# ------------------------------------------------------------------ generators


def test_a_runs_model_is_called_as_its_run() -> None:
    assert model_name(Path("runs/texttok-32-256/model.safetensors")) == "texttok-32-256"
    assert model_name(Path("elsewhere/mine.safetensors")) == "mine"
    assert model_name(Path("/runs/a\\b/model.safetensors")) == model_name(Path("a\\b.safetensors")) == "a_b"
    assert model_name(Path("/cache/models--owner--texttok-64/snapshots/0123abcd/model.safetensors")) == "texttok-64"


@pytest.fixture
def generator(models: Path, tmp_path: Path) -> Path:
    path = tmp_path / "g.safetensors"
    return save_tiny_generator(
        path, models / "text.safetensors", BY_CLASS, class_counts=[1, 2, 3, 4], captions=["a cat", "a cat", "A rose"]
    )


def test_a_generator_comes_back_as_it_was(generator: Path, models: Path) -> None:
    dit, info = load_generator_file(generator)
    assert not dit.training and not any(p.requires_grad for p in dit.parameters())
    assert {value.dtype for value in dit.state_dict().values()} == {torch.float32}
    header = info.header
    assert (info.name, info.sha256) == ("g", sha256_file(generator))
    assert (header.tokenizer_name, header.tokenizer_sha256) == ("text", sha256_file(models / "text.safetensors"))
    assert (header.classes, header.class_counts) == (CLASSES, [1, 2, 3, 4])
    assert info.train_captions.tolist() == sorted([caption_hash("a cat"), caption_hash("A rose")])
    x, t, ids = torch.randn(2, 4, 8), torch.tensor([3.0, 700.0]), torch.tensor([0, 4])
    torch.manual_seed(0)
    fresh = DiT(header.model).eval()
    fresh.load_state_dict(dit.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(x, t, ids), dit(x, t, ids))  # the positions, which no file holds, too


def test_caption_hash_is_the_beginning_of_the_sha256() -> None:
    digest = hashlib.sha256("caf\u00e9".encode()).digest()
    assert torch.tensor(caption_hash("caf\u00e9")).numpy().astype(">i8").tobytes() == digest[:8]


GENERATOR_CHANGES = {
    "task": (lambda h, t: h.update(task="tokenizer"), "is a tokenizer, but a generator is needed"),
    "tokenizer": (lambda h, t: h.update(tokenizer_sha256="x"), "header.tokenizer_sha256"),
    "a tokenizer by path": (lambda h, t: h.update(tokenizer_name="../x"), "header.tokenizer_name"),
    "classes": (lambda h, t: h["classes"].pop(), "classes has 3 entries, the model 4 classes"),
    "counts": (lambda h, t: h["class_counts"].append(1), "class_counts has 5 entries, the model 4 classes"),
    "no counts": (lambda h, t: h.update(class_counts=[0] * 4), "class_counts says that no class had a training image"),
    "negative counts": (lambda h, t: h.update(class_counts=[1, 2, 3, -4]), "header.class_counts.3"),
    "no hashes": (lambda h, t: t.pop("train_captions"), "its train_captions are missing"),
    "other hashes": (lambda h, t: t.update(train_captions=torch.zeros(3)), "its train_captions are missing or not a list"),
    "a weight": (lambda h, t: t["time.mlp.0.weight"][0].fill_(torch.nan), "time.mlp.0.weight holds a value that is not finite"),
    "a tensor too few": (lambda h, t: t.pop("time.mlp.0.weight"), "1 tensors differ, first time.mlp.0.weight"),
    "a tensor too many": (lambda h, t: t.update(extra=torch.zeros(1)), "1 tensors differ, first extra"),
}


@pytest.mark.parametrize("case", GENERATOR_CHANGES)
def test_a_wrong_generator_file_is_refused_in_one_line(case: str, generator: Path) -> None:
    change, reason = GENERATOR_CHANGES[case]
    header, tensors = load_safetensors(generator, error=CheckpointError)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(header, tensors)
    save_safetensors(generator, tensors, header)
    with pytest.raises(CheckpointError) as error:
        load_generator_file(generator)
    assert str(error.value).startswith(f"{generator}: ") and reason in str(error.value) and "\n" not in str(error.value)


def test_a_tokenizer_is_no_generator_and_the_reverse(generator: Path, models: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a generator, but a tokenizer is needed"):
        load_tokenizer_file(generator)
    with pytest.raises(CheckpointError, match=r"is a tokenizer, but a generator is needed"):
        load_generator_file(models / "text.safetensors")
