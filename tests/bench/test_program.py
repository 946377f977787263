"""Costs and collectives read off an optimised program, against a count by hand."""

import re

import pytest

from jaxunet.bench.program import by_name, collectives, operations

TPU_PROGRAM = """HloModule jit_train_step, is_scheduled=true

%fused_computation.1 (p.1: bf16[8,16,16,4], p.2: bf16[3,3,4,8]) -> bf16[8,16,16,8] {
  %p.1 = bf16[8,16,16,4]{3,0,2,1:T(8,128)(2,1)} parameter(0)
  %p.2 = bf16[3,3,4,8]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[8,16,16,8]{3,0,2,1:T(8,128)(2,1)} convolution(%p.1, %p.2), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, metadata={op_name="jit(train_step)/jvp(UNet)/encoder/level_1/conv_0/conv_general_dilated"}
}

%fused_computation.2 (p.3: bf16[8,16,16,8]) -> f32[8] {
  %p.3 = bf16[8,16,16,8]{3,0,2,1:T(8,128)(2,1)} parameter(0)
  ROOT %reduce.1 = f32[8]{0:T(128)} reduce(%p.3), dimensions={0,1,2}, to_apply=%region_1.1, metadata={op_name="jit(train_step)/transpose(jvp(UNet))/decoder/level_0/up/reduce_sum"}
}

ENTRY %main (x: bf16[8,16,16,4], k: bf16[3,3,4,8]) -> f32[8] {
  %x = bf16[8,16,16,4]{3,0,2,1:T(8,128)(2,1)} parameter(0)
  %k = bf16[3,3,4,8]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %fusion.1 = bf16[8,16,16,8]{3,0,2,1:T(8,128)(2,1)} fusion(%x, %k), kind=kOutput, calls=%fused_computation.1, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %copy.1 = bf16[8,16,16,8]{2,3,1,0:T(8,128)(2,1)} copy(%fusion.1), backend_config={"window_config":{"estimated_cycles":"30"}}
  %fusion.2 = (f32[8]{0:T(128)}, /*index=1*/f32[2]{0:T(128)}) fusion(%copy.1), kind=kLoop, calls=%fused_computation.2, backend_config={"window_config":{"estimated_cycles":"200"}}
  %adam.1 = f32[8]{0:T(128)} multiply(%fusion.2, %fusion.2), metadata={op_name="jit(train_step)/optimizer/mul"}, backend_config={"window_config":{"estimated_cycles":"4"}}
  %all-reduce.1 = (f32[8]{0:T(128)}, f32[3,3,4,8]{3,2,1,0:T(8,128)}) all-reduce(%adam.1, %k), channel_id=1, replica_groups={{0,1}}, to_apply=%region_1.1
  ROOT %max.1 = f32[8]{0:T(128)} maximum(%adam.1, %adam.1), metadata={op_name="jit(train_step)/jvp(UNet)/head/max"}, backend_config={"window_config":{"estimated_cycles":"5"}}
}
"""  # noqa: E501 -- the lines are XLA's

GPU_PROGRAM = """HloModule jit_train_step

%gemm (a: bf16[64,32], b: bf16[32,16]) -> bf16[64,16] {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  ROOT %dot.1 = bf16[64,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(train_step)/jvp(UNet)/decoder/level_0/up/dot_general"}
}

ENTRY %main (x: bf16[2,8,8,4], k: bf16[6,3,3,4]) -> bf16[64,16] {
  %x = bf16[2,8,8,4]{3,2,1,0} parameter(0)
  %k = bf16[6,3,3,4]{3,2,1,0} parameter(1)
  %conv.1 = (bf16[2,8,8,6]{3,2,1,0}, u8[0]{0}) custom-call(%x, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", metadata={op_name="jit(train_step)/jvp(UNet)/encoder/level_0/conv_0/conv"}, backend_config={"reification_cost":[]}
  %add.1 = bf16[64,32]{1,0} add(%x, %x), backend_config={"reification_cost":[{"end_to_end_cycles":2,"exec_time_us":0.5,"compute_time_us":0.1},{"end_to_end_cycles":0,"exec_time_us":9,"name":"sol"}]}
  ROOT %gemm_fusion = bf16[64,16]{1,0} fusion(%add.1, %k), kind=kCustom, calls=%gemm, backend_config={"reification_cost":[{"exec_time_us":1000.5}]}
}
"""  # noqa: E501 -- the lines are XLA's


