"""Benchmarks of a run's model through EleutherAI's lm-evaluation-harness (the extra `eval`)."""
