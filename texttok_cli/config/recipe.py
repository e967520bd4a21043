"""What a recipe says beside the model: data, objective, optimizer, schedule and the run itself.

Free of torch, as the schema of the models is; sources of the defaults stand beside them ([I] inferred;
recipes/base/tokenizer.yaml says from what).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from texttok_cli.config import Precision
from texttok_cli.config.schema import Config, GeneratorConfig, TokenizerConfig


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Paths = Annotated[list[str], BeforeValidator(_listed)]
LpipsNet = Literal["lpips-vgg", "lpips-alex", "stlpips-vgg", "stlpips-alex"]
PerceptualNet = Literal[LpipsNet, "resnet50-logits", "efficientnet-lite0"]
GanKind = Literal["non_saturating", "hinge"]


class DataConfig(Config):
    """What to train on. Paths may hold globs and braces: `shards/train-{0000..0009}.tar`; one path may stand without a list."""

    train: Paths
    val: Paths = Field(default_factory=list)
    captions: str | None = None  # a captions.jsonl that overrides those beside the images
    caption_field: str | None = None  # key in a shard's .json: measured, captions, longest, ...
    max_words: int | None = Field(None, ge=1)  # captions with more are refused, for a recipe that is about their length
    crop: Literal["center", "random"] = "center"  # random: where along the longer side, after the short side is scaled
    flip: bool = True
    cache: bool = False  # keep the decoded images in memory (uint8)
    workers: int = Field(4, ge=0, le=256)

    @model_validator(mode="after")
    def _cached_crops_are_fixed(self) -> DataConfig:
        if self.cache and self.crop == "random":
            raise ValueError("cache keeps one crop an image: set cache to false for crop random")
        return self


class LatentData(Config):
    """What a generator trains on: folders of tokens that `texttok encode DATASET -o FOLDER` wrote, all of one tokenizer."""

    train: Paths
    val: Paths = Field(default_factory=list)
    tokenizer: str | None = None  # whose tokens they are: bundled name, path or hf://
    captions: str | None = None  # a captions.jsonl that overrides those in the token files, for tokens of a model without text


class PerceptualLoss(Config):
    """Distance of deep features (Sec. 3.2; the paper cites LPIPS): of LPIPS, ST-LPIPS or an ImageNet classifier, or of one's logits."""

    net: PerceptualNet = "lpips-vgg"
    weight: float = Field(0.1, ge=0)  # [I] config; MAGVIT App. B.2
    start: int = Field(0, ge=0)  # optimizer step from which it counts


class DiscriminatorConfig(Config):
    """StyleGAN's discriminator (Sec. 4.1: ~24 M parameters; [I] in MAGVIT's form): channels of level i are base * multipliers[i]."""

    base: int = Field(128, ge=1, le=4096)  # [I] config: with these multipliers 24.2 M at 256 px, as the paper says
    multipliers: list[float] = Field([1, 2, 4, 4, 4, 4], min_length=1, max_length=12)  # 512 px: [0.5, 1, 2, 4, 4, 4, 4]
    lr: float = Field(1e-4, gt=0)  # [I] MAGVIT: Adam, the generator's rate and betas
    betas: tuple[float, float] = (0.0, 0.99)


class AdversarialLoss(Config):
    """GAN (Sec. 4.1, following ViT-VQGAN) with LeCAM (Sec. 3.2, MAGVIT-v2) and R1 (which the paper does not name), from one step on."""

    kind: GanKind = "non_saturating"  # [I] MAGVIT
    weight: float = Field(0.1, ge=0)  # [I] config, MAGVIT
    start: int = Field(80_000, ge=0)  # [I] config
    ramp: int = Field(0, ge=0)  # steps over which the generator's weight then grows from 0
    adaptive: bool = False  # scale the weight by the ratio of the gradients' norms at the last layer, as VQGAN
    r1: float = Field(10.0, ge=0)  # [I] config, MAGVIT: times E||grad_x D||^2, without 1/2
    r1_every: int = Field(1, ge=1)  # k: applied every k-th step, times k
    lecam: float = Field(1e-4, ge=0)  # [I] config; in the form of its authors' code
    lecam_decay: float = Field(0.999, ge=0, lt=1)  # [I] MAGVIT
    discriminator: DiscriminatorConfig = DiscriminatorConfig()


class Objective(Config):
    """Losses on images in [0, 1] ([I] MAGVIT; in [-1, 1] the same l2 would weigh four times as much)."""

    l2: float = Field(1.0, ge=0)
    perceptual: PerceptualLoss | None = PerceptualLoss()
    adversarial: AdversarialLoss | None = None


