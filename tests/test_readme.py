"""The README's Python blocks run as they are printed; its commands exist."""

import pathlib
import re

import pytest

from seqjax.cli import COMMANDS

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_there_are_examples():
    assert len(BLOCKS) >= 2
    assert len(BLOCKS[0].strip().splitlines()) <= 14  # 12 lines and two blank ones


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example_runs(number):
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), {})


@pytest.mark.parametrize("document", ["README.md", "BUILD.md", "experiments/README.md"])
def test_documents_name_only_commands_and_files_that_exist(document):
    text = (ROOT / document).read_text()
    for line in re.findall(r"^    seqjax (\S+)", text, re.M):
        assert line in COMMANDS, f"{document}: seqjax {line}"
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / document).parent / target).exists(), f"{document}: link to {target}"
    for script in re.findall(r"\b(?:bash )(scripts/\S+?\.sh)", text):
        assert (ROOT / script).exists(), f"{document}: {script}"
