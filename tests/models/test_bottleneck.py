"""Bottlenecks against float64 formulas; the codebook's upkeep alone, by two processes, and over a resume."""

import copy
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from texttok_cli.models.bottleneck import KL, VQ, Bottleneck, Continuous, code_usage

DIM, D, N, B = 12, 4, 6, 5


def tokens(seed: int = 0, *, batch: int = B) -> torch.Tensor:
    return torch.randn(batch, N, DIM, generator=torch.Generator().manual_seed(seed))


def alone(value: torch.Tensor) -> torch.Tensor:
    return value


def vq(codes: int = 16, *, seed: int = 0, weight: float = 1.0) -> VQ:
    """As in the middle of a run, with all codes in use."""
    torch.manual_seed(seed)
    bottleneck = VQ(DIM, D, codes=codes, commitment=0.25, weight=weight)
    bottleneck.usage.fill_(1)
    return bottleneck


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def projected(bottleneck: torch.nn.Module, x: torch.Tensor) -> np.ndarray:
    weight, bias = (p.detach().double().numpy() for p in (bottleneck.proj.weight, bottleneck.proj.bias))
    return x.double().numpy() @ weight.T + bias


@pytest.mark.parametrize("make", [lambda: Continuous(DIM, D), lambda: KL(DIM, D, weight=1.0), vq])
def test_all_have_one_interface(make: object) -> None:
    bottleneck: Bottleneck = make()
    latents = bottleneck(tokens())
    assert latents.z.shape == (B, N, D)
    assert all(loss.shape == () for loss in latents.losses.values())
    bottleneck.finish_step(alone)


# ------------------------------------------------------------------ KL


def test_kl_is_the_divergence_of_the_two_gaussians() -> None:
    torch.manual_seed(0)
    bottleneck, x = KL(DIM, D, weight=0.5).eval(), tokens()
    mean, logvar = np.split(projected(bottleneck, x), 2, axis=-1)
    p = torch.distributions.Normal(torch.from_numpy(mean), torch.from_numpy(np.exp(logvar / 2)))
    q = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    expected = torch.distributions.kl_divergence(p, q).sum().item() / B
    latents = bottleneck(x)
    assert latents.losses["kl"].item() == pytest.approx(0.5 * expected, rel=1e-5)
    np.testing.assert_allclose(latents.z.detach().numpy(), mean, atol=1e-5)


def test_kl_samples_in_training_with_the_predicted_spread() -> None:
    torch.manual_seed(0)
    bottleneck = KL(DIM, D, weight=1.0)
    mean, logvar = np.split(projected(bottleneck, tokens(batch=1)), 2, axis=-1)
    z = bottleneck(tokens(batch=1).expand(4000, -1, -1)).z.detach().double().numpy()
    np.testing.assert_allclose(z.mean(axis=0), mean[0], atol=0.08)  # 5 standard errors of a deviation of 1
    np.testing.assert_allclose(z.std(axis=0), np.exp(logvar[0] / 2), rtol=0.06)


def test_kl_clamps_the_log_variance() -> None:
    bottleneck = KL(DIM, D, weight=1.0)
    with torch.no_grad():
        bottleneck.proj.weight.zero_()
        bottleneck.proj.bias[:D] = 0
        bottleneck.proj.bias[D:] = torch.tensor([-100.0, 100.0, 0.0, 0.0])
    expected = 0.5 * N * ((np.exp(-30) - 1 + 30) + (np.exp(20) - 1 - 20))
    assert bottleneck(tokens()).losses["kl"].item() == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------------ VQ


def test_vq_forward_is_the_formula() -> None:
    bottleneck, x = vq(weight=3.0), tokens()
    with torch.no_grad():  # training leaves codes of any length; their direction alone counts
        bottleneck.codebook.mul_(torch.linspace(0.3, 3, 16)[:, None])
    latents = bottleneck(x)
    z, book = unit(projected(bottleneck, x)), unit(bottleneck.codebook.detach().double().numpy())
    distances = ((z[:, :, None] - book) ** 2).sum(axis=-1)  # (B, N, K)
    codes = distances.argmin(axis=-1)
    assert np.array_equal(latents.codes.numpy(), codes) and latents.codes.dtype == torch.int64
    np.testing.assert_allclose(latents.z.detach().numpy(), book[codes], atol=1e-6)
    assert latents.losses["vq"].item() == pytest.approx(3 * 1.25 * ((z - book[codes]) ** 2).mean(), rel=1e-5)


def test_vq_latents_are_exactly_those_of_their_codes() -> None:
    bottleneck = vq()
    for mode in (True, False):
        latents = bottleneck.train(mode)(tokens())
        assert torch.equal(latents.z, bottleneck.lookup(latents.codes))


