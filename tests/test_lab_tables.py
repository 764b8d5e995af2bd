# ruff: noqa: E501
"""The printed tables of the measuring verbs, to the letter, from fixed numbers."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("rich")

from torch_convlab.lab import benchmark, ceilings, choices, command, machine, tuning
from torch_convlab.lab.commands import bench, explain, roofline, tune, verify
from torch_convlab.lab.exported import Convolution
from torch_convlab.lab.verification import Comparison


@pytest.fixture
def printed(capsys):
    def lines(table) -> str:
        command.show(table)
        return re.sub("─+", "───", capsys.readouterr().out)

    return lines


def speed(ours: dict, theirs: dict, ratio: float) -> benchmark.Speed:
    return benchmark.Speed(ours, theirs, ratio, ratio - 0.1, ratio + 0.1)


BENCHMARK = benchmark.Benchmark(
    "net", (1, 3, 8, 8), 2, False,
    [
        benchmark.LayerSpeed(["a", "b"], "conv2d", (1, 4, 8, 8), 10**6, 1e-7, speed(
            {"NCHW": 1e-3, "channels_last": 2e-3}, {"NCHW": 3e-3, "channels_last": 1.5e-3}, 1.5)),
        benchmark.LayerSpeed(["fc"], "linear", (1, 10), 640, 1e-7, speed({"contiguous": 2e-6}, {"contiguous": 1e-6}, 0.5)),
        benchmark.LayerSpeed(["bad"], "linear", (1, 10), 640, 1.0, benchmark.Speed({}, {}, *[float("nan")] * 3)),
    ],
    {"inference": speed({"NCHW": 0.01, "channels_last": 0.02}, {"NCHW": 0.03, "channels_last": 0.015}, 1.5)},
)  # fmt: skip


def test_bench_by_layer(printed):
    assert (
        printed(bench.layer_table(BENCHMARK))
        == """\
net, input 1 x 3 x 8 x 8, 2 thread(s), forward

  layers         operation          output   ours NCHW   torch NCHW   ours channels_last   torch channels_last   torch / ours
 ───
  a and 1 more   conv2d      1 x 4 x 8 x 8        1 ms         3 ms                 2 ms                1.5 ms           1.50   (1.40 to 1.60)
  fc             linear             1 x 10        2 us         1 us                                                      0.50   (0.40 to 0.60)
  bad            linear             1 x 10

"""
    )


def test_bench_of_the_whole_model(printed):
    assert (
        printed(bench.total_table(BENCHMARK))
        == """\

  the whole model   ours NCHW   torch NCHW   ours channels_last   torch channels_last   torch / ours
 ───
  inference             10 ms        30 ms                20 ms                 15 ms           1.50   (1.40 to 1.60)

"""
    )


def test_the_geometric_mean_counts_every_layer():
    assert benchmark.geometric_mean(BENCHMARK.layers[:2]) == pytest.approx((1.5 * 1.5 * 0.5) ** (1 / 3))


def test_explain(printed):
    problem = Convolution((1, 64, 56, 56), (64, 64, 3, 3), (1, 1), (1, 1), (1, 1))
    rows = [
        choices.AlgorithmReport("naive", False, None, 4.62e9, 0, None),
        choices.AlgorithmReport("winograd", True, None, 4.08e7, 2_080_000, 1.25e-3),
        choices.AlgorithmReport("depthwise", False, "it needs groups", None, None, None),
    ]
    numbers = 115_605_504, 1_753_088, 2.5e-3, "arithmetic"
    text = printed(explain.algorithm_table(
        choices.Explanation(["a", "b", "c", "d"], problem, "forward", "NCHW", *numbers, "winograd", rows)
    ))  # fmt: skip
    assert (
        text
        == """\
a, b, c, ...: forward, input 1 x 64 x 56 x 56, weight 64 x 64 x 3 x 3, stride 1 x 1, padding 1 x 1, dilation 1 x 1, groups 1, NCHW
231 MFLOP, 1.75 MB; bound 2.5 ms by arithmetic

      algorithm     cost   workspace      time   of bound   why not
 ───
      naive       4.62 G         0 B                        not measured
  →   winograd    40.8 M     2.08 MB   1.25 ms      200 %
      depthwise                                             it needs groups

"""
    )


def test_roofline(printed):
    points = [
        ceilings.Point(["a", "b"], "conv2d", 10**9, 10**7, 0.05, 0.02, "arithmetic"),
        ceilings.Point(["pool"], "max_pool2d", 0, 10**6, 1e-4, 5e-5, "memory"),
    ]
    result = ceilings.Roofline(
        "net", (1, 3, 8, 8), "NCHW", machine.Machine("a CPU", 2, 100e9, "torch.mm", 20e9), points
    )
    assert (
        printed(roofline.point_table(result))
        == """\
net, input 1 x 3 x 8 x 8, NCHW; a CPU, 2 thread(s): peak 100 GFLOP/s (torch.mm), copy 20 GB/s

  layers         operation    FLOP/byte     time   FLOP/s   bytes/s   bound           by   of bound
 ───
  a and 1 more   conv2d           200.0    50 ms     40 G     200 M   20 ms   arithmetic       40 %
  pool           max_pool2d               100 us               10 G   50 us       memory       50 %

of bound: 100 % runs at a roof; winograd computes fewer multiplications than are counted
"""
    )


def test_tune(printed):
    entries = [
        tuning.Tuned(["a"], "forward", "NCHW", "winograd", None, "implicit_gemm", {"winograd": 2e-3, "implicit_gemm": 1e-3}),
        tuning.Tuned(["b"], "forward", "NCHW", "winograd", "naive", "winograd", {"winograd": 1e-3}),
        tuning.Tuned(["c", "d"], "forward", "NCHW", "winograd", None, "winograd", {"winograd": 1e-3}),
    ]  # fmt: skip
    assert [entry.changed for entry in entries] == [True, True, False] and entries[0].gain == 2.0
    result = tuning.Tuning("net", (1, 3, 8, 8), 2, "file", entries)
    assert (
        printed(tune.entry_table(result, everything=False))
        == """\
net, input 1 x 3 x 8 x 8: what changed

  layers   pass      format   before                chosen          times faster   measured
 ───
  a        forward   NCHW     winograd (expected)   implicit_gemm           2.00   winograd 2 ms, implicit_gemm 1 ms
  b        forward   NCHW     naive                 winograd                       winograd 1 ms

"""
    )
    assert "c and 1 more" in printed(tune.entry_table(result, everything=True))


def test_verify(printed):
    rows = [
        Comparison("conv", "output", (2, 3), 3e-7, 2e-7, 1e-5, 4.0, 3.0),
        Comparison("conv", "gradient of weight", (3, 3), 1e-2, 2e-7, 1e-5, 12345.6, 3.0),
    ]
    assert (
        printed(verify.comparison_table(rows, "a title"))
        == """\
a title

  layer   tensor                size      ours   torch.nn   ours, ulp   torch.nn, ulp
 ───
  conv    output               2 x 3   3.0e-07    2.0e-07         4.0             3.0
  conv    gradient of weight   3 x 3   1.0e-02    2.0e-07     12345.6             3.0   diverges

max|error| / max|reference|, and in units of float32's last place at max|reference|
"""
    )
