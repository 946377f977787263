"""Pure functions of arrays: the network, and each of its operations for each platform.

May import the ground.
"""
