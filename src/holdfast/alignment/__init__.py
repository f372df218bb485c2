"""Alignment stage: defenses that run before a model is released or fine-tuned by others."""
