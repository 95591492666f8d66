"""Images a second of cifar.py's training step and of a whole epoch, by its defaults on this machine.

    python tests/benchmark_cifar.py                    # WRN-16-1 from WRN-16-2, batch 128, as in table 1
    python tests/benchmark_cifar.py --dtype bfloat16 --repeats 9

Each step is timed against the same step written plainly: eager, float32, NCHW, batch norm not folded, in turns
with it in one process, medians over the repeats. An epoch has the loading of batches, the loop and the statistics.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

import cifar
import training
from resnet import trainable, wide_resnet
from training import Place, choose_devices, number
from utils import load_network, load_teacher

METHODS = {'teacher': (0, 0), 'student': (0, 0), 'KD': (0.9, 0), 'AT': (0, 1e3), 'AT+KD': (0.9, 1e3)}
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


def measure(method, opt, place, data, teachers):
    """Images a second: medians of our step, the plain one and our epoch, and of the ratio pair by pair."""
    opt = copy.copy(opt)
    opt.alpha, opt.beta = METHODS[method]
    f, params = wide_resnet(16, 2 if method == 'teacher' else 1, 10)
    plain_teacher, folded = teachers
    reference = plain_step(f, plain(params, place), plain_teacher, opt)
    ours = our_step(f, training.to_device(params, place.device), folded, opt, place)
    batches = [b for b in data.train_batches(0) if b[2] == opt.batch_size][:4]
    decay = torch.tensor(1.0, device=place.device)
    steps = [lambda: [ours(*b, decay) for b in batches], lambda: [reference(*b[:2]) for b in batches]]
    for step in steps * 2:
        seconds(place, step)  # warm up
    pairs = [[seconds(place, step) for step in steps] for _ in range(opt.repeats)]
    epochs = [seconds(place, lambda: training.train_epoch(ours, data, opt, place, training.Progress(), lambda: None))
              for _ in range(3)]
    a, b = (opt.batch_size * len(batches) / statistics.median(times) for times in zip(*pairs, strict=True))
    return a, b, statistics.median(q / p for p, q in pairs), data.n_train / statistics.median(epochs)


def main():
    parser = cifar.make_parser()
    parser.add_argument('--repeats', type=number(1, whole=True), default=5, help='timed pairs of each step')
    opt = parser.parse_args()
    opt.flip, opt.at_groups = True, [0, 1, 2]
    place = Place(choose_devices(opt)[0])
    training.settle_gradients(opt)
    training.set_up_device(place.device, opt)
    images = np.random.default_rng(0).integers(0, 256, (N_IMAGES, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(N_IMAGES) % 10
    data = cifar.DeviceData(opt, place, (images, labels, images, labels))
    with tempfile.TemporaryDirectory() as folder:
        torch.save({'params': wide_resnet(16, 2, 10, seed=1)[1]}, f'{folder}/model.pt7')
        unfolded, folded = load_network(folder), load_teacher(folder)
    teachers = (replace(unfolded, params=plain(unfolded.params, place)),
                replace(folded, params=training.to_device(folded.params, place.device)))
    print(f'{place}, torch {torch.__version__}, --dtype {opt.dtype}, batch {opt.batch_size}, {opt.repeats} repeats')
    print('| method  | step, img/s | plain step, img/s | step / plain | epoch, img/s |')
    print('| ------- | ----------- | ----------------- | ------------ | ------------ |')
    for method in METHODS:
        a, b, ratio, epoch = measure(method, opt, place, data, teachers)
        print(f'| {method:7} | {a:11,.0f} | {b:17,.0f} | {ratio:12.2f} | {epoch:12,.0f} |', flush=True)


if __name__ == '__main__':
    main()
