"""The benchmark of whole models: ``python -m bench models``."""
