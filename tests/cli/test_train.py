import json

import pytest

from seqjax.cli import UserError, main
from seqjax.cli.train import parse
from seqjax.data import PrepareConfig, prepare
from seqjax.train import load_run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for split in ("train", "validation"):
        (folder / split).mkdir()
        (folder / split / "a.txt").write_text(f"the {split} text of a small corpus. " * 40)
    train, validation = (str(folder / "train"),), (str(folder / "validation"),)
    prepare(PrepareConfig("text", out=str(folder / "corpus"), workers=1, train=train, validation=validation))
    return str(folder / "corpus")


def test_the_preset_gives_the_defaults_and_flags_change_any_field(corpus):
    words = "--run r --steps 7 --learning-rate 1e-3 --batch-size=4 --window 32 --optimizer lion --mesh.fsdp 2"
    more = "--model.dim 64 --model.mlp-dim None --model.pattern.gated-delta-net.num-heads 4 --schedule.warmup 0.5"
    config, options = parse(["hybrid-tiny", "--data", corpus, *words.split(), *more.split()])
    assert (config.steps, config.optimizer.learning_rate, config.optimizer.name) == (7, 1e-3, "lion")
    assert (config.data.path, config.data.batch_size, config.data.window) == (corpus, 4, 32)
    assert (config.mesh.fsdp, config.mesh.data, config.schedule.warmup) == (2, -1, 0.5)
    assert (config.model.dim, config.model.mlp_dim, config.model.num_layers) == (64, None, 4)
    assert [mixer.num_heads for mixer in config.model.pattern[:3]] == [4, 4, 4]
    assert config.model.pattern[3].window == 256
    assert str(options.run) == "r" and options.resume == "never"


def test_the_vocabulary_is_the_tokenizers_unless_it_is_given(corpus):
    assert parse(["gla-150m", "--data", corpus, "--run", "r"])[0].model.vocab_size == 320
    assert parse(["gla-150m", "--data", corpus, "--run", "r", "--model.vocab-size", "257"])[0].model.vocab_size == 257


def test_stream_means_carried_state(corpus):
    config, _ = parse(["gla-tiny", "--data", corpus, "--run", "r", "--stream"])
    assert config.data.kind == "stream" and config.task.carry


def test_an_unknown_flag_ends_with_code_2_and_the_nearest_one(corpus, capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "gla-tiny", "--data", corpus, "--run", "r", "--model.dimm", "3"])
    assert end.value.code == 2
    assert "--model.dim" in capsys.readouterr().err


def test_help_lists_every_group_of_flags(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "griffin-tiny", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--steps", "--data.path", "--optimizer.learning-rate", "--model.pattern.rg-lru.num-heads", "--resume"):
        assert flag in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name what to train"),
        (["griffin-tny"], "did you mean 'griffin-tiny'"),
        (["gla-tiny", "--data", "nowhere"], "corpus nowhere does not exist"),
        (["gla-tiny"], "name a corpus folder"),
        (["gla-tiny", "--data", "CORPUS", "--model.vocab-size", "100"], "257 token ids"),
        (["gla-tiny", "--data", "CORPUS", "--mesh.fsdp", "3"], "there are 8"),
        (["gla-tiny", "--data", "CORPUS", "--batch-size", "12"], "possible near it: 8 or 16"),
        (["gla-tiny", "--data", "CORPUS", "--window", "33", "--mesh.context", "2"], "window 33 does not divide"),
        (["gla-tiny", "--data", "CORPUS", "--data.tokenizer-fingerprint", "abc"], "was made with tokenizer 'bytes'"),
        (["gla-tiny", "--data", "CORPUS", "--task.carry"], "needs rows that continue"),
        (["gla-tiny", "--data", "CORPUS", "--profile", "9"], "expected START:STOP"),
        (["gla-tiny", "--data", "CORPUS", "--schedule.warmup", "5000"], "warmup is 5000 steps"),
    ],
)
def test_mistakes_end_with_code_2_and_a_sentence(words, message, corpus, tmp_path, capsys):
    words = [corpus if word == "CORPUS" else word for word in words]
    assert main(["train", *words, *(["--run", str(tmp_path / "run")] if words else [])]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_without_a_preset_the_error_is_about_use():
    with pytest.raises(UserError, match="Presets: "):
        parse(["--data", "x"])


def test_a_run_folder_holds_everything(corpus, tmp_path, capsys):
    run = tmp_path / "run"
    size = "--model.dim 32 --model.num-layers 1 --model.mlp-dim 32 --model.pattern.attention.num-heads 2"
    words = f"--steps 12 --batch-size 8 --window 16 --evaluation.every 6 --logging.every 4 --profile 9:11 {size}"
    assert main(["train", "transformer-tiny", "--data", corpus, "--run", str(run), *words.split()]) == 0
    output = capsys.readouterr().out
    for text in ("parameters", "compiled in", "step 12/12", "validation loss", "bits/byte", "profile of steps 9 to 11"):
        assert text in output
    for name in ("config.json", "metrics.jsonl", "checkpoints/12", "samples/step-00000012.txt", "loss.png"):
        assert (run / name).exists(), name
    assert list((run / "tensorboard").glob("events*")) and list((run / "profile").rglob("*.xplane.pb"))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], "loss" in r) for r in records] == [
        (4, True), (6, False), (8, True), (12, True), (12, False)
    ]  # fmt: skip
    assert records[-1]["validation_loss"] < records[1]["validation_loss"]
    config, model, tokenizer = load_run(run)
    assert config.steps == 12 and tokenizer.name == "bytes" and model.config == config.model
