"""Where the arrays are: strategies, several processes, feeding, a process's start.

May import learning, data, model and the ground.
"""
