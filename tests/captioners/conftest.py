import os
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from served import Handler, Served, says

from texttok_cli.captioners import client


@pytest.fixture
def endpoint() -> Iterator[Served]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served = Served(f"http://127.0.0.1:{server.server_port}/v1", [says("a red square")])
    server.endpoint = served  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield served
    server.shutdown()
    server.server_close()


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back-off in hundredths of its seconds."""
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(client, "LONGEST_PAUSE", 0.02)


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    """A picture of one colour, or of noise for none."""

    def make(colour: tuple[int, int, int] | None = None, size: tuple[int, int] = (40, 30)) -> Image.Image:
        if colour is not None:
            return Image.new("RGB", size, colour)
        return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))

    return make


@pytest.fixture
def real_shards() -> list[Path]:
    """photos128-val, if TEXTTOK_DATA says where it is."""
    if "TEXTTOK_DATA" not in os.environ:
        pytest.skip("TEXTTOK_DATA does not name the folder that holds data/")
    return sorted((Path(os.environ["TEXTTOK_DATA"]) / "data").glob("photos128-val-*.tar"))
