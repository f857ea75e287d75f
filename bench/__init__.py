"""The benchmark of normops: ``python -m bench``."""
