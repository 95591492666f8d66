"""Data sets of both scripts, augmentation, and fine-tuning on CUB and Scenes in miniature."""
import pickle
from hashlib import md5
from pathlib import Path

import cv2
import hickle
import numpy as np
import pytest
import torch
import torchvision
import torchvision.transforms.functional as TF
from helpers import SMALL, load, log_of, photo, place, random_images, same_run, write_image
from PIL import Image
from sklearn.datasets import load_digits

import cifar
import engine
import imagenet
from resnet import imagenet_resnet


def options(*argv, module=cifar):
    opt = module.make_parser().parse_args([str(arg) for arg in argv])
    opt.seed = opt.seed[0]
    return opt


def data_of(n, *argv, rank=0, world=1, each=1):
    """n random images whose labels are their numbers, or `each` of one class."""
    images, labels = torch.from_numpy(random_images(n, 8)), torch.arange(n) // each
    info = {'mean': [128] * 3, 'std': [64] * 3}
    return cifar.DeviceData(options('--flip', *argv), place(rank, world),
                            [images, labels, images, labels], info)


def test_folder(work, small_images):
    """In the order of the names, RGB, also from val/, and resized if asked to."""
    for path in small_images.glob('*/*/000*.png'):
        write_image(Path('data', path.relative_to(small_images)), engine.read_image(path))
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 200
    write_image('data/train/0/0000.png', red)
    argv = ['--dataset', 'folder', '--dataroot', 'data']
    train, y, test, y_test, classes = cifar.read_folder(options(*argv))
    assert train.shape == (30, 16, 16, 3) and test.shape == (21, 16, 16, 3)
    assert y.tolist() == [0] * 10 + [1] * 10 + [2] * 10 and classes == ['0', '1', '2']
    assert train[0, 0, 0].tolist() == [200, 0, 0]
    for i, path in enumerate(sorted(Path('data').glob('test/*/*'))):
        assert np.array_equal(test[i], engine.read_image(path)) and str(y_test[i]) == path.parts[2]
    Path('data/test').rename('data/val')
    assert cifar.read_folder(options(*argv, '--image_size', 12))[2].shape == (21, 12, 12, 3)


def test_cifar10_through_torchvision(tmp_path, monkeypatch):
    """From an archive's files, here with four random images."""
    cls, folder = torchvision.datasets.CIFAR10, tmp_path / 'cifar-10-batches-py'
    pixels = random_images(4, 32)
    folder.mkdir()
    for name, content in (('batch', {'data': pixels.transpose(0, 3, 1, 2).reshape(4, -1),
                                     'labels': [3, 0, 2, 1]}), ('meta', {'names': [*'abcd']})):
        (folder / name).write_bytes(pickle.dumps(content))
    batch, meta = (md5((folder / name).read_bytes()).hexdigest() for name in ('batch', 'meta'))
    monkeypatch.setattr(cls, 'train_list', [('batch', batch)] * 2)
    monkeypatch.setattr(cls, 'test_list', [('batch', batch)])
    monkeypatch.setattr(cls, 'meta', {'filename': 'meta', 'key': 'names', 'md5': meta})
    train, y, test, _, classes = cifar.read_torchvision(options('--dataroot', tmp_path))
    assert np.array_equal(train, [*pixels, *pixels]) and np.array_equal(test, pixels)
    assert y.tolist() == [3, 0, 2, 1] * 2 and classes == ['a', 'b', 'c', 'd']


def test_cluttered_digits():
    """The same each time; a digit is somewhere among others, in training two times."""
    arrays = train, y, test, y_test, _ = cifar.read_cluttered_digits(options())
    assert train.shape == (2 * 1437, 32, 32, 3) and test.shape == (360, 32, 32, 3)
    assert {*y} == {*y_test} == {*range(10)} and train.dtype == np.uint8
    assert np.array_equal(y[:1437], y[1437:])
    assert all(map(np.array_equal, arrays, cifar.read_cluttered_digits(options('--seed', '1'))))
    images, labels = load_digits(return_X_y=True)
    for canvas, label in zip(train[::290, :, :, 0], y[::290], strict=True):
        digits = [cv2.resize((i * 255 / 16).reshape(8, 8).astype(np.uint8), (16, 16))
                  for i in images[labels == label]]
        places = np.lib.stride_tricks.sliding_window_view(canvas, (16, 16))
        inside = [digit for digit in digits if (places >= digit).all((2, 3)).any()]
        assert inside and (canvas > 0).sum() > max((digit > 0).sum() for digit in inside)


