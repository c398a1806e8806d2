"""Every public function against bad arguments: a sentence that names the argument, its value and the remedy.

A row is what is called, the exception's type, and what its message must say.
"""

import functools
import inspect
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx

import ssam_jax
import ssam_jax.linen
import ssam_jax.nnx
from ssam_jax import NM, FirstRow, MaskRule, Structured, Unstructured
from ssam_jax._base import checks

NAN = float("nan")
HALF = Unstructured(0.5)
BATCH = tiny.BATCHES[0]
BOOLS = jax.tree.map(lambda p: np.ones(p.shape, bool), tiny.PARAMS)
OTHERS = {"a": np.ones((3, 4), np.float32)}  # another tree
EVERYTHING = ssam_jax.fixed_mask(lambda path: True)
SHAPE = "should be (4,), got (1, 4)"
STRUCTURE = "at 'first' expected a dict of 2 (bias, kernel), got nothing"


# What is called.


def fisher(pattern=HALF, **options):
    return ssam_jax.fisher_mask(pattern, **{"refresh_every": 1, **options})


def dynamic(pattern=HALF, **options):
    return ssam_jax.dynamic_mask(pattern, **{"refresh_every": 1, "total_steps": 9, **options})


def mapped(fn, tree=tiny.PARAMS):
    return jax.tree.map(fn, tree)


@functools.cache
def gradient():
    return jax.grad(tiny.loss)(tiny.params(), BATCH)


def step(tx, grads=None, params=tiny.PARAMS, state=None, **extra):
    """Take one step of a transformation, all of it as it should be but for what is given."""
    state = tx.init(tiny.params()) if state is None else state
    extra = {"grad_fn": lambda params, i: gradient(), **extra}
    return tx.update(gradient() if grads is None else grads, state, params, **extra)


def dense(**bad):
    return step(ssam_jax.ssam(0.1), **bad)


def radius(value):
    return step(ssam_jax.ssam(lambda step: value))


def resumed(rule, state_of):
    """Take a step with one rule from the state of another."""
    return step(ssam_jax.ssam(0.1, rule), state=ssam_jax.ssam(0.1, state_of).init(tiny.params()))


def turns(state=None, **bad):
    tx = ssam_jax.alternating(optax.sgd(0.1), 0.1, EVERYTHING)
    return step(tx, state=state, **bad)


def traded(fraction):
    return step(ssam_jax.ssam(0.1, dynamic(drop_fraction=fraction)))


def fixed(choice):
    return ssam_jax.ssam(0.1, ssam_jax.fixed_mask(choice)).init(tiny.params())


def own(select=EVERYTHING.select, init=lambda params: np.zeros(3, np.float32), observe=None):
    return step(ssam_jax.ssam(0.1, MaskRule(init, observe, select, refresh_every=1)))


def selecting(mask):
    """Return a rule's function that selects a mask which fits, and then another."""
    return lambda memory, old, params, key, step: mapped(lambda p: np.bool_(True)) if old is None else mask


def example_loss(params, example):
    return jnp.sum(jnp.tanh(example @ params["first"]["kernel"]))


def scores(loss_fn=example_loss, params=tiny.PARAMS, batch=BATCH, chunk_size=2):
    return ssam_jax.empirical_fisher(loss_fn, params, batch, chunk_size=chunk_size)


@functools.cache
def state():
    return ssam_jax.ssam(0.1, EVERYTHING).init(tiny.params())


@functools.cache
def held():
    return ssam_jax.carried(optax.sgd(0.1), 0.1).init(tiny.params())


def two_pass(loss_fn=tiny.loss, params=tiny.PARAMS, active=None, mask=None, **options):
    return ssam_jax.two_pass_value_and_grad(loss_fn, **options)(params, BATCH, active=active, mask=mask)


def elsewhere(point):
    return two_pass()[2](point, 0)


def fast_step(tx, **options):
    _, grads, grad_fn = two_pass(**options)
    return step(tx, grads, grad_fn=grad_fn)


def explained(loss_fn=tiny.loss, params=tiny.PARAMS, active=None):
    return ssam_jax.explain_two_pass(loss_fn, params, BATCH, active=active)


def chosen(loss_fn=tiny.loss, scores=None, **options):
    scores = mapped(np.abs) if scores is None else scores
    return ssam_jax.choose_active(loss_fn, tiny.PARAMS, BATCH, scores=scores, **options)


MODEL, TX = nn.Dense(4), optax.chain(ssam_jax.ssam(0.1, EVERYTHING), optax.sgd(0.1))
DENSE = {"bias": np.ones(4, np.float32), "kernel": np.ones((4, 4), np.float32)}


def linen_loss(apply, x):
    return jnp.mean(apply(x)), None


def train_state(**fields):
    fields = {"apply_fn": MODEL.apply, "params": DENSE, "tx": TX, **fields}
    return ssam_jax.linen.TrainState.create(**fields)


def linen(loss_fn=linen_loss, fields=types.MappingProxyType({}), **options):
    return train_state(**fields).value_and_grad(loss_fn, BATCH, **options)


def apply(**changes):
    passes = linen()
    return train_state().apply_gradients(**{"grads": passes.grads, "grad_fn": passes.grad_fn, **changes})


def module():
    return nnx.Linear(4, 4, rngs=nnx.Rngs(0))


def nnx_loss(model, x):
    return jnp.mean(model(x))


def nnx_passes(loss_fn=nnx_loss, model=None, active=None, mask=None, **options):
    model = module() if model is None else model
    fn = ssam_jax.nnx.two_pass_value_and_grad(loss_fn, **options)
    return fn(model, BATCH, active=active, mask=mask)


def nnx_step(**changes):
    _, grads, grad_fn = nnx_passes()
    changes = {"grads": grads, "grad_fn": grad_fn, **changes}
    model = module()
    optimizer = ssam_jax.nnx.Optimizer(model, TX, wrt=nnx.Param)
    return optimizer.update(model, changes.pop("grads"), **changes)


