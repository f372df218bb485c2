"""Defenses of the fine-tuning stage: they work while a user's data is trained on."""
