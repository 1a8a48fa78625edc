"""A study of how well heads learn: `python -m benchmarks.learning TABLE`."""
