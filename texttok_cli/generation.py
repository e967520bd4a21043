"""From a class or a prompt to an image: a generator, the tokenizer whose latents it makes, and captions for the detokenizer.

    from texttok_cli import load_generator

    generator = load_generator("class-32-128")                     # bundled, or a path, or hf://owner/name
    images = generator.sample(classes=["flower/sunflower"], seeds=range(8), steps=50, cfg="3.8:power-cosine=4")

Letters: B batch, S image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

from texttok_cli.checkpoint import GeneratorInfo, ModelInfo, caption_hash, find_tokenizer_file, load_generator_file
from texttok_cli.config import Labels, Precision
from texttok_cli.config.schema import ClassLabels, PromptCondition, TokenLatents
from texttok_cli.data.labels import class_text, draw_label, find_class, spread_labels
from texttok_cli.data.listings import is_utf8
from texttok_cli.data.texts import UnseenCaptions
from texttok_cli.diffusion import Guidance, Sampling, sample
from texttok_cli.errors import CheckpointError, DataError
from texttok_cli.inference import Tokenizer, bundled_models, find_model, load_tokenizer
from texttok_cli.models.devices import pick_device
from texttok_cli.models.dit import DiT
from texttok_cli.models.layers import in_precision
from texttok_cli.text import EmbeddingCache, load_text_encoder

BUNDLED = {"class": "class-32-128", "text": "t2i-32-128"}  # by what they are conditioned on; recipes tiny/NAME-flow and tiny/NAME-short
CAPTIONS_SUFFIX = ".captions.jsonl"  # beside a generator's file: NAME.captions.jsonl
Asked = TypeVar("Asked", str, int, str | int)

MAX_SEED = 2**32 - 1  # all that torch's generator on the CPU tells apart


@dataclass(frozen=True, slots=True)
class Request:
    """One image to make: with how it is sampled, all that the image depends on."""

    seed: int
    class_id: int | None = None  # of a class model
    text: str | None = None  # a text model's prompt; of a class model the caption that the detokenizer reads
    leaked: bool = False  # whether that caption is in the generator's training data


class Generator:
    """A DiT, the tokenizer it was trained with, and what they need to know of text."""

    def __init__(
        self,
        dit: DiT,
        info: GeneratorInfo,
        tokenizer: Tokenizer,
        *,
        text: EmbeddingCache | None,
        captions: UnseenCaptions | None,
        guide: tuple[DiT, GeneratorInfo] | None,
        precision: Precision,
    ) -> None:
        self.dit, self.info, self.tokenizer, self.text, self.captions, self.precision = dit, info, tokenizer, text, captions, precision
        self.guide: DiT | None = None if guide is None else guide[0]
        self.guide_info: GeneratorInfo | None = None if guide is None else guide[1]
        self._trained_on = set(info.train_captions.tolist())

    @property
    def num_classes(self) -> int | None:
        """Of a class model; None for a text model."""
        condition = self.dit.cfg.condition
        return condition.num_classes if isinstance(condition, ClassLabels) else None

    @property
    def classes(self) -> list[str] | None:
        """Their names by id; None for a text model and for one that has no names."""
        return self.info.header.classes

    @property
    def truncated(self) -> int:
        """Texts so far that were longer than a text encoder takes."""
        encoders = {id(cache): cache for cache in (self.text, self.tokenizer.text) if cache is not None}
        return sum(cache.truncated for cache in encoders.values())

    def sample(
        self,
        *,
        classes: str | int | Sequence[str | int] | Tensor | None = None,
        prompts: str | Sequence[str] | None = None,
        seeds: int | Sequence[int] | Tensor | None = None,
        steps: int | None = None,
        cfg: str | float | Guidance | None = None,
        sampler: str | None = None,
        batch_size: int = 32,
    ) -> Tensor:
        """Images uint8 (n, 3, S, S), 0 to 255, on the CPU, one for each class or prompt; one class or prompt alone is for all seeds.

        A class is its name (`flower/sunflower`, or `sunflower` if no other has that name) or id. Seeds are 0, 1, ... unless given;
        the same seed gives the same image in any batch. `sampler`, `steps` (their number) and `cfg` (the guidance: 1.5,
        `3.8:power-cosine=4`, `1.8:interval=0,0.7`) are the model's own unless given; `batch_size` is the number of images made at a time.

        Raises DataError for conditions that the model doesn't take, RecipeError for a `cfg` that can't be read, and as
        `generate` does.
        """
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}: make at least one image at a time")
        wanted = self.requests(classes=_listed(classes), prompts=_listed(prompts), seeds=_listed(seeds))
        how = Sampling.asked(self.dit.cfg, sampler, steps, None if cfg is None else str(cfg))
        return torch.cat([self.generate(wanted[i : i + batch_size], how) for i in range(0, len(wanted), batch_size)])

    def requests(
        self, *, classes: Sequence[str | int] | None = None, prompts: Sequence[str] | None = None, seeds: Sequence[int] | None = None
    ) -> list[Request]:
        """What `sample` will be asked for, with ids and captions settled. Raises as `sample` does."""
        if (classes is None) == (prompts is None):
            raise DataError("give classes to a class model or prompts to a text-to-image model")
        conditions = list(classes or prompts or [])
        if len(conditions) == 1 and seeds is not None:
            conditions *= len(seeds)
        seeds = range(len(conditions)) if seeds is None else seeds
        if not conditions or len(conditions) != len(seeds):
            raise DataError(f"{len(conditions)} classes or prompts and {len(seeds)} seeds: give the same number of each, at least one")
        if not all(0 <= seed <= MAX_SEED for seed in seeds):
            raise DataError(f"a seed is a whole number from 0 to {MAX_SEED}, these go from {min(seeds)} to {max(seeds)}")
        if prompts is not None:
            return self._prompted([str(prompt) for prompt in conditions], seeds)
        ids = {asked: self.class_id(asked) for asked in dict.fromkeys(conditions)}
        return [self._of_class(ids[asked], seed) for asked, seed in zip(conditions, seeds, strict=True)]

    def generate(self, requests: Sequence[Request], how: Sampling) -> Tensor:
        """One batch: images uint8 (B, 3, S, S) on the CPU.

        Raises RecipeError for a sampler, a number of steps or a guide that doesn't fit the model, and for guidance by the null
        condition of a model that never saw it.
        """
        device, texts = self.tokenizer.device, [request.text or "" for request in requests]
        class_ids = [request.class_id for request in requests]
        z = sample(
            self.dit,
            how,
            seeds=[request.seed for request in requests],
            class_ids=None if self.num_classes is None else torch.tensor(class_ids, device=device),
            cond=None if self.text is None else self.text(texts).to(device),
            guide=self.guide,
            precision=self.precision,
        )
        # The detokenizer reads the same texts: their embeddings are in the cache that both share.
        return self.tokenizer.decode(z, None if self.tokenizer.text_condition is None else texts)

    def labels(self, rule: Labels, seeds: Sequence[int]) -> list[int]:
        """A class id for each seed: of each class the same number, or in proportion to its training images, or drawn by the seed.

        DataError for a text model, and for a file that does not say how many images its classes had.
        """
        if self.num_classes is None:
            raise DataError(f"{self.info.name}: is a text-to-image model: give it prompts, not labels")
        if rule == "random":
            return [draw_label(self.num_classes, seed) for seed in seeds]
        if rule == "equal":
            return spread_labels([1] * self.num_classes, len(seeds))
        counts = self.info.header.class_counts
        if counts is None:
            raise DataError(f"{self.info.name}: its file does not say how many training images each class had: use --labels equal")
        return spread_labels(counts, len(seeds))

    def class_id(self, asked: str | int) -> int:
        """Of a name or an id. DataError for an unknown or ambiguous one, and for a text model."""
        if self.num_classes is None:
            raise DataError(f"{self.info.name}: is a text-to-image model: give it prompts, not classes")
        return find_class(asked, self.classes, self.num_classes)

    def class_name(self, class_id: int) -> str:
        """As in the generator's file; of one without names the id."""
        return str(class_id) if self.classes is None else self.classes[class_id]

    def _prompted(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Request]:
        if self.num_classes is not None:
            raise DataError(f"{self.info.name}: is a class model ({self.num_classes} classes): give it classes, not prompts")
        wrong = next((prompt for prompt in prompts if not is_utf8(prompt)), None)
        if wrong is not None:
            raise DataError(f"prompt {wrong!a}: is not Unicode text; write it as UTF-8")
        return [Request(seed, text=prompt) for prompt, seed in zip(prompts, seeds, strict=True)]

    def _of_class(self, class_id: int, seed: int) -> Request:
        """Sec. 3.2: only the class enters the generator; the detokenizer gets an unseen caption of that class."""
        class_name, condition = self.class_name(class_id), self.tokenizer.text_condition
        if condition is None or not self.tokenizer.detokenizer_reads_text:
            return Request(seed, class_id)
        if condition.source == "class_text":  # the same for all images of the class, in training too
            return Request(seed, class_id, class_text(class_name))
        if self.captions is None:
            raise DataError(
                f"{self.info.name}: its detokenizer reads a caption of the class, and there is no list of them beside its file"
                f" (FILE{CAPTIONS_SUFFIX} for FILE.safetensors): give one with --captions, made by `texttok caption --unseen-per-class`"
            )
        text = self.captions.draw(class_name, seed)
        return Request(seed, class_id, text, leaked=caption_hash(text) in self._trained_on)


