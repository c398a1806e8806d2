"""The implicit form: exact forward passes and weight gradients, masked weights on the way back."""

import functools
import re

import flax.linen as nn
import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import masked_backward
import numpy as np
import pytest
from flax import nnx
from tiny import assert_close, assert_same

import ssam_jax
from ssam_jax._base import tracing, trees
from ssam_jax.two_pass.implicit import backward, weights


def implicit_grad(loss, masks, strict=True):
    """Return ``grad(params, *args)`` of the implicit form."""
    value_and_grad = implicit_value_and_grad(loss, masks, strict)
    return lambda params, *args: value_and_grad(params, *args)[1]


def implicit_value_and_grad(loss, masks, strict=True):
    def value_and_grad(params, *args):
        traced = tracing.trace(loss, params, *args)
        leaves, tree = jax.tree.flatten(params)
        facts = list(map(weights.weight_fact, trees.leaf_paths(params), jax.tree.leaves(masks)))
        facts += [None] * len(traced.args)

        def value(leaves):
            values = [*leaves, *traced.args]
            options = {"masked": True, "strict": strict}
            return backward.masked_evaluate(traced.jaxpr, traced.consts, values, facts, **options)[0][0]

        found, grads = jax.value_and_grad(value)(leaves)
        return found, jax.tree.unflatten(tree, grads)

    return value_and_grad


def cut(loss, params, masks, *args):
    """Return the parameters that the masks leave without a gradient."""
    traced = tracing.trace(loss, params, *args)
    facts = list(map(weights.weight_fact, trees.leaf_paths(params), jax.tree.leaves(masks)))
    facts += [None] * len(traced.args)
    return weights.without_gradient(weights.flow(traced.jaxpr, facts, masked=True)[0])


def normal(seed, *shape):
    scale = max(1, shape[-1] if shape else 1) ** -0.5
    return scale * np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_masks(params):
    generator = np.random.default_rng(100)
    return jax.tree.map(lambda leaf: generator.random(leaf.shape) < 0.5, params)


def distance(a, b):
    """Return how far two trees are apart, relative to the size of ``b``."""
    pairs = [(np.asarray(x), np.asarray(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))]
    return (sum(np.sum((x - y) ** 2) for x, y in pairs) / sum(np.sum(y**2) for _, y in pairs)) ** 0.5


# Against NumPy.

MLP = {"A": (3, 6), "a": (6,), "B": (6, 5), "b": (5,), "C": (5, 2)}


def mlp_loss(params, x):
    h1 = jnp.tanh(x @ params["A"] + params["a"][None])
    h2 = jnp.tanh(h1 @ params["B"] + params["b"][None])
    return jnp.mean(jnp.square(h2 @ params["C"]))


def mlp():
    return {name: normal(i, *shape) for i, (name, shape) in enumerate(MLP.items())}, normal(9, 4, 3)


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def float32(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float32), tree)


def test_a_multilayer_perceptron_has_the_gradients_of_the_masked_backward_pass_written_out():
    params, x = mlp()
    masks = random_masks(params)
    value, grads = jax.jit(implicit_value_and_grad(mlp_loss, masks))(params, x)
    expected_value, expected = masked_backward.mlp_gradients(float64(params), float64(masks), float64(x))
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    assert_close(grads, float32(expected))


LAYOUTS = [
    {"stride": 2, "dilation": 1, "groups": 1},
    {"stride": 1, "dilation": 2, "groups": 2},
    {"stride": 1, "dilation": 1, "groups": 4},
]


