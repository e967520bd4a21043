"""Which images a page shows; what they show is tested with the command."""

import pytest
import torch

from texttok_cli.bench.eval_gallery import by_rank


@pytest.mark.parametrize("n", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("each", [1, 3, 4])
def test_no_image_stands_in_two_ranks(n: int, each: int) -> None:
    quality = torch.randn(n, generator=torch.Generator().manual_seed(n))
    quality[0] = torch.inf
    ranks = by_rank(quality, each)
    chosen = [number for numbers in ranks.values() for number in numbers]
    assert len(chosen) == len(set(chosen)) == min(n, 3 * each)
    assert [float(quality[number]) for number in chosen] == sorted((float(quality[number]) for number in chosen), reverse=True)
    assert ranks["Best"][0] == 0 and (n == 1 or ranks["Worst"][-1] == int(quality.argmin()))
    assert all(len(numbers) <= each for numbers in ranks.values())
