"""The picture of a run: training reward and held-out evaluations against the step."""

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

os.environ["MPLBACKEND"] = "agg"  # a notebook's, which is not installed here, would stop the import

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipe.run.metrics import eval_metric

_SMOOTHING_STEPS = 10
"""Length of the moving average in steps."""


def draw_rewards(title: str, lines: Sequence[Mapping[str, Any]], eval_names: Sequence[str]) -> bytes:
    """A PNG of the lines of metrics.jsonl: every step's mean reward, its moving average, and each evaluation set with
    its 95% confidence interval."""
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    _draw_training(axes, [line for line in lines if line.get("reward") is not None])
    for name in eval_names:
        _draw_evaluation(axes, name, [line for line in lines if line.get(eval_metric(name)) is not None])
    axes.set(title=title, xlabel="step", ylabel="mean reward")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right")
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _draw_training(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    if not lines:
        return
    steps = [line["step"] for line in lines]
    rewards = [line["reward"] for line in lines]
    windows = [rewards[max(0, end - _SMOOTHING_STEPS) : end] for end in range(1, len(rewards) + 1)]
    axes.plot(steps, rewards, color="C0", alpha=0.3, linewidth=1)
    axes.plot(
        steps,
        [sum(window) / len(window) for window in windows],
        color="C0",
        label=f"training, {_SMOOTHING_STEPS} steps",
    )


def _draw_evaluation(axes: Axes, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
    if not lines:
        return
    rewards = [line[eval_metric(name)] for line in lines]
    bars = [
        [0.0 if bound is None else abs(bound - reward) for reward, bound in zip(rewards, bounds, strict=True)]
        for bounds in ([line[eval_metric(name, end)] for line in lines] for end in ("ci95_low", "ci95_high"))
    ]
    axes.errorbar([line["step"] for line in lines], rewards, bars, marker="o", capsize=3, label=f"{name} (95%)")
