"""The ground floor: errors, registries, hyper-parameters and seeding. Knows nothing of models or data."""
