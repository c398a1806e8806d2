"""Images and labels: files, data sets in memory, streams from disk, batches."""
