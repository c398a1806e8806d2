"""Images and labels: files, data sets in memory, streams from disk, batches."""

from ssam_experiments import TRAINER, require

require(TRAINER, "experiments")
