"""The operations counted in compiled programs are those counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from counting import collectives, contraction_flops, parse, program_flops, valid_pairs
from jax import lax

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def test_a_matrix_product_counts_two_for_each_multiply_add():
    assert contraction_flops(jnp.dot, shape(8, 32), shape(32, 16)) == 2 * 8 * 32 * 16


def test_a_batched_product_counts_each_of_its_products():
    def product(a, b):
        return jnp.einsum("bij,bjk->bik", a, b)

    assert contraction_flops(product, shape(3, 8, 32), shape(3, 32, 16)) == 3 * 2 * 8 * 32 * 16


def test_elementwise_operations_count_nothing():
    assert contraction_flops(lambda x: jnp.tanh(x) * x + jnp.sum(x), shape(32, 32)) == 0


def test_padding_and_gaps_between_strides_are_no_data():
    plain = {"stride": 1, "lhs_dilation": 1, "rhs_dilation": 1, "low": 0}
    assert valid_pairs(4, 3, 2, **plain) == 6
    assert valid_pairs(4, 3, 4, **{**plain, "low": 1}) == 3 * 4 - 2
    assert valid_pairs(5, 3, 2, **{**plain, "stride": 2}) == 6
    assert valid_pairs(5, 3, 1, **{**plain, "rhs_dilation": 2}) == 3
    # data at 0, 2 and 4, a kernel of 2: each of the four results meets it once
    assert valid_pairs(3, 2, 4, **{**plain, "lhs_dilation": 2}) == 4


CONVOLUTIONS = {
    "plain": ({"window_strides": (1, 1), "padding": "SAME"}, 4, 22**2),
    "strided": ({"window_strides": (2, 2), "padding": "SAME"}, 4, 11**2),
    "dilated": ({"window_strides": (1, 1), "padding": "VALID", "rhs_dilation": (2, 2)}, 4, 12**2),
    "transposed": ({"window_strides": (1, 1), "padding": [(1, 1)] * 2, "lhs_dilation": (2, 2)}, 4, 22**2),
    "grouped": ({"window_strides": (2, 2), "padding": "SAME", "feature_group_count": 2}, 2, 11**2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_and_its_gradients_count_products_of_data_alone(name):
    options, features, pairs = CONVOLUTIONS[name]
    x, kernel = shape(2, 8, 8, 4), shape(3, 3, features, 6)

    def loss(kernel, x):
        return jnp.sum(lax.conv_general_dilated(x, kernel, dimension_numbers=DIMENSIONS, **options) ** 2)

    by_hand = 2 * 2 * features * 6 * pairs
    assert contraction_flops(loss, kernel, x) == by_hand
    assert contraction_flops(jax.grad(loss), kernel, x) == 2 * by_hand
    assert contraction_flops(jax.grad(loss, argnums=(0, 1)), kernel, x) == 3 * by_hand


def test_a_loop_counts_as_often_as_it_runs():
    def loop(x, ws):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    def loss(ws, x):
        return jnp.sum(loop(x, ws))

    once = 2 * 8 * 32 * 32
    assert contraction_flops(loop, shape(8, 32), shape(5, 32, 32)) == 5 * once
    assert contraction_flops(jax.grad(loss), shape(5, 32, 32), shape(8, 32)) == 3 * 5 * once


def test_a_loop_of_unknown_length_with_a_product_is_refused():
    def loop(x, n):
        return lax.fori_loop(0, n, lambda i, x: jnp.tanh(x @ x), x)

    with pytest.raises(ValueError, match="unknown number of times"):
        contraction_flops(loop, shape(32, 32), jax.ShapeDtypeStruct((), jnp.int32))


def test_a_conditional_counts_as_its_most_expensive_branch():
    def branch(x, flag):
        return lax.cond(flag, lambda x: jnp.tanh(x @ x) @ x, lambda x: x @ x, x)

    flops = contraction_flops(branch, shape(32, 32), jax.ShapeDtypeStruct((), jnp.bool_))
    assert flops == 2 * 2 * 32**3


def test_what_a_checkpoint_asks_to_be_computed_again_counts_if_it_is_not_merged():
    block = jax.checkpoint(lambda w, x: jnp.tanh(x @ w))

    def loss(w, x):
        return jnp.sum(block(w, x) ** 2)

    once = 2 * 8 * 32 * 32
    assert contraction_flops(jax.value_and_grad(loss), shape(32, 32), shape(8, 32), merge=False) == 3 * once
    assert contraction_flops(jax.value_and_grad(loss), shape(32, 32), shape(8, 32)) <= 3 * once


HLO = """\
HloModule step, is_scheduled=true

%fused (a: f32[4,8], b: f32[8,2]) -> f32[4,2] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,2]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (x: f32[4,8], y: f32[8,2]) -> (f32[4,2], f32[4,2]) {
  %x = f32[4,8]{1,0} parameter(0)
  %y = f32[8,2]{1,0} parameter(1)
  %fusion = f32[4,2]{1,0} fusion(%x, %y), kind=kLoop, calls=%fused, metadata={op_name="body=%fused"}
  %gemm = (f32[4,2]{1,0}, s8[64]{0}) custom-call(%x, %y), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %sort = f32[4,2]{1,0} custom-call(%fusion), custom_call_target="SomeSort"
  %get = f32[4,2]{1,0} get-tuple-element(%gemm), index=0
  ROOT %tuple = (f32[4,2]{1,0}, /*index=1*/f32[4,2]{1,0}) tuple(%sort, %get)
}
"""


def test_fusions_and_library_calls_count():
    assert program_flops(HLO) == 2 * (2 * 4 * 8 * 2)


def test_a_product_in_a_library_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="convolutionMystery"):
        program_flops(HLO.replace("SomeSort", "convolutionMystery"))


def test_the_shapes_of_a_tuple_are_all_read():
    computations, entry = parse(HLO)
    assert entry == "main"
    assert computations["main"]["tuple"].shapes == [(4, 2), (4, 2)]
    assert computations["main"]["tuple"].operands == ["sort", "get"]


SHARDED = """\
HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%renew (p: (f32[4])) -> f32[4] {
  %p = (f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%p), index=0
  %count = (s32[7]{0}, pred[3]{0}) all-reduce(%x, %x), replica_groups={}, to_apply=%add
  ROOT %y = f32[4]{0} copy(%x)
}

%keep (p: (f32[4])) -> f32[4] {
  %p = (f32[4]{0}) parameter(0)
  ROOT %x = f32[4]{0} get-tuple-element(%p), index=0
}

ENTRY %main (x: f32[4], i: s32[]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %i = s32[] parameter(1)
  %whole = bf16[2,8]{1,0} all-gather-start(%x), dimensions={0}
  %done = bf16[2,8]{1,0} all-gather-done(%whole)
  %tuple = (f32[4]{0}) tuple(%x)
  ROOT %new = f32[4]{0} conditional(%i, %tuple, %tuple), branch_computations={%renew, %keep}
}
"""


def test_collectives_are_listed_with_their_bytes_and_apart_in_conditionals():
    assert collectives(SHARDED) == [("all-gather", 2 * 16, False), ("all-reduce", 4 * 7 + 3, True)]
