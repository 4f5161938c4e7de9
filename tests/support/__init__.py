"""Helpers of the tests: a pool of gloo workers, tiny models, broken files."""
