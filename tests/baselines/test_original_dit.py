"""The original DiT's files: what is read of them, and what is refused. That the forward is theirs stands in tests/models/test_dit.py."""

from pathlib import Path

import pytest
import torch

from texttok_cli.baselines import dit
from texttok_cli.errors import BackendError, CheckpointError
from texttok_cli.models.dit import DiT


def public(model: DiT) -> dict[str, torch.Tensor]:
    """A model of ours under the public names, its output's rows by place in the patch first."""
    tensors = {"pos_embed": model.positions[None]}
    renamed = [("modulation", "adaLN_modulation.1"), ("final_adaLN", "final_layer.adaLN"), ("mlp.0", "mlp.fc1"), ("mlp.2", "mlp.fc2")]
    renamed += [("attn.out", "attn.proj"), ("time.mlp.fc1", "t_embedder.mlp.0"), ("time.mlp.fc2", "t_embedder.mlp.2")]
    renamed += [("to_output", "final_layer.linear"), ("embed.", "x_embedder.proj."), ("classes", "y_embedder.embedding_table")]
    for name, tensor in model.state_dict().items():
        if name.startswith("latent"):
            continue
        if name.startswith("to_output"):
            tensor = tensor.unflatten(0, (-1, 2, 2)).permute(1, 2, 0, *range(3, tensor.ndim + 2)).flatten(0, 2)
        if name == "embed.weight":
            tensor = tensor.unflatten(1, (-1, 2, 2))
        for ours, theirs in renamed:
            name = name.replace(ours, theirs)
        tensors[name] = tensor
    return tensors


@pytest.fixture
def tensors(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    from texttok_cli.config.schema import GeneratorConfig

    monkeypatch.setitem(dit.DIT_SIZES, "tiny", {"depth": 2, "width": 32, "heads": 2})
    torch.manual_seed(0)
    return public(
        DiT(GeneratorConfig.model_validate({"latents": {"kind": "grid", "size": 4}, "backbone": {"depth": 2, "width": 32, "heads": 2}}))
    )


def test_a_file_says_all_that_the_model_is(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.save(tensors, tmp_path / "DiT.pt")
    model = dit.load_dit(tmp_path / "DiT.pt")
    assert (model.cfg.latents.size, model.cfg.latents.patch_size, model.cfg.condition.num_classes) == (4, 2, 1000)
    assert model.cfg.process.learned_sigma and model.cfg.backbone.heads == 2
    assert all(torch.equal(a, b) for a, b in zip(public(model).values(), tensors.values(), strict=True))
    assert torch.allclose(model.destandardize(torch.ones(1, 4, 4, 4)) * 0.18215, torch.ones(()))
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_another_file_is_refused_in_one_line(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "DiT.pt"
    wrong = {
        "positions": tensors | {"pos_embed": tensors["pos_embed"].flip(1)},
        "missing": {name: t for name, t in tensors.items() if name != "blocks.1.mlp.fc2.bias"},
        "unknown": tensors | {"blocks.0.other.weight": torch.zeros(1)},
        "size": {name: t for name, t in tensors.items() if not name.startswith("blocks.1")},
        "empty": {},
    }
    for content in wrong.values():
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=r"DiT\.pt: not the original DiT in one of the sizes S, B, L, XL") as error:
            dit.load_dit(path)
        assert "\n" not in str(error.value)
    path.write_bytes(b"damaged")
    with pytest.raises(BackendError, match="not a file of PyTorch weights"):
        dit.load_dit(path)