def cnn_loss(params, x):
    for i, layout in enumerate(LAYOUTS):
        x = jax.lax.conv_general_dilated(
            x,
            params[str(i)],
            window_strides=(layout["stride"],) * 2,
            padding="VALID",
            rhs_dilation=(layout["dilation"],) * 2,
            feature_group_count=layout["groups"],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jnp.tanh(x)
    return jnp.mean(jnp.square(jnp.mean(x, (1, 2)) @ params["head"]))


def test_a_convolutional_network_has_the_gradients_of_the_masked_backward_pass_written_out():
    shapes = {"0": (3, 2, 3, 4), "1": (2, 2, 2, 8), "2": (1, 2, 2, 4), "head": (4, 3)}
    params = {name: np.float32(2) * normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    x, masks = normal(9, 2, 9, 10, 3), random_masks(params)
    grads = jax.jit(implicit_grad(cnn_loss, masks))(params, x)
    _, expected = masked_backward.cnn_gradients(float64(params), float64(masks), float64(x), LAYOUTS)
    assert_close(grads, float32(expected))


def test_the_gradients_differ_markedly_from_the_exact_ones_but_for_the_last_layer():
    params, x = mlp()
    grads = jax.jit(implicit_grad(mlp_loss, random_masks(params)))(params, x)
    exact = jax.jit(jax.grad(mlp_loss))(params, x)
    for name in "AaBb":
        assert distance(grads[name], exact[name]) > 0.2
    assert_same(grads["C"], exact["C"])


# Against a model whose products are masked by hand.


def plain(equation, x, w, mask):
    return jnp.einsum(equation, x, w)


def by_hand(equation, x, w, mask):
    """Compute a product that is exact in value and for ``w``, and has a masked weight for ``x``."""
    stop = jax.lax.stop_gradient
    masked = jnp.einsum(equation, x, stop(w * mask.astype(w.dtype)))
    return jnp.einsum(equation, stop(x), w) + masked - stop(masked)


def transposed(p, m, x, dot):
    h = jnp.tanh(dot("bi,oi->bo", x, p["w"], m["w"]))
    return dot("bi,io->bo", h, p["v"].T, m["v"].T)


def tied(p, m, x, dot):
    h = jnp.tanh(dot("bi,io->bo", x, p["w"], m["w"]))
    return dot("bo,io->bi", jnp.tanh(dot("bi,io->bo", h, p["v"], m["v"])), p["v"], m["v"])


def general(p, m, x, dot):
    h = jnp.tanh(dot("bi,iho->bho", x, p["w"], m["w"]))
    return dot("bho,hoc->bc", h, p["v"], m["v"])


def reshaped(p, m, x, dot):
    w, mask = (t["w"].reshape(4, 3, 2).transpose(0, 2, 1)[:, ::-1] for t in (p, m))
    h = jnp.tanh(dot("bi,ihk->bhk", x, w, mask))
    return dot("bhk,ihk->bi", h, w, mask)


def scaled(p, m, x, dot):
    h = jnp.tanh(dot("bi,io->bo", x, 0.5 * p["w"], m["w"]))
    return dot("bi,io->bo", h, -p["v"] / jnp.arange(1.0, 7)[:, None] / 3, m["v"])


def cast(p, m, x, dot):
    w, v = (p[name].astype(jnp.bfloat16) for name in "wv")
    h = jnp.tanh(dot("bi,io->bo", x.astype(jnp.bfloat16), w, m["w"]))
    return dot("bi,io->bo", h, v, m["v"]).astype(jnp.float32)


def fused(p, m, x, dot):
    x = dot("bi,io->bo", x, p["e"], m["e"])
    queries, keys, values = (
        dot("bi,io->bo", x, w, mask) for w, mask in zip(jnp.split(p["w"], 3, 1), jnp.split(m["w"], 3, 1))
    )
    return jax.nn.softmax(queries @ keys.T) @ values


def concatenated(p, m, x, dot):
    h = jnp.tanh(dot("bi,io->bo", x, p["e"], m["e"]))
    w, mask = (jnp.concatenate([t["w"], t["v"], jnp.ones_like(t["v"])], 1) for t in (p, m))
    return dot("bi,io->bo", h, w, mask)


def rows(p, m, x, dot):
    for i in range(3):
        x = jnp.tanh(dot("bi,io->bo", x, p["w"][i], m["w"][i]))
    return x


def scanned(p, m, x, dot):
    def layer(x, row):
        w, mask = row
        return jnp.tanh(dot("bi,io->bo", x, w, mask) + dot("bi,io->bo", x, p["v"], m["v"])), jnp.sum(x)

    x, sums = jax.lax.scan(layer, x, (p["w"], m["w"]), reverse=True)
    return x + jnp.sum(sums)


def with_learned_start(p, m, x, dot):
    def layer(state, x):
        return jnp.tanh(dot("bi,io->bo", state, p["w"], m["w"]) + x[None]), None

    return jax.lax.scan(layer, jnp.broadcast_to(p["h"], (2, 4)), x)[0]


def rematerialised(p, m, x, dot):
    @jax.checkpoint
    def block(p, x):
        return jnp.tanh(dot("bi,io->bo", x, p["w"], m["w"]))

    return block(p, block(p, x))


def rematerialised_in_part(p, m, x, dot):
    policy = jax.checkpoint_policies.save_only_these_names("kept")

    @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
    def layer(x, row):
        w, mask = row
        h = jax.ad_checkpoint.checkpoint_name(dot("bi,io->bo", x, w, mask), "kept")
        return jnp.tanh(h), jnp.float32(1)

    def twice(x, rows):
        return jax.lax.scan(layer, x, rows)

    w, mask = (t["w"].reshape(2, 2, 4, 4) for t in (p, m))
    return jax.lax.scan(twice, x, (w, mask), unroll=2)[0]


def compiled(p, m, x, dot):
    @jax.jit
    def block(p, x):
        return jnp.tanh(dot("bi,io->bo", x, p["w"].T, m["w"].T))

    return block(p, block(p, x))


def branching(p, m, x, dot):
    def block(p, x):
        return jnp.tanh(dot("bi,io->bo", x, p["w"], m["w"]))

    for limit in (-100, 100):
        x = jax.lax.cond(jnp.sum(x) > limit, block, lambda p, x: jnp.sin(x), p, block(p, x))
    return x


def mapped(p, m, x, dot):
    def one(x):
        h = jnp.tanh(dot("i,io->o", x, p["w"], m["w"]) * p["scale"] + p["bias"])
        return dot("i,io->o", h, p["v"], m["v"])

    return jax.vmap(one)(x)


def ensemble(p, m, x, dot):
    def one(p, m):
        h = jnp.tanh(dot("bi,io->bo", x, p["w"], m["w"]) + p["bias"][None])
        return dot("bi,io->bo", h, p["v"], m["v"])

    return jax.vmap(one)(p, m)


def embedded(p, m, x, dot):
    tokens = jnp.argmax(x, -1) + 3 * jnp.arange(2)[:, None]
    h = p["table"][tokens] * 2.0 + p["position"][None, :3]
    h = (h - jnp.mean(h, -1, keepdims=True)) * (1 + p["scale"]) + p["bias"]
    h = jnp.concatenate([jnp.broadcast_to(p["class"], (2, 1, 4)), h], 1)
    h = h + jnp.tanh(dot("bti,io->bto", h, p["w"], m["w"]))
    h = h + jnp.tanh(dot("bti,io->bto", h, p["v"], m["v"]))
    return dot("btd,vd->btv", h, p["table"], m["table"])


def experts(p, m, x, dot):
    h = jnp.tanh(dot("bi,io->bo", x, p["e"], m["e"]))
    chosen = jnp.argmax(dot("bi,io->bo", h, p["router"], m["router"]), -1)
    return dot("bi,bio->bo", h, p["w"][chosen], jnp.asarray(m["w"])[chosen])


def dropconnect(p, m, x, dot):
    kept = jax.random.bernoulli(jax.random.key(0), 0.8, (4, 4))
    h = jnp.tanh(dot("bi,io->bo", x, p["w"], m["w"]))
    h = jnp.tanh(dot("bi,io->bo", h, p["v"] * kept.astype(jnp.float32), m["v"]))
    return dot("bi,io->bo", h, jnp.where(kept, p["u"], 0.0), m["u"])


def learned_queries(p, m, x, dot):
    latents = jnp.broadcast_to(p["latents"], (2, 3, 4))
    queries = dot("bti,io->bto", latents, p["q"], m["q"])
    keys = dot("bi,io->bo", x, p["k"], m["k"])
    return jnp.einsum("btd,sd->bts", queries, dot("bi,io->bo", keys, p["o"], m["o"]))


def spectators(p, m, x, dot):
    """Parameters that are no weights of a layer: a gate, a temperature, a penalty."""
    h = dot("bi,io->bo", x, p["w"], m["w"]) * jnp.exp(p["temperature"])
    h = dot("bi,io->bo", jax.nn.softmax(h + p["gate"]), p["v"], m["v"])
    gram = jnp.einsum("io,ip->op", p["w"], p["w"])
    return h * p["gate"] + 0.01 * jnp.sum(jnp.square(gram - jnp.eye(4))) + 0.01 * jnp.sum(jnp.abs(p["v"]))


WAY = {
    transposed: {"w": (5, 4), "v": (3, 5)},
    tied: {"w": (4, 5), "v": (5, 3)},
    general: {"w": (4, 2, 3), "v": (2, 3, 2)},
    reshaped: {"w": (4, 6)},
    scaled: {"w": (4, 6), "v": (6, 2)},
    cast: {"w": (4, 6), "v": (6, 2)},
    fused: {"e": (4, 4), "w": (4, 9)},
    concatenated: {"e": (4, 3), "w": (3, 2), "v": (3, 4)},
    rows: {"w": (3, 4, 4)},
    scanned: {"w": (3, 4, 4), "v": (4, 4)},
    with_learned_start: {"w": (4, 4), "h": (1, 4)},
    rematerialised: {"w": (4, 4)},
    rematerialised_in_part: {"w": (4, 4, 4)},
    compiled: {"w": (4, 4)},
    branching: {"w": (4, 4)},
    mapped: {"w": (4, 5), "scale": (5,), "bias": (5,), "v": (5, 2)},
    ensemble: {"w": (2, 4, 5), "bias": (2, 5), "v": (2, 5, 3)},
    embedded: {
        "table": (9, 4),
        "position": (5, 4),
        "scale": (4,),
        "bias": (4,),
        "class": (1, 1, 4),
        "w": (4, 4),
        "v": (4, 4),
    },
    experts: {"e": (4, 4), "router": (4, 3), "w": (3, 4, 2)},
    dropconnect: {"w": (4, 4), "v": (4, 4), "u": (4, 4)},
    learned_queries: {"latents": (3, 4), "q": (4, 4), "k": (4, 4), "o": (4, 4)},
    spectators: {"w": (4, 4), "temperature": (), "gate": (3, 4), "v": (4, 4)},
}


def way(model):
    """Return parameters, masks, a batch and the loss for a way of using a product."""
    params = {name: np.float32(2) * normal(i, *shape) for i, (name, shape) in enumerate(WAY[model].items())}

    def loss(params, masks, x, dot):
        return jnp.mean(jnp.square(model(params, masks, x, dot)))

    return params, random_masks(params), normal(9, 3, 4), loss


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize("model", WAY)
def test_a_model_has_the_gradients_of_its_products_masked_by_hand(model):
    params, masks, x, loss = way(model)
    grads = jax.jit(implicit_grad(lambda p, x: loss(p, masks, x, plain), masks))(params, x)
    expected = jax.jit(jax.grad(lambda p, x: loss(p, masks, x, by_hand)))(params, x)
    tolerance = 3e-2 if model is cast else 1e-4
    assert_close(grads, expected, rtol=tolerance, atol=tolerance / 10)
    exact = jax.jit(jax.grad(lambda p, x: loss(p, masks, x, plain)))(params, x)
    assert distance(grads, exact) > 0.05


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize("model", [cast, fused, scanned, embedded])
def test_masks_that_are_true_throughout_leave_the_exact_gradients_to_the_bit(model):
    params, masks, x, loss = way(model)
    everything = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params)

    def exact_loss(params, x):
        return loss(params, masks, x, plain)

    exact = jax.jit(jax.grad(exact_loss))(params, x)
    traced = jax.jit(lambda masks, params, x: implicit_grad(exact_loss, masks)(params, x))
    assert_same(traced(everything, params, x), exact)
    assert_same(jax.jit(implicit_grad(exact_loss, everything))(params, x), exact)


# Flax.


def masked_layers(masks):
    """Return an interceptor that sends gradients to the inputs of Linen layers through masked kernels."""

    def interceptor(call, args, kwargs, context):
        layer, stop = context.module, jax.lax.stop_gradient
        is_layer = isinstance(layer, nn.Dense | nn.Conv | nn.DenseGeneral)
        if context.method_name != "__call__" or not is_layer or not layer.path:
            return call(*args, **kwargs)
        mask = masks
        for name in layer.path:
            mask = mask[name]
        own = layer.variables["params"]
        kept = stop({**own, "kernel": own["kernel"] * mask["kernel"]})
        masked = layer.clone(parent=None, name=None).apply({"params": kept}, *args)
        return call(*stop(args)) + masked - stop(masked)

    return nn.intercept_methods(interceptor)


class Net(nn.Module):
    """Convolutions of all kinds, normalisation, attention, dense layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(4, (3, 3), strides=2)(x))
        x = nn.tanh(nn.Conv(4, (2, 2), feature_group_count=2, kernel_dilation=2)(x))
        x = nn.GroupNorm(num_groups=2)(x)
        x = x.reshape(len(x), -1, 4)
        x = x + self.param("position", nn.initializers.normal(1.0), (1, *x.shape[1:]))
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        x = nn.gelu(nn.Dense(6)(nn.RMSNorm()(x)))
        return nn.DenseGeneral(3, axis=(-2, -1))(x)


@pytest.mark.usefixtures("relaxed_promotion")
def test_linen_layers_have_the_gradients_that_an_interceptor_gives_them():
    x = normal(0, 2, 6, 6, 3)
    params = jax.jit(Net().init)(jax.random.key(0), x)["params"]
    masks = random_masks(params)

    def loss(params, x):
        return jnp.mean(jnp.square(Net().apply({"params": params}, x)))

    def by_interceptor(params, x):
        with masked_layers(masks):
            return loss(params, x)

    grads = jax.jit(implicit_grad(loss, masks))(params, x)
    assert_close(grads, jax.jit(jax.grad(by_interceptor))(params, x))
    assert distance(grads, jax.jit(jax.grad(loss))(params, x)) > 0.2


class NNXNet(nnx.Module):
    """Two dense layers with a normalisation between."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.LayerNorm(5, rngs=rngs)
        self.second = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(nn.tanh(self.norm(self.first(nn.tanh(self.first(x)[..., :4])))))


@pytest.mark.usefixtures("relaxed_promotion")
def test_nnx_layers_have_the_gradients_of_the_same_layers_masked_by_hand():
    graph, params = nnx.split(NNXNet(nnx.Rngs(0)), nnx.Param)
    x, masks = (
        normal(0, 6, 4),
        jax.tree.map(lambda leaf: np.arange(leaf.size).reshape(leaf.shape) % 3 > 0, params),
    )

    def loss(params, x):
        return jnp.mean(jnp.square(nnx.merge(graph, params)(x)))

    def hand_written(params, x):
        p, m = (nnx.to_pure_dict(tree) for tree in (params, masks))

        def linear(name, x):
            return by_hand("bi,io->bo", x, p[name]["kernel"], m[name]["kernel"]) + p[name]["bias"]

        x = linear("first", jnp.tanh(linear("first", x)[..., :4]))
        x = (x - jnp.mean(x, -1, keepdims=True)) * jax.lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-6)
        return jnp.mean(jnp.square(linear("second", jnp.tanh(x * p["norm"]["scale"] + p["norm"]["bias"]))))

    grads = jax.jit(implicit_grad(loss, masks))(params, x)
    assert_close(grads, jax.jit(jax.grad(hand_written))(params, x))


