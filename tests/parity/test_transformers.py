"""Our networks are those of Hugging Face transformers: with equal weights they give equal logits, caches included."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("torch")
pytest.importorskip("transformers")

from seqjax import models, sample
from seqjax.cli import main
from seqjax.cli.bench import peer
from seqjax.cli.bench.peer_weights import copy_weights
from seqjax.cli.bench.transformers import Options, model_config

pytestmark = pytest.mark.parity

KINDS = ("mamba2", "attention")
OPTIONS = Options(
    dim=32, layers=3, heads=4, key_value_heads=2, head_dim=16, mlp_dim=48, state_dim=8, vocab_size=61, prompt=19
)
DIMENSIONS = peer.Dimensions(
    vocab_size=61, dim=32, layers=3, heads=4, key_value_heads=2, head_dim=16, mlp_dim=48, state_dim=8
)
# 3 of the peer's chunks and a rest.
LENGTH = 53


def pair(kind, **overrides):
    """Both networks with the same random weights; every vector (norms, gates, rates) is random too, not 1 or 0."""
    other = peer.build(kind, DIMENSIONS, chunk_size=16)
    peer.torch.manual_seed(1)
    with peer.torch.no_grad():
        for parameter in other.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * peer.torch.randn_like(parameter))
            else:
                parameter.copy_(parameter.std().clamp(min=0.05) * peer.torch.randn_like(parameter))
    model = models.LanguageModel(model_config(kind, OPTIONS), rngs=nnx.Rngs(0))
    copy_weights(other, model)
    return model, other


def tokens_like(batch, length):
    return np.random.default_rng(0).integers(0, DIMENSIONS.vocab_size, (batch, length))


@pytest.mark.parametrize("kind", KINDS)
def test_equal_weights_give_equal_logits(kind):
    model, other = pair(kind)
    tokens = tokens_like(2, LENGTH)
    expected = peer.logits(other, tokens)
    assert expected.std() > 0.1
    np.testing.assert_allclose(model(jnp.asarray(tokens))[0], expected, atol=1e-4 * float(np.abs(expected).max()))


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_parameters_are_equal(kind):
    model, other = pair(kind)
    assert models.parameter_count(model.config) == sum(p.numel() for p in other.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_with_each_sides_cache_gives_the_same_tokens(kind):
    model, other = pair(kind)
    prompt = tokens_like(2, 19)
    _, expected = peer.decoder(other, prompt, 24)()
    greedy = sample.SamplerConfig(temperature=0.0)
    ours = sample.generate(model, prompt.tolist(), max_new_tokens=24, sampler=greedy)
    assert [result.tokens for result in ours] == expected.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_loss_are_equal(kind):
    """One SGD step on both sides, seen through the logits afterwards: every gradient takes part."""
    import jax
    import optax

    model, other = pair(kind)
    tokens = tokens_like(2, LENGTH + 1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]

    rows = peer.torch.as_tensor(tokens)
    output = other(rows[:, :-1], use_cache=False).logits
    loss = peer.torch.nn.functional.cross_entropy(output.flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    rate = 0.05
    with peer.torch.no_grad():
        for parameter in other.parameters():
            parameter -= rate * parameter.grad

    def objective(model):
        logits = model(jnp.asarray(inputs))[0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(targets)).mean()

    before = model(jnp.asarray(inputs))[0]
    value, gradients = jax.value_and_grad(objective)(model)
    assert float(value) == pytest.approx(loss.item(), rel=1e-5)
    stepped = jax.tree.map(lambda parameter, gradient: parameter - rate * gradient, model, gradients)
    moved = float(jnp.abs(stepped(jnp.asarray(inputs))[0] - before).max())
    np.testing.assert_allclose(stepped(jnp.asarray(inputs))[0], peer.logits(other, inputs), atol=1e-2 * moved)


def test_a_missing_counterpart_is_named():
    _, other = pair("attention")
    model = models.LanguageModel(model_config("mamba2", OPTIONS), rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"groups\.blocks\.0\.mixer\.[A-Za-z_.]+ has no counterpart in Qwen3ForCausalLM"
    ):
        copy_weights(other, model)


def test_the_comparison_runs_and_refuses_other_weights(tmp_path, monkeypatch, capsys):
    words = ["bench", "transformers", "--batch", "1", "--length", "24", "--dim", "32", "--layers", "2", "--heads", "2"]
    words += ["--key-value-heads", "1", "--head-dim", "16", "--mlp-dim", "32", "--state-dim", "8", "--vocab-size", "64"]
    words += ["--prompt", "8", "--new-tokens", "48", "--repeats", "1", "--out", str(tmp_path / "result.json")]
    assert main(words) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert [(row["network"], row["work"]) for row in result["rows"]] == [
        (kind, work) for kind in KINDS for work in ("training step", "decode")
    ]
    assert all(row["logit error"] < 1e-4 and row["ratio"] > 0 for row in result["rows"])
    assert result["versions"]["torch"] and len(result["goals"]) == 4

    monkeypatch.setattr("seqjax.cli.bench.peer_weights.copy_weights", lambda other, model: None)
    (tmp_path / "result.json").unlink()
    assert main(words) == 1
    assert "not the same network" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()
