"""Other people's models and files: Hugging Face transformers, safetensors checkpoints."""
