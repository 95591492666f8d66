"""What several test files share."""
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import cifar as script
from resnet import imagenet_resnet_shapes, initialize
from training import loop
from training.distributed import Rank
from training.log import log_text

ROOT = Path(__file__).resolve().parents[1]
CPU = Rank(torch.device('cpu'))
SMALL = ['--depth', '10', '--width', '0.25', '--dataset', 'folder', '--batch_size', '16',
         '--epochs', '2']


def options(*argv):
    """What cifar.py makes of a command line, for a small network and the images in images/."""
    opt = script.make_parser().parse_args([*SMALL, '--dataroot', 'images', *map(str, argv)])
    script.fill_defaults(opt)
    opt.at_groups = opt.at_groups or [0, 1, 2]
    return opt


def teach(cifar, folder='logs/t'):
    """Trains a teacher, twice as wide as the others."""
    cifar('--save', folder, '--width', '0.5')


@contextmanager
def stopped_after(epochs):
    """In it, training is told to stop at the end of this epoch, and does."""
    real = loop.train_epoch

    def train_epoch(step, data, run):
        figures = real(step, data, run)
        if run.epoch + 1 == epochs:
            os.kill(os.getpid(), signal.SIGINT)
        return figures
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match='130'):
        patch.setattr(loop, 'train_epoch', train_epoch)
        yield


def files(folder):
    """Every file under a folder with its content."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def fake(folder, errors, epochs=2, **options):
    """A log whose last epoch has this test error; other options as given."""
    folder.mkdir(parents=True)
    records = [{**options, 'epoch': e + 1, 'epochs': epochs, 'lr': 0.1, 'test_acc': 100 - error,
                'train_acc': 90.0, 'train_time': 3, 'test_time': 1}
               for e, error in enumerate(errors)]
    (folder / 'log.txt').write_bytes(log_text(records))


def rows_of(out):
    """The rows of the tables in a benchmark's output, below their headers, as lists of cells."""
    return [[cell.strip() for cell in line.split('|')[1:-1]]
            for line in out.splitlines() if line.startswith('| ')][2:]


def load(path):
    return torch.load(path, weights_only=True)


def as_before_records(path):
    """Makes a checkpoint one of the format before the log was in it."""
    state = load(path)
    del state['records'], state['network']
    torch.save(state, path)


def momenta(state):
    return [s['momentum_buffer'] for s in state['optimizer']['state'].values()]


def same(a, b):
    """Whether two checkpoints' parameters and momenta are equal bit for bit."""
    tensors = [[*c['params'].values(), *momenta(c)] for c in (a, b)]
    return a['params'].keys() == b['params'].keys() and all(map(torch.equal, *tensors))


def random_images(n, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def photo(height, width, seed=0):
    """A smooth colourful image, as photographs are, and not noise."""
    shape = height // 8 + 2, width // 8 + 2, 3
    noise = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def affine_export(stem=64, widths=(64, 128, 256, 512), classes=1000):
    """A random network in the published naming of the attention-transfer export."""
    shapes = imagenet_resnet_shapes((2, 2, 2, 2), stem, widths, classes)
    shapes = {name: s for name, s in shapes.items() if len(s) == 4 or name.startswith('fc.')}
    params = {name.replace('convdim', 'conv_dim'): p.detach()
              for name, p in initialize(shapes, 0).items()}
    sizes = {'affine0': stem, 'affine_last': widths[-1]}
    for g in range(4):
        for b in range(2):
            if (g, b) != (0, 0):
                sizes[f'group{g}.block{b}.affine0'] = widths[max(g - 1, 0) if b == 0 else g]
            sizes[f'group{g}.block{b}.affine1'] = widths[g]
    generator = torch.Generator().manual_seed(1)
    return params | {f'{name}.{ab}': torch.randn(size, generator=generator)
                     for name, size in sizes.items() for ab in 'ab'}


def stop_at_step(monkeypatch, number, signum):
    """Sends the process a signal in its step of this number."""
    real, steps = loop.make_step, []

    def make_step(*args):
        step = real(*args)

        def counted(*args):
            steps.append(1)
            if len(steps) == number:
                os.kill(os.getpid(), signum)
            return step(*args)
        return counted
    monkeypatch.setattr(loop, 'make_step', make_step)
