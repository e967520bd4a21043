"""How well an image fits its text, by CLIP (Radford et al., 2021) through open_clip.

Letters: B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from texttok_cli.assets import is_offline
from texttok_cli.data.images import to_image
from texttok_cli.errors import BackendError
from texttok_cli.files import sha256_file
from texttok_cli.metrics.protocols import CLIP_NAME, CLIP_WEIGHTS
from texttok_cli.models.layers import exact_convolutions

HESSEL_PREFIX = "A photo depicts "  # CLIPScore (Hessel et al., 2021) puts it before every caption


class ClipScorer:
    """A frozen CLIP; `truncated` counts the captions it could not read to their end (77 tokens in the published ones).

    `weights` is a local file, or one of open_clip's tags, which is downloaded. Raises BackendError if they are not available.
    """

    def __init__(
        self, name: str = CLIP_NAME, weights: str = CLIP_WEIGHTS, *, device: torch.device | str = "cpu", offline: bool = False
    ) -> None:
        import open_clip

        if name not in open_clip.list_models():
            raise BackendError(f"--clip {name}: open_clip has no such model")
        self.model, self.prepare, path = load_open_clip(name, weights, option="--clip-weights", device=device, offline=offline)
        self.tokenize: Any = open_clip.get_tokenizer(name)
        self.name, self.sha256, self.device, self.truncated = name, sha256_file(path), torch.device(device), 0

    @torch.no_grad()
    def cosines(self, images: Tensor, captions: Sequence[str], *, prefixes: Sequence[str] = ("",)) -> Tensor:
        """Cosine of each uint8 image (B, 3, H, W) and its caption with each prefix before it, (B, len(prefixes)) float32."""
        pixels = torch.stack([self.prepare(to_image(image)) for image in images])
        with torch.autocast(self.device.type, enabled=False), exact_convolutions():
            image_codes = self.model.encode_image(pixels.to(self.device), normalize=True)  # (B, C)
            cosines = [(image_codes * self._text_codes([prefix + text for text in captions])).sum(dim=1) for prefix in prefixes]
        self.truncated += sum(self._overflows(prefixes[0] + text) for text in captions)
        return torch.stack(cosines, dim=1).float().cpu()

    def _text_codes(self, texts: list[str]) -> Tensor:
        codes: Tensor = self.model.encode_text(self.tokenize(texts).to(self.device), normalize=True)
        return codes

    def _overflows(self, text: str) -> bool:
        """Whether the text has more tokens than CLIP reads: with room for one more, that is taken."""
        length = self.tokenize.context_length
        theirs = getattr(self.tokenize, "tokenizer", None)  # of Hugging Face
        if theirs is None:  # CLIP's own: pads with 0, and ends with a token that is not 0
            return bool(self.tokenize([text], context_length=length + 1)[0, -1] != 0)
        # SigLIP pads with the token that it ends with, CLIPS has its last token after the padding: so all are counted.
        taken = [self.tokenize([text], context_length=room) != theirs.pad_token_id for room in (length, length + 1)]
        return bool(taken[1].sum() > taken[0].sum())


def load_open_clip(name: str, weights: str, *, option: str, device: torch.device | str, offline: bool) -> tuple[Any, Any, Path]:
    """A frozen model of open_clip's, what makes its inputs of an image, and the file of its weights. BackendError names `option`."""
    import open_clip

    path, how = find_weights(name, weights, option=option, offline=offline), as_trained(name, weights)
    try:
        model, _, prepare = open_clip.create_model_and_transforms(name, pretrained=str(path), device=device, **how)
    except Exception as err:  # what is no such file makes the unpickler fail in any way it happens to
        said = " ".join(str(err).split())[:200] or type(err).__name__
        raise BackendError(f"{option} {weights}: could not be loaded as weights of {name}: {said}") from err
    return model.requires_grad_(False).eval(), prepare, path


def as_trained(name: str, weights: str) -> dict[str, Any]:
    """What the weights of a tag want, which open_clip forgets when it is given their file; of a local file what all tags of the model want.

    BackendError if these differ in their images. If they differ in QuickGELU, the model's name decides: `-quickgelu` has it.
    """
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    tags = list_pretrained_tags_by_model(name) if Path(weights).is_file() else [weights]
    configs = [get_pretrained_cfg(name, tag) for tag in tags]
    keys = {"mean": "image_mean", "std": "image_std", "interpolation": "image_interpolation", "resize_mode": "image_resize_mode"}
    images = [{argument: config[key] for key, argument in keys.items() if config.get(key) is not None} for config in configs] or [{}]
    if any(other != images[0] for other in images):
        raise BackendError(
            f"{weights}: weights of {name} differ in how they take images, and a file does not say how: give a tag ({', '.join(tags)})"
        )
    return {**images[0], "force_quick_gelu": bool(configs) and all(config.get("quick_gelu") for config in configs)}


def find_weights(name: str, weights: str, *, option: str, offline: bool) -> Path:
    """A local file, or that of a tag of open_clip's: from the hub's cache, else downloaded unless offline. BackendError names `option`."""
    if Path(weights).is_file():
        return Path(weights)
    import open_clip
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg

    config = get_pretrained_cfg(name, weights)
    if not config:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise BackendError(f"{option} {weights}: neither a file nor a tag of {name} (tags: {tags})")
    cached = _cached(config.get("hf_hub", ""))
    if cached is not None:
        return cached
    if is_offline(offline):
        raise BackendError(f"weights {name}/{weights}: not cached, nor downloaded with --offline: name a local file with {option} FILE")
    try:
        return Path(download_pretrained(config))
    except (OSError, RuntimeError, ValueError) as err:  # no network, refused, a wrong hash
        reason, remedy = type(err).__name__, f"check the network, or give a local file, {option} FILE"
        raise BackendError(f"weights {name}/{weights}: could not be downloaded ({reason}): {remedy}") from None


def _cached(where: str) -> Path | None:
    """The file of a tag that is at REPOSITORY/[FILE] of the hub; open_clip asks the network even for one that is there."""
    from huggingface_hub import try_to_load_from_cache
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    repo, _, file = where.rpartition("/")
    names = [str(Path(file).with_suffix(".safetensors")), file] if file else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]  # its order
    found = (try_to_load_from_cache(repo, name) for name in names) if repo else ()
    return next((Path(path) for path in found if isinstance(path, str)), None)
