"""One runner for every card of `results/`: `python -m experiments list`. README.md of this folder says how it works."""
