"""Sizes that keep a test in seconds while every stage, ratio and head count differs from its neighbours."""

SIZES = dict(dims=(8, 16, 20, 32), depths=(2, 1, 1, 1), decoder_dim=24)
MODEL = "segformer_b0"
NUM_CLASSES = 7
# Batch and (height, width): wide, odd, and not even near a multiple of 32.
INPUTS = ((2, (64, 96)), (3, (65, 97)), (2, (40, 136)))
