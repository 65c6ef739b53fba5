"""Attacks on text classifiers, one file each."""