def test_image_size_holds_for_every_data_set_and_in_evaluation(work, capsys):
    argv = ['--dataset', 'ClutteredDigits', '--test_fraction', '0.1', '--dtype', 'double']
    cifar.main([*argv, '--image_size', '16', '--depth', '10', '--width', '0.25', '--epochs', '1',
                '--train_fraction', '0.01', '--save', 'a'])
    assert load('a')['data']['size'] == [16, 16]
    assert load('a')['params']['conv0'].dtype == torch.double
    capsys.readouterr()
    cifar.main([*argv, '--evaluate', 'a'])
    assert f'loss {log_of("a")[-1]["test_loss"]:.4f}' in capsys.readouterr().out


def test_crops_are_those_of_the_reflected_image_mirrored_and_not():
    images, pad = random_images(2, 8), 3
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode='reflect')
    draws = np.array([(i, dy, dx, flip) for i in (0, 1) for dy in range(-pad, pad + 1)
                      for dx in range(-pad, pad + 1) for flip in (0, 1)])
    index, dy, dx, flip = torch.from_numpy(draws).T
    crops = cifar.crop_and_flip(torch.from_numpy(images), index, dy, dx, flip.bool()).numpy()
    for crop, (i, y, x, mirrored) in zip(crops, draws, strict=True):
        expected = padded[i, pad + y:pad + y + 8, pad + x:pad + x + 8]
        assert np.array_equal(crop, expected[:, ::-1] if mirrored else expected)


def test_shifts_are_up_to_the_padding_and_half_is_mirrored():
    _, dy, dx, flip = data_of(600).draw(3)
    assert {*dy.tolist()} == {*dx.tolist()} == {*range(-4, 5)} and 240 < flip.sum() < 360
    assert not data_of(600, '--no-flip').draw(3)[3].any()


def epoch_of(data, epoch=3):
    """{number of an image: its pixels} in an epoch, in order."""
    return {int(i): image for x, y in data.train_batches(epoch)
            for image, i in zip(x, y, strict=True)}


def test_an_epoch_shows_each_image_once_in_an_order_of_seed_and_epoch():
    first, plain = epoch_of(data_of(33)), data_of(33, '--no-flip', '--randomcrop_pad', 0)
    assert sorted(first) == list(range(33))
    assert sum(len(y) for _, y in data_of(33).train_batches(3)) == 33
    orders = [[*first], [*epoch_of(data_of(33), 4)], [*epoch_of(data_of(33, '--seed', 1))]]
    assert len({*map(tuple, orders)}) == 3
    for i, image in epoch_of(plain).items():
        assert torch.equal(image, plain.normalise(plain.images[i:i + 1])[0])


@pytest.mark.parametrize('size', [8, 2])
def test_crops_do_not_depend_on_ranks_or_the_batch_size(size):
    alone = epoch_of(data_of(33, '--batch_size', 8))
    first, second = (epoch_of(data_of(33, '--batch_size', size, rank=r, world=2)) for r in (0, 1))
    assert len(first) == len(second) == 16 and len(first | second) == 32  # one is left out
    assert all(torch.equal(image, alone[i]) for i, image in (first | second).items())
    assert {*[*first][:4], *[*second][:4]} == {*[*alone][:8]}  # the ranks share each batch


def test_an_epoch_is_the_same_however_many_batches_are_cropped_at_once(monkeypatch):
    """While the first ones train, the next epoch is drawn."""
    epochs = {epoch: epoch_of(data_of(33), epoch) for epoch in (3, 4)}
    monkeypatch.setattr(cifar, 'TOGETHER', 2)
    data = data_of(33, '--batch_size', 2)
    for epoch, expected in epochs.items():
        found = epoch_of(data, epoch)
        assert [*found] == [*expected] and all(torch.equal(found[i], expected[i]) for i in found)


