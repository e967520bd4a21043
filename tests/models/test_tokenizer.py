"""TexTok: parameter counts of Table 4e, inert padding, conditioning's ways and places, the last block's shortcut, parity with timm."""

import functools
import itertools

import pytest
import torch

from texttok_cli.config.schema import Backbone, TokenizerConfig
from texttok_cli.models.condition import Condition, ConditionedTransformer
from texttok_cli.models.layers import ALL, Block
from texttok_cli.models.tokenizer import TexTok, patchify, unpatchify

TINY = {"image_size": 32, "patch_size": 8, "num_tokens": 4, "latent_dim": 8, "backbone": {"depth": 2, "width": 32, "heads": 2}}
TEXT = {"source": "caption", "encoder": {"dim": 16}}


def build(condition: dict, **changes: object) -> TexTok:
    torch.manual_seed(0)
    model = TexTok(TokenizerConfig.model_validate({**TINY, "condition": condition, **changes})).eval()
    with torch.no_grad():  # biases and tables away from their initial zeros, so that nothing cancels by chance
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def images(n: int = 2) -> torch.Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("size", "millions"), [("S", 53.9), ("B", 175.2), ("L", 611.5)])
def test_parameter_counts_of_table_4e(size: str, millions: float) -> None:
    """256 px, patch 8, 64 tokens, 128 text tokens of T5-XL's width. The paper, with 128 tokens: 54 / 176 / 612, of B more than ours."""
    t5_xl = {"source": "caption", "encoder": {"kind": "t5", "name": "google/t5-v1_1-xl", "dim": 2048}}
    with torch.device("meta"):
        model = TexTok(TokenizerConfig(image_size=256, patch_size=8, num_tokens=64, backbone=size, condition=t5_xl))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_baseline_differs_by_the_two_text_projections_only() -> None:
    text, baseline = build(TEXT), build({"source": "none"})
    extra = {name for name, _ in text.named_parameters()} - {name for name, _ in baseline.named_parameters()}
    assert extra == {f"{half}.project.proj.{p}" for half in ("tokenizer", "detokenizer") for p in ("weight", "bias")}


def test_patchify_is_rows_of_patches_and_invertible() -> None:
    x = images()
    patches = patchify(x, 8)
    assert torch.equal(patches[0, 5], x[0, :, 8:16, 8:16].flatten())  # patch 5 of 4 x 4: second row, second column
    assert torch.equal(unpatchify(patches, 8), x)


@pytest.mark.parametrize("mode", ["in_context", "cross_attention"])
@pytest.mark.parametrize("where", ["both", "tokenizer", "detokenizer"])
def test_text_acts_where_the_recipe_says(mode: str, where: str) -> None:
    model = build({**TEXT, "mode": mode, "where": where})
    a, b = (Condition(torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(s))) for s in (2, 3))
    z_a, z_b = model.encode(images(), a).z, model.encode(images(), b).z
    assert torch.equal(z_a, z_b) == (where == "detokenizer")
    assert torch.equal(model.decode(z_a, a), model.decode(z_a, b)) == (where == "tokenizer")


@pytest.mark.parametrize("mode", ["in_context", "cross_attention"])
@pytest.mark.parametrize("filler", [0.0, 1e4, float("nan"), float("inf")])
def test_padding_is_inert(mode: str, filler: float) -> None:
    """Mixed lengths, one of them empty: each image comes out as it does alone without padding, whatever stands in the padding."""
    model = build({**TEXT, "mode": mode})
    lengths = [0, 3, 7]
    tokens = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(2))
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    padded = Condition(torch.where(mask[..., None], tokens, filler), mask)
    batch, latents = model(images(3), padded)
    for i, n in enumerate(lengths):
        alone = Condition(tokens[i : i + 1, :n]) if n else Condition(tokens[i : i + 1, :1], torch.zeros(1, 1, dtype=torch.bool))
        output, single = model(images(3)[i : i + 1], alone)
        torch.testing.assert_close(latents.z[i : i + 1], single.z, atol=1e-5, rtol=0)
        torch.testing.assert_close(batch[i : i + 1], output, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["in_context", "cross_attention"])
def test_nan_padding_leaves_gradients_finite(mode: str) -> None:
    model = build({**TEXT, "mode": mode})
    mask = torch.tensor([[True, True, False], [False, False, False]])
    cond = Condition(torch.where(mask[..., None], torch.ones(2, 3, 16), float("nan")), mask)
    output, _ = model(images(), cond)
    output.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("mode", ["in_context", "cross_attention", None])
