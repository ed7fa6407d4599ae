"""Shares what `acd fit` and `acd optimize` both need: anchors, scores of prompts, progress, stopping and caches."""
