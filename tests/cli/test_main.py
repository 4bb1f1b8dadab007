import importlib
import subprocess
import sys
import types

import pytest

import seqjax
from seqjax.cli import COMMANDS, UserError, main


def test_no_arguments_print_usage_and_fail(capsys):
    assert main([]) == 2
    assert "usage: seqjax COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_names_every_command(flag, capsys):
    assert main([flag]) == 0
    out = capsys.readouterr().out
    for name, (_, text) in COMMANDS.items():
        assert f"  {name} " in out
        assert text in out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"seqjax {seqjax.__version__}"


@pytest.mark.parametrize(("typed", "meant"), [("evalute", "evaluate"), ("trian", "train"), ("generat", "generate")])
def test_unknown_command_suggests_the_nearest(typed, meant, capsys):
    assert main([typed]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"no command {typed!r}; did you mean {meant!r}?" in captured.err


def test_command_like_nothing_gets_usage_without_a_guess(capsys):
    assert main(["zzzzzz"]) == 2
    error = capsys.readouterr().err
    assert "did you mean" not in error
    assert "usage:" in error


def exit_code(arguments):
    """What the process would end with: parsers leave through SystemExit, the rest returns."""
    try:
        return main(arguments)
    except SystemExit as left:
        return left.code


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_its_arguments(command, capsys):
    assert exit_code([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.lstrip().startswith("usage:")
    assert f"seqjax {command}" in out


@pytest.mark.parametrize("command", ["evaluate", "generate", "train"])
@pytest.mark.parametrize("arguments", [[], ["run", "--no-such-flag", "1"]], ids=["missing", "unknown"])
def test_missing_and_unknown_arguments_leave_with_code_2(command, arguments, capsys):
    assert exit_code([command, *arguments]) == 2
    assert capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (UserError("a mistake"), 2, "seqjax probe: a mistake"),
        (ValueError("a bad value"), 2, "seqjax probe: a bad value"),
        (FileNotFoundError(2, "No such file", "x"), 2, "seqjax probe: "),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes_of_what_commands_raise(monkeypatch, capsys, raised, code, message):
    def fail(argv):
        raise raised

    probe = types.ModuleType("probe_command")
    probe.main = fail  # ty: ignore[missing-attribute]
    monkeypatch.setitem(sys.modules, "probe_command", probe)
    monkeypatch.setitem(COMMANDS, "probe", ("probe_command", "a probe"))
    assert main(["probe"]) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_errors_of_the_program_itself_are_not_hidden(monkeypatch):
    def fail(argv):
        raise RuntimeError("a bug")

    probe = types.ModuleType("probe_command")
    probe.main = fail  # ty: ignore[missing-attribute]
    monkeypatch.setitem(sys.modules, "probe_command", probe)
    monkeypatch.setitem(COMMANDS, "probe", ("probe_command", "a probe"))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["probe"])


def test_commands_point_at_modules_with_a_main():
    for module, _ in COMMANDS.values():
        assert callable(importlib.import_module(module).main)


def test_module_and_script_are_the_same_command():
    out = subprocess.run([sys.executable, "-m", "seqjax", "--help"], capture_output=True, text=True, check=True).stdout
    assert out.startswith("usage: seqjax COMMAND")


def test_help_of_light_commands_does_not_import_jax():
    code = "import sys; from seqjax.cli import main\nfor c in ('evaluate', 'generate', 'list'):\n try: main([c, '--help'])\n except SystemExit: pass\nprint('jax' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False"
