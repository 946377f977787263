"""Masks for pictures: prediction at each picture's own size, and the challenge's scoring.

May import every wing below: bench, interop, runs, devices, learning, data, model, the ground.
"""
