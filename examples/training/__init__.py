"""Training of image classifiers with sparse SAM, as in the papers."""
