"""What a sweep samples from: a generator with its TexTok, or the original DiT with SD-VAE.

Letters: B batch, S image size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from texttok_cli.baselines import PREFIX, SDVAE, load_baseline
from texttok_cli.baselines.base import FACTOR
from texttok_cli.baselines.dit import load_dit
from texttok_cli.bench.tradeoff import Series, Setting
from texttok_cli.config import Precision
from texttok_cli.config.schema import ClassLabels, GeneratorConfig, GridLatents
from texttok_cli.data.labels import spread_labels
from texttok_cli.data.texts import read_prompts
from texttok_cli.diffusion import sample
from texttok_cli.errors import DataError
from texttok_cli.files import sha256_file
from texttok_cli.generation import Generator, Request, load_generator
from texttok_cli.models.layers import autocast, in_precision
from texttok_cli.text import EmbeddingCache

ORIGINAL = f"{PREFIX}dit="  # as a series' generator: baseline:dit=DiT-XL-2-256x256.pt


class System(Protocol):
    """Something that makes the images of a series at any setting."""

    tokens: int  # latent vectors of an image
    image_size: int
    config: GeneratorConfig
    identity: Mapping[str, object]  # all that its images depend on

    def sample(self, setting: Setting, numbers: Sequence[int]) -> Tensor:
        """Samples with these numbers, uint8 (B, 3, S, S) on the CPU; a number's sample is the same in any batch."""


def open_system(series: Series, *, images: int, seed: int, device: torch.device, precision: Precision, offline: bool) -> System:
    """The system of a series, to make `images` images: of its classes as `labels` says, or of the first prompts.

    Raises DataError, CheckpointError or BackendError for what is not available.
    """
    kind: type[OriginalDiT | TexTokSystem] = OriginalDiT if series.generator.startswith(ORIGINAL) else TexTokSystem
    return kind(series, images=images, seed=seed, device=device, precision=precision, offline=offline)


class TexTokSystem:
    """A generator on tokens and its tokenizer: latents, text embedding and detokenizing are all in its time (Fig. 4)."""

    def __init__(self, series: Series, *, images: int, seed: int, device: torch.device, precision: Precision, offline: bool) -> None:
        self.generator = load_generator(
            series.generator, tokenizer=series.tokenizer, captions=series.captions, device=device, precision=precision, offline=offline
        )
        self.config = self.generator.dit.cfg
        self.tokens, self.image_size = self.config.latents.num_vectors, self.generator.tokenizer.cfg.image_size
        self.requests = _requests(self.generator, series, range(seed, seed + images))
        self.identity: Mapping[str, object] = {
            "generator": self.generator.info.sha256,
            "tokenizer": self.generator.tokenizer.info.sha256,
            "captions": None if self.generator.captions is None else self.generator.captions.sha256,
            "prompts": None if series.prompts is None else sha256_file(series.prompts),
        }

    def sample(self, setting: Setting, numbers: Sequence[int]) -> Tensor:
        """See `System`. Start with empty caches, or repeated captions would be free and the timing too good."""
        generator = self.generator
        caches = (generator.text, generator.tokenizer.text)
        fresh = {id(cache): EmbeddingCache(cache.encoder) for cache in caches if cache is not None}  # one, where both share it
        generator.text, generator.tokenizer.text = (fresh.get(id(cache)) for cache in caches)
        return self.generator.generate([self.requests[number] for number in numbers], setting.sampling)


def _requests(generator: Generator, series: Series, seeds: range) -> list[Request]:
    if generator.num_classes is not None:
        if series.prompts is not None:
            raise DataError(f"{series.name}: {series.generator} is a class model: leave out prompts")
        return generator.requests(classes=generator.labels(series.labels, seeds), seeds=seeds)
    if series.prompts is None:
        raise DataError(f"{series.name}: {series.generator} is a text-to-image model: name a file of prompts")
    prompts = read_prompts(series.prompts)
    if len(prompts) < len(seeds):
        raise DataError(f"{series.prompts}: has {len(prompts):,} prompts, but a point has {len(seeds):,} images")
    return generator.requests(prompts=prompts[: len(seeds)], seeds=seeds)


class OriginalDiT:
    """A public checkpoint of DiT/2 and SD-VAE (`tokenizer`: baseline:sd-vae or baseline:sd-vae=FOLDER), in the sweep's precision."""

    def __init__(self, series: Series, *, images: int, seed: int, device: torch.device, precision: Precision, offline: bool) -> None:
        given = {f"labels: {series.labels}": series.labels != "equal", "captions": series.captions, "prompts": series.prompts}
        unknown = [key for key, value in given.items() if value]
        if unknown:
            raise DataError(f"{series.name}: the original DiT takes classes, the same number of each: leave out {', '.join(unknown)}")
        path = Path(series.generator.removeprefix(ORIGINAL))
        decoder = load_baseline(series.tokenizer or f"{PREFIX}sd-vae", device=device, offline=offline)
        if not isinstance(decoder, SDVAE):
            raise DataError(f"{series.name}: {series.tokenizer} is not SD-VAE, whose latents the original DiT makes")
        self.dit = in_precision(load_dit(path, device=device), precision)
        self.decoder, self.device, self.precision = decoder, device, precision
        self.config = self.dit.cfg
        latents, condition = self.config.latents, self.config.condition
        assert isinstance(latents, GridLatents) and isinstance(condition, ClassLabels)
        self.tokens, self.image_size = latents.num_vectors, FACTOR * latents.size
        self.labels, self.seed = spread_labels([1] * condition.num_classes, images), seed
        self.identity: Mapping[str, object] = {"generator": sha256_file(path), "tokenizer": decoder.info.sha256}

    def sample(self, setting: Setting, numbers: Sequence[int]) -> Tensor:
        """See `System`."""
        z = sample(
            self.dit,
            setting.sampling,
            seeds=[self.seed + number for number in numbers],
            class_ids=torch.tensor([self.labels[number] for number in numbers], device=self.device),
            precision=self.precision,
        )
        with autocast(self.device, self.precision):
            return self.decoder.decode(z)
