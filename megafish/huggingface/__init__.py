"""Models to and from Hugging Face's files: shapes, weights, tokenizers."""