class OptimizerConfig(Config):
    """[I] MAGVIT's Adam, or Muon for the blocks' matrices with AdamW for the rest."""

    kind: Literal["adam", "adamw", "muon"] = "adam"
    lr: float = Field(1e-4, gt=0)  # [I] config, MAGVIT
    betas: tuple[float, float] = (0.0, 0.99)  # [I] MAGVIT
    weight_decay: float = Field(0.0, ge=0)
    muon_lr: float = Field(0.02, gt=0)  # kind muon: the matrices' rate; lr is then everything else's
    muon_momentum: float = Field(0.95, ge=0, lt=1)
    grad_clip: float | None = Field(None, gt=0)  # by global norm


class ScheduleConfig(Config):
    """Learning rate as a function of the optimizer step: warm-up, then constant, then cosine or linear to zero."""

    steps: int = Field(ge=1)
    warmup: int = Field(0, ge=0)
    decay: Literal["cosine", "linear"] = "cosine"
    decay_fraction: float = Field(1.0, ge=0, le=1)  # the last part of the steps in which the rate falls; 0: it never does


class TrainConfig(Config):
    """The run itself: what all tasks have in common."""

    seed: int = Field(0, ge=0, lt=2**32)
    # A model of the same configuration whose weights the run begins with: bundled name, path or hf://. A generator's may have
    # other classes.
    start_from: str | None = None
    batch_size: int = Field(256, ge=1)  # [I] W.A.L.T; global: over all processes
    accumulate: int = Field(1, ge=1)  # forward and backward passes that a process's part of the batch is split into
    precision: Precision = "bf16"
    compile: bool = False
    checkpointing: bool = False  # compute each block but the last again in the backward pass instead of keeping its activations
    ema: float = Field(0.999, ge=0, lt=1)  # [I] MAGVIT: at every step
    weights: Precision = "fp32"  # how OUT/model.safetensors stores them
    text_cache: bool = False  # embed every caption once, to disk, before training
    # A step whose gradient is not finite, or over `spike` times its running mean, is not taken; three in a row roll back.
    spike: float | None = Field(None, gt=1)
    trackers: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)  # beside metrics.jsonl
    log_every: int = Field(50, ge=1)
    save_every: int = Field(5000, ge=1)
    val_every: int = Field(5000, ge=1)
    export_every: int | None = Field(None, ge=1)  # also keep the model of every so many steps, as OUT/models/step-00050000.safetensors


class TokenizerTraining(TrainConfig):
    """A tokenizer's run."""

    # TiTok's second stage: latents stay those of `start_from`, and with them every generator that was trained on them.
    detokenizer_only: bool = False
    val_images: int = Field(512, ge=1)
    val_rfid: bool = False  # also the rFID of those images, if the features' weights are found: of so few a number to watch, not to quote
    grid_images: int = Field(8, ge=0)  # validation images drawn beside their reconstructions at every validation


class GeneratorOptimizer(OptimizerConfig):
    """[I] AdamW as W.A.L.T's, whose schedule the paper's 350 epochs are."""

    kind: Literal["adam", "adamw", "muon"] = "adamw"
    lr: float = Field(5e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)  # DiT: AdamW's usual


class GeneratorTraining(TrainConfig):
    """A generator's run."""

    batch_size: int = Field(1024, ge=1)  # [I] W.A.L.T
    ema: float = Field(0.9999, ge=0, lt=1)  # [I] DiT
    val_latents: int = Field(2048, ge=1)  # validation images behind the validation loss
    grid_images: int = Field(8, ge=0)  # samples drawn below the reconstructions of as many validation images, at every validation


class Recipe(Config):
    """All that `texttok train` needs to know, as far as the tasks have it in common."""

    reproduces: str = ""  # which table of the paper, or what else this recipe is for
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig
    training: TrainConfig


class TokenizerRecipe(Recipe):
    """How a tokenizer is trained."""

    task: Literal["tokenizer"] = "tokenizer"
    model: TokenizerConfig
    data: DataConfig
    objective: Objective = Objective()
    training: TokenizerTraining = TokenizerTraining()

    @model_validator(mode="after")
    def _detokenizer_reads_a_trained_tokenizer(self) -> TokenizerRecipe:
        if self.training.detokenizer_only and self.training.start_from is None:
            raise ValueError("training.detokenizer_only leaves the tokenizer as it is: name a trained one in training.start_from")
        return self

    @model_validator(mode="after")
    def _adaptive_runs_uncompiled(self) -> TokenizerRecipe:
        adversarial = self.objective.adversarial
        if adversarial is not None and adversarial.adaptive and self.training.compile:
            raise ValueError(
                "objective.adversarial.adaptive reads the gradients twice, compiled graphs allow it once: set training.compile to false"
            )
        return self


class GeneratorRecipe(Recipe):
    """How a generator is trained; its loss follows from model.process."""

    task: Literal["generator"]
    model: GeneratorConfig
    data: LatentData
    optimizer: GeneratorOptimizer = GeneratorOptimizer()
    training: GeneratorTraining = GeneratorTraining()
