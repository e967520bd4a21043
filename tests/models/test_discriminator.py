"""Discriminator: golden sizes, the filter, second derivatives, and sizes it can't take."""

import pytest
import torch
import torch.nn.functional as F

from texttok_cli.models.discriminator import Discriminator, _halve


def images(n: int = 3, size: int = 16) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("size", "multipliers", "count"),
    [(256, (1, 2, 4, 4, 4, 4), 24_192_385), (512, (0.5, 1, 2, 4, 4, 4, 4), 24_075_969)],
)
def test_golden_parameter_counts(size: int, multipliers: tuple[float, ...], count: int) -> None:
    """Sec. 4.1: about 24 M."""
    with torch.device("meta"):
        discriminator = Discriminator(size, base=128, multipliers=multipliers)
    assert sum(p.numel() for p in discriminator.parameters()) == count


@pytest.mark.parametrize(("size", "multipliers"), [(32, (1, 2, 4)), (64, (0.5, 1)), (128, (1, 2, 4, 4, 4, 4)), (96, (1, 1, 1))])
def test_small_images(size: int, multipliers: tuple[float, ...]) -> None:
    logits = Discriminator(size, base=4, multipliers=multipliers)(images(2, size))
    assert logits.shape == (2,) and logits.dtype == torch.float32 and logits[0] != logits[1]


def test_sizes_that_do_not_fit_are_said() -> None:
    with pytest.raises(ValueError, match=r"6 multipliers .* 32 is not a multiple of 64"):
        Discriminator(32, base=4, multipliers=(1, 2, 4, 4, 4, 4))
    with pytest.raises(ValueError, match=r"base 4 times multiplier 0\.1 leaves no channel"):
        Discriminator(32, base=4, multipliers=(1, 0.1))


def test_the_filter_is_1331_with_zeros_around() -> None:
    x = torch.rand(1, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    padded, weights = F.pad(x, (1, 1, 1, 1)).double(), torch.tensor([1, 3, 3, 1], dtype=torch.float64) / 8
    halved = _halve(x)
    assert halved.shape == (1, 2, 3, 3)
    for i in range(3):
        for j in range(3):
            window = padded[0, :, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4]  # (C, 4, 4)
            torch.testing.assert_close(halved[0, :, i, j].double(), torch.einsum("cij,i,j->c", window, weights, weights), atol=1e-6, rtol=0)


def test_it_is_the_networks_formula() -> None:
    """In float64, operation by operation: leaky ReLUs of slope 0.2, blurs as convolutions, and residual sums over sqrt 2."""
    torch.manual_seed(0)
    discriminator = Discriminator(16, base=4, multipliers=(1, 2))
    weights = {name: value.double() for name, value in discriminator.state_dict().items()}

    def conv(x: torch.Tensor, name: str) -> torch.Tensor:
        weight = weights[f"{name}.weight"]
        return F.conv2d(x, weight, weights.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def act(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x, x / 5)

    def halve(x: torch.Tensor) -> torch.Tensor:
        row = torch.tensor([1, 3, 3, 1], dtype=torch.float64) / 8
        return F.conv2d(x, (row[:, None] * row).expand(x.shape[1], 1, 4, 4), stride=2, padding=1, groups=x.shape[1])

    for name in weights:
        if name.endswith("bias"):
            weights[name] = 0.1 * torch.randn_like(weights[name])
    discriminator.load_state_dict(weights)
    h = act(conv(images().double(), "from_rgb"))
    for block in ("blocks.0", "blocks.1"):
        long = act(conv(halve(act(conv(h, f"{block}.conv1"))), f"{block}.conv2"))
        h = (long + conv(halve(h), f"{block}.shortcut")) / 2**0.5
    h = act(act(conv(h, "conv")).flatten(1) @ weights["hidden.weight"].T + weights["hidden.bias"])
    expected = h @ weights["logit.weight"][0] + weights["logit.bias"]
    torch.testing.assert_close(discriminator(images()).double(), expected, rtol=1e-4, atol=1e-5)


def test_an_image_is_judged_alone() -> None:
    """No statistics over the batch."""
    torch.manual_seed(0)
    discriminator = Discriminator(16, base=4, multipliers=(1, 2))
    x = images()
    torch.testing.assert_close(discriminator(x), torch.cat([discriminator(one[None]) for one in x]), rtol=1e-5, atol=1e-6)


def test_first_and_second_derivatives() -> None:
    """Against finite differences, in float64; R1 needs the second."""
    torch.manual_seed(0)
    discriminator = Discriminator(8, base=2, multipliers=(1, 2)).double()
    x = images(1, 8).double().requires_grad_()
    assert torch.autograd.gradcheck(discriminator, x)
    parameters = tuple(discriminator.parameters())

    def squared_slope(*values: torch.Tensor) -> torch.Tensor:
        """What R1 differentiates, as a function of the weights."""
        named = dict(zip(dict(discriminator.named_parameters()), values, strict=True))
        logits = torch.func.functional_call(discriminator, named, x)
        return torch.autograd.grad(logits.sum(), x, create_graph=True)[0].square().sum()

    assert torch.autograd.gradcheck(squared_slope, parameters)


def test_state_has_no_constants() -> None:
    discriminator = Discriminator(8, base=2, multipliers=(1, 2))
    assert set(discriminator.state_dict()) == {name for name, _ in discriminator.named_parameters()}
