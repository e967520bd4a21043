"""How near the machine's limit the program is: ratios against what they should be, all of one run.

Works that are compared are run in turns, and a ratio is the median over the turns, so that other work on the machine
falls on both alike.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

from texttok_cli.bench.generate import MEASURED_STEPS, captured, guided_forward, guided_sampling, untrained_dit
from texttok_cli.bench.machine import block_products, products
from texttok_cli.bench.networks import (
    SAMPLE_SIDE,
    DoesNotFit,
    Workload,
    check_fits,
    generator_config,
    grid_generator_config,
    materialize,
    rows_of,
    sd_vae_work,
    text_states,
    texttok_work,
    tokenizer_config,
)
from texttok_cli.bench.plain import plain_reconstruct
from texttok_cli.bench.program import memory, start
from texttok_cli.bench.results import Target
from texttok_cli.bench.task import Task
from texttok_cli.bench.timing import Timer, median_ratio
from texttok_cli.bench.training import bare_step, loader_work, timed_recipe, training_step
from texttok_cli.config.loader import load_recipe
from texttok_cli.data import SAMPLE_SET, Dataset, open_dataset
from texttok_cli.diffusion import Guidance, Sampling
from texttok_cli.errors import BackendError
from texttok_cli.metrics.evaluator import Evaluator, Work
from texttok_cli.metrics.inception import POOL_DIM, FidInception
from texttok_cli.metrics.sources import FileImages
from texttok_cli.metrics.statistics import RunningGaussian, frechet_distance
from texttok_cli.models.tokenizer import TexTok
from texttok_cli.training.plan import count_flops

GUIDED = Guidance(1.5)  # a constant scale: both passes at every step
EVALUATED = 64  # images of the sample set in an evaluation that is timed


def targets(task: Task) -> Iterator[Target]:
    """Every ratio, one after the other; a part that can't be measured here is a target without a number that says why."""
    for name, part in (
        ("tokenizer", _tokenizer),
        ("sampler", _sampler),
        ("equal steps at 512 px", _equal_steps),
        ("training", _training),
        ("evaluation", _evaluation),
        ("start", start),
        ("memory", memory),
    ):
        try:
            yield from part(task)
        except (DoesNotFit, BackendError) as err:
            yield Target(name=name, reached=None, note=str(err))


# ------------------------------------------------------------------ models


def _tokenizer(task: Task) -> Iterator[Target]:
    """TexTok-B/32 at 256 px, encode and decode, against the machine's products of the same shapes and against plain fp32."""
    where, cfg = task.where, tokenizer_config("TexTok", 32, 256)
    cpu = where.device.type == "cpu"
    batch = 1 if cpu else 32
    check_fits(0.8e9 * (2 + batch / 8), where.device)
    model = materialize(lambda: TexTok(cfg), where, where.precision)
    plain = materialize(lambda: TexTok(cfg), where)
    cond, images = text_states(cfg, batch, where), torch.rand(batch, 3, 256, 256, device=where.device) * 2 - 1

    # A GPU runs small kernels faster than Python launches them; on a CPU compiling gains nothing.
    encode, decode = model.encode, model.decode
    if not cpu:
        encode, decode = torch.compile(encode, dynamic=False), torch.compile(decode, dynamic=False)
    works: dict[str, Workload] = {
        "ours": where.inference(lambda: decode(encode(images, cond).z, cond)),
        "plain fp32": lambda: plain_reconstruct(plain, images, cond),
    }
    flops = {"ours": batch * count_flops(cfg)[1]}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        works[name], flops[name] = products(block_products(batch * rows_of(cfg), cfg.backbone.width), dtype, where.device)
    seconds = task.timer.in_turns(works)
    rates = {name: flops[name] / median(seconds[name]) for name in flops}
    shapes = f"the four linears of a block on {batch} x {rows_of(cfg)} tokens of width {cfg.backbone.width}"
    for name in ("bf16", "fp32"):
        yield Target(name=f"matmul rate, {name}", reached=rates[name] / 1e9, unit="GFLOP/s", note=shapes)
    own = where.precision
    least, how = (0.70, "") if cpu else (0.45, ", compiled")
    cost = f"{flops['ours'] / batch / 1e9:.0f} GFLOP per image"
    note = f"TexTok-B/32, 256 px, encode + decode, batch {batch}, 128 text tokens, {own}{how}; {cost}"
    share = median_ratio([flops["ours"] / flops[own] * s for s in seconds[own]], seconds["ours"])
    yield Target(name=f"tokenizer over the {own} matmul rate", reached=share, least=least, note=note)
    note = "fp32, explicit softmax attention, every token in every block"
    yield Target(
        name="tokenizer over a straightforward one",
        reached=median_ratio(seconds["plain fp32"], seconds["ours"]),
        least=1.8,
        unit="x",
        note=note,
    )
    yield Target(name="tokenizer, encode + decode", reached=batch / median(seconds["ours"]), unit="images/s", note=own)


