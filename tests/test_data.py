"""Data sets, and the augmentation that runs on the device."""
import itertools
import os
import pickle
from functools import partial
from hashlib import md5
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from helpers import CPU, random_images

import cifar
from training.distributed import Rank
from training.images import list_images, read_image
from weights import InputError


def rank_of(rank, world):
    return Rank(CPU.device, rank, world)


def options(*argv):
    opt = cifar.make_parser().parse_args([*argv])
    cifar.fill_defaults(opt)
    return opt


def data_of(n, *argv, rank=CPU, size=8):
    images, labels = random_images(n, size), np.arange(n) % 10
    return cifar.DeviceData(options(*argv), rank, (images, labels, images[:11], labels[:11]))


def test_crops_take_every_offset_from_the_reflected_image_mirrored_and_not():
    images, pad = random_images(1, 8), 3
    padded = np.pad(images[0], ((pad, pad), (pad, pad), (0, 0)), mode='reflect')
    for dy in range(-pad, pad + 1):
        for dx in range(-pad, pad + 1):
            for flip in (False, True):
                draws = [torch.tensor([v]) for v in (0, dy, dx, flip)]
                crop = cifar.crop_and_flip(torch.from_numpy(images), *draws)[0].numpy()
                expected = padded[pad + dy:pad + dy + 8, pad + dx:pad + dx + 8]
                np.testing.assert_array_equal(crop, expected[:, ::-1] if flip else expected)


def test_crop_takes_each_images_own_draws():
    images = torch.from_numpy(random_images(5, 6))
    draws = [torch.tensor(v) for v in ([4, 0, 2], [1, 0, -2], [0, 2, -1], [True, False, True])]
    together = cifar.crop_and_flip(images, *draws)
    for i in range(3):
        alone = cifar.crop_and_flip(images, *(v[i:i + 1] for v in draws))
        assert torch.equal(together[i:i + 1], alone)


def recover(data, image_index, x):
    """Which (dy, dx, flip) made this normalised training image."""
    pixels = torch.round(x.permute(1, 2, 0) * data.std.clamp(min=1) + data.mean).to(torch.uint8)
    pad = data.opt.randomcrop_pad
    draws = itertools.product(range(-pad, pad + 1), range(-pad, pad + 1), (False, True))
    found = [d for d in draws if torch.equal(pixels, cifar.crop_and_flip(
        data.train[0], *(torch.tensor([v]) for v in (image_index, *d)))[0])]
    assert len(found) == 1
    return found[0]


def test_an_epoch_shows_each_image_once_and_draws_every_offset_and_both_flips():
    data = data_of(150, '--batch_size', '64', '--randomcrop_pad', '1')
    data.train = (data.train[0], torch.arange(150))  # labels that tell the image
    seen, draws = [], []
    for x, y, n, n_global in data.train_batches(0):
        assert n == n_global == len(y) == len(x)
        seen += y.tolist()
        draws += [recover(data, i, image) for i, image in zip(y.tolist(), x, strict=True)]
    assert sorted(seen) == list(range(150)) and seen != sorted(seen)
    offsets = (-1, 0, 1)
    assert set(draws) == set(itertools.product(offsets, offsets, (False, True)))


def epoch_of(data, epoch):
    return {int(y[i]): x[i] for x, y, n, _ in data.train_batches(epoch) for i in range(n)}


@pytest.mark.parametrize('world', [2, 3])
def test_draws_are_the_same_on_any_number_of_processes(world):
    def make(rank):
        data = data_of(33, '--batch_size', '8', rank=rank)
        data.train = (data.train[0], torch.arange(33))
        return data

    alone = epoch_of(make(CPU), 3)
    parts = [epoch_of(make(rank_of(r, world)), 3) for r in range(world)]
    assert sum(len(p) for p in parts) == 33
    together = {k: v for p in parts for k, v in p.items()}
    assert together.keys() == alone.keys()
    assert all(torch.equal(together[k], alone[k]) for k in alone)


