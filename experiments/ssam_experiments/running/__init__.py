"""One run: what is compiled, where arrays lie, the loop over epochs, metrics and checkpoints."""

from ssam_experiments import TRAINER, require

require(TRAINER, "experiments")
