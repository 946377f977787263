"""The loops: a 3x3 convolution, the gradient of its kernel, and the depthwise convolution's.

The first two keep the sums of a block in vector registers and go through memory with every
value that is loaded meeting three others, the taps of a row: then the multipliers are busy and
loading keeps up. (The idea of Georganas et al. 2018, "Anatomy of high-performance deep
learning convolutions on SIMD architectures", arXiv:1808.05567.)
"""

from functools import partial

from llvmlite import ir

from jaxunet.model.cpu.calls import add_call
from jaxunet.model.cpu.conv import conv_item, share_conv
from jaxunet.model.cpu.depthwise import (
    depthwise_item,
    depthwise_kernel_gradient_item,
    share_depthwise,
    share_depthwise_kernel_gradient,
)
from jaxunet.model.cpu.kernel_gradient import kernel_gradient_item, share_kernel_gradient
from jaxunet.model.cpu.registers import Blocks

CONV = "jaxunet.conv3x3.1"
INPUT_GRADIENT = "jaxunet.conv3x3_input_gradient.1"
KERNEL_GRADIENT = "jaxunet.conv3x3_kernel_gradient.1"
CONV_NAMES = (CONV, INPUT_GRADIENT, KERNEL_GRADIENT)
DEPTHWISE = "jaxunet.depthwise.1"
DEPTHWISE_INPUT_GRADIENT = "jaxunet.depthwise_input_gradient.1"
DEPTHWISE_KERNEL_GRADIENT = "jaxunet.depthwise_kernel_gradient.1"
DEPTHWISE_NAMES = (DEPTHWISE, DEPTHWISE_INPUT_GRADIENT, DEPTHWISE_KERNEL_GRADIENT)
"""Names of the functions; the number changes with what they take and give."""


def build(blocks: Blocks) -> ir.Module:
    """LLVM's code of the 3x3 convolution's loops, as functions that XLA can call."""
    module = ir.Module("jaxunet")
    conv, input_gradient = (conv_item(module, blocks, turned=t) for t in (False, True))
    share = partial(share_conv, blocks)
    add_call(module, blocks.target(CONV), conv, share)
    add_call(module, blocks.target(INPUT_GRADIENT), input_gradient, share)
    kernel_gradient = kernel_gradient_item(module, blocks)
    share = partial(share_kernel_gradient, blocks)
    add_call(module, blocks.target(KERNEL_GRADIENT), kernel_gradient, share)
    return module


def build_depthwise(blocks: Blocks) -> ir.Module:
    """LLVM's code of the depthwise convolution's."""
    module = ir.Module("jaxunet.depthwise")
    attributes = ("size", "stride", "top", "left")
    for name, back in ((DEPTHWISE, False), (DEPTHWISE_INPUT_GRADIENT, True)):
        item = depthwise_item(module, blocks, back=back)
        add_call(module, blocks.target(name), item, share_depthwise, attributes)
    item = depthwise_kernel_gradient_item(module, blocks)
    share = partial(share_depthwise_kernel_gradient, blocks)
    add_call(module, blocks.target(DEPTHWISE_KERNEL_GRADIENT), item, share, attributes)
    return module
