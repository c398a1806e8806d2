"""What a checkpoint is not, it is not taken for: damage, another run's, another step's, NaN."""

import contextlib
import dataclasses
import errno
import gc
import logging
import os
import pathlib
import resource
import shutil
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_same

from ssam_experiments import train
from ssam_experiments.config import Config
from ssam_experiments.damage import DAMAGES, damage
from ssam_experiments.running import checkpoints, fingerprint, integrity, loop, preparation
from ssam_experiments.running.files import RunError

pytestmark = pytest.mark.usefixtures("relaxed_promotion")


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compile without optimizations: nothing here runs long."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the settings and the end of a run of three steps; the checkpoints of the last two are there."""
    config = Config(
        model="mlp", limit=16, batch=16, epochs=3, method="ssam-fixed", perturb="head", evaluate_every=3,
        out=tmp_path_factory.mktemp("trained") / "run",
    )  # fmt: skip
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        state, _ = loop.train(config)
    return config, state


@pytest.fixture
def run(trained, tmp_path):
    """Return the settings of a copy of the run, to be spoiled."""
    config = dataclasses.replace(trained[0], out=tmp_path / "run")
    shutil.copytree(trained[0].out, config.out)
    return config


def refusal(config, **changes):
    """Return the sentence with which a run is refused."""
    with pytest.raises(RunError) as caught:
        loop.train(dataclasses.replace(config, **changes))
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)
    return str(caught.value)


def parameters(state):
    return jax.tree.map(np.asarray, (state.params, state.opt_state, state.step))


def test_no_damage_passes_and_each_is_named(trained, tmp_path):
    rng, kinds, folder, at = np.random.default_rng(0), set(), trained[0].out / "checkpoints", tmp_path / "3"
    for _ in range(40):
        shutil.rmtree(at, ignore_errors=True)
        shutil.copytree(folder / "3", at)
        integrity.verify(at, integrity.read(at))
        kind, path = damage(rng, at, folder / "2")
        kinds.add(kind)
        with pytest.raises(integrity.DamageError, match=path.name):
            integrity.verify(at, integrity.read(at))
    assert kinds == {*DAMAGES, "add"}


def test_a_damaged_checkpoint_is_refused_by_file_and_the_one_before_resumes_to_the_same_end(run, trained):
    folder = run.out / "checkpoints"
    _, path = damage(np.random.default_rng(1), folder / "3", folder / "2", kinds=("flip",))
    sentence = refusal(run)
    assert sentence.startswith(f"{path} is damaged: its checksum") or path.name == integrity.NAME
    assert "The checkpoint of step 2 is intact: add --resume-from 2" in sentence and "delete" in sentence
    state, rows = loop.train(dataclasses.replace(run, resume_from=2))
    assert_same(parameters(state), parameters(trained[1]))
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3", "3.aside"]
    assert loop.train(run)[1] == rows  # from the new one, which is intact


def test_where_no_checkpoint_is_intact_none_is_recommended(run):
    for step in "23":
        (run.out / "checkpoints" / step / integrity.NAME).unlink()
    sentence = refusal(run)
    assert sentence.startswith(f"{run.out}/checkpoints/3/{integrity.NAME} is missing.")
    assert "No earlier checkpoint is intact" in sentence and "--resume-from" not in sentence
    assert refusal(run, resume_from=1) == (
        f"--resume-from must be the step of a checkpoint in {run.out}/checkpoints, got 1; there are 2, 3."
    )


