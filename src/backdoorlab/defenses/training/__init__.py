"""Defenses that train a clean model on poisoned data, one file each."""