# Patterns, and masks that are known while compiling.


def test_masks_of_a_pattern_go_in_as_they_are():
    params = {name: normal(i, 4, 4) for i, name in enumerate("ABC")} | {"a": normal(3, 4), "b": normal(4, 4)}
    x = normal(5, 3, 4)
    two_of_four = ssam_jax.NM(2, 4)(jax.tree.map(jnp.abs, params))
    by_channel = ssam_jax.Structured(sparsity=0.5, unit="channel")(jax.tree.map(jnp.abs, params))
    assert any(mask.shape != params[name].shape for name, mask in by_channel.items())
    for masks in (two_of_four, by_channel):
        grads = jax.jit(lambda p, m, x: implicit_grad(mlp_loss, m)(p, x))(params, masks, x)
        _, expected = masked_backward.mlp_gradients(float64(params), float64(masks), float64(x))
        assert_close(grads, float32(expected))


def products(fn, *args):
    return jax.jit(fn).lower(*args).compile().as_text().count(" dot(")


def test_a_mask_known_to_be_false_throughout_saves_the_product():
    params, x = mlp()
    masks = dict.fromkeys(MLP, True) | {"B": np.zeros((1, 5), bool)}
    traced = jax.tree.map(jnp.asarray, masks)
    with_arrays = jax.jit(lambda p, m, x: implicit_grad(mlp_loss, m)(p, x))(params, traced, x)
    for known in (masks, masks | {"B": False}):
        assert_close(jax.jit(implicit_grad(mlp_loss, known))(params, x), with_arrays)
        assert products(implicit_grad(mlp_loss, known), params, x) == 3 + 3 + 1 - 1  # A gets no gradient
    assert products(jax.grad(mlp_loss), params, x) == 3 + 3 + 2
    assert products(lambda p, m, x: implicit_grad(mlp_loss, m)(p, x), params, traced, x) == 3 + 3 + 2
    assert_same(with_arrays["A"], jnp.zeros((3, 6)))


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize("model", [concatenated, scanned, rematerialised, branching, tied, rows])
def test_a_mask_known_to_be_false_gives_the_gradients_of_an_array_of_false(model):
    params, masks, x, loss = way(model)
    masks["w"] = np.zeros_like(masks["w"])

    def grads(masks, params):
        return implicit_grad(lambda p, x: loss(p, way(model)[1], x, plain), masks)(params, x)

    assert_close(jax.jit(lambda p: grads(masks | {"w": False}, p))(params), jax.jit(grads)(masks, params))


