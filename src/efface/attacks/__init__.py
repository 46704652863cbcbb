"""Attacks on erasers: one file per attack. An attack proposes how to draw; `efface.attack` judges what was drawn."""
