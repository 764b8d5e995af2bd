"""The lecture step by step, in numbers: sizes, receptive fields, the patch loop, gradients, pooling, batch norm."""

import torch

from torch_convlab import functional as F
from torch_convlab import lab, models

# 1. A layer: 3 x 32 x 32 in, ten 5 x 5 filters, stride 1, padding 2.
layer = torch.nn.Sequential(torch.nn.Conv2d(3, 10, 5, padding=2))
row = lab.summary(layer, (1, 3, 32, 32)).layers[0]
print(f"output {row.output_size[1:]}, {row.parameters} parameters, {row.multiply_adds:,} multiply-adds")
assert (row.output_size[1:], row.parameters, row.multiply_adds) == ((10, 32, 32), 760, 768_000)

# 2. Each 3 x 3 layer adds 2 to the receptive field: 1 + L * (K - 1).
chain = torch.nn.Sequential(*(torch.nn.Conv2d(1, 1, 3, padding=1) for _ in range(5)))
fields = [row.receptive_field[0] for row in lab.summary(chain, (1, 1, 32, 32)).layers]
print("receptive fields of five 3x3 layers:", fields)
assert fields == [3, 5, 7, 9, 11]


# 3. The forward pass is a loop over patches; the algorithm "naive" is that loop.
def patch_loop(x, w, b, padding):
    x = torch.nn.functional.pad(x, [padding] * 4)
    size = x.shape[2] - w.shape[2] + 1, x.shape[3] - w.shape[3] + 1
    output = torch.empty(x.shape[0], w.shape[0], *size)
    for j in range(size[0]):
        for i in range(size[1]):
            patch = x[:, :, j : j + w.shape[2], i : i + w.shape[3]]
            output[:, :, j, i] = patch.flatten(1) @ w.flatten(1).T + b
    return output


torch.manual_seed(0)
x, w, b = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4)
difference = (patch_loop(x, w, b, 1) - F.conv2d(x, w, b, padding=1, algorithm="naive")).abs().max().item()
print(f"patch loop against the library: largest difference {difference:.0e}")
assert difference < 1e-5

# 4. Shifting the image, then filtering, is filtering, then shifting.
shifted = F.conv2d(x.roll(1, 3), w)[..., 1:] - F.conv2d(x, w)[..., :-1]
print(f"shift invariance, away from the border: {shifted.abs().max().item():.0e}")
assert shifted.abs().max() < 1e-4

# 5. A weight's gradient sums over patches, an input's over kernels.
sums = lab.gradients()
print("gradient of weight (0, 1):", " + ".join(map(str, sums.weight_terms(0, 1))))
print("gradient of input (1, 1): ", " + ".join(map(str, sums.input_terms(1, 1)[:4])), "+ the second kernel's")
assert sums.autograd_error() == 0

# 6. Pooling has no parameters: the lecture's 4 x 4 input, windows of 2.
image = torch.tensor(lab.gradient_sums.LECTURE_INPUT, dtype=torch.float32).view(1, 1, 4, 4)
print("max", F.max_pool2d(image, 2).flatten().tolist(), "average", F.avg_pool2d(image, 2).flatten().tolist())
assert F.max_pool2d(image, 2).flatten().tolist() == [6, 8, 3, 4]

# 7. LeNet-5: maps shrink, channels grow.
for row in lab.summary(models.LeNet5(), (1, 1, 28, 28)).layers:
    print(f"{row.name:8} {row.output_size[1:]!s:14} {row.weight_size or ''}")

# 8. Global average pooling instead of flatten: a head of 500 weights instead of 1.2 million, for any input size.
flatten, pooled = 2450 * 500 + 500 * 10, 50 * 10
print(f"weights of the head: flatten and two layers {flatten:,}, global average pooling and one {pooled:,}")

# 9. Batch norm: zero mean and unit variance per channel, over the batch.
y = lab.normalize()["batch"].output
print(f"batch norm: |mean| of a channel at most {y.mean((0, 2, 3)).abs().max():.0e}")
assert y.mean((0, 2, 3)).abs().max() < 1e-6
