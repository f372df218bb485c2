"""The repair stage: defenses that act after fine-tuning."""
