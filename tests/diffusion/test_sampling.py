"""The one entry point: guidance of real tiny models, seeds, what runs when, and mistakes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from texttok_cli.config.schema import GeneratorConfig
from texttok_cli.diffusion import FITTING, SampleRng, Sampling, build_process, parse_cfg, sample
from texttok_cli.errors import RecipeError
from texttok_cli.models import prepared
from texttok_cli.models.condition import Condition
from texttok_cli.models.dit import DiT
from texttok_cli.models.prepared import PreparedDiT

CLASSES = {"source": "class", "num_classes": 5}
TEXT = {"source": "text", "encoder": {"dim": 16}, "null_tokens": 3}
IDS = torch.tensor([3, 1, 3, 0])
COND = Condition(torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(2)), torch.arange(5) < torch.tensor([0, 2, 5, 3])[:, None])


def build(condition: dict = CLASSES, process: dict | None = None, seed: int = 0, **changes: object) -> DiT:
    latents = {"kind": "tokens", "num_tokens": 6, "latent_dim": 4}
    section = {
        "latents": latents,
        "backbone": {"depth": 2, "width": 32, "heads": 2},
        "condition": condition,
        "process": process or {"kind": "ddpm"},
    }
    torch.manual_seed(seed)
    model = DiT(GeneratorConfig.model_validate({**section, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        model.latent_mean.fill_(0.5)
        model.latent_std.fill_(2)
    return model


def draw(model: DiT, *, sampler: str | None = None, steps: int = 5, cfg: str = "1.5", **changes: Any) -> Tensor:
    conditions = {"cond": COND} if model.classes is None else {"class_ids": IDS}
    how = Sampling(sampler or FITTING[model.cfg.process.kind][0], steps, parse_cfg(cfg))
    return sample(model, how, **{**conditions, "seeds": [7, 8, 9, 10], **changes})


@pytest.mark.parametrize("condition", [CLASSES, TEXT])
@pytest.mark.parametrize(("kind", "sampler"), [(kind, name) for kind, names in FITTING.items() for name in names])
def test_a_sample_is_the_same_in_any_batch(condition: dict, kind: str, sampler: str) -> None:
    model = build(condition, {"kind": kind})
    batch = draw(model, sampler=sampler)
    assert batch.shape == (4, 6, 4) and batch.isfinite().all()
    for i in range(4):
        alone = {"class_ids": IDS[i : i + 1]} if condition is CLASSES else {"cond": Condition(COND.tokens[i : i + 1], COND.mask[i : i + 1])}
        torch.testing.assert_close(draw(model, sampler=sampler, seeds=[7 + i], **alone), batch[i : i + 1], rtol=1e-4, atol=1e-4)
    assert (batch[0] - batch[2]).abs().max() > 1e-2  # the same class, another seed


@pytest.mark.parametrize("kind", ["ddpm", "flow"])
def test_one_step_written_out(kind: str) -> None:
    """x_0 of the guided prediction on all channels, back to raw latents: forward, and no sampler's code."""
    model = build(process={"kind": kind})
    noise = SampleRng([7, 8, 9, 10]).normal((6, 4))
    schedule = build_process(model.cfg.process).schedule(1)
    with torch.no_grad():
        time = torch.full((4,), 999.0 if kind == "ddpm" else 1000.0)
        c, u = (model(noise, time, ids)[..., :4] for ids in (IDS, torch.full((4,), 5)))
    prediction = u + 1.5 * (c - u)
    x0 = noise - prediction if kind == "flow" else (noise - schedule.sigmas[0] * prediction) / schedule.alphas[0]
    torch.testing.assert_close(draw(model, steps=1), 0.5 + 2 * x0, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("latents", [{"kind": "tokens", "num_tokens": 6, "latent_dim": 4}, {"kind": "grid", "size": 4}])
def test_guidance_of_the_first_channels_leaves_the_others_conditional(latents: dict) -> None:
    """As the original DiT's forward_with_cfg, which guides three of its four."""
    model = build(latents=latents)
    noise = SampleRng([7, 8, 9, 10]).normal(model.latent_shape)
    axis = 1 if noise.ndim == 4 else 2
    schedule = build_process(model.cfg.process).schedule(1)
    with torch.no_grad():
        c, u = (model(noise, torch.full((4,), 999.0), ids).chunk(2, axis)[0].unbind(axis) for ids in (IDS, torch.full((4,), 5)))
    prediction = torch.stack([*(a + 1.5 * (b - a) for a, b in zip(u[:3], c[:3], strict=True)), c[3]], axis)
    x0 = (noise - schedule.sigmas[0] * prediction) / schedule.alphas[0]
    torch.testing.assert_close(draw(model, steps=1, cfg="1.5:channels=3"), 0.5 + 2 * x0, rtol=1e-4, atol=1e-3)
    assert torch.equal(draw(model, steps=1, cfg="1.5:channels=4"), draw(model, steps=1, cfg="1.5"))
    with pytest.raises(RecipeError, match="guidance: channels=5, but the model's latents have 4"):
        draw(model, cfg="1.5:channels=5")


def test_the_variance_is_the_conditional_one() -> None:
    """Two steps: at the first the conditional variance sets how much noise comes back."""
    model = build()
    schedule = build_process(model.cfg.process).schedule(2)
    rng = SampleRng([7, 8, 9, 10])
    x, fresh = rng.normal((6, 4)), rng.normal((6, 4))
    with torch.no_grad():
        c, u = (model(x, torch.full((4,), 999.0), ids) for ids in (IDS, torch.full((4,), 5)))
    process = build_process(model.cfg.process)
    estimate = process.denoised(u[..., :4] + 1.5 * (c[..., :4] - u[..., :4]), c[..., 4:], x, schedule, 0)
    beta = 1 - (schedule.alphas[0] / schedule.alphas[1]) ** 2
    mean = (schedule.alphas[1] * beta * estimate.x0 + (1 - beta) ** 0.5 * schedule.sigmas[1] ** 2 * x) / schedule.sigmas[0] ** 2
    x = mean + (0.5 * estimate.log_variance).exp() * fresh
    with torch.no_grad():
        c, u = (model(x, torch.zeros(4), ids)[..., :4] for ids in (IDS, torch.full((4,), 5)))
    x0 = (x - schedule.sigmas[1] * (u + 1.5 * (c - u))) / schedule.alphas[1]
    torch.testing.assert_close(draw(model, steps=2), 0.5 + 2 * x0, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        ("1", [False] * 5),
        ("1.5", [True] * 5),
        ("1.5:interval=0.2,0.8", [False, True, True, True, False]),
        ("1:power-cosine=4", [False] * 5),
    ],
)
@pytest.mark.parametrize("guided_by", ["null", "guide"])
def test_no_pass_runs_that_has_no_weight(cfg: str, expected: list[bool], guided_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, guide = build(), build(seed=1)
    calls: list[tuple[bool, int, bool]] = []
    original = PreparedDiT.__call__

    def recorded(self: PreparedDiT, x: Tensor, step: int, *, null: bool = False) -> Tensor:
        calls.append((self.dit is model, step, null))
        return original(self, x, step, null=null)

    monkeypatch.setattr(PreparedDiT, "__call__", recorded)
    draw(model, cfg=cfg, **({"guide": guide} if guided_by == "guide" else {}))
    if guided_by == "null":
        assert calls == [(True, i, null) for i, null in enumerate(expected)]
    else:
        assert [call for call in calls if call[0]] == [(True, i, False) for i in range(5)]
        assert [i for ours, i, _ in calls if not ours] == [i for i, runs in enumerate(expected) if runs]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: only there steps are recorded as CUDA graphs")
@pytest.mark.parametrize("cfg", ["1", "1.5", "1.5:interval=0.2,0.8"])
def test_replayed_steps_are_those_of_single_kernels(cfg: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build().cuda(), IDS.cuda()
    replayed = draw(model, cfg=cfg, class_ids=ids)
    monkeypatch.setattr(prepared, "REPLAYED_ROWS", 0)
    torch.testing.assert_close(draw(model, cfg=cfg, class_ids=ids), replayed, rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: only there steps are recorded as CUDA graphs")
def test_steps_are_recorded_again_for_the_next_batch() -> None:
    model, ids = build().cuda(), IDS.cuda()
    first, second = (draw(model, class_ids=ids, precision="bf16") for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


class Recorder:
    """Stands for `torch.cuda`'s streams and graphs: notes on what and how is recorded, and replays by running again."""

    def __init__(self, again: Callable[[], object]) -> None:
        self.streams: list[object] = []
        self.recorded: list[tuple[object, str]] = []
        self.replay = again

    def stream(self, device: torch.device) -> object:
        self.streams.append(device)
        return len(self.streams)

    @contextmanager
    def graph(self, graph: object, *, stream: object, capture_error_mode: str) -> Iterator[None]:
        assert graph is self and prepared._recording.locked()
        self.recorded.append((stream, capture_error_mode))
        yield


def test_recordings_share_a_stream_and_bear_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.zeros(3), torch.zeros(3)  # where a graph reads and writes

    def double(given: Tensor) -> Tensor:
        nonlocal x
        x = given
        return torch.mul(given, 2, out=y)

    recorder = Recorder(lambda: double(x))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: recorder)
    monkeypatch.setattr(torch.cuda, "Stream", recorder.stream)
    monkeypatch.setattr(torch.cuda, "graph", recorder.graph)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    prepared._recording_stream.cache_clear()
    for _ in range(2):
        replayed = prepared.Replayed(double)
        values = [replayed(torch.full((3,), float(i))) for i in range(4)]
        assert [int(value[0]) for value in values[1:]] == [2, 4, 6]
    prepared._recording_stream.cache_clear()  # holds no GPU's
    assert recorder.recorded == 2 * [(1, "thread_local")] and recorder.streams == [torch.device("cpu")]


def test_autoguidance_goes_away_from_the_guides_prediction() -> None:
    model, guide = build(process={"kind": "flow"}), build(process={"kind": "flow"}, seed=1, backbone={"depth": 1, "width": 16, "heads": 1})
    noise = SampleRng([7, 8, 9, 10]).normal((6, 4))
    with torch.no_grad():
        c, g = (m(noise, torch.full((4,), 1000.0), IDS) for m in (model, guide))
    torch.testing.assert_close(draw(model, steps=1, guide=guide), 0.5 + 2 * (noise - g - 1.5 * (c - g)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(draw(model, guide=model, cfg="3"), draw(model, cfg="1"), rtol=1e-4, atol=1e-4)


def test_autoguidance_asks_for_no_null_condition_in_training() -> None:
    never_dropped, guide = {**CLASSES, "dropout": 0.0}, build({**CLASSES, "dropout": 0.0}, seed=1)
    assert torch.equal(draw(build(never_dropped), guide=guide), draw(build(), guide=guide))


class CountReads(TorchDispatchMode):
    """How often the host reads a number from a tensor, or asks for a size that depends on the numbers in one."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.", "is_nonzero")
        self.reads += any(name in str(func) for name in names)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("condition", [CLASSES, TEXT])
@pytest.mark.parametrize(("kind", "sampler"), [(kind, name) for kind, names in FITTING.items() for name in names])
def test_no_step_waits_for_the_device(condition: dict, kind: str, sampler: str) -> None:
    model, counts = build(condition, {"kind": kind}), []
    for steps in (2, 6):
        with CountReads() as mode:
            draw(model, sampler=sampler, steps=steps, cfg="2:interval=0.3,1")
        counts.append(mode.reads)
    assert counts[0] == counts[1] <= 1  # the distinct classes, once
    with CountReads() as mode:
        assert float(torch.ones(())) == 1
    assert mode.reads == 1  # and it would be seen


def test_bf16_is_close_to_fp32() -> None:
    model = build(process={"kind": "flow"})
    half, full = draw(model, precision="bf16"), draw(model)
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().max() < 0.1 * full.std()


def test_feature_maps() -> None:
    model = build(latents={"kind": "grid", "size": 4})
    assert draw(model).shape == (4, 4, 4, 4)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"steps": 0}, "steps 0: sampling takes at least 1 step"),
        ({"steps": 1001}, "steps 1001: the process has 1000 timesteps, so at most 1000 steps"),
        ({"sampler": "dpm++2m", "steps": 0}, "steps 0: sampling takes at least 1 step"),
        ({"sampler": "dpm++2m", "steps": 1000}, "steps 1000: dpm.* leaves out the first of the process's 1000 timesteps, so at most 999"),
        ({"sampler": "dpm++2m", "steps": 1001}, "steps 1001: the process has 1000 timesteps, so at most 1000 steps"),
        ({"sampler": "heun"}, "sampler 'heun' is none of those of a ddpm model: ddpm, ddim, dpm"),
        ({"model": build({**CLASSES, "dropout": 0.0})}, "guidance: the model never saw the null condition"),
        ({"guide": build(TEXT)}, "guide: its condition is .* same kind"),
        ({"guide": build(process={"kind": "flow"})}, "guide: its process is"),
        ({"guide": build(latents={"kind": "tokens", "num_tokens": 5, "latent_dim": 4})}, "guide: its latents"),
    ],
)
def test_mistakes_are_one_line(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(RecipeError, match=what) as error:
        draw(**{"model": build(), **changes})
    assert "\n" not in str(error.value)


def test_a_guide_of_other_latents_is_refused_and_one_trained_otherwise_is_not() -> None:
    other = build(seed=1)
    other.latent_std.fill_(3)
    with pytest.raises(RecipeError, match="other statistics"):
        draw(build(), guide=other)
    assert draw(build(), guide=build({**CLASSES, "dropout": 0.5}, {"kind": "ddpm", "learned_sigma": False})).isfinite().all()
