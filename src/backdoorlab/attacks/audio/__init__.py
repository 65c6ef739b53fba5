"""Attacks on audio classifiers, one file each."""
