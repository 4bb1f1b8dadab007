import io
import subprocess
import sys

import pytest

from seqjax.cli import main
from seqjax.cli.generate import read_prompts
from seqjax.sample import SamplerConfig, generate_text
from seqjax.train import load_run
from tests.cli.runs import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("generate"))


def text_of(run, prompts, **arguments):
    _, model, tokenizer = load_run(run, arguments.pop("step", None))
    return [result.text for result in generate_text(model, tokenizer, prompts, max_new_tokens=20, **arguments)]


def test_one_prompt_streams_prompt_and_continuation(run, capsys):
    assert main(["generate", str(run), "--prompt", "naïve ", "--max-new-tokens", "20", "--seed", "3"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "naïve " + text_of(run, ["naïve "], seed=3)[0] + "\n"
    assert "20 tokens in" in captured.err


def test_several_prompts_are_labelled_blocks_in_order(run, capsys):
    arguments = ["--prompt", "one", "--prompt", "a longer second", "--max-new-tokens", "20", "--temperature", "0.7"]
    assert main(["generate", str(run), *arguments, "--top-k", "50", "--top-p", "0.9", "--min-p", "0.01"]) == 0
    expected = text_of(run, ["one", "a longer second"], sampler=SamplerConfig(0.7, 50, 0.9, 0.01))
    out = capsys.readouterr().out
    assert out == "".join(
        f"=== prompt {i + 1} (seed {i}, length)\n{prompt}{text}\n"
        for i, (prompt, text) in enumerate(zip(["one", "a longer second"], expected))
    )


def test_steps_are_different_models(run, capsys):
    outputs = []
    for step in ("0", "7"):
        assert main(["generate", str(run), "--prompt", "x", "--max-new-tokens", "20", "--step", step]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] != outputs[1]
    assert outputs[0] == "x" + text_of(run, ["x"], step=0)[0] + "\n"


def test_stop_text_ends_the_output(run, capsys):
    plain = text_of(run, ["x"], sampler=SamplerConfig(0.0))[0]
    stop = plain[3:5]
    assert (
        main(["generate", str(run), "--prompt", "x", "--max-new-tokens", "20", "--temperature", "0", "--stop", stop])
        == 0
    )
    captured = capsys.readouterr()
    assert captured.out == "x" + plain[: plain.find(stop)] + "\n"
    assert "stop_string" in captured.err


def test_prompts_from_standard_input_and_files(tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("from a file\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("piped"))
    assert read_prompts(["given", "-"], [tmp_path / "p.txt"]) == ["given", "piped", "from a file\n"]
    assert read_prompts([], []) == [""]


def test_mistakes_end_with_code_2(run, tmp_path, capsys):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for arguments, message in [
        (["--temperature", "-1"], "`temperature` is -1.0"),
        (["--top-p", "2"], "`top_p` is 2.0"),
        (["--max-new-tokens", "-3"], "`max_new_tokens` is -3"),
        (["--prompt", "-", "--prompt", "-"], "one prompt only"),
        (["--prompt-file", str(tmp_path / "missing")], "cannot be read"),
        (["--prompt-file", str(tmp_path / "latin")], "cannot be read"),
        (["--step", "99"], "no checkpoint of step 99"),
    ]:
        assert main(["generate", str(run), *arguments]) == 2
        assert message in capsys.readouterr().err


def test_a_reader_that_leaves_early_is_no_error(run):
    command = [sys.executable, "-m", "seqjax", "generate", str(run), "--prompt", "x", "--max-new-tokens", "3000"]
    process = subprocess.Popen([*command, "--ignore-end"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    error = process.stderr.read().decode()
    assert process.wait(timeout=60) == 0, error
    assert "Traceback" not in error