def nnx_masked(mask=None, optimizer=None):
    optimizer = ssam_jax.nnx.Optimizer(module(), TX, wrt=nnx.Param) if optimizer is None else optimizer
    return ssam_jax.nnx.set_mask(optimizer, mask)


TYPE, VALUE = TypeError, ValueError

TABLE = {
    "ssam": [
        (lambda: ssam_jax.ssam(NAN), VALUE, "rho", "nan", "finite and at least 0"),
        (lambda: ssam_jax.ssam(jnp.array(NAN)), VALUE, "rho", "nan", "finite and at least 0"),
        (lambda: ssam_jax.ssam(jnp.array(-1.0)), VALUE, "rho", "-1", "finite and at least 0"),
        (lambda: ssam_jax.ssam(10**40), VALUE, "rho", str(10**40), "finite and at least 0"),
        (lambda: ssam_jax.ssam(1e39), VALUE, "rho", "1e+39", "finite and at least 0"),
        (lambda: ssam_jax.ssam([0.1]), TYPE, "rho", "[0.1]", "a float, a scalar array, an optax schedule or"),
        (lambda: ssam_jax.ssam("0.1"), TYPE, "rho", "'0.1'", "a float, a scalar array, an"),
        (lambda: ssam_jax.ssam(np.array(1j)), TYPE, "rho", "1.j", "a float, a scalar array, an"),
        (lambda: ssam_jax.ssam(jax.random.key(0)), TYPE, "rho", "key<fry>", "a float, a scalar array, an"),
        (lambda: ssam_jax.ssam(np.ones(2)), VALUE, "rho", "(2,)", "must be a scalar"),
        (lambda: ssam_jax.ssam(lambda a, b: 0.1), TYPE, "rho", "(a, b)", "rho(step)"),
        (lambda: radius(NAN), VALUE, "the schedule rho", "nan", "finite and at least 0"),
        (lambda: radius(-1.0), VALUE, "the schedule rho", "-1.0", "finite and at least 0"),
        (lambda: radius("x"), TYPE, "the schedule rho", "'x'", "a float or a scalar array"),
        (lambda: radius(None), TYPE, "the schedule rho", "None", "a float or a scalar array"),
        (lambda: radius(jnp.array(1j)), TYPE, "the schedule rho", "complex64", "a float or a scalar array"),
        (lambda: radius(jnp.ones(2)), VALUE, "the schedule rho", "(2,)", "must be a scalar"),
        (lambda: ssam_jax.ssam(0.1, HALF), TYPE, "mask", "Unstructured", "MaskRule such as fisher_mask"),
        (lambda: ssam_jax.ssam(0.1, BOOLS), TYPE, "mask", "array", "fixed_mask(tree)"),
        (lambda: ssam_jax.ssam(0.1, (1, 2)), TYPE, "mask", "(1, 2)", "MaskRule such as"),
        (lambda: ssam_jax.ssam(0.1, direction="x"), TYPE, "direction", "'x'", "optax.ema(0.9)"),
        (lambda: ssam_jax.ssam(0.1, direction=optax.ema), TYPE, "direction", "function", "optax.ema(0.9)"),
        (lambda: ssam_jax.ssam(0.1, combine=0.5), TYPE, "combine", "0.5", "combine.weighted(0.5)"),
        (lambda: ssam_jax.ssam(lambda step: 0.1, combine=ssam_jax.combine.looksam(0.5)), VALUE, "combine",
         "skip_zero_rho=True", "grad_fn=None"),
        (lambda: step(ssam_jax.ssam(0.1, direction=ssam_jax.directions.base_momentum())), TYPE,
         "base_momentum", "carried(optimizer, rho, direction=...)", "optax.trace(decay)"),
        (lambda: ssam_jax.ssam(0.1, normalize=["x"]), VALUE, "normalize", "['x']",
         "'global', 'masked' or 'leaf'"),
        (lambda: ssam_jax.ssam(0.1, normalize=np.ones(2)), VALUE, "normalize", "array", "'global', 'masked'"),
        (lambda: ssam_jax.ssam(0.1, adaptive=1), TYPE, "adaptive", "1", "bool"),
        (lambda: ssam_jax.ssam(0.1, ascent_steps=0), VALUE, "ascent_steps", "0", "at least 1"),
        (lambda: ssam_jax.ssam(0.1, ascent_steps=1.5), TYPE, "ascent_steps", "1.5", "int of at least 1"),
        (lambda: ssam_jax.ssam(0.1, skip_zero_rho=1), TYPE, "skip_zero_rho", "1", "bool"),
        *(
            (lambda p=p: ssam_jax.ssam(0.1).init({"a": p}), TYPE, "params", f"'a' is {name}", "split")
            for p, name in [
                (jnp.arange(3), "int32"),
                (jnp.ones(3, jnp.complex64), "complex64"),
                (jax.random.key(0), "key<fry>"),
                (np.array(["x"]), "<U1"),
                ("x", "str"),
                (object(), "object"),
            ]
        ),
        (lambda: dense(params=None), VALUE, "parameters", "tx.update(grads, state, params"),
        (lambda: dense(params=mapped(np.int32)), TYPE, "params", "int32", "split"),
        (lambda: dense(grads=mapped(np.int32)), TYPE, "the gradient", "int32", "jax.grad of a real loss"),
        (lambda: dense(grads=mapped(np.complex64)), TYPE, "the gradient", "complex64", "real loss"),
        (lambda: dense(grads=mapped(lambda p: p[None])), VALUE, "the gradient", SHAPE, "shapes of params"),
        (lambda: dense(grads=OTHERS), VALUE, "the gradient", STRUCTURE, "structure of params"),
        (lambda: dense(grads=(1.0, tiny.PARAMS)), VALUE, "the gradient", "got a tuple of 2",
         "gradient alone"),
        (lambda: step(ssam_jax.ssam(0.1), grad_fn=3), TYPE, "grad_fn", "3", "grad_fn(params, i)"),
        (lambda: dense(grad_fn=lambda: 1), TYPE, "grad_fn", "parameters ()", "grad_fn(params, i)"),
        (lambda: dense(grad_fn=lambda p: 1), TYPE, "grad_fn", "parameters (p)", "grad_fn(params, i)"),
        (lambda: dense(grad_fn=lambda p, i, j: 1), TYPE, "grad_fn", "(p, i, j)", "grad_fn(params, i)"),
        (lambda: dense(grad_fn=lambda p, i: None), VALUE, "grad_fn", "got None", "expected"),
        (lambda: dense(grad_fn=lambda p, i: (1.0, p)),
         VALUE, "grad_fn", "got a tuple of 2", "without loss or aux"),
        (lambda: dense(grad_fn=lambda p, i: mapped(np.int32)), TYPE, "grad_fn", "int32", "jax.grad"),
        (lambda: dense(grad_fn=lambda p, i: mapped(lambda p: p[None])), VALUE, "grad_fn", SHAPE, "shapes of"),
        (lambda: dense(state=optax.sgd(0.1).init(OTHERS)), TYPE, "state", "tuple", "init(params)"),
        (lambda: dense(state=state()._asdict()), TYPE, "state", "dict", "restored into tx.init(params)"),
        (lambda: dense(state=state()), TYPE, "no mask", "got one", "tx.init(params)"),
        (lambda: dense(state=ssam_jax.ssam(0.1).init(OTHERS)), VALUE, "state", "(1,)", "tx.init(params)"),
        (lambda: resumed(EVERYTHING, None), TYPE, "a mask", "got none", "tx.init(params)"),
        (
            lambda: step(ssam_jax.ssam(0.1, fisher()), *[mapped(lambda p: p[..., :2])] * 2,
                         ssam_jax.ssam(0.1, fisher()).init(tiny.params())),
            VALUE, "the mask", "(4,) does not broadcast against (2,)", "of other parameters: make it anew",
        ),
        (lambda: fast_step(ssam_jax.ssam(0.1), active=(True, False, False)), VALUE, "normalize", "'global'",
         "normalize='masked'"),
        (lambda: fast_step(ssam_jax.ssam(0.1, combine=ssam_jax.combine.gsam(0.1)), form="implicit",
                           mask=BOOLS), VALUE, "combine", "complete, exact gradient", "combine=None"),
        (lambda: fast_step(ssam_jax.ssam(0.1, normalize="masked", combine=ssam_jax.combine.gsam(0.1)),
                           active=(True, False, False)), VALUE, "combine", "active leaves alone", "combine="),
    ],
    "alternating": [
        (lambda: ssam_jax.alternating(0.1, 0.1), TYPE, "optimizer", "0.1", "optax.GradientTransformation"),
        (lambda: ssam_jax.alternating(0.1, optax.sgd(0.1)), TYPE, "rho", "Gradient", "float, a scalar array"),
        (lambda: ssam_jax.alternating(optax.sgd(0.1), NAN), VALUE, "rho", "nan", "finite and at least 0"),
        (lambda: ssam_jax.alternating(optax.sgd(0.1), 0.1, HALF), TYPE, "mask", "Unstructured", "MaskRule"),
        (lambda: turns(params=None), VALUE, "parameters", "tx.update(grads, state, params"),
        (lambda: turns(grads=OTHERS), VALUE, "the gradient", STRUCTURE, "structure of params"),
        (lambda: turns(grads=mapped(np.int32)), TYPE, "the gradient", "int32", "jax.grad"),
        (lambda: turns(state=state()), TYPE, "state", "SsamState", "init(params)"),
        (lambda: turns(ssam_jax.alternating(optax.sgd(0.1), 0.1, EVERYTHING).init(OTHERS)), VALUE,
         "state must be that of these parameters", "(1,)", "tx.init(params)"),
        (lambda: turns(turns()[1]._replace(anchor=OTHERS)), VALUE,
         "the anchor in the state", STRUCTURE, "tx.init(params)"),
        (lambda: turns(ssam_jax.alternating(optax.sgd(0.1), 0.1).init(tiny.params())), TYPE, "a mask",
         "got none",
         "tx.init(params)"),
    ],
    "alternating_eval_params": [
        (lambda: ssam_jax.alternating_eval_params(state(), tiny.PARAMS), VALUE, "opt_state",
         "one alternating,",
         "found 0"),
    ],
    "carried": [
        (lambda: ssam_jax.carried(0.1, 0.1), TYPE, "optimizer", "0.1", "optax.GradientTransformation"),
        (lambda: ssam_jax.carried(optax.sgd(0.1), NAN), VALUE, "rho", "nan", "finite and at least 0"),
        (lambda: ssam_jax.carried(optax.sgd(0.1), 0.1, HALF), TYPE, "mask", "Unstructured", "MaskRule"),
        (lambda: ssam_jax.carried(optax.sgd(0.1), 0.1, direction=1), TYPE, "direction", "1", "optax.ema"),
        (lambda: step(ssam_jax.carried(optax.sgd(0.1), 0.1), params=None), VALUE, "parameters", "tx.update("),
        (lambda: step(ssam_jax.carried(optax.sgd(0.1), 0.1), state=state()), TYPE, "CarriedState",
         "SsamState"),
        (lambda: step(ssam_jax.carried(optax.sgd(0.1), 0.1), state=held()._replace(center=OTHERS)), VALUE,
         "the center in the state", STRUCTURE, "tx.init(params)"),
        (lambda: step(ssam_jax.carried(optax.sgd(0.1), 0.1, direction=ssam_jax.directions.base_momentum())),
         VALUE, "base_momentum", "found 0", "momentum=0.9"),
    ],
    "carried_eval_params": [
        (lambda: ssam_jax.carried_eval_params(state(), tiny.PARAMS), VALUE, "opt_state",
         "exactly one carried",
         "found 0"),
    ],
    "carried_set_params": [
        (lambda: ssam_jax.carried_set_params(state(), tiny.PARAMS), VALUE, "opt_state",
         "exactly one carried"),
        (lambda: ssam_jax.carried_set_params(held(), OTHERS), VALUE, "params", STRUCTURE),
        (lambda: ssam_jax.carried_set_params(held(), mapped(np.float16)), TYPE, "params", "float16",
         "float32"),
    ],
    "Combine": [
        (lambda: ssam_jax.combine.weighted("x"), TYPE, "gamma", "'x'"),
        (lambda: ssam_jax.combine.weighted(NAN), VALUE, "gamma", "nan"),
        (lambda: ssam_jax.combine.gsam(-1.0), VALUE, "alpha", "-1.0", "from 0"),
        (lambda: ssam_jax.combine.looksam(-1.0), VALUE, "alpha", "-1.0", "from 0"),
        (lambda: ssam_jax.combine.looksam(0.5, scope="x"), VALUE, "scope", "'x'", "'global' or 'leaf'"),
    ],
    "directions": [
        (lambda: ssam_jax.directions.friendly(sigma=-1), VALUE, "sigma", "-1", "from 0"),
        (lambda: ssam_jax.directions.friendly(decay=1), VALUE, "decay", "1", "from 0 to below 1"),
        (lambda: ssam_jax.directions.noise(0.5), TYPE, "seed", "0.5", "integer"),
        (lambda: ssam_jax.directions.zscore(-1), VALUE, "threshold", "-1", "from 0"),
    ],
    "RadiusRule": [
        (lambda: ssam_jax.ssam(ssam_jax.RadiusRule(1, 2)), TYPE, "rho.init", "1", "rho.init(params)"),
        (lambda: ssam_jax.ssam(ssam_jax.RadiusRule(len, 2)), TYPE, "rho.update", "2", "state, grads, params"),
        (lambda: step(ssam_jax.ssam(
                         ssam_jax.RadiusRule(lambda params: (), lambda *args, **extra: ("x", ())))),
         TYPE, "the rule rho", "'x'", "a float or a scalar array"),
        (lambda: ssam_jax.radii.every(0, 0.1), VALUE, "k", "0", "at least 1"),
        (lambda: ssam_jax.radii.every(5, 0.1, start=-1), VALUE, "start", "-1", "at least 0"),
        (lambda: ssam_jax.radii.every(5, -0.1), VALUE, "rho", "-0.1", "finite and at least 0"),
        (lambda: ssam_jax.radii.bernoulli(1.5, 0.1, 0), VALUE, "p", "1.5", "from 0 to 1"),
        (lambda: ssam_jax.radii.bernoulli(0.5, 0.1, "x"), TYPE, "seed", "'x'", "integer"),
        (lambda: ssam_jax.radii.adaptive_gate(0.1, 0), VALUE, "total_steps", "0", "at least 1"),
        (lambda: ssam_jax.radii.adaptive_gate(0.1, 9, decay=1), VALUE, "decay", "1", "from 0 to below 1"),
        (lambda: ssam_jax.radii.adaptive_gate(0.1, 9, start="x"), TYPE, "start", "'x'", "float"),
    ],
    "eval_params": [
        (lambda: ssam_jax.eval_params((held(), held()), tiny.PARAMS), VALUE, "opt_state",
         "exactly one carried", "found 2"),
    ],
    "fisher_mask": [
        (lambda: fisher(Unstructured), TYPE, "pattern", "class", "Unstructured(sparsity=0.5)"),
        (lambda: fisher(decay=NAN), VALUE, "decay", "nan", "from 0 to below 1"),
        (lambda: fisher(decay="x"), TYPE, "decay", "'x'", "float from 0 to below 1"),
        (lambda: fisher(decay=jnp.ones(2)), TYPE, "decay", "[1., 1.]", "float from 0 to below 1"),
        (lambda: fisher(accumulator_dtype=np.ones(2)), VALUE, "accumulator_dtype", "[1., 1.]", "float32"),
        (lambda: fisher(accumulator_dtype="float16"), VALUE, "accumulator_dtype", "'float16'", "bfloat16"),
        (lambda: fisher(refresh_every=0), VALUE, "refresh_every", "0", "at least 1, or None"),
        (lambda: fisher(refresh_every=NAN), TYPE, "refresh_every", "nan", "int of at least 1"),
        (lambda: fisher(refresh_every=2**31), VALUE, "refresh_every", "2147483648", "below 2**31"),
        (lambda: fisher(seed=jax.random.key(0)), TYPE, "seed", "key<fry>", "integer"),
        (lambda: fisher(seed=None), TYPE, "seed", "None", "integer"),
        (lambda: fisher(seed=[1]), TYPE, "seed", "[1]", "integer"),
        (lambda: fisher(seed=2**63), VALUE, "seed", str(2**63), "below 2**63"),
        (lambda: fisher(packed=None), TYPE, "packed", "None", "bool"),
        (lambda: resumed(fisher(), dynamic()), VALUE, "memory of the mask rule", "got a tuple of 0",
         "of another rule"),
        (lambda: resumed(fisher(), fisher(refresh_every=None)), VALUE, "memory", "got a tuple of 0",
         "tx.init(params)"),
        (lambda: resumed(fisher(refresh_every=None), fisher()),
         VALUE, "expected a tuple of 0", "first", "set_mask"),
        (lambda: resumed(fisher(), fisher(Structured(0.5))), VALUE, "mask", "should be (), got (4,)", "anew"),
    ],
    "dynamic_mask": [
        (lambda: dynamic(NM(2, 4)), VALUE, "N:M pattern", "Use fisher_mask or random_mask"),
        (lambda: dynamic(Structured(0.5)), VALUE, "whole tensors", "unit='channel' or 'block'"),
        (lambda: dynamic(drop_fraction=NAN), VALUE, "drop_fraction", "nan", "from 0 to 1"),
        (lambda: dynamic(drop_fraction="x"), TYPE, "drop_fraction", "'x'", "from 0 to 1 or a schedule"),
        (lambda: dynamic(drop_fraction=lambda: 1), TYPE, "drop_fraction", "()", "drop_fraction(step)"),
        (lambda: traded(lambda step: "x"), TYPE, "drop_fraction", "'x'", "real scalar"),
        (lambda: traded(lambda step: jnp.ones(2)), TYPE, "drop_fraction", "float32[2]", "real scalar"),
        (lambda: dynamic(drop=np.ones(2)), VALUE, "drop", "[1., 1.]", "'gradient', 'weight' or 'random'"),
        (lambda: dynamic(grow="x"), VALUE, "grow", "'x'", "'gradient', 'weight' or 'random'"),
        (lambda: dynamic(grow=lambda params: params), TYPE, "grow", "(params)", "ascent_grads, descent"),
        (lambda: dynamic(score="both"), VALUE, "score", "'both'", "'descent' or 'ascent'"),
        (lambda: dynamic(score="ascent", drop="weight"), VALUE, "score", "drop='weight'", "grow='gradient'"),
        (lambda: step(ssam_jax.ssam(0.1, dynamic(drop=lambda p, a, d: 1.0))), VALUE, "what drop returns",
         "float", "structure of params"),
        (lambda: step(ssam_jax.ssam(0.1, dynamic(drop=lambda p, a, d: jax.tree.map(jnp.isfinite, p)))), TYPE,
         "what drop returns", "bool", "a score for each entry"),
        (lambda: dynamic(total_steps=2**31), VALUE, "total_steps", "2147483648", "below 2**31"),
        (lambda: dynamic(total_steps=NAN), TYPE, "total_steps", "nan", "int of at least 1"),
        (lambda: dynamic(refresh_every=None), VALUE, "refresh_every", "random_mask(pattern)"),
        (lambda: resumed(dynamic(), fisher()), VALUE, "memory of the mask rule", "first", "tx.init(params)"),
    ],
    "random_mask": [
        (lambda: ssam_jax.random_mask("x"), TYPE, "pattern", "'x'", "Unstructured(sparsity=0.5)"),
        (lambda: ssam_jax.random_mask(HALF, refresh_every=-1), VALUE, "refresh_every", "-1", "at least 1"),
        (lambda: ssam_jax.random_mask(HALF, seed=jax.random.PRNGKey(0)), TYPE, "seed", "[0, 0]", "integer"),
        (lambda: resumed(ssam_jax.random_mask(HALF, refresh_every=1), EVERYTHING), VALUE,
         "the mask that select returns", "should be (), got (4,)", "anew"),
    ],
    "fixed_mask": [
        (lambda: fixed(HALF), TYPE, "fixed_mask", "Unstructured", "random_mask(pattern)"),
        (lambda: fixed("bias"), TYPE, "mask", "str", "must be bool"),
        (lambda: fixed(None), VALUE, "fixed_mask", "None", "prefix of the parameters' tree"),
        (lambda: fixed(mapped(np.int32)), TYPE, "mask", "int32", "True means perturbed"),
        (lambda: fixed(mapped(lambda p: p * NAN)), TYPE, "mask", "float32", "must be bool"),
        (lambda: fixed({"first": True}), VALUE, "fixed_mask", "first", "prefix of the parameters' tree"),
        (lambda: fixed(lambda a, b: True), TYPE, "predicate", "(a, b)", "predicate(path)"),
        (lambda: fixed(lambda path: "yes"), TYPE, "predicate", "'yes' for 'first/bias'", "bool"),
        (lambda: fixed(lambda path: np.ones(3, bool)), VALUE, "'first/bias'", "(3,)", "against (4,)"),
        (lambda: resumed(EVERYTHING, fisher()), VALUE, "memory of the mask rule", "first", "anew"),
    ],
    "MaskRule": [
        (lambda: MaskRule(select=3), TYPE, "select", "3", "a function"),
        (lambda: MaskRule(1, 2, len), TYPE, "init", "1", "a function or None"),
        (lambda: own(selecting(None)), VALUE, "the mask", "got None", "expected"),
        (lambda: own(selecting(3)), VALUE, "the mask", "got a int", "expected"),
        (lambda: own(selecting(tiny.PARAMS)), TYPE, "the mask", "float32", "must be bool"),
        (lambda: own(selecting(mapped(lambda p: "x"))), TYPE, "the mask", "str", "must be bool"),
        (lambda: own(selecting(mapped(lambda p: np.ones((9, 9), bool)))), VALUE, "the mask", "(9, 9)",
         "broadcast against"),
        (lambda: own(selecting(BOOLS)), VALUE, "the mask that select returns", "should be (), got (4,)",
         "the one in the state"),
        (lambda: own(observe=lambda *args, **extra: None),
         VALUE, "what observe returns", "None", "structure of the memory"),
        (lambda: own(observe=lambda memory, *args, **extra: memory.astype(np.int32)),
         TYPE, "what observe returns", "int32", "dtypes of the memory"),
        (lambda: own(observe=lambda memory, *args, **extra: memory[:2]),
         VALUE, "what observe returns", "got (2,)", "shapes of the memory"),
    ],
    "Pattern": [
        (lambda: ssam_jax.Pattern(), TYPE, "Pattern", "__call__"),
    ],
    "Unstructured": [
        (lambda: Unstructured(NAN), VALUE, "sparsity", "nan", "from 0 to 1"),
        (lambda: Unstructured(50), VALUE, "sparsity", "50", "from 0 to 1"),
        (lambda: Unstructured("half"), TYPE, "sparsity", "'half'", "float from 0 to 1"),
        (lambda: Unstructured(True), TYPE, "sparsity", "True", "float from 0 to 1"),
        (lambda: Unstructured(0.5, scope=np.ones(2)), VALUE, "scope", "[1., 1.]", "'global' or 'leaf'"),
        (lambda: HALF({"a": "x"}), TYPE, "scores", "'a' is str", "real floating-point arrays"),
        (lambda: HALF(jnp.arange(3)), TYPE, "scores", "int32", "real floating-point arrays"),
        (lambda: HALF(jax.ShapeDtypeStruct((3,), jnp.float32)), TYPE, "scores", "ShapeDtypeStruct", "random"),
        (lambda: HALF.random(0, tiny.PARAMS), TYPE, "key", "got 0", "jax.random.key(seed)"),
        (lambda: HALF.random(jax.random.PRNGKey(0), tiny.PARAMS), TYPE, "key", "uint32", "wrap_key_data"),
        (lambda: HALF.random(jax.random.split(jax.random.key(0)), tiny.PARAMS), TYPE, "key", "(2,)", "one"),
        (lambda: HALF.random(OTHERS, jax.random.key(0)), TYPE, "key", "'a'", "jax.random.key(seed)"),
    ],
    "Structured": [
        (lambda: Structured(NAN), VALUE, "sparsity", "nan", "from 0 to 1"),
        (lambda: Structured(0.5, unit=["row"]), VALUE, "unit", "['row']", "'tensor', 'channel' or 'block'"),
        (lambda: Structured(0.5, axis=0), VALUE, "axis", "0", "None when unit is 'tensor'"),
        (lambda: Structured(0.5, unit="channel", axis=1.0), VALUE, "axis", "1.0", "must be an int"),
        (lambda: Structured(0.5, unit="block", block=0), VALUE, "block", "0", "at least 1"),
        (lambda: Structured(0.5, unit="block", block=NAN), VALUE, "block", "nan", "int or a tuple"),
        (lambda: Structured(0.5, unit="block", block=3)(tiny.PARAMS), VALUE, "'first/bias'", "block=3",
         "indivisible='whole'"),
        (lambda: Structured(0.5).random(0, tiny.PARAMS), TYPE, "key", "got 0", "jax.random.key(seed)"),
    ],
    "NM": [
        (lambda: NM(2.0, 4), TYPE, "n", "2.0", "int"),
        (lambda: NM(5, 4), VALUE, "n and m", "n=5, m=4", "0 <= n <= m"),
        (lambda: NM(2, 4, indivisible=None), VALUE, "indivisible", "None", "'error' or 'whole'"),
        (lambda: NM(2, 4, axis=3)(tiny.PARAMS), VALUE, "'first/kernel'", "no axis 3"),
        (lambda: NM(2, 3)(tiny.PARAMS), VALUE, "'first/kernel'", "m=3", "indivisible='whole'"),
        (lambda: NM(2, 4).random("x", tiny.PARAMS), TYPE, "key", "'x'", "jax.random.key(seed)"),
    ],
    "empirical_fisher": [
        (lambda: scores(loss_fn=None), TYPE, "loss_fn", "None", "loss_fn(params, example)"),
        (lambda: scores(loss_fn=lambda p: 1.0), TYPE, "loss_fn", "(p)", "loss_fn(params, example)"),
        (lambda: scores(loss_fn=lambda p, e: 3), TYPE, "loss_fn", "3", "real floating-point scalar"),
        (lambda: scores(loss_fn=lambda p, e: (example_loss(p, e), 1)), TYPE, "loss_fn", "1)", "scalar"),
        (lambda: scores(loss_fn=lambda p, e: e * p["first"]["bias"]), VALUE, "loss_fn", "(4,)", "scalar"),
        (lambda: scores(params={"a": jnp.arange(3)}), TYPE, "params", "int32", "split"),
        (lambda: scores(batch=()), VALUE, "batch", "[]", "(examples, ...)"),
        (lambda: scores(batch=np.ones((0, 4))), VALUE, "batch", "[(0,)]", "at least 1"),
        (lambda: scores(batch=(np.ones(2), np.ones(3))), VALUE, "batch", "[(2,), (3,)]", "agree"),
        (lambda: scores(batch={"text": np.array(["a"])}), TYPE, "batch", "'text' is <U1", "arrays of JAX"),
        (lambda: scores(chunk_size=0), VALUE, "chunk_size", "0", "at least 1"),
        (lambda: scores(chunk_size=NAN), TYPE, "chunk_size", "nan", "int of at least 1"),
    ],
    "get_mask": [
        (lambda: ssam_jax.get_mask(None), VALUE, "opt_state", "found 0 in a NoneType", "tx.init(params)"),
        (lambda: ssam_jax.get_mask(tiny.PARAMS), VALUE, "opt_state", "found 0 in a dict", "tx.init(params)"),
        (lambda: ssam_jax.get_mask((state(), state())), VALUE, "opt_state", "found 2", "exactly one"),
        (lambda: ssam_jax.get_mask(state()._asdict()), VALUE, "opt_state", "dict", "restore a checkpoint"),
        (lambda: ssam_jax.get_mask(state()._replace(mask={"bits": BOOLS})), VALUE, "opt_state", "dict",
         "restore a checkpoint into tx.init(params)"),
    ],
    "set_mask": [
        (lambda: ssam_jax.set_mask(BOOLS, state()), VALUE, "opt_state", "found 0", "tx.init(params)"),
        (lambda: ssam_jax.set_mask(ssam_jax.ssam(0.1).init(OTHERS), OTHERS),
         VALUE, "mask", "dense", "fisher_mask"),
        (lambda: ssam_jax.set_mask(state(), None), VALUE, "mask", "got None", "expected"),
        (lambda: ssam_jax.set_mask(state(), HALF), VALUE, "mask", "got a Unstructured", "expected"),
        (lambda: ssam_jax.set_mask(state(), tiny.PARAMS), TYPE, "mask", "float32", "True means perturbed"),
        (lambda: ssam_jax.set_mask(state(), mapped(lambda p: "x")), TYPE, "mask", "str", "must be bool"),
        (lambda: ssam_jax.set_mask(state(), mapped(lambda p: p > NAN)), VALUE, "mask", "(4,)",
         "the present mask's ()"),
    ],
    "active_leaves": [
        (lambda: ssam_jax.active_leaves({}), VALUE, "opt_state", "found 0 in a dict", "tx.init(params)"),
        (lambda: ssam_jax.active_leaves(jax.eval_shape(lambda: state())), TYPE, "opt_state",
         "ShapeDtypeStruct", "tx.init(params)"),
        (lambda: jax.jit(lambda s: ssam_jax.active_leaves(s))(state()), VALUE, "active_leaves", "under jit",
         "between steps"),
    ],
    "mask_stats": [
        (lambda: ssam_jax.mask_stats(3), VALUE, "opt_state", "found 0 in a int", "tx.init(params)"),
        (lambda: ssam_jax.mask_stats(jax.eval_shape(lambda: state())), TYPE, "opt_state",
         "ShapeDtypeStruct", "tx.init(params)"),
        (lambda: ssam_jax.mask_stats(mapped(lambda x: x[None], state())),
         VALUE, "mask_stats", "(1,)", "vmap"),
    ],
    "two_pass_value_and_grad": [
        (lambda: two_pass(loss_fn=3), TYPE, "loss_fn", "3", "function of (params, *args)"),
        (lambda: two_pass(loss_fn=lambda p, b: None), TYPE, "loss_fn", "None", "floating-point scalar"),
        (lambda: two_pass(loss_fn=lambda p, b: p["first"]["bias"]), VALUE, "loss_fn", "(4,)", "a scalar"),
        (lambda: two_pass(has_aux=True), TYPE, "loss_fn", "float32[]", "pair (loss, aux)"),
        (lambda: two_pass(has_aux=1), TYPE, "has_aux", "1", "bool"),
        (lambda: two_pass(strict=1), TYPE, "strict", "1", "bool"),
        (lambda: two_pass(form=np.ones(2)), VALUE, "form", "[1., 1.]", "'explicit' or 'implicit'"),
        (lambda: two_pass(params={"a": "x"}), TYPE, "params", "'a' is str", "split"),
        (lambda: two_pass(params=mapped(np.int32)), TYPE, "params", "int32", "split"),
        (lambda: two_pass(active=(True,)), VALUE, "active", "1 entries", "each of the 3 leaves"),
        (lambda: two_pass(active=(NAN, True, True)), TYPE, "active", "nan", "True, False or the first"),
        (lambda: two_pass(active=(None, True, True)), TYPE, "active", "None", "static argument of jit"),
        (lambda: two_pass(active=jnp.ones(3, bool)), VALUE, "active", "[ True,", "active_leaves"),
        (lambda: two_pass(active=(9, True, True)), VALUE, "active", "row 9", "one less than the first"),
        (lambda: two_pass(mask=BOOLS), VALUE, "mask", "form='explicit'", "form='implicit'"),
        (lambda: two_pass(form="implicit"), VALUE, "mask", "None", "get_mask(opt_state)"),
        (lambda: two_pass(form="implicit", mask=tiny.PARAMS), TYPE, "mask", "float32", "must be bool"),
        (lambda: two_pass(form="implicit", mask=OTHERS), VALUE, "mask", "'a'", "each of the 3 leaves"),
        (lambda: two_pass(form="implicit", mask=mapped(lambda m: m[None], BOOLS)),
         VALUE, "mask", "(1, 4)", "(4,)"),
    ],
    "TwoPassGradFn": [
        (lambda: elsewhere(None), VALUE, "grad_fn", "got None", "structure of params"),
        (lambda: elsewhere(mapped(lambda p: p[None])), VALUE, "grad_fn", SHAPE, "shapes of params"),
        (lambda: elsewhere(mapped(jnp.bfloat16)), TYPE, "grad_fn", "got bfloat16", "should be float32"),
    ],
    "FirstRow": [
        (lambda: FirstRow(-1), VALUE, "row", "-1", "at least 1"),
        (lambda: FirstRow(0), VALUE, "row", "0", "True for all rows"),
        (lambda: FirstRow(NAN), TYPE, "row", "nan", "int of at least 1"),
        (lambda: FirstRow(True), TYPE, "row", "True", "int of at least 1"),
    ],
    "explain_two_pass": [
        (lambda: explained(loss_fn=3), TYPE, "loss_fn", "3", "function of (params, *args)"),
        (lambda: explained(loss_fn=lambda p, b: (1.0, 2, 3)), TYPE, "loss_fn", "(1.0, 2, 3)", "scalar"),
        (lambda: explained(params={"a": jnp.arange(2)}), TYPE, "params", "int32", "split"),
        (lambda: explained(active=(True,)), VALUE, "active", "1 entries", "each of the 3 leaves"),
    ],
    "choose_active": [
        (lambda: chosen(loss_fn=None), TYPE, "loss_fn", "None", "function of (params, *args)"),
        (lambda: chosen(budget=NAN), VALUE, "budget", "nan", "finite and at least 1"),
        (lambda: chosen(budget="x"), TYPE, "budget", "'x'", "number of SGD steps"),
        (lambda: chosen(scores=OTHERS), VALUE, "scores", STRUCTURE, "structure of params"),
        (lambda: chosen(scores=mapped(lambda p: p * NAN)), VALUE, "scores", "'first/bias'", "finite and not"),
        (lambda: chosen(scores=mapped(lambda p: "x")), TYPE, "scores", "str", "real numbers"),
        (lambda: chosen(scores=mapped(np.complex64)), TYPE, "scores", "complex64", "real numbers"),
    ],
    "linen.TrainState": [
        (lambda: train_state(params={"a": jnp.arange(3)}), TYPE, "params", "int32", "split"),
        (lambda: linen(fields={"dropout_key": 3}), TYPE, "dropout_key", "3", "jax.random.key(seed)"),
        (lambda: linen(fields={"dropout_key": jax.random.split(jax.random.key(0))}), TYPE, "dropout_key",
         "(2,)", "None or one key"),
        (lambda: linen(None), TYPE, "loss_fn", "None", "function of (apply, *args)"),
        (lambda: linen(lambda apply, x: 1.0), TYPE, "loss_fn", "1.0", "pair (loss, aux)"),
        (lambda: linen(lambda apply, x: (apply(x), None)), VALUE, "loss_fn", "(3, 4)", "scalar"),
        (lambda: linen(lambda apply, x: (apply(x), None), shared=False),
         VALUE, "loss_fn", "(3, 4)", "scalar"),
        (lambda: linen(shared="no"), TYPE, "shared", "'no'", "bool"),
        (lambda: linen(shared=False, active=(True, True)), VALUE, "active", "(True, True)", "shared=True"),
        (lambda: linen(shared=False, form="x"), VALUE, "form", "'x'", "'explicit' or 'implicit'"),
        (lambda: linen(active=(True,)), VALUE, "active", "1 entries", "each of the 2 leaves"),
        (lambda: apply(grad_fn=3), TYPE, "grad_fn", "3", "grad_fn(params, i)"),
        (lambda: apply(grads=OTHERS), VALUE, "the gradient", "at 'bias' expected", "structure of params"),
        (lambda: train_state().apply_gradients(grads=DENSE), TYPE, "gradient function", "grad_fn=None"),
    ],
    "nnx.two_pass_value_and_grad": [
        (lambda: nnx_passes(loss_fn=3), TYPE, "loss_fn", "3", "function of (params, *args)"),
        (lambda: nnx_passes(wrt=3), TYPE, "wrt", "3", "such as nnx.Param"),
        (lambda: nnx_passes(wrt=nnx.LoRAParam), VALUE, "wrt", "LoRAParam", "nnx.Param"),
        (lambda: nnx_passes(model={"a": np.ones(3)}), VALUE, "model", "dict", "nnx.Param"),
        (lambda: nnx_passes(form="x"), VALUE, "form", "'x'", "'explicit' or 'implicit'"),
        (lambda: nnx_passes(active=(True,)), VALUE, "active", "1 entries", "each of the 2 leaves"),
        (lambda: nnx_passes(form="implicit", mask=(True,)), VALUE, "mask", "1 entries", "each of the 2"),
        (lambda: nnx_passes()[2](OTHERS, 0), VALUE, "leaves", "got one of 1", "the 2 leaves"),
    ],
    "nnx.Optimizer": [
        (lambda: nnx_step(grad_fn=3), TYPE, "grad_fn", "3", "grad_fn(params, i)"),
        (lambda: nnx_step(grads=(1.0, 2.0)), VALUE, "the gradient", " expected a", " got "),
    ],
    "nnx.set_mask": [
        (lambda: nnx_masked((True,)), VALUE, "mask", "got a tuple of 1", "expected"),
        (lambda: nnx_masked(DENSE), TYPE, "mask", "float32", "must be bool"),
        (lambda: nnx_masked(DENSE, optimizer=3), TYPE, "optimizer", "int", "nnx.Optimizer"),
    ],
}  # fmt: skip
ROWS = [(f"{name} {i}", *row) for name, rows in TABLE.items() for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("call", "error", "said"), [(c, e, s) for _, c, e, *s in ROWS], ids=[name for name, *_ in ROWS]
)
def test_a_bad_argument_is_refused_in_a_sentence(call, error, said):
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert raised.type is error
    assert [part for part in said if part not in message] == [], message
    assert len(said) >= 2


