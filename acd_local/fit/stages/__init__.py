"""Holds the stages of a fit; `fit.pipeline` says in which order they run."""
