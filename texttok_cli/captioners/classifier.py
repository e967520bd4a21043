"""The offline default: what an ImageNet classifier sees, and words measured from the pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from texttok_cli.captioners.attributes import describe, measure
from texttok_cli.captioners.base import Captioner, CaptionFailed, CaptionInput, Written, with_article
from texttok_cli.data import center_crop, to_tensor
from texttok_cli.errors import DataError
from texttok_cli.models.efficientnet import IMAGE_SIZE, load_efficientnet

CERTAIN = 0.5  # probability from which on the first label stands alone
POSSIBLE = 0.1  # below it a label is not named at all
MOST_LABELS = 3


class Classifier(Captioner):
    """EfficientNet-Lite0's labels, as sure as it is of them, then colours, brightness and detail."""

    backend = "classifier"
    model = "efficientnet-lite0"

    def __init__(self, *, device: torch.device | str = "cpu", offline: bool = False) -> None:
        self.network = load_efficientnet(device=device, offline=offline)
        self.labels, self.device = imagenet_labels(), device

    def __call__(self, inputs: Sequence[CaptionInput]) -> list[Written | CaptionFailed]:
        """A caption for each; a class or caption that is known already plays no part."""
        try:
            found = self.top([given.image for given in inputs], MOST_LABELS)
        except DataError as err:  # of one too narrow to be cropped: the others must not lose their captions
            if len(inputs) == 1:
                return [CaptionFailed(str(err))]
            return [self([given])[0] for given in inputs]
        return [Written(describe(_head(best), measure(given.image))) for given, best in zip(inputs, found, strict=True)]

    @torch.no_grad()
    def top(self, images: Sequence[Image.Image], k: int) -> list[list[tuple[str, float]]]:
        """The k most probable ImageNet labels of each image, with their probabilities."""
        pixels = torch.stack([to_tensor(center_crop(image, IMAGE_SIZE)) for image in images]).to(self.device)
        best = self.network(pixels).softmax(dim=1).topk(k)
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [[(self.labels[i], p) for i, p in zip(*row, strict=True)] for row in rows]


def imagenet_labels() -> list[str]:
    """The names of ImageNet's 1,000 classes, as torchvision has them beside its weights."""
    from torchvision.models import EfficientNet_B0_Weights

    labels: list[str] = EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]
    return labels


def _head(best: Sequence[tuple[str, float]]) -> str:
    """What is shown, said no more surely than the classifier is."""
    if best[0][1] >= CERTAIN:
        return f"a photo of {with_article(best[0][0])}"
    named = [with_article(label) for label, probability in best if probability >= POSSIBLE]
    if not named:
        return "a photo"
    return f"a photo of perhaps {' or '.join(filter(None, [', '.join(named[:-1]), named[-1]]))}"
