"""Observers of a batch: the trace, the attention heatmap, and the preview of a step.

Start with observer.py: what an observer is. One observer adds side files to an image and never changes the image.
"""

from __future__ import annotations

from sdcli.generation.observers.heatmap import HeatmapObserver
from sdcli.generation.observers.observer import Observer
from sdcli.generation.observers.trace import TraceObserver
from sdcli.generation.settings import OutputSettings


def observers_for(output: OutputSettings) -> list[Observer]:
    """The observers whose side files the settings of the output name."""
    observers: list[Observer] = [TraceObserver(output.trace)] if output.trace is not None else []
    return [*observers, HeatmapObserver(output.heatmap)] if output.heatmap is not None else observers
