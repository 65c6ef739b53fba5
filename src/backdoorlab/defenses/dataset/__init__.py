"""Defenses that look for poisoned samples in a training set, one file each."""