def _sampler(task: Task) -> Iterator[Target]:
    """The sampler's loop against as many forward passes, where there are CUDA graphs recorded ones."""
    where, cpu = task.where, task.where.device.type == "cpu"
    steps, most = (4, 5) if cpu else (50, 10)
    forward = "captured" if where.device.type == "cuda" else "bare"
    dit = untrained_dit(generator_config("XL", 32), where)
    sampling = Sampling(task.sampling.sampler, steps, GUIDED)
    for batch in [min(task.batches)] if cpu else task.batches:
        bare = guided_forward(dit, batch, where)
        works = {"sample": guided_sampling(dit, batch, sampling, where), "forward": captured(bare) if forward == "captured" else bare}
        seconds = task.timer.in_turns(works)
        over = median_ratio(seconds["sample"], [steps * s for s in seconds["forward"]])
        note = (
            f"DiT-XL on 32 tokens, batch {batch}, {steps} steps with guidance against {steps} {forward} forward passes of twice the batch"
        )
        yield Target(name=f"sampler over the {forward} forward", reached=100 * (over - 1), most=most, unit="%", note=note)


def _equal_steps(task: Task) -> Iterator[Target]:
    """Generation and decoding at 512 px: TexTok-32 + DiT-XL against SD-VAE + DiT-XL/2, batch 32."""
    where, batch, size = task.where, 32, 512
    cpu = where.device.type == "cpu"
    measured, decoded = (1, 1) if cpu else (MEASURED_STEPS["cuda"], 8)  # steps, and images that SD-VAE decodes at once
    timer = Timer(where.device, repeats=1 if cpu else task.timer.repeats, clock=task.timer.clock)
    sampling = Sampling(task.sampling.sampler, measured, GUIDED)
    per_step: dict[str, float] = {}  # seconds of one step for one image
    for name, cfg, rows in (("texttok", generator_config("XL", 32), 64), ("sd-vae", grid_generator_config("XL", size), 2 * 1024)):
        dit = untrained_dit(cfg, where)
        part = task.part_of(batch, rows)
        per_step[name] = timer.measure(guided_sampling(dit, part, sampling, where)).median / measured / part
        del dit
    decode = {
        "texttok": _decode_seconds(timer, task, size),
        "sd-vae": timer.measure(sd_vae_work("decode", size, where)(decoded)).median / decoded,
    }

    def generation(name: str, steps: int) -> float:
        return steps * per_step[name] + decode[name]

    note = f"batch 32 (on a CPU parts of it), {measured} guided step(s) run and multiplied, detokenizing included; FID is not measured"
    for name, ours, theirs in (
        ("250 steps each", generation("texttok", 250), generation("sd-vae", 250)),
        ("50 steps against 250", generation("texttok", 50), generation("sd-vae", 250)),
        ("20 steps of a second-order multistep solver against 250", generation("texttok", 20), generation("sd-vae", 250)),
    ):
        least = 32 if name.startswith("250") else None
        yield Target(name=f"TexTok-32 + DiT-XL over SD-VAE + DiT-XL/2, {name}", reached=theirs / ours, least=least, unit="x", note=note)
    for name, value in (("TexTok-32 + DiT-XL", "texttok"), ("SD-VAE + DiT-XL/2", "sd-vae")):
        note = f"decoding takes {decode[value]:.3g} s per image"
        yield Target(name=f"{name}, one guided step, 512 px", reached=per_step[value], unit="s/image", note=note)


def _decode_seconds(timer: Timer, task: Task, size: int) -> float:
    cfg, where = tokenizer_config("TexTok", 32, size), task.where
    batch = task.part_of(32, rows_of(cfg))
    return timer.measure(texttok_work("decode", cfg, where)(batch)).median / batch


# ------------------------------------------------------------------ training


