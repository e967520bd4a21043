"""Images and text to latents and back, with a model loaded from a file: what the commands and the Python API share.

Letters: B batch, N latent tokens, d latent channels, S image size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from texttok_cli.assets import is_offline
from texttok_cli.checkpoint import ModelInfo, find_tokenizer_file, load_tokenizer_file
from texttok_cli.config import DEFAULT_MODEL, LatentDtype, Precision
from texttok_cli.config.schema import ClassEmbedding, TextCondition, TokenizerConfig, VQBottleneck
from texttok_cli.data import Dataset, center_crop, eval_batches, load_image, normalize, to_rgb, to_tensor, to_uint8
from texttok_cli.data.labels import ids_among
from texttok_cli.data.listings import is_utf8
from texttok_cli.data.texts import NO_CAPTION_HELP
from texttok_cli.errors import CheckpointError, DataError, TokenFileError
from texttok_cli.models.bottleneck import VQ, Latents
from texttok_cli.models.condition import Condition
from texttok_cli.models.devices import pick_device
from texttok_cli.models.layers import autocast, in_precision
from texttok_cli.models.tokenizer import TexTok
from texttok_cli.text import EmbeddingCache, load_text_encoder
from texttok_cli.token_folder import writing
from texttok_cli.tokens import FORMAT, MAX_TEXT, TokenDtype, TokenHeader, Tokens, code_dtype

PRETRAINED = Path(__file__).parent / "pretrained"

ImageLike = str | Path | Image.Image


class Tokenizer:
    """A loaded TexTok with its frozen text encoder: images and captions to latents and back."""

    def __init__(self, model: TexTok, info: ModelInfo, text: EmbeddingCache | None, *, precision: Precision) -> None:
        self.model, self.info, self.text, self.precision = model, info, text, precision
        self.cfg: TokenizerConfig = model.cfg
        self.device = model.latent_mean.device

    @property
    def text_condition(self) -> TextCondition | None:
        """How text conditions this model; None for one without text."""
        return self.cfg.condition if isinstance(self.cfg.condition, TextCondition) else None

    @property
    def classes(self) -> list[str] | None:
        """Names by id of the classes whose embeddings condition this model; None for one without.

        Raises CheckpointError if its file does not name them.
        """
        if isinstance(self.cfg.condition, ClassEmbedding) and self.info.header.classes is None:
            raise CheckpointError(
                f"{self.info.name}: is conditioned on class embeddings, and its file, of an older texttok, does not say of which classes:"
                " remove the file and run the same `texttok train` again, which writes it anew from its state"
            )
        return self.info.header.classes

    def check_has_token_files(self) -> None:
        """CheckpointError for a model on class embeddings: a token file holds what its images are decoded with, captions or nothing."""
        if isinstance(self.cfg.condition, ClassEmbedding):
            raise CheckpointError(
                f"{self.info.name}: is conditioned on class embeddings, an ablation that `texttok eval` measures, but not for encode,"
                " decode or sample: tokens are decoded with captions or with nothing, not with classes"
            )

    def encode(self, images: ImageLike | Sequence[ImageLike] | Tensor, captions: str | Sequence[str] | None = None) -> Tensor:
        """Images to raw latents (B, N, d) float32 on the CPU.

        Images are paths or PIL images, one or several, cropped square and resized as the ADM protocol does; or a uint8
        tensor (B, 3, S, S). A model with text takes as many captions as images ("" is the empty condition), one without
        takes none, one on class embeddings the name of each image's class in the place of its caption. An image with its caption
        gives the same latents in any batch, to 1e-4 in fp32. They carry no gradient: for one through the network call
        `model.encode(normalize(images), text(captions))` (`texttok_cli.data.normalize`).

        Raises DataError for an unreadable image, a tensor of another type or shape and captions that don't match.
        """
        return self._latents(images, captions).z.float().cpu()

    def encode_codes(self, images: ImageLike | Sequence[ImageLike] | Tensor, captions: str | Sequence[str] | None = None) -> Tensor:
        """Of a VQ model the codes (B, N) int64 on the CPU, of which `lookup` makes the latents; otherwise as `encode`."""
        codes = self._latents(images, captions).codes
        if codes is None:
            raise DataError(f"{self.info.name}: has no codes; it is a tokenizer without vector quantisation")
        return codes.cpu()

    def lookup(self, codes: Tensor) -> Tensor:
        """Of a VQ model the latents (B, N, d) float32 on the CPU that codes (B, N) stand for. DataError for a code it does not have."""
        bottleneck = self.model.bottleneck
        if not isinstance(bottleneck, VQ):
            raise DataError(f"{self.info.name}: has no codes; it is a tokenizer without vector quantisation")
        if len(codes) and not 0 <= int(codes.min()) <= int(codes.max()) < len(bottleneck.codebook):
            raise DataError(f"{self.info.name}: its codes are 0 to {len(bottleneck.codebook) - 1}")
        with torch.no_grad():
            return bottleneck.lookup(codes.to(self.device)).cpu()

    def decode(self, z: Tensor, captions: str | Sequence[str] | None = None) -> Tensor:
        """Raw latents (B, N, d), with the captions they were made with, to uint8 images (B, 3, S, S), 0 to 255, on the CPU.

        For a gradient call `model.decode(z, text(captions))`, whose images are floats in [-1, 1].

        Raises DataError for latents of another shape or none, captions that don't match, and images that are not finite.
        """
        expected = (self.cfg.num_tokens, self.cfg.latent_dim)
        if not len(z) or z.shape[1:] != expected:
            raise DataError(f"{self.info.name}: latents are {tuple(z.shape)}, not (B, {expected[0]}, {expected[1]})")
        cond = self._condition(captions, len(z))
        with torch.no_grad(), autocast(self.device, self.precision):
            images = self.model.decode(z.to(self.device, torch.float32), cond)
        if not images.isfinite().all():  # as bytes they would be black
            raise DataError(
                f"{self.info.name}: its images are not finite: guidance (--cfg) is far too strong, or the model is damaged or diverged"
            )
        return to_uint8(images.float()).cpu()

    def decode_tokens(self, tokens: Tokens, captions: Sequence[str] | None = None) -> Tensor:
        """Images as `decode` makes them, of tokens as `load_tokens` reads them, with the captions that came along unless others are given.

        Raises as `check_tokens` and `decode` do.
        """
        self.check_tokens(tokens)
        z = tokens.z if tokens.header.codes is None else self.lookup(tokens.z)
        return self.decode(z, tokens.header.captions if captions is None else captions)

    def check_tokens(self, tokens: Tokens) -> None:
        """TokenFileError for tokens of another model than this and those it was trained on from, and for what can't be its own;
        CheckpointError as `check_has_token_files`."""
        self.check_has_token_files()
        header, name = tokens.header, self.info.name
        if header.model_sha256 not in self.info.latents_made_by:
            made_by = f"{header.model_name} (sha256 {header.model_sha256[:12]}...)"
            raise TokenFileError(f"was made with model {made_by}, not with {name} ({self.info.sha256[:12]}...)")
        if header.codes != self.num_codes:
            raise TokenFileError(f"damaged: its tokens index {header.codes} codes, its model {name} has {self.num_codes}")
        d = self.cfg.latent_dim if header.codes is not None else tokens.z.shape[2]
        theirs, ours = (tokens.z.shape[1], d, header.image_size), (self.cfg.num_tokens, self.cfg.latent_dim, self.cfg.image_size)
        if theirs != ours:
            raise TokenFileError(f"damaged: N, d and image size are {theirs}, those of its model {name} {ours}")
        if (header.captions is None) != (self.text_condition is None):
            raise TokenFileError(f"damaged: it has captions and its model {name} takes none, or the reverse")

    @property
    def detokenizer_reads_text(self) -> bool:
        """Whether what is decoded depends on the captions (Table 4d has models whose tokenizer alone reads them)."""
        return self.text_condition is not None and self.text_condition.where != "tokenizer"

    @property
    def image_size(self) -> int:
        """S."""
        return self.cfg.image_size

    def token_counts(self, side: int) -> dict[str, int]:
        """Of an image (the `side` is always S): the number of tokens, and of channels in each, or of codes that each is one of."""
        kind = {"channels": self.cfg.latent_dim} if self.num_codes is None else {"codes": self.num_codes}
        return {"tokens": self.cfg.num_tokens, **kind}

    @property
    def num_codes(self) -> int | None:
        """K of a VQ model; None for one with continuous latents."""
        return self.cfg.bottleneck.codes if isinstance(self.cfg.bottleneck, VQBottleneck) else None

    def token_dtype(self, asked: LatentDtype | None = None) -> TokenDtype:
        """How its tokens are stored: latents as asked for, else as fp16; codes in as many bits as they need.

        DataError for a dtype that they don't have, CheckpointError as `check_has_token_files`.
        """
        self.check_has_token_files()
        if self.num_codes is None:
            return asked or "fp16"
        if asked is not None:
            raise DataError(f"{self.info.name}: its tokens are codes, whole numbers: leave out --dtype {asked}")
        return code_dtype(self.num_codes)

    def _latents(self, images: ImageLike | Sequence[ImageLike] | Tensor, captions: str | Sequence[str] | None) -> Latents:
        size = self.cfg.image_size
        pixels = images if isinstance(images, Tensor) else _as_batch(images, size)
        if not len(pixels):
            raise DataError("no image to encode")
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != (3, size, size):
            raise DataError(f"images are {pixels.dtype} {tuple(pixels.shape)}, not torch.uint8 (B, 3, {size}, {size})")
        cond = self._condition(captions, len(pixels))
        with torch.no_grad(), autocast(self.device, self.precision):
            return self.model.encode(normalize(pixels.to(self.device)), cond)

    def _condition(self, captions: str | Sequence[str] | None, n: int) -> Condition | None:
        classes = self.classes
        if self.text is None and classes is None:
            if captions is not None:
                raise DataError(f"{self.info.name}: takes no captions; it is a tokenizer without text")
            return None
        if captions is None:
            raise DataError(f"{self.info.name}: {NO_CAPTION_HELP if classes is None else 'needs the class of each image'}")
        texts = [captions] if isinstance(captions, str) else list(captions)
        if len(texts) != n:
            raise DataError(f"{n} image(s) and {len(texts)} caption(s): give one caption per image")
        wrong = next((text for text in texts if not isinstance(text, str)), "")
        if not isinstance(wrong, str):
            raise DataError(f"{wrong!r}: is not a caption; an image without one takes the empty condition, ''")
        if self.text is not None:
            return self.text(texts).to(self.device)
        assert classes is not None
        ids = ids_among(classes, ((f"image {i}", name) for i, name in enumerate(texts)))
        return self.model.resolve(None, torch.tensor(ids, device=self.device))


def load_tokenizer(
    model: str | Path = DEFAULT_MODEL,
    *,
    device: str | torch.device = "auto",
    precision: Precision = "fp32",
    offline: bool = False,
) -> Tokenizer:
    """A tokenizer by bundled name, path or `hf://owner/name`, ready to encode, decode and be measured.

    Raises CheckpointError for a model that is not there or not whole, BackendError for a device, precision or text
    encoder that isn't.
    """
    where = pick_device(device)
    net, info = load_tokenizer_file(find_model(model, offline=offline), device=where)
    cond = net.cfg.condition
    text = None
    if isinstance(cond, TextCondition):
        text = EmbeddingCache(load_text_encoder(cond.encoder, device=where, offline=offline))
    return Tokenizer(in_precision(net, precision), info, text, precision=precision)


def bundled_models() -> dict[str, Path]:
    """Models that come with the package, by name."""
    return {path.stem: path for path in sorted(PRETRAINED.glob("*.safetensors"))}


def find_model(model: str | Path, *, offline: bool = False) -> Path:
    """The file of a bundled name, a path or `hf://owner/name`. CheckpointError names what there is."""
    name = str(model)
    if name.startswith("hf://"):
        return _from_hub(name.removeprefix("hf://"), offline=offline)
    bundled = bundled_models()
    if name in bundled:
        return bundled[name]
    if Path(name).is_file():
        return Path(name)
    raise CheckpointError(f"{name}: no such model; bundled are {', '.join(bundled) or 'none'}; or give a file or hf://owner/name")


def find_model_by_hash(sha256: str, name: str, tokens: Path) -> Path:
    """The bundled model that the file `tokens` names. CheckpointError says which model to bring."""
    path = find_tokenizer_file(list(bundled_models().values()), sha256)
    if path is not None:
        return path
    raise CheckpointError(f"{tokens}: made with model {name} (sha256 {sha256[:12]}...), which is not bundled: give its file with --model")


def encode_dataset(
    tokenizer: Tokenizer,
    dataset: Dataset,
    captions: Sequence[str] | None,
    *,
    dtype: LatentDtype | None = None,
    flips: bool = False,
    batch_size: int = 32,
    on_error: Callable[[str, str], None] | None = None,
    wanted: Callable[[int, str], bool] | None = None,
) -> Iterator[tuple[list[int], Tokens]]:
    """Encode a dataset in order: per batch the indices of its images and their tokens, ready to be saved as `dtype`.

    `captions` holds a text for every item, or is None for a model without text. With `flips` every batch is followed by
    one of its mirrored images. A damaged image goes to `on_error(id, reason)` and is left out, or else ends it; `wanted(index, sha256 of
    the file)` may decline one before it is decoded.

    Raises DataError for an id, class or caption that a token file can't hold, another number of captions, without `on_error` for a
    damaged image, and as `Tokenizer.token_dtype` does.
    """
    if captions is not None and len(captions) != len(dataset):
        raise DataError(f"{len(dataset):,} image(s) and {len(captions):,} caption(s): give one caption per image")
    for item, caption in zip(dataset.items, captions or [""] * len(dataset), strict=True):
        _check_text(item.id, "its name", item.id)
        _check_text(item.id, "its class", item.class_name or "")
        _check_text(item.id, "its caption", caption)
    stored = tokenizer.token_dtype(dtype)
    mean, std = (v.tolist() if stored == "int8" else None for v in (tokenizer.model.latent_mean, tokenizer.model.latent_std))
    classes = any(item.class_name is not None for item in dataset.items)
    encode = tokenizer.encode if tokenizer.num_codes is None else tokenizer.encode_codes
    size = tokenizer.cfg.image_size
    for batch in eval_batches(dataset, image_size=size, batch_size=batch_size, on_error=on_error, wanted=wanted):
        indices = batch.indices.tolist()
        texts = None if captions is None else [captions[i] for i in indices]
        header = TokenHeader(
            texttok_tokens=FORMAT,
            model_name=tokenizer.info.name,
            model_sha256=tokenizer.info.sha256,
            dtype=stored,
            codes=tokenizer.num_codes,
            image_size=size,
            ids=[dataset.items[i].id for i in indices],
            flipped=[False] * len(indices),
            captions=texts,
            class_names=[dataset.items[i].class_name for i in indices] if classes else None,
            input_sha256=batch.input_sha256,
            original_sizes=batch.sizes,
            mean=mean,
            std=std,
        )
        yield indices, Tokens(encode(batch.images, texts), header)
        if flips:
            mirrored = header.model_copy(update={"flipped": [True] * len(indices)})
            yield indices, Tokens(encode(batch.images.flip(-1), texts), mirrored)


def encode_folder(
    tokenizer: Tokenizer,
    dataset: Dataset,
    captions: Sequence[str] | None,
    out: str | Path,
    *,
    dtype: LatentDtype | None = None,
    flips: bool = False,
    batch_size: int = 32,
    on_error: Callable[[str, str], None] | None = None,
) -> Path:
    """`encode_dataset` into the folder `out` of shards and an index.json, as `texttok encode -o` writes it and a generator's training
    reads it; what is there already is skipped. Returns the folder.

    Raises TokenFileError for a folder of another model or dtype, and DataError as `encode_dataset` and while another process writes there.
    """
    info = tokenizer.info
    with writing(Path(out), model_name=info.name, model_sha256=info.sha256, dtype=tokenizer.token_dtype(dtype)) as folder:

        def wanted(index: int, sha256: str) -> bool:
            item, caption = dataset.items[index], None if captions is None else captions[index]
            return not folder.has(item.id, sha256, caption, item.class_name, flips=flips)

        for _, tokens in encode_dataset(
            tokenizer, dataset, captions, dtype=dtype, flips=flips, batch_size=batch_size, on_error=on_error, wanted=wanted
        ):
            folder.add(tokens)
    return folder.path


def _check_text(item_id: str, what: str, text: str) -> None:
    if not isinstance(text, str):
        raise DataError(f"{item_id}: {what} is {text!r}, not text")
    if not is_utf8(text):  # half of a surrogate pair: from a file name of other bytes, or an escape in JSON
        raise DataError(f"{item_id}: {what} is not Unicode text; rename or rewrite it as UTF-8")
    if len(text) > MAX_TEXT:
        raise DataError(f"{item_id}: {what} has {len(text):,} characters, over the limit of {MAX_TEXT:,}")


def _as_batch(images: ImageLike | Sequence[ImageLike], size: int) -> Tensor:
    """Paths or PIL images -> uint8 (B, 3, S, S)."""
    listed = [images] if isinstance(images, str | Path | Image.Image) else list(images)
    if not listed:
        raise DataError("no image to encode")
    return torch.stack([to_tensor(center_crop(_open(image), size)) for image in listed])


def _open(image: ImageLike) -> Image.Image:
    if isinstance(image, Image.Image):
        return to_rgb(image, name="a PIL image")
    if not isinstance(image, str | Path):
        raise DataError(f"{type(image).__name__}: is not an image; give paths, PIL images, or one uint8 tensor (B, 3, S, S) of all")
    try:
        data = Path(image).read_bytes()
    except OSError as err:
        raise DataError(f"{image}: {err.strerror}") from None
    return load_image(data, name=str(image))


def _from_hub(repo: str, *, offline: bool) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    local = is_offline(offline)
    try:
        return Path(hf_hub_download(repo, "model.safetensors", local_files_only=local))
    except (LocalEntryNotFoundError, RuntimeError):  # huggingface-hub 1 tries again over a closed connection: a RuntimeError
        remedy = ": run once without --offline" if local else ", and the hub does not answer: check the network"
        raise CheckpointError(f"hf://{repo}: model.safetensors is not in the local cache{remedy}, or give a local file instead") from None
    except (OSError, ValueError) as err:  # the hub's own errors are OSErrors, a malformed name is a ValueError
        reason = " ".join(str(err).split())
        raise CheckpointError(f"hf://{repo}: could not download model.safetensors: {reason}") from None
