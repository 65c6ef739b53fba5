"""What several defenses are built from: trigger inversion, statistics of features, distillation of masks."""