def test_vq_gradients() -> None:
    """Straight through to the inputs; the codebook learns from its own loss only, the inputs also from the commitment's quarter."""
    bottleneck, x, slope = vq(), tokens(), torch.randn(B, N, D)
    latents = bottleneck(x)
    (latents.z * slope).sum().backward(retain_graph=True)
    assert bottleneck.codebook.grad is None
    weight = bottleneck.proj.weight.detach().clone().requires_grad_()
    z = F.normalize(x @ weight.T + bottleneck.proj.bias.detach(), dim=-1)
    (z * slope).sum().backward()
    torch.testing.assert_close(bottleneck.proj.weight.grad, weight.grad, rtol=1e-5, atol=1e-6)
    bottleneck.zero_grad()
    latents.losses["vq"].backward()
    book = bottleneck.codebook.detach().clone().requires_grad_()
    chosen = F.normalize(book[latents.codes], dim=-1)
    ((chosen - z.detach()) ** 2).mean().backward()
    torch.testing.assert_close(bottleneck.codebook.grad, book.grad, rtol=1e-5, atol=1e-6)
    weight.grad = None
    z = F.normalize(x @ weight.T + bottleneck.proj.bias.detach(), dim=-1)
    (0.25 * ((z - chosen.detach()) ** 2).mean()).backward()
    torch.testing.assert_close(bottleneck.proj.weight.grad, weight.grad, rtol=1e-5, atol=1e-6)


def test_search_in_parts_is_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    bottleneck = vq().eval()
    whole = bottleneck(tokens()).codes
    monkeypatch.setattr("texttok_cli.models.bottleneck.SEARCH_TOKENS", 7)
    assert torch.equal(bottleneck(tokens()).codes, whole)


def test_autocast_does_not_change_the_codes_of_given_inputs() -> None:
    bottleneck = vq()
    z = F.normalize(torch.randn(50, D), dim=-1)
    plain = bottleneck._nearest(z)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bottleneck._nearest(z), plain)


def test_usage_is_the_running_share_of_all_parts_of_a_step() -> None:
    bottleneck = vq()
    parts = [bottleneck(tokens(seed)).codes for seed in (0, 1)]
    bottleneck.eval()(tokens(2))  # evaluation is not counted
    bottleneck.finish_step(alone)
    share = np.bincount(torch.cat(parts).flatten().numpy(), minlength=16) / (2 * B * N) * 16
    np.testing.assert_allclose(bottleneck.usage.numpy(), 0.95 + 0.05 * share, rtol=1e-6)


def test_a_step_that_was_skipped_leaves_nothing() -> None:
    bottleneck = vq()
    before = copy.deepcopy(bottleneck.state_dict())
    bottleneck(torch.full((1, N, DIM), torch.nan))
    bottleneck.finish_step(alone, taken=False)
    bottleneck.finish_step(alone)
    assert all(torch.equal(value, before[name]) for name, value in bottleneck.state_dict().items())


def test_dead_codes_become_inputs_of_the_step() -> None:
    bottleneck = vq()
    bottleneck.usage[:5] = 0.005
    before = bottleneck.codebook.detach().clone()
    bottleneck(tokens())
    with torch.no_grad():
        inputs = F.normalize(bottleneck.proj(tokens()), dim=-1).flatten(0, 1)
    bottleneck._counts[:5] = 0
    bottleneck.finish_step(alone)
    changed = (bottleneck.codebook != before).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    assert all((inputs == code).all(dim=1).any() for code in bottleneck.codebook[:5])
    assert torch.equal(bottleneck.usage[:5], torch.ones(5))


def test_a_new_codebook_is_put_where_inputs_are() -> None:
    """Inputs of a network that was just made are much alike: of random directions one code would be used."""
    torch.manual_seed(0)
    bottleneck, batch = VQ(DIM, D, codes=64, commitment=0.25, weight=1.0), 0.05 * tokens(batch=40)
    with torch.no_grad():
        bottleneck.proj.bias[:] = torch.tensor([3.0, 0, 0, 0])
    before = bottleneck(batch).codes.unique()
    bottleneck.finish_step(alone)
    after = bottleneck(batch).codes.unique()
    assert len(before) == 1 and len(after) > 40


def test_restarts_bring_a_collapsed_codebook_into_use() -> None:
    """All codes but one point away from every input: without restarts one code of 16 would be used for ever."""
    bottleneck = vq()
    with torch.no_grad():
        bottleneck.proj.bias[:] = torch.tensor([3.0, 0, 0, 0])
        bottleneck.codebook[:] = torch.tensor([-1.0, 0, 0, 0])
        bottleneck.codebook[0, 0] = 1
    batch = tokens(batch=40)
    assert len(bottleneck(batch).codes.unique()) == 1
    for _ in range(50):
        bottleneck(batch)
        bottleneck.finish_step(alone)
    used = code_usage(bottleneck.eval()(batch).codes, 16)["code_usage"]
    assert used > 0.7


