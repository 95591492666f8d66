"""What several test files share."""
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import cifar as script
from training import loop
from training.distributed import Rank

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
    """In it, training ends at once when this many epochs are saved."""
    real = loop.train_epoch

    def train_epoch(step, data, run):
        if run.epoch == epochs:
            raise KeyboardInterrupt
        return real(step, data, run)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match='130'):
        patch.setattr(loop, 'train_epoch', train_epoch)
        yield


def files(folder):
    """Every file under a folder with its content."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


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
