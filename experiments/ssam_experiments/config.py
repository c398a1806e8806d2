"""The settings of a run, what they may be, and the paper's own."""

import dataclasses
import math
import pathlib
import re
from typing import Literal

from ssam_experiments.ranges import Rule, check_ranges

Dataset = Literal["digits", "fashion-mnist", "cifar10", "cifar100", "imagenet"]
Model = Literal[
    "mlp", "resnet6", "resnet8", "vit-tiny", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
    "wrn28-10", "wrn34-10", "vgg11-bn", "vgg13-bn", "vgg16-bn", "vgg19-bn", "vit-s",
]  # fmt: skip
Preset = Literal[
    "none",
    "paper-cifar10-resnet18", "paper-cifar10-wrn28-10", "paper-cifar10-vgg11-bn",
    "paper-cifar100-resnet18", "paper-cifar100-wrn28-10", "paper-cifar100-vgg11-bn",
    "paper-imagenet-resnet50",
]  # fmt: skip
Criterion = Literal["gradient", "weight", "random"]
Direction = Literal[
    "gradient", "momentum", "against-momentum", "ema", "friendly", "zscore", "sign", "noise", "layerwise",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a network with SGD, Adam or AdamW, plain or sharpness-aware (SAM, sparse SAM).

    Give the same command again to resume a run that was killed from its last checkpoint. It ends bit for bit
    the same on the same devices and the same number of CPU cores; on others sums are rounded otherwise.
    """

    preset: Preset = "none"
    """The paper's settings (for SSAM-F at 50 %), which the other flags change."""

    dataset: Dataset = "digits"
    """What to train on. The digits come with scikit-learn; the others are read from --data."""
    data: pathlib.Path | None = None
    """Folder of the data set. For cifar10 and cifar100: Hugging Face parquet files, or the official python
    batches. For fashion-mnist: the idx files. For imagenet: a folder for each class in train/ and in val/, or
    Hugging Face parquet files."""
    augment: bool = True
    """Random crops (padding 4; for imagenet of random size) and flips. The digits are never augmented."""
    cutout: bool = False
    """Blank a square, half as wide as the image, in half of the training images."""
    validation: int = 0
    """Training examples to hold out for validation."""
    limit: int | None = None
    """Train on the first so many examples only, after they were shuffled."""
    label_noise: float = 0.0
    """Share of the training examples whose label is replaced by another."""
    workers: int = 4
    """Processes that read and augment imagenet."""

    model: Model = "resnet8"
    """The network. mlp, resnet6 (for CIFAR on a CPU), resnet8 and vit-tiny are small."""
    width: int | None = None
    """Width of the network in place of its own: channels of the first stage, or those of a token."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What activations are computed in. Parameters, statistics and the loss are float32."""

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """The base optimizer."""
    epochs: int = 20
    """Passes over the training examples."""
    batch: int = 128
    """Examples in a step, over all devices."""
    lr: float = 0.05
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay of every parameter: added to the gradient, for adamw to the update."""
    schedule: Literal["cosine", "multi-step", "constant"] = "cosine"
    """How the learning rate goes down: to 0 by the last step, by --decay at --milestones, not at all."""
    warmup: float = 0.0
    """Epochs in which the learning rate rises from 0."""
    milestones: tuple[int, ...] = ()
    """Epochs at which a multi-step schedule multiplies the learning rate by --decay."""
    decay: float = 0.1
    """Factor of the multi-step schedule."""

    method: Literal["plain", "sam", "ssam-f", "ssam-d", "ssam-fixed"] = "plain"
    """plain: the base optimizer alone. ssam-f: masks from Fisher information; ssam-d: from dynamic
    sparse training; ssam-fixed: the parameters that --perturb names."""
    rho: float = 0.1
    """Radius of the perturbation (every method but plain)."""
    carrier: Literal["ssam", "carried"] = "ssam"
    """ssam: two gradients on every step that perturbs. carried: one; the network trains at the perturbed
    parameters, along the gradient of the step before, and is evaluated at the others."""
    tail_epochs: int = 0
    """With --carrier carried: the last epochs, which step as ssam does, with two gradients."""
    adaptive: bool = False
    """Scale the perturbation by the parameters' magnitude (ASAM)."""
    direction: Direction = "gradient"
    """Which way is up. momentum and against-momentum (MSAM) read that of the base optimizer, for --carrier
    carried; ema is VaSSO's, friendly F-SAM's, zscore ZSharp's; layerwise gives each tensor a length of the
    square root of its outputs by its inputs (muP²), and a radius that grows with the network's width."""
    direction_decay: float = 0.95
    """Weight of the past in the directions ema and friendly."""
    combine: Literal["perturbed", "weighted", "gsam", "looksam"] = "perturbed"
    """What a step returns, given both gradients: the perturbed one, a weighted sum (WSAM), GSAM's, or that of
    LookSAM, which reuses an ascent on the steps that follow it."""
    combine_weight: float = 0.7
    """gamma of weighted, alpha of gsam and looksam."""
    ascent_steps: int = 1
    """Gradient steps to the perturbed point, each of length --rho."""
    normalize: Literal["global", "masked"] = "global"
    """Normalize the perturbation before it is masked, as the paper, or after. After, with a mask of
    whole tensors, the first pass computes only the gradient of the perturbed tensors."""
    form: Literal["explicit", "implicit"] = "explicit"
    """Mask the perturbation, or the weights in the first backward pass."""
    pattern: Literal["unstructured", "structured", "n:m"] = "unstructured"
    """Which masks ssam-f and ssam-d choose from."""
    sparsity: float = 0.5
    """Share of the parameters that is not perturbed (unstructured and structured)."""
    unit: Literal["tensor", "channel"] = "tensor"
    """What a structured mask keeps or leaves whole."""
    n: int = 2
    """Entries that an n:m mask keeps in each group of m."""
    m: int = 4
    """Size of the groups of an n:m mask."""
    perturb: str = ""
    """Regular expression, searched in the path of each parameter (such as stage_3/block_1/conv_1/kernel),
    for ssam-fixed."""
    refresh_epochs: int = 1
    """Epochs between two refreshes of the mask."""
    fisher: Literal["per-example", "running"] = "per-example"
    """Scores of ssam-f: the empirical Fisher information of --fisher-samples examples, one by one, as
    in the paper; or a running mean of squared mini-batch gradients, which costs no pass of its own."""
    fisher_samples: int = 1024
    """Training examples of which ssam-f computes the Fisher information."""
    drop_fraction: float = 0.5
    """Share of the mask that ssam-d trades at first; it goes down to 0 along a cosine."""
    drop: Criterion = "gradient"
    """What ssam-d drops: the smallest of these."""
    grow: Criterion = "random"
    """What ssam-d grows: the largest of these."""
    ascent_every: int = 1
    """Perturb on every k-th step only; the others are steps of the base optimizer, at its price."""
    ascent_from: int = 0
    """Perturb from this epoch on, counted from 0."""
    ascent_chance: float = 1.0
    """Perturb on each of these steps with this probability (SS-SAM)."""
    ascent_gate: bool = False
    """Of these steps, perturb where the gradient is large (AE-SAM). Both gradients are computed on each of
    them all the same: under a conditional, convolutions on a CPU would be slower than that."""
    ascent_fraction: float = 1.0
    """Share of the batch whose gradient gives the perturbation, and of which loss, accuracy and batch
    statistics are."""

    seed: int = 0
    """Of initialization, data order, augmentation, dropout and masks."""
    devices: int = 1
    """Devices of all processes to spread each batch over. Batch statistics are of the entire batch."""
    fsdp: bool = False
    """Split parameters, their masks and the optimizer's state over the devices, rather than keep a copy on
    each: every array by the largest of its axes that --devices divides."""
    processes: int = 1
    """Processes that run this command, the same on each but for --process-id."""
    process_id: int = 0
    """Which of them this is, from 0. Process 0 prints, and writes all but the checkpoints."""
    coordinator: str = ""
    """HOST:PORT at which process 0 listens to the others, and nowhere else; or auto, on TPU pods and under
    SLURM or Open MPI, where JAX finds out all three."""
    heartbeat: int = 100
    """Seconds of silence after which a process counts as dead, and the others end too; they wait as long for
    each other when they start."""
    out: pathlib.Path = pathlib.Path("outputs/train")
    """Folder for metrics.jsonl, checkpoints and pictures; each run needs its own."""
    evaluate_every: int = 1
    """Epochs between two evaluations; the last epoch always has one."""
    checkpoint_epochs: int = 1
    """Epochs between two checkpoints; the last epoch always has one."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints, in addition to those at the end of epochs."""
    resume_from: int | None = None
    """Step of the checkpoint to resume from, for once, where the last one is damaged. Later ones are renamed
    to <step>.aside."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too (needs tensorboardX)."""
    wandb: bool = False
    """Send the metrics to Weights & Biases too (needs wandb)."""

    @property
    def active(self) -> bool:
        """Whether the first pass computes the gradient of the perturbed tensors alone."""
        return self.normalize == "masked" and self.whole_tensors

    @property
    def whole_tensors(self) -> bool:
        """Whether masks keep or leave whole tensors."""
        structured = self.method == "ssam-f" and (self.pattern, self.unit) == ("structured", "tensor")
        return structured or self.method == "ssam-fixed"


CIFAR = Config(
    dataset="cifar10", model="resnet18", cutout=True, epochs=200, batch=128, lr=0.05, weight_decay=1e-3,
    method="ssam-f", rho=0.1,
)  # fmt: skip
CIFAR100 = dataclasses.replace(CIFAR, dataset="cifar100", rho=0.2)
IMAGENET = Config(
    dataset="imagenet", model="resnet50", epochs=90, batch=256, lr=0.1, weight_decay=1e-4,
    method="ssam-f", rho=0.7,
)  # fmt: skip
PRESETS: dict[str, Config] = {
    "none": Config(),
    "paper-cifar10-resnet18": CIFAR,
    "paper-cifar10-wrn28-10": dataclasses.replace(CIFAR, model="wrn28-10"),
    "paper-cifar10-vgg11-bn": dataclasses.replace(CIFAR, model="vgg11-bn"),
    "paper-cifar100-resnet18": CIFAR100,
    "paper-cifar100-wrn28-10": dataclasses.replace(CIFAR100, model="wrn28-10"),
    "paper-cifar100-vgg11-bn": dataclasses.replace(CIFAR100, model="vgg11-bn"),
    "paper-imagenet-resnet50": IMAGENET,
}
"""The paper's settings (arXiv 2306.17504) for SSAM-F at 50 %. SGD had weight decay 5e-4 on CIFAR. The
learning rate on ImageNet is the usual one for this batch size."""


def check(config: Config) -> None:
    """Raise ValueError, naming the setting, unless all are in range and go together."""
    at_least_1 = (
        "epochs", "batch", "n", "m", "refresh_epochs", "fisher_samples", "ascent_every", "ascent_steps",
        "checkpoint_epochs", "devices", "processes", "heartbeat",
    )  # fmt: skip
    rules: dict[str, Rule] = {
        "at least 1": (
            lambda v: v is None or v >= 1,
            (*at_least_1, "evaluate_every", "checkpoint_every", "resume_from", "width"),
        ),
        "at least 0": (lambda v: v >= 0, ("validation", "workers", "process_id")),
        "from 0 to below 2**31": (lambda v: 0 <= v < 2**31, ("seed",)),
        "finite and above 0": (lambda v: 0 < v < math.inf, ("lr", "rho", "decay")),
        "finite and at least 0": (lambda v: 0 <= v < math.inf, ("weight_decay", "warmup", "combine_weight")),
        "from 0 to below 1": (lambda v: 0 <= v < 1, ("label_noise", "momentum", "direction_decay")),
        "from 0 to 1": (lambda v: 0 <= v <= 1, ("sparsity", "drop_fraction")),
        "above 0 and at most 1": (lambda v: 0 < v <= 1, ("ascent_fraction", "ascent_chance")),
        f"from 0 to the {config.epochs} epochs": (
            lambda v: 0 <= v <= config.epochs,
            ("ascent_from", "tail_epochs"),
        ),
    }
    check_ranges(config, rules, lambda name: f"--{name.replace('_', '-')}")
    for wrong, sentence in [*_factor_conflicts(config), *_conflicts(config)]:
        if wrong:
            raise ValueError(sentence)


def _factor_conflicts(c: Config) -> list[tuple[bool, str]]:
    """Return pairs, as `_conflicts`, of the direction, the combine and the carrier."""
    plain, carried = c.method == "plain", c.carrier == "carried"
    momentum = c.direction in ("momentum", "against-momentum")
    own = {
        "--carrier": carried,
        "--direction": c.direction != "gradient",
        "--combine": c.combine != "perturbed",
    }
    named = [flag for flag, given in own.items() if given]
    fixed = c.ascent_from or c.ascent_every > 1 or c.ascent_chance < 1 or c.ascent_gate
    return [
        (plain and bool(named), f"{', '.join(named)} needs a perturbation, but --method plain has none."),
        (
            momentum and (not carried or c.tail_epochs > 0),
            f"--direction {c.direction} reads the base optimizer: take --carrier carried, without"
            " --tail-epochs.",
        ),
        (
            momentum and c.optimizer == "sgd" and c.momentum == 0,
            f"--direction {c.direction} needs --momentum above 0.",
        ),
        (not carried and c.tail_epochs > 0, "--tail-epochs is for --carrier carried."),
        (
            carried and (c.combine != "perturbed" or c.ascent_steps > 1 or c.form == "implicit"),
            "--carrier carried has one gradient a step: leave out --combine, --ascent-steps and --form.",
        ),
        (
            carried and bool(fixed),
            "--carrier carried perturbs all the time: leave out --ascent-from, -every, -chance and -gate.",
        ),
        (
            c.combine == "looksam" and c.ascent_gate,
            "--combine looksam must know which steps perturb: leave out --ascent-gate.",
        ),
        (
            c.direction == "layerwise" and c.ascent_gate,
            "--direction layerwise has a radius of its own: leave out --ascent-gate.",
        ),
        (
            c.combine != "perturbed" and (c.active or c.form == "implicit"),
            f"--combine {c.combine} needs the complete gradient: leave out --normalize masked and --form.",
        ),
    ]


def _conflicts(c: Config) -> list[tuple[bool, str]]:
    """Return pairs: whether something is wrong, and the sentence that says so."""
    masked, method = c.method.startswith("ssam"), f"--method {c.method}"
    drawn = c.method in ("ssam-f", "ssam-d")
    whole = c.pattern == "structured" and c.unit == "tensor"
    part = round(c.batch * c.ascent_fraction, 6)
    auto, (host, _, port) = c.coordinator == "auto", c.coordinator.rpartition(":")
    return [
        (c.dataset != "digits" and c.data is None, f"--dataset {c.dataset} needs --data, its folder."),
        (
            c.dataset == "digits" and c.data is not None,
            "--dataset digits comes with scikit-learn, not by --data.",
        ),
        (c.dataset == "imagenet" and c.label_noise > 0, "--label-noise is not for --dataset imagenet."),
        (c.dataset == "imagenet" and c.limit is not None, "--limit is not for --dataset imagenet."),
        (c.dataset == "imagenet" and c.validation > 0, "--validation is not for --dataset imagenet."),
        (c.form == "implicit" and not masked, f"--form implicit masks weights, but {method} has no mask."),
        (
            c.form == "implicit" and drawn and c.pattern == "unstructured",
            "--form implicit --pattern unstructured saves no work: no product has a sparse operand of that"
            " kind. Take --pattern structured or n:m.",
        ),
        (
            c.form == "implicit" and c.normalize == "masked",
            "--form implicit does not mask the perturbation: --normalize masked means nothing there.",
        ),
        (c.normalize == "masked" and not masked, f"--normalize masked needs a mask, but {method} has none."),
        (
            c.method == "ssam-d" and (c.pattern == "n:m" or whole),
            "--method ssam-d trades entries within a tensor: take --pattern unstructured, or structured with"
            " --unit channel.",
        ),
        (c.n > c.m, f"--n must be at most --m, got {c.n} and {c.m}."),
        (c.method == "ssam-fixed" and not c.perturb, f"{method} needs --perturb, a regular expression."),
        (c.method != "ssam-fixed" and bool(c.perturb), "--perturb is for --method ssam-fixed."),
        (not _is_expression(c.perturb), f"--perturb must be a regular expression, got {c.perturb!r}."),
        (c.schedule == "multi-step" and not c.milestones, "--schedule multi-step needs --milestones."),
        (c.schedule != "multi-step" and bool(c.milestones), "--milestones is for --schedule multi-step."),
        (
            list(c.milestones) != sorted({m for m in c.milestones if 0 < m < c.epochs}),
            f"--milestones must be ascending epochs between 0 and {c.epochs}, got {c.milestones}.",
        ),
        (
            c.warmup >= min(c.epochs, *c.milestones, math.inf),
            f"--warmup must end before --epochs and the first of --milestones, got {c.warmup}.",
        ),
        (c.batch % c.devices != 0, f"--batch must be divisible by --devices, got {c.batch} and {c.devices}."),
        (
            part % c.devices != 0 or part == 0,
            "--ascent-fraction of --batch must be an integer number of examples on each device, got"
            f" {part:g} on {c.devices}.",
        ),
        (
            not auto and bool(c.coordinator) and not (host and port.isdecimal()),
            f"--coordinator must be HOST:PORT or auto, got {c.coordinator!r}.",
        ),
        (
            auto and (c.processes, c.process_id) != (1, 0),
            "--coordinator auto finds out --processes and --process-id: leave them out.",
        ),
        (
            c.processes > 1 and not c.coordinator,
            f"--processes {c.processes} needs --coordinator, the HOST:PORT at which process 0 listens.",
        ),
        (
            c.processes == 1 and bool(c.coordinator) and not auto,
            f"--coordinator {c.coordinator} needs --processes, how many there are.",
        ),
        (
            not auto and c.process_id >= c.processes,
            f"--process-id must be below --processes, got {c.process_id} and {c.processes}.",
        ),
        (
            c.devices % c.processes != 0,
            f"--devices counts those of all processes and must be a multiple of --processes, got {c.devices}"
            f" and {c.processes}.",
        ),
        (c.fsdp and c.devices == 1, "--fsdp splits parameters over --devices, which are 1."),
    ]


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True
