"""The trainer trains with every method, compiles little, resumes exactly, and reports what it did."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2
from tiny import assert_close, assert_same
from tqdm import tqdm

import ssam_jax
from ssam_experiments import compare, train
from ssam_experiments.config import Config
from ssam_experiments.running import layerwise, loop, preparation
from ssam_experiments.running.files import read_rows
from ssam_experiments.running.stopping import Stop, Stopped

pytestmark = pytest.mark.usefixtures("relaxed_promotion", "quick_compilation")

SMALL = Config(model="mlp", limit=64, batch=16, epochs=2, fisher_samples=8, evaluate_every=2)
TWO_OF_FOUR = {"method": "ssam-f", "pattern": "n:m"}
CARRIED = {"method": "sam", "carrier": "carried"}
METHODS = {
    "plain, adamw": {"optimizer": "adamw", "lr": 1e-3},
    "sam, adam": {"method": "sam", "optimizer": "adam", "lr": 1e-3, "adaptive": True},
    "sam on a part of the batch": {"method": "sam", "ascent_fraction": 0.25},
    "ssam-f": {"method": "ssam-f"},
    "ssam-f, running": {**TWO_OF_FOUR, "fisher": "running"},
    "ssam-f, tensors": {"method": "ssam-f", "pattern": "structured", "normalize": "masked"},
    "all but the first layer, implicit": {
        "method": "ssam-fixed",
        "perturb": "hidden_2|head",
        "form": "implicit",
    },
    "ssam-f, 2:4, implicit": {**TWO_OF_FOUR, "form": "implicit"},
    "ssam-d": {"method": "ssam-d", "grow": "gradient", "drop": "weight"},
    "ssam-d, channels": {"method": "ssam-d", "pattern": "structured", "unit": "channel"},
    "carried, ssam-f, a tail": {"method": "ssam-f", "carrier": "carried", "tail_epochs": 1},
    "msam, adamw": {**CARRIED, "direction": "against-momentum", "optimizer": "adamw", "lr": 1e-3},
    "looksam, friendly, at random": {
        "method": "sam",
        "combine": "looksam",
        "direction": "friendly",
        "ascent_chance": 0.5,
    },
    "ae-sam, two steps": {"method": "sam", "ascent_gate": True, "ascent_steps": 2},
    "layerwise, gsam": {"method": "sam", "direction": "layerwise", "combine": "gsam", "rho": 0.01},
    "the head alone": {"method": "ssam-fixed", "perturb": "^head/", "normalize": "masked"},
}


@pytest.fixture(scope="module")
def quick_compilation():
    """Compile without optimizations: nothing here runs long."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def trained(tmp_path, **changes):
    config = dataclasses.replace(SMALL, **{"out": tmp_path / "run", **changes})
    return config, *loop.train(config)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(tmp_path, name):
    config, state, rows = trained(tmp_path, **METHODS[name])
    assert int(state.step) == rows[-1]["step"] == 8 and np.isfinite(rows[-1]["test_loss"])
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    if config.method.startswith("ssam"):
        assert 0 < rows[-1]["density"] <= 1
    assert rows == read_rows(config.out / "metrics.jsonl")


def test_a_carried_run_that_is_a_tail_from_the_start_is_sam(tmp_path):
    _, carried, _ = trained(tmp_path / "carried", **CARRIED, tail_epochs=2)
    _, sam, _ = trained(tmp_path / "sam", method="sam")
    assert_close(carried.eval_params, sam.params)
    assert_close(carried.params, sam.params)


def test_a_carried_run_is_measured_at_the_parameters_it_does_not_hold(tmp_path):
    config, state, rows = trained(tmp_path, **CARRIED, rho=0.5)
    feed, programs = preparation.prepare(config)
    distance = optax.tree.norm(jax.tree.map(jnp.subtract, state.params, state.eval_params))
    assert float(distance) == pytest.approx(0.5, rel=1e-3)
    elsewhere = state.replace(params=jax.tree.map(jnp.zeros_like, state.params))
    assert loop.evaluate(config, feed, programs, elsewhere)["test_loss"] == rows[-1]["test_loss"]
    examples = feed.examples(0, 0, 32)
    assert_same(*(programs.rise(s, *examples, np.float32(0.1)) for s in (state, elsewhere)))


def test_checkpoints_are_as_many_epochs_apart_as_asked_and_the_last_epoch_has_one():
    config = dataclasses.replace(SMALL, epochs=7, checkpoint_epochs=3)
    assert [epoch for epoch in range(7) if loop.saves(config, epoch)] == [2, 5, 6]
    assert all(loop.saves(SMALL, epoch) for epoch in range(2))


