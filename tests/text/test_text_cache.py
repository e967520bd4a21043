import copy
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from texttok_cli.config.schema import TextEncoderConfig
from texttok_cli.models.condition import Condition
from texttok_cli.text import EmbeddingCache
from texttok_cli.text.hashed import HashEncoder

CONFIG = TextEncoderConfig(kind="hash", dim=16, max_tokens=32)
TEXTS = ["a red car", "", "one two three four five six seven eight nine ten", "a red car"]


class Counting(HashEncoder):
    """Remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__(CONFIG)
        self.asked: list[str] = []

    def __call__(self, texts: Sequence[str]) -> Condition:
        self.asked += texts
        return super().__call__(texts)


def same(one: Condition, two: Condition) -> bool:
    masks = one.mask is None if two.mask is None else one.mask is not None and torch.equal(one.mask, two.mask)
    return torch.equal(one.tokens, two.tokens) and masks


def test_it_answers_as_the_encoder_and_asks_once() -> None:
    encoder = Counting()
    cache = EmbeddingCache(encoder)
    assert same(cache(TEXTS), HashEncoder(CONFIG)(TEXTS))
    assert same(cache(TEXTS), HashEncoder(CONFIG)(TEXTS))
    assert encoder.asked == TEXTS[:3]


def test_the_least_recently_used_text_goes_first() -> None:
    encoder = Counting()
    cache = EmbeddingCache(encoder, max_bytes=2 * 2 * 16 * 4)  # two texts of one word and the end token
    for text in ("a", "b", "a", "c", "a", "b"):
        cache([text])
    assert encoder.asked == ["a", "b", "c", "b"]


def test_a_batch_larger_than_the_cache_is_kept_until_the_next() -> None:
    """As images are encoded and then decoded under the same texts."""
    encoder = Counting()
    cache = EmbeddingCache(encoder, max_bytes=1)
    for _ in range(2):
        assert same(cache(TEXTS), HashEncoder(CONFIG)(TEXTS))
    assert encoder.asked == TEXTS[:3]
    cache(["another"])
    assert list(cache._states) == ["another"]


def test_threads_may_share_a_cache() -> None:
    """As a server's do: a text that another thread's batch pushed out was missed, and what is kept counted wrong for good."""
    cache = EmbeddingCache(HashEncoder(CONFIG), max_bytes=2000)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: cache([f"a {i % 50}", f"b {i % 7}"]), range(2000)))
    finally:
        sys.setswitchinterval(before)
    assert cache._bytes == sum(states.nbytes for states in cache._states.values()) <= 2000
    assert same(copy.deepcopy(cache)(TEXTS), HashEncoder(CONFIG)(TEXTS))


def test_what_was_cached_in_inference_can_be_trained_with() -> None:
    cache = EmbeddingCache(HashEncoder(CONFIG))
    with torch.inference_mode():
        cache(TEXTS)
    layer = torch.nn.Linear(16, 4)
    layer(cache(TEXTS).tokens).sum().backward()
    assert layer.weight.grad is not None