RESULTS = {  # what the library makes and takes back; the states in the wrong place are rows of the others
    "AlternatingState", "CarriedState", "MaskState", "SsamState", "MaskStats", "Part", "TwoPassReport",
}  # fmt: skip


def public(module, prefix=""):
    return {
        prefix + name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and value.__module__.startswith("ssam_jax")
    }


def test_every_public_callable_is_in_the_table():
    ours = public(ssam_jax) | {
        "linen.TrainState",
        *(f"nnx.{name}" for name in ("two_pass_value_and_grad", "Optimizer", "set_mask")),
    }
    assert {"ssam", "set_mask", "NM"} < ours
    assert set(TABLE) - {"directions"} | RESULTS == ours
    assert not set(TABLE) & RESULTS


def test_a_function_that_python_cannot_look_into_is_taken_on_trust():
    with pytest.raises(ValueError):
        inspect.signature(dict)
    checks.takes("grad_fn", dict, "params", "i")
    checks.takes("grad_fn", jax.jit(lambda params, i: params), "params", "i")
    checks.takes("grad_fn", functools.partial(lambda batch, params, i: params, BATCH), "params", "i")


def test_an_error_inside_grad_fn_is_the_users_own():
    with pytest.raises(ZeroDivisionError):
        dense(grad_fn=lambda params, i: 1 / 0)