def test_steps_ascend_by_chance_as_often_as_asked_and_the_same_in_a_resumed_run():
    config = dataclasses.replace(SMALL, method="sam", ascent_chance=0.25)
    drawn = [loop.ascends(config, 0, step) for step in range(400)]
    assert 70 < sum(drawn) < 130 and drawn[100:] == [loop.ascends(config, 0, i) for i in range(100, 400)]
    assert drawn != [loop.ascends(dataclasses.replace(config, seed=1), 0, step) for step in range(400)]


def test_a_layerwise_perturbation_gives_each_tensor_a_length_of_its_own():
    params = {"kernel": jnp.ones((3, 3, 2, 8)), "scale": jnp.ones(16)}
    tx, points = ssam_jax.ssam(layerwise.radius(0.5), direction=layerwise.direction()), []
    grads = {"kernel": jnp.full((3, 3, 2, 8), 7.0), "scale": jnp.full(16, 0.01)}
    tx.update(grads, tx.init(params), params, grad_fn=lambda point, i: points.append(point) or grads)
    eps = jax.tree.map(lambda p, w: float(jnp.linalg.norm((p - w).ravel())), points[0], params)
    assert eps == pytest.approx({"kernel": 0.5 * (8 / 18) ** 0.5, "scale": 0.5 * 4}, rel=1e-4)


def test_seeds_and_radii_share_what_is_compiled(tmp_path):
    for seed, rho in ((0, 0.1), (1, 0.1), (1, 0.2)):
        config, _, _ = trained(tmp_path / f"{seed} {rho}", method="sam", seed=seed, rho=rho, ascent_every=3)
    programs = preparation.prepare(config).programs
    assert programs.step._cache_size() == 2  # with the ascent, and without
    assert [f._cache_size() for f in (programs.init, programs.evaluate, programs.no_totals)] == [1, 1, 1]


def test_steps_ascend_when_they_are_to():
    config = dataclasses.replace(SMALL, method="sam", ascent_every=4, ascent_from=2)
    assert [loop.ascends(config, step // 5, step) for step in range(20)].count(True) == 2
    assert loop.ascends(config, 2, 12) and not loop.ascends(config, 1, 8) and not loop.ascends(config, 2, 13)
    assert not loop.ascends(dataclasses.replace(config, method="plain"), 2, 12)


def test_a_step_without_the_ascent_is_one_of_the_base_optimizer(tmp_path):
    plain = trained(tmp_path / "plain")[1]
    never = trained(tmp_path / "never", method="sam", ascent_from=2)[1]
    assert_same(never.params, plain.params)


def test_a_mask_is_refreshed_at_the_end_of_an_epoch_and_not_before(tmp_path):
    _, state, rows = trained(tmp_path, method="ssam-f", refresh_epochs=2, epochs=4)
    first, second, third, fourth = (row["density_by_leaf"] for row in rows)
    assert first == second != third == fourth
    assert fourth != {
        path: float(share) for path, share in ssam_jax.mask_stats(state.opt_state).by_leaf.items()
    }


def test_eight_devices_train_as_one(tmp_path):
    options = {**TWO_OF_FOUR, "fisher": "running", "model": "resnet6", "epochs": 1, "limit": 32, "lr": 0.01}
    one = trained(tmp_path / "one", **options)
    eight = trained(tmp_path / "eight", **options, devices=8)
    assert len(jax.tree.leaves(eight[1].params)[0].sharding.device_set) == 8
    for a, b in zip(jax.tree.leaves(one[1].params), jax.tree.leaves(eight[1].params)):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert one[2][-1]["train_loss"] == pytest.approx(eight[2][-1]["train_loss"], rel=1e-4)


def test_bfloat16_trains_with_parameters_and_statistics_in_float32(tmp_path):
    _, state, rows = trained(tmp_path, method="sam", model="resnet6", precision="bfloat16", epochs=1)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.batch_stats))} == {
        np.dtype("float32")
    }
    assert np.isfinite(rows[-1]["train_loss"])


def test_imagenet_is_streamed(tmp_path):
    rng = np.random.default_rng(0)
    for split, name in itertools.product(("train", "val"), ("cat", "dog")):
        (tmp_path / split / name).mkdir(parents=True)
        for i in range(5):
            image = Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8))
            image.save(tmp_path / split / name / f"{i}.png")
    options = {"dataset": "imagenet", "data": tmp_path, "limit": None, "batch": 4, "workers": 0}
    config, state, rows = trained(tmp_path, **options, cutout=True, lr=1e-4)
    assert int(state.step) == rows[-1]["step"] == 4 and np.isfinite(rows[-1]["train_loss"])
    assert rows[-1]["test_accuracy"] in {right / 10 for right in range(11)}  # the padding does not count
    images, labels = preparation.prepare(config).feed.examples(0, 0, 8)
    assert images.shape == (8, 224, 224, 3) and images.dtype == np.uint8 and {*labels} == {0, 1}


