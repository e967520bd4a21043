"""Pictures of measurements, the paper's in a panel of their own beside ours. The only file that imports matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from texttok_cli.bench import paper
from texttok_cli.bench.curves import Point, pareto
from texttok_cli.bench.results import TradeoffResult
from texttok_cli.bench.tradeoff import curve, summarize
from texttok_cli.errors import BackendError
from texttok_cli.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("png", "svg")
MARKERS = "osD^vP*X"


def plot_tradeoff(result: TradeoffResult, path: Path) -> list[Path]:
    """FID over seconds an image (logarithmic) of every series, its Pareto front drawn as a line, as `path`.png and .svg."""

    def ours(axes: Axes) -> None:
        _curves(axes, {name: curve(result, name) for name in result.tokens})
        images = result.points[0].images if result.points else 0
        axes.set_title(_literal(f"measured: {result.name}\n{images:,} samples per point, {result.machine.name}"), fontsize=8)
        summary = summarize(result)
        if summary is not None and summary.speedup is not None:
            chosen, reference = summary.speedup.chosen, summary.speedup.reference
            axes.annotate(
                "", (chosen.seconds, chosen.fid), (reference.seconds, reference.fid), arrowprops={"arrowstyle": "->", "color": "0.5"}
            )
            axes.text(chosen.seconds, chosen.fid, f" {summary.speedup.value:.3g}x", va="bottom", color="0.3")

    def theirs(axes: Axes) -> None:
        _curves(axes, paper.points(result.paper_size))
        axes.set_title(f"{paper.POINTS_CAPTION}\nImageNet {result.paper_size} x {result.paper_size}", fontsize=8)

    return _draw(path, [ours, theirs])


def plot_rfid(measured: Mapping[str, Mapping[int, Sequence[float]]], path: Path, *, caption: str, image_size: int) -> list[Path]:
    """Reconstruction FID over the number of tokens (Fig. 3): ours by name, and the paper's Table 1 beside it.

    Of a size that the paper does not have, its smaller one stands there; its panel says so.
    """
    size = image_size if image_size in paper.SIZES else min(paper.SIZES)

    def ours(axes: Axes) -> None:
        _by_tokens(axes, measured)
        axes.set_title(_literal(f"measured: {caption}"), fontsize=8)

    def theirs(axes: Axes) -> None:
        table = {name: paper.column("table1", "rFID", name, size) for name in ("Baseline", "TexTok")}
        _by_tokens(axes, {name: {tokens: [value] for tokens, value in found.items()} for name, found in table.items()})
        axes.set_title(f"the paper's: Table 1, ImageNet {size} x {size}, 50K training images", fontsize=8)

    return _draw(path, [ours, theirs])


def _curves(axes: Axes, curves: Mapping[str, Sequence[Point]]) -> None:
    from matplotlib.ticker import LogLocator

    for i, (name, points) in enumerate(curves.items()):
        front = pareto(points)
        [line] = axes.plot([p.seconds for p in front], [p.fid for p in front], label=_literal(name))
        marker = MARKERS[i % len(MARKERS)]
        axes.scatter([p.seconds for p in points], [p.fid for p in points], color=line.get_color(), marker=marker, s=18)
    axes.set_xscale("log", subs=[])
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("seconds per image")
    axes.set_ylabel("FID")


def _by_tokens(axes: Axes, values: Mapping[str, Mapping[int, Sequence[float]]]) -> None:
    """A mark for each value, and a line through the mean of each number of tokens."""
    for name, found in values.items():
        tokens = sorted(found)
        [line] = axes.plot(tokens, [fmean(found[n]) for n in tokens], label=_literal(name))
        axes.plot([n for n in tokens for _ in found[n]], [value for n in tokens for value in found[n]], "o", color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("tokens")
    axes.set_ylabel("rFID")


def _literal(text: str) -> str:
    """Matplotlib takes what stands between two dollars for mathematics, and fails if it is none."""
    return text.replace("$", r"\$")


def _draw(path: Path, panels: Sequence[Callable[[Axes], None]]) -> list[Path]:
    """One figure of panels side by side, each with axes of its own. BackendError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BackendError("plots need matplotlib: pip install 'texttok[bench]'") from None
    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), number)
        panel(axes)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    files = [path.with_name(f"{path.name}.{suffix}") for suffix in FORMATS]
    for file, suffix in zip(files, FORMATS, strict=True):
        with atomic_path(file) as temporary:
            figure.savefig(temporary, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
    return files
