"""LoRA fine-tuning and sampling of Qwen-Image. `docs/design.md` has the map of the folders and what may import what.

Importing this package imports nothing else: `python -m lora_utils --help` answers at once.
"""
