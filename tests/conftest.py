import os

os.environ['OMP_NUM_THREADS'] = '1'  # of torch: in tests, more only slow tiny networks

import cv2
import pytest
from helpers import SMALL


def pytest_configure(config):
    """Hides GPUs, except from `pytest -m gpu`: the other tests compare numbers of a CPU."""
    if config.option.markexpr != 'gpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty folder to work in, with a small data set of real images in images/."""
    from cifar import read_digits

    train, y, test, y_test = read_digits(None, None)
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