def test_both_halves_are_the_papers_description(mode: str | None) -> None:
    """Sec. 3.2 step by step, all tokens through all blocks: the tokenizer keeps its image tokens, the detokenizer its patches."""
    model = build({"source": "none"} if mode is None else {**TEXT, "mode": mode})
    text = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))

    def vit(half: ConditionedTransformer, *tokens: torch.Tensor) -> torch.Tensor:
        x, context = torch.cat(tokens, dim=1), None
        if mode is not None:
            context = text @ half.project.proj.weight.T + half.project.proj.bias
        if mode == "in_context":
            x, context = torch.cat([x, context], dim=1), None
        for block in half.blocks:
            x = block(x, None, context)
        return torch.nn.functional.layer_norm(x, (32,), half.norm.weight, half.norm.bias)

    x = images()
    pixels = torch.nn.functional.unfold(x, 8, stride=8).mT  # (B, 16 patches row by row, 3*8*8)
    patches = pixels @ model.patch_embed.weight.T + model.patch_embed.bias + model.patch_pos
    out = vit(model.tokenizer, patches, model.latent_tokens.expand(2, -1, -1))[:, 16:20]
    z = out @ model.bottleneck.proj.weight.T + model.bottleneck.proj.bias
    latents = z @ model.latent_embed.weight.T + model.latent_embed.bias + model.latent_pos
    out = vit(model.detokenizer, model.patch_tokens.expand(2, -1, -1), latents)[:, :16]
    expected = torch.nn.functional.fold((out @ model.to_pixels.weight.T + model.to_pixels.bias).mT, 32, 8, stride=8)
    output, found = model(x, None if mode is None else Condition(text))
    torch.testing.assert_close(found.z, z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_no_mask_is_all_real() -> None:
    model = build(TEXT)
    tokens = torch.randn(2, 5, 16)
    masked, plain = Condition(tokens, torch.ones(2, 5, dtype=torch.bool)), Condition(tokens)
    torch.testing.assert_close(model(images(), masked)[0], model(images(), plain)[0], atol=1e-5, rtol=0)


def test_keeping_some_tokens_equals_dropping_them_afterwards() -> None:
    block = Block(Backbone(depth=1, width=32, heads=2, qk_norm=True), cross=False)
    x, mask = torch.randn(2, 9, 32), torch.rand(2, 9) < 0.8
    torch.testing.assert_close(block(x, mask, keep=slice(2, 6)), block(x, mask, keep=ALL)[:, 2:6])


def test_block_equals_timms() -> None:
    timm = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    ours = Block(Backbone(depth=1, width=32, heads=2), cross=False)
    theirs = timm.Block(32, 2, qkv_bias=True, norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-5))
    names = {"attn.qkv": "attn.qkv", "attn.proj": "attn.out", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2", "norm1": "norm1", "norm2": "norm2"}
    state = ours.state_dict()
    theirs.load_state_dict({f"{a}.{p}": state[f"{b}.{p}"] for (a, b), p in itertools.product(names.items(), ("weight", "bias"))})
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(ours(x, None), theirs(x), atol=1e-6, rtol=1e-5)


def test_class_embedding_is_one_token_a_class() -> None:
    model = build({"source": "class_embedding", "num_classes": 3})
    out, _ = model(images(), None, torch.tensor([0, 2]))
    swapped, _ = model(images(), None, torch.tensor([2, 0]))
    assert model.classes is not None and model.classes.weight.shape == (3, 32)
    assert not torch.allclose(out, swapped)


@pytest.mark.parametrize(("condition", "given"), [(TEXT, None), ({"source": "none"}, Condition(torch.zeros(2, 1, 16)))])
def test_a_wrong_condition_is_an_error(condition: dict, given: Condition | None) -> None:
    with pytest.raises(ValueError, match="condition"):
        build(condition)(images(), given)


def test_wrong_sizes_are_errors() -> None:
    model = build({"source": "none"})
    with pytest.raises(ValueError, match="32"):
        model.encode(torch.zeros(1, 3, 64, 64), None)
    with pytest.raises(ValueError, match="latents"):
        model.decode(torch.zeros(1, 4, 9), None)


def test_scaled_init_starts_as_grey() -> None:
    torch.manual_seed(0)
    model = TexTok(TokenizerConfig.model_validate({**TINY, "backbone": {**TINY["backbone"], "init": "scaled"}}))
    assert torch.equal(model(images(), None)[0], torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize("init", ["vit", "scaled"])
def test_weights_begin_with_the_deviation_of_their_kind(init: str) -> None:
    """N(0, 0.02), or scaled by the inputs and 0.5 for the tables; cut at three deviations."""
    torch.manual_seed(0)
    model = TexTok(TokenizerConfig.model_validate({**TINY, "condition": TEXT, "backbone": {**TINY["backbone"], "init": init}}))
    tables = {
        "patch_pos": model.patch_pos,
        "latent_tokens": model.latent_tokens,
        "latent_pos": model.latent_pos,
        "patch_tokens": model.patch_tokens,
    }
    linears = {name: module.weight for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, weight in (tables | linears).items():
        if init == "scaled" and (name == "to_pixels" or name.endswith((".out", "mlp.2"))):
            assert not weight.any()
            continue
        std = 0.02 if init == "vit" else 0.5 if name in tables else weight.shape[1] ** -0.5
        assert weight.std().item() == pytest.approx(std, rel=0.15), name
        assert weight.abs().max() <= 3 * std and (weight.numel() < 500 or weight.abs().max() > 2.3 * std), name


@pytest.mark.parametrize("bottleneck", [{"kind": "continuous"}, {"kind": "vq", "codes": 16}])
def test_what_training_of_the_detokenizer_alone_changes_is_what_decoding_depends_on(bottleneck: dict) -> None:
    model = build(TEXT, bottleneck=bottleneck)
    model.decode(torch.randn(2, 4, 8), Condition(torch.randn(2, 5, 16))).square().sum().backward()
    decoding = {name for name, p in model.named_parameters() if p.grad is not None}
    model.freeze_tokenizer()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == decoding


def test_a_bottleneck_has_the_weights_of_its_section() -> None:
    vq = build(TEXT, bottleneck={"kind": "vq", "codes": 16, "commitment": 0.7, "weight": 3.0}).bottleneck
    kl = build(TEXT, bottleneck={"kind": "kl", "weight": 0.3}).bottleneck
    assert (len(vq.codebook), vq.commitment, vq.weight, kl.weight) == (16, 0.7, 3.0, 0.3)
