"""LoRA fine-tuning and sampling of Qwen-Image. The rooms and their floors: README, "How it is built"."""
