"""What several test files share."""
from pathlib import Path

import numpy as np
import torch

from training.distributed import Rank

ROOT = Path(__file__).resolve().parents[1]
CPU = Rank(torch.device('cpu'))
SMALL = ['--depth', '10', '--width', '0.25', '--dataset', 'folder', '--batch_size', '16',
         '--epochs', '2']


def files(folder):
    """Every file under a folder with its content."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def load(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Whether two checkpoints' parameters and momenta are equal bit for bit."""
    tensors = [[*c['params'].values(), *(s['momentum_buffer'] for s in c['optimizer']['state'].values())]
               for c in (a, b)]
    return a['params'].keys() == b['params'].keys() and all(map(torch.equal, *tensors))


def random_images(n, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
