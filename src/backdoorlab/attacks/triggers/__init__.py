"""The contract of triggers, and the kinds of triggers that several attacks use."""
