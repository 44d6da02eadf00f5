"""Trained models at work: sliding windows, scales and flips; evaluation; files, folders and videos."""
