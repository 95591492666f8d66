"""Images a second of cifar.py's training step and of a whole epoch, by its defaults on this machine.

    python tests/benchmark_cifar.py                    # WRN-16-1 from WRN-16-2, batch 128, as in table 1
    python tests/benchmark_cifar.py --all --dtype bfloat16 --repeats 9

Each step is timed against the same step written plainly: eager, float32, NCHW, batch norm not folded, in turns
with it in one process, medians over the repeats. An epoch has the loading of batches, the loop and the statistics.
The floor of a step is the time of its convolutions at the speed of a large matrix product, or of their operands, read
and written once, at the speed of a copy, both measured here and the larger of the two.
"""
import copy
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import cifar
import training
from resnet import trainable, wide_resnet
from training import Place, choose_devices, number
from utils import load_network, load_teacher

METHODS = {'teacher': (0, 0), 'student': (0, 0), 'KD': (0.9, 0), 'AT': (0, 1e3), 'AT+KD': (0.9, 1e3)}  # alpha, beta
# Student, teacher, and alpha and beta: by default those of WRN-16-1 and WRN-16-2, and with --all the rest of table 1.
ROWS = {method: ((16, 2 if method == 'teacher' else 1), (16, 2), weights) for method, weights in METHODS.items()}
ALL_ROWS = {**ROWS, 'AT from WRN-40-1': ((16, 1), (40, 1), (0, 1e3)), 'WRN-16-2, AT from WRN-40-2':
            ((16, 2), (40, 2), (0, 1e3)), 'teacher WRN-40-1': ((40, 1), (40, 1), (0, 0)), 'teacher WRN-40-2':
            ((40, 2), (40, 2), (0, 0))}
N_IMAGES = 2048


def plain(params, place):
    """A copy on the device, in torch's default layout."""
    return {k: p.detach().clone().to(place.device).requires_grad_(p.requires_grad) for k, p in params.items()}