def test_a_part_of_the_images_keeps_its_labels():
    data = data_of(32, '--no-flip', '--randomcrop_pad', 0, '--train_fraction', 0.5, each=4)
    x, y = (torch.cat(parts) for parts in zip(*data.train_batches(3), strict=True))
    found = (x[:, None] == data.normalise(data.images)).all((2, 3, 4)).nonzero()  # (16, 2)
    assert len(found) == 16 and torch.equal(found[:, 1] // 4, y)


def test_fractions_are_stratified():
    labels = np.repeat([0, 1, 2], [100, 40, 3])
    chosen = cifar.stratified(labels, 0.25, 0)
    assert np.bincount(labels[chosen]).tolist() == [25, 10, 1] and len({*chosen}) == 36
    assert np.array_equal(chosen, cifar.stratified(labels, 0.25, 0))
    assert {*chosen} != {*cifar.stratified(labels, 0.25, 1)}


def test_normalised_by_the_whole_training_set(work):
    """Also with a part of it; the checkpoint tells how, in RGB."""
    cifar.main([*SMALL, '--save', 'a', '--train_fraction', '0.4', '--epochs', '1'])
    stored, opt = load('a')['data'], options(*SMALL)
    images = cifar.read_folder(opt)[0].astype(float)
    assert stored['mean'] == pytest.approx(images.mean((0, 1, 2)).tolist())
    assert stored['std'] == pytest.approx(images.std((0, 1, 2)).tolist())
    x = cifar.DeviceData(opt, place(), *cifar.read_arrays(opt, place())).normalise(
        torch.from_numpy(images))
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3))


@pytest.mark.parametrize('size', [(300, 400), (500, 375), (224, 224), (260, 500), (90, 120)])
def test_test_images_are_torchvisions(size):
    image = photo(*size)
    expected = TF.center_crop(TF.resize(Image.fromarray(image), 256, antialias=True), 224)
    difference = np.abs(imagenet.centre(image, 224).astype(int) - np.asarray(expected))
    assert difference.shape == (224, 224, 3) and difference.max() <= 1


def test_crop_boxes():
    rng = np.random.default_rng(0)
    top, left, h, w = np.array([imagenet.crop_box(rng, 300, 400) for _ in range(4000)]).T
    area, ratio = h * w / (300 * 400), w / h
    assert min(top.min(), left.min()) >= 0 and (top + h).max() <= 300 and (left + w).max() <= 400
    assert 0.075 < area.min() < 0.1 and 0.95 < area.max() <= 1
    assert 0.74 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.35
    assert imagenet.crop_box(rng, 10, 400) == (0, 193, 10, 13)  # no part has such a shape
    assert imagenet.crop_box(rng, 400, 10) == (193, 0, 13, 10)


def test_random_crops_of_the_rescaled_image():
    image = np.repeat(np.arange(200, dtype=np.uint8), 300).reshape(200, 100, 3)  # of their rows
    crops = [imagenet.random_crop(image, 98, np.random.default_rng(i), 'short') for i in range(300)]
    top, bottom = np.stack(crops)[:, [0, -1], 0, 0].T.astype(int)  # of 224×112
    assert crops[0].shape == (98, 98, 3) and (abs(bottom - top - 97 * 200 / 224) < 2).all()
    assert top.min() < 3 and bottom.max() > 196


@pytest.mark.parametrize('crop', ['short', 'area'])
def test_images_are_cropped_at_random_and_mirrored_in_training_alone(tmp_path, crop):
    write_image(tmp_path / 'a.png', image := photo(90, 130))
    opt = options('--crop', crop, '--image_size', 48, module=imagenet)
    listing = imagenet.Listing(tmp_path, np.array(['a.png']), np.array([5]))
    test, label = imagenet.Images(opt, listing, False)[0, 0]
    assert label == 5 and np.array_equal(test, imagenet.centre(image, 48))
    mirrored = []
    for epoch in range(30):
        found, label = imagenet.Images(opt, listing, True)[epoch, 0]
        rng = np.random.default_rng([0, 2, epoch, 0])
        if crop == 'area':
            top, left, h, w = imagenet.crop_box(rng, 90, 130)
            expected = imagenet.resize(image[top:top + h, left:left + w], 48, 48)
        else:
            expected = imagenet.random_crop(image, 48, rng, crop)
        mirrored.append(not np.array_equal(found, expected))
        assert label == 5 and np.array_equal(found[:, ::-1] if mirrored[-1] else found, expected)
    assert 5 < sum(mirrored) < 25


