"""Data sets, and the augmentation that runs on the device."""
import itertools
import pickle
from hashlib import md5
from pathlib import Path

import cv2
import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from conftest import random_images

import cifar
import training
from training import Place

CPU = torch.device('cpu')


def options(*argv):
    opt = cifar.make_parser().parse_args([*argv])
    opt.flip = cifar.DATASETS[opt.dataset][1] if opt.flip is None else opt.flip
    return opt


def data_of(n, *argv, place=Place(CPU), size=8):  # noqa: B008
    images, labels = random_images(n, size), np.arange(n) % 10
    return cifar.DeviceData(options(*argv), place, (images, labels, images[:11], labels[:11]))


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
    data = data_of(300, '--batch_size', '64', '--randomcrop_pad', '1')
    data.train = (data.train[0], torch.arange(300))  # labels that tell the image
    seen, draws = [], []
    for x, y, n, n_global in data.train_batches(0):
        assert n == n_global == len(y) == len(x)
        seen += y.tolist()
        draws += [recover(data, i, image) for i, image in zip(y.tolist(), x, strict=True)]
    assert sorted(seen) == list(range(300)) and seen != sorted(seen)
    assert set(draws) == {(dy, dx, f) for dy in (-1, 0, 1) for dx in (-1, 0, 1) for f in (False, True)}


def epoch_of(data, epoch):
    return {int(i): image for x, y, n, _ in data.train_batches(epoch) for i, image in list(zip(y, x, strict=True))[:n]}


@pytest.mark.parametrize('world', [2, 3])
def test_draws_are_the_same_on_any_number_of_processes(world):
    def make(place):
        data = data_of(33, '--batch_size', '8', place=place)
        data.train = (data.train[0], torch.arange(33))
        return data

    alone = epoch_of(make(Place(CPU)), 3)
    parts = [epoch_of(make(Place(CPU, rank, world)), 3) for rank in range(world)]
    assert sum(len(p) for p in parts) == 33
    together = {k: v for p in parts for k, v in p.items()}
    assert together.keys() == alone.keys() and all(torch.equal(together[k], alone[k]) for k in alone)


@pytest.mark.parametrize('start', [0, 1, 4])
@pytest.mark.parametrize('place', [Place(CPU), Place(CPU, 1, 2)])
def test_batches_cropped_together_are_those_cropped_one_by_one(monkeypatch, start, place):
    results = []
    for pixels in (1, 2 * 8 * 64, 10 ** 6):  # one batch at a time, two and all
        monkeypatch.setattr(cifar, 'PIXELS_AT_ONCE', pixels)
        results.append(list(data_of(45, '--batch_size', '8', place=place).train_batches(2, start)))
    for batches in zip(*results, strict=True):
        for x, y, n, n_global in batches:
            assert torch.equal(x, batches[0][0]) and torch.equal(y, batches[0][1])
            assert (n, n_global) == batches[0][2:] and x.is_contiguous(memory_format=torch.channels_last)
    assert len(results[0]) == 6 - start


