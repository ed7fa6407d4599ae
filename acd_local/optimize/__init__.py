"""Prompt pairs optimized on a model file: soft prompts in torch, distilled into text. Needs the extra `optimize`."""
