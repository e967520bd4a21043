"""DiT: parameter counts, a plain reference of the paper's description, text's ways in, and the precomputed path of sampling."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from texttok_cli.baselines.dit import read_dit
from texttok_cli.config.schema import GeneratorConfig
from texttok_cli.models import prepared
from texttok_cli.models.condition import Condition
from texttok_cli.models.dit import DiT
from texttok_cli.models.tokenizer import patchify

SIZE = {"depth": 3, "width": 32, "heads": 2}
TINY = {"latents": {"kind": "tokens", "num_tokens": 6, "latent_dim": 4}, "backbone": SIZE}
CLASSES = {"source": "class", "num_classes": 5}
TEXT = {"source": "text", "encoder": {"dim": 16}, "null_tokens": 3}
T5_XL = {"source": "text", "encoder": {"kind": "t5", "name": "google/t5-v1_1-xl", "dim": 2048}}


def build(condition: dict, **changes: object) -> DiT:
    torch.manual_seed(0)
    model = DiT(GeneratorConfig.model_validate({**TINY, "condition": condition, **changes})).eval()
    with torch.no_grad():  # away from the initial zeros, so that every input shows in the output
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def captions(lengths: list[int], longest: int = 5) -> Condition:
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return Condition(normal(len(lengths), longest, 16, seed=2), mask)


# ------------------------------------------------------------------ size and start


@pytest.mark.parametrize(
    ("size", "condition", "count"),
    [
        ("S", {"source": "class"}, 32_855_824),
        ("B", {"source": "class"}, 130_297_360),
        ("L", {"source": "class"}, 457_816_080),
        ("XL", {"source": "class"}, 674_807_056),  # the paper: 675 M
        ("XL", T5_XL, 824_797_456),  # the class table's 1.2 M less, cross-attention 148.8 M, text projection 2.4 M, null tokens 0.02 M
    ],
)
def test_parameter_counts(size: str, condition: dict, count: int) -> None:
    with torch.device("meta"):
        model = DiT(GeneratorConfig.model_validate({"backbone": size, "condition": condition}))
    assert sum(p.numel() for p in model.parameters()) == count
    assert "positions" not in model.state_dict()
    assert model.positions.device.type == "cpu"  # real even so


@pytest.mark.parametrize("condition", [CLASSES, TEXT])
def test_it_begins_as_the_identity(condition: dict) -> None:
    """adaLN-Zero: every block passes its tokens on, the text adds nothing, and the output is zero."""
    model = DiT(GeneratorConfig.model_validate({**TINY, "condition": condition}))
    h, c = normal(2, 6, 32), normal(2, 32, seed=3)
    for block in model.blocks:
        assert torch.equal(block(h, c, normal(2, 4, 32), None), h)
    assert torch.equal(model.output(h, model.final_modulation(c)[:, None]), torch.zeros(2, 6, 8))


def test_norms_have_the_epsilon_of_dit() -> None:
    x = 1e-3 * normal(2, 6, 32)
    expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    model = build(TEXT)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 1 + 3 * 3
    for norm in norms:
        close(norm(x), expected)


@pytest.mark.parametrize("condition", [CLASSES, TEXT])
def test_the_other_weights_begin_as_in_dit(condition: dict) -> None:
    """N(0, 0.02) for time and classes, Xavier-uniform for the rest, biases zero."""
    model = DiT(
        GeneratorConfig.model_validate({**TINY, "condition": {**condition, **({"num_classes": 40} if condition is CLASSES else {})}})
    )
    zero = {"final_modulation", "to_output", *(f"blocks.{i}.{part}" for i in range(3) for part in ("modulation", "cross.out"))}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        assert not module.bias.any()
        rows, columns = module.weight.shape
        xavier = (6 / (rows + columns)) ** 0.5
        if name in zero:
            assert not module.weight.any()
        elif name.startswith("time."):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
        else:
            assert module.weight.std().item() == pytest.approx(xavier / 3**0.5, rel=0.1) and module.weight.abs().max() <= xavier, name
    table = model.classes.weight if model.classes is not None else model.null_tokens
    assert table.std().item() == pytest.approx(0.02, rel=0.2)


# ------------------------------------------------------------------ the paper's description, written out


def public_tensors(
    *, dim: int = 32, depth: int = 2, channels: int = 4, patch: int = 2, side: int = 3, classes: int = 7
) -> dict[str, Tensor]:
    """A DiT's tensors under their public names, random."""
    shapes = {
        "x_embedder.proj": (dim, channels, patch, patch),
        "t_embedder.mlp.0": (dim, 256),
        "t_embedder.mlp.2": (dim, dim),
        "final_layer.linear": (patch * patch * 2 * channels, dim),
        "final_layer.adaLN_modulation.1": (2 * dim, dim),
    }
    for i in range(depth):
        shapes |= {f"blocks.{i}.attn.qkv": (3 * dim, dim), f"blocks.{i}.attn.proj": (dim, dim), f"blocks.{i}.mlp.fc1": (4 * dim, dim)}
        shapes |= {f"blocks.{i}.mlp.fc2": (dim, 4 * dim), f"blocks.{i}.adaLN_modulation.1": (6 * dim, dim)}
    tensors = {"y_embedder.embedding_table.weight": normal(classes + 1, dim), "pos_embed": grid_positions(side, dim)[None]}
    for seed, (name, shape) in enumerate(shapes.items()):
        tensors[f"{name}.weight"] = normal(*shape, seed=seed) / math.prod(shape[1:]) ** 0.5
        tensors[f"{name}.bias"] = 0.1 * normal(shape[0], seed=100 + seed)
    return tensors