def test_a_mask_must_hold_bools():
    with pytest.raises(TypeError, match=r"mask of 'A' must be of dtype bool, got float32"):
        weights.weight_fact("A", jnp.ones(3))


# Parameters without a gradient.


def test_the_parameters_that_the_masks_leave_without_a_gradient_are_found():
    params, x = mlp()
    everything = dict.fromkeys(MLP, True)
    assert cut(mlp_loss, params, everything, x) == []
    assert cut(mlp_loss, params, everything | {"A": False}, x) == []
    assert cut(mlp_loss, params, everything | {"B": False}, x) == ["A", "a"]
    assert cut(mlp_loss, params, everything | {"C": False}, x) == ["A", "B", "a", "b"]
    grads = jax.jit(implicit_grad(mlp_loss, everything | {"B": False}))(params, x)
    assert [name for name in MLP if not np.any(grads[name])] == ["A", "a"]


def test_a_way_around_the_mask_keeps_a_gradient():
    def loss(params, x):
        x = jnp.tanh(x @ params["in"])
        return jnp.mean(jax.jit(lambda x: x + jnp.tanh(x @ params["around"]) @ params["out"])(x))

    params = {
        "in": normal(0, 4, 4),
        "around": normal(1, 4, 4),
        "out": normal(2, 4, 4),
        "unused": normal(3, 2),
    }
    masks = dict.fromkeys(params, True) | {"out": False}
    assert cut(loss, params, masks, normal(4, 3, 4)) == ["around"]


