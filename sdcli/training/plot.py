"""Curves -> one figure: of training runs (the loss on top, learning rate and others below), or of a noise schedule."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from sdcli.training.run_log import Log
from sdcli.training.smoothing import MovingAverage

PANELS = (("lr", "learning rate"), ("grad_norm", "gradient norm"), ("samples_per_second", "samples/s"))
"""Figures of the small panels: name in the log, title."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which colour-blind people tell apart."""
_STYLE: dict[Any, Any] = {
    "agg.path.chunksize": 10_000,  # long curves overflow the renderer in one piece
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.labelcolor": "#333333",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.xmargin": 0.01,
    "font.size": 10,
    "grid.color": "#e6e6e6",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "svg.hashsalt": "sdcli",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
}


@dataclass(frozen=True)
class Curve:
    """Values over steps: int [n], float [n]; the values may hold NaN."""

    steps: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, log: Log, event: str, name: str) -> Curve:
        """A figure of a log; empty where it is not logged."""
        steps, values = log.series(event, name)
        return cls(np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64))

    def __len__(self) -> int:
        return len(self.steps)

    def smoothed(self, decay: float) -> Curve:
        """The exponential moving average, see `MovingAverage`."""
        average = MovingAverage(decay)
        return Curve(self.steps, np.array([average.add(value) for value in self.values.tolist()]))


@dataclass(frozen=True)
class Run:
    """A run in the image, under the name that the legend shows."""

    name: str
    log: Log


