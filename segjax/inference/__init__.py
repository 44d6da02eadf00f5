"""Inference with trained models: sliding windows, scales and flips; evaluation; files, folders and videos."""
