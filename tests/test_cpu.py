"""The CPU's loops: for each kind of processor, on many threads, and where there are none.

What they compute is tested in test_conv.py.
"""

import ctypes
import threading

import jax
import jax.numpy as jnp
import llvmlite.binding as llvm
import numpy as np
import pytest

from jaxunet import conv, cpu
from jaxunet.cpu.loops import build

HERE = cpu.blocks()
AVX2, AVX512, NEON = (8, (8, 4), 4), (16, (16, 8, 4), 8), (4, (16, 8, 4), 8)


def operands(b, h, w, cin, cout):
    rng = np.random.default_rng(b * h * w * cin + cout)
    shapes = ((b, h, w, cin), (3, 3, cin, cout), (b, h, w, cout))
    return (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def all_three(x, kernel, dy):
    y, pull_back = jax.vjp(conv.conv3x3, x, kernel)
    return y, *pull_back(dy)


@pytest.mark.parametrize(
    ("machine", "features", "expected"),
    [
        ("x86_64", ["avx512f", "avx2", "fma"], AVX512),
        ("x86_64", ["avx2", "fma"], AVX2),
        ("x86_64", ["avx2"], None),
        ("x86_64", [], None),
        ("aarch64", [], NEON),
        ("arm64", [], NEON),
        ("riscv64", [], None),
    ],
)
def test_the_blocks_fit_the_processor(machine, features, expected):
    assert cpu.blocks_for(machine, dict.fromkeys(features, True)) == expected


@pytest.mark.skipif(HERE is None, reason="no loops for this machine")
def test_a_program_calls_the_loops_in_all_three_products():
    text = jax.jit(all_three).lower(*operands(1, 8, 8, 16, 16)).compile().as_text()
    for name in (cpu.CONV, cpu.INPUT_GRADIENT, cpu.KERNEL_GRADIENT):
        assert f'"{name}"' in text


@pytest.mark.skipif(HERE is None or HERE.lanes < 8, reason="no processor with AVX2")
@pytest.mark.parametrize("shape", [(2, 5, 9, 3, 16), (1, 4, 23, 24, 8), (3, 9, 8, 44, 40)])
def test_the_loops_for_avx2_compute_what_those_for_this_processor_do(shape):
    """A machine with AVX-512 runs both."""
    blocks = cpu.Blocks(*AVX2)
    engine = cpu.compiled(blocks, "haswell", "")
    for name in (cpu.CONV, cpu.INPUT_GRADIENT, cpu.KERNEL_GRADIENT):
        pointer = ctypes.CFUNCTYPE(ctypes.c_void_p)(engine.get_function_address(name))
        target = f"{name}-avx2-{shape}"
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(pointer), platform="cpu")

    def call(name, shape_of_result, *arrays):
        result = jax.ShapeDtypeStruct(shape_of_result, jnp.float32)
        return jax.jit(jax.ffi.ffi_call(f"{name}-avx2-{shape}", result))(*arrays)

    x, kernel, dy = operands(*shape)
    y, dx, dkernel = jax.jit(all_three)(x, kernel, dy)
    np.testing.assert_allclose(call(cpu.CONV, y.shape, x, kernel), y, rtol=1e-5, atol=1e-4)
    if shape[3] % blocks.lanes == 0:
        found = call(cpu.INPUT_GRADIENT, dx.shape, dy, kernel)
        np.testing.assert_allclose(found, dx, rtol=1e-5, atol=1e-4)
    found = call(cpu.KERNEL_GRADIENT, (3, *dkernel.shape), x, dy).sum(axis=0)
    np.testing.assert_allclose(found, dkernel, rtol=1e-5, atol=1e-4)


def test_llvm_accepts_the_code_for_arm():
    llvm.parse_assembly(str(build(cpu.Blocks(*NEON)))).verify()


def test_many_calls_at_once_give_the_same_bit_for_bit():
    """More calls than threads, which help each other out."""
    x, kernel, dy = operands(2, 40, 48, 32, 32)
    step = jax.jit(all_three)
    expected = jax.device_get(step(x, kernel, dy))
    found = []

    def work():
        for _ in range(20):
            found.append(jax.device_get(step(x, kernel, dy)))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 120
    for results in found:
        for a, b in zip(results, expected, strict=True):
            assert np.array_equal(a, b)


def test_without_loops_the_convolution_is_xlas(monkeypatch):
    x, kernel, dy = operands(1, 8, 8, 16, 16)
    expected = jax.jit(all_three)(x, kernel, dy)
    monkeypatch.setattr(conv.cpu, "blocks", lambda: None)
    compiled = jax.jit(lambda *a: all_three(*a)).lower(x, kernel, dy).compile()
    assert "jaxunet.conv3x3" not in compiled.as_text()
    for a, b in zip(compiled(x, kernel, dy), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_it_can_be_mapped_over_a_further_dimension():
    x, kernel, _ = operands(1, 6, 8, 16, 16)
    xs = jnp.stack([x, 2 * x])
    found = jax.jit(jax.vmap(conv.conv3x3, in_axes=(0, None)))(xs, kernel)
    np.testing.assert_allclose(found[1], 2 * conv.conv3x3(x, kernel), rtol=1e-6)


def test_another_version_of_xlas_interface_is_left_alone(monkeypatch):
    monkeypatch.setattr(cpu, "_ffi_version", lambda: (0, 99))
    assert cpu.blocks.__wrapped__() is None
