"""How long a step takes: rounds in turn, beside PyTorch's, counted operations, the
compiler's estimates, figures of it.

May import interop, runs, devices, learning, data, model and the ground.
"""
