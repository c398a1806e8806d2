"""The classifiers of the training example: as large as published, computed as in PyTorch, fit for both forms.

Most tests trace a model without computing it, so that the large ones cost little.
"""

import functools
import math
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssam_experiments import models
from ssam_jax import explain_two_pass, two_pass_value_and_grad
from ssam_jax._base.trees import leaf_paths, map_with_path

FLOAT32, BFLOAT16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)


def images_of(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def variables_of(model, images, train=False):
    """Return the logits of a model and all its variables, as shapes."""
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    return jax.eval_shape(lambda images: model.init_with_output(rngs, images, train=train), images)


def loss_of(model):
    """Return ``loss(params, state, images, labels, key) -> (loss, new state)`` of a model that trains."""

    def loss(params, state, images, labels, key):
        variables, rngs = {"params": params, **state}, {"dropout": key}
        logits, new = model.apply(variables, images, train=True, mutable=list(state), rngs=rngs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

    return loss


ONE_OF_EACH = {
    "resnet50": {"counts": (1, 1, 1, 1)},
    "wrn28-10": {"counts": (1, 1, 1)},
    "vit-tiny": {"depth": 1},
}


def small_model(name, dtype):
    """Return a model to compile, or to trace often, with one of the blocks that are all alike."""
    model = models.make_model(name, classes=10, stem="cifar", dtype=dtype)
    return model.clone(**ONE_OF_EACH.get(name, {}))


def problem(model, size, channels):
    """Return the loss of a model and its arguments, as shapes."""
    images, labels = images_of(4, size, size, channels), jax.ShapeDtypeStruct((4,), jnp.int32)
    state = dict(variables_of(model, images)[1])
    return loss_of(model), (state.pop("params"), state, images, labels, jax.eval_shape(jax.random.key, 0))


def compiled(fn, *args):
    """Compile a function; without the optimizations that are of no use in a single run, and slow."""
    return jax.jit(fn).lower(*args).compile({"xla_backend_optimization_level": 0})


def drawn(shapes):
    """Return arrays of the given shapes: positive variances and scales, normal numbers for the rest."""
    generator = np.random.default_rng(0)

    def draw(path, leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.zeros(leaf.shape, leaf.dtype)
        if path.endswith(("scale", "var")):
            return jnp.asarray(generator.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        fan_in = math.prod(leaf.shape[:-1]) if path.endswith("kernel") else 1
        return jnp.asarray(generator.normal(size=leaf.shape) / fan_in**0.5, leaf.dtype)

    return map_with_path(draw, shapes)


# How large they are


@pytest.mark.parametrize(
    ("name", "stem", "size", "classes", "published"),
    [
        ("resnet18", "imagenet", 224, 1000, 11_689_512),
        ("resnet34", "imagenet", 224, 1000, 21_797_672),
        ("resnet50", "imagenet", 224, 1000, 25_557_032),
        ("resnet101", "imagenet", 224, 1000, 44_549_160),
        ("resnet152", "imagenet", 224, 1000, 60_192_808),
        ("resnet18", "cifar", 32, 10, 11_173_962),
        ("resnet34", "cifar", 32, 10, 21_282_122),
        ("resnet50", "cifar", 32, 10, 23_520_842),
        ("wrn28-10", "cifar", 32, 10, 36_479_194),
        ("wrn28-10", "cifar", 32, 100, 36_536_884),
        ("wrn34-10", "cifar", 32, 10, 46_160_474),
        ("vgg11-bn", "imagenet", 224, 1000, 132_868_840),
        ("vgg13-bn", "imagenet", 224, 1000, 133_053_736),
        ("vgg16-bn", "imagenet", 224, 1000, 138_365_992),
        ("vgg19-bn", "imagenet", 224, 1000, 143_678_248),
        ("vit-s", "imagenet", 224, 1000, 22_050_664),
    ],
)
def test_a_model_has_as_many_parameters_as_was_published(name, stem, size, classes, published):
    model = models.make_model(name, classes=classes, stem=stem)
    logits, variables = variables_of(model, images_of(2, size, size, 3))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == published
    assert logits.shape == (2, classes)


VGG_CHANNELS = {
    "vgg11-bn": (64, 128, 256, 256, 512, 512, 512, 512),
    "vgg13-bn": (64, 64, 128, 128, 256, 256, 512, 512, 512, 512),
    "vgg16-bn": (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512),
    "vgg19-bn": (64, 64, 128, 128, 256, 256, 256, 256, 512, 512, 512, 512, 512, 512, 512, 512),
}


@pytest.mark.parametrize("name", VGG_CHANNELS)
def test_vgg_for_cifar_has_the_parameters_of_its_layers(name):
    channels = VGG_CHANNELS[name]
    expected = sum(9 * i * o + o + 2 * o for i, o in zip((3, *channels), channels))
    expected += (512 + 1) * 4096 + (4096 + 1) * 4096 + (4096 + 1) * 100
    _, variables = variables_of(models.make_model(name, classes=100, stem="cifar"), images_of(2, 32, 32, 3))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == expected


@pytest.mark.parametrize(
    ("name", "stem", "size", "expected"),
    [
        ("resnet6", "cifar", 32, [8, 4]),
        ("resnet8", "cifar", 8, [8, 4, 2]),
        ("resnet18", "cifar", 32, [32, 16, 8, 4]),
        ("resnet18", "imagenet", 224, [56, 28, 14, 7]),
        ("resnet50", "imagenet", 225, [57, 29, 15, 8]),
        ("wrn28-10", "cifar", 32, [32, 16, 8]),
        ("vgg11-bn", "cifar", 32, [16, 8, 4, 2, 1]),
        ("vgg11-bn", "imagenet", 224, [112, 56, 28, 14, 7]),
    ],
)
def test_features_shrink_from_stage_to_stage(name, stem, size, expected):
    model = models.make_model(name, classes=10, stem=stem)
    of_stages = lambda module, _: (module.name or "").startswith("stage")  # noqa: E731
    trace = functools.partial(model.init_with_output, train=False, capture_intermediates=of_stages)
    _, variables = jax.eval_shape(trace, jax.random.key(0), images_of(2, size, size, 3))
    features = jax.tree.leaves(variables["intermediates"])
    assert [leaf.shape[1:3] for leaf in features] == [(side, side) for side in expected]


@pytest.mark.parametrize("shape", [(2, 8, 8, 1), (2, 28, 28, 1)], ids=str)
@pytest.mark.parametrize("name", ["mlp", "resnet8", "vit-tiny"])
def test_small_images_are_taken_where_the_architecture_permits(name, shape):
    logits, _ = variables_of(models.make_model(name, classes=7, stem="cifar"), images_of(*shape))
    assert logits.shape == (2, 7)


# What they are made of


@pytest.mark.usefixtures("relaxed_promotion")  # Flax's BatchNorm in bfloat16 relies on it
@pytest.mark.parametrize("name", ["mlp", "resnet8", "resnet50", "wrn28-10", "vgg11-bn", "vit-tiny"])
def test_parameters_statistics_and_logits_are_float32_and_norms_are_found_by_name(name):
    logits, variables = variables_of(small_model(name, jnp.bfloat16), images_of(2, 32, 32, 3), train=True)
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, variables))} == {FLOAT32}
    paths = leaf_paths(variables["params"])
    norms = {path.rpartition("/")[0] for path in paths if path.endswith("scale")}
    by_name = {path.rpartition("/")[0] for path in paths if re.search("(^|/)norm", path)}
    assert norms == by_name


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize("name", ["resnet8", "wrn28-10", "vgg11-bn", "vit-tiny", "mlp"])
def test_every_product_but_the_head_is_computed_in_bfloat16(name):
    loss, args = problem(small_model(name, jnp.bfloat16), 32, 3)
    products = re.findall(
        r":(\w+)\[[^ ]* = (?:conv_general_dilated|dot_general)", str(jax.make_jaxpr(loss)(*args))
    )
    assert products[:-1] == ["bf16"] * (len(products) - 1)
    assert products[-1] == "f32"


@pytest.mark.parametrize("train", [True, False])
def test_dropout_is_active_in_training_only(train):
    model, images = models.make_model("vgg11-bn", classes=10, stem="cifar"), images_of(2, 32, 32, 3)
    _, variables = variables_of(model, images)

    def apply(variables, images, rngs):
        return model.apply(variables, images, train=train, mutable=["batch_stats"], rngs=rngs)

    with_key = jax.make_jaxpr(lambda v, x: apply(v, x, {"dropout": jax.random.key(0)}))(variables, images)
    assert ("random_bits" in str(with_key)) is train
    if train:
        with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
            jax.eval_shape(lambda v, x: apply(v, x, {}), variables, images)


def test_convolutions_start_with_the_variance_that_keeps_gradients():
    layer = models.conv(64, 3, 2, jnp.float32, None)
    args = jax.random.key(0), np.ones((1, 4, 4, 32), np.float32)
    kernel = compiled(layer.init, *args)(*args)["params"]["kernel"]
    assert np.std(kernel) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


# What they compute, against NumPy


def conv(x, kernel, stride):
    """Convolve with as many zeros on every side as PyTorch's ``padding=size // 2``."""
    size = kernel.shape[0]
    x = np.pad(x, ((0, 0), (size // 2, size // 2), (size // 2, size // 2), (0, 0)))
    rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
    windows = [
        x[:, i : i + stride * rows : stride, j : j + stride * columns : stride] @ kernel[i, j]
        for i in range(size)
        for j in range(size)
    ]
    return sum(windows)


def moments(x):
    return x.mean((0, 1, 2)), x.var((0, 1, 2))


def norm(x, params, mean, var):
    return (x - mean) / np.sqrt(var + 1e-5) * params["scale"] + params["bias"]


def relu(x):
    return np.maximum(x, 0)


def basic(x, conv_i, norm_i):
    y = relu(norm_i(1, conv_i(1, x, 2)))
    y = norm_i(2, conv_i(2, y, 1))
    return relu(y + norm_i("shortcut", conv_i("shortcut", x, 2)))


def bottleneck(x, conv_i, norm_i):
    y = relu(norm_i(1, conv_i(1, x, 1)))
    y = relu(norm_i(2, conv_i(2, y, 2)))
    y = norm_i(3, conv_i(3, y, 1))
    return relu(y + norm_i("shortcut", conv_i("shortcut", x, 2)))


def wide(x, conv_i, norm_i):
    x = relu(norm_i(1, x))
    y = relu(norm_i(2, conv_i(1, x, 2)))
    return conv_i(2, y, 1) + conv_i("shortcut", x, 2)


@pytest.mark.parametrize(
    ("make_block", "reference"),
    [(models.basic, basic), (models.bottleneck, bottleneck), (models.WideBlock, wide)],
)
def test_a_strided_block_in_training_is_computed_as_in_pytorch(make_block, reference):
    block = make_block(4, 2, jnp.float32, name=None)
    x = np.float32(np.sin(np.arange(2 * 6 * 5 * 3.0))).reshape(2, 6, 5, 3)
    apply = functools.partial(block.apply, train=True, mutable=["batch_stats"])
    variables = drawn(jax.eval_shape(functools.partial(block.init, train=True), jax.random.key(0), x))
    actual, new = compiled(apply, variables, x)(variables, x)

    params, old, new = jax.tree.map(
        np.float64, (variables["params"], variables["batch_stats"], new["batch_stats"])
    )

    def conv_i(i, x, stride):
        return conv(x, params[f"conv_{i}"]["kernel"], stride)

    def norm_i(i, x):
        name, (mean, var) = f"norm_{i}", moments(x)
        np.testing.assert_allclose(new[name]["mean"], 0.9 * old[name]["mean"] + 0.1 * mean, atol=1e-5)
        np.testing.assert_allclose(new[name]["var"], 0.9 * old[name]["var"] + 0.1 * var, atol=1e-5)
        return norm(x, params[name], mean, var)

    np.testing.assert_allclose(actual, reference(np.float64(x), conv_i, norm_i), rtol=1e-4, atol=1e-5)


def test_the_stem_for_imagenet_pads_as_in_pytorch():
    model = models.ResNet(
        classes=3, kind="imagenet", dtype=jnp.float32, counts=(), block=models.basic, stem_width=4
    )
    images = np.float32(np.cos(np.arange(2 * 18 * 16 * 3.0))).reshape(2, 18, 16, 3)
    variables = drawn(jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images))
    apply = functools.partial(model.apply, train=False)
    actual = compiled(apply, variables, images)(variables, images)
    params, stats = jax.tree.map(np.float64, (variables["params"], variables["batch_stats"]))
    x = conv(np.float64(images), params["stem"]["kernel"], 2)
    x = relu(norm(x, params["norm_stem"], **stats["norm_stem"]))
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # zeros are the least that a ReLU returns
    x = np.max([x[:, i : i + 9 : 2, j : j + 8 : 2] for i in range(3) for j in range(3)], axis=0)
    expected = x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


# Training


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("mlp", FLOAT32), ("resnet8", FLOAT32), ("resnet8", BFLOAT16), ("vit-tiny", FLOAT32)],
    ids=str,
)
def test_small_models_have_finite_gradients_everywhere(name, dtype):
    loss, shapes = problem(small_model(name, dtype), 8, 1)
    args = drawn(shapes)
    results = compiled(jax.value_and_grad(loss, has_aux=True), *args)(*args)
    (value, new), grads, old = jax.tree.map(np.asarray, (*results, args[1]))
    assert np.isfinite(value)
    for path, grad in zip(leaf_paths(grads), jax.tree.leaves(grads)):
        assert grad.dtype == FLOAT32
        assert np.all(np.isfinite(grad)), path
        # a bias of the keys moves all scores of a query alike, which softmax ignores
        assert path.endswith("key/bias") or np.any(grad), path
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} <= {FLOAT32}
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old)))


