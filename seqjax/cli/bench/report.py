"""What a suite hands back: rows, goals, notes; printed as a table and written as JSON."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from seqjax.cli._provenance import provenance


class CheckFailed(Exception):
    """A result was wrong, so its speed is not published."""


@dataclasses.dataclass(frozen=True)
class Common:
    """Options of every suite."""

    out: pathlib.Path | None = None
    """Write the result to this JSON file."""
    strict: bool = False
    """Exit with code 1 if a goal is missed (a wrong result always does)."""


@dataclasses.dataclass(frozen=True)
class Goal:
    """A figure beside the limit it has to keep."""

    name: str
    measured: float
    limit: float
    at_least: bool = False
    """True if more is better."""

    @property
    def passed(self) -> bool:
        """The limit is kept."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "name": self.name,
            "measured": plain(self.measured),
            "goal": f"{'>=' if self.at_least else '<='} {self.limit:g}",
            "passed": self.passed,
        }


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of a suite. Keys of a row are column headings; a missing or None entry is shown as a dash."""

    suite: str
    title: str
    rows: list[dict[str, Any]]
    goals: list[Goal]
    notes: list[str] = dataclasses.field(default_factory=list)
    load: float | None = None
    """Processes that wanted a core over the minute before the suite began: more than none disturbs absolute times."""

    def to_dict(self, options: Any) -> dict[str, Any]:
        """JSON form, with the provenance of the numbers."""
        return {
            "suite": self.suite,
            "title": self.title,
            "options": plain(dataclasses.asdict(options)),
            "rows": plain(self.rows),
            "goals": [goal.to_dict() for goal in self.goals],
            "notes": self.notes,
            "load_before": plain(self.load),
            **provenance(),
        }


def progress(console: Console) -> Progress:
    """A bar with count and elapsed time, for `with progress(console) as bar`."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def load() -> float | None:
    """The machine's load average over the last minute, where the system tells."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def plain(value: Any) -> Any:
    """The same value in JSON types."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return str(value)


def cell(value: Any) -> str:
    """A table entry: four significant digits, thousands separated."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Headings in order of first appearance, without those that never have a value (mappings, meant for the file, don't count)."""
    names = dict.fromkeys(key for row in rows for key in row)
    return [name for name in names if any(not isinstance(row.get(name), Mapping | None) for row in rows)]


def show(report: Report, console: Console) -> None:
    """Print the table, the goals with PASS or FAIL, and the notes."""
    table = Table(title=report.title, title_justify="left")
    names = columns(report.rows)
    for name in names:
        text = all(isinstance(row.get(name), str | None) for row in report.rows)
        table.add_column(name, justify="left" if text else "right", no_wrap=text and name != "verdict")
    for row in report.rows:
        table.add_row(*(cell(row.get(name)) for name in names))
    console.print(table)
    if report.goals:
        goals = Table(title="goals", title_justify="left")
        for heading in ("", "what", "measured", "goal"):
            goals.add_column(heading, justify="right" if heading == "measured" else "left")
        for goal in report.goals:
            verdict = "[green]PASS[/green]" if goal.passed else "[red]FAIL[/red]"
            goals.add_row(verdict, goal.name, cell(goal.measured), goal.to_dict()["goal"])
        console.print(goals)
    for note in report.notes:
        console.print(f"- {note}", markup=False, highlight=False)


def write(report: Report, options: Common) -> pathlib.Path | None:
    """Write the JSON file in one step, so that a reader never sees half of it."""
    if options.out is None:
        return None
    path = options.out
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(report.to_dict(options), indent=1) + "\n")
    os.replace(partial, path)
    return path
