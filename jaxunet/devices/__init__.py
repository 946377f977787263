"""Where the arrays are: strategies, several processes, feeding, a process's start, devices
that are not there.

May import learning, data, model and the ground.
"""