def test_a_file_that_may_not_be_read_is_not_to_be_deleted(run, monkeypatch):
    def forbidden(path, **_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(integrity, "_measured", forbidden)
    sentence = refusal(run)
    assert (
        "3/arrays/" in sentence and "cannot be read: Permission denied. Give this user the right" in sentence
    )
    assert "elete" not in sentence and "aside" not in sentence and "nothing is damaged" in sentence


def test_a_checkpoint_of_another_step_is_refused(run):
    folder = run.out / "checkpoints"
    (folder / "3").rename(folder / "4")
    assert "checkpoints/4 is the checkpoint of step 3, so its folder was renamed" in refusal(run)
    shutil.rmtree(folder / "4")
    shutil.copytree(folder / "2", folder / "3")
    assert "checkpoints/3 is the checkpoint of step 2" in refusal(run)


def test_settings_are_in_the_checkpoint_too(run):
    settings = run.out / "config.json"
    text = settings.read_text()
    settings.unlink()
    with pytest.raises(ValueError, match=r"holds a run of other settings \(rho\): name another folder"):
        loop.train(dataclasses.replace(run, rho=0.3))
    assert not settings.exists()
    loop.train(run)
    assert settings.read_text() == text
    settings.write_text(text.replace('"rho": 0.1', '"rho": 0.3'))
    assert "checkpoints/3 is the checkpoint of another run: its settings are others (rho)" in refusal(
        run, rho=0.3
    )
    settings.write_text(text[: len(text) // 2])
    assert refusal(run).startswith(f"{settings} is damaged: it does not hold settings. Delete it")


def test_a_run_that_has_ended_and_lost_its_metrics_says_so(run):
    (run.out / "metrics.jsonl").unlink()
    flags = (
        "--model mlp --limit 16 --batch 16 --epochs 3 --method ssam-fixed --perturb head --evaluate-every 3"
    )
    with pytest.raises(SystemExit, match=r"metrics\.jsonl has none of its epochs to show"):
        train.main([*flags.split(), "--out", str(run.out)])


def test_fingerprints_differ_by_data_dtype_and_the_settings_of_jax():
    tree = {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    here = fingerprint.of({"rho": 0.1}, "123", tree)
    assert fingerprint.difference(fingerprint.plain(here), here) is None
    assert (
        fingerprint.difference({**here, "settings": {}}, here) is None
    )  # the default, of a run that is older
    assert (
        fingerprint.difference({**here, "data": "124"}, here) == "its data are others, or have changed since"
    )
    half = fingerprint.of({"rho": 0.1}, "123", jax.tree.map(lambda x: x.update(dtype=jnp.bfloat16), tree))
    sentence = "the array ['w'] was bfloat16[2, 3] and is float32[2, 3] now"
    assert fingerprint.difference(half, here) == sentence
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        double = fingerprint.of({"rho": 0.1}, "123", tree)
    assert fingerprint.difference(here, double) == "JAX's jax_enable_x64 was False and is True now"
    other = fingerprint.of({"rho": 0.2}, "123", tree)
    assert fingerprint.difference(other, here) == "its settings are others (rho)"
    assert fingerprint.difference(other, here, but=("rho",)) is None


def fashion(folder, seed):
    """Write a Fashion-MNIST of 16 images."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        for name, shape in (("images-idx3", (16, 28, 28)), ("labels-idx1", (16,))):
            values = rng.integers(0, 10, shape, np.uint8)
            sizes = struct.pack(f">{len(shape)}I", *shape)
            (folder / f"{part}-{name}-ubyte").write_bytes(
                bytes([0, 0, 8, len(shape)]) + sizes + values.tobytes()
            )


def test_data_count_by_what_they_are_not_by_where(tmp_path, monkeypatch):
    for place, seed in (("here", 0), ("there", 1), ("moved", 0)):
        fashion(tmp_path / place / "data", seed)
    config = Config(
        dataset="fashion-mnist", data=pathlib.Path("data"), model="mlp", batch=16, epochs=1,
        out=tmp_path / "run",
    )  # fmt: skip
    monkeypatch.chdir(tmp_path / "here")
    state, _ = loop.train(config)
    monkeypatch.chdir(tmp_path / "there")
    assert "another run: its data are others, or have changed since" in refusal(config)
    monkeypatch.chdir(tmp_path / "moved")
    assert_same(parameters(loop.train(config)[0]), parameters(state))
    monkeypatch.chdir(tmp_path)
    assert_same(parameters(loop.load(config.out)[1]), parameters(state))  # where they were last


def test_a_run_that_is_killed_while_it_saves_resumes_from_the_checkpoint_before(
    run, trained, monkeypatch, capfd
):
    folder, write = run.out / "checkpoints", integrity.write
    shutil.rmtree(folder / "3")

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(integrity, "write", killed)  # all arrays are on the disk
    with pytest.raises(KeyboardInterrupt):
        loop.train(run)
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3.unfinished"]
    monkeypatch.setattr(integrity, "write", write)
    assert_same(parameters(loop.train(run)[0]), parameters(trained[1]))
    assert (
        "checkpoints/3.unfinished is not a complete checkpoint: step 2 is the last" in capfd.readouterr().err
    )
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]


def test_what_is_not_finite_is_not_saved(run, trained):
    feed, programs = preparation.prepare(run)
    with loop._store(run, feed) as store:
        state = trained[1]
        for spoiled, name in (
            (state.replace(params=jax.tree.map(lambda x: x.at[-1].set(jnp.nan), state.params)), "params"),
            (state.replace(opt_state=jax.tree.map(infinite, state.opt_state)), "opt_state"),
        ):
            with pytest.raises(FloatingPointError, match=rf"\.{name}.* is not finite at step 7;.*step 3, is"):
                checkpoints.save(store, checkpoints.Position(7, spoiled, programs.no_totals()))
        assert store.steps() == [2, 3]


def test_a_checkpoint_replaces_one_of_the_same_step(run, trained):
    feed, programs = preparation.prepare(run)
    totals = jax.tree.map(jnp.ones_like, programs.no_totals())
    with loop._store(run, feed) as store:
        checkpoints.save(store, checkpoints.Position(3, trained[1], totals))
        assert_same(checkpoints.resume(store, trained[1], programs.no_totals()).totals, totals)
    assert sorted(path.name for path in store.folder.iterdir()) == ["2", "3"]


def infinite(leaf):
    return jnp.full_like(leaf, jnp.inf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what Orbax leaves behind
def test_a_full_disk_ends_a_run_in_a_sentence_and_costs_no_checkpoint(run, trained, caplog):
    folder = run.out / "checkpoints"
    shutil.rmtree(folder / "3")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a disk that takes small files alone
    try:
        sentence = refusal(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sentence.startswith(f"{folder}/3.unfinished cannot be written: File too large. Free some space")
    assert not caplog.records  # of Orbax, with traces
    gc.collect()  # of what was writing the file, which complains as it goes
    assert_same(parameters(loop.train(run)[0]), parameters(trained[1]))


@pytest.mark.parametrize("fails", [True, False])
def test_tasks_that_a_failed_save_leaves_behind_are_not_reported(fails, monkeypatch, caplog):
    tasks = logging.getLogger("asyncio")
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    level = tasks.level
    tasks.setLevel(logging.NOTSET)
    try:
        with contextlib.suppress(OSError), checkpoints._quiet():
            if fails:
                raise OSError(errno.ENOSPC, "full")
        tasks.error("Task exception was never retrieved")
        assert bool(caplog.records) is not fails
    finally:
        tasks.setLevel(level)
