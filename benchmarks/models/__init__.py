"""Models that timm does not have, as files for `python -m benchmarks`."""
