"""backdoorlab: attacks, defenses and fair benchmarks for backdoor learning."""

__version__ = "0.1.0"
