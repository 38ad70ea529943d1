"""The 2-D laboratory: densities whose score is known in closed form, and a network that trains in seconds on a CPU.

toy/README.md is the chapter that it writes. Nothing is imported here, so that each part can be had without the others.
"""
