"""Texts, and page.py, which makes the reading page of them. Without this file another package named docs, should one be
installed, would be imported in its place."""
