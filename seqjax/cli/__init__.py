"""The ``seqjax`` command: one sub-command per module of this package, imported only when it is called.

Exit codes: 0 success, 1 the work failed (the message says what and where), 2 wrong usage or configuration,
130 interrupted, 143 ended by SIGTERM after saving.
"""

import importlib
import sys
from collections.abc import Sequence

# name -> (module with `main(argv) -> int`, one line of help)
COMMANDS = {
    "prepare": ("seqjax.cli.prepare", "turn text, jsonl, parquet, C4, PG-19 or WikiText into a token corpus"),
    "data": ("seqjax.cli.data", "describe and check a token corpus (`seqjax data info PATH`)"),
    "train": ("seqjax.cli.train", "train a preset or a config on a token corpus"),
    "evaluate": ("seqjax.cli.evaluate", "perplexity, bits per byte and loss by position of a run"),
    "generate": ("seqjax.cli.generate", "continue prompts with a trained run"),
    "list": ("seqjax.cli.list", "name the presets, mixers, sources and experiments"),
    "bench": ("seqjax.cli.bench", "time the ops, the train step, the loader and decoding"),
    "experiment": ("seqjax.cli.experiment", "rerun an experiment of this checkout and print its table"),
}


class UserError(Exception):
    """A mistake in what was asked (exit code 2): shown as one message without a traceback."""


def usage() -> str:
    """The text of ``seqjax --help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        ["usage: seqjax COMMAND [arguments]", "", *lines, "", "`seqjax COMMAND --help` shows its arguments."]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command and return its exit code."""
    import difflib

    # Not `list(...)`: the sub-command of that name becomes an attribute of this package and hides the builtin.
    arguments = [*(sys.argv[1:] if argv is None else argv)]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        import seqjax

        print(f"seqjax {seqjax.__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        print(f"seqjax: no command {name!r}{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(COMMANDS[name][0]).main(rest) or 0
    except (UserError, ValueError, FileNotFoundError, NotADirectoryError) as error:
        print(f"seqjax {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"seqjax {name}: interrupted", file=sys.stderr)
        return 130