@pytest.mark.parametrize("rho", [jnp.nan, -1.0])
def test_a_radius_that_is_traced_is_not_checked_and_a_nan_is_seen_in_the_gradient(rho):
    def taken(rho):
        tx = ssam_jax.ssam(rho)
        grads, _ = step(tx, params=tiny.params(), grad_fn=lambda p, i: p)
        return grads["first"]["bias"]

    assert jnp.all(jnp.isnan(jax.jit(taken)(rho)) == jnp.isnan(rho))


def test_a_schedule_of_nan_trades_nothing():
    tx = ssam_jax.ssam(0.1, dynamic(drop_fraction=lambda step: jnp.float32(NAN)))
    before = tx.init(tiny.params())
    _, after = step(tx, state=before)
    tiny.assert_same(ssam_jax.get_mask(after), ssam_jax.get_mask(before))


@pytest.mark.parametrize("restored", [dict, list])
def test_a_checkpoint_restored_without_a_template_is_refused_by_name(restored):
    plain = {"0": state()._asdict()} if restored is dict else [list(state())]
    for use in (ssam_jax.get_mask, ssam_jax.active_leaves, ssam_jax.mask_stats):
        with pytest.raises(ValueError, match=rf"found 0 in a {restored.__name__}.*restore a checkpoint into"):
            use(plain)
