"""The paper's figures and tables at the size of a laptop, and what decides them: `python -m experiments NAME`.

README.md is the chapter. Without this file another package named experiments, should one be installed, would be
imported in its place."""
