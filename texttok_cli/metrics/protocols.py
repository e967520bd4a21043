"""The paper's three evaluations by name: what each fixes. Free of torch, for the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ProtocolName = Literal["recon", "adm-class", "t2i"]
CLIP_NAME, CLIP_WEIGHTS = "ViT-B-32-quickgelu", "openai"  # the network CLIPScore was published with
NOTES = ("labels", "seed", "sampler", "steps", "guidance")  # what a person may have to say of samples, for the card

DECLARED = ", as the protocol has it"  # ends what a card says because a protocol was named, and nothing else shows
NOT_CHECKED = "; not checked whether they are "  # before what a protocol asks for, where it can't be known
REFERENCE_CAPTIONS = "captions of the references' split"


@dataclass(frozen=True, slots=True)
class Protocol:
    """What is measured, of which split, on how many images, and how labels are drawn."""

    metrics: tuple[str, ...]
    task: Literal["reconstruction", "generation"]
    split: str
    labels: str | None
    images: int = 50_000
    reference: str = ""  # how the name of its references' file begins, if that tells the split
    resize: Literal["tf1-bilinear"] = "tf1-bilinear"  # ADM's suite, which all of the paper's FIDs are of [I]


PROTOCOLS: dict[ProtocolName, Protocol] = {
    # Sec. 4.1: 50K samples of the *training* set; others take the validation set. [I] ours: evenly spaced ones, against their own
    # reconstructions (the paper does not say what rFID's references are), SSIM by scikit-image's default window. The paper does not
    # say whose network its LPIPS has: both are measured, and neither is said to be its number.
    "recon": Protocol(("rfid", "ris", "psnr", "ssim", "lpips-vgg", "lpips-alex"), "reconstruction", "train", None),
    # Sec. 4.1: ADM's suite; the reference is VIRTUAL_imagenet{256_labeled,512}.npz. The paper does not say how labels are
    # drawn: equally many of each class, as most do since, is [I].
    "adm-class": Protocol(
        ("gfid", "sfid", "gis", "precision", "recall"),
        "generation",
        "train (ADM's VIRTUAL batch)",
        "equally many a class",
        reference="VIRTUAL_imagenet",
    ),
    # Sec. 4.5: generated from the validation set's captions, against all of that set. Sec. 4.1 cites Hessel et al. for the CLIP score,
    # whose scale is 2.5; Table 3's 29.23 fits 100 cos [I], without their prefix. Whose CLIP the paper does not say.
    "t2i": Protocol(("fid", "clip-score"), "generation", "val", REFERENCE_CAPTIONS),
}
