"""Settings of the trainer: presets are the paper's, and what makes no sense is refused in a sentence."""

import dataclasses
import pathlib
import typing

import pytest

from ssam_experiments import config as configs
from ssam_experiments import train
from ssam_experiments.config import PRESETS, Config, check
from ssam_experiments.models import MODELS
from ssam_experiments.running.optimizers import make_schedule

PATH = pathlib.Path("/nowhere")


def test_every_preset_and_every_model_can_be_named():
    assert set(PRESETS) == set(typing.get_args(configs.Preset))
    assert set(MODELS) == set(typing.get_args(configs.Model))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_run_and_changed(name):
    preset = dataclasses.replace(PRESETS[name], data=None if name == "none" else PATH)
    check(preset)
    check(dataclasses.replace(preset, method="plain", weight_decay=5e-4))


def test_the_paper_s_settings_are_the_paper_s():
    paper = PRESETS["paper-cifar100-wrn28-10"]
    assert (paper.dataset, paper.model, paper.rho, paper.cutout) == ("cifar100", "wrn28-10", 0.2, True)
    assert (paper.epochs, paper.batch, paper.lr, paper.momentum) == (200, 128, 0.05, 0.9)
    assert (paper.weight_decay, paper.schedule, paper.sparsity) == (1e-3, "cosine", 0.5)
    assert PRESETS["paper-cifar10-resnet18"].rho == 0.1
    imagenet = PRESETS["paper-imagenet-resnet50"]
    assert (imagenet.epochs, imagenet.batch, imagenet.weight_decay, imagenet.rho) == (90, 256, 1e-4, 0.7)


def test_flags_change_a_preset_wherever_they_stand():
    for arguments in (
        ["--preset", "paper-cifar10-resnet18", "--method", "sam", "--lr", "0.1"],
        ["--lr", "0.1", "--method=sam", "--preset=paper-cifar10-resnet18"],
    ):
        parsed = train.parse(arguments)
        assert (parsed.model, parsed.epochs, parsed.method, parsed.lr) == ("resnet18", 200, "sam", 0.1)
    assert train.parse([]) == Config()


