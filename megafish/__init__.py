"""Pretrain language models that cannot recite their training data, and prove it."""

__version__ = "0.1.0"