@pytest.mark.parametrize('start', [0, 1, 4])
@pytest.mark.parametrize('rank', [CPU, rank_of(1, 2)], ids=['alone', 'second of two'])
def test_batches_cropped_together_are_those_cropped_one_by_one(monkeypatch, start, rank):
    results = []
    for pixels in (1, 2 * 8 * 64, 10 ** 6):  # one batch at a time, two and all
        monkeypatch.setattr(cifar, 'PIXELS_AT_ONCE', {'cpu': pixels})
        data = data_of(45, '--batch_size', '8', rank=rank)
        results.append(list(data.train_batches(2, start)))
    for batches in zip(*results, strict=True):
        for x, y, n, n_global in batches:
            assert torch.equal(x, batches[0][0]) and torch.equal(y, batches[0][1])
            assert (n, n_global) == batches[0][2:]
            assert x.is_contiguous(memory_format=torch.channels_last)
    assert len(results[0]) == 6 - start


def test_draws_follow_from_seed_and_epoch():
    first, again = (list(data_of(20).train_batches(1)) for _ in range(2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    for other in (data_of(20).train_batches(2), data_of(20, '--seed', '1').train_batches(1)):
        assert not torch.equal(first[0][0], next(iter(other))[0])


def test_batch_smaller_than_the_processes_has_a_stand_in_that_counts_for_nothing():
    batches = [list(data_of(17, '--batch_size', '8', rank=rank_of(r, 2)).train_batches(0))
               for r in range(2)]
    assert [b[2:] for b in batches[0]] == [(4, 8), (4, 8), (1, 1)]
    assert [b[2:] for b in batches[1]] == [(4, 8), (4, 8), (0, 1)]
    assert len(batches[1][-1][0]) == 1  # an image to run, weight 0


def test_no_flip_and_no_crop_leave_the_images_alone():
    data = data_of(20, '--no-flip', '--randomcrop_pad', '0')
    data.train = (data.train[0], torch.arange(20))
    for i, x in epoch_of(data, 0).items():
        assert torch.equal(x, data.normalise(data.train[0][i:i + 1])[0])


@pytest.mark.parametrize('argv, flip', [
    (['--dataset', 'CIFAR10'], True), (['--dataset', 'SVHN'], False),
    (['--dataset', 'Digits'], False), (['--dataset', 'ClutteredDigits'], False),
    (['--dataset', 'folder'], True), (['--dataset', 'Digits', '--flip'], True),
    (['--no-flip'], False)])
def test_flip_default(argv, flip):
    assert options(*argv).flip is flip


def test_normalised_by_the_mean_and_deviation_of_the_training_set():
    data = data_of(50, '--randomcrop_pad', '0')
    x = data.normalise(data.train[0])  # (50, 3, 8, 8)
    np.testing.assert_allclose(x.mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(x.std((0, 2, 3), correction=0), 1, rtol=1e-5)
    assert data_of(50, '--train_fraction', '0.2').mean.equal(data.mean)


def test_a_part_of_the_data_is_balanced_and_fixed():
    labels = np.repeat([0, 1, 2], [100, 40, 3])
    subset = partial(cifar.stratified_subset, np.arange(143), labels, 0.25)
    part, of_part = subset(seed=0)
    assert np.bincount(of_part).tolist() == [25, 10, 1] and (labels[part] == of_part).all()
    np.testing.assert_array_equal(part, subset(seed=0)[0])
    assert set(part) != set(subset(seed=1)[0])


def test_train_fraction_and_test_fraction_leave_each_other_alone():
    whole, train = data_of(50), data_of(50, '--train_fraction', '0.2')
    tests = [data_of(50, '--test_fraction', '0.1', '--seed', str(seed)) for seed in range(5)]
    assert (train.n_train, train.n_test) == (10, whole.n_test)
    for test in tests:
        assert (test.n_train, test.n_test) == (50, 10)  # one image of each of the ten classes
        assert torch.equal(test.test[0], tests[0].test[0])
        assert sorted(test.test[1].tolist()) == list(range(10))
        assert sum(len(y) for _, y in test.test_batches()) == 10


def test_test_set_is_shared_out_whole():
    for world in (1, 2, 5, 13):
        parts = [list(data_of(20, rank=rank_of(r, world)).test_batches()) for r in range(world)]
        labels = torch.cat([y for part in parts for _, y in part])
        assert torch.equal(labels, torch.arange(11) % 10)


def test_digits():
    train, y, test, y_test = cifar.read_digits(None, CPU)
    assert train.shape == (1437, 32, 32, 3) and test.shape == (360, 32, 32, 3)
    assert train.dtype == np.uint8 and train.max() == 255
    assert set(y) == set(y_test) == set(range(10))
    assert not {t.tobytes() for t in train} & {t.tobytes() for t in test}
    np.testing.assert_array_equal(train, cifar.read_digits(None, CPU)[0])


def holds(canvas, digit):
    """Whether the digit (16, 16) lies somewhere on the canvas (32, 32), whatever else does."""
    places = np.lib.stride_tricks.sliding_window_view(canvas, digit.shape)  # (17, 17, 16, 16)
    return bool((places >= digit).all((2, 3)).any())


def test_cluttered_digits():
    """The same for every seed; each image contains its digit, and more; training digits twice."""
    opt = options('--dataset', 'ClutteredDigits')
    arrays = train, y, test, y_test = cifar.read_cluttered_digits(opt, CPU)
    assert train.shape == (2 * 1437, 32, 32, 3) and test.shape == (360, 32, 32, 3)
    other = cifar.read_cluttered_digits(options('--dataset', 'ClutteredDigits', '--seed', '1'), CPU)
    assert all(map(np.array_equal, arrays, other))
    cifar.check_arrays(arrays, opt, 10)
    digits, labels, test_digits, test_labels = cifar.scikit_digits(16)
    assert np.array_equal(y, np.tile(labels, 2)) and np.array_equal(y_test, test_labels)
    for images, expected in ((train, np.tile(digits, (2, 1, 1))), (test, test_digits)):
        for i in range(0, len(images), 7):
            canvas = images[i, :, :, 0]
            assert holds(canvas, expected[i]) and (canvas > 0).sum() > (expected[i] > 0).sum()
    assert not np.array_equal(train[0], train[1437])  # at another place
    assert test.any((0, 3)).mean() > 0.95  # anywhere


@pytest.mark.parametrize('change, text', [
    ({0: random_images(20)[..., 0]}, r'images of shape (20, 16, 16) and type uint8'),
    ({0: random_images(20)[..., :1]}, r'images of shape (20, 16, 16, 1)'),
    ({2: random_images(4).astype(np.float32)}, r'type float32: must be (N, H, W, 3), uint8'),
    ({1: np.arange(20)}, '20 labels of 20 images: must be one each, from 0 to 9'),
    ({3: np.array([0, 1, 2, -1])}, '4 labels of 4 images'),
    ({1: np.arange(19) % 10}, '19 labels of 20 images'),
    ({2: random_images(0), 3: np.arange(0)}, '0 labels of 0 images'),
    ({0: random_images(20, 7)}, 'images of 7×7: they must be 8×8 or larger')])
def test_what_a_reader_should_not_give_is_refused(monkeypatch, change, text):
    good = [random_images(20), np.arange(20) % 10, random_images(4), np.arange(4)]
    arrays = tuple(change.get(i, array) for i, array in enumerate(good))
    cifar.check_arrays(tuple(good), options(), 10)
    dataset = cifar.Dataset(lambda opt, rank: arrays, 10, True)
    monkeypatch.setitem(cifar.DATASETS, 'odd', dataset)
    with pytest.raises(InputError) as e:
        cifar.load_data(options('--dataset', 'odd'), CPU)
    assert text in str(e.value)


@pytest.mark.parametrize('name', ['x.jpg', 'x.jpg/'])
def test_what_is_no_file_is_not_read(work, name):
    """A FIFO, which nobody would ever write to, and a folder, both named as images are."""
    (os.mkdir if name.endswith('/') else os.mkfifo)(f'images/train/0/{name}')
    train, test = (list_images(Path('images', part), ['0', '1', '2']) for part in ('train', 'test'))
    assert [len(files) for files in (*train, *test)] == [15] * 3 + [7] * 3
    opt = options('--dataset', 'folder', '--dataroot', 'images')
    assert len(cifar.read_folder(opt, CPU)[0]) == 45


def test_folder(work):
    opt = options('--dataset', 'folder', '--dataroot', 'images')
    train, y, test, y_test = cifar.read_folder(opt, CPU)
    assert train.shape == (45, 16, 16, 3) and test.shape == (21, 16, 16, 3)
    assert y.tolist() == [0] * 15 + [1] * 15 + [2] * 15
    assert np.bincount(y_test).tolist() == [7, 7, 7]
    image = np.zeros((16, 16, 3), np.uint8)
    image[..., 2] = 200  # red, in OpenCV's order
    cv2.imwrite('images/train/0/0000.png', image)
    assert cifar.read_folder(opt, CPU)[0][0, 0, 0].tolist() == [200, 0, 0]  # RGB
    (work / 'images' / 'test').rename(work / 'images' / 'val')
    assert len(cifar.read_folder(opt, CPU)[2]) == 21
    opt.image_size = 8
    assert cifar.read_folder(opt, CPU)[0].shape == (45, 8, 8, 3)


def test_orientation_tags_are_ignored(tmp_path):
    image = np.zeros((8, 16, 3), np.uint8)
    jpeg = cv2.imencode('.jpg', image)[1].tobytes()
    exif = (b'Exif\0\0MM\0*\0\0\0\x08\0\x01'
            b'\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0')  # orientation 6: turn by 90°
    header = b'\xff\xe1' + (len(exif) + 2).to_bytes(2, 'big')
    (tmp_path / 'a.jpg').write_bytes(jpeg[:2] + header + exif + jpeg[2:])
    assert read_image(tmp_path / 'a.jpg').shape == (8, 16, 3)


def miniature_cifar(monkeypatch, dataset):
    """A CIFAR archive's files, with four random images each, in the working folder."""
    cls = getattr(torchvision.datasets, dataset)
    label = 'labels' if dataset == 'CIFAR10' else 'fine_labels'
    folder = Path(cls.base_folder)
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return name, md5((folder / name).read_bytes()).hexdigest()

    for i, which in enumerate(('train_list', 'test_list')):
        pixels = random_images(4, 32, i).transpose(0, 3, 1, 2).reshape(4, -1)
        monkeypatch.setattr(cls, which, [write(name, {'data': pixels, label: [0, 1, 2, 3]})
                                         for name, _ in getattr(cls, which)])
    digest = write(cls.meta['filename'], {cls.meta['key']: ['a', 'b', 'c', 'd']})[1]
    monkeypatch.setattr(cls, 'meta', {**cls.meta, 'md5': digest})


@pytest.mark.parametrize('dataset, n', [('CIFAR10', 20), ('CIFAR100', 4)])
def test_cifar_through_torchvision(tmp_path, monkeypatch, dataset, n):
    monkeypatch.chdir(tmp_path)
    miniature_cifar(monkeypatch, dataset)
    train, y, test, y_test = cifar.read_torchvision(
        options('--dataset', dataset), rank_of(1, 2))
    assert train.shape == (n, 32, 32, 3) and y.tolist() == [0, 1, 2, 3] * (n // 4)
    np.testing.assert_array_equal(train[:4], random_images(4, 32, 0))
    np.testing.assert_array_equal(test, random_images(4, 32, 1))
    assert y_test.tolist() == [0, 1, 2, 3]


def test_svhn_through_torchvision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    splits = {}
    for i, split in enumerate(('train', 'test')):
        name = f'{split}_32x32.mat'
        labels = np.array([[1], [2], [10], [3], [10]])
        scipy.io.savemat(name, {'X': random_images(5, 32, i).transpose(1, 2, 3, 0), 'y': labels})
        splits[split] = ['', name, md5((tmp_path / name).read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.SVHN, 'split_list', splits)
    train, y, test, _ = cifar.read_torchvision(options('--dataset', 'SVHN'), rank_of(1, 2))
    np.testing.assert_array_equal(train, random_images(5, 32, 0))
    np.testing.assert_array_equal(test, random_images(5, 32, 1))
    assert y.tolist() == [1, 2, 0, 3, 0]  # the archive writes the digit 0 as 10