TINY = ['--image_size', '64', '--epochs', '2', '--nthread', '0', '--lr', '0.01']
CUB = ['--dataset', 'cub', '--dataroot', 'cub']
SCENES = ['--dataset', 'scenes', '--dataroot', 'scenes']


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """cub/CUB_200_2011 with three classes and scenes/ with two, and a network to fine-tune."""
    monkeypatch.chdir(tmp_path)
    rng, cub, lines = np.random.default_rng(0), Path('cub/CUB_200_2011'), []
    for i in range(1, 16):
        name, image = f'00{i % 3 + 1}.Bird_{i % 3}/Bird_{i}.jpg', photo(100, 120, i) // 2
        x, y = rng.integers(0, 40, 2)
        image[y:y + 50, x:x + 60] = 200 + i  # the bird
        write_image(cub / 'images' / name, image)
        lines.append((name, i % 3 + 1, int(i <= 9), f'{x:.1f} {y:.1f} 60.0 50.0'))
    for file, values in zip(('images', 'image_class_labels', 'train_test_split', 'bounding_boxes'),
                            zip(*lines, strict=True), strict=True):
        text = ''.join(f'{i} {value}\n' for i, value in enumerate(values, 1))
        (cub / f'{file}.txt').write_text(text)
    for part, n in (('Train', 5), ('Test', 3)):
        names = [f'{c}/{part}_{i}.jpg' for c in ('airport inside', 'bakery') for i in range(n)]
        for i, name in enumerate(names):
            write_image(Path('scenes/Images', name), photo(90, 110, i))
        Path(f'scenes/{part}Images.txt').write_text('\n'.join(names))
    torch.save({'params': trained(2)}, 'student.pt7')


def trained(seed, classes=5, depth=18):
    """The parameters of a network whose statistics are not those of a new one."""
    f, params = imagenet_resnet(depth, 0.0625, classes, seed)
    f(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)) + 1, params, True)
    return {k: p.detach() for k, p in params.items()}


def loader(*argv, rank=0, world=1):
    opt = options(*TINY, '--batch_size', 4, *argv, module=imagenet)
    opt.crop = opt.crop or imagenet.DATASETS[opt.dataset][1]
    return imagenet.ImageLoader(opt, place(rank, world), Path(opt.dataroot))


def test_cub_is_cut_to_its_boxes(archives):
    data = loader(*CUB)
    assert data.n_train == 9 and data.info['classes'] == ['001.Bird_0', '002.Bird_1', '003.Bird_2']
    x, y = (torch.cat(parts) for parts in zip(*data.test_batches(), strict=True))
    assert y.tolist() == [i % 3 for i in range(10, 16)]
    pixels = x.permute(0, 2, 3, 1) * data.std + data.mean  # nothing but the bird is left
    assert [round(float(p.mean())) for p in pixels] == [200 + i for i in range(10, 16)]
    assert pixels.std((1, 2)).max() < 3


@pytest.mark.parametrize('path, wrong, words', [
    ('cub/CUB_200_2011/train_test_split.txt', '1 1\n', 'CUB-200-2011'),
    ('scenes/TestImages.txt', 'church/1.jpg\n', "'church' is not in list"),
    ('scenes/Images/bakery/Train_1.jpg', 'x', 'Train_1.jpg: not an image')])
def test_what_is_wrong_in_an_archive_is_named(archives, refused, path, wrong, words):
    Path(path).write_text(wrong)
    argv = [*(CUB if 'cub' in path else SCENES), *TINY, '--width', '0.0625', '--nthread', '1']
    refused(imagenet.main, argv, words)


def test_order_and_crops_depend_on_neither_workers_nor_ranks(archives):
    argv = [*SCENES, '--crop', 'area']
    assert loader(*argv).info['classes'] == ['airport inside', 'bakery']
    x, y = (torch.cat(parts) for parts in zip(*loader(*argv).train_batches(3), strict=True))
    assert len(x) == 10 and sorted(y.tolist()) == [0] * 5 + [1] * 5
    parts = [zip(*loader(*argv, '--nthread', 2, rank=rank, world=2).train_batches(3), strict=True)
             for rank in (0, 1)]
    (x0, y0), (x1, y1) = ([torch.cat(part) for part in each] for each in parts)
    assert torch.equal(torch.stack([x0, x1], 1).flatten(0, 1), x)
    assert torch.equal(torch.stack([y0, y1], 1).flatten(), y)
    for other in (loader(*argv).train_batches(4), loader(*argv, '--seed', 1).train_batches(3)):
        assert not torch.equal(torch.cat([x for x, _ in other]), x)


