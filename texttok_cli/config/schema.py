"""The one schema: what a recipe says, a model is built from and a checkpoint's header carries.

Free of torch, so that the command line and the recipe tests start at once. Unknown keys are errors everywhere.
Defaults are the paper's; their sources stand beside them ([I] inferred, as the recipes' notes say).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


class Config(BaseModel):
    """Base of every section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# ------------------------------------------------------------------ models


class Transformer(Config):
    """Size of a transformer."""

    depth: int = Field(ge=1, le=256)
    width: int = Field(ge=8, le=16384)
    heads: int = Field(ge=1, le=256)
    mlp_ratio: float = Field(4.0, gt=0, le=16)
    qk_norm: bool = False

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Transformer:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class Backbone(Transformer):
    """The transformer of each half (tokenizer and detokenizer have the same)."""

    # vit: everything N(0, 0.02), as ViT. scaled: linears by fan-in, positions and learnable tokens N(0, 0.5), residual
    # branches and pixels zero; the latents carry something after 1,000 images instead of 10,000 (no paper's setting).
    init: Literal["vit", "scaled"] = "vit"


# Table 4e: depth of each half, width, heads.
SIZES = {
    "S": {"depth": 8, "width": 512, "heads": 8},
    "B": {"depth": 12, "width": 768, "heads": 12},
    "L": {"depth": 24, "width": 1024, "heads": 16},
}


# DiT (Peebles & Xie 2023, Table 1): depth, width, heads.
DIT_SIZES = {
    "S": {"depth": 12, "width": 384, "heads": 6},
    "B": {"depth": 12, "width": 768, "heads": 12},
    "L": {"depth": 24, "width": 1024, "heads": 16},
    "XL": {"depth": 28, "width": 1152, "heads": 16},
}


def _size_of(sizes: dict[str, dict[str, int]]) -> Callable[[Any], Any]:
    """`S`, or `{size: S, qk_norm: true}`, -> the three numbers of that size plus what else was said."""

    def expand(value: Any) -> Any:
        if isinstance(value, str):
            value = {"size": value}
        if isinstance(value, dict) and "size" in value:
            value = dict(value)
            size = value.pop("size")
            if size not in sizes:
                raise ValueError(f"size {size!r} is not one of {', '.join(sizes)}")
            value = {**sizes[size], **value}
        return value

    return expand


class TextEncoderConfig(Config):
    """Which frozen text encoder made the text tokens."""

    kind: Literal["minilm", "t5", "hash"] = "minilm"
    name: str | None = None  # t5: hub name or local path, e.g. google/t5-v1_1-xl (Sec. 4.1: XL at 256 px, XXL at 512 px)
    dim: int = Field(384, ge=1, le=65536)  # width of its token states: MiniLM 384, T5 v1.1 XL 2048, XXL 4096
    max_tokens: int = Field(128, ge=1, le=4096)  # Sec. 4.1
    precision: Literal["fp32", "bf16"] = "fp32"  # fp16 overflows in T5's feed-forward

    @model_validator(mode="after")
    def _t5_has_a_name(self) -> TextEncoderConfig:
        if (self.kind == "t5") != (self.name is not None):
            raise ValueError("name (hub name or local path) goes with kind t5, and t5 needs it")
        return self


class Placement(Config):
    """How and where a condition enters (Table 4c, 4d)."""

    mode: Literal["in_context", "cross_attention"] = "in_context"
    where: Literal["both", "tokenizer", "detokenizer"] = "both"


class NoCondition(Config):
    """Baseline (w/o text)."""

    source: Literal["none"] = "none"


class ClassEmbedding(Placement):
    """One learned vector a class (Table 4a)."""

    source: Literal["class_embedding"]
    num_classes: int = Field(ge=1, le=1_000_000)


class TextCondition(Placement):
    """Text tokens: of a class name put into a template, or of the image's caption (Table 4a, 4b)."""

    source: Literal["class_text", "caption"]
    encoder: TextEncoderConfig = TextEncoderConfig()


