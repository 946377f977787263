"""PyTorch weights in and out; PyTorch itself is imported only when a file needs it.

layouts.py       how PyTorch U-Nets name and shape their tensors
weight_files.py  .pth, .pt and .safetensors files
pickles.py       what is looked at before PyTorch reads a .pth or .pt
pytorch.py       state dicts to and from variables
runs.py          run directories from weight files, and back
"""
