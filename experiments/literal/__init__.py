"""Literal baselines, written from the descriptions of the methods: what the package is compared with."""