LAST_BLOCK = {
    "resnet8": "^(stage_3/block_1|head)/",
    "resnet18": "^(stage_4/block_2|head)/",
    "wrn28-10": "^(stage_3/block_4|norm|head)/",
    "vgg11-bn": "^(stage_5|hidden_1|hidden_2|head)/",
    "vit-tiny": "^(block_4|norm|head)/",
}


@pytest.mark.parametrize("name", LAST_BLOCK)
def test_perturbing_the_last_block_and_head_costs_less_than_sam(name):
    loss, args = problem(models.make_model(name, classes=10, stem="cifar"), 32, 3)
    active = tuple(bool(re.search(LAST_BLOCK[name], path)) for path in leaf_paths(args[0]))
    report = explain_two_pass(loss, *args, active=active)
    assert 1 < report.relative_to_sgd < 1.3
    assert report.whole == report.unknown == ()
    assert report.side_effect is None


def test_the_two_passes_of_resnet8_share_all_but_its_last_block():
    loss, args = problem(small_model("resnet8", jnp.float32), 8, 1)
    active = tuple(bool(re.search(LAST_BLOCK["resnet8"], path)) for path in leaf_paths(args[0]))

    def step(params, *args):
        value, grads, grad_fn = two_pass_value_and_grad(loss, has_aux=True)(params, *args, active=active)
        return value, grads, grad_fn(jax.tree.map(jnp.add, params, grads), 0)

    (_, state), grads, descent = jax.eval_shape(step, *args)
    assert jax.tree.structure(state) == jax.tree.structure(args[1])
    assert jax.tree.structure(grads) == jax.tree.structure(descent) == jax.tree.structure(args[0])


