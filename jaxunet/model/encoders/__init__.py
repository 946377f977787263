"""Encoders: each gives feature maps of an image, from fine to coarse."""