def test_cuts_are_found_inside_loops_and_branches():
    def loss(params, x):
        def layer(x, w):
            return jax.checkpoint(lambda x: jnp.tanh(x @ w) @ params["out"])(x), None

        x = jax.lax.scan(layer, x @ params["in"], params["stack"])[0]
        return jnp.sum(jax.lax.cond(jnp.sum(x) > 0, lambda x: x, lambda x: x @ params["side"], x))

    params = {name: normal(i, 4, 4) for i, name in enumerate(["in", "out", "side"])}
    params["stack"] = normal(3, 2, 4, 4)
    everything = dict.fromkeys(params, True)
    assert cut(loss, params, everything | {"side": False}, normal(4, 3, 4)) == []
    assert cut(loss, params, everything | {"out": False}, normal(4, 3, 4)) == ["in", "stack"]


# Where no gradient flows, there is nothing to mask.


def compared(p, h):
    return jnp.where(h > p["w"][:3], h, 0) @ p["v"]


def counted(p, h):
    hits = sum(f(h, p["w"][:3]).astype(jnp.float32) for f in (jnp.less, jnp.equal, jnp.greater_equal))
    return (h * hits) @ p["v"]


def searched(p, h):
    return (h * jnp.searchsorted(jnp.sort(p["w"][0]), h)) @ p["v"]


