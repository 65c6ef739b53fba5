"""Defenses that reject triggered inputs at inference, one file each."""