def load_generator(
    model: str | Path = BUNDLED["class"],
    *,
    tokenizer: str | Path | None = None,
    captions: str | Path | None = None,
    guide: str | Path | None = None,
    device: str | torch.device = "auto",
    precision: Precision = "fp32",
    offline: bool = False,
) -> Generator:
    """A generator by bundled name, path or `hf://owner/name`, with its tokenizer, ready to sample.

    The tokenizer is found by its hash among the bundled ones and beside the generator's file, else `tokenizer` names it.
    `captions` is a list of unseen captions instead of the one beside the file; `guide` a weaker generator for autoguidance.

    Raises CheckpointError for a model that is not there, not whole or not of this generator, BackendError for a device, precision or text
    encoder that isn't, and DataError for `captions` given to a generator that reads none and for a list of captions that can't be
    used.
    """
    where, file = pick_device(device), find_model(model, offline=offline)
    dit, info = load_generator_file(file, device=where)
    if not isinstance(dit.cfg.latents, TokenLatents):
        raise CheckpointError(f"{info.name}: generates feature maps; texttok can only decode token sequences")
    weaker = None
    if guide is not None:
        net, its_info = load_generator_file(find_model(guide, offline=offline), device=where)
        weaker = in_precision(net, precision), its_info
    found = _find_tokenizer(info, file) if tokenizer is None else find_model(tokenizer, offline=offline)
    decoder = load_tokenizer(found, device=device, precision=precision, offline=offline)
    decoder.check_has_token_files()
    if info.header.tokenizer_sha256 not in decoder.info.latents_made_by:
        raise CheckpointError(
            f"{info.name}: makes the latents of {_tokenizer_of(info)}, not of {_named(decoder.info.name, decoder.info.sha256)}"
        )
    if weaker is not None:
        _check_guide(info, weaker[1], decoder.info)
    text, condition = decoder.text, dit.cfg.condition
    if not isinstance(condition, PromptCondition):
        text = None
    elif text is None or text.config != condition.encoder:
        text = EmbeddingCache(load_text_encoder(condition.encoder, device=where, offline=offline))
    if captions is not None and (text is not None or not decoder.detokenizer_reads_text):
        raise DataError(f"{info.name}: its detokenizer reads no captions of classes: leave out --captions")
    beside = file.with_name(file.stem + CAPTIONS_SUFFIX)
    unseen = captions or (beside if beside.is_file() else None)
    bank = None if unseen is None else UnseenCaptions(Path(unseen))
    return Generator(in_precision(dit, precision), info, decoder, text=text, captions=bank, guide=weaker, precision=precision)


