"""What several attacks are built from: surrogates, pictures, poisoned batches, training of generators."""
