"""Togi (研ぎ, "polishing"): train language models from human and verifiable feedback."""

__version__ = "0.1.0"