def looked_ahead(p, h):
    guess = jax.lax.stop_gradient(h) @ (p["w"] - jnp.mean(p["w"]))
    return (h * jnp.tanh(guess)) @ p["v"]


def called_back(p, h):
    inputs = jax.lax.stop_gradient((h, p["w"]))
    found = jax.pure_callback(np.matmul, jax.ShapeDtypeStruct(h.shape, h.dtype), *inputs)
    return (h * found) @ p["v"]


def looped(p, h):
    def grow(n):
        return n + 1

    steps = jax.lax.while_loop(lambda n: n < jnp.sum(h @ p["w"]) * 0 + 3, grow, 0)
    return h * steps.astype(jnp.float32) @ p["v"]


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize("model", [compared, counted, searched, looked_ahead, called_back, looped])
def test_what_sends_no_gradient_has_nothing_to_mask(model):
    params, masks, x, loss = out_of_sight(model)

    def by_hand_loss(p, x):
        mean, swap = jnp.mean, {"v": jnp.eye(4)}
        activations = model({**p, **swap}, jnp.tanh(x @ p["e"]))
        return mean(jnp.square(by_hand("bi,io->bo", activations, p["v"], masks["v"])))

    grads = jax.jit(implicit_grad(loss, masks))(params, x)
    assert_close(grads, jax.jit(jax.grad(by_hand_loss))(params, x), rtol=1e-4, atol=1e-5)
    assert distance(grads["e"], jax.jit(jax.grad(loss))(params, x)["e"]) > 0.05


# Never silently dense.


def standardised(p, h):
    return h @ (p["w"] - jnp.mean(p["w"], 0, keepdims=True))


def multiplied(p, h):
    return h @ (p["w"] * p["v"])


def factorised(p, h):
    return h @ (p["w"] @ p["v"])


def noisy(p, h):
    return h @ (p["w"] + 0.1 * jax.random.normal(jax.random.key(0), (4, 4)))


def normalised(p, h):
    return h @ (p["w"] / jnp.linalg.norm(p["w"] @ jnp.ones(4)))


def low_rank_update(p, h):
    return h @ (p["w"] + p["a"] @ p["b"])


def fast_weights(p, h):
    return h @ (p["w"] - 0.1 * jax.grad(lambda w: jnp.sum(jnp.square(h @ w)))(p["w"]))


def fast_weights_in_a_loop(p, h):
    def step(w, _):
        return w + h.T @ h, None

    return h @ jax.lax.scan(step, p["w"], None, length=2)[0]


def modulated(p, h):
    return jnp.einsum("bi,bio->bo", h, p["w"][None] * h[:, :, None])


def mixed_experts(p, h):
    return jnp.einsum("bi,bio->bo", h, jnp.tanh(p["stack"][jnp.array([0, 1, 1])]))


def looked_up_twice(p, h):
    index = jnp.array([0, 1, 1])
    return jnp.einsum("bij,bjk->ik", p["stack"][index], p["other"][index]) * jnp.mean(h)


def sorted_weight(p, h):
    return h @ jnp.sort(p["w"])


def partly_overwritten(p, h):
    return h @ p["w"].at[jnp.array([0, 2])].set(1.0)


def chosen_by_branch(p, h):
    return h @ jax.lax.cond(jnp.sum(h) > 0, lambda w, v: w, lambda w, v: v, p["w"], p["v"])


def made_in_a_loop(p, h):
    return h @ jax.lax.scan(lambda carry, row: (carry, 2 * row), None, p["w"])[1]


@jax.custom_vjp
def layer_with_a_rule(x, w):
    return x @ w


