"""Stress: every attack, tuned, under one bound; and the certificate that says what they cost."""
