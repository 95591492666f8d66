"""What the machine can reach, and what a computation asks of it."""
import torch
import torch.nn.functional as F
from common import seconds
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


class ConvolutionBytes(TorchDispatchMode):
    """Counts the bytes that convolutions read and write."""
    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if 'convolution' in str(func):
            tensors = (*args, *(result if isinstance(result, tuple) else (result,)))
            self.total += sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
        return result


def best_rates(device, dtype):
    """The best FLOP/s of a large matrix product or convolution, and bytes/s of a copy."""
    n, images = (8192, 512) if device.type == 'cuda' else (2048, 32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    x, w = (torch.randn(size, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            for size in ((images, 256, 30, 30), (256, 256, 3, 3)))  # of which 28×28 pixels come out
    source = torch.randn(2 ** 26, device=device)
    to = torch.empty_like(source)

    def best(work, function):
        return max(work / seconds(device, function) for _ in range(20))
    return (max(best(2 * n ** 3, lambda: a @ b),
                best(2 * images * 28 ** 2 * 256 ** 2 * 9, lambda: F.conv2d(x, w))),
            best(2 * source.nbytes, lambda: to.copy_(source)))


def lower_bound(function, rates):
    """GFLOP of a computation, and the least time in seconds that it takes at these rates."""
    with FlopCounterMode(display=False) as flop, ConvolutionBytes() as count:
        function()
    flops = flop.get_total_flops()
    return flops / 1e9, max(flops / rates[0], count.total / rates[1])