def plain_step(f, params, teacher, opt):
    """The step as one would write it first: default layout, torch's default SGD, the loss read at once."""
    optimizer = torch.optim.SGD(trainable(params).values(), opt.lr, momentum=0.9, weight_decay=opt.weight_decay)

    def normalised_map(A):
        return F.normalize(A.pow(2).mean(1).flatten(1))

    def step(x, y):
        logits, groups = f(x.contiguous(), params, True)
        loss = F.cross_entropy(logits, y)
        if opt.alpha or opt.beta:
            with torch.no_grad():
                teacher_logits, teacher_groups = teacher.f(x.contiguous(), teacher.params, False)
        if opt.alpha:
            p, q = F.log_softmax(logits / 4, dim=1), F.softmax(teacher_logits / 4, dim=1)
            loss = opt.alpha * 16 * F.kl_div(p, q, reduction='batchmean') + (1 - opt.alpha) * loss
        if opt.beta:
            loss = loss + opt.beta * sum((normalised_map(s) - normalised_map(t)).pow(2).mean()
                                         for s, t in zip(groups, teacher_groups, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()
    return step


def our_step(f, params, teacher, opt, place):
    optimizer = training.make_optimizer(opt, params)
    scaler = torch.amp.GradScaler(place.device.type, enabled=opt.dtype == 'half')
    return training.make_step(opt, place, f, params, teacher, optimizer, scaler)


def seconds(place, function):
    start = time.perf_counter()
    function()
    if place.device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


class ConvolutionBytes(TorchDispatchMode):
    """Counts the bytes of what convolutions read and write."""
    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if 'convolution' in str(func):
            outputs = result if isinstance(result, tuple) else (result,)
            self.total += sum(t.numel() * t.element_size() for t in (*args, *outputs) if isinstance(t, torch.Tensor))
        return result


def machine(place, dtype):
    """FLOP and bytes a second, of a matrix product in the compute type and of a copy: the best of five."""
    n = 8192 if place.device.type == 'cuda' else 2048
    a, b = (torch.randn(n, n, device=place.device, dtype=dtype) for _ in range(2))
    source = torch.randn(2 ** 26, device=place.device)
    to = torch.empty_like(source)
    return [max(work / seconds(place, f) for _ in range(5)) for work, f in (
        (2 * n ** 3, lambda: a @ b), (2 * source.numel() * source.element_size(), lambda: to.copy_(source)))]


def floor_of(step, batch, decay, rates):
    """GFLOP of a step, and the seconds that it cannot take less of."""
    with FlopCounterMode(display=False) as flop, ConvolutionBytes() as count:
        step(*batch, decay)
    return flop.get_total_flops() / 1e9, max(flop.get_total_flops() / rates[0], count.total / rates[1])


def trained(depth, width, place):
    """A teacher as it is, and with its batch norm folded, on the device."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save({'params': wide_resnet(depth, width, 10, seed=1)[1]}, f'{folder}/model.pt7')
        unfolded, folded = load_network(folder), load_teacher(folder)
    return (replace(unfolded, params=plain(unfolded.params, place)),
            replace(folded, params=training.to_device(folded.params, place.device)))


def measure(row, opt, place, data, rates):
    """Images a second: medians of our step, the plain one and our epoch; the ratio pair by pair; the floor."""
    student, teacher, weights = ALL_ROWS[row]
    opt = copy.copy(opt)
    opt.alpha, opt.beta = weights
    f, params = wide_resnet(*student, 10)
    plain_teacher, folded = trained(*teacher, place)
    reference = plain_step(f, plain(params, place), plain_teacher, opt)
    eager = copy.copy(opt)
    eager.compile, eager.capture = False, False
    ours, counted = (our_step(f, training.to_device(params, place.device), folded, o, place) for o in (opt, eager))
    batches = [b for b in data.train_batches(0) if b[2] == opt.batch_size][:4]
    decay = torch.tensor(1.0, device=place.device)
    steps = [lambda: [ours(*b, decay) for b in batches], lambda: [reference(*b[:2]) for b in batches]]
    for step in steps * 2:
        seconds(place, step)  # warm up
    gflop, floor = floor_of(counted, batches[0], decay, rates)
    pairs = [[seconds(place, step) for step in steps] for _ in range(opt.repeats)]
    epochs = [seconds(place, lambda: training.train_epoch(ours, data, opt, place, training.Progress(), lambda: None))
              for _ in range(3)]
    a, b = (opt.batch_size * len(batches) / statistics.median(times) for times in zip(*pairs, strict=True))
    return (a, b, statistics.median(q / p for p, q in pairs), data.n_train / statistics.median(epochs), gflop,
            opt.batch_size / a / floor)


def main():
    parser = cifar.make_parser()
    parser.add_argument('--repeats', type=number(1, whole=True), default=5, help='timed pairs of each step')
    parser.add_argument('--all', action='store_true', help='the other networks of table 1, too')
    opt = parser.parse_args()
    opt.flip, opt.at_groups = True, [0, 1, 2]
    place = Place(choose_devices(opt)[0])
    training.settle_gradients(opt)
    training.set_up_device(place.device, opt)
    images = np.random.default_rng(0).integers(0, 256, (N_IMAGES, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(N_IMAGES) % 10
    data = cifar.DeviceData(opt, place, (images, labels, images, labels))
    rates = machine(place, training.DTYPES[opt.dtype])
    print(f'{place}, torch {torch.__version__}, --dtype {opt.dtype}, batch {opt.batch_size}, {opt.repeats} repeats; '
          f'matrix product {rates[0] / 1e9:,.0f} GFLOP/s, copy {rates[1] / 1e9:,.1f} GB/s')
    print('| run | step, img/s | plain step, img/s | step / plain | epoch, img/s | GFLOP a step | time / floor |')
    print('| --- | ----------- | ----------------- | ------------ | ------------ | ------------ | ------------ |')
    for row in ALL_ROWS if opt.all else ROWS:
        a, b, ratio, epoch, gflop, slack = measure(row, opt, place, data, rates)
        print(f'| {row} | {a:,.0f} | {b:,.0f} | {ratio:.2f} | {epoch:,.0f} | {gflop:.1f} | {slack:.1f} |', flush=True)


if __name__ == '__main__':
    main()
