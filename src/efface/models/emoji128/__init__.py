"""The 128-pixel models `emoji-128` and `emoji-flux`."""
