import json

import pytest

from seqjax.cli import main
from tests.data.texts import write_jsonl


@pytest.fixture
def corpus(tmp_path, capsys):
    path = write_jsonl(tmp_path / "x.jsonl", ["one two three", "four [five]"])
    assert main(["prepare", "jsonl", str(path), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert "train" in capsys.readouterr().out
    return tmp_path / "out"


def test_prepare_info_and_check(corpus, capsys):
    assert main(["data", "info", str(corpus)]) == 0
    out = capsys.readouterr().out
    assert "'one two three'" in out and "bytes" in out and "fingerprint" in out
    assert json.loads((corpus / "manifest.json").read_text())["splits"]["train"]["sha256"] in out
    assert main(["data", "check", str(corpus)]) == 0
    assert "2 documents, sha256 as in the manifest" in capsys.readouterr().out


def test_preparing_again_says_that_it_is_there(corpus, capsys):
    arguments = ["prepare", "jsonl", str(corpus.parent / "x.jsonl"), "--out", str(corpus), "--workers", "1"]
    assert main(arguments) == 0
    assert "is already there" in capsys.readouterr().out
    assert main([*arguments, "--field", "url"]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_bad_input_is_exit_code_1_and_a_skip_is_reported(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"txt": "b"}\n')
    arguments = ["prepare", "jsonl", str(path), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main(arguments) == 1
    assert f"{path}:2: no field 'text'" in capsys.readouterr().err
    assert main([*arguments, "--on-error", "skip"]) == 0
    captured = capsys.readouterr()
    assert "skipped 1" in captured.err and "no field 'text'" in captured.err.replace("\n", " ")


def test_wrong_usage_is_exit_code_2(tmp_path, capsys):
    assert main(["prepare", "books", "--out", str(tmp_path / "out")]) == 2
    assert "expected one of stdlib, text" in capsys.readouterr().err
    assert main(["prepare", "text", str(tmp_path / "absent"), "--out", str(tmp_path / "out")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["data", "info", str(tmp_path)]) == 2
    assert "not a corpus" in capsys.readouterr().err


def test_damage_is_exit_code_1(corpus, capsys):
    shard = corpus / "train" / "tokens" / "c" / "0"
    shard.write_bytes(b"x" + shard.read_bytes()[1:])
    assert main(["data", "check", str(corpus)]) == 1
    assert "damaged" in capsys.readouterr().err


def test_help_names_every_source(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["prepare", "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("stdlib", "pg19", "wikitext", "--train-bpe", "--on-error"))
