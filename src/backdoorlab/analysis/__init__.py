"""Pictures and measures of triggers, models and samples."""
