"""Weights in files: ours, the original's and those of towers, and what stands beside them."""
