"""Texts made up from a seed, in the schemas of the published sets: facts that no model can know from elsewhere."""