def test_a_tpus_cycles_have_their_kind_layer_and_pass():
    found = {each.name: each for each in operations(TPU_PROGRAM)}
    rows = {
        name: (each.cycles, each.kind, each.layer, each.backward)
        for name, each in found.items()
    }
    assert rows == {
        "fusion.1": (1000, "convolution", "encoder/level_1/conv_0", False),
        "copy.1": (30, "copy and relayout", "", False),
        "fusion.2": (200, "reduction", "decoder/level_0/up", True),
        "adam.1": (4, "optimizer", "", False),
        "max.1": (5, "element by element", "head", False),
    }


def test_collectives_are_counted_with_the_bytes_of_their_results():
    assert collectives(TPU_PROGRAM) == {"all-reduce": {"count": 1, "bytes": 4 * (8 + 288)}}


def test_a_gpus_products_have_their_size_and_the_rest_its_estimate():
    found = {each.name: each for each in operations(GPU_PROGRAM)}
    assert set(found) == {"conv.1", "add.1", "gemm_fusion"}
    assert found["conv.1"].kind == found["gemm_fusion"].kind == "convolution"
    assert found["conv.1"].flops == pytest.approx(2 * 2 * 8 * 8 * 9 * 4 * 6)
    assert found["conv.1"].moved_bytes == 2 * (2 * 64 * 4 + 6 * 9 * 4 + 2 * 64 * 6)
    assert found["gemm_fusion"].flops == pytest.approx(2 * 64 * 32 * 16)
    assert found["add.1"].microseconds == 0.5
    assert found["add.1"].flops == 0


def test_a_profile_finds_all_operations_by_either_of_their_names():
    found = by_name(GPU_PROGRAM)
    assert found["conv.1"] == found["conv_1"]
    assert (found["conv_1"].kind, found["conv_1"].opcode) == ("convolution", "custom-call")
    assert found["conv_1"].layer == "encoder/level_0/conv_0"
    assert found["add_1"].kind == "element by element"
    # Those without a cost too, as on a CPU, whose products may be jaxunet's own.
    own = GPU_PROGRAM.replace("__cudnn$convForward", "jaxunet.conv3x3.1.8")
    found = by_name(re.sub(r", backend_config=.*", "", own))
    assert (found["conv.1"].kind, found["add.1"].kind) == ("convolution", "element by element")


def test_a_product_in_a_batch_is_counted_once_for_each():
    program = GPU_PROGRAM.replace("[64,", "[5,64,").replace("[32,16]", "[5,32,16]")
    program = program.replace("lhs_contracting_dims={1}", "lhs_batch_dims={0}")
    found = {each.name: each for each in operations(program)}
    assert found["gemm_fusion"].flops == pytest.approx(5 * 2 * 64 * 32 * 16)


def test_a_librarys_product_and_one_that_stands_alone_are_counted():
    library = (
        "(bf16[64,16]{1,0}, s8[9]{0}) custom-call(%add.1, %k), "
        'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
        '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
        '"lhs_batch_dimensions":[]}}}'
    )
    alone = "bf16[64,16]{1,0} dot(%add.1, %k), lhs_contracting_dims={1}"
    program = GPU_PROGRAM.replace("k: bf16[6,3,3,4]", "k: bf16[32,16]")
    program = program.replace("%k = bf16[6,3,3,4]{3,2,1,0}", "%k = bf16[32,16]{1,0}")
    fusion = "bf16[64,16]{1,0} fusion(%add.1, %k), kind=kCustom, calls=%gemm"
    for product in (library, alone):
        found = {each.name: each for each in operations(program.replace(fusion, product))}
        assert found["gemm_fusion"].kind == "convolution"
        assert found["gemm_fusion"].flops == pytest.approx(2 * 64 * 32 * 16)
        assert found["gemm_fusion"].moved_bytes == 2 * (64 * 32 + 32 * 16 + 64 * 16)
    batched = library.replace('batch_dimensions":[]', 'batch_dimensions":["0"]')
    program = program.replace("[64,", "[5,64,").replace("[32,16]", "[5,32,16]")
    program = program.replace(
        fusion.replace("[64,", "[5,64,"), batched.replace("[64,", "[5,64,")
    )
    found = {each.name: each for each in operations(program)}
    assert found["gemm_fusion"].flops == pytest.approx(5 * 2 * 64 * 32 * 16)


def test_a_products_type_is_that_of_what_it_multiplies():
    program = GPU_PROGRAM.replace("bf16[64,16]", "f32[64,16]")
    types = {each.name: each.operands for each in operations(program)}
    assert types == {"conv.1": "bf16", "gemm_fusion": "bf16", "add.1": ""}
