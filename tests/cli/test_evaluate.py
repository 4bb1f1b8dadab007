import gzip
import json

import pytest
from flax import nnx

from seqjax.cli import main
from seqjax.data import train_bpe
from seqjax.evaluate import perplexity
from seqjax.train import load_run
from tests.cli.runs import TEXTS, write_run
from tests.evaluate.corpora import open_corpus, write_corpus


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def both(run):
    assert main(["evaluate", str(run), "--carry", "--reset", "--compare-compressors", "--name", "both"]) == 0
    return json.loads((run / "evaluation" / "both.json").read_text())


def test_report_has_both_contexts_and_the_compressors(run, both):
    text = "".join(TEXTS["validation"]).encode()
    assert set(both["results"]) == {"carry", "reset"}
    for state, result in both["results"].items():
        assert result["state"] == state
        assert result["bytes"] == len(text)
        assert result["tokens"] == len(text) + len(TEXTS["validation"])
        assert result["words"] == sum(len(document.split()) for document in TEXTS["validation"])
        assert [document["name"] for document in result["documents"]] == ["text-0", "text-1", "text-2"]
    assert both["results"]["carry"]["nats"] != both["results"]["reset"]["nats"]
    sizes = {compression["name"]: compression["together"] for compression in both["compressors"]}
    assert sizes["gzip -9"] == len(gzip.compress(text, 9))
    assert "xz -9" in sizes
    assert {"commit", "versions", "machine"} <= set(both)
    assert (run / "evaluation" / "both.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_are_those_of_the_function(run, both, tmp_path):
    _, model, _ = load_run(run)
    expected = perplexity(
        model, open_corpus(tmp_path / "c", TEXTS["validation"]), state="carry", window=64, batch_size=2
    )
    assert both["results"]["carry"]["nats"] == pytest.approx(expected.nats, rel=1e-5)


def test_table_on_the_terminal(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["evaluate", str(run), "--carry", "--reset", "--compare-compressors"]) == 0
    out = capsys.readouterr().out
    for text in (
        "bits per byte",
        "perplexity per word",
        "model, state carried",
        "windows of 16",
        "gzip -9",
        "xz -9",
        "text-2",
    ):
        assert text in out
    assert (run / "evaluation" / "corpus-validation-carry-reset.json").is_file()


def test_context_follows_training_and_the_step_is_chosen(tmp_path):
    run = write_run(tmp_path, carry=True)
    nats = {}
    for step in (0, 7):
        assert main(["evaluate", str(run), "--step", str(step), "--max-tokens", "90", "--name", f"at-{step}"]) == 0
        report = json.loads((run / "evaluation" / f"at-{step}.json").read_text())
        assert set(report["results"]) == {"carry"}
        assert report["step"] == step
        assert report["results"]["carry"]["tokens"] == 90
        assert not report["results"]["carry"]["complete"]
        nats[step] = report["results"]["carry"]["nats"]
    assert nats[0] != nats[7]


def test_wrong_tokenizer_is_explained(run, tmp_path, capsys):
    tokenizer = train_bpe(["some text to learn from, some more text to learn from"], 262)
    other = write_corpus(tmp_path / "other", {"validation": ["some text"]}, tokenizer)
    assert main(["evaluate", str(run), "--data", str(other)]) == 2
    error = capsys.readouterr().err
    assert "made with tokenizer 'bpe'" in error
    assert "trained with 'bytes'" in error
    assert "--tokenizer" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "test"], "no split 'test'"),
        (["--step", "3"], "no checkpoint of step 3"),
        (["--data", "nowhere"], "corpus nowhere does not exist"),
        (["--max-tokens", "0"], "`max_tokens` is 0"),
        (["--window", "0"], "window is 0"),
    ],
)
def test_mistakes_end_with_code_2_and_say_what(run, capsys, arguments, message):
    assert main(["evaluate", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_folder_that_is_no_run(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_a_broken_model_ends_with_code_1(tmp_path, capsys):
    run = write_run(tmp_path, steps=(1,), scale=float("nan"))
    assert main(["evaluate", str(run)]) == 1
    assert "loss is nan at token" in capsys.readouterr().err
    assert main(["generate", str(run), "--prompt", "x"]) == 1
    assert "not finite" in capsys.readouterr().err


def test_model_of_the_fixture_is_what_it_claims(run):
    config, model, tokenizer = load_run(run, 0)
    assert isinstance(model, nnx.Module)
    assert tokenizer.vocab_size <= config.model.vocab_size
