"""The picture of a run: for every case the share of the dense limit that each way reaches. Needs matplotlib.

Of sustained times, if every case's limit has one; else, as in files from before there were any, from an idle GPU.
"""

import io
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from expertune.bench.measure import FAILED, SKIPPED, WRONG, Result
from expertune.bench.results import CaseResults
from expertune.bench.ways import LIMIT, OURS

_COLORS = {
    "scattermoe": "#0b6e4f",
    "sonicmoe": "#14532d",
    "sonicmoe, materialized": "#86a87f",
    "torch_grouped": "#6bbf9c",
}  # ours; every rival is grey
_RIVAL, _INK, _FAINT = "#9aa3ad", "#1d2329", "#6b747d"
_SHOWN_VERSIONS = ("torch", "triton", "transformers", "peft")
_ROW_INCHES, _WIDTH_INCHES, _MARGIN_INCHES = 0.24, 9.0, 1.5
_LONGEST_NOTE = 70


def plot_png(measured: Sequence[CaseResults], environment: Mapping[str, str]) -> bytes:
    """A PNG with a group of horizontal bars for each case. Raises ImportError without matplotlib."""
    figure_module: Any = import_module("matplotlib.figure")
    sustained = all(_limit_ms(each, True) for each in measured)
    num_rows = sum(len(_bars(each)) + 2 for each in measured)
    height = num_rows * _ROW_INCHES + _MARGIN_INCHES
    figure = figure_module.Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
    axes = figure.add_subplot()
    ticks, y = [], 0.0
    for each in measured:
        limit = _limit_ms(each, sustained)
        of = f"   (100 % = {limit:.3g} ms)" if limit else ""
        heading = axes.annotate(each.case.title, (0, y), xytext=(4, 0), textcoords="offset points", va="center")
        heading.set(weight="bold", color=_INK, fontsize=9.5)
        axes.annotate(of, (1, 0.5), xycoords=heading, va="center", color=_FAINT, fontsize=8.5)
        y += 1
        for result in _bars(each):
            ticks.append((y, result.way))
            _draw_bar(axes, y, result, sustained)
            y += 1
        y += 1
    axes.axvline(100, color=_INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks], fontsize=8.5, color=_INK)
    axes.set_ylim(y - 0.6, -0.9)
    shares = [_figures(result, sustained)[1] or 0 for each in measured for result in _bars(each)]
    axes.set_xlim(0, max([108.0, *(115 * share for share in shares)]))
    axes.set_xticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)], fontsize=8.5, color=_FAINT)
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color("#c9ced3")
    axes.grid(axis="x", color="#e7eaed", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.set_xlabel("share of the speed of dense cuBLAS on the base products alone (100 %)", fontsize=9, color=_INK)
    how = "step after step" if sustained else "from an idle GPU"
    axes.set_title(f"Expert MLP with LoRA, forward + backward, {how}", fontsize=12, color=_INK, loc="left", pad=22)
    versions = [f"{name} {environment.get(name, '')}" for name in _SHOWN_VERSIONS]
    where = ", ".join([environment.get("gpu", ""), *versions])
    subtitle = axes.annotate(where, (0, 1), xycoords="axes fraction", xytext=(0, 6), textcoords="offset points")
    subtitle.set(color=_FAINT, fontsize=8.5)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=160)
    return image.getvalue()


def _bars(measured: CaseResults) -> list[Result]:
    return [result for result in measured.results if result.kind != LIMIT]


def _figures(result: Result, sustained: bool) -> tuple[float | None, float | None]:
    """Milliseconds, and their share of the limit's."""
    if sustained:
        return result.p50_sustained_ms, result.share_of_dense_sustained
    return result.p50_ms, result.share_of_dense


def _limit_ms(measured: CaseResults, sustained: bool) -> float | None:
    return next((_figures(result, sustained)[0] for result in measured.results if result.kind == LIMIT), None)


def _draw_bar(axes: Any, y: float, result: Result, sustained: bool) -> None:
    label_style = {"va": "center", "fontsize": 8.5, "xytext": (4, 0), "textcoords": "offset points"}
    ms, share = _figures(result, sustained)
    if share is None or ms is None:
        note = result.note if len(result.note) <= _LONGEST_NOTE else result.note[: _LONGEST_NOTE - 1] + "…"
        missing = "cannot be captured in a CUDA graph" if sustained else "no dense limit to compare with"
        text = f"{result.status}: {note}" if result.status in (SKIPPED, FAILED) else missing
        axes.annotate(text, (0, y), color=_FAINT, style="italic", **label_style)
        return
    percent = 100 * share
    color = _COLORS.get(result.way, "#0b6e4f") if result.kind == OURS else _RIVAL
    axes.barh(y, percent, height=0.72, color=color, zorder=2, hatch="///" if result.status == WRONG else None)
    wrong = f", {result.note}" if result.status == WRONG else ""
    axes.annotate(f"{percent:.0f} %  {ms:.3g} ms{wrong}", (percent, y), color=_INK, **label_style)