ConditionConfig = Annotated[NoCondition | ClassEmbedding | TextCondition, Field(discriminator="source")]


class ContinuousBottleneck(Config):
    """The paper's: a linear projection to d channels; no KL, no quantizer (Sec. 3.2)."""

    kind: Literal["continuous"] = "continuous"


class KLBottleneck(Config):
    """A diagonal Gaussian, as latent diffusion's VAE: sampled in training, its mean everywhere else."""

    kind: Literal["kl"]
    weight: float = Field(1e-6, ge=0)  # TA-TiTok's VAE, beside a mean of squares; latent diffusion's beside a sum


class VQBottleneck(Config):
    """Vector quantisation by l2-normalised codes (Appendix A names a VQ variant; its settings are not public: TA-TiTok's [I])."""

    kind: Literal["vq"]
    codes: int = Field(8192, ge=2, le=1 << 20)
    commitment: float = Field(0.25, ge=0)
    weight: float = Field(1.0, ge=0)


BottleneckConfig = Annotated[ContinuousBottleneck | KLBottleneck | VQBottleneck, Field(discriminator="kind")]


class TokenizerConfig(Config):
    """TexTok (Sec. 3.2), or with `condition: {source: none}` its Baseline."""

    image_size: int = Field(256, ge=8, le=8192)
    patch_size: int = Field(8, ge=1, le=1024)  # [I] 8 at 256 px, 16 at 512 px
    num_tokens: int = Field(32, ge=1, le=65536)
    latent_dim: int = Field(8, ge=1, le=4096)  # Sec. 4.1
    backbone: Annotated[Backbone, BeforeValidator(_size_of(SIZES))] = Field("B", validate_default=True)
    bottleneck: BottleneckConfig = ContinuousBottleneck()
    condition: ConditionConfig = NoCondition()

    @model_validator(mode="after")
    def _patches_fit(self) -> TokenizerConfig:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        return self

    @property
    def num_patches(self) -> int:
        """Patch tokens of one image, h*w."""
        return (self.image_size // self.patch_size) ** 2


# ------------------------------------------------------------------ generators


class TokenLatents(Config):
    """The one-dimensional tokens of a TexTok: a sequence of N vectors of d channels, patch size 1 (Sec. 4.1)."""

    kind: Literal["tokens"] = "tokens"
    num_tokens: int = Field(32, ge=1, le=65536)
    latent_dim: int = Field(8, ge=1, le=4096)


class GridLatents(Config):
    """A feature map such as SD-VAE's, cut into square patches: the original DiT's input."""

    kind: Literal["grid"]
    size: int = Field(32, ge=1, le=4096)  # its side: 32 for 256 px, 64 for 512 px
    patch_size: int = Field(2, ge=1, le=64)
    channels: int = Field(4, ge=1, le=4096)

    @model_validator(mode="after")
    def _patches_fit(self) -> GridLatents:
        if self.size % self.patch_size:
            raise ValueError(f"size {self.size} is not a multiple of patch_size {self.patch_size}")
        return self


class ClassLabels(Config):
    """A learned vector a class, added to the time's; `dropout` of the labels in training become the null class."""

    source: Literal["class"] = "class"
    num_classes: int = Field(1000, ge=1, le=1_000_000)
    dropout: float = Field(0.1, ge=0, le=1)  # DiT


class Prompt(Config):
    """Text tokens through a cross-attention layer in every block (Sec. 4.5, as PixArt's)."""

    source: Literal["text"]
    encoder: TextEncoderConfig = TextEncoderConfig()
    dropout: float = Field(0.1, ge=0, le=1)  # PixArt
    null_tokens: int = Field(16, ge=1, le=4096)  # length of the learned sequence that stands for no caption


class DDPM(Config):
    """Gaussian diffusion with linear betas, eps-prediction and a learned variance (Sec. 4.1: as DiT)."""

    kind: Literal["ddpm"] = "ddpm"
    timesteps: int = Field(1000, ge=2, le=100_000)
    beta_start: float = Field(1e-4, gt=0, lt=1)  # of 1000 timesteps; scaled for another number of them, as ADM's linear schedule
    beta_end: float = Field(0.02, gt=0, lt=1)
    learned_sigma: bool = True

    @model_validator(mode="after")
    def _betas_are_shares(self) -> DDPM:
        if max(self.beta_start, self.beta_end) * 1000 >= self.timesteps:
            raise ValueError(f"timesteps {self.timesteps} are too few: betas are scaled by 1000 over them, and would be 1 or more")
        return self


class Flow(Config):
    """Flow matching on the straight path x_t = (1 - t) x_0 + t eps, velocity prediction (SiT's linear interpolant)."""

    kind: Literal["flow"]
    time: Literal["uniform", "lognormal"] = "lognormal"  # lognormal: t = sigmoid(N(0, 1)), LightningDiT
    shift: float = Field(1.0, gt=0)  # t' = s t / (1 + (s - 1) t) when sampling


MAX_POSITIONS = 2**26  # numbers in the positions of a generator's tokens


class GeneratorConfig(Config):
    """A DiT on the latents of one tokenizer (Sec. 3.2, 4.1)."""

    latents: Annotated[TokenLatents | GridLatents, Field(discriminator="kind")] = TokenLatents()
    backbone: Annotated[Transformer, BeforeValidator(_size_of(DIT_SIZES))] = Field("XL", validate_default=True)
    condition: Annotated[ClassLabels | Prompt, Field(discriminator="source")] = ClassLabels()
    process: Annotated[DDPM | Flow, Field(discriminator="kind")] = DDPM()

    @model_validator(mode="after")
    def _positions_fit(self) -> GeneratorConfig:
        parts = 4 if isinstance(self.latents, GridLatents) else 2  # sines and cosines, of a map for rows and columns
        if self.backbone.width % parts:
            raise ValueError(f"backbone width {self.backbone.width} is not a multiple of {parts}, which the positions need")
        latents = self.latents
        tokens = (latents.size // latents.patch_size) ** 2 if isinstance(latents, GridLatents) else latents.num_tokens
        if tokens * self.backbone.width > MAX_POSITIONS:  # they are computed, so a file of a few bytes could ask for any number
            raise ValueError(f"{tokens:,} tokens of width {self.backbone.width:,} are more than any model here; {MAX_POSITIONS:,} at most")
        return self


# ------------------------------------------------------------------ training


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Paths = Annotated[list[str], BeforeValidator(_listed)]


class DataConfig(Config):
    """What to train on. Paths may hold globs and braces: `shards/train-{0000..0009}.tar`; one path may stand without a list."""

    train: Paths
    val: Paths = []
    captions: str | None = None  # a captions.jsonl that overrides what stands beside the images
    caption_field: str | None = None  # key in a shard's .json: measured, captions, longest, ...
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
    val: Paths = []
    tokenizer: str | None = None  # whose tokens they are: bundled name, path or hf://
    captions: str | None = None  # a captions.jsonl that overrides what stands in the token files, for tokens of a model without text


class PerceptualLoss(Config):
    """Distance of deep features (Sec. 3.2; the paper cites LPIPS)."""

    net: Literal["lpips-vgg", "lpips-alex", "stlpips-vgg", "stlpips-alex", "resnet50-logits"] = "lpips-vgg"
    weight: float = Field(0.1, ge=0)  # [I] appendix as transcribed by a public config; MAGVIT App. B.2
    start: int = Field(0, ge=0)  # optimizer step from which it counts


class DiscriminatorConfig(Config):
    """StyleGAN's discriminator (Sec. 4.1: ~24 M parameters): channels of level i are base * multipliers[i]."""

    base: int = Field(128, ge=1, le=4096)  # [I] with these multipliers 24.2 M at 256 px, as the paper says
    multipliers: list[float] = Field([1, 2, 4, 4, 4, 4], min_length=1, max_length=12)  # 512 px: [0.5, 1, 2, 4, 4, 4, 4]
    lr: float = Field(1e-4, gt=0)  # [I] MAGVIT: Adam, the generator's rate and betas
    betas: tuple[float, float] = (0.0, 0.99)


class AdversarialLoss(Config):
    """GAN with R1 and LeCAM (Sec. 3.2, following MAGVIT-v2), from one optimizer step on."""

    kind: Literal["non_saturating", "hinge"] = "non_saturating"
    weight: float = Field(0.1, ge=0)  # [I] MAGVIT
    start: int = Field(80_000, ge=0)  # [I]
    ramp: int = Field(0, ge=0)  # steps over which the generator's weight then grows from 0
    adaptive: bool = False  # scale the weight by the ratio of the gradients' norms at the last layer, as VQGAN
    r1: float = Field(10.0, ge=0)  # [I] times E||grad_x D||^2, without 1/2
    r1_every: int = Field(1, ge=1)  # k: applied every k-th step, times k
    lecam: float = Field(1e-4, ge=0)  # [I]
    lecam_decay: float = Field(0.999, ge=0, lt=1)
    discriminator: DiscriminatorConfig = DiscriminatorConfig()


class Objective(Config):
    """Losses on images in [0, 1]."""

    l2: float = Field(1.0, ge=0)
    perceptual: PerceptualLoss | None = PerceptualLoss()
    adversarial: AdversarialLoss | None = None


class OptimizerConfig(Config):
    """Adam as in the paper's recipes [I], or Muon for the blocks' matrices with AdamW for the rest."""

    kind: Literal["adam", "adamw", "muon"] = "adam"
    lr: float = Field(1e-4, gt=0)  # [I]
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
    start_from: str | None = None  # a model of the same configuration whose weights the run begins with: bundled name, path or hf://
    batch_size: int = Field(256, ge=1)  # [I] global: over all processes
    accumulate: int = Field(1, ge=1)  # forward and backward passes that a process's part of the batch is split into
    precision: Literal["fp32", "bf16"] = "bf16"
    compile: bool = False
    checkpointing: bool = False  # compute each block but the last again in the backward pass instead of keeping its activations
    ema: float = Field(0.999, ge=0, lt=1)  # [I]
    weights: Literal["fp32", "bf16"] = "fp32"  # how OUT/model.safetensors stores them
    text_cache: bool = False  # embed every caption once, to disk, before training
    # A step whose gradient is not finite, or over `spike` times its running mean, is not taken; three in a row roll back.
    spike: float | None = Field(None, gt=1)
    trackers: list[Literal["tensorboard", "wandb"]] = []  # beside metrics.jsonl
    log_every: int = Field(50, ge=1)
    save_every: int = Field(5000, ge=1)
    val_every: int = Field(5000, ge=1)


class TokenizerTraining(TrainConfig):
    """A tokenizer's run."""

    # TiTok's second stage: latents stay those of `start_from`, and with them every generator that was trained on them.
    detokenizer_only: bool = False
    val_images: int = Field(512, ge=1)
    val_rfid: bool = False  # also the rFID of those images, if the features' weights are found: of so few a number to watch, not to quote
    grid_images: int = Field(8, ge=0)  # validation images drawn beside their reconstructions at every validation


class GeneratorOptimizer(OptimizerConfig):
    """AdamW as W.A.L.T's, whose schedule the paper's 350 epochs are [I]."""

    kind: Literal["adam", "adamw", "muon"] = "adamw"
    lr: float = Field(5e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)  # DiT: AdamW's usual


class GeneratorTraining(TrainConfig):
    """A generator's run."""

    batch_size: int = Field(1024, ge=1)  # [I] W.A.L.T
    ema: float = Field(0.9999, ge=0, lt=1)  # DiT
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
