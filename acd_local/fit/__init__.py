"""Fits a pair to a model in minutes on llama.cpp alone: a gate, a refusing text, and a negative that complies."""
