"""Training: the step, the loop, its settings and what a run keeps."""
