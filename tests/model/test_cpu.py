"""The CPU's loops: for each kind of processor, on many threads, and where there are none.

What they compute is tested in test_conv.py.
"""

import os
import platform
import re
import threading

import jax
import jax.numpy as jnp
import llvmlite.binding as llvm
import numpy as np
import pytest

from jaxunet.devices.environment import environment
from jaxunet.devices.startup import say_if_loops_are_off
from jaxunet.errors import ConfigError
from jaxunet.model import conv, cpu
from jaxunet.model.cpu import calls
from jaxunet.model.cpu.loops import build, build_depthwise

HERE = cpu.blocks()
AVX2, AVX512, NEON = (8, (8, 4), 4), (16, (16, 8, 4), 8), (4, (16, 8, 4), 8)


def operands(b, h, w, cin, cout):
    rng = np.random.default_rng(b * h * w * cin + cout)
    shapes = ((b, h, w, cin), (3, 3, cin, cout), (b, h, w, cout))
    return (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def all_three(x, kernel, dy):
    y, pull_back = jax.vjp(conv.conv3x3, x, kernel)
    return y, *pull_back(dy)


@pytest.fixture(scope="module")
def avx2() -> cpu.Blocks:
    blocks = cpu.Blocks(*AVX2)
    cpu.register(blocks, cpu.compiled(blocks, "haswell", ""))
    return blocks


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
        assert f'"{HERE.target(name)}"' in text


@pytest.mark.skipif(HERE is None or HERE.lanes != 16, reason="no processor with AVX-512")
@pytest.mark.parametrize("shape", [(2, 5, 9, 3, 16), (1, 4, 23, 24, 8), (3, 9, 8, 44, 40)])
def test_the_loops_for_avx2_compute_the_same(avx2, shape):
    """A machine with AVX-512 has AVX2 as well."""

    def call(name, shape_of_result, *arrays):
        result = jax.ShapeDtypeStruct(shape_of_result, jnp.float32)
        return jax.jit(jax.ffi.ffi_call(avx2.target(name), result))(*arrays)

    x, kernel, dy = operands(*shape)
    y, pull_back = jax.vjp(conv._plain_conv, x, kernel)
    dx, dkernel = pull_back(dy)
    np.testing.assert_allclose(call(cpu.CONV, y.shape, x, kernel), y, rtol=1e-5, atol=1e-4)
    if shape[3] % avx2.lanes == 0:
        found = call(cpu.INPUT_GRADIENT, dx.shape, dy, kernel)
        np.testing.assert_allclose(found, dx, rtol=1e-5, atol=1e-4)
    found = call(cpu.KERNEL_GRADIENT, (3, *dkernel.shape), x, dy).sum(axis=0)
    np.testing.assert_allclose(found, dkernel, rtol=1e-5, atol=1e-4)


def test_llvm_accepts_the_code_for_arm():
    for builder in (build, build_depthwise):
        llvm.parse_assembly(str(builder(cpu.Blocks(*NEON)))).verify()


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
    x, kernel, dy = operands(1, 6, 8, 16, 16)
    found = jax.jit(jax.vmap(all_three, in_axes=(0, None, 0)))(
        jnp.stack([x, 2 * x]), kernel, jnp.stack([dy, 3 * dy])
    )
    y, dx, dkernel = all_three(x, kernel, dy)
    for a, b in zip(found, (2 * y, 3 * dx, 6 * dkernel), strict=True):
        np.testing.assert_allclose(a[1], b, rtol=1e-4, atol=1e-4)


def test_it_can_be_differentiated_twice():
    def norm(conv3x3, x, kernel, dy):
        gradients = jax.grad(lambda *a: (jnp.tanh(conv3x3(*a)) * dy).sum(), (0, 1))(x, kernel)
        return sum((g**2).sum() for g in gradients)

    arrays = [0.1 * a for a in operands(1, 6, 8, 16, 16)]
    found = jax.grad(norm, (1, 2))(conv.conv3x3, *arrays)
    expected = jax.grad(norm, (1, 2))(conv._plain_conv, *arrays)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_an_empty_batch_gives_an_empty_result():
    x, kernel, dy = operands(0, 6, 8, 16, 16)
    y, dx, dkernel = all_three(x, kernel, dy)
    assert y.shape == dx.shape == (0, 6, 8, 16)
    assert not dkernel.any()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((5, 5, 16, 16), "float32"), ((3, 3, 8, 16), "float32"), ((3, 3, 16, 16), "bfloat16")],
)
def test_a_kernel_that_does_not_fit_is_refused(shape, dtype):
    function = getattr(conv.conv3x3, "__wrapped__", conv.conv3x3)  # without type checks
    with pytest.raises(ValueError, match=r"but must be float32\[3, 3, 16"):
        function(jnp.zeros((1, 8, 8, 16)), jnp.zeros(shape, dtype))


