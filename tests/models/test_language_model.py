"""The language model: laws through the whole stack, forms of execution that must agree, presets, JSON."""

import dataclasses
import json
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqjax.layers import AttentionConfig, MambaConfig, RGLRUConfig
from seqjax.models import (
    PRESETS,
    LanguageModel,
    LanguageModelConfig,
    flops_per_token,
    from_json,
    parameter_count,
    preset,
    to_json,
)
from seqjax.train.parameters import flatten, structure
from tests.laws.harness import assert_close_rms

# Two groups and one block left over.
CONFIG = LanguageModelConfig(
    vocab_size=50,
    dim=16,
    num_layers=5,
    pattern=(RGLRUConfig(num_heads=2), AttentionConfig(num_heads=2, window=6)),
    mlp_dim=24,
)


def build(config, seed=0):
    return jax.jit(lambda: LanguageModel(config, rngs=nnx.Rngs(seed)))()


@pytest.fixture(scope="module")
def model():
    return build(CONFIG)


@pytest.fixture(scope="module")
def call(model):
    graphdef, params = nnx.split(model, nnx.Param)
    return jax.jit(lambda tokens, state=None, ids=None: nnx.merge(graphdef, params)(tokens, state, segment_ids=ids))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (3, 20), 0, 50)


def test_training_prefill_and_decoding_agree(model, call, tokens):
    logits, state = call(tokens)
    assert logits.shape == (3, 20, 50) and logits.dtype == jnp.float32
    first, running = call(tokens[:, :13], model.initial_state(3))
    outputs = [first]
    for t in range(13, 20):
        step, running = call(tokens[:, t : t + 1], running)
        outputs.append(step)
    assert_close_rms(jnp.concatenate(outputs, axis=1), logits, 3e-5, "logits")
    assert_close_rms(running, state, 3e-5, "state")


def test_the_unrolled_form_decodes_the_same_and_leaves_the_original_alone(model, call, tokens):
    _, stacked = call(tokens[:, :13], model.initial_state(3))
    other, state = model.unrolled(stacked)
    assert other.groups is None and model.groups is not None
    assert len(other.remainder.blocks) == len(state.remainder) == CONFIG.num_layers
    step = jax.jit(lambda model, tokens, state: model(tokens, state))
    for t in range(13, 16):
        expected, stacked = call(tokens[:, t : t + 1], stacked)
        logits, state = step(other, tokens[:, t : t + 1], state)
        assert_close_rms(logits, expected, 3e-5, f"token {t}")
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, atol=1e-5),
        state,
        model.unrolled(stacked)[1],
    )


def test_prompts_of_unequal_length_are_padded_rows(call, model, tokens):
    lengths = jnp.array([20, 13, 1])
    ids = (jnp.arange(20) < lengths[:, None]).astype(jnp.int32)
    _, state = call(tokens, model.initial_state(3), ids)
    following, _ = call(tokens[:, :1], state)
    for row, length in enumerate((20, 13)):
        _, alone = call(tokens[:, :length], model.initial_state(3))
        assert_close_rms(following[row], call(tokens[:, :1], alone)[0][row], 3e-5, f"row {row}")


def test_hidden_and_unembedding_give_the_logits(model, call, tokens):
    hidden, _ = jax.jit(lambda t: model.hidden(t))(tokens)
    logits, _ = call(tokens)
    np.testing.assert_allclose(hidden @ model.unembedding(), logits, atol=1e-5)


