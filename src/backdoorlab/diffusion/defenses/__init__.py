"""Defenses of diffusion models, one file each."""