def test_draws_follow_from_seed_and_epoch():
    first, again = (list(data_of(20).train_batches(1)) for _ in range(2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    for other in (data_of(20).train_batches(2), data_of(20, '--seed', '1').train_batches(1)):
        assert not torch.equal(first[0][0], next(iter(other))[0])


def test_batch_smaller_than_the_processes_has_a_stand_in_that_counts_for_nothing():
    batches = [list(data_of(17, '--batch_size', '8', place=Place(CPU, rank, 2)).train_batches(0)) for rank in range(2)]
    assert [[b[2:] for b in r] for r in batches] == [[(4, 8), (4, 8), (1, 1)], [(4, 8), (4, 8), (0, 1)]]
    assert len(batches[1][-1][0]) == 1  # an image to run, weight 0


def test_no_flip_and_no_crop_leave_the_images_alone():
    data = data_of(20, '--no-flip', '--randomcrop_pad', '0')
    data.train = (data.train[0], torch.arange(20))
    for i, x in epoch_of(data, 0).items():
        assert torch.equal(x, data.normalise(data.train[0][i:i + 1])[0])


@pytest.mark.parametrize('argv, flip', [(['--dataset', 'CIFAR10'], True), (['--dataset', 'SVHN'], False),
                                        (['--dataset', 'Digits'], False), (['--dataset', 'folder'], True),
                                        (['--dataset', 'Digits', '--flip'], True), (['--no-flip'], False)])
def test_flip_default(argv, flip):
    assert options(*argv).flip is flip


def test_normalised_by_the_mean_and_deviation_of_the_training_set():
    data = data_of(50, '--randomcrop_pad', '0')
    x = data.normalise(data.train[0])  # (50, 3, 8, 8)
    np.testing.assert_allclose(x.mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(x.std((0, 2, 3), correction=0), 1, rtol=1e-5)
    assert data_of(50, '--train_fraction', '0.2').mean.equal(data.mean)


def test_train_fraction_is_balanced_and_fixed():
    labels = np.repeat([0, 1, 2], [100, 40, 3])
    part = cifar.training_part(labels, 0.25, seed=0)
    assert np.bincount(labels[part]).tolist() == [25, 10, 1]
    np.testing.assert_array_equal(part, cifar.training_part(labels, 0.25, seed=0))
    assert set(part) != set(cifar.training_part(labels, 0.25, seed=1))
    assert data_of(50, '--train_fraction', '0.2').n_train == 10


def test_test_set_is_shared_out_whole():
    for world in (1, 2, 5, 13):
        parts = [list(data_of(20, place=Place(CPU, r, world)).test_batches()) for r in range(world)]
        labels = torch.cat([y for part in parts for _, y in part])
        assert torch.equal(labels, torch.arange(11) % 10)


def test_digits():
    train, y, test, y_test = cifar.read_digits()
    assert train.shape == (1437, 32, 32, 3) and test.shape == (360, 32, 32, 3) and train.dtype == np.uint8
    assert set(y) == set(y_test) == set(range(10)) and train.max() == 255
    assert not {t.tobytes() for t in train} & {t.tobytes() for t in test}
    np.testing.assert_array_equal(train, cifar.read_digits()[0])


def test_folder(work):
    opt = options('--dataset', 'folder', '--dataroot', 'images')
    train, y, test, y_test = cifar.read_folder(opt)
    assert train.shape == (45, 16, 16, 3) and test.shape == (21, 16, 16, 3)
    assert y.tolist() == [0] * 15 + [1] * 15 + [2] * 15 and np.bincount(y_test).tolist() == [7, 7, 7]
    image = np.zeros((16, 16, 3), np.uint8)
    image[..., 2] = 200  # red, in OpenCV's order
    cv2.imwrite('images/train/0/0000.png', image)
    assert cifar.read_folder(opt)[0][0, 0, 0].tolist() == [200, 0, 0]  # RGB
    (work / 'images' / 'test').rename(work / 'images' / 'val')
    assert len(cifar.read_folder(opt)[2]) == 21
    opt.image_size = 8
    assert cifar.read_folder(opt)[0].shape == (45, 8, 8, 3)


def test_orientation_tags_are_ignored(tmp_path):
    image = np.zeros((8, 16, 3), np.uint8)
    jpeg = cv2.imencode('.jpg', image)[1].tobytes()
    exif = b'Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0'  # orientation 6: turn by 90°
    (tmp_path / 'a.jpg').write_bytes(jpeg[:2] + b'\xff\xe1' + (len(exif) + 2).to_bytes(2, 'big') + exif + jpeg[2:])
    assert training.read_image(tmp_path / 'a.jpg').shape == (8, 16, 3)


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
    train, y, test, y_test = cifar.read_data(options('--dataset', dataset), Place(CPU, 1, 2))
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
    train, y, test, _ = cifar.read_data(options('--dataset', 'SVHN'), Place(CPU, 1, 2))
    np.testing.assert_array_equal(train, random_images(5, 32, 0))
    np.testing.assert_array_equal(test, random_images(5, 32, 1))
    assert y.tolist() == [1, 2, 0, 3, 0]  # the archive writes the digit 0 as 10
