"""Pure functions of arrays: one step of training, of evaluation, of prediction, and its parts.

May import data, model and the ground.
"""
