"""Attacks on image classifiers, one file each."""
