"""The arithmetic of the experiments: what their tables are made of."""

import importlib.util
import math
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def language_modelling():
    spec = importlib.util.spec_from_file_location(
        "language_modelling", ROOT / "experiments" / "language_modelling" / "experiment.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("best", "rates", "expected"),
    [
        (3e-3, {1e-3, 3e-3, 1e-2}, set()),
        (3e-3, {3e-3, 1e-2}, {1e-3}),
        (1e-2, {3e-3, 1e-2}, {3e-2}),
        (1e-3, {1e-3}, {3e-4, 3e-3}),
    ],
)
def test_the_grid_goes_on_where_the_best_rate_is_at_its_end(language_modelling, best, rates, expected):
    assert language_modelling.beyond(best, rates) == expected


def test_ranges_of_positions_are_weighted_by_their_tokens(language_modelling):
    buckets = [
        {"start": 0, "stop": 4, "tokens": 30, "nats_per_token": 5.0, "standard_error": 0.1},
        {"start": 4, "stop": 8, "tokens": 10, "nats_per_token": 3.0, "standard_error": 0.2},
        {"start": 8, "stop": 16, "tokens": 100, "nats_per_token": 1.0, "standard_error": 0.1},
    ]
    loss, error = language_modelling.mean_loss(buckets, 0, 8)
    assert loss == pytest.approx(4.5)
    assert error == pytest.approx(math.hypot(30 * 0.1, 10 * 0.2) / 40)
    assert math.isnan(language_modelling.mean_loss(buckets, 16, 32)[0])


def test_position_rows_cover_a_stretch_in_octaves(language_modelling):
    window, stretch = 4, language_modelling.STRETCH
    edges = [window * n for n in (0, 1, 2, 4, 8, stretch)]
    states = {
        "stretch": [
            {"start": low, "stop": high, "tokens": high - low, "nats_per_token": 1 / (1 + low), "standard_error": 0.1}
            for low, high in zip(edges, edges[1:])
        ],
        "reset": [{"start": 0, "stop": window, "tokens": 9, "nats_per_token": 2.0, "standard_error": 0.1}],
    }
    (row,) = language_modelling.position_rows({"griffin": states}, window)
    losses = [row[f"{low}-{high} windows"] for low, high in zip((0, 1, 2, 4, 8), (1, 2, 4, 8, stretch))]
    assert losses == sorted(losses, reverse=True) and losses[0] == 1.0
    assert row["reset every window"] == 2.0


@pytest.mark.parametrize("size", ["tiny", "150m"])
def test_the_models_compared_have_as_many_parameters(language_modelling, size):
    from seqjax.models import parameter_count, preset

    counts = [parameter_count(preset(f"{model}-{size}")) for model in language_modelling.MODELS]
    assert max(counts) / min(counts) < 1.05, dict(zip(language_modelling.MODELS, counts))