@pytest.mark.parametrize('dataset, method', [
    (CUB, '--beta 1000'), (SCENES, '--alpha 0.9 --beta 1000'), (CUB, '--min_l2 0.01')],
    ids=['AT', 'AT+KD', 'gradients'])
def test_what_is_frozen_stays_bit_for_bit(archives, dataset, method):
    """A teacher is fine-tuned, then a student that learns from it: the rest of it moves."""
    argv = [*TINY, *dataset, '--student_params', 'student.pt7', '--save', 's', *method.split()]
    if '--beta' in method:
        torch.save({'params': trained(7, depth=34)}, 'resnet34.pt7')
        imagenet.main([*TINY, *dataset, '--student_params', 'resnet34.pt7', '--save', 'logs/t'])
        argv += ['--teacher_params', 't']
    imagenet.main(argv)
    before, after, record = trained(2), load('s')['params'], log_of('s')[-1]
    frozen = {name for name in after if name.split('.')[0] in ('conv0', 'bn0', 'group0')
              or any(part.startswith('bn') for part in name.split('.'))}
    assert after.keys() == before.keys() and len(after['fc.bias']) == 2 + (dataset is CUB)
    for name in after.keys() - {'fc.weight', 'fc.bias'}:
        assert torch.equal(after[name], before[name]) == (name in frozen), name
    assert record['n_parameters'] == sum(after[name].numel() for name in after.keys() - frozen)
    defaults = {'freeze': 1, 'fix_batch_norm': True, 'crop': 'short', 'batch_size': 64,
                'depth': None}
    assert record.items() >= defaults.items()
    assert len(record.get('at_losses', [])) == 2 * ('--beta' in method)


def test_a_tuned_run_goes_on_without_the_file_that_it_began_with(archives, capsys):
    """At the end it is exported, and what was exported has its test error."""
    torch.save({'params': dict(sorted(trained(2).items()))}, 'student.pt7')  # as HDF5 orders them
    argv = [*TINY, *SCENES, '--student_params', 'student.pt7', '--no-fix_batch_norm']
    imagenet.main([*argv, '--save', 'whole'])
    imagenet.main([*argv, '--save', 'parts', '--epochs', '1'])
    Path('student.pt7').unlink()
    imagenet.main(['--resume', 'parts', *SCENES[2:], '--epochs', '2', '--export', 'x.hkl'])
    same_run('whole', 'parts')
    arrays, params = hickle.load('x.hkl'), load('parts')['params']
    assert arrays.keys() == params.keys()
    assert all(np.array_equal(arrays[k], p) for k, p in params.items())
    error = f': test error {100 - log_of("parts")[1]["test_acc"]:.2f}%'
    for run in ('parts', 'x.hkl'):
        imagenet.main([*TINY, *SCENES, '--evaluate', run])
        assert run + error in capsys.readouterr().out


def test_imagenet_layout(work, small_images, capsys):
    """train/ and val/ of --imagenetpath, from scratch: crops by area, nothing frozen."""
    Path('data').mkdir()
    Path('data/train').symlink_to(small_images / 'train')
    Path('data/val').symlink_to(small_images / 'test')
    imagenet.main([*TINY, '--imagenetpath', 'data', '--width', '0.0625', '--save', 'a'])
    record, new = log_of('a')[0], imagenet_resnet(18, 0.0625, 3)[1]
    assert record['num_classes'] == 3 and (record['crop'], record['freeze']) == ('area', 0)
    assert not any(torch.equal(p, new[k]) for k, p in load('a')['params'].items())
    data = load('a')['data']
    assert data['mean'] == pytest.approx([123.675, 116.28, 103.53]) and data['images'] == [45, 21]
    assert data['std'] == pytest.approx([58.395, 57.12, 57.375])
    Path('data/train').unlink()  # tests need only val/
    capsys.readouterr()
    imagenet.main(['--evaluate', 'a', '--imagenetpath', 'data', '--nthread', '0'])
    error = 100 - log_of('a')[-1]['test_acc']
    assert capsys.readouterr().out.startswith(f'a: test error {error:.2f}%')
