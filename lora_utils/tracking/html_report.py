"""report.html: a run in one file that needs nothing else: curves, previews, settings, dataset, timings.

It reads what the metrics and the sheets left in the run's folder, so it also tells of the steps that an earlier process
took. The curves are Bokeh's, whose script is in the file. While the run is on, the page loads itself again.
"""

import base64
import datetime
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from lora_utils.io.files import atomic_path, disk_errors
from lora_utils.tracking import contact_sheet
from lora_utils.tracking.metrics import SIGMA_BANDS, band_name, read_metrics
from lora_utils.tracking.status import STEP_WEIGHTS

REPORT_FILE = "report.html"
RELOAD_S = 15
_COLOURS = ("#2563eb", "#dc2626", "#16a34a", "#9333ea", "#ea580c")
_POINTS_SHOWN = 400  # of a curve: more than that nobody sees
_SHEET_WIDTH_PX, _QUALITY = 1200, 85
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:960px;margin:2em auto;padding:0 1em;color:#111}
h2{margin-top:2em}table{border-collapse:collapse}td{padding:.1em 1em .1em 0;vertical-align:top}
pre{background:#f3f4f6;padding:1em;overflow-x:auto;font-size:13px}img{max-width:100%}summary{cursor:pointer}
#slider{width:100%}figure{display:inline-block;margin:0 1em 1em 0;font-size:13px}.now{color:#2563eb}
"""
# The slider shows one sheet of all. Where it stands is kept when the page is loaded again, unless it stands at the end.
_SLIDER = """
const sheets=[...document.querySelectorAll('.sheet')],slider=document.getElementById('slider');
function show(){sheets.forEach((each,index)=>{each.hidden=index!=slider.value});
document.getElementById('shown').textContent=sheets[slider.value].dataset.title}
const kept=sessionStorage.getItem('sheet');
if(kept!==null&&+kept<sheets.length)slider.value=kept;
slider.oninput=()=>{show();const last=+slider.value==sheets.length-1;
last?sessionStorage.removeItem('sheet'):sessionStorage.setItem('sheet',slider.value)};
show();
"""

Curve = list[tuple[float, float]]  # (step, value), ascending


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What a report says of a run beyond what is in its folder."""

    base_model: str
    settings: Mapping[str, object]
    changed: Mapping[str, object]  # the settings that aren't the defaults
    dataset: Sequence[str]  # lines of the report on it
    buckets: Mapping[str, int] = field(default_factory=dict)  # images by size
    crops: Sequence[tuple[str, Image.Image]] = ()  # those that lose most to their bucket, with what they lose
    timings: Sequence[str] = ()
    progress: str = ""  # of a run that is on; empty at its end


# --- curves ---------------------------------------------------------------------------------------------------------


def smoothed(curve: Curve) -> Curve:
    """Return means of equal parts: so few that the noise is gone, so many that the shape stays."""
    size = max(1, len(curve) // 25)
    parts = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [(sum(s for s, _ in part) / len(part), sum(v for _, v in part) / len(part)) for part in parts]


def _thinned(curve: Curve) -> Curve:
    return curve[:: max(1, len(curve) // _POINTS_SHOWN)]


def _figure(title: str, curves: Mapping[str, Curve], faint: Curve | None = None, from_zero: bool = False) -> Any:
    """Return a chart; `faint` is grey behind the curves. None where there is no point."""
    from bokeh.models import HoverTool, Range1d  # noqa: PLC0415 (heavy, and only for this page)
    from bokeh.plotting import figure  # noqa: PLC0415

    curves = {name: _thinned(curve) for name, curve in curves.items() if curve}
    values = sorted(value for curve in [*curves.values(), faint or []] for _, value in curve)
    if not values:
        return None
    low, high = 0.0 if from_zero else values[0], values[-1]
    if faint:  # a few wild steps shall not flatten all others
        high = max([values[int(0.98 * (len(values) - 1))], *(v for curve in curves.values() for _, v in curve)])
    margin = 0.05 * ((high - low) or abs(low) or 1.0)
    chart = figure(
        title=title,
        height=280,
        sizing_mode="stretch_width",
        x_axis_label="step",
        y_range=Range1d(start=low if from_zero else low - margin, end=high + margin),
        tools="pan,box_zoom,reset,save",
        toolbar_location="above",
    )
    if faint:
        steps, losses = zip(*_thinned(faint), strict=True)
        chart.line(steps, losses, color="#d1d5db", legend_label="each step")
    for index, (name, curve) in enumerate(curves.items()):
        steps, losses = zip(*curve, strict=True)
        colour = _COLOURS[index % len(_COLOURS)]
        chart.line(steps, losses, color=colour, line_width=2, legend_label=name, name=name)
        if len(curve) < 2:  # no line shows it
            chart.scatter(steps, losses, color=colour, size=6, legend_label=name, name=name)
    chart.add_tools(HoverTool(tooltips=[("", "$name"), ("step", "@x"), ("", "@y{0.0000}")]))
    chart.add_layout(chart.legend[0], "right")  # beside the curves, never over them
    chart.legend.click_policy = "hide"
    chart.toolbar.logo = None
    return chart


def _curves(lines: Sequence[dict[str, Any]]) -> list[Any]:
    steps = [line for line in lines if "loss" in line]
    checks = [line for line in lines if "validation" in line]

    def of(name: str) -> Curve:
        return [(line["step"], line[name]) for line in steps if line[name] is not None]

    bands = {}
    for _, high in SIGMA_BANDS:
        name = band_name(high)
        found = [(line["step"], sum(own) / len(own)) for line in steps if (own := line["bands"].get(name))]
        bands[f"sigma {name}"] = smoothed(found)
    held_out = {"held out": [(line["step"], line["validation"]) for line in checks]}
    training = {"training": smoothed(of("loss")), "class": smoothed(of("class_loss"))}
    charts = [
        _figure("Loss, smoothed", training, of("loss")),
        _figure("Loss on images held out, at fixed noise", held_out),
        _figure("Loss by level of noise, smoothed", bands),
        _figure("Learning rate", {"LoRA": of("learning_rate")}, from_zero=True),
        _figure("Gradient norm before clipping, smoothed", {"LoRA": smoothed(of("grad_norm"))}, from_zero=True),
    ]
    return [chart for chart in charts if chart is not None]


def _buckets(counts: Mapping[str, int]) -> Any:
    """Return a chart of how many images each bucket has; None without any."""
    from bokeh.models import FactorRange, Range1d  # noqa: PLC0415
    from bokeh.plotting import figure  # noqa: PLC0415

    if not counts:
        return None
    names = list(counts)[::-1]
    chart = figure(
        x_range=Range1d(start=0, end=1.05 * max(counts.values())),
        y_range=FactorRange(factors=names),
        height=80 + 22 * len(names),
        sizing_mode="stretch_width",
        title="Images by bucket",
        tools="save",
    )
    chart.hbar(y=names, right=[counts[name] for name in names], height=0.7, color=_COLOURS[0])
    chart.toolbar.logo = None
    return chart


# --- the page -------------------------------------------------------------------------------------------------------


def _uri(image: Image.Image) -> str:
    packed = io.BytesIO()
    image.convert("RGB").save(packed, "webp", quality=_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(packed.getvalue()).decode()


def _sheets(paths: Sequence[Path]) -> str:
    """Return the contact sheets under a slider over their steps; the last one is shown first."""
    if not paths:
        return ""
    shown = []
    for path in paths:
        with Image.open(path) as stored:
            sheet = stored.convert("RGB")
        if sheet.width > _SHEET_WIDTH_PX:
            sheet = sheet.resize((_SHEET_WIDTH_PX, sheet.height * _SHEET_WIDTH_PX // sheet.width))
        step = int(path.stem.rpartition("-")[2])
        weights = path.parent.parent / STEP_WEIGHTS.format(step)
        title = f"after step {step}" + (f", {weights.name}" if weights.is_file() else "")
        shown.append(f'<img class="sheet" alt="previews" data-title="{title}" src="{_uri(sheet)}" hidden>')
    last = len(paths) - 1
    slider = f'<input id="slider" type="range" min="0" max="{last}" value="{last}" aria-label="step">'
    return f'{slider}<p id="shown"></p>{"".join(shown)}<script>{_SLIDER}</script>'


def _crops(crops: Sequence[tuple[str, Image.Image]]) -> str:
    return "".join(
        f'<figure><img alt="" src="{_uri(image)}"><figcaption>{html.escape(text)}</figcaption></figure>'
        for text, image in crops
    )


def _table(values: Mapping[str, object]) -> str:
    rows = (
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>" for name, value in values.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _settings(summary: RunSummary) -> str:
    """Return the settings that differ from the defaults, and the others folded away."""
    others = {name: value for name, value in summary.settings.items() if name not in summary.changed}
    folded = f"<details><summary>{len(others)} at their defaults</summary>{_table(others)}</details>"
    return _table(summary.changed) + folded


def _pre(lines: Sequence[str]) -> str:
    return f"<pre>{html.escape(chr(10).join(lines))}</pre>" if lines else ""


def write_report(folder: Path, summary: RunSummary) -> Path:
    """Write the report into the run's folder, in place of an older one. -> its path

    Raises UserError for a full disk.
    """
    from bokeh.embed import components  # noqa: PLC0415 (heavy, and only for this page)
    from bokeh.resources import Resources  # noqa: PLC0415

    curves, buckets = _curves(list(read_metrics(folder))), _buckets(summary.buckets)
    script, divs = components((*curves, buckets) if buckets else tuple(curves)) if curves or buckets else ("", ())
    bokeh = Resources(mode="inline", components=["bokeh"]).render() if script else ""
    crops = _crops(summary.crops)
    sections = {
        "Curves": "".join(divs[: len(curves)]),
        "Previews": _sheets(contact_sheet.list_sheets(folder)),
        "Settings": _settings(summary),
        "Dataset": "".join(divs[len(curves) :])
        + (f"<h3>Cropped most</h3>{crops}" if crops else "")
        + _pre(summary.dataset),
        "Timings": _pre(summary.timings),
    }
    made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections.items() if content)
    reload = f"<script>setTimeout(()=>location.reload(),{1000 * RELOAD_S})</script>" if summary.progress else ""
    now = f'<p class="now">{html.escape(summary.progress)}</p>' if summary.progress else ""
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>LoRA training</title>'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style>{bokeh}</head>'
        f"<body><h1>LoRA of {html.escape(summary.base_model)}</h1>{now}"
        f"<p>{made}</p>{body}{script}{reload}</body></html>\n"
    )
    path = folder / REPORT_FILE
    with disk_errors(f"{path} can't be written", "free some room."), atomic_path(path) as partial:
        partial.write_text(page)
    return path
