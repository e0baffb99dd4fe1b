"""What a model memorized: extraction of canaries, loss of dropped against kept tokens, and the report."""
