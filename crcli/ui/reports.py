"""What the two stories did, for people and for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from crcli.ui.text import count, duration, json_text, printable, size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crcli.pipeline.check import CheckReport
    from crcli.pipeline.stages import DumpReport, Forecast, RestoreReport

OUTCOMES = {"killed": "and killed", "running": "and left running", "stopped": "and left stopped"}


def show_json(data: Mapping[str, Any]) -> None:
    """Print the one JSON object of a command."""
    print(json_text(data), flush=True)


def show_dump(report: DumpReport, as_json: bool, *, dry_run: bool = False) -> None:
    """Show what a dump did (or, for a dry run, would do)."""
    if as_json:
        show_json(report.as_json())
        return
    processes = count(report.processes, "process")
    if dry_run:
        _say(f"{report.pid}: {processes} can be dumped, as {report.name}; nothing was touched")
        _say_forecast(report.forecast)
        for finding in report.findings:
            _say(f"  {finding.severity.value}: {finding.message}")
        return
    _say(f"{report.image}: {processes} dumped {OUTCOMES.get(report.outcome, report.outcome)}")
    _say(f"  store    {report.store}")
    _say(f"  frozen   {duration(report.frozen_ms)} (of {duration(report.total_ms)} in all)")
    _say(f"  memory   {size(report.memory_bytes)}: {_memory(report)}")
    if report.rounds:
        stops = " + ".join(duration(one["frozen_ms"]) for one in report.rounds)
        _say(
            f"  ahead    {size(report.pre_copied_bytes)} copied before the freeze in "
            f"{count(len(report.rounds), 'round')} (stopped for {stops}), {size(report.wasted_bytes)} in vain"
        )
    for file in report.weights:
        missed = file["bytes"] - file["found_bytes"]
        rest = f", {size(missed)} of it not in memory" if missed else ""
        _say(f"  weights  {size(file['left_out_bytes'])} left out: {file['path']}{rest}")
    _say_gpus(report.gpu)
    _say(f"  stored   {size(report.stored_bytes)}")
    if (forecast := report.forecast) is not None:
        _say(
            f"  forecast / fact   "
            f"frozen {duration(forecast.frozen_ms)} / {duration(report.frozen_ms)}, "
            f"stored {size(forecast.stored_bytes)} / {size(report.stored_bytes)}, "
            f"in all {duration(forecast.total_ms)} / {duration(report.total_ms)}"
        )
    _say(f"  phases   {phases(report.phases)}")
    for finding in report.findings:
        if finding.name == "left-stopped":
            _say(f"  next     {finding.remedy}")


def show_restore(report: RestoreReport, as_json: bool) -> None:
    """Show what a restore did."""
    if as_json:
        show_json(report.as_json())
        return
    inside = "" if report.pid == report.host_pid else f" (pid {report.pid} in a namespace of its own)"
    _say(f"{report.image}: {count(report.processes, 'process')} running, pid {report.host_pid}{inside}")
    _say(f"  ready    {duration(report.ready_ms)} (of {duration(report.total_ms)} in all)")
    _say_gpus(report.gpu)
    if report.missing_bytes:
        _say(f"  memory   {size(report.missing_bytes)} still to come: process {report.pager} fetches them")
    _say(f"  phases   {phases(report.phases)}")


def _say_gpus(gpu: Mapping[str, Any] | None) -> None:
    """How much lay on GPUs, of how many processes, and which GPU took the place of which."""
    if gpu is not None:
        _say(f"  gpus     {size(gpu['memory_bytes'])} of {count(gpu['processes'], 'process')}")
        for old, new in gpu["map"].items():
            _say(f"           {new} in the place of {old}")


_PLAIN = {"blocker": "in the way", "change": "will change", "note": "note"}


def show_check(report: CheckReport, as_json: bool) -> None:
    """Show what was found, the gravest first, each with what crcli does and what the user can do."""
    if as_json:
        show_json(report.as_json())
        return
    for finding in report.findings:
        _say(f"{_PLAIN[finding.severity.value]}: {finding.message} [{finding.name}]")
        if finding.action:
            _say(f"    crcli {finding.action}")
        if finding.remedy:
            _say(f"    you can: {finding.remedy}")
    _say_forecast(report.forecast)
    verb = "cannot go as it is" if report.is_refused else "can go"
    _say(f"{report.target}: {verb}, {count(len(report.findings), 'finding')}; nothing was touched")


def _say_forecast(forecast: Forecast | None) -> None:
    if forecast is not None:
        _say(
            f"forecast: frozen for {duration(forecast.frozen_ms)}, {size(forecast.stored_bytes)} stored, "
            f"durable after {duration(forecast.total_ms)}"
        )


def phases(times: Mapping[str, float]) -> str:
    """Phases and their times on one line."""
    return ", ".join(f"{name} {duration(spent)}" for name, spent in times.items() if spent >= 0.5)


def _memory(report: DumpReport) -> str:
    new = report.memory_bytes - report.zero_bytes - report.reused_bytes - report.weights_bytes
    parts = [f"{size(new)} new"]
    for amount, name in (
        (report.reused_bytes, "stored already"),
        (report.weights_bytes, "in weights files"),
        (report.zero_bytes, "zeros"),
    ):
        if amount:
            parts.append(f"{size(amount)} {name}")
    return ", ".join(parts)


def _say(line: str) -> None:
    print(printable(line))
