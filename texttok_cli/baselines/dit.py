"""The original DiT's public checkpoints (Peebles & Xie, 2023) in our class, for the paper's comparison with it.

Their published samples are guided on the first three of the four channels: `channels=3` of a cfg.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from texttok_cli.assets import load_torch_weights
from texttok_cli.config.schema import DDPM, DIT_SIZES, ClassLabels, GeneratorConfig, GridLatents, Transformer
from texttok_cli.errors import CheckpointError
from texttok_cli.models.devices import without_weights
from texttok_cli.models.dit import DiT

SD_VAE_SCALE = 0.18215  # their latents are SD-VAE's times this

# Their names -> ours, as patterns of whole names without the last part.
NAMES = {
    r"x_embedder\.proj": "embed",
    r"t_embedder\.mlp\.([02])": r"time.mlp.\1",
    r"y_embedder\.embedding_table": "classes",
    r"blocks\.(\d+)\.attn\.qkv": r"blocks.\1.attn.qkv",
    r"blocks\.(\d+)\.attn\.proj": r"blocks.\1.attn.out",
    r"blocks\.(\d+)\.mlp\.fc1": r"blocks.\1.mlp.0",
    r"blocks\.(\d+)\.mlp\.fc2": r"blocks.\1.mlp.2",
    r"blocks\.(\d+)\.adaLN_modulation\.1": r"blocks.\1.modulation",
    r"final_layer\.adaLN_modulation\.1": "final_modulation",
    r"final_layer\.linear": "to_output",
}


def load_dit(path: Path, *, device: torch.device | str = "cpu") -> DiT:
    """A public checkpoint such as DiT-XL-2-256x256.pt, in eval mode.

    Raises BackendError for a file that can't be read and CheckpointError for another model.
    """
    tensors = load_torch_weights(path)
    try:
        heads = {(size["depth"], size["width"]): size["heads"] for size in DIT_SIZES.values()}[_size(tensors)]
        return read_dit(tensors, heads=heads).to(device)
    except (KeyError, IndexError, ValueError, RuntimeError) as err:
        raise CheckpointError(f"{path}: not the original DiT in one of the sizes {', '.join(DIT_SIZES)} ({type(err).__name__})") from None


def read_dit(tensors: Mapping[str, Tensor], *, heads: int) -> DiT:
    """Tensors under their public names -> the model. KeyError, ValueError or RuntimeError if they are not a DiT's."""
    cfg = _config(tensors, heads)
    with without_weights():
        model = DiT(cfg)
    positions = tensors["pos_embed"][0].float()
    if not torch.allclose(positions, model.positions, atol=1e-5):
        raise ValueError("its positions are not DiT's sines and cosines")
    state = {_renamed(name): tensor.float() for name, tensor in tensors.items() if name != "pos_embed"}
    state["embed.weight"] = state["embed.weight"].flatten(1)  # a convolution whose stride is its size
    for name in ("to_output.weight", "to_output.bias"):  # their rows go by place in the patch, then channel; ours the other way
        patch_area = (model.patch_size or 1) ** 2
        state[name] = state[name].reshape(patch_area, -1, *state[name].shape[1:]).transpose(0, 1).flatten(0, 1)
    channels = model.latent_shape[0]
    state |= {"latent_mean": torch.zeros(channels), "latent_std": torch.full((channels,), 1 / SD_VAE_SCALE)}
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def _config(tensors: Mapping[str, Tensor], heads: int) -> GeneratorConfig:
    """What the shapes say."""
    _, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    depth, dim = _size(tensors)
    side = round(tensors["pos_embed"].shape[1] ** 0.5)
    return GeneratorConfig(
        latents=GridLatents(kind="grid", size=side * patch, patch_size=patch, channels=channels),
        backbone=Transformer(depth=depth, width=dim, heads=heads, mlp_ratio=len(tensors["blocks.0.mlp.fc1.bias"]) / dim),
        condition=ClassLabels(num_classes=len(tensors["y_embedder.embedding_table.weight"]) - 1),
        process=DDPM(learned_sigma=len(tensors["final_layer.linear.bias"]) == 2 * channels * patch**2),
    )


def _size(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Depth and width."""
    return len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}), len(tensors["x_embedder.proj.bias"])


def _renamed(name: str) -> str:
    stem, _, last = name.rpartition(".")
    for pattern, ours in NAMES.items():
        if match := re.fullmatch(pattern, stem):
            return f"{match.expand(ours)}.{last}"
    raise KeyError(name)