@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("name", ["mlp", "resnet8", "vit-tiny"])
def test_the_implicit_form_follows_every_mask_to_its_product(name, dtype):
    loss, (params, *args) = problem(small_model(name, dtype), 8, 1)
    two_pass = two_pass_value_and_grad(loss, has_aux=True, form="implicit")
    masks = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, bool), params)
    _, grads = jax.eval_shape(lambda p, m, *args: two_pass(p, *args, mask=m)[:2], params, masks, *args)
    assert jax.tree.structure(grads) == jax.tree.structure(params)


# Errors


def test_a_width_replaces_that_of_the_first_stage_and_of_a_stem_as_wide():
    widths = {
        name: models.make_model(name, classes=10, stem="cifar", width=8) for name in ("resnet6", "wrn28-10")
    }
    assert [(model.width, model.stem_width) for model in widths.values()] == [(8, 8), (8, 16)]
    assert models.make_model("vit-tiny", classes=10, stem="cifar", width=32).width == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet19"}, "name must be one of mlp, resnet6, resnet8, .*, vit-s, got 'resnet19'"),
        ({"stem": "mnist"}, "stem must be one of cifar, imagenet, got 'mnist'"),
        ({"classes": 0}, "classes must be at least 1, got 0"),
        ({"name": "vgg11-bn", "width": 8}, "vgg11-bn has no single width: leave width out, got 8"),
    ],
)
def test_an_unknown_model_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        models.make_model(**{"name": "resnet8", "classes": 10, "stem": "cifar", **options})


@pytest.mark.parametrize(
    ("name", "stem", "size", "message"),
    [
        ("vit-tiny", "cifar", (30, 32), "ViT cannot cut 30x32 images into 4x4 patches"),
        ("vit-s", "imagenet", (224, 225), "ViT cannot cut 224x225 images into 16x16 patches"),
        ("vgg16-bn", "cifar", (28, 32), "VGG .* needs 32x32 or more, got 28x32"),
    ],
)
def test_images_of_the_wrong_size_are_refused(name, stem, size, message):
    with pytest.raises(ValueError, match=message):
        variables_of(models.make_model(name, classes=10, stem=stem), images_of(2, *size, 3))
