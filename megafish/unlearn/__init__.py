"""Removal of what a trained model has memorized."""
