"""The one schema of models: what a recipe says of one, it is built from and a checkpoint's header carries.

Free of torch, so that the command line and the recipe tests start at once. Unknown keys are errors everywhere.
Defaults are the paper's; their sources stand beside them ([I] inferred; recipes/base/tokenizer.yaml says from what).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from texttok_cli.config import Precision
from texttok_cli.config.guidance import parse_cfg
from texttok_cli.errors import RecipeError


class Config(BaseModel):
    """Base of every section: immutable, its numbers finite, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# ------------------------------------------------------------------ models


class Transformer(Config):
    """Size of a transformer."""

    depth: int = Field(ge=1, le=256)
    width: int = Field(ge=8, le=16384)
    heads: int = Field(ge=1, le=256)
    mlp_ratio: float = Field(4.0, ge=0.125, le=16)  # at least one number in the hidden layer of the least width
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
            if not isinstance(size, str) or size not in sizes:
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
    precision: Precision = "fp32"  # fp16 overflows in T5's feed-forward

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
    """Vector quantisation (Appendix A names a VQ variant; its settings are not public: [I] TA-TiTok's; l2-normalised codes: ViT-VQGAN)."""

    kind: Literal["vq"]
    codes: int = Field(8192, ge=2, le=1 << 20)
    commitment: float = Field(0.25, ge=0)
    weight: float = Field(1.0, ge=0)


BottleneckConfig = Annotated[ContinuousBottleneck | KLBottleneck | VQBottleneck, Field(discriminator="kind")]


class TokenizerConfig(Config):
    """TexTok (Sec. 3.2), or with `condition: {source: none}` its Baseline."""

    image_size: int = Field(256, ge=8, le=8192)
    patch_size: int = Field(8, ge=1, le=1024)  # [I] config: 8 at 256 px, 16 at 512 px
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

    @property
    def channels(self) -> int:
        """Numbers in a vector, d."""
        return self.latent_dim

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image's latents: (N, d)."""
        return self.num_tokens, self.latent_dim

    @property
    def num_vectors(self) -> int:
        """Latent vectors of one image, N."""
        return self.num_tokens

    @property
    def sequence_length(self) -> int:
        """Tokens that the generator's transformer sees, N."""
        return self.num_tokens


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

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image's latents: (d, S, S)."""
        return self.channels, self.size, self.size

    @property
    def num_vectors(self) -> int:
        """Latent vectors of one image, S*S, before they are cut into patches."""
        return self.size**2

    @property
    def sequence_length(self) -> int:
        """Tokens that the generator's transformer sees: patches."""
        return (self.size // self.patch_size) ** 2


class ClassLabels(Config):
    """A learned vector a class, added to the time's; `dropout` of the labels in training become the null class."""

    source: Literal["class"] = "class"
    num_classes: int = Field(1000, ge=1, le=1_000_000)
    dropout: float = Field(0.1, ge=0, le=1)  # DiT


class PromptCondition(Config):
    """Text tokens through a cross-attention layer in every block (Sec. 4.1, as PixArt's)."""

    source: Literal["text"]
    encoder: TextEncoderConfig = TextEncoderConfig()
    dropout: float = Field(0.1, ge=0, le=1)  # [I] PixArt
    null_tokens: int = Field(16, ge=1, le=4096)  # [I] ours: length of the learned sequence that stands for no caption


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
    shift: float = Field(1.0, ge=1e-3, le=1e3)  # t' = s t / (1 + (s - 1) t) when sampling


# The samplers of each kind of process, its default first.
FITTING = {"ddpm": ("ddpm", "ddim", "dpm++2m"), "flow": ("heun", "euler")}


class SamplingDefaults(Config):
    """What `texttok sample` does with a model unless it is told otherwise; no training depends on it.

    The defaults here are those of model files that do not say it.
    """

    model_config = ConfigDict(coerce_numbers_to_str=True)  # cfg: 1.5

    sampler: str | None = None  # one of the process's; None: its default
    steps: int = Field(50, ge=1, le=100_000)
    cfg: str = "1.5"  # guidance as `texttok sample --cfg` has it; 1 means none

    @field_validator("cfg")
    @classmethod
    def _cfg_can_be_read(cls, text: str) -> str:
        try:
            return str(parse_cfg(text))
        except RecipeError as err:
            raise ValueError(str(err)) from None


MAX_POSITIONS = 2**26  # numbers in the positions of a generator's tokens


class GeneratorConfig(Config):
    """A DiT on the latents of one tokenizer (Sec. 3.2, 4.1)."""

    latents: Annotated[TokenLatents | GridLatents, Field(discriminator="kind")] = TokenLatents()
    backbone: Annotated[Transformer, BeforeValidator(_size_of(DIT_SIZES))] = Field("XL", validate_default=True)
    condition: Annotated[ClassLabels | PromptCondition, Field(discriminator="source")] = ClassLabels()
    process: Annotated[DDPM | Flow, Field(discriminator="kind")] = DDPM()
    sampling: SamplingDefaults = SamplingDefaults()

    @model_validator(mode="after")
    def _sampler_is_of_the_process(self) -> GeneratorConfig:
        sampler, kind = self.sampling.sampler, self.process.kind
        if sampler is not None and sampler not in FITTING[kind]:
            raise ValueError(
                f"sampling.sampler {sampler!r} is none of those of a {kind} model: null (its default), {', '.join(FITTING[kind])}"
            )
        return self

    @model_validator(mode="after")
    def _positions_fit(self) -> GeneratorConfig:
        parts = 4 if isinstance(self.latents, GridLatents) else 2  # sines and cosines, of a map for rows and columns
        if self.backbone.width % parts:
            raise ValueError(f"backbone width {self.backbone.width} is not a multiple of {parts}, which the positions need")
        tokens = self.latents.sequence_length
        if tokens * self.backbone.width > MAX_POSITIONS:  # they are computed, so a file of a few bytes could ask for any number
            raise ValueError(f"{tokens:,} tokens of width {self.backbone.width:,} are more than any model here; {MAX_POSITIONS:,} at most")
        return self
