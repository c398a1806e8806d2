"""A damaged or foreign checkpoint is refused in a sentence that names it and the remedy."""

import dataclasses
import gc
import os
import shutil

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from ssam_experiments.config import Config
from ssam_experiments.running import checkpoints, loop


def truncated(folder):
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def without_its_files(folder):
    shutil.rmtree(next(folder.glob("*/default")))


def foreign(folder):
    shutil.rmtree(folder)
    with ocp.CheckpointManager(folder) as manager:
        manager.save(1, args=ocp.args.StandardSave({"weights": jnp.ones(3)}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the settings of a run of one step, which has left a checkpoint."""
    config = Config(
        model="mlp", limit=16, batch=16, epochs=1, method="ssam-fixed", perturb="head",
        out=tmp_path_factory.mktemp("trained") / "run",
    )  # fmt: skip
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        loop.train(config)
        yield config
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what Orbax leaves behind
@pytest.mark.usefixtures("relaxed_promotion")
@pytest.mark.parametrize("damage", [truncated, without_its_files, foreign])
def test_the_trainer_says_which_checkpoint_it_cannot_read_and_what_to_do(trained, damage, tmp_path):
    config = dataclasses.replace(trained, out=tmp_path / "run")
    shutil.copytree(trained.out, config.out)
    damage(config.out / "checkpoints")
    with pytest.raises(
        checkpoints.CheckpointError, match=r"checkpoints/1 cannot be read.*Delete it.*another --out"
    ):
        loop.train(config)
    gc.collect()  # of what was reading the truncated file, which complains as it goes
