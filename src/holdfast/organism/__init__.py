"""The embedded model organism: a tiny language model and the invented world it lives in, built from a seed."""

from holdfast.organism.build import build_organism

__all__ = ["build_organism"]
