"""Attacks on video classifiers, one file each."""
