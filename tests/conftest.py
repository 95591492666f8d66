import os
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'  # of torch: in tests, more only slow tiny networks

import cv2
import numpy as np
import pytest
from helpers import SMALL, write_image
from sklearn.datasets import load_digits

from resnet import InputError


def pytest_configure(config):
    """Hides GPUs, except from `pytest -m gpu`: the other tests compare numbers of a CPU."""
    if config.option.markexpr != 'gpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''


@pytest.fixture(scope='session')
def small_images(tmp_path_factory):
    """A folder of digits 0 to 2, 16×16: 15 for training and 7 for testing of each."""
    folder = tmp_path_factory.mktemp('images')
    images, labels = load_digits(return_X_y=True)  # (1797, 64), 0 to 16
    images = np.repeat((images * (255 / 16)).reshape(-1, 8, 8, 1).astype(np.uint8), 3, axis=3)
    for c in range(3):
        for i, image in enumerate(images[labels == c][:22]):
            path = Path('train' if i < 15 else 'test', str(c), f'{i % 15:04}.png')
            write_image(folder / path, cv2.resize(image, (16, 16)))
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch, small_images):
    """An empty folder to work in, with small_images as images/ (a link: do not change them)."""
    (tmp_path / 'images').symlink_to(small_images)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cifar(work):
    """cifar('--lr 1 …', …): cifar.main on a small network and the images in the working folder."""
    from cifar import main
    return lambda *argv: main([*SMALL, *' '.join(map(str, argv)).split()])


@pytest.fixture
def refused(capsys):
    """refused(main, argv, *words): main ends with status 2 or InputError, and says the words."""
    def check(main, argv, *words):
        capsys.readouterr()
        with pytest.raises((SystemExit, InputError)) as e:
            main([str(arg) for arg in argv])
        error = str(e.value)
        if isinstance(e.value, SystemExit):
            assert e.value.code == 2
            error = capsys.readouterr().err
        for word in words:
            assert word in error, error
        del e  # its traceback holds the lock of a folder
        return error
    return check