def test_a_run_that_diverges_keeps_its_last_finite_checkpoint(tmp_path):
    sentence = (
        r"the training loss is not finite at step 2; the last checkpoint, of step 1, is finite and stays"
    )
    with pytest.raises(FloatingPointError, match=f"{sentence}.*Lower --lr.*another --out"):
        trained(tmp_path, lr=1e20, checkpoint_every=1)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]
    with pytest.raises(FloatingPointError, match="the training loss is not finite at step 4; there is no"):
        trained(tmp_path / "at the end of an epoch", lr=1e20)


def test_a_folder_with_another_run_is_refused(tmp_path):
    config, _, rows = trained(tmp_path, epochs=1)
    with pytest.raises(ValueError, match=r"holds a run of other settings \(batch, rho\)"):
        loop.train(dataclasses.replace(config, rho=0.3, batch=8))
    assert loop.train(dataclasses.replace(config, checkpoint_every=1))[1] == rows  # finished: nothing is done


def settled(row):
    """Return metrics without those of the clock."""
    return {name: value for name, value in row.items() if name not in ("seconds", "images_per_second")}


def test_a_killed_run_ends_as_one_that_was_not(tmp_path):
    options = {**TWO_OF_FOUR, "validation": 64, "limit": 256, "epochs": 6, "checkpoint_every": 5}
    config, state, rows = trained(tmp_path / "whole", **options, evaluate_every=1)
    changed = dataclasses.replace(config, out=tmp_path / "killed")
    flags = []
    for field in dataclasses.fields(changed):
        value = getattr(changed, field.name)
        if value != getattr(Config(), field.name):
            flags += [f"--{field.name.replace('_', '-')}", str(value)]
    command = [sys.executable, "-m", "ssam_experiments.train", *flags]
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    # What the killed run has compiled, the one that goes on reads.
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "compiled")
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    metrics = changed.out / "metrics.jsonl"
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(read_rows(metrics)) < 2 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and 2 <= len(read_rows(metrics)) < 6
    resumed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert "\nepoch 6 of 6: training loss " in resumed.stdout and "%, test accuracy " in resumed.stdout
    assert "step/s" not in resumed.stderr and "\r" not in resumed.stderr  # a bar is for a terminal
    assert [settled(row) for row in read_rows(metrics)] == [settled(row) for row in rows]
    final = loop.train(changed)[0]  # finished: the last checkpoint is read
    assert_same(arrays(final), arrays(state))
    assert {"learning_curves.png", "mask_density.png"} <= {path.name for path in changed.out.iterdir()}


def arrays(state):
    """Return all of a state, its key as bytes."""
    key = jax.random.key_data(state.dropout_key)
    return jax.tree.map(np.asarray, (state.params, state.batch_stats, state.opt_state, key, state.step))


