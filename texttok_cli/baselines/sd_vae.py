"""SD-VAE-f8 (Rombach et al., 2022), the tokenizer that the paper compares with, through diffusers.

Letters: B batch, S image side, d latent channels (4).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from texttok_cli.assets import is_offline
from texttok_cli.baselines.base import Baseline, BaselineInfo
from texttok_cli.data import normalize, to_uint8
from texttok_cli.errors import BackendError, CheckpointError
from texttok_cli.files import sha256_file
from texttok_cli.models.layers import exact_convolutions

FILES = ("config.json", "diffusion_pytorch_model.safetensors")


class SDVAE(Baseline):
    """Diffusers' AutoencoderKL by hub name or local folder: images to latents (the posterior's mean, unscaled) and back.

    Raises CheckpointError for what is no such model, BackendError if it, or diffusers, is not available.
    """

    def __init__(self, name: str, where: str, *, device: torch.device | str, offline: bool) -> None:
        kind = _autoencoder_kl(name)
        folder = Path(where) if Path(where).is_dir() else _from_hub(where, offline=is_offline(offline))
        if not all((folder / file).is_file() for file in FILES):
            raise CheckpointError(f"{where}: the folder needs {' and '.join(FILES)}")
        try:
            self.model = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32)
        except (OSError, ValueError, KeyError, RuntimeError) as err:
            raise CheckpointError(f"{where}: not a diffusers AutoencoderKL ({type(err).__name__})") from None
        self.device = torch.device(device)
        self.model.eval().requires_grad_(False).to(self.device)
        self.channels: int = self.model.config.latent_channels
        self.info = BaselineInfo(name, sha256_file(folder / FILES[1]))

    @torch.inference_mode()
    def encode(self, images: Tensor, captions: Sequence[str] | None = None) -> Tensor:
        """uint8 (B, 3, S, S) -> latents (B, d, S/8, S/8) float32 on the CPU. DataError for a side that 8 does not divide."""
        self.check_size(images)
        with exact_convolutions():
            z: Tensor = self.model.encode(normalize(images.to(self.device))).latent_dist.mode()
        return z.cpu()

    @torch.inference_mode()
    def decode(self, z: Tensor, captions: Sequence[str] | None = None) -> Tensor:
        """Latents -> uint8 (B, 3, S, S) on the CPU, rounding half up."""
        with exact_convolutions():
            return to_uint8(self.model.decode(z.to(self.device)).sample.float()).cpu()


def _autoencoder_kl(name: str) -> Any:
    """The class of the network that `name` is."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise BackendError(f"{name}: diffusers is not installed: pip install diffusers") from None
    return AutoencoderKL


def _from_hub(repo: str, *, offline: bool) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path([hf_hub_download(repo, file, local_files_only=offline) for file in FILES][-1]).parent
    except (OSError, HFValidationError) as err:  # the hub's own errors are OSErrors
        reason = type(err).__name__
        raise BackendError(f"{repo}: neither a folder nor available from the hub ({reason}): give a local folder") from None


def untrained_sd_vae() -> torch.nn.Module:
    """The network of SD-VAE-f8 (stabilityai/sd-vae-ft-ema's configuration, 84 M parameters) with random weights, to time it.

    Raises BackendError if diffusers is not installed.
    """
    model = _autoencoder_kl("SD-VAE-f8")(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
    )
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]
