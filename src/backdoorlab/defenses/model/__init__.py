"""Defenses that say whether a model is backdoored, one file each."""
