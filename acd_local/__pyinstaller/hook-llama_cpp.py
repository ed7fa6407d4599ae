"""What acd_local's use of llama_cpp does not need: other tokenizers, image models, downloads."""

excludedimports = ["torch", "transformers", "huggingface_hub", "PIL"]
