"""report.html: a run in one file that needs nothing else: settings, curves, previews, dataset, timings.

It reads what the metrics and the sheets left in the run's folder, so it also tells of the steps that an earlier process
took.
"""

import base64
import datetime
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lora_utils.io.files import atomic_path, disk_errors
from lora_utils.tracking import contact_sheet
from lora_utils.tracking.metrics import SIGMA_BANDS, band_name, read_metrics

REPORT_FILE = "report.html"
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 760, 240, 64, 28, 12
_COLOURS = ("#2563eb", "#dc2626", "#16a34a", "#9333ea", "#ea580c")
_POINTS_SHOWN = 400  # of a curve: more than that nobody sees
_SHEET_WIDTH_PX, _SHEET_QUALITY = 1200, 85
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:820px;margin:2em auto;padding:0 1em;color:#111}"
    "h2{margin-top:2em}table{border-collapse:collapse}td{padding:.1em 1em .1em 0;vertical-align:top}"
    "pre{background:#f3f4f6;padding:1em;overflow-x:auto;font-size:13px}img{max-width:100%}text{font-size:11px;fill:#555}"
)

Curve = list[tuple[float, float]]  # (step, value), ascending


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What a report says of a run beyond what is in its folder."""

    base_model: str
    settings: Mapping[str, object]
    dataset: Sequence[str]  # lines of the report on it
    timings: Sequence[str]


def _smoothed(curve: Curve) -> Curve:
    """Return means of equal parts: so few that the noise is gone, so many that the shape stays."""
    size = max(1, len(curve) // 25)
    parts = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [(sum(s for s, _ in part) / len(part), sum(v for _, v in part) / len(part)) for part in parts]


def _thinned(curve: Curve) -> Curve:
    return curve[:: max(1, len(curve) // _POINTS_SHOWN)]


def chart(title: str, curves: Mapping[str, Curve], faint: Curve | None = None) -> str:
    """Return an SVG with axes and a legend; `faint` is grey behind. It is empty where there is no point."""
    # The ranges of both axes.
    curves = {name: curve for name, curve in curves.items() if curve}
    points = [point for curve in [*curves.values(), faint or []] for point in curve]
    if not points:
        return ""
    steps, values = [s for s, _ in points], sorted(v for _, v in points)
    first, last = min(steps), max(*steps, min(steps) + 1)
    low, high = values[0], values[-1]
    if faint:  # a few wild steps shall not flatten all others
        high = max([values[int(0.98 * (len(values) - 1))], *(v for curve in curves.values() for _, v in curve)])
    high = high if high > low else low + (abs(low) or 1.0)

    def position(point: tuple[float, float]) -> str:
        x = _LEFT + (point[0] - first) / (last - first) * (_WIDTH - _LEFT - 10)
        y = _HEIGHT - _BOTTOM - (min(point[1], high) - low) / (high - low) * (_HEIGHT - _BOTTOM - _TOP)
        return f"{x:.1f},{y:.1f}"

    # The axes, then the faint curve, then each curve with its name.
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    for share in (0.0, 0.5, 1.0):
        value, y = low + share * (high - low), _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)
        parts.append(f'<line x1="{_LEFT}" y1="{y}" x2="{_WIDTH - 10}" y2="{y}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{value:.3g}</text>')
        x = _LEFT + share * (_WIDTH - _LEFT - 10)
        parts.append(
            f'<text x="{x}" y="{_HEIGHT - 8}" text-anchor="middle">{first + share * (last - first):.0f}</text>'
        )
    if faint:
        line = " ".join(map(position, _thinned(faint)))
        parts.append(f'<polyline points="{line}" fill="none" stroke="#d1d5db"/>')
    for index, (name, curve) in enumerate(curves.items()):
        colour, line = _COLOURS[index % len(_COLOURS)], " ".join(map(position, _thinned(curve)))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        at = _LEFT + 8 + index * 130
        parts.append(f'<text x="{at}" y="{_TOP + 10}" style="fill:{colour}">{html.escape(name)}</text>')
    return f"<h3>{html.escape(title)}</h3>{''.join(parts)}</svg>"


def _curves(lines: Sequence[dict[str, Any]]) -> list[str]:
    steps = [line for line in lines if "loss" in line]
    checks = [line for line in lines if "validation" in line]

    def of(name: str) -> Curve:
        return [(line["step"], line[name]) for line in steps if line[name] is not None]

    bands = {}
    for _, high in SIGMA_BANDS:
        name = band_name(high)
        found = [(line["step"], sum(own) / len(own)) for line in steps if (own := line["bands"].get(name))]
        bands[f"sigma {name}"] = _smoothed(found)
    held_out = {"held out": [(line["step"], line["validation"]) for line in checks]}
    return [
        chart("Loss, smoothed", {"training": _smoothed(of("loss")), "class": _smoothed(of("class_loss"))}, of("loss")),
        chart("Loss on images held out, at fixed noise", held_out),
        chart("Loss by level of noise, smoothed", bands),
        chart("Learning rate", {"LoRA": of("learning_rate")}),
        chart("Gradient norm before clipping, smoothed", {"LoRA": _smoothed(of("grad_norm"))}),
    ]


def _sheet(path: Path) -> str:
    with Image.open(path) as stored:
        sheet = stored.convert("RGB")
    if sheet.width > _SHEET_WIDTH_PX:
        sheet = sheet.resize((_SHEET_WIDTH_PX, sheet.height * _SHEET_WIDTH_PX // sheet.width))
    packed = io.BytesIO()
    sheet.save(packed, "webp", quality=_SHEET_QUALITY)
    data = base64.b64encode(packed.getvalue()).decode()
    return f'<h3>{html.escape(path.stem)}</h3><img alt="previews" src="data:image/webp;base64,{data}">'


def _table(values: Mapping[str, object]) -> str:
    rows = (
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>" for name, value in values.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _pre(lines: Sequence[str]) -> str:
    return f"<pre>{html.escape(chr(10).join(lines))}</pre>"


def write_report(folder: Path, summary: RunSummary) -> Path:
    """Write the report into the run's folder, in place of an older one. -> its path

    Raises UserError for a full disk.
    """
    sheets = contact_sheet.list_sheets(folder)
    sections = {
        "Curves": "".join(_curves(list(read_metrics(folder)))),
        "Previews": "".join(map(_sheet, sheets)),
        "Settings": _table(summary.settings),
        "Dataset": _pre(summary.dataset),
        "Timings": _pre(summary.timings),
    }
    made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections.items() if content)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>LoRA training</title><style>{_STYLE}</style>'
        f"<h1>LoRA of {html.escape(summary.base_model)}</h1><p>{made}</p>{body}</html>\n"
    )
    path = folder / REPORT_FILE
    with disk_errors(f"{path} can't be written", "free some room."), atomic_path(path) as partial:
        partial.write_text(page)
    return path
