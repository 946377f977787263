"""A trained model as a file that needs no jaxunet: ONNX, StableHLO, and a card that describes it."""
