import re

import pytest

from seqjax.cli import main
from seqjax.cli.list import TABLES
from seqjax.data import SOURCES
from seqjax.layers import MIXERS
from seqjax.models import PRESETS, parameter_count


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "220")


def test_everything_is_named(wide, capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for name in [*PRESETS, *MIXERS, *SOURCES, "bytes", "--train-bpe N", "language_modelling"]:
        assert re.search(rf"│ {re.escape(name)}\s", out), name


def test_presets_show_their_parameter_counts_and_patterns(wide, capsys):
    assert main(["list", "presets"]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "│ hybrid-150m" in line)
    assert f"{parameter_count(PRESETS['hybrid-150m']):,}" in line
    assert "3 x gated_delta_net, attention (window 2048)" in line
    assert "sources" not in out


def test_kinds_can_be_combined_and_unknown_ones_are_refused(wide, capsys):
    assert main(["list", "mixers", "sources"]) == 0
    out = capsys.readouterr().out
    assert out.index("mixers") < out.index("sources")
    assert "presets" not in out
    with pytest.raises(SystemExit) as exit_:
        main(["list", "mixer"])
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert all(kind in error for kind in TABLES)


def test_names_stay_whole_on_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["list", "mixers", "sources", "tokenizers", "experiments"]) == 0
    out = capsys.readouterr().out
    for name in [*MIXERS, *SOURCES]:
        assert name in out
