"""Sparse SAM on one process or on one of several: ``python process_worker.py '{"process_id": 0, ...}'``."""

import json
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ssam_jax
from ssam_experiments.running import processes

STEPS, MIDDLE = 6, 3  # a mask is refreshed every second step: before, at and after the checkpoint
RULES = {
    "fisher": lambda: ssam_jax.fisher_mask(ssam_jax.Unstructured(0.5), refresh_every=2),
    "dynamic": lambda: ssam_jax.dynamic_mask(ssam_jax.Unstructured(0.5), refresh_every=2, total_steps=12),
}
PARAMS = {
    "first": {
        "bias": np.zeros(16, np.float32),
        "kernel": np.sin(np.arange(1, 8 * 16 + 1, dtype=np.float32)).reshape(8, 16),
    },
    "second": {"kernel": np.cos(np.arange(1, 16 * 8 + 1, dtype=np.float32)).reshape(16, 8)},
}
BATCHES = np.sin(np.arange(1, STEPS * 8 * 8 + 1, dtype=np.float32) ** 2).reshape(STEPS, 8, 8)
SPECS = {"first": {"bias": P("fsdp"), "kernel": P(None, "fsdp")}, "second": {"kernel": P("fsdp", None)}}


def loss(params, batch):
    hidden = jnp.tanh(batch @ params["first"]["kernel"] + params["first"]["bias"][None])
    return jnp.mean(jnp.square(hidden @ params["second"]["kernel"] - 1))


class Run:
    """A training run on a mesh of 2 by ``fsdp`` devices; ``fsdp=None`` is one device and no mesh.

    Attributes:
      carry: parameters and optimizer state of each rule.
      taken: steps taken.
    """

    def __init__(self, fsdp):
        self.chains = {
            name: optax.chain(ssam_jax.ssam(0.1, rule()), optax.sgd(0.1, momentum=0.9))
            for name, rule in RULES.items()
        }
        places = self.rows = self.whole = None
        if fsdp:
            mesh = Mesh(np.array(jax.devices()).reshape(2, fsdp), ("data", "fsdp"))
            self.rows, self.whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
            places = self.places(mesh)
        options = {"compiler_options": {"xla_backend_optimization_level": 0}}
        self.carry = jax.jit(self.start, out_shardings=places, **options)()
        self.compiled = jax.jit(self.step, donate_argnums=0, out_shardings=places, **options)
        self.gather = jax.jit(lambda tree: tree, out_shardings=self.whole)
        self.taken = 0

    def start(self):
        params = jax.tree.map(jnp.array, PARAMS)
        return {name: (params, tx.init(params)) for name, tx in self.chains.items()}

    def places(self, mesh):
        """Return shardings: a parameter's for all that has its shape, every device for the rest."""
        shapes = jax.tree.map(np.shape, PARAMS, is_leaf=lambda x: isinstance(x, np.ndarray))
        by_shape = {
            shape: NamedSharding(mesh, spec)
            for shape, spec in zip(
                jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, tuple)),
                jax.tree.leaves(SPECS, is_leaf=lambda x: isinstance(x, P)),
            )
        }
        return jax.tree.map(lambda x: by_shape.get(x.shape, self.whole), jax.eval_shape(self.start))

    def step(self, carry, batch):
        taken = {}
        for name, (params, state) in carry.items():
            grads = jax.grad(loss)(params, batch)
            updates, state = self.chains[name].update(
                grads, state, params, grad_fn=lambda p, i: jax.grad(loss)(p, batch)
            )
            taken[name] = optax.apply_updates(params, updates), state
        return taken

    def take(self):
        batch = BATCHES[self.taken % STEPS]
        if self.rows is not None:  # each process has its own rows and no others
            half = 2 * jax.process_index() // jax.process_count()
            own = batch if jax.process_count() == 1 else batch.reshape(2, -1, 8)[half]
            batch = jax.make_array_from_process_local_data(self.rows, own, batch.shape)
        self.carry = self.compiled(self.carry, batch)
        self.taken += 1

    def found(self):
        """Return parameters and masks as numpy arrays by path, ``{"fisher/mask/['first']['bias']": ...}``."""
        trees, active = {}, {}
        for name, (params, state) in self.carry.items():
            trees |= {f"{name}/params": params, f"{name}/mask": ssam_jax.get_mask(state)}
            active[f"{name}/mask/active"] = np.array(list(map(int, ssam_jax.active_leaves(state))))
        leaves = jax.tree_util.tree_flatten_with_path(self.gather(trees))[0]
        arrays = {path[0].key + "/" + jax.tree_util.keystr(path[1:]): np.asarray(x) for path, x in leaves}
        return arrays | active

    def train(self, until):
        """Return what was found after each step, by number."""
        history = {}
        while self.taken < until:
            self.take()
            history |= {f"{self.taken}/{name}": x for name, x in self.found().items()}
        return history

    def save(self, folder):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, self.carry)
            checkpointer.wait_until_finished()

    def restore(self, folder):
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.carry)
        with ocp.StandardCheckpointer() as checkpointer:
            self.carry = checkpointer.restore(folder, like)
        self.taken = MIDDLE


def main(coordinator, count, process_id, heartbeat, fsdp, folder, saved):
    """Train and write what was found, then go on from another run's checkpoint and write what that came to.

    Without another run's checkpoint, ``saved=None``, write one in the middle, and train on until killed.
    """
    processes.start(coordinator, count, process_id, heartbeat)
    folder = pathlib.Path(folder)

    def write(name, history):
        part = folder / f"part-{process_id}.npz"
        np.savez(part, **history)
        os.replace(part, folder / f"{name}-{process_id}.npz")

    with processes.all_or_none():
        run = Run(fsdp)
        history = run.train(MIDDLE)
        if saved is None:
            run.save(folder / "checkpoint")
        write("trained", history | run.train(STEPS))
        while saved is None:
            run.take()
            jax.block_until_ready(run.carry)
        run.restore(pathlib.Path(saved))
        restored = {f"{MIDDLE}/{name}": x for name, x in run.found().items()}
        write("resumed", restored | run.train(STEPS))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
