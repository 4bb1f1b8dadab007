"""``seqjax experiment NAME``: rerun one experiment of the checkout and print its table.

An experiment is a folder ``experiments/NAME`` (or a path) with an ``experiment.py`` that defines

- ``CLAIM``: the claim in a sentence;
- ``SCALES``: name -> what it costs (``small`` runs in minutes on two cores, ``full`` is the paper's run);
- ``run(scale, directory, options) -> dict``: does the work under ``directory`` (resuming what is there) and returns a
  JSON-serialisable result with the key ``tables``: title -> list of rows (dicts with the same keys).

The result goes to ``results/<scale>.json`` beside it together with commit, machine, versions and wall time.
"""

import argparse
import importlib.util
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from seqjax.cli import UserError
from seqjax.cli._provenance import provenance


def experiments_folder() -> pathlib.Path:
    """``experiments/`` of the current directory, or of the checkout seqjax is installed from."""
    for root in (pathlib.Path.cwd(), pathlib.Path(__file__).resolve().parents[2]):
        if (root / "experiments").is_dir():
            return root / "experiments"
    raise UserError(
        "no `experiments` folder here: experiments come with a checkout of the repository, not with the wheel"
    )


def available() -> list[str]:
    """Names of the experiments in the checkout, or nothing outside one."""
    try:
        folder = experiments_folder()
    except UserError:
        return []
    return sorted(path.parent.name for path in folder.glob("*/experiment.py"))


def load(name: str) -> ModuleType:
    """Import an experiment by name or path.

    Raises:
        UserError: there is none of that name, or it lacks CLAIM, SCALES or run.
    """
    path = pathlib.Path(name)
    if path.is_dir():
        path = path / "experiment.py"
    if not path.is_file():
        path = experiments_folder() / name / "experiment.py"
    if not path.is_file():
        raise UserError(f"no experiment {name!r}; there are: {', '.join(available()) or 'none'}")
    spec = importlib.util.spec_from_file_location(f"experiments.{path.parent.name}.experiment", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    missing = [attribute for attribute in ("CLAIM", "SCALES", "run") if not hasattr(module, attribute)]
    if missing:
        raise UserError(f"{path} does not define {', '.join(missing)}")
    return module


def show(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Print each table with rich."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, rows in tables.items():
        if not rows:
            continue
        table = Table(title=title, title_justify="left")
        for key in rows[0]:
            table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
        for row in rows:
            table.add_row(*(f"{value:,.4g}" if isinstance(value, float) else f"{value}" for value in row.values()))
        console.print(table)


def main(argv: Sequence[str]) -> int:
    """Command-line entry."""
    parser = argparse.ArgumentParser(prog="seqjax experiment", description=__doc__.split("\n")[0])
    parser.add_argument("name", help=f"one of: {', '.join(available()) or '(none found)'}; or a path")
    parser.add_argument("--scale", default="small", help="which of the experiment's scales to run")
    parser.add_argument("--directory", type=pathlib.Path, help="where runs and corpora go (default runs/NAME-SCALE)")
    parser.add_argument("--show", action="store_true", help="print the tables of the last result without running")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="passed to the experiment")
    arguments = parser.parse_args(argv)

    module = load(arguments.name)
    if arguments.scale not in module.SCALES:
        raise UserError(f"--scale {arguments.scale!r}: {arguments.name} has {', '.join(module.SCALES)}")
    folder = pathlib.Path(module.__file__ or ".").parent
    result_file = folder / "results" / f"{arguments.scale}.json"
    print(f"{folder.name}: {module.CLAIM}")
    if arguments.show:
        if not result_file.is_file():
            raise UserError(f"no result yet: {result_file} does not exist; run without --show")
        show(json.loads(result_file.read_text())["tables"])
        return 0
    options = dict(pair.split("=", 1) if "=" in pair else (pair, "true") for pair in arguments.option)
    directory = arguments.directory or pathlib.Path("runs") / f"{folder.name}-{arguments.scale}"
    start = time.perf_counter()
    result = module.run(arguments.scale, directory, options)
    tables = result["tables"]
    result = {"claim": module.CLAIM, "scale": arguments.scale, **result, **provenance()}
    result |= {"wall_seconds": round(time.perf_counter() - start, 1)}
    result_file.parent.mkdir(parents=True, exist_ok=True)
    result_file.write_text(json.dumps(result, indent=1) + "\n")
    show(tables)
    print(f"written to {result_file}")
    return 0
