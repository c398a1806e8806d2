"""A state survives Flax's and Orbax's checkpoints, and training goes on as if nothing had happened."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tiny

import ssam_jax
from ssam_jax import NM, Structured

RULES = {
    "fisher": lambda: ssam_jax.fisher_mask(NM(2, 4), refresh_every=2),
    "fisher in bfloat16": lambda: ssam_jax.fisher_mask(
        NM(2, 4), refresh_every=2, accumulator_dtype=jnp.bfloat16
    ),
    "fisher without refresh": lambda: ssam_jax.fisher_mask(NM(2, 4), refresh_every=None),
    "random": lambda: ssam_jax.random_mask(NM(2, 4), refresh_every=2),
    "dynamic": lambda: ssam_jax.dynamic_mask(
        Structured(0.5, unit="channel", axis=-1), refresh_every=2, total_steps=20
    ),
    "fixed": lambda: ssam_jax.fixed_mask(lambda path: path.startswith("first")),
    "dense": lambda: None,
    "alternating": lambda: ssam_jax.random_mask(NM(2, 4), refresh_every=1),
}
MIDDLE, END = 3, 6  # refreshes before, at and after the checkpoint


@pytest.fixture(scope="module", params=RULES)
def run(request):
    """Return a step and what it starts from, has in the middle and ends with."""
    rule = RULES[request.param]()
    if request.param == "alternating":
        tx = ssam_jax.alternating(optax.sgd(0.1, momentum=0.9), 0.1, rule)
    else:
        tx = optax.chain(ssam_jax.ssam(0.1, rule), optax.sgd(0.1, momentum=0.9))
    step = jax.jit(tiny.step_of(tx))
    start = (tiny.params(), jax.jit(tx.init)(tiny.params()))
    middle = take(step, start, 0, MIDDLE)
    return step, start, middle, take(step, middle, MIDDLE, END)


def take(step, carry, first, last):
    for batch in tiny.BATCHES[first:last]:
        carry = step(*carry, batch)
    return carry


def blank(tree):
    """Return a template with the shapes of a tree and none of its values."""
    return jax.tree.map(jnp.zeros_like, tree)


def check_training_goes_on(run, restored):
    step, start, middle, end = run
    tiny.assert_same(restored, middle)
    assert tiny.differ(start, middle)
    tiny.assert_same(take(step, restored, MIDDLE, END), end)
    tiny.assert_same(masks_of(restored), masks_of(middle))


def masks_of(carry):
    return ssam_jax.get_mask(carry[1]), ssam_jax.mask_stats(carry[1])


def test_the_bytes_of_flax_hold_a_whole_state(run):
    middle = run[2]
    restored = flax.serialization.from_bytes(blank(middle), flax.serialization.to_bytes(middle))
    check_training_goes_on(run, restored)


def test_the_state_dict_of_flax_holds_a_whole_state(run):
    middle = run[2]
    plain = jax.tree.map(np.asarray, flax.serialization.to_state_dict(middle))
    check_training_goes_on(run, flax.serialization.from_state_dict(blank(middle), plain))


def test_orbax_holds_a_whole_state(run, tmp_path):
    middle = run[2]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", middle)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", blank(middle))
    check_training_goes_on(run, restored)


def test_orbax_restores_from_an_abstract_init(tmp_path):
    tx = optax.chain(ssam_jax.ssam(0.1, RULES["random"]()), optax.sgd(0.1, momentum=0.9))
    state = tx.init(tiny.params())
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), jax.eval_shape(tx.init, tiny.PARAMS)
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        tiny.assert_same(checkpointer.restore(tmp_path / "state", abstract), state)


def test_the_names_in_a_state_dict_explain_the_checkpoint():
    state = ssam_jax.ssam(0.1, RULES["fisher"]()).init(tiny.params())
    plain = flax.serialization.to_state_dict(state)
    assert set(plain) == {"step", "leaf_sizes", "mask", "direction", "radius", "combine"}
    assert set(plain["mask"]) == {"bits", "churn", "key", "memory"}
    assert set(plain["mask"]["bits"]) == {"first", "second"}


def test_every_leaf_of_a_state_is_a_plain_array():
    for name, rule in RULES.items():
        for leaf in jax.tree.leaves(jax.eval_shape(ssam_jax.ssam(0.1, rule()).init, tiny.PARAMS)):
            assert not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key), name