class StopAt(Stop):
    """Says that a run is to stop, at one of the calls."""

    def __init__(self, call):
        super().__init__()
        self.set(call, signal.SIGTERM)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, quick_compilation):
    """Return the settings of a run of two epochs with three batches of evaluation each, and how it ended."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        config, state, rows = trained(folder, method="ssam-f", validation=64, evaluate_every=1)
    return config, arrays(state), [settled(row) for row in rows]


# Of each epoch: four steps, and an evaluation of one batch and of one.
@pytest.mark.parametrize(
    ("calls", "steps"),
    [((2,), (2,)), ((4,), (4,)), ((5,), (4,)), ((6,), (4,)), ((7, 1, 1, 2), (5, 6, 7, 8)), ((12,), (8,))],
)
def test_a_run_that_was_stopped_anywhere_ends_as_one_that_was_not(tmp_path, uninterrupted, calls, steps):
    config, state, rows = uninterrupted
    config = dataclasses.replace(config, out=tmp_path)
    for call, step in zip(calls, steps):
        with pytest.raises(Stopped, match=f"stopped by SIGTERM after step {step}, which is saved") as raised:
            loop.train(config, StopAt(call))
        assert raised.value.code == 143 and max(saved(tmp_path)) == step
    final, found = loop.train(config)
    assert [settled(row) for row in found] == [settled(row) for row in read_rows(tmp_path / "metrics.jsonl")]
    assert [settled(row) for row in found] == rows
    assert_same(arrays(final), state)
    assert_same(arrays(loop.train(config)[0]), state)  # what was saved at the end


def saved(folder):
    """Return the steps of which there are checkpoints."""
    return [int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal()]


def test_metrics_written_after_the_last_checkpoint_are_written_again(tmp_path):
    config, _, rows = trained(tmp_path)
    with (config.out / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": 3}) + '\n{"epoch": 4, "tr')
    assert loop.train(config)[1] == rows == read_rows(config.out / "metrics.jsonl")


def test_tensorboard_gets_the_numbers(tmp_path):
    config, _, rows = trained(tmp_path, tensorboard=True)
    (path,) = (config.out / "tensorboard").iterdir()
    written = [(event.step, value) for event in events(path) for value in event.summary.value]
    losses = {step: value.simple_value for step, value in written if value.tag == "train_loss"}
    assert losses == {row["step"]: np.float32(row["train_loss"]) for row in rows}


def events(path):
    """Yield the events of a file for TensorBoard: each after its length and a checksum, before another."""
    data = path.read_bytes()
    while data:
        size = int.from_bytes(data[:8], "little")
        yield event_pb2.Event.FromString(data[12 : 12 + size])
        data = data[12 + size + 4 :]


class Board:
    """Stands for the module wandb, which needs an account or a service of its own."""

    def __init__(self):
        self.runs, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.runs.append(options)
        return self

    def log(self, row, step):
        self.logged.append((step, row))

    def finish(self):
        self.finished += 1


def test_wandb_gets_the_numbers_and_a_folder_is_a_run(tmp_path, monkeypatch):
    board = Board()
    monkeypatch.setitem(sys.modules, "wandb", board)
    _, _, rows = trained(tmp_path / "a", wandb=True)
    for folder in ("a", "b"):
        trained(tmp_path / folder, wandb=True)
    assert board.logged[: len(rows)] == [(row["step"], row) for row in rows]
    assert [run["name"] for run in board.runs] == ["run"] * 3 and board.finished == 3
    first, again, other = (run["id"] for run in board.runs)
    assert first == again != other


def test_a_module_that_is_missing_is_named_before_anything_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="error: --wandb needs wandb: pip install wandb"):
        train.main(["--wandb", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_command_line_says_in_a_sentence_what_is_wrong(tmp_path, capsys):
    for flags, sentence in (
        (
            ["--method", "ssam-f", "--form", "implicit"],
            "--form implicit --pattern unstructured saves no work",
        ),
        (["--dataset", "cifar10", "--data", str(tmp_path / "none")], "none"),
        (["--model", "vgg11-bn"], "32x32"),
        (
            ["--method", "ssam-fixed", "--perturb", "Head", "--model", "mlp"],
            "--perturb 'Head' matches none of the 6 parameters; some of them: head/bias, head/kernel,"
            " hidden_1/bias, hidden_2/bias, hidden_2/kernel",
        ),
        (["--batch", "2000"], "--batch must be at most the 1297 training examples, got 2000"),
        (["--devices", "16", "--batch", "16"], "--devices must be at most the 8 there are"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{sentence}"):
            train.main([*flags, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_runs_are_compared_by_what_differs_and_averaged_over_seeds(tmp_path, capsys):
    folders = []
    for seed, lr in ((0, 0.05), (1, 0.05), (0, 0.01)):
        folders.append(tmp_path / f"{seed}-{lr}")
        trained(tmp_path, out=folders[-1], seed=seed, lr=lr)
    compare.main(compare.Comparison(tuple(folders), tmp_path / "compared"))
    groups = compare.grouped(tuple(folders))
    assert {name: len(rows) for name, rows in groups.items()} == {"lr 0.05": 2, "lr 0.01": 1}
    assert "| lr 0.05 | 2 | 2 |" in capsys.readouterr().out
    assert (tmp_path / "compared" / "learning_curves.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="holds no run"):
        compare.grouped((tmp_path,))


def test_steps_that_compile_are_not_measured(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def taking(seconds):
        def step():
            now[0] += seconds
            return "result"

        return step

    pace = loop.Pace(tqdm(total=9, disable=True))
    now[0] += 20  # the first batch is slow to come
    assert pace.step(taking(50), "with the ascent", None) == "result"
    assert pace.steps_per_second() is None
    pace.step(taking(1), "with the ascent", None)
    pace.step(taking(50), "without", None)
    pace.step(taking(0.5), "without", None)
    pace.step(taking(1.5), "with the ascent", None)
    assert pace.steps_per_second() == pytest.approx(3 / (1 + 0.5 + 1.5))
    pace.start()
    pace.step(taking(2), "without", None)
    assert pace.steps_per_second() == pytest.approx(0.5)


def test_an_epoch_s_speed_leaves_out_the_compilation(tmp_path):
    _, _, rows = trained(tmp_path, method="sam", lr=0.01, batch=32)
    assert all("images_per_second" in row for row in rows)  # of two steps, in the first epoch of one
    only = trained(tmp_path / "only", method="sam", lr=0.01, batch=64, epochs=1)[2]
    assert "images_per_second" not in only[0]
