"""Stress: every attack, tuned, under one bound. What a search for the cheapest way to break a model is made of."""
