"""Checkpoints: state dicts and their key maps, file formats, metadata, and models made from them."""
