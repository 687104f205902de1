"""Figures of training runs (the loss above, learning rate and others below) and of noise schedules."""

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
"""The small panels: name in the log, title."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, distinguishable with colour blindness."""
_STYLE: dict[Any, Any] = {
    "agg.path.chunksize": 10_000,  # long curves overflow the renderer if drawn at once
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
    """Values over steps: int [n], float [n]; values may be NaN."""

    steps: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, log: Log, event: str, name: str) -> Curve:
        """A metric of a log; empty if it is not logged."""
        steps, values = log.series(event, name)
        return cls(np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64))

    def __len__(self) -> int:
        return len(self.steps)

    def smoothed(self, decay: float) -> Curve:
        """The curve's exponential moving average, see `MovingAverage`."""
        average = MovingAverage(decay)
        return Curve(self.steps, np.array([average.add(value) for value in self.values.tolist()]))


@dataclass(frozen=True)
class Run:
    """A run to draw, and its name in the legend."""

    name: str
    log: Log


def draw_curves(runs: Sequence[Run], *, metric: str = "loss", smooth: float = 0.98, log_scale: bool = False) -> Figure:
    """One figure of 1500x1000 pixels with the curves of all runs, a colour each.

    The training metric is drawn unsmoothed (faint) and as its moving average with decay `smooth` (bold), the validation
    metric with markers. Panels without data are left out. `log_scale` applies to the metric and the gradient norm.
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

    `betas` and `alphas_cumprod` are float [T]; the timesteps in `marked` are marked on each curve.
    """
    signal = alphas_cumprod.astype(np.float64)
    with np.errstate(divide="ignore"):
        snr = 10 * np.log10(signal / (1 - signal))
    snr[~np.isfinite(snr)] = np.nan  # no signal is left there
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
    """Write a figure as png, svg or pdf, without a date, so that equal figures give equal bytes."""
    undated: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(format, {})
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the box drawn for it is enough
        figure.savefig(path, format=format, metadata=undated)


def _draw_metric(axes: Axes, runs: Sequence[Run], metric: str, smooth: float, *, log_scale: bool) -> None:
    alone = len(runs) == 1
    drawn: list[np.ndarray] = []
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
            drawn += [_without_outliers(training.values), mean.values]
            rise += mean.values[-1] - mean.values[0]
        if len(validation):
            if alone:
                line["color"] = COLOURS[1]
            axes.plot(validation.steps, validation.values, **_MARKED, **line)
            kinds["validation"] = Line2D([], [], **_MARKED, color=line["color"] if alone else "black")
            drawn.append(validation.values)
            rise += validation.values[-1] - validation.values[0]
    _set_axes(axes, drawn, log_scale=log_scale, ticks=8)
    axes.set_ylabel(metric)
    axes.set_xlabel("step")
    shown = [*([] if alone else names), *kinds.items()]
    # The leading space keeps names that start with an underscore, which a legend would leave out.
    legend = axes.legend(
        [line for _, line in shown],
        [f" {name}" for name, _ in shown],
        loc="lower right"
        if rise > 0
        else "upper right",  # usually free of curves; to search for the best location takes seconds
    )
    title = axes.set_title(runs[0].name if alone else "", loc="left", fontweight="bold")
    for text in (title, *legend.get_texts()):
        text.set_parse_math(False)  # a dollar sign in a name is not mathematics


def _draw_panel(axes: Axes, runs: Sequence[Run], name: str, title: str, smooth: float, *, log_scale: bool) -> None:
    drawn = []
    for number, run in enumerate(runs):
        curve = Curve.of(run.log, "train", name)
        line: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "linestyle": _line_style(number)}
        if name == "lr" or not smooth:
            axes.plot(curve.steps, curve.values, **_BOLD, **line)
            drawn.append(curve.values)
            continue
        mean = curve.smoothed(smooth)
        axes.plot(curve.steps, curve.values, **_FAINT, color=line["color"])
        axes.plot(mean.steps, mean.values, **_BOLD, **line)
        drawn += [_without_outliers(curve.values), mean.values]
    _set_axes(axes, drawn, log_scale=log_scale, ticks=4, from_zero=True)
    axes.set_title(title, loc="left")


_FAINT: dict[str, Any] = {"alpha": 0.25, "linewidth": 0.7, "zorder": 1.5}
_BOLD: dict[str, Any] = {"linewidth": 1.8, "zorder": 3}
_MARKED: dict[str, Any] = {"marker": "o", "markersize": 5, "markerfacecolor": "white", "linewidth": 1.2, "zorder": 4}


def _line_style(number: int) -> str:
    """The line style of a run, which changes once all colours are used."""
    return ("-", "--", ":")[number // len(COLOURS) % 3]


def _without_outliers(values: np.ndarray) -> np.ndarray:
    """The range of nearly all values, so that one spike does not flatten the curve."""
    finite = values[np.isfinite(values)]
    return np.quantile(finite, [0.005, 0.995]) if len(finite) else finite


def _set_axes(axes: Axes, drawn: Sequence[np.ndarray], *, log_scale: bool, ticks: int, from_zero: bool = False) -> None:
    """Fit the axes to the values in `drawn` with a small margin, and label the ticks with plain numbers."""
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    values = np.concatenate([np.empty(0), *drawn])
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