def bundled_generator(condition: Literal["class", "text"]) -> str:
    """The name of the bundled generator that takes classes, or prompts. CheckpointError if none comes with this texttok."""
    name = BUNDLED[condition]
    if name not in bundled_models():
        kind = {"class": "class-conditional", "text": "text-to-image"}[condition]
        raise CheckpointError(
            f"no {kind} generator comes with this texttok ({name} is missing): name a file with --model, or `texttok train tiny/{name}`"
        )
    return name


def _find_tokenizer(info: GeneratorInfo, file: Path) -> Path:
    candidates = [*bundled_models().values(), *sorted(file.parent.glob("*.safetensors"))]
    candidates.sort(key=lambda path: path.stem != info.header.tokenizer_name)  # the likely one first: hashing takes a while
    path = find_tokenizer_file(list(dict.fromkeys(candidates)), info.header.tokenizer_sha256)
    if path is not None:
        return path
    raise CheckpointError(
        f"{info.name}: makes the latents of {_tokenizer_of(info)}, which is neither bundled nor beside its file: give it with --tokenizer"
    )


def _check_guide(info: GeneratorInfo, guide: GeneratorInfo, tokenizer: ModelInfo) -> None:
    """CheckpointError for a guide of other latents or classes; `diffusion.sample` checks the rest."""
    ours, theirs = info.header, guide.header
    if theirs.tokenizer_sha256 not in tokenizer.latents_made_by:
        raise CheckpointError(
            f"{guide.name}: can't guide {info.name}: it makes the latents of {_tokenizer_of(guide)}, not of {_tokenizer_of(info)}"
        )
    if theirs.classes != ours.classes:
        raise CheckpointError(f"{guide.name}: can't guide {info.name}: it was trained on other classes")


def _tokenizer_of(info: GeneratorInfo) -> str:
    return _named(info.header.tokenizer_name, info.header.tokenizer_sha256)


def _named(name: str, sha256: str) -> str:
    return f"tokenizer {name} (sha256 {sha256[:12]}...)"


def _listed(value: Asked | Sequence[Asked] | Tensor | None) -> list[Asked] | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value.flatten().tolist()
    return [value] if isinstance(value, str | int) else list(value)
