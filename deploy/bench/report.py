"""A benchmark's report for people: a table for the terminal, and one HTML file with drawings that loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise

from rich.table import Table

from deploy.bench.machine import cpu_between
from deploy.bench.run import BenchReport

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 220, 60, 24
_COLOURS = ("#2463a8", "#d1782c", "#3d8b52", "#8a4fa3", "#b03a48", "#5f6b73", "#b59a1c", "#2a9d9a")
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1d2329}"
    "table{border-collapse:collapse}td,th{padding:.2rem .8rem;border-bottom:1px solid #dde2e6;text-align:left}"
    "td+td{text-align:right}svg{width:100%;height:auto}text{font:12px system-ui,sans-serif;fill:#444}"
    ".bad{color:#b03a48;font-weight:600}"
)


def summary(report: BenchReport) -> list[tuple[str, str]]:
    """Name and value of every figure, in reading order."""
    latency = report.latency_ms
    return [
        ("events accepted", f"{report.accepted:,}"),
        ("decided", f"{report.decided:,}"),
        ("lost / decided twice", f"{report.lost:,} / {report.double:,}"),
        ("dead letters", f"{report.dead_letters:,}"),
        ("audit", f"{'intact' if report.audit_intact else 'BROKEN'}, {report.missing_records:,} records missing"),
        ("answers by status", ", ".join(f"{s}: {n:,}" for s, n in sorted(report.statuses.items())) or "none (backlog)"),
        ("events/s, audit included", f"{report.events_per_s:,.0f}"),
        ("seconds", f"{report.seconds:,.2f} (last decision {report.decided_seconds:,.2f})"),
        ("CPU seconds per 1,000 events", f"{report.cpu_total:.3f}"),
        *((f"  {kind}", f"{cpu:.3f}") for kind, cpu in sorted(report.cpu_s_per_1000.items(), key=lambda i: -i[1])),
        ("latency p50 / p95 / p99 / max, ms", " / ".join(f"{latency.get(n, 0):,.1f}" for n in _NAMES)),
        ("load generator late at worst, ms", f"{report.late_ms:,.1f}"),
        ("resident memory, MiB", f"{sum(report.rss.values()) / 2**20:,.0f}"),
        (
            "Redis bytes per event, left / peak",
            f"{report.redis_bytes_per_event:,.0f} / {report.redis_peak_bytes_per_event:,.0f}",
        ),
        ("PostgreSQL bytes per event", f"{report.postgresql_bytes_per_event:,.0f}"),
    ]


_NAMES = ("p50", "p95", "p99", "max")


def table(report: BenchReport) -> Table:
    """For the terminal."""
    found = Table(title="riskfleet bench" + ("" if report.good else " [red]NOT GOOD[/]"))
    found.add_column("what")
    found.add_column("measured", justify="right")
    for name, value in summary(report):
        found.add_row(name, value)
    return found


def html(report: BenchReport) -> str:
    """One self-contained page."""
    settings = {str(k): str(v) for k, v in (report.plan | report.hardware | report.versions).items()}
    parts = [
        f"<h1>riskfleet bench</h1><p class='{'' if report.good else 'bad'}'>{_verdict(report)}</p>",
        _rows(dict(summary(report))),
        "<h2>Throughput over time, events/s</h2>",
        _lines(
            {
                "decided": _rate([(s.at_s, s.decided) for s in report.samples]),
                "audit records / 5": _rate(_fifth(report)),
            }
        ),
        "<h2>CPU by process, cores</h2>",
        _lines(_cpu(report)),
        "<h2>Where the time goes, CPU seconds per 1,000 events</h2>",
        _bars(report.cpu_s_per_1000),
        "<h2>Latency by stage, ms after the step before</h2>",
        _stages(report.stage_latency_ms),
        "<h2>Settings</h2>",
        _rows(settings),
    ]
    return f"<!doctype html><meta charset=utf-8><title>riskfleet bench</title><style>{_STYLE}</style>{''.join(parts)}\n"


def _verdict(report: BenchReport) -> str:
    if report.good:
        return f"Each of {report.accepted:,} accepted events was decided once, and the audit is whole."
    return (
        f"Not good: {report.accepted:,} accepted, {report.statuses.get(0, 0):,} unanswered, "
        f"{report.lost:,} lost, {report.double:,} decided twice, {report.dead_letters:,} dead letters, "
        f"{report.missing_records:,} audit records missing."
    )


def _fifth(report: BenchReport) -> list[tuple[float, float]]:
    return [(sample.at_s, sample.records / 5) for sample in report.samples]


def _rate(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(t, max(0.0, n - m) / (t - s)) for (s, m), (t, n) in pairwise(points) if t > s]


def _cpu(report: BenchReport) -> dict[str, list[tuple[float, float]]]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for before, after in pairwise(report.samples):
        if after.at_s > before.at_s:
            for kind, cpu in cpu_between(before.costs, after.costs).items():
                lines.setdefault(kind, []).append((after.at_s, cpu / (after.at_s - before.at_s)))
    return lines


def _rows(values: Mapping[str, str]) -> str:
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in values.items())
    return f"<table>{rows}</table>"


def _stages(stages: Mapping[str, Mapping[str, float]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("step", *_NAMES))
    rows = "".join(
        f"<tr><td>{escape(stage)}</td>{''.join(f'<td>{found.get(name, 0):,.1f}</td>' for name in _NAMES)}</tr>"
        for stage, found in stages.items()
    )
    return f"<table><tr>{head}</tr>{rows}</table>"


def _lines(lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """A line chart; empty when nothing was seen twice."""
    points = [point for line in lines.values() for point in line]
    if not points:
        return "<p>the run was too short to draw</p>"
    right, top = max(x for x, _ in points) or 1.0, max(y for _, y in points) or 1.0
    marks = [_text(_LEFT - 6, 12, f"{top:,.4g}", "end"), _text(_LEFT - 6, _HEIGHT - _BOTTOM, "0", "end")]
    marks.append(_text(_WIDTH, _HEIGHT - 6, f"{right:,.1f} s", "end"))
    for number, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(
            f"{_LEFT + x / right * (_WIDTH - _LEFT):.1f},{(_HEIGHT - _BOTTOM) * (1 - y / top):.1f}" for x, y in line
        )
        marks.append(f"<polyline fill='none' stroke='{colour}' stroke-width='1.5' points='{path}'/>")
        legend = f"<tspan fill='{colour}'>{escape(name)}</tspan>"
        marks.append(_text(_LEFT + 8 + number % 5 * 130, 14 + number // 5 * 15, legend, "start"))
    return _svg(_HEIGHT, "".join(marks))


def _bars(values: Mapping[str, float]) -> str:
    ordered = sorted(values.items(), key=lambda item: -item[1])
    top = max((value for _, value in ordered), default=0.0) or 1.0
    marks = [
        _text(0, 15 + 20 * i, escape(name), "start")
        + f"<rect x='130' y='{4 + 20 * i}' height='14' width='{value / top * 480:.1f}' fill='{_COLOURS[0]}'/>"
        + _text(138 + value / top * 480, 15 + 20 * i, f"{value:.3f}", "start")
        for i, (name, value) in enumerate(ordered)
    ]
    return _svg(20 * len(ordered) + 8, "".join(marks))


def _svg(height: int, marks: str) -> str:
    return f"<svg viewBox='0 0 {_WIDTH} {height}' role='img'>{marks}</svg>"


def _text(x: float, y: float, content: str, anchor: str) -> str:
    return f"<text x='{x:.0f}' y='{y:.0f}' text-anchor='{anchor}'>{content}</text>"
