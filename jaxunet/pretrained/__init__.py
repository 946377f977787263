"""Weights that others trained: found, read without running their code, named as ours.

May import model and the ground.
"""
