import json

import pytest

from seqjax.models import PRESETS
from seqjax.train import TrainConfig, find_config, load_config, save_config
from seqjax.train.config import from_dict, to_dict
from seqjax.train.runs import check_same_run
from tests.train.conftest import replaced


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_json_round_trip_of_every_preset(name, tmp_path):
    config = replaced(
        TrainConfig(PRESETS[name]),
        **{"optimizer.name": "muon", "schedule.warmup": 100, "data.window": 64, "task.z_loss": 1e-4, "mesh.fsdp": 2},
    )
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path) == load_config(tmp_path / "config.json") == config


def test_absent_fields_take_their_defaults(tiny_config):
    assert from_dict({"model": to_dict(tiny_config)["model"], "steps": 3}) == TrainConfig(tiny_config.model, steps=3)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("stepz",), 1, r"unknown field `stepz` in the config; did you mean `steps`\?"),
        (("optimizer", "learningrate"), 1.0, r"`optimizer.learningrate`.*did you mean `optimizer.learning_rate`"),
        (("optimizer", "name"), "sgd", r"`optimizer.name` is 'sgd', expected Literal\['adamw', 'lion', 'muon'\]"),
        (("steps",), 1.5, "`steps` is 1.5, expected int"),
        (("steps",), True, "`steps` is True, expected int"),
        (("data",), 3, "`data` is 3, expected an object"),
        (("data", "shuffle"), 1, "`data.shuffle` is 1, expected bool"),
        (("model", "dimm"), 1, "'dimm'; did you mean 'dim'"),
    ],
)
def test_mistakes_in_a_config_are_named(tiny_config, tmp_path, path, value, message):
    data = to_dict(tiny_config)
    target = data
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as error:
        load_config(tmp_path)
    assert "config.json" in str(error.value)


def test_no_model_and_no_json_are_said(tmp_path):
    with pytest.raises(ValueError, match="no `model`"):
        from_dict({"steps": 3})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_config(tmp_path)


def test_a_config_is_found_by_what_the_command_line_names(tmp_path, tiny_config):
    assert find_config("hybrid-tiny").model == PRESETS["hybrid-tiny"]
    save_config(tiny_config, tmp_path / "config.json")
    assert find_config(str(tmp_path)) == find_config(str(tmp_path / "config.json")) == tiny_config
    with pytest.raises(ValueError, match="did you mean 'hybrid-tiny'"):
        find_config("hybrid-tyny")
    experiment = tmp_path / "experiment.py"
    experiment.write_text(
        "from seqjax.models import preset\n"
        "from seqjax.train import TrainConfig\n"
        "CONFIGS = {s: TrainConfig(preset('gla-tiny'), steps=n) for s, n in (('small', 3), ('full', 9))}\n"
    )
    assert find_config(f"{experiment}:full").steps == 9
    with pytest.raises(ValueError, match=r"has the configs small, full; write one of them as .*experiment.py:small"):
        find_config(str(experiment))
    experiment.write_text(
        experiment.read_text().replace("CONFIGS = {", "ALL = {") + "def config(): return ALL['small']\n"
    )
    assert find_config(str(experiment)).steps == 3


def test_another_architecture_names_the_fields_and_other_changes_are_noted(tmp_path, tiny_config):
    save_config(tiny_config, tmp_path / "config.json")
    assert check_same_run(tiny_config, tmp_path) == []
    notes = check_same_run(replaced(tiny_config, **{"steps": 99, "data.window": 8, "model.remat": "full"}), tmp_path)
    assert notes == [
        "changed since this run began: model.remat was 'dots', is 'full'",
        "changed since this run began: data.window was 16, is 8",
        "changed since this run began: steps was 20, is 99",
    ]
    with pytest.raises(ValueError, match=r"another architecture: model.dim was 32, is 64; model.mlp_dim was 64, is 32"):
        check_same_run(replaced(tiny_config, **{"model.dim": 64, "model.mlp_dim": 32}), tmp_path)
