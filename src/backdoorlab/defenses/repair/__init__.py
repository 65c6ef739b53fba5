"""Defenses that clean a trained model, one file each."""
