"""Holds the stages of an optimization; `optimize.pipeline` says in which order they run."""
