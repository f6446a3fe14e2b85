"""A run from its options to its files, and what is shown of it."""