layer_with_a_rule.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


def custom_rule(p, h):
    return layer_with_a_rule(h, p["w"])


def looping(p, h):
    return jax.lax.while_loop(lambda h: jnp.sum(h) > 1e3, lambda h: h @ p["w"], h)


def sharded(p, h):
    mesh = jax.sharding.Mesh(jax.devices()[:1], "x")
    spec = jax.sharding.PartitionSpec()
    return jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(h, p["w"])


def with_shardings(p, h):
    placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.jit(jnp.matmul, out_shardings=placed)(h, p["w"])


def solved(p, h):
    return jax.scipy.linalg.solve_triangular(p["w"], h.T)


OUT_OF_SIGHT = {
    standardised: "sub",
    multiplied: "'v' is multiplied with 'w'|'w' cannot be followed through mul",
    factorised: "'w' is multiplied with 'v'",
    noisy: "add",
    normalised: "div",
    low_rank_update: "add",
    fast_weights: "sub",
    fast_weights_in_a_loop: "scan",
    modulated: "mul",
    mixed_experts: "tanh",
    looked_up_twice: "'stack' is multiplied with 'other'",
    sorted_weight: "sort",
    partly_overwritten: "scatter",
    chosen_by_branch: "cond",
    made_in_a_loop: "scan",
    custom_rule: "custom_vjp_call",
    looping: "while",
    sharded: "shard_map",
    with_shardings: "jit",
    solved: "triangular_solve",
}


def out_of_sight(model):
    names = {
        "e": (4, 4),
        "w": (4, 4),
        "v": (4, 4),
        "a": (4, 2),
        "b": (2, 4),
        "stack": (2, 4, 4),
        "other": (2, 4, 4),
    }
    params = {name: jnp.asarray(normal(i, *shape)) for i, (name, shape) in enumerate(names.items())}
    masks = random_masks(params) | {"a": True, "b": True}

    def loss(params, x):
        return jnp.mean(jnp.square(model(params, jnp.tanh(x @ params["e"]))))

    return params, masks, normal(9, 3, 4), loss


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize("model", OUT_OF_SIGHT)
def test_a_mask_that_cannot_be_followed_is_an_error_that_names_parameter_and_equation(model):
    params, masks, x, loss = out_of_sight(model)
    with pytest.raises(ValueError, match=r"the implicit form cannot mask .*strict=False") as raised:
        implicit_value_and_grad(loss, masks)(params, x)
    message = str(raised.value)
    assert re.search(OUT_OF_SIGHT[model], message)
    assert re.search("'(w|v|stack)'", message)
    assert "test_implicit.py" in message or model is solved


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize("model", [standardised, custom_rule, sharded, looked_up_twice])
def test_without_strict_it_is_a_warning_and_that_product_stays_exact(model):
    params, masks, x, loss = out_of_sight(model)
    with pytest.warns(UserWarning, match="the implicit form cannot mask .* stays exact"):
        grads = implicit_grad(loss, masks, strict=False)(params, x)
    assert_close(grads, jax.grad(loss)(params, x))


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize("model", OUT_OF_SIGHT)
def test_a_parameter_without_a_mask_may_go_any_way(model):
    params, masks, x, loss = out_of_sight(model)
    everything = jax.tree.map(lambda mask: True, masks)
    traced = tracing.trace(loss, params, x)
    facts = [*map(weights.weight_fact, trees.leaf_paths(params), jax.tree.leaves(everything)), None]
    values, _ = backward.masked_evaluate(
        traced.jaxpr, traced.consts, [*jax.tree.leaves(params), x], facts, masked=True, strict=True
    )
    np.testing.assert_allclose(values[0], loss(params, x), rtol=1e-6)


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize("model", [standardised, custom_rule, sharded])
def test_a_layer_of_the_batch_itself_has_nothing_to_mask(model):
    params, masks, x, _ = out_of_sight(model)

    def loss(params, x):
        return jnp.mean(jnp.square(model(params, x)))

    if model is standardised:
        assert_close(implicit_grad(loss, masks)(params, x), jax.grad(loss)(params, x))
    else:  # inside, it might be used twice
        with pytest.raises(ValueError, match="cannot mask"):
            implicit_grad(loss, masks)(params, x)


# Under transformations.


def test_masks_are_gathered_with_sharded_parameters_inside_shard_map():
    params, x = {"w": normal(0, 4, 4), "v": normal(1, 4, 4)}, normal(2, 8, 4)
    masks = random_masks(params)
    mesh = jax.sharding.Mesh(jax.devices()[:4], "shard")
    rows = jax.sharding.PartitionSpec("shard")

    def loss(params, x):
        whole = jax.tree.map(lambda w: jax.lax.all_gather(w, "shard", tiled=True), params)
        return jax.lax.psum(jnp.sum(jnp.square(jnp.tanh(x @ whole["w"]) @ whole["v"])), "shard")

    def local(params, masks, x):
        return implicit_grad(loss, masks)(params, x)

    grads = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=rows))(params, masks, x)

    def by_hand_loss(params):
        h = jnp.tanh(plain("bi,io->bo", x, params["w"], None))
        return jnp.sum(jnp.square(by_hand("bi,io->bo", h, params["v"], jnp.asarray(masks["v"]))))

    assert_close(grads, jax.jit(jax.grad(by_hand_loss))(params))