def grid_positions(side: int, dim: int) -> Tensor:
    """A patch's column, then its row, each in dim/4 sines and dim/4 cosines."""
    table = torch.empty(side, side, dim)
    quarter = dim // 4
    for row in range(side):
        for column in range(side):
            for k in range(quarter):
                frequency = 10000 ** (-k / quarter)
                for place, number in ((0, column), (2, row)):
                    table[row, column, place * quarter + k] = math.sin(number * frequency)
                    table[row, column, (place + 1) * quarter + k] = math.cos(number * frequency)
    return table.flatten(0, 1)


def reference(w: dict[str, Tensor], h: Tensor, t: Tensor, class_ids: Tensor, heads: int) -> Tensor:
    """Embedded tokens (B, N, D) with positions -> the final linear's output, by the paper's Figure 3 and Section 3.2."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))

    batch, num, dim = h.shape
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128.0) / 128)
    times = linear(F.silu(linear(torch.cat([angles.cos(), angles.sin()], 1), "t_embedder.mlp.0")), "t_embedder.mlp.2")
    c = F.silu(times + w["y_embedder.embedding_table.weight"][class_ids])[:, None]
    for i in range(len([name for name in w if name.endswith("attn.qkv.bias")])):
        block = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(c, f"{block}.adaLN_modulation.1").split(dim, -1)
        qkv = linear(norm(h) * (1 + scale1) + shift1, f"{block}.attn.qkv").view(batch, num, 3, heads, dim // heads)
        heads_out = []
        for head in range(heads):
            q, k, v = (qkv[:, :, part, head] for part in range(3))
            heads_out.append((q @ k.mT / (dim // heads) ** 0.5).softmax(-1) @ v)
        h = h + gate1 * linear(torch.cat(heads_out, -1), f"{block}.attn.proj")
        h = h + gate2 * linear(gelu(linear(norm(h) * (1 + scale2) + shift2, f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    shift, scale = linear(c, "final_layer.adaLN_modulation.1").split(dim, -1)
    return linear(norm(h) * (1 + scale) + shift, "final_layer.linear")


def test_original_dit_is_the_papers_description() -> None:
    w, side, patch = public_tensors(), 3, 2
    x, t, ids = normal(2, 4, 6, 6), torch.tensor([3.0, 977.0]), torch.tensor([2, 7])
    h = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=patch).flatten(2).mT + grid_positions(side, 32)
    y = reference(w, h, t, ids, heads=4).view(2, side, side, patch, patch, 8)
    expected = torch.einsum("bhwpqc->bchpwq", y).reshape(2, 8, 6, 6)  # channels last within a patch: eps, then the variance
    close(read_dit(w, heads=4)(x, t, ids), expected)


def test_token_dit_is_the_same_with_a_linear_embedding_and_positions_in_a_row() -> None:
    w = public_tensors(patch=1)
    tokens = DiT(
        GeneratorConfig.model_validate(
            {**TINY, "backbone": {"depth": 2, "width": 32, "heads": 4}, "condition": {**CLASSES, "num_classes": 7}}
        )
    )
    tokens.load_state_dict(read_dit(w, heads=4).state_dict())
    x, t, ids = normal(2, 6, 4), torch.tensor([3.0, 977.0]), torch.tensor([2, 7])
    positions = torch.tensor([[f(n * 10000 ** (-k / 16)) for f in (math.sin, math.cos) for k in range(16)] for n in range(6)])
    close(tokens.positions, positions)
    h = x @ w["x_embedder.proj.weight"].flatten(1).T + w["x_embedder.proj.bias"] + positions
    close(tokens(x, t, ids), reference(w, h, t, ids, heads=4))


def test_patchify_takes_any_number_of_channels() -> None:
    x = normal(1, 4, 4, 4)
    assert torch.equal(patchify(x, 2)[0, 3], x[0, :, 2:, 2:].flatten())


# ------------------------------------------------------------------ conditions


def test_padding_and_whatever_stands_in_it_is_inert() -> None:
    model, x, t = build(TEXT), normal(3, 6, 4), torch.tensor([1.0, 500.0, 999.0])
    lengths = [0, 2, 5]
    cond = captions(lengths)
    cond = Condition(torch.where(cond.mask[..., None], cond.tokens, float("nan")), cond.mask)
    batch = model(x, t, cond=cond)
    for i, n in enumerate(lengths):
        alone = Condition(cond.tokens[i : i + 1], cond.mask[i : i + 1]) if n == 0 else Condition(cond.tokens[i : i + 1, :n])
        close(batch[i : i + 1], model(x[i : i + 1], t[i : i + 1], cond=alone))
    assert (batch[1] - model(x, t, cond=captions([0, 0, 0]))[1]).abs().max() > 1e-3  # and what is real counts


@pytest.mark.parametrize("null_tokens", [3, 8])  # fewer and more than there are text tokens
def test_dropped_captions_are_the_null_tokens(null_tokens: int) -> None:
    model, x, t = build({**TEXT, "null_tokens": null_tokens}), normal(3, 6, 4), torch.tensor([1.0, 500.0, 999.0])
    drop = torch.tensor([False, True, True])
    a, b = (Condition(normal(3, 5, 16, seed=s), captions([0, 2, 5]).mask) for s in (5, 6))
    mixed, other = model(x, t, cond=a, drop=drop), model(x, t, cond=b, drop=drop)
    assert torch.equal(mixed[1:], other[1:])  # nothing of the caption is left
    close(mixed[:1], model(x[:1], t[:1], cond=Condition(a.tokens[:1], a.mask[:1])))
    model.null_tokens.data += 1
    changed = model(x, t, cond=a, drop=drop)
    assert torch.equal(changed[0], mixed[0])
    assert (changed[1:] - mixed[1:]).abs().amin(dim=(1, 2)).min() > 0


def test_only_fitting_conditions_are_taken() -> None:
    x, t, ids, cond = normal(2, 6, 4), torch.zeros(2), torch.zeros(2, dtype=torch.long), captions([1, 2])
    for condition, wrong in ((CLASSES, {"cond": cond}), (CLASSES, {}), (TEXT, {"class_ids": ids}), (TEXT, {})):
        with pytest.raises(ValueError, match="model takes"):
            build(condition)(x, t, **wrong)
        with pytest.raises(ValueError, match="model takes"):
            build(condition).prepare(t, **wrong, null=True)
    with pytest.raises(ValueError, match="nothing else"):
        build(CLASSES)(x, t, ids, drop=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"not \(B, 6, 4\)"):
        build(CLASSES)(x[:, :5], t, ids)


# ------------------------------------------------------------------ precomputed


@pytest.mark.parametrize("rows", [1, 7, 2048])  # a time, two times and all times at once
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("condition", [CLASSES, TEXT])
def test_prepared_equals_forward(condition: dict, qk_norm: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "MODULATION_ROWS", rows)
    model, x = build(condition, backbone={**SIZE, "qk_norm": qk_norm}), normal(4, 6, 4)
    times = torch.tensor([999.0, 640.5, 321.0, 0.0])
    cond = captions([0, 2, 5, 3]) if condition is TEXT else None
    ids = torch.tensor([3, 1, 3, 5]) if condition is CLASSES else None  # one repeated, one the null class itself
    ready = model.prepare(times, ids, cond, null=True)
    plain = model.prepare(times, ids, cond, null=False)
    with torch.no_grad():
        for step in (0, 1, 1, 2, 3, 0):
            t = times[step].expand(4)
            expected = model(x, t, ids, cond)
            if condition is CLASSES:
                null = model(x, t, torch.full((4,), 5))
            else:
                null = model(x, t, cond=cond, drop=torch.ones(4, dtype=torch.bool))
            close(ready(x, step), expected)
            close(plain(x, step), expected)
            close(ready(x, step, null=True), torch.cat([expected, null]))


# ------------------------------------------------------------------ training


@pytest.mark.parametrize("condition", [CLASSES, TEXT])
def test_it_runs_on_meta_tensors(condition: dict) -> None:
    """What a recipe costs is counted so."""
    with torch.device("meta"):
        model = DiT(GeneratorConfig.model_validate({**TINY, "condition": condition}))
        inputs = {"class_ids": torch.zeros(2, dtype=torch.long)} if condition is CLASSES else {"cond": Condition(torch.empty(2, 5, 16))}
        assert model(torch.empty(2, 6, 4), torch.zeros(2), **inputs).shape == (2, 6, 8)


def test_residual_sums_stay_float32_under_autocast() -> None:
    model = build(CLASSES)
    with torch.autocast("cpu", torch.bfloat16):
        h = model.tokens(normal(2, 6, 4))
        assert h.dtype == model.blocks[0](h, normal(2, 32)).dtype == torch.float32


@pytest.mark.parametrize("condition", [CLASSES, TEXT])
def test_checkpointing_changes_no_gradient_and_every_parameter_has_one(condition: dict) -> None:
    model, x, t = build(condition), normal(2, 6, 4), torch.tensor([3.0, 900.0])
    inputs = (
        {"class_ids": torch.tensor([0, 5])} if condition is CLASSES else {"cond": captions([2, 4]), "drop": torch.tensor([False, True])}
    )
    gradients = []
    for on in (False, True):
        model.set_checkpointing(on)
        model.zero_grad()
        model(x, t, **inputs).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], g) for name, g in gradients[1].items())
    assert all(g.abs().max() > 0 for g in gradients[0].values())


def test_block_matrices_act_on_tokens() -> None:
    model = build(TEXT)
    names = {id(p): name for name, p in model.named_parameters()}
    parts = ["attn.qkv", "attn.out", "cross.q", "cross.kv", "cross.out", "mlp.0", "mlp.2"]
    assert [names[id(p)] for p in model.block_matrices()] == [f"blocks.{i}.{part}.weight" for i in range(3) for part in parts]


def test_standardising_is_per_channel_and_invertible() -> None:
    for model, shape in ((build(CLASSES), (2, 6, 4)), (build(CLASSES, latents={"kind": "grid", "size": 4}), (2, 4, 4, 4))):
        model.latent_mean.copy_(torch.arange(4))
        model.latent_std.copy_(torch.tensor([1.0, 2.0, 4.0, 8.0]))
        z = normal(*shape)
        x = model.standardize(z)
        channel = (Ellipsis, 3) if len(shape) == 3 else (slice(None), 3)
        close(x[channel], (z[channel] - 3) / 8)
        close(model.destandardize(x), z)


@pytest.mark.parametrize("process", [{"kind": "ddpm", "learned_sigma": False}, {"kind": "flow"}])
def test_without_a_learned_variance_the_output_is_as_the_latents(process: dict) -> None:
    assert build(CLASSES, process=process)(normal(2, 6, 4), torch.zeros(2), torch.tensor([0, 1])).shape == (2, 6, 4)