IMAGENET = {"dataset": "imagenet", "data": PATH}
TWO_OF_FOUR = {"method": "ssam-f", "pattern": "n:m"}
CARRIED = {"method": "sam", "carrier": "carried"}
TWO_PROCESSES = {"processes": 2, "coordinator": "here:1234", "devices": 2}
WRONG = [
    ({"epochs": 0}, "--epochs must be at least 1, got 0"),
    ({"lr": float("nan")}, "--lr must be finite and above 0, got nan"),
    ({"label_noise": 1.0}, "--label-noise must be from 0 to below 1, got 1.0"),
    ({"sparsity": 1.5}, "--sparsity must be from 0 to 1, got 1.5"),
    ({"ascent_from": 21}, "--ascent-from must be from 0 to the 20 epochs, got 21"),
    ({"checkpoint_every": 0}, "--checkpoint-every must be at least 1"),
    ({"dataset": "cifar10"}, "--dataset cifar10 needs --data"),
    ({"data": PATH}, "--dataset digits comes with scikit-learn"),
    (
        {"dataset": "imagenet", "data": PATH, "label_noise": 0.1},
        "--label-noise is not for --dataset imagenet",
    ),
    ({**IMAGENET, "limit": 9}, "--limit is not for"),
    ({**IMAGENET, "validation": 9}, "--validation is not for"),
    ({"form": "implicit"}, "--form implicit masks weights, but --method plain has no mask"),
    ({"form": "implicit", "method": "ssam-f"}, "--form implicit --pattern unstructured saves no work"),
    (
        {"form": "implicit", "method": "ssam-f", "pattern": "n:m", "normalize": "masked"},
        "means nothing there",
    ),
    ({"method": "sam", "normalize": "masked"}, "--normalize masked needs a mask, but --method sam has none"),
    ({"method": "ssam-d", "pattern": "n:m"}, "--method ssam-d trades entries within a tensor"),
    ({"method": "ssam-d", "pattern": "structured"}, "--unit channel"),
    ({"n": 5}, "--n must be at most --m, got 5 and 4"),
    ({"method": "ssam-fixed"}, "--method ssam-fixed needs --perturb"),
    ({"perturb": "head"}, "--perturb is for --method ssam-fixed"),
    ({"method": "ssam-fixed", "perturb": "("}, r"--perturb must be a regular expression, got '\('"),
    ({"schedule": "multi-step"}, "--schedule multi-step needs --milestones"),
    ({"milestones": (3,)}, "--milestones is for --schedule multi-step"),
    (
        {"schedule": "multi-step", "milestones": (5, 3)},
        "--milestones must be ascending epochs",
    ),
    ({"schedule": "multi-step", "milestones": (5,), "warmup": 6.0}, "--warmup must end before"),
    ({"warmup": 20.0}, "--warmup must end before"),
    ({"devices": 3}, "--batch must be divisible by --devices, got 128 and 3"),
    ({"devices": 8, "ascent_fraction": 1 / 32, "method": "sam"}, "--ascent-fraction of --batch.* got 4 on 8"),
    ({"ascent_fraction": 0.001, "method": "sam"}, "--ascent-fraction of --batch"),
    ({"coordinator": "nowhere"}, "--coordinator must be HOST:PORT or auto, got 'nowhere'"),
    ({"coordinator": "auto", "processes": 2}, "--coordinator auto finds out --processes and --process-id"),
    ({"processes": 2, "devices": 2}, "--processes 2 needs --coordinator"),
    ({"coordinator": "here:1234"}, "--coordinator here:1234 needs --processes"),
    ({**TWO_PROCESSES, "process_id": 2}, "--process-id must be below --processes, got 2 and 2"),
    ({**TWO_PROCESSES, "devices": 1}, "--devices counts those of all processes.* got 1 and 2"),
    ({"heartbeat": 0}, "--heartbeat must be at least 1, got 0"),
    (
        {"direction": "ema", "combine": "gsam"},
        "--direction, --combine needs a perturbation, but --method plain",
    ),
    ({"method": "sam", "direction": "momentum"}, "--direction momentum reads the base optimizer"),
    ({**CARRIED, "direction": "momentum", "tail_epochs": 1}, "without --tail-epochs"),
    ({**CARRIED, "direction": "momentum", "momentum": 0.0}, "--direction momentum needs --momentum above 0"),
    ({"method": "sam", "tail_epochs": 1}, "--tail-epochs is for --carrier carried"),
    ({**CARRIED, "combine": "gsam"}, "--carrier carried has one gradient a step"),
    ({**CARRIED, "ascent_every": 2}, "--carrier carried perturbs all the time"),
    ({"method": "sam", "combine": "looksam", "ascent_gate": True}, "--combine looksam must know which steps"),
    ({"method": "sam", "direction": "layerwise", "ascent_gate": True}, "layerwise has a radius of its own"),
    (
        {"method": "ssam-fixed", "perturb": "head", "normalize": "masked", "combine": "gsam"},
        "--combine gsam needs the complete gradient",
    ),
    ({"ascent_chance": 0.0}, "--ascent-chance must be above 0 and at most 1, got 0"),
    ({"direction_decay": 1.0}, "--direction-decay must be from 0 to below 1, got 1"),
    ({"fsdp": True}, "--fsdp splits parameters over --devices, which are 1"),
]


@pytest.mark.parametrize(("changes", "sentence"), WRONG, ids=range(len(WRONG)))
def test_settings_that_make_no_sense_are_refused_by_name(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        check(dataclasses.replace(Config(), **changes))


def test_schedules_warm_up_and_come_down():
    cosine = make_schedule(Config(epochs=10, warmup=2), 5)
    assert [float(cosine(i)) for i in (0, 5, 10, 30, 50)] == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-6)
    steps = make_schedule(Config(epochs=10, schedule="multi-step", milestones=(4, 8), warmup=1, decay=0.5), 5)
    assert [float(steps(i)) for i in (0, 5, 19, 21, 41)] == pytest.approx([0, 1, 1, 0.5, 0.25])
    constant = make_schedule(Config(schedule="constant"), 5)
    assert [float(constant(i)) for i in (0, 99)] == [1, 1]
