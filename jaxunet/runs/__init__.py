"""A run from start to end: the loop, its directory, checkpoints, stops, evaluation, pictures.

May import devices, learning, data, pretrained, model and the ground.
"""