def _training(task: Task) -> Iterator[Target]:
    """What a step costs over bare forward, backward and optimizer; and whether data comes fast enough."""
    if task.where.device.type == "cpu":
        names = ("tiny/texttok-32-128", "tiny/class-32-128")
        sizes = [load_recipe(name).training.batch_size for name in names]
    else:  # the small ones' time there is that of launching kernels
        names, sizes = ("tokenizer/texttok-32-256", "generator/dit-xl-32-256"), [64, 64]
    (tokenizer, generator), (batch, latents) = names, sizes
    whole, over = _step_over_bare(task, tokenizer, batch)
    note = f"{tokenizer}, batch {batch}, random images, l2 alone, not compiled; EMA, guard and clipping are in the step"
    yield Target(name="tokenizer's training step over a bare one", reached=over, most=10, unit="%", note=note)
    loading = task.timer.measure(loader_work(open_dataset([SAMPLE_SET]), SAMPLE_SIDE, batch)).median
    note = f"{batch / loading:.0f} images/s of {SAMPLE_SIDE} px loaded in one process, {batch / whole:.1f} trained on"
    yield Target(name="loader over the training step", reached=whole / loading, least=1, unit="x", note=note)
    _, over = _step_over_bare(task, generator, latents)
    note = f"{generator}, batch {latents}, latents in memory, not compiled; batches, dropout, EMA and guard are in the step"
    yield Target(name="DiT's training step over a bare one", reached=over, most=5, unit="%", note=note)


def _step_over_bare(task: Task, name: str, batch: int) -> tuple[float, float]:
    """Seconds of a recipe's training step, and by how many percent it takes longer than a bare one; both models are gone afterwards."""
    recipe = timed_recipe(name, batch, task.where)
    with tempfile.TemporaryDirectory() as folder:
        works = {"whole": training_step(recipe, Path(folder), task.where), "bare": bare_step(recipe, task.where)}
        seconds = task.timer.in_turns(works)
    return median(seconds["whole"]), 100 * (median_ratio(seconds["whole"], seconds["bare"]) - 1)


# ------------------------------------------------------------------ evaluation


def _evaluation(task: Task) -> Iterator[Target]:
    """Features, statistics, and the distance."""
    dataset = open_dataset([SAMPLE_SET])
    images = FileImages(Dataset(dataset.items[:EVALUATED]), crop_to=SAMPLE_SIDE)
    evaluator = Evaluator(["fid"], device=task.where.device, offline=True)
    network = evaluator.inception
    assert isinstance(network, FidInception)
    prepared = (torch.randn(32, 3, 299, 299, device=task.where.device)).contiguous(memory_format=torch.channels_last)

    def evaluate() -> None:
        for batch in Work(images, None, paired=False).batches(32):
            evaluator.update(batch)

    @torch.no_grad()
    def bare() -> None:
        for _ in range(EVALUATED // len(prepared)):
            h = network.stem(prepared)
            network.rest(torch.cat([branch(h) for branch in network.mixed_6d], dim=1))

    seconds = task.timer.in_turns({"whole": evaluate, "bare": bare})
    note = f"{EVALUATED} images: PNG, crop, resize to 299, network, statistics; against the network on tensors"
    yield Target(
        name="evaluation over bare Inception", reached=100 * median_ratio(seconds["bare"], seconds["whole"]), least=90, unit="%", note=note
    )
    yield from _frechet(task)


def _frechet(task: Task) -> Iterator[Target]:
    from scipy.linalg import sqrtm

    running = (RunningGaussian(POOL_DIM), RunningGaussian(POOL_DIM))
    for side in running:
        side.update(
            torch.randn(2 * POOL_DIM, POOL_DIM, dtype=torch.float64) @ torch.diag(torch.linspace(0.1, 2, POOL_DIM, dtype=torch.float64))
        )
    one, other = (side.gaussian() for side in running)
    factors = one.covariance.numpy(), other.covariance.numpy()
    timer = Timer("cpu", warm_up=0, repeats=1, clock=task.timer.clock)
    seconds = timer.in_turns({"ours": lambda: frechet_distance(one, other), "sqrtm": lambda: sqrtm(factors[0] @ factors[1])})
    note = f"{POOL_DIM} features, {median(seconds['ours']):.2f} s; against sqrtm of the covariances' product alone; one run each"
    yield Target(
        name="Fréchet distance over scipy's sqrtm", reached=median_ratio(seconds["sqrtm"], seconds["ours"]), least=4, unit="x", note=note
    )
    features = torch.randn(1024, POOL_DIM)
    took = Timer("cpu", repeats=3, clock=task.timer.clock).measure(lambda: running[0].update(features)).median
    yield Target(
        name="statistics",
        reached=len(features) / took,
        unit="images/s",
        note=f"mean and covariance of {POOL_DIM} features, one pass, mergeable",
    )
