"""A trained model as a file that needs no jaxunet: ONNX and StableHLO.

May import runs and everything below.
"""
