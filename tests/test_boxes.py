"""Parameters in Flax's boxes, which say how they are sharded: the usual recipes shard every state."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_sharding
import tiny
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import ssam_jax.nnx
from ssam_jax import NM, MaskRule, Unstructured, combine, directions, radii
from ssam_jax._base import boxes

P = PartitionSpec
KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
PARAMS = test_sharding.PARAMS  # a bias of 16 and a kernel of 16 x 64, whose mask is packed
NAMES = {"bias": ("fsdp",), "kernel": ("fsdp", "tensor")}
LAYOUT = ((1, 8), ("fsdp", "tensor"))


def boxed(tree, kind=nn.Partitioned):
    return {name: kind(x, NAMES[name]) for name, x in tree.items()}


def per_leaf(params):
    return jax.tree.map(lambda p: jnp.zeros(()), params)


def largest(memory, mask, params, key, step):
    mean = sum(jax.tree.leaves(memory)) / 2
    return jax.tree.map(lambda m: m >= mean, memory)


def sums(memory, params, ascent, descent, step, **extra):
    return jax.tree.map(lambda m, g: m + jnp.sum(jnp.square(g)), memory, descent)


SCALARS = MaskRule(per_leaf, sums, largest, refresh_every=2)
PER_LEAF = optax.GradientTransformation(per_leaf, lambda grads, state, params=None: (grads, state))
RULES = {
    **test_sharding.RULES,
    ("fixed", "fixed"): lambda seed: ssam_jax.fixed_mask(lambda path: path == "kernel"),
    ("custom", "scalars"): lambda seed: SCALARS,
}
NM_MASK = ssam_jax.fisher_mask(NM(2, 4), refresh_every=2)
CARRIERS = {
    **{" ".join(key): lambda rule=rule: ssam_jax.ssam(0.1, rule(0)) for key, rule in RULES.items()},
    "states by leaf": lambda: ssam_jax.ssam(
        radii.every(2, 0.1),
        NM_MASK,
        direction=optax.chain(directions.friendly(), PER_LEAF),
        combine=combine.looksam(0.5, scope="leaf"),
        skip_zero_rho=True,
    ),
    "alternating": lambda: ssam_jax.alternating(
        optax.sgd(0.1, momentum=0.9), 0.1, NM_MASK, combine=combine.gsam(0.1)
    ),
    "carried": lambda: ssam_jax.carried(
        optax.sgd(0.1, momentum=0.9), 0.1, NM_MASK, direction=directions.friendly()
    ),
}


def in_boxes(state):
    """Return shapes and names of what is in a box."""
    nodes = jax.tree.leaves(state, is_leaf=boxes.is_box)
    return [(node.value.shape, node.names) for node in nodes if boxes.is_box(node)]


@pytest.mark.parametrize("carrier", CARRIERS)
def test_in_a_box_is_what_has_the_shape_of_its_parameter_and_all_else_lies_outside(carrier):
    tx, params = CARRIERS[carrier](), boxed(PARAMS)
    state = jax.eval_shape(tx.init, params)
    assert set(in_boxes(state)) <= {(p.shape, NAMES[name]) for name, p in PARAMS.items()}
    # More devices than there are words: whatever divides the parameters divides all of the state.
    mesh = AbstractMesh((2, 16), ("fsdp", "tensor"))
    shards = jax.tree.leaves(nn.get_sharding(state, mesh))
    arrays = jax.tree.leaves(state)
    assert len(shards) == len(arrays)
    for sharding, array in zip(shards, arrays):
        sharding.shard_shape(array.shape)
    after = jax.eval_shape(lambda s: tx.update(params, s, params, grad_fn=lambda p, i: p)[1], state)
    assert tiny.spec(after) == tiny.spec(state)


@pytest.mark.parametrize("kind", [nn.Partitioned, nn.LogicallyPartitioned])
def test_what_is_shaped_like_the_parameters_keeps_its_box(kind):
    rule = ssam_jax.fisher_mask(Unstructured(0.5), refresh_every=2)
    tx = ssam_jax.ssam(
        0.1, rule, direction=directions.friendly(), combine=combine.looksam(0.5), skip_zero_rho=True
    )
    specs = nn.get_partition_spec(jax.eval_shape(tx.init, boxed(PARAMS, kind)))
    expected = {name: P(*names) for name, names in NAMES.items()}
    found = (specs.mask.memory, specs.mask.bits, specs.direction.mean, specs.combine.across)
    assert found == (expected,) * 4
    assert specs.mask.key == specs.mask.churn == specs.step == specs.combine.square == P()


def test_a_mask_is_packed_in_a_box_that_splits_nothing():
    params = {"kernel": nn.Partitioned(PARAMS["kernel"], (None, None))}
    state = jax.eval_shape(ssam_jax.ssam(0.1, ssam_jax.random_mask(Unstructured(0.5))).init, params)
    assert state.mask.bits["kernel"].dtype == jnp.uint8
    assert ssam_jax.get_mask(state)["kernel"].shape == (16, 64)


# The recipe of MaxText and of Flax's lm1b: describe, take the shardings from the boxes, make it there.

TX = ssam_jax.ssam(0.1, NM_MASK, combine=combine.looksam(0.5, scope="leaf"), skip_zero_rho=True)
GRADS = {name: np.sin(100 * p) for name, p in PARAMS.items()}


def train(state, params, grads, tx=TX, **options):
    """Return what two compiled steps, the second with a refresh, lead to."""

    def step(params, state):
        def grad_fn(point, i):
            return jax.tree.map(lambda g, p: g * (1 + jnp.sin(p)), grads, point)

        updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, **options)
    for _ in range(2):
        params, state = compiled(params, state)
    return params, state


@pytest.fixture(scope="module")
def on_one_device():
    plain = jax.tree.map(jnp.array, PARAMS)
    params, state = train(TX.init(plain), plain, jax.tree.map(jnp.array, GRADS))
    return params, ssam_jax.get_mask(state)


@pytest.mark.parametrize(
    ("kind", "unbox"),
    [(AxisType.Auto, False), (AxisType.Explicit, False), (AxisType.Explicit, True)],
    ids=["auto", "explicit", "explicit, unboxed before the first step"],
)
def test_the_recipe_of_maxtext_and_lm1b_gives_the_steps_of_one_device(kind, unbox, on_one_device):
    def init():
        params = boxed(jax.tree.map(jnp.array, PARAMS))
        return params, TX.init(params)

    mesh = jax.make_mesh(*LAYOUT, axis_types=(kind,) * 2)
    shards = nn.logical_to_mesh_sharding(nn.get_partition_spec(jax.eval_shape(init)), mesh)
    params, state = jax.jit(init, out_shardings=shards)()
    grads = boxed({name: jax.device_put(g, shards[0][name]) for name, g in GRADS.items()})
    if unbox:
        params, state, grads = nn.meta.unbox((params, state, grads))
    with test_sharding.mesh_context(mesh):
        params, state = train(state, params, grads, out_shardings=shards)
    assert in_boxes(state) == ([] if unbox else in_boxes(jax.eval_shape(TX.init, boxed(PARAMS))))
    found = {name: box if unbox else box.value for name, box in params.items()}
    tiny.assert_close((found, ssam_jax.get_mask(state)), on_one_device)


def test_tree_map_params_leaves_alone_what_is_not_shaped_like_the_parameters():
    mesh = jax.make_mesh(*LAYOUT, axis_types=(AxisType.Auto,) * 2)
    everywhere, params = NamedSharding(mesh, P()), jax.tree.map(jnp.array, PARAMS)
    shards = {name: NamedSharding(mesh, P(*names)) for name, names in NAMES.items()}
    shapes = jax.eval_shape(TX.init, params)
    wanted = optax.tree_map_params(
        TX, lambda leaf, sharding: sharding, shapes, shards, transform_non_params=lambda leaf: everywhere
    )
    assert wanted.mask.memory == wanted.combine.across == shards
    assert wanted.mask.bits == wanted.combine.square == everywhere
    state = jax.jit(TX.init, out_shardings=wanted)(params)
    tiny.assert_same(ssam_jax.get_mask(state), ssam_jax.get_mask(TX.init(params)))


# NNX


class Net(nnx.Module):
    def __init__(self):
        def param(name):
            return nnx.Param(nnx.with_partitioning(lambda: jnp.array(PARAMS[name]), NAMES[name])())

        self.bias, self.kernel = param("bias"), param("kernel")


@KINDS
def test_an_nnx_optimizer_under_a_mesh_gives_the_step_of_plain_parameters(kind):
    channels = np.arange(64)[None] % 3 == 0

    def select(memory, mask, params, key, step):
        return jax.tree.map(lambda p: jnp.array(channels if p.ndim == 2 else True), params)

    tx = ssam_jax.ssam(0.1, MaskRule(select=select))

    def loss(net):
        return jnp.sum(jnp.sin(net.kernel[...])) + jnp.sum(jnp.sin(net.bias[...]))

    @nnx.jit
    def step(net, optimizer):
        optimizer.update(net, nnx.grad(loss)(net), grad_fn=lambda params, i: params)

    mesh = jax.make_mesh(*LAYOUT, axis_types=(kind,) * 2)
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else jax.sharding.use_mesh(mesh):
        net = Net()
        optimizer = ssam_jax.nnx.Optimizer(net, tx, wrt=nnx.Param)
        step(net, optimizer)
    plain = jax.tree.map(jnp.array, PARAMS)
    updates, _ = tx.update(
        jax.tree.map(jnp.cos, plain), tx.init(plain), plain, grad_fn=lambda params, i: params
    )
    found = {name: np.asarray(getattr(net, name)[...]) for name in PARAMS}
    tiny.assert_close(found, optax.apply_updates(plain, updates))
    mask = ssam_jax.get_mask(optimizer.opt_state)
    tiny.assert_same({name: mask[name] for name in PARAMS}, {"bias": np.array(True), "kernel": channels})


# Masks that come and go without boxes


def test_a_mask_is_read_without_boxes_and_replaced_with_or_without():
    tx, params = ssam_jax.ssam(0.1, ssam_jax.random_mask(NM(2, 4))), boxed(PARAMS)
    state = tx.init(params)
    mask = ssam_jax.get_mask(state)
    tiny.assert_same(mask, ssam_jax.get_mask(tx.init(PARAMS)))
    tiny.assert_same(ssam_jax.mask_stats(state).by_leaf, ssam_jax.mask_stats(tx.init(PARAMS)).by_leaf)
    new = jax.tree.map(jnp.logical_not, mask)
    for given in (new, boxed(new)):
        changed = ssam_jax.set_mask(state, given)
        assert tiny.spec(changed) == tiny.spec(state)
        tiny.assert_same(ssam_jax.get_mask(changed), new)
    tiny.assert_same(ssam_jax.get_mask(ssam_jax.ssam(0.1, ssam_jax.fixed_mask(new)).init(params)), new)


def test_the_implicit_form_takes_a_mask_without_boxes():
    def loss_fn(params, x):
        params = nn.meta.unbox(params)
        return jnp.sum(jnp.tanh(jnp.tanh(x @ params["kernel"]) @ params["kernel"].T))

    mask = ssam_jax.get_mask(ssam_jax.ssam(0.1, ssam_jax.random_mask(NM(2, 4))).init(PARAMS))
    two_pass = ssam_jax.two_pass_value_and_grad(loss_fn, form="implicit")
    x = jnp.ones((2, 16))
    _, grads, _ = two_pass(boxed(PARAMS), x, mask=mask)
    tiny.assert_same(nn.meta.unbox(grads), two_pass(PARAMS, x, mask=mask)[1])
