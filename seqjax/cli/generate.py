"""``seqjax generate RUN``: continue prompts with a trained run, streaming the text."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from seqjax.cli import UserError


def parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    result = argparse.ArgumentParser(
        prog="seqjax generate",
        description="Continue prompts. One prompt streams to standard output; several are decoded together and printed one after "
        "another. Without a prompt a new document is begun.",
    )
    result.add_argument("run", type=Path, help="run folder, as `seqjax train` made it")
    result.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="may be repeated; `-` reads standard input"
    )
    result.add_argument(
        "--prompt-file",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="a prompt as a file; may be repeated",
    )
    result.add_argument("--step", type=int, help="checkpoint to use (default: the newest)")
    result.add_argument(
        "--max-new-tokens", type=int, default=200, help="most new tokens per prompt (default: %(default)s)"
    )
    result.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: %(default)s)")
    result.add_argument("--top-k", type=int, help="draw from this many most probable tokens")
    result.add_argument("--top-p", type=float, help="draw from the fewest tokens that have this probability together")
    result.add_argument(
        "--min-p", type=float, help="draw from tokens at least this fraction as probable as the best one"
    )
    result.add_argument("--seed", type=int, default=0, help="prompt i draws from seed + i (default: %(default)s)")
    result.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end at this text, not printing it; may be repeated"
    )
    result.add_argument(
        "--within", action="store_true", help="the prompts stand within a text; by default they begin a document"
    )
    result.add_argument("--ignore-end", action="store_true", help="go on past the end-of-document token")
    result.add_argument(
        "--block", type=int, default=8, help="tokens decoded between two updates (default: %(default)s)"
    )
    return result


def main(argv: Sequence[str]) -> int:
    """Command-line entry."""
    arguments = parser().parse_args(argv)
    prompts = read_prompts(arguments.prompt, arguments.prompt_file)
    from seqjax.sample import SamplerConfig, generate_text
    from seqjax.train import load_run

    sampler = SamplerConfig(arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p)
    _, model, tokenizer = load_run(arguments.run, arguments.step)
    write = sys.stdout.write
    alone = len(prompts) == 1

    def on_text(_: int, piece: str) -> None:
        write(piece)
        sys.stdout.flush()

    try:
        if alone:
            on_text(0, prompts[0])
        start = time.perf_counter()
        results = generate_text(
            model,
            tokenizer,
            prompts,
            max_new_tokens=arguments.max_new_tokens,
            sampler=sampler,
            seed=arguments.seed,
            stop=arguments.stop,
            begin=not arguments.within,
            stop_at_end=not arguments.ignore_end,
            on_text=on_text if alone else None,
            block=arguments.block,
        )
        seconds = time.perf_counter() - start
        if alone:
            write("\n")
        for number, result in enumerate(results if not alone else [], 1):
            heading = f"=== prompt {number} (seed {arguments.seed + number - 1}, {result.finish})"
            write(f"{heading}\n{result.prompt}{result.text}\n")
        sys.stdout.flush()
    except FloatingPointError as error:
        print(f"\nseqjax generate: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; Python must not complain again when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    count = sum(len(result.tokens) for result in results)
    reasons = ", ".join(sorted({result.finish for result in results}))
    print(f"[{count} tokens in {seconds:.1f} s with compilation; ended by {reasons}]", file=sys.stderr)
    return 0


def read_prompts(texts: Sequence[str], files: Sequence[Path]) -> list[str]:
    """Prompts of the command line, those of files after the others; ``-`` stands for standard input.

    Raises:
        UserError: standard input is named twice, or a file cannot be read as UTF-8.
    """
    if texts.count("-") + sum(str(file) == "-" for file in files) > 1:
        raise UserError("standard input (`-`) can be read for one prompt only")
    prompts = [sys.stdin.read() if text == "-" else text for text in texts]
    for file in files:
        try:
            prompts.append(sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt-file {file} cannot be read: {error}") from error
    return prompts or [""]