def draw_curves(runs: Sequence[Run], *, metric: str = "loss", smooth: float = 0.98, log_scale: bool = False) -> Figure:
    """One figure of 1500x1000 pixels with the curves of all runs, a colour each.

    The training metric is drawn as it is (faint) and as its moving average of decay `smooth` (bold), that of validation
    with markers. Panels that no run has figures for are left out. `log_scale` is for the metric and the gradient norm.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 20 / 3), dpi=150, layout="constrained")
        logged = {name for run in runs for name in run.log.metrics("train")}
        panels = [(name, title) for name, title in PANELS if name in logged and name != metric]
        grid = figure.add_gridspec(2, len(panels), height_ratios=[3, 1]) if panels else figure.add_gridspec(1, 1)
        _draw_metric(figure.add_subplot(grid[0, :]), runs, metric, smooth, log_scale=log_scale)
        for place, (name, title) in enumerate(panels):
            axes = figure.add_subplot(grid[1, place])
            _draw_panel(axes, runs, name, title, smooth, log_scale=log_scale and name == "grad_norm")
    return figure


def draw_schedule(
    betas: np.ndarray, alphas_cumprod: np.ndarray, *, name: str = "", marked: Sequence[int] = ()
) -> Figure:
    """One figure of 1500x500 pixels with a noise schedule over its timesteps: beta, alpha-bar, log SNR in decibels.

    `betas` and `alphas_cumprod` are float [T]; the timesteps in `marked` get a point on each curve.
    """
    signal = alphas_cumprod.astype(np.float64)
    with np.errstate(divide="ignore"):
        snr = 10 * np.log10(signal / (1 - signal))
    snr[~np.isfinite(snr)] = np.nan  # where no signal is left there is nothing to draw
    panels = (
        ("variance of each step, $\\beta_t$", betas),
        ("signal left, $\\bar\\alpha_t$", signal),
        ("log SNR, $10\\,\\log_{10}\\,\\bar\\alpha_t / (1 - \\bar\\alpha_t)$, in dB", snr),
    )
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10, 10 / 3), dpi=150, layout="constrained")
        for place, (title, values) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), place + 1)
            axes.plot(np.arange(len(values)), values, **_BOLD, color=COLOURS[0])
            axes.plot(marked, values[list(marked)], **{**_MARKED, "linewidth": 0}, color=COLOURS[1], clip_on=False)
            _set_axes(axes, [values], log_scale=False, ticks=5)
            axes.set_title(title, loc="left")
            axes.set_xlabel("timestep t")
        figure.suptitle(name, x=0.01, ha="left", fontweight="bold", fontsize=10).set_parse_math(False)
    return figure


def save_figure(figure: Figure, path: Path, *, format: str) -> None:
    """Write a figure as png, svg or pdf, without times: equal figures give equal bytes."""
    undated: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(format, {})
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box is shown for it, and that is enough
        figure.savefig(path, format=format, metadata=undated)


def _draw_metric(axes: Axes, runs: Sequence[Run], metric: str, smooth: float, *, log_scale: bool) -> None:
    alone = len(runs) == 1
    seen: list[np.ndarray] = []
    rise = 0.0
    names: list[tuple[str, Line2D]] = []
    kinds: dict[str, Line2D] = {}
    for number, run in enumerate(runs):
        line: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "linestyle": _line_style(number)}
        names.append((run.name, Line2D([], [], **_BOLD, **line)))
        training, validation = Curve.of(run.log, "train", metric), Curve.of(run.log, "validation", metric)
        if len(training):
            mean = training.smoothed(smooth)
            if smooth:
                axes.plot(training.steps, training.values, **_FAINT, color=line["color"])
                kinds["training"] = Line2D([], [], **_FAINT, color=line["color"] if alone else "black")
            axes.plot(mean.steps, mean.values, **_BOLD, **line)
            kinds[f"training, smoothed {smooth:g}" if smooth else "training"] = Line2D(
                [], [], **_BOLD, color=line["color"] if alone else "black"
            )
            seen += [_without_outliers(training.values), mean.values]
            rise += mean.values[-1] - mean.values[0]
        if len(validation):
            if alone:
                line["color"] = COLOURS[1]
            axes.plot(validation.steps, validation.values, **_MARKED, **line)
            kinds["validation"] = Line2D([], [], **_MARKED, color=line["color"] if alone else "black")
            seen.append(validation.values)
            rise += validation.values[-1] - validation.values[0]
    _set_axes(axes, seen, log_scale=log_scale, ticks=8)
    axes.set_ylabel(metric)
    axes.set_xlabel("step")
    shown = [*([] if alone else names), *kinds.items()]
    # The space before is for names that begin with an underscore, which a legend leaves out.
    legend = axes.legend(
        [line for _, line in shown],
        [f" {name}" for name, _ in shown],
        loc="lower right" if rise > 0 else "upper right",  # where no curve is; to look for the best place takes seconds
    )
    title = axes.set_title(runs[0].name if alone else "", loc="left", fontweight="bold")
    for text in (title, *legend.get_texts()):
        text.set_parse_math(False)  # a dollar sign in a name is one


def _draw_panel(axes: Axes, runs: Sequence[Run], name: str, title: str, smooth: float, *, log_scale: bool) -> None:
    seen = []
    for number, run in enumerate(runs):
        curve = Curve.of(run.log, "train", name)
        line: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "linestyle": _line_style(number)}
        if name == "lr" or not smooth:
            axes.plot(curve.steps, curve.values, **_BOLD, **line)
            seen.append(curve.values)
            continue
        mean = curve.smoothed(smooth)
        axes.plot(curve.steps, curve.values, **_FAINT, color=line["color"])
        axes.plot(mean.steps, mean.values, **_BOLD, **line)
        seen += [_without_outliers(curve.values), mean.values]
    _set_axes(axes, seen, log_scale=log_scale, ticks=4, from_zero=True)
    axes.set_title(title, loc="left")


_FAINT: dict[str, Any] = {"alpha": 0.25, "linewidth": 0.7, "zorder": 1.5}
_BOLD: dict[str, Any] = {"linewidth": 1.8, "zorder": 3}
_MARKED: dict[str, Any] = {"marker": "o", "markersize": 5, "markerfacecolor": "white", "linewidth": 1.2, "zorder": 4}


def _line_style(number: int) -> str:
    """Of a run's lines, once all colours are taken."""
    return ("-", "--", ":")[number // len(COLOURS) % 3]


def _without_outliers(values: np.ndarray) -> np.ndarray:
    """The range that nearly all values are in: one spike must not flatten the curve."""
    finite = values[np.isfinite(values)]
    return np.quantile(finite, [0.005, 0.995]) if len(finite) else finite


def _set_axes(axes: Axes, seen: Sequence[np.ndarray], *, log_scale: bool, ticks: int, from_zero: bool = False) -> None:
    """Show all the values that are in `seen`, with a little room and no more, and plain numbers at the ticks."""
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    values = np.concatenate([np.empty(0), *seen])
    values = values[np.isfinite(values) & ((values > 0) | (not log_scale))]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.1, 1.0)
    if log_scale:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.1, high * 1.1)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        low = min(low, 0.0) if from_zero else low
        room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
        axes.set_ylim(low if from_zero and low == 0 else low - room, high + room)
        axes.yaxis.set_major_locator(MaxNLocator(ticks))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
