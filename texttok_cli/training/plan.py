"""What a recipe's model will cost, worked out without allocating anything (meta tensors)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from texttok_cli.config.loader import AnyRecipe
from texttok_cli.config.recipe import AdversarialLoss, TokenizerRecipe
from texttok_cli.config.schema import GeneratorConfig, GridLatents, PromptCondition, TextCondition, TextEncoderConfig, TokenizerConfig
from texttok_cli.models.condition import Condition
from texttok_cli.models.devices import without_weights
from texttok_cli.models.discriminator import Discriminator
from texttok_cli.models.dit import DiT
from texttok_cli.models.tokenizer import TexTok

STATE_COPIES = {"adam": 4, "adamw": 4, "muon": 3}  # fp32 copies: weights, EMA, and the optimizer's two moments (Muon: mostly one)


def plan(recipe: AnyRecipe) -> dict[str, float | int | str]:
    """Parameters, FLOPs (a multiply-add is 2) and bytes of one run of this recipe, for the trained model alone.

    Each key names its unit: parameters in M (1e6), FLOPs in GFLOP (1e9) per image and in EFLOP (1e18) for the run, the state in
    GB (1e9 bytes), the tokens of an image in bytes. Steps and images are plain counts. A perceptual network, a text encoder and
    activations are not counted, but for those of a discriminator: it starts late, and with R1 takes the most memory of a large step.
    """
    model, forward = count_flops(recipe.model) if isinstance(recipe, TokenizerRecipe) else count_generator_flops(recipe.model)
    parameters = sum(p.numel() for p in model.parameters())
    images = recipe.schedule.steps * recipe.training.batch_size
    task = recipe.task
    numbers: dict[str, float | int | str] = {
        f"{task}_parameters_M": parameters / 1e6,
        f"{task}_forward_GFLOP_per_image": forward / 1e9,
        f"{task}_training_GFLOP_per_image": 3 * forward / 1e9,
        "optimizer_steps": recipe.schedule.steps,
        "images_seen": images,
        f"{task}_training_EFLOP": 3 * forward * images / 1e18,
        f"{task}_state_GB": 4 * parameters * (STATE_COPIES[recipe.optimizer.kind] + 1) / 1e9,  # + gradients
    }
    latents = recipe.model if isinstance(recipe, TokenizerRecipe) else recipe.model.latents
    if not isinstance(latents, GridLatents):
        numbers["token_bytes_per_image_fp16"] = 2 * latents.num_tokens * latents.latent_dim
    if isinstance(recipe, TokenizerRecipe) and recipe.objective.adversarial is not None:
        numbers |= _of_discriminator(recipe.objective.adversarial, recipe.model.image_size)
    return numbers


def _of_discriminator(cfg: AdversarialLoss, image_size: int) -> dict[str, float | int | str]:
    """Its weights and what goes with them, and what its graphs keep of one real and one made image until the backward pass."""
    with without_weights():
        net = Discriminator(image_size, base=cfg.discriminator.base, multipliers=tuple(cfg.discriminator.multipliers))
        images = torch.empty(2, 3, image_size, image_size)
        graphs = {"graph": _kept(net, lambda: net(images)) / 2}  # counted in fp32; autocast keeps bf16
        if cfg.r1:  # as losses.r1_penalty, whose autocast knows no meta tensors
            x = images[:1].requires_grad_()
            graphs["R1_graph"] = _kept(net, lambda: torch.autograd.grad(net(x).sum(), x, create_graph=True)[0].square().sum())
    parameters = sum(p.numel() for p in net.parameters())
    sizes = {f"discriminator_{name}_GB_per_image": kept / 1e9 for name, kept in graphs.items()}
    return {"discriminator_parameters_M": parameters / 1e6, "discriminator_state_GB": 16 * parameters / 1e9, **sizes}


def _kept(net: nn.Module, compute: Callable[[], Tensor]) -> int:
    """Bytes that a computation with this network keeps for its backward pass, beside the weights."""
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        compute()
    for parameter in net.parameters():
        storages.pop(parameter.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in storages.values())


def count_generator_flops(cfg: GeneratorConfig) -> tuple[DiT, int]:
    """The model on the meta device, and the FLOPs of one forward pass on one image with all text tokens real."""
    with without_weights():
        model = DiT(cfg).eval()
        cond = _text(cfg.condition.encoder) if isinstance(cfg.condition, PromptCondition) else None
        class_ids = torch.zeros(1, dtype=torch.long) if cond is None else None
        return model, _flops(model, torch.empty(1, *model.latent_shape), torch.zeros(1), class_ids, cond)


def count_flops(cfg: TokenizerConfig) -> tuple[TexTok, int]:
    """The model on the meta device, and the FLOPs of encoding and decoding one image with all text tokens real."""
    with without_weights():
        model = TexTok(cfg).eval()
        cond = _text(cfg.condition.encoder) if isinstance(cfg.condition, TextCondition) else None
        class_ids = None if model.classes is None else torch.zeros(1, dtype=torch.long)
        return model, _flops(model, torch.empty(1, 3, cfg.image_size, cfg.image_size), cond, class_ids)


def _text(encoder: TextEncoderConfig) -> Condition:
    return Condition(torch.empty(1, encoder.max_tokens, encoder.dim))


def _flops(model: nn.Module, *inputs: Tensor | Condition | None) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    flops: int = counter.get_total_flops()
    return flops
