"""``seqjax bench SUITE``: measure, compare with a stated goal, and write the numbers down.

| suite | what it measures | goal |
|---|---|---|
| ``ops`` | every op, fast form against its definition, forward and forward+backward | >= 10x the step-by-step scan at T=4096; time and memory linear in T; no state per token |
| ``decode`` | time per generated token after contexts of 1k to 64k tokens | flat for recurrent mixers |
| ``train`` | the trainer's step against the bare jitted step; compile time of 24 layers against 4 | <= 1.03; <= 1.5x |
| ``loader`` | tokens per second of the data loader against what the quickstart model consumes | >= 20x |
| ``transformers`` | training and decoding against Hugging Face transformers with the same dimensions | >= 2x |
| ``kernels`` | the Pallas kernels on this device against the XLA form, flash-linear-attention, cuDNN attention and the measured roofline | right results; packed rows <= 1.15x; exponent in T <= 1.05; ``implementation=None`` within 10% of the best form |
| ``models`` | training steps of whole models with and without kernels, beside flash-linear-attention's models and our Transformer | kernels and peer: >= 1; attention: >= 0.8 at T=2048, >= 1.2 from T=8192 |

Ratios are taken inside one process with the candidates interleaved, so that drift of the machine cancels; a result file holds the
load average before the run. Like every command that computes, it runs with huge pages where it can (``seqjax.cli._process``).
"""

import dataclasses
import importlib
import sys
from collections.abc import Sequence

# name -> (module with `Options` and `run(options, console) -> Report`, one line of help)
SUITES = {
    "ops": ("seqjax.cli.bench.ops", "every op: fast form against the step-by-step scan, cost and memory in T"),
    "decode": ("seqjax.cli.bench.decode", "time per generated token after contexts of growing length"),
    "train": ("seqjax.cli.bench.train", "the trainer's step against the bare jitted step; compile time in depth"),
    "loader": ("seqjax.cli.bench.loader", "tokens per second of the loader against what a model consumes"),
    "transformers": ("seqjax.cli.bench.transformers", "training and decoding against Hugging Face transformers"),
    "kernels": (
        "seqjax.cli.bench.kernels",
        "the Pallas kernels on this device, beside peers and the measured roofline",
    ),
    "models": (
        "seqjax.cli.bench.models",
        "training steps of whole models with and without kernels, beside peers and attention",
    ),
}

# Load average above which a reader is warned.
BUSY = 0.5


def usage() -> str:
    """The text of ``seqjax bench --help``."""
    width = max(map(len, SUITES))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in SUITES.items()]
    return "\n".join(
        ["usage: seqjax bench SUITE [options]", "", *lines, "", "`seqjax bench SUITE --help` shows its options."]
    )


def main(argv: Sequence[str]) -> int:
    """Run a suite, print its table, write its JSON; 1 if a result was wrong (or, with --strict, a goal missed)."""
    from seqjax.cli import UserError

    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    name, *rest = argv
    if name not in SUITES:
        raise UserError(f"no suite {name!r}; there are: {', '.join(SUITES)}")

    import tyro
    from rich.console import Console

    from seqjax.cli.bench.report import CheckFailed, load, show, write

    module = importlib.import_module(SUITES[name][0])
    options = tyro.cli(module.Options, prog=f"seqjax bench {name}", args=rest)
    console = Console()
    if not console.is_terminal:
        # A pipe has no width of its own; 80 columns would fold the tables.
        console = Console(width=160)
    before = load()
    if before is not None and before > BUSY:
        console.print(
            f"note: load average {before:.1f}: other processes are running. Absolute times will be too long, and ratios to "
            "other libraries unfair, since thread pools suffer differently."
        )
    try:
        report = dataclasses.replace(module.run(options, console), load=before)
    except CheckFailed as error:
        print(f"seqjax bench {name}: refused to publish: {error}", file=sys.stderr)
        return 1
    show(report, console)
    if (path := write(report, options)) is not None:
        console.print(f"written to {path}")
    return 1 if options.strict and not all(goal.passed for goal in report.goals) else 0
