"""Named convolution problems. The tests check each of them; the benchmark may time any of them.

One row of a table is one problem: ``ConvCase(name, input size, out_channels, kernel, ...)``. Scalars stand for every
spatial axis, as in torch.
"""

from __future__ import annotations

import dataclasses
import math

PASSES = ("forward", "backward_input", "backward_weight")


@dataclasses.dataclass(frozen=True)
class ConvCase:
    """A convolution, or a transposed one, of ``input`` (batch, channels, spatial...)."""

    name: str
    input: tuple[int, ...]
    out_channels: int
    kernel: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    bias: bool = False
    transposed: bool = False
    output_padding: int | tuple[int, ...] = 0

    def __post_init__(self):
        for field in ("kernel", "stride", "padding", "dilation", "output_padding"):
            value = getattr(self, field)
            if isinstance(value, int):
                object.__setattr__(self, field, (value,) * self.dims)
            assert len(getattr(self, field)) == self.dims, f"{self.name}: {field} needs {self.dims} values"

    def __str__(self) -> str:
        return self.name

    @property
    def dims(self) -> int:
        return len(self.input) - 2

    @property
    def weight(self) -> tuple[int, ...]:
        """Size of the weight: out x in/groups x kernel, transposed in x out/groups x kernel."""
        first, second = self.out_channels, self.input[1]
        if self.transposed:
            first, second = second, first
        return (first, second // self.groups, *self.kernel)

    @property
    def output(self) -> tuple[int, ...]:
        """Size of the output, by the lecture's formula (item L1), or its inverse for a transposed convolution."""
        sizes = []
        for axis, length in enumerate(self.input[2:]):
            extent = self.dilation[axis] * (self.kernel[axis] - 1) + 1
            stride, padding = self.stride[axis], self.padding[axis]
            if self.transposed:
                sizes.append((length - 1) * stride - 2 * padding + extent + self.output_padding[axis])
            else:
                sizes.append(math.ceil((length - extent + 1 + 2 * padding) / stride))
        return (self.input[0], self.out_channels, *sizes)

    @property
    def multiply_adds(self) -> int:
        """Of one pass; each of the three takes the same number (lecture item L2)."""
        written = self.input if self.transposed else self.output
        return math.prod(written) * math.prod(self.weight[1:])

    def reduction(self, of: str) -> int:
        """How many products one element of the pass's result sums, at most. The error of a sum grows with it."""
        taps, groups = math.prod(self.kernel), self.groups
        if of == "backward_weight":
            smaller = self.input if self.transposed else self.output
            return max(1, smaller[0] * math.prod(smaller[2:]))
        channels = self.input[1] if of == "forward" else self.out_channels
        return max(1, channels // groups * taps)


# Ordinary layers, in small.
COMMON = (
    ConvCase("pointwise", (2, 64, 14, 14), 48, 1),
    ConvCase("pointwise_odd_pixels", (3, 64, 5, 7), 96, 1, bias=True),
    ConvCase("pointwise_blocks", (2, 96, 15, 13), 128, 1),
    ConvCase("pointwise_deep", (1, 1024, 3, 2), 32, 1, bias=True),
    ConvCase("pointwise_bias_stride2", (2, 32, 15, 15), 64, 1, stride=2, bias=True),
    ConvCase("3x3", (2, 32, 14, 14), 32, 3, padding=1),
    ConvCase("3x3_bias_batch1", (1, 16, 28, 28), 24, 3, padding=1, bias=True),
    ConvCase("3x3_valid_batch3", (3, 16, 13, 17), 16, 3),
    ConvCase("3x3_stride2", (2, 16, 28, 28), 32, 3, stride=2, padding=1),
    ConvCase("3x3_stride2_odd", (2, 16, 15, 13), 16, 3, stride=2, padding=1, bias=True),
    ConvCase("5x5_bias", (2, 8, 16, 16), 20, 5, padding=2, bias=True),
    ConvCase("5x5_stride2", (2, 16, 17, 17), 16, 5, stride=2, padding=2),
    ConvCase("stem_7x7_stride2", (1, 3, 56, 56), 32, 7, stride=2, padding=3),
    ConvCase("stem_11x11_stride4", (1, 3, 63, 63), 16, 11, stride=4, padding=2, bias=True),
    ConvCase("lenet_first", (4, 1, 28, 28), 20, 5, padding=2, bias=True),
    ConvCase("3x3_dilation2", (2, 16, 17, 17), 16, 3, padding=2, dilation=2),
    ConvCase("3x3_dilation3_stride2", (1, 8, 21, 19), 12, 3, stride=2, padding=3, dilation=3, bias=True),
    ConvCase("patch_embedding", (2, 3, 32, 32), 48, 8, stride=8, bias=True),
    ConvCase("deep_7x7_map", (2, 128, 7, 7), 64, 3, padding=1),
)

# Weight gradients of one tap: the wider tensor is packed while the first filters, or channels, are multiplied.
POINTWISE = (
    ConvCase("pointwise_20_to_80", (2, 20, 23, 17), 80, 1, bias=True),
    ConvCase("pointwise_80_to_40_stride2", (2, 80, 25, 27), 40, 1, stride=2),
    ConvCase("pointwise_groups_of_48", (1, 96, 19, 17), 32, 1, groups=2, bias=True),
    ConvCase("pointwise_reads_only_padding", (3, 4, 1, 1), 5, 1, stride=3, padding=1, bias=True),
    ConvCase("pointwise_line_reads_only_padding", (3, 20, 1), 18, 1, stride=7, padding=1, bias=True),
)

# One column: backward input has one phase in spite of the stride, of one of the kernel's three columns. Short lines:
# pixels of different ones may seem to be neighbours.
NARROW = (
    ConvCase("one_column_stride_1x4", (2, 48, 22, 1), 1, (2, 3), stride=(1, 4), padding=(2, 1), dilation=(2, 1)),
    ConvCase("short_lines_stride_1x2", (5, 8, 3, 31), 7, (1, 7), stride=(1, 2), padding=(2, 3)),
)

# Threads divide few of Winograd's tiles by panels of filters, and many tiles by chunks; lines of few channels are
# longer than a chain of additions, or several of them make one.
DIVIDED = (
    ConvCase("many_tiles", (2, 5, 46, 46), 7, 3, padding=1),
    ConvCase("few_tiles_many_filters", (1, 20, 9, 13), 130, 3, padding=1, bias=True),
    ConvCase("few_tiles_uneven_panels", (2, 18, 8, 8), 80, 3, padding=1),
    ConvCase("few_tiles_stride2_panels", (1, 34, 13, 11), 96, 3, stride=2, padding=1),
    ConvCase("lines_of_few_channels", (3, 3, 21, 23), 48, 3, stride=2, padding=1),
    ConvCase("long_lines_of_few_channels", (1, 2, 700), 48, 5, padding=2),
    ConvCase("lines_of_many_channels", (2, 37, 13, 17), 48, (3, 5), stride=2, padding=(1, 0), dilation=(2, 1)),
    ConvCase("long_line_of_phases", (1, 1, 9000), 24, 40, stride=30, padding=3),
    ConvCase("lines_of_which_some_are_skipped", (1, 5, 7, 11, 9), 32, (1, 2, 3), stride=(2, 3, 1), padding=(0, 1, 2)),
    ConvCase("weight_of_many_blocks", (2, 70, 6, 5), 131, 3, stride=2, padding=1, bias=True),
    ConvCase("pointwise_weight_of_many_blocks", (1, 130, 9, 9), 203, 1, bias=True),
    # The weight's gradient has four parts, or two, and several chunks of pixels: with three threads these are tasks.
    ConvCase("pointwise_four_parts_of_weight", (2, 264, 18, 17), 262, 1),
    ConvCase("pointwise_two_parts_of_weight", (3, 96, 16, 17), 288, 1),
)

# Winograd sees 2 to 5 taps per stride, or segments of more, along one axis or two; with less than a vector of channels,
# the parts of a strided image are joined.
TAPS_PER_STRIDE = (
    ConvCase("2x2", (2, 17, 11, 13), 20, 2, bias=True),
    ConvCase("4x4_padded", (2, 12, 12, 9), 24, 4, padding=3),
    ConvCase("4x4_stride2", (2, 20, 18, 15), 17, 4, stride=2, padding=1, bias=True),
    ConvCase("4x4_stride2_groups", (1, 6, 16, 21), 10, 4, stride=2, padding=2, groups=2),
    ConvCase("7x7_stride2_one_channel", (3, 1, 31, 20), 5, 7, stride=2, padding=6, bias=True),
    ConvCase("8x8_stride3", (1, 9, 25, 22), 12, 8, stride=3, padding=4),
    ConvCase("9x9_stride2", (2, 3, 24, 19), 16, 9, stride=2, padding=3, bias=True),
    ConvCase("3x3_dilation9", (1, 12, 11, 8), 10, 3, padding=9, dilation=9, bias=True),
    ConvCase("4x4_dilation3_groups", (2, 10, 17, 13), 18, 4, padding=4, dilation=3, groups=2),
    ConvCase("5x5_dilation2", (1, 17, 14, 19), 9, 5, padding=3, dilation=2),
    ConvCase("2x4x4_stride2", (1, 5, 4, 12, 11), 9, (2, 4, 4), stride=(1, 2, 2), padding=1, bias=True),
    ConvCase("7x7_stride1", (2, 9, 12, 15), 10, 7, padding=3, bias=True),
    ConvCase("9x5_groups", (1, 10, 14, 13), 18, (9, 5), padding=(4, 2), groups=2, bias=True),
    ConvCase("11x7_stride2", (1, 3, 25, 19), 17, (11, 7), stride=2, padding=(5, 3)),
    ConvCase("3x4_stride_1x2", (2, 17, 9, 14), 12, (3, 4), stride=(1, 2), padding=1, bias=True),
    ConvCase("kernel_7x1", (2, 17, 13, 10), 12, (7, 1), padding=(3, 0), bias=True),
    ConvCase("kernel_1x3_dilation2", (1, 20, 7, 23), 17, (1, 3), padding=(0, 2), dilation=(3, 2)),
    ConvCase("3x3_dilation_1x2", (1, 9, 8, 13), 16, 3, padding=(1, 2), dilation=(1, 2), bias=True),
    ConvCase("wide_image", (1, 8, 3, 530), 9, 3, padding=1),
)

# Every axis has its own parameters: mixed-up axes show here.
ASYMMETRIC = (
    ConvCase("kernel_1x7", (2, 8, 9, 12), 16, (1, 7), padding=(0, 3)),
    ConvCase("kernel_5x2", (2, 8, 11, 10), 9, (5, 2), padding=(1, 0), bias=True),
    ConvCase("all_asymmetric", (2, 6, 23, 17), 10, (3, 2), stride=(2, 3), padding=(4, 1), dilation=(3, 2), bias=True),
    ConvCase("stride_1x3", (2, 16, 9, 20), 16, 3, stride=(1, 3), padding=1),
)

GROUPED = (
    ConvCase("groups2", (2, 32, 14, 14), 48, 3, padding=1, groups=2, bias=True),
    ConvCase("resnext_32x4", (1, 128, 14, 14), 128, 3, padding=1, groups=32),
    ConvCase("grouped_pointwise_odd", (2, 21, 9, 9), 33, 1, groups=3),
    ConvCase("grouped_stride2", (2, 20, 15, 15), 30, 3, stride=2, padding=1, groups=5),
    ConvCase("groups_of_16_wide_line", (1, 48, 5, 141), 57, 3, stride=(2, 1), padding=1, groups=3, bias=True),
    ConvCase("groups_of_9_dilated", (2, 36, 13, 10), 44, 3, stride=(1, 3), padding=2, dilation=(2, 1), groups=4),
    ConvCase("groups_of_64_pointwise", (1, 128, 9, 8), 66, 1, groups=2, bias=True),
    ConvCase("depthwise_3x3", (2, 32, 28, 28), 32, 3, padding=1, groups=32),
    ConvCase("depthwise_3x3_odd", (2, 19, 13, 15), 19, 3, padding=1, groups=19, bias=True),
    ConvCase("depthwise_5x5_stride2", (2, 24, 17, 17), 24, 5, stride=2, padding=2, groups=24),
    ConvCase("depthwise_7x7", (1, 16, 14, 14), 16, 7, padding=3, groups=16, bias=True),
    ConvCase("depthwise_dilated", (1, 16, 15, 15), 16, 3, padding=2, dilation=2, groups=16),
    ConvCase("depthwise_6x6", (1, 21, 9, 30), 21, 6, padding=3, groups=21, bias=True),
    ConvCase("depthwise_13x13", (1, 17, 15, 23), 17, 13, padding=6, groups=17),
    ConvCase("depthwise_blocks_of_channels", (1, 85, 5, 40), 85, 7, padding=3, groups=85, bias=True),
    ConvCase(
        "depthwise_stride3_dilation3", (1, 18, 27, 15), 18, (6, 3), stride=3, padding=(2, 0), dilation=(3, 1), groups=18
    ),  # most of the backward pass's phases have no tap
    ConvCase("depthwise_wide_lines", (1, 520, 6, 28), 520, 5, padding=2, groups=520, bias=True),
    ConvCase(
        "depthwise_wide_lines_stride2", (1, 1030, 7, 24), 1030, 3, stride=2, padding=2, dilation=(1, 2), groups=1030
    ),
    # Weight gradients: pieces of a line, kernels of one line, two channels in planes of several pieces.
    ConvCase("depthwise_long_lines", (2, 21, 3, 150), 21, (3, 3), padding=1, groups=21),
    ConvCase("depthwise_long_lines_stride2", (1, 21, 5, 170), 21, (3, 6), stride=(1, 2), padding=(1, 3), groups=21),
    ConvCase("depthwise_5x5_lines_apart", (2, 20, 13, 33), 20, 5, padding=(3, 2), dilation=(2, 1), groups=20),
    ConvCase("depthwise_7x7_long_lines", (1, 18, 8, 75), 18, 7, padding=3, groups=18),
    ConvCase("depthwise_few_channels", (3, 2, 41, 60), 2, (5, 3), padding=(2, 1), groups=2, bias=True),
    ConvCase("depthwise_multiplier2", (2, 17, 12, 12), 34, 3, padding=1, groups=17),
)

# Channel counts around the widths of vectors and blocks.
CHANNELS = (
    *(
        ConvCase(f"channels_{inputs}_to_{outputs}", (2, inputs, 10, 11), outputs, 3, padding=1, bias=True)
        for inputs, outputs in ((1, 1), (3, 5), (5, 3), (17, 33), (33, 17), (65, 67), (67, 65))
    ),
    ConvCase("pointwise_65_to_67", (2, 65, 7, 9), 67, 1),
    ConvCase("pointwise_1_to_17", (3, 1, 9, 9), 17, 1, bias=True),
)

# Kernels whose lanes are pixels or read channels: few channels on one side, patches that do not overlap.
FEW_CHANNELS = (
    ConvCase("last_layer", (2, 40, 9, 13), 3, 3, padding=1, bias=True),
    ConvCase("last_layer_padded_and_dilated", (2, 33, 9, 13), 4, (5, 3), padding=(6, 1), dilation=(1, 2)),
    ConvCase("last_layer_1x1", (1, 64, 17, 11), 1, 1),
    ConvCase("last_layer_grouped", (2, 40, 11, 9), 10, 3, stride=(1, 2), padding=1, groups=2, bias=True),
    ConvCase("first_layer_to_40", (2, 3, 19, 14), 40, 3, stride=2, padding=1, bias=True),
    ConvCase("few_in_narrow_strips", (2, 5, 19, 70), 20, (3, 5), padding=(1, 2), bias=True),
    ConvCase("one_in_many_out", (5, 1, 28, 28), 34, 3),
    ConvCase("few_both_several_bands", (1, 3, 250, 190), 4, (3, 5), padding=(1, 2), bias=True),
    ConvCase("several_blocks_of_channels", (1, 50, 21, 23), 6, 3, padding=1, bias=True),
    ConvCase("groups_of_8_with_a_rest", (1, 24, 15, 17), 24, 3, padding=1, groups=3, bias=True),
    ConvCase("patches_and_a_rest", (2, 5, 14, 11), 20, (3, 2), stride=(3, 2), bias=True),
    ConvCase("patches_grouped", (2, 12, 8, 12), 18, 4, stride=4, groups=2),
)

EXTREME = (
    ConvCase("map_1x1", (3, 33, 1, 1), 17, 1, bias=True),
    ConvCase("map_1x1_grouped", (5, 42, 1, 1), 26, 1, groups=2),
    ConvCase("map_1x1_kernel_3x3", (2, 16, 1, 1), 16, 3, padding=1),
    ConvCase("kernel_is_input", (3, 20, 7, 5), 31, (7, 5), bias=True),
    ConvCase("kernel_is_input_1d", (3, 10, 9), 12, 9, stride=2, bias=True),
    ConvCase("kernel_is_input_3d", (24, 3, 2, 3, 4), 17, (2, 3, 4), bias=True),
    ConvCase("kernel_is_input_along_z", (2, 9, 5, 1, 1), 8, (5, 1, 1)),
    ConvCase("kernel_is_input_of_one_channel", (2, 1, 6, 5), 20, (6, 5)),
    ConvCase("one_output_padded_and_dilated", (2, 40, 5, 6), 24, (3, 2), padding=(1, 0), dilation=(3, 5), bias=True),
    ConvCase("one_output_unread_tail_grouped", (3, 66, 6, 7), 36, (5, 4), stride=(2, 4), groups=2),
    ConvCase("transposed_from_1x1", (9, 20, 1, 1), 70, (4, 3), transposed=True, bias=True),
    ConvCase("padding_over_kernel", (2, 5, 6, 5), 7, 2, padding=5, bias=True),
    ConvCase("padding_over_input", (1, 4, 2, 3), 6, 3, padding=4, stride=2),
    ConvCase("stride_over_kernel", (2, 9, 19, 22), 11, 2, stride=5, padding=1, bias=True),
    ConvCase("unread_tail", (1, 4, 12, 12), 4, 2, stride=4),
    ConvCase("dilation_over_input", (1, 3, 5, 5), 4, 2, padding=3, dilation=7),
    ConvCase("wide_row", (1, 3, 2, 301), 5, 3, padding=1),
    ConvCase("batch_only", (65, 2, 3, 3), 3, 3, bias=True),
)

# Nothing to compute, and gradients of zero. (Inputs of zero channels or pixels, where torch differs: test_convolution.)
EMPTY = (
    ConvCase("empty_batch", (0, 5, 8, 8), 7, 3, padding=1, bias=True),
    ConvCase("empty_batch_1d", (0, 4, 9), 6, 3),
    ConvCase("empty_batch_transposed", (0, 4, 5, 5), 6, 3, stride=2, transposed=True),
)

ONE_DIMENSION = (
    ConvCase("1d_k3", (2, 32, 50), 48, 3, padding=1),
    ConvCase("1d_wav2vec_k10_s5", (2, 1, 503), 32, 10, stride=5),
    ConvCase("1d_wav2vec_k3_s2", (2, 32, 51), 32, 3, stride=2, bias=True),
    ConvCase("1d_depthwise_k31", (2, 24, 60), 24, 31, padding=15, groups=24, bias=True),
    ConvCase("1d_dilated_causal", (1, 16, 70), 16, 2, padding=8, dilation=8),
    ConvCase("1d_pointwise_odd", (3, 17, 29), 5, 1),
    ConvCase("1d_k11_grouped", (2, 40, 61), 34, 11, padding=5, groups=2, bias=True),
    ConvCase("1d_long_line", (1, 9, 1111), 17, 3, padding=1, bias=True),
    ConvCase("1d_k4_s2", (2, 24, 75), 17, 4, stride=2, padding=1),
)

THREE_DIMENSIONS = (
    ConvCase("3d_3x3x3", (1, 12, 6, 10, 9), 16, 3, padding=1, bias=True),
    ConvCase("3d_stride_1_2_2", (1, 8, 5, 14, 14), 16, 3, stride=(1, 2, 2), padding=1),
    ConvCase("3d_patch_stride_is_kernel", (2, 3, 4, 16, 16), 24, (2, 4, 4), stride=(2, 4, 4), bias=True),
    ConvCase("3d_asymmetric", (2, 5, 6, 9, 8), 7, (2, 1, 3), stride=(1, 3, 2), padding=(1, 0, 2), dilation=(2, 1, 2)),
    ConvCase(
        "3d_stride_2_dilation_2_along_z",
        (2, 10, 6, 13, 7),
        12,
        (2, 3, 3),
        stride=(2, 1, 1),
        padding=(1, 0, 1),
        dilation=(2, 1, 1),
        groups=2,
    ),
    ConvCase("3d_deep_kernel_stride_1_2_2", (1, 20, 4, 11, 12), 17, (5, 3, 3), stride=(1, 2, 2), padding=(2, 1, 1)),
    ConvCase("3d_slices_of_padding", (1, 6, 3, 5, 5), 8, (1, 3, 3), padding=1),
    ConvCase("3d_depthwise", (1, 17, 5, 8, 8), 17, 3, padding=1, groups=17),
    ConvCase("3d_grouped", (1, 24, 5, 6, 7), 40, (2, 3, 1), stride=(2, 1, 2), padding=1, groups=2, bias=True),
    ConvCase("3d_factorised_1x3x3", (1, 16, 4, 10, 10), 16, (1, 3, 3), padding=(0, 1, 1)),
    ConvCase("3d_factorised_3x1x1", (2, 17, 7, 6, 5), 20, (3, 1, 1), padding=(1, 0, 0), bias=True),
    ConvCase("3d_factorised_5x1x1_stride2", (1, 9, 11, 4, 5), 10, (5, 1, 1), stride=(2, 1, 1), padding=(2, 0, 0)),
)

TRANSPOSED = (
    ConvCase("transposed_2x2_stride2", (2, 16, 9, 9), 12, 2, stride=2, bias=True, transposed=True),
    ConvCase("transposed_4x4_stride2", (1, 16, 8, 8), 16, 4, stride=2, padding=1, transposed=True),
    ConvCase(
        "transposed_output_padding", (2, 17, 7, 6), 9, 3, stride=(2, 3), padding=1, output_padding=(1, 2), bias=True,
        transposed=True,
    ),
    ConvCase("transposed_grouped", (2, 12, 7, 7), 18, 3, stride=2, padding=1, groups=3, bias=True, transposed=True),
    ConvCase(
        "transposed_dilated", (1, 8, 7, 8), 6, 3, stride=2, padding=2, dilation=2, output_padding=1, transposed=True,
    ),
    ConvCase("transposed_1d", (2, 16, 25), 8, 10, stride=5, padding=2, output_padding=3, bias=True, transposed=True),
    ConvCase("transposed_3d", (1, 6, 3, 5, 5), 8, 3, stride=(1, 2, 2), padding=1, output_padding=(0, 1, 1),
             bias=True, transposed=True),
)  # fmt: skip

# Real layers, too slow for the naive algorithm: enough work to reach every level of blocking.
LARGE = (
    ConvCase("resnet_3x3_56", (1, 64, 56, 56), 64, 3, padding=1),
    ConvCase("resnet_pointwise_28", (2, 256, 28, 28), 128, 1),
    ConvCase("resnet_3x3_7", (1, 512, 7, 7), 512, 3, padding=1),
    ConvCase("resnet_downsample", (1, 256, 56, 56), 512, 1, stride=2),
    ConvCase("resnet_stem", (1, 3, 224, 224), 64, 7, stride=2, padding=3),
)

SMALL = (
    *COMMON, *POINTWISE, *NARROW, *DIVIDED, *TAPS_PER_STRIDE, *ASYMMETRIC, *GROUPED, *CHANNELS, *EXTREME, *EMPTY,
    *ONE_DIMENSION, *THREE_DIMENSIONS, *TRANSPOSED,
)  # fmt: skip
CASES = (*SMALL, *LARGE)
BY_NAME = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES), "names of cases must differ"