def loss_and_gradients(config, params, tokens):
    names = structure(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    return jax.jit(jax.value_and_grad(lambda p: jnp.mean(jax.nn.logsumexp(names.merge(p)(tokens)[0], -1) ** 2)))(params)


def test_remat_and_unrolling_change_nothing_but_cost(model, tokens):
    params = flatten(model)
    loss, gradients = loss_and_gradients(CONFIG, params, tokens)
    assert set(gradients) == set(params)
    for name, gradient in gradients.items():
        assert np.abs(gradient).max() > 0, f"{name} has no gradient"
    for change in ({"remat": "full"}, {"remat": "dots"}, {"scan_layers": False}):
        other = loss_and_gradients(dataclasses.replace(CONFIG, **change), params, tokens)
        assert_close_rms(other, (loss, gradients), 1e-4, str(change))


def test_remat_keeps_one_residual_vector_per_block(tokens):
    tokens = jnp.zeros((2, 64), jnp.int32)

    def temporary_bytes(remat):
        config = dataclasses.replace(CONFIG, remat=remat, num_layers=8, dim=64, mlp_dim=256)
        shape = structure(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
        lowered = jax.jit(jax.grad(lambda p: jnp.sum(shape.merge(p)(tokens)[0] ** 2))).lower(shape.shapes)
        analysis = lowered.compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporary_bytes("full") < 0.5 * temporary_bytes("none")


@pytest.mark.parametrize("name", ["mamba-tiny", "griffin-tiny", "transformer-tiny"])
def test_remat_repeats_neither_products_with_weights_nor_recurrences(name):
    tokens = jnp.zeros((2, 64), jnp.int32)

    def count(remat):
        config = preset(name, remat=remat, scan_layers=False, num_layers=1)
        shape = structure(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
        text = jax.jit(jax.grad(lambda p: jnp.sum(shape.merge(p)(tokens)[0] ** 2))).lower(shape.shapes).as_text()
        products = re.findall(r"stablehlo.dot_general .*?contracting_dims", text)
        return sum("batching_dims" not in line for line in products), text.count("stablehlo.while")

    none, dots, full = map(count, ("none", "dots", "full"))
    assert none[0] == dots[0] < full[0]
    if name != "transformer-tiny":  # its loops are those of attention, which is computed again
        assert none[1] == dots[1] < full[1]


def test_untied_head_soft_cap_and_embedding_scale(tokens):
    config = dataclasses.replace(
        CONFIG,
        num_layers=1,
        tie_embeddings=False,
        logit_softcap=0.5,
        embedding_scale=True,
        pattern=(RGLRUConfig(num_heads=2),),
    )
    model = build(config)
    logits, state = jax.jit(lambda t: model(t))(tokens)
    hidden, _ = jax.jit(lambda t: model.hidden(t))(tokens)
    assert float(jnp.abs(logits).max()) < 0.5
    np.testing.assert_allclose(logits, 0.5 * jnp.tanh(2 * (hidden @ model.head.kernel[...])), atol=1e-6)
    assert parameter_count(config) == structure(lambda: LanguageModel(config, rngs=nnx.Rngs(0))).size
    model.embedding.table[...] = model.embedding.table[...] / 4
    model.config = dataclasses.replace(config, embedding_scale=False)
    model.embedding.table[...] = model.embedding.table[...] * 16
    np.testing.assert_allclose(jax.jit(lambda t: model(t))(tokens)[0], logits, atol=1e-5)


def test_bfloat16_computes_in_bfloat16_on_float32_parameters(tokens, model, call):
    half = LanguageModel(dataclasses.replace(CONFIG, dtype="bfloat16"), rngs=nnx.Rngs(0))
    half = jax.tree.unflatten(jax.tree.structure(half), jax.tree.leaves(model))
    hidden, _ = jax.jit(lambda t: half.hidden(t))(tokens)
    logits, state = jax.jit(lambda t: half(t))(tokens)
    assert hidden.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    assert state.groups[0].hidden.dtype == jnp.float32
    assert_close_rms(logits, call(tokens)[0], 3e-2, "logits")
    stored = structure(lambda: LanguageModel(dataclasses.replace(CONFIG, param_dtype="bfloat16"), rngs=nnx.Rngs(0)))
    assert stored.shapes["embedding.table"].dtype == jnp.bfloat16


def test_the_residual_stream_starts_at_the_same_size_at_any_depth(tokens):
    sizes = []
    for layers in (2, 32):
        model = build(
            dataclasses.replace(CONFIG, num_layers=layers, pattern=(MambaConfig(state_size=4),), mlp_dim=None)
        )
        model.norm = lambda x: x
        sizes.append(float(jnp.std(jax.jit(lambda t, m=model: m.hidden(t))(tokens)[0])))
    assert 0.5 < sizes[1] / sizes[0] < 2


def test_stacked_parameters_are_drawn_independently(model):
    kernel = flatten(model)["groups.blocks.0.mlp.gate.kernel"]
    assert kernel.shape == (2, 16, 24)
    assert abs(np.corrcoef(kernel[0].ravel(), kernel[1].ravel())[0, 1]) < 0.2
    assert structure(lambda: build(CONFIG)).axes["groups.blocks.0.mlp.gate.kernel"] == ("layers", "embed", "mlp")


def equations(jaxpr):
    """Number of equations of a jaxpr, inner ones included."""
    inner = [
        v for e in jaxpr.eqns for v in jax.tree.leaves(list(e.params.values()), is_leaf=lambda v: hasattr(v, "eqns"))
    ]
    jaxprs = [getattr(v, "jaxpr", v) for v in inner]
    return len(jaxpr.eqns) + sum(equations(j) for j in jaxprs if hasattr(j, "eqns"))


def train_gradient(layers):
    config = dataclasses.replace(CONFIG, num_layers=layers, remat="full")
    shape = structure(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    return jax.jit(jax.grad(lambda p, t: jnp.sum(shape.merge(p)(t)[0] ** 2))), shape.shapes


def test_the_program_does_not_grow_with_depth(tokens):
    shallow, deep = (equations(jax.make_jaxpr(f)(s, tokens).jaxpr) for f, s in map(train_gradient, (4, 24)))
    assert shallow == deep > 100


@pytest.mark.slow
def test_24_layers_compile_in_at_most_one_and_a_half_times_the_time_of_4(tokens):
    def seconds(layers):
        function, shapes = train_gradient(layers)
        lowered = function.lower(shapes, tokens)
        start = time.process_time()
        lowered.compile()
        return time.process_time() - start

    seconds(4)
    assert min(seconds(24) for _ in range(2)) <= 1.5 * min(seconds(4) for _ in range(2))


@pytest.mark.parametrize("name", PRESETS)
def test_preset_counts_match_the_formula_and_each_other(name):
    config = PRESETS[name]
    count = parameter_count(config)
    assert structure(lambda: LanguageModel(config, rngs=nnx.Rngs(0))).size == count
    architecture, size = name.rsplit("-", 1)
    assert abs(count / parameter_count(PRESETS[f"transformer-{size}"]) - 1) < 0.05
    target = {"tiny": 0.85e6, "150m": 150e6, "300m": 300e6, "1.3b": 1.3e9}[size]
    assert abs(count / target - 1) < 0.05
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


def test_flops_count_parameters_and_mixing():
    attention = preset("transformer-tiny")
    heads, size = attention.pattern[0].num_heads, attention.dim // attention.pattern[0].num_heads
    visible = sum(range(1, 101)) / 100  # token t sees t + 1 keys
    expected = 6 * parameter_count(attention) + 3 * attention.num_layers * 4 * heads * size * visible
    assert flops_per_token(attention, 100) == pytest.approx(expected)
    windowed = dataclasses.replace(attention.pattern[0], window=30)
    visible = sum(min(t + 1, 30) for t in range(100)) / 100
    assert windowed.mixing_flops(128, 100) == pytest.approx(4 * 128 * visible)
    # Fixed states: what a token costs does not depend on the length of its row.
    for name in ("mamba2-tiny", "gated-deltanet-tiny", "deltanet-tiny", "gla-tiny"):
        count = 6 * parameter_count(PRESETS[name])
        assert flops_per_token(PRESETS[name], 100) == flops_per_token(PRESETS[name], 10_000) > count
    untied = dataclasses.replace(attention, tie_embeddings=False)
    assert flops_per_token(untied, 100) == flops_per_token(attention, 100)


def test_preset_overrides_and_misspellings():
    assert preset("mamba2-tiny", vocab_size=1000).vocab_size == 1000
    with pytest.raises(ValueError, match="did you mean 'mamba2-tiny'"):
        preset("mamba2-tinny")
    with pytest.raises(ValueError, match="did you mean 'num_layers'"):
        preset("mamba2-tiny", num_layer=3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab": 5}, "no field 'vocab'; did you mean 'vocab_size'"),
        ({"dim": "16"}, "`dim` is '16'; expected int"),
        ({"dim": True}, "`dim` is True; expected int"),
        ({"remat": "all"}, "'none' or 'full' or 'dots'"),
        ({"mlp_dim": 1.5}, "`mlp_dim` is 1.5; expected int or None"),
        ({"pattern": [{"mixer": "mamba3"}]}, "no mixer 'mamba3'; did you mean 'mamba"),
        ({"pattern": [{"mixer": "attention", "heads": 2}]}, "no field 'heads'; did you mean 'num_heads'"),
        ({"pattern": [{"num_heads": 2}]}, "the key 'mixer'"),
        ({"pattern": []}, "`pattern` is empty"),
        ({"pattern": None}, "expected a list of mixers"),
        ({"num_layers": 0}, "expected a positive integer"),
    ],
)
def test_json_errors_name_the_field_and_the_remedy(change, message):
    with pytest.raises(ValueError, match=message):
        from_json({**to_json(CONFIG), **change})


def test_json_names_missing_fields():
    fields = to_json(CONFIG)
    del fields["dim"]
    with pytest.raises(ValueError, match=r"\['dim'\] are missing"):
        from_json(fields)


def test_a_pattern_of_something_else_is_refused():
    with pytest.raises(ValueError, match="expected instances of"):
        dataclasses.replace(CONFIG, pattern=("attention",))
