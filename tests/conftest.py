import os
import sys
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'  # of torch, here and in the tests' processes: more only slow tiny networks

import cv2
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

SMALL = ['--depth', '10', '--width', '0.25', '--dataset', 'folder', '--batch_size', '16', '--epochs', '2']


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty folder to work in, with a small data set of real images in images/."""
    from cifar import read_digits

    train, y, test, y_test = read_digits()
    for part, xs, ys, n in (('train', train, y, 15), ('test', test, y_test, 7)):
        for c in range(3):
            folder = tmp_path / 'images' / part / str(c)
            folder.mkdir(parents=True)
            for i, image in enumerate(xs[ys == c][:n]):
                cv2.imwrite(str(folder / f'{i:04}.png'), cv2.resize(image, (16, 16)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cifar(work):
    """cifar.main on a small network and the images in the working folder."""
    from cifar import main
    return lambda *argv: main([*SMALL, '--dataroot', 'images', *map(str, argv)])


@pytest.fixture
def refused(capsys):
    """Asserts that main(argv) ends with status 2 and one line on stderr that says `text`."""
    def check(main, argv, text):
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            main(argv)
        err = capsys.readouterr().err
        assert e.value.code == 2, err
        assert err.count('\n') == 1 and text in err, err
    return check


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