def test_it_maps_over_examples_and_over_masks():
    params, x = mlp()
    masks = jax.tree.map(lambda mask: jnp.stack([mask, ~mask]), random_masks(params))

    def grads(masks, x):
        return implicit_grad(mlp_loss, masks)(params, x[None])

    mapped = jax.jit(jax.vmap(jax.vmap(grads, (None, 0)), (0, None)))(masks, x)
    one = jax.jit(grads)(jax.tree.map(lambda mask: mask[0], masks), x[2])
    assert_close(jax.tree.map(lambda leaf: leaf[0, 2], mapped), one)


# In two passes.


def test_two_passes_send_the_masked_gradient_to_the_active_leaves_and_the_exact_one_elsewhere():
    params, x = mlp()
    masks = random_masks(params) | {"B": False}
    two_pass = ssam_jax.two_pass_value_and_grad(mlp_loss, form="implicit")
    active = (False, True, False, True, True)  # A B C a b

    @jax.jit
    def both(params, x):
        value, grads, grad_fn = two_pass(params, x, mask=masks, active=active)
        return value, grads, grad_fn(params, 0)

    with pytest.warns(UserWarning, match="cut every path from the loss to 'a'"):
        value, grads, exact = both(params, x)
    expected_value, expected = jax.jit(implicit_value_and_grad(mlp_loss, masks))(params, x)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    zero = {name: jnp.zeros_like(params[name]) for name in "AC"}
    assert_close(grads, expected | zero)
    assert_close(exact, jax.jit(jax.grad(mlp_loss))(params, x))


def test_two_passes_are_strict_or_warn():
    params, masks, x, loss = out_of_sight(standardised)
    with pytest.raises(ValueError, match="the mask of 'w' cannot be followed through sub"):
        ssam_jax.two_pass_value_and_grad(loss, form="implicit")(params, x, mask=masks)
    loose = ssam_jax.two_pass_value_and_grad(loss, form="implicit", strict=False)
    with pytest.warns(UserWarning, match="stays exact"):
        grads = loose(params, x, mask=masks)[1]
    assert_close(grads, jax.grad(loss)(params, x))


# In two parts.


def test_facts_pass_from_a_part_that_is_not_masked_to_one_that_is():
    params, x = {"w": normal(0, 4, 5), "v": normal(1, 5, 4)}, normal(2, 3, 4)
    masks = random_masks(params)

    def first(w, v, x):
        return w.astype(jnp.bfloat16).T, jnp.tanh(x @ w) @ v, v - 1

    def second(wt, h):
        return jnp.sum(jnp.square(h @ wt.T.astype(jnp.float32)))

    def loss(w, v, x):
        wt, h, _ = first(w, v, x)
        return second(wt, h)

    def in_parts(w, v):
        facts = [weights.weight_fact("w", masks["w"]), weights.weight_fact("v", masks["v"]), None]
        jaxpr, consts = tracing.retrace(first, w, v, x)

        def run(w, v):
            return backward.masked_evaluate(jaxpr, consts, [w, v, x], facts, masked=False, strict=True)

        (wt, h, _), pull, facts = jax.vjp(run, w, v, has_aux=True)
        assert facts[0].path == "w" and facts[0].followed
        assert facts[2].path == "v" and facts[2].lost.startswith("sub")
        jaxpr, consts = tracing.retrace(lambda *args: [second(*args)], wt, h)

        def end(wt, h):
            return backward.masked_evaluate(jaxpr, consts, [wt, h], facts[:2], masked=True, strict=True)[0][0]

        d_wt, d_h = jax.grad(end, (0, 1))(wt, h)
        return pull([d_wt, d_h, jnp.zeros_like(v)])

    def expected(w, v):
        wt, pull = jax.vjp(lambda w: first(w, v, x)[0], w)
        h, pull_h = jax.vjp(lambda w, v: first(w, v, x)[1], w, v)
        w32 = wt.T.astype(jnp.float32)
        dy = 2 * h @ w32
        d_w, d_v = pull_h(dy @ jnp.where(masks["w"], w32, 0).T)
        return pull((h.T @ dy).astype(jnp.bfloat16).T)[0] + d_w, d_v

    assert_close(jax.jit(in_parts)(*params.values()), jax.jit(expected)(*params.values()), rtol=1e-3)
