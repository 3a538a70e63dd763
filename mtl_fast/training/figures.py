"""The pictures of a report: an episode with its predictions, convergence, sensitivity to the learning rate.

Pure functions of numbers that write one PNG each, 1600 pixels wide. Matplotlib is imported when a picture is
drawn and only through its object interface, so no state of the program's own plots is touched.
Colours are Okabe and Ito's, which colour-blind readers tell apart; a mark or a marker says the same again.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..files import replace_file
from .font import distinct, drawable

WIDTH, DPI = 1600, 160
INK, GREY, PALE = "#1b1f24", "#6b7280", "#e5e7eb"
RIGHT, WRONG = "#0072B2", "#D55E00"
# Colour and marker: a method looks the same in every picture; names that are not here take what is left.
METHODS = {
    "update θ": ("#6b7280", "o"),
    "FT θ": ("#E69F00", "s"),
    "FT[Θ;θ]": ("#009E73", "v"),
    "SS[Θ;θ]": ("#0072B2", "^"),
    "SS[Θ;θ] + HT": ("#D55E00", "D"),
    "plain meta-batch": ("#0072B2", "^"),
    "HT meta-batch": ("#D55E00", "D"),
}
SPARE = (("#CC79A7", "P"), ("#56B4E9", "X"), ("#1b1f24", "*"), *METHODS.values())


@dataclass(frozen=True)
class Curve:
    """Points of one method: abscissa, accuracy and, where known, its 95 % half-width, as fractions."""

    x: Sequence[float]
    accuracy: Sequence[float]
    interval: Sequence[float] | None = None

    def __post_init__(self) -> None:
        sizes = {len(self.x), len(self.accuracy), len(self.x if self.interval is None else self.interval)}
        if len(sizes) > 1 or not len(self.x):
            interval = "no" if self.interval is None else str(len(self.interval))
            raise ValueError(
                f"a curve needs equally many numbers of each kind, at least one: {len(self.x)} x, "
                f"{len(self.accuracy)} accuracies, {interval} intervals"
            )


def convergence_figure(
    path: str | Path, curves: Mapping[str, Mapping[str, Curve]], *, x_label: str = "tasks seen"
) -> None:
    """Validation accuracy against tasks seen: a panel a task shape, a line a method, bands for the intervals.

    Args:
        path: the PNG.
        curves: ``{"1-shot": {"SS[Θ;θ]": Curve(tasks, accuracy, interval), …}, …}``.
        x_label: what is counted.

    Raises:
        ValueError: nothing to draw.
    """
    _panels(Path(path), curves, x_label, "validation accuracy, %", log=False)


def steps_figure(path: str | Path, curves: Mapping[str, Mapping[str, Curve]]) -> None:
    """Accuracy against the steps of the inner loop; arguments and errors as `convergence_figure`."""
    _panels(Path(path), curves, "inner steps", "accuracy, %", log=False)


def rate_sensitivity_figure(
    path: str | Path, data: Mapping[str, Mapping[str, Curve]], *, x_label: str = "meta learning rate"
) -> None:
    """Accuracy of each method against its meta learning rate (logarithmic): how much each depends on it.

    Args:
        path: the PNG.
        data: ``{"1-shot": {"FT[Θ;θ]": Curve(rates, accuracy, interval), …}, …}``; a method without points on
            this axis belongs in here as a `Curve` of equal accuracies.
        x_label: what the axis says.

    Raises:
        ValueError: nothing to draw, or a rate that is not positive.
    """
    if any(min(curve.x) <= 0 for methods in data.values() for curve in methods.values()):
        raise ValueError("learning rates must be positive to stand on a logarithmic axis")
    _panels(Path(path), data, x_label, "accuracy, %", log=True)


def _panels(
    path: Path, panels: Mapping[str, Mapping[str, Curve]], x_label: str, y_label: str, log: bool
) -> None:
    from matplotlib.patches import Patch

    names = list(dict.fromkeys(name for methods in panels.values() for name in methods))
    if not names:
        raise ValueError(f"{path.name}: no curves to draw")
    strangers = [name for name in names if name not in METHODS]
    styles = METHODS | {name: SPARE[i % len(SPARE)] for i, name in enumerate(strangers)}
    with blank_figure(WIDTH, 720 if len(panels) > 1 else 860, "constrained") as figure:
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08, wspace=0.03)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (title, methods) in zip(axes, panels.items(), strict=True):
            for name, curve in methods.items():
                _line(axis, curve, name, styles[name], log)
            axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=10)
            axis.set_xlabel(x_label)
            axis.spines[["top", "right"]].set_visible(False)
            axis.spines[["left", "bottom"]].set_color(GREY)
            axis.tick_params(colors=GREY, labelcolor=INK)
            axis.grid(axis="y", color=PALE, linewidth=0.8)
            axis.set_axisbelow(True)
            if log:
                _log_axis(axis, sorted({x for curve in methods.values() for x in curve.x}))
            else:
                axis.set_xlim(left=0)
                axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes[0].set_ylabel(y_label)
        # One legend for all panels, in a row of its own above them.
        found = {
            label: line
            for axis in axes
            for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        handles = {name: found[name] for name in names}
        if any(curve.interval is not None for methods in panels.values() for curve in methods.values()):
            handles["95 % interval"] = Patch(facecolor=GREY, alpha=0.25)
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside upper center",
            ncols=min(len(handles), 6),
            frameon=False,
            handlelength=2.4,
        )
        write_picture(figure, path)


def _line(axis: Any, curve: Curve, name: str, style: tuple[str, str], log: bool) -> None:
    colour, marker = style
    order = np.argsort(np.asarray(curve.x, dtype=float), kind="stable")
    x, y = (np.asarray(values, dtype=float)[order] for values in (curve.x, curve.accuracy))
    if curve.interval is not None:
        half = np.asarray(curve.interval, dtype=float)[order]
        axis.fill_between(x, 100 * (y - half), 100 * (y + half), color=colour, alpha=0.15, linewidth=0)
    # At most a dozen markers a line; on the rate axis every point was measured.
    every = 1 if log else max(1, len(x) // 12)
    axis.plot(
        x,
        100 * y,
        color=colour,
        linewidth=1.8,
        marker=marker,
        markersize=5,
        markevery=every,
        markeredgecolor="white",
        markeredgewidth=0.7,
        label=name,
    )


def _log_axis(axis: Any, rates: list[float]) -> None:
    """Ticks where something was measured, in the words of a command line."""
    axis.set_xscale("log")
    shown = [rate for i, rate in enumerate(rates) if i % max(1, len(rates) // 7) == 0]
    axis.set_xticks(shown, [f"{rate:g}" for rate in shown])
    axis.set_xticks([], minor=True)


def episode_picture(
    path: str | Path,
    support: Any,
    query: Any,
    query_labels: Any,
    predictions: Any,
    class_names: Sequence[str],
    *,
    max_query: int = 10,
    max_shot: int = 5,
    title: str = "",
) -> None:
    """One episode: a row a class, its support images to the left, its queries with predictions to the right.

    A right answer has a blue frame and a tick, a wrong one a thick orange frame, a cross and the name of the
    class that was predicted.

    Args:
        path: the PNG.
        support: uint8 [n_way, n_shot, H, W, 3].
        query: uint8 [m, H, W, 3].
        query_labels, predictions: integers [m] in 0..n_way-1.
        class_names: [n_way]; drawn as `font.distinct` makes them.
        max_query, max_shot: most images shown of each class, and 13 in all, always the first ones; the head
            line counts all queries.
        title: head line; the count of right answers follows it.

    Raises:
        ValueError: shapes that do not fit together; they are named.
    """
    images, queries = np.asarray(support), np.asarray(query)
    labels, predicted = np.asarray(query_labels), np.asarray(predictions)
    n_way = len(class_names)
    fits = images.ndim == 5 and queries.ndim == 4 and images.shape[2:] == queries.shape[1:]
    if not fits or len(images) != n_way or not labels.shape == predicted.shape == queries.shape[:1]:
        raise ValueError(
            "support must be [n_way, n_shot, H, W, 3] and query [m, H, W, 3] with m labels and predictions "
            f"and n_way names; they are {list(images.shape)}, {list(queries.shape)}, {list(labels.shape)}, "
            f"{list(predicted.shape)} and {n_way}"
        )
    class_names = distinct(class_names)
    counts = [int((labels == c).sum()) for c in range(n_way)]
    n_support = min(images.shape[1], max_shot)
    n_query = min(max(counts), max_query, 13 - n_support)
    # Pixels: margins, column of names, gap between support and queries, space under an image for its caption.
    edge, names, gap, between, head, caption = 36, 190, 40, 12, 162, 42
    cell = (WIDTH - 2 * edge - names - gap - between * (n_support + n_query - 2)) // (n_support + n_query)
    cell = min(cell, 150)
    pitch = cell + caption + 8
    left_query = edge + names + n_support * (cell + between) - between + gap
    right = left_query + n_query * (cell + between) - between
    height = head + n_way * pitch + 16
    with blank_figure(WIDTH, height) as figure:
        page = Page(figure, height)
        n_right = int((labels == predicted).sum())
        result = f"{n_right} of {len(labels)} queries right ({100 * n_right / max(1, len(labels)):.0f} %)"
        page.text(
            edge, 46, f"{title}: {result}" if title else result, size=13, weight="bold", width=WIDTH - 460
        )
        page.mark(WIDTH - edge - 333, 46, 15, True)
        page.text(WIDTH - edge - 308, 46, "right", size=10)
        page.mark(WIDTH - edge - 208, 46, 15, False)
        page.text(WIDTH - edge - 183, 46, "wrong: taken for", size=10)
        page.text(edge, 120, "class", size=9, colour=GREY)
        kept = (
            "support" if n_support == images.shape[1] else f"support (first {n_support} of {images.shape[1]})"
        )
        page.text(edge + names, 120, kept, size=9, colour=GREY)
        shown = f"queries (first {n_query} of {max(counts)})" if n_query < max(counts) else "queries"
        page.text(left_query, 120, shown, size=9, colour=GREY)
        page.rule(edge, right, 140)
        for c, name in enumerate(class_names):
            top = head + c * pitch
            page.lines(edge, top + cell / 2, name, 26, size=10, weight="bold", width=names - 16)
            for i in range(n_support):
                page.image(edge + names + i * (cell + between), top, cell, images[c, i])
            for i, row in enumerate(np.flatnonzero(labels == c)[:n_query]):
                left, ok = left_query + i * (cell + between), bool(predicted[row] == c)
                page.image(left, top, cell, queries[row])
                page.frame(left, top, cell, ok)
                page.mark(left + cell - 9, top + 9, 14, ok)
                if not ok:
                    taken = class_names[int(predicted[row])]
                    middle = left + cell / 2
                    page.lines(
                        middle, top + cell + 24, taken, 17, 7, WRONG, "bold", cell + between - 4, "center"
                    )
        write_picture(figure, Path(path))


class Page:
    """A figure to draw on in pixels, from the top left corner."""

    def __init__(self, figure: Any, height: int) -> None:
        self.axes = figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        self.axes.axis("off")
        self._figure = figure

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 9,
        colour: str = INK,
        weight: str = "normal",
        width: float | None = None,
        align: str = "left",
    ) -> None:
        """One line around height y; an ellipsis in its middle where it is wider than `width`: ends tell names apart."""
        whole = drawable(text)
        label = self.axes.text(
            x,
            y,
            whole,
            fontsize=size,
            color=colour,
            fontweight=weight,
            ha=align,
            va="center",
            parse_math=False,
        )
        renderer = self._figure.canvas.get_renderer()
        kept = len(whole)
        while width is not None and kept > 1 and label.get_window_extent(renderer).width > width:
            kept -= 1
            label.set_text(f"{whole[: kept - kept // 2].rstrip()}…{whole[len(whole) - kept // 2 :].lstrip()}")

    def lines(self, x: float, y: float, text: str, leading: float, *style: Any, **named: Any) -> None:
        """`text` around height y, its first word and the rest on two lines where there are several words."""
        first, _, rest = drawable(text).partition(" ")
        if not rest:
            self.text(x, y, first, *style, **named)
            return
        self.text(x, y - leading / 2, first, *style, **named)
        self.text(x, y + leading / 2, rest, *style, **named)

    def image(self, left: float, top: float, size: float, pixels: NDArray[np.uint8]) -> None:
        """An image scaled up to size × size pixels without smoothing."""
        extent = (left, left + size, top + size, top)
        self.axes.imshow(pixels, extent=extent, interpolation="nearest", aspect="auto", zorder=1)
        # imshow moves the limits of the axes to the image.
        self.axes.set(xlim=(0, WIDTH), ylim=(self._figure.bbox.height, 0))

    def frame(self, left: float, top: float, size: float, ok: bool) -> None:
        from matplotlib.patches import Rectangle

        colour, line = (RIGHT, 1.6) if ok else (WRONG, 3.0)
        self.axes.add_patch(
            Rectangle((left, top), size, size, fill=False, edgecolor=colour, linewidth=line, zorder=2)
        )

    def mark(self, x: float, y: float, radius: float, ok: bool) -> None:
        """A tick or a cross on a disc."""
        from matplotlib.patches import Circle

        self.axes.add_patch(
            Circle((x, y), radius, facecolor=RIGHT if ok else WRONG, edgecolor="white", linewidth=1, zorder=3)
        )
        reach = 0.42 * radius
        strokes = [[(-1, 0.1), (-0.3, 0.9), (1.1, -0.9)]] if ok else [[(-1, -1), (1, 1)], [(-1, 1), (1, -1)]]
        for stroke in strokes:
            points = np.asarray(stroke, dtype=float) * reach + (x, y)
            self.axes.plot(*points.T, color="white", linewidth=1.6, solid_capstyle="round", zorder=4)

    def rule(self, left: float, right: float, y: float) -> None:
        self.axes.plot([left, right], [y, y], color=PALE, linewidth=1, zorder=0)


@contextmanager
def blank_figure(width: int, height: int, layout: Literal["constrained"] | None = None) -> Iterator[Any]:
    """A white figure of so many pixels, drawn by Agg in DejaVu whatever the user's own settings are."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcParams.update(
            {
                **{key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"},
                "font.family": "DejaVu Sans",
                "font.size": 9,
                "text.color": INK,
                "axes.labelcolor": INK,
            }
        )
        figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white", layout=layout)
        FigureCanvasAgg(figure)
        yield figure


def write_picture(figure: Any, path: Path) -> None:
    """Writes the PNG in one step; without date and version, so equal numbers give equal files.

    Raises:
        InputError: it cannot be written.
    """
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, [content.getvalue()])
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); free some space or give another --output"
        ) from None