class Sum:
    """The sum over two threads that take each other for processes."""

    def __init__(self) -> None:
        self.barrier, self.values = threading.Barrier(2), [torch.empty(0)] * 2

    def __call__(self, rank: int, value: torch.Tensor) -> torch.Tensor:
        self.values[rank] = value.clone()
        self.barrier.wait(20)
        total = self.values[0] + self.values[1]
        self.barrier.wait(20)
        return total


def test_two_processes_keep_one_codebook() -> None:
    """Each sees its half of the batch; usage is that of one process which sees all, and dead codes get inputs of either."""
    pair, whole, total = [vq(), vq()], vq(), Sum()
    far = torch.tensor([-1.0, 0, 0, 0])

    def kill(bottleneck: VQ) -> None:
        bottleneck.usage[:6] = 0.001
        with torch.no_grad():  # codes that nothing is near to
            bottleneck.proj.bias[:] = torch.tensor([9.0, 0, 0, 0])
            bottleneck.codebook[:6] = far

    kill(whole)
    inputs = [F.normalize(whole.proj(tokens(seed)).detach(), dim=-1).flatten(0, 1) for seed in (0, 1)]
    whole(torch.cat([tokens(0), tokens(1)]))
    whole.finish_step(alone)

    def step(rank: int) -> None:
        pair[rank](tokens(rank))
        pair[rank].finish_step(lambda value: total(rank, value))

    ranks: set[int] = set()
    waited = False
    # A code is taken with chance 1/2 a step, and then is an input of either with the same chance: six draws alone would be all of
    # one process in 1 of 32 runs.
    for attempt in range(20):
        for bottleneck in pair:
            kill(bottleneck)
        threads = [threading.Thread(target=step, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.equal(pair[0].codebook, pair[1].codebook) and torch.equal(pair[0].usage, pair[1].usage)
        if attempt == 0:
            torch.testing.assert_close(pair[0].usage[6:], whole.usage[6:])
        taken = (pair[0].codebook[:6] != far).any(dim=1)
        assert torch.equal(pair[0].usage[:6] == 1, taken)  # a code that nobody or both offered for waits, still dead
        waited |= not taken.all()
        found = [[rank for rank in (0, 1) if (inputs[rank] == code).all(dim=1).any()] for code in pair[0].codebook[:6][taken]]
        assert all(found)
        ranks |= {rank for of_code in found for rank in of_code}
    assert ranks == {0, 1} and waited


def test_resume_is_exact() -> None:
    """State and random seed of a step determine the next, restarts included."""

    def run(bottleneck: VQ, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            bottleneck(tokens(step)).losses["vq"].backward()
            with torch.no_grad():
                for p in bottleneck.parameters():
                    p -= 0.1 * p.grad
            bottleneck.zero_grad()
            bottleneck.usage.mul_(0.5)  # so that codes die within a few steps
            bottleneck.finish_step(alone)

    straight = vq()
    start = straight.codebook.detach().clone()
    run(straight, range(12))
    first, second = vq(), vq(seed=1)
    run(first, range(7))
    second.load_state_dict(first.state_dict())
    run(second, range(7, 12))
    assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), second.state_dict().values(), strict=True))
    assert ((straight.codebook - start).norm(dim=1) > 0.5).any()  # there were restarts


def test_it_runs_in_a_compiled_model() -> None:
    plain, traced = vq(), vq()
    compiled = torch.compile(traced, backend="eager", fullgraph=True)
    for seed in range(3):
        expected, got = plain(tokens(seed)), compiled(tokens(seed))
        assert torch.equal(got.z, expected.z) and torch.equal(got.codes, expected.codes)
        for bottleneck in (plain, traced):
            torch.manual_seed(seed)
            bottleneck.finish_step(alone)
    assert torch.equal(plain.usage, traced.usage) and not torch.equal(plain.usage, torch.ones(16))


def test_code_usage() -> None:
    assert code_usage(torch.arange(8).view(2, 4), 16) == pytest.approx({"code_usage": 0.5, "code_perplexity": 8})
    skewed = code_usage(torch.tensor([0, 0, 0, 1]), 4)
    assert skewed["code_perplexity"] == pytest.approx(np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))))
    assert code_usage(torch.zeros(5, dtype=torch.int64), 4) == pytest.approx({"code_usage": 0.25, "code_perplexity": 1})
