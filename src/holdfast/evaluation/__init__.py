"""Measuring a model: prompts → generate → judge → score."""
