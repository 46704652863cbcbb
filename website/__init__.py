"""Makes the pages of the documentation that come from code and cards, and checks the built site.

`mkdocs build` calls `hooks.py`, which asks `pages.py` for every generated page. Nothing generated is committed.
"""
