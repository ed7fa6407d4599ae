"""Measure what answers cost on this machine, against plain llama.cpp decoding of the same model in the same process."""
