"""A trained model as a file that needs no jaxunet: ONNX and StableHLO; and a page with it.

May import runs and everything below.
"""