@pytest.mark.skipif(cpu.SWITCH in os.environ, reason="the loops are switched by hand")
def test_the_loops_are_on_where_the_processor_fits():
    """If a new jaxlib fails this: compare calls.py with its xla/ffi/api/c_api.h."""
    fits = cpu.blocks_for(platform.machine(), llvm.get_host_cpu_features())
    assert cpu.blocks() == fits
    assert cpu.status() == fits.lanes if fits else "processor" in cpu.status()


FEATURES = {"avx512f": True, "avx2": True, "fma": True}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, AVX512),
        ({"setting": "1"}, AVX512),
        ({"setting": "avx2"}, AVX2),
        ({"setting": "0"}, "JAXUNET_CPU_LOOPS is 0"),
        ({"ffi_version": (0, 4)}, AVX512),
        ({"ffi_version": (0, 99)}, AVX512),
        ({"ffi_version": (0, 2)}, "interface is 0.2, not 0.3 or a later minor"),
        ({"ffi_version": (1, 3)}, "interface is 1.3, not 0.3 or a later minor"),
        ({"ffi_version": None}, "doesn't tell"),
        ({"system": "win32"}, "none for win32"),
        ({"features": {"avx2": True}}, "none for this processor (x86_64)"),
        ({"setting": "avx2", "features": {"avx2": True, "fma": True}}, AVX2),
    ],
)
def test_the_loops_are_chosen_or_it_says_why_not(changes, expected):
    usual = {"setting": "", "system": "linux", "machine": "x86_64"}
    usual |= {"features": FEATURES, "ffi_version": (0, 3)}
    found = cpu.choose(**(usual | changes))
    assert expected in found if isinstance(expected, str) else found == expected


@pytest.mark.parametrize(
    ("setting", "machine", "message"),
    [("of", "x86_64", "is 'of'; it must be 0"), ("avx2", "arm64", "has no AVX2")],
)
def test_a_switch_that_cannot_be_followed_is_refused(setting, machine, message):
    with pytest.raises(ConfigError, match=message):
        cpu.choose(setting, "linux", machine, {}, (0, 3))


@pytest.mark.skipif(HERE is None, reason="no loops for this machine")
def test_what_xla_refuses_is_off_and_says_so(monkeypatch):
    """A function of an interface that this XLA doesn't know."""
    monkeypatch.setattr(calls, "FFI_VERSION", (9, 9))
    assert re.match(r"XLA refuses them: .*9\.9", cpu._made_here.__wrapped__())


def test_the_switch_turns_the_loops_off_and_a_run_says_so(monkeypatch, capsys):
    monkeypatch.setenv(cpu.SWITCH, "0")
    off = cpu._made_here.__wrapped__()
    monkeypatch.setattr(cpu, "_here", lambda: off)
    assert cpu.blocks() is None
    assert environment()["cpu_loops"] == off == "JAXUNET_CPU_LOOPS is 0"
    say_if_loops_are_off()
    assert "loops for convolutions are off (JAXUNET_CPU_LOOPS is 0)" in capsys.readouterr().err


def test_a_run_with_loops_says_nothing_and_records_their_lanes(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "_here", lambda: cpu.Blocks(*AVX2))
    assert environment()["cpu_loops"] == 8
    say_if_loops_are_off()
    assert not capsys.readouterr().err
