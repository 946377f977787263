"""PyTorch: layouts, weight files in and out, and its side of the reproduction.

May import runs, devices, learning, data, model and the ground.
"""
