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
from helpers import SMALL, load, log_of, photo, random_images, same_run, write_image
from PIL import Image

import cifar
import engine
import imagenet
from resnet import STATISTICS, InputError, imagenet_resnet


def place(rank=0, world=1):
    return engine.Place(torch.device('cpu'), rank, world)


def options(*argv, module=cifar):
    opt = module.make_parser().parse_args([str(arg) for arg in argv])
    opt.seed = opt.seed[0]
    return opt


def data_of(n, *argv, rank=0, world=1):
    """n random images whose labels are their numbers."""
    images, labels = torch.from_numpy(random_images(n, 8)), torch.arange(n)
    info = {'mean': images.double().mean((0, 1, 2)).tolist(),
            'std': images.double().std((0, 1, 2)).tolist()}
    opt = options('--flip', *argv)
    return cifar.DeviceData(opt, place(rank, world), [images, labels, images, labels], info)


# ------------------------------------------------------------------ small images: reading

def copy_images(small_images, folder='data'):
    """A folder of images that a test may change."""
    for path in small_images.glob('*/*/000*.png'):
        write_image(Path(folder) / path.relative_to(small_images), engine.read_image(path))
    return Path(folder)


def read_folder(*argv):
    return cifar.read_folder(options('--dataset', 'folder', '--dataroot', 'data', *argv))


def test_folder(work, small_images):
    data = copy_images(small_images)
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 200
    write_image(data / 'train/0/0000.png', red)
    train, y, test, y_test, classes = read_folder()
    assert train.shape == (30, 16, 16, 3) and test.shape == (21, 16, 16, 3)
    assert y.tolist() == [0] * 10 + [1] * 10 + [2] * 10 and classes == ['0', '1', '2']
    assert train[0, 0, 0].tolist() == [200, 0, 0]  # RGB
    for i, path in enumerate(sorted((data / 'test').glob('*/*'))):
        assert np.array_equal(test[i], engine.read_image(path)) and str(y_test[i]) == path.parts[2]
    (data / 'test').rename(data / 'val')
    assert read_folder('--image_size', '12')[2].shape == (21, 12, 12, 3)


def test_folders_that_do_not_fit_are_refused(work, small_images):
    data = copy_images(small_images)
    write_image(data / 'test/1/0003.png', random_images(1, 9)[0])
    with pytest.raises(InputError, match=r'data/test/1/0003.png: 9×9, others are 16×16: --image_si'):
        read_folder()
    (data / 'test/1/0003.png').write_bytes(b'no image')
    with pytest.raises(InputError, match='data/test/1/0003.png: not an image'):
        read_folder()
    write_image(data / 'train/3/0.png', random_images(1)[0])
    with pytest.raises(InputError, match='must have the same classes'):
        read_folder()
    (data / 'train').rename(data / 'elsewhere')
    with pytest.raises(InputError, match='must hold train/'):
        read_folder()


def test_orientation_is_ignored_and_grey_is_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90°
    Image.fromarray(photo(40, 60)).save(tmp_path / 'turned.jpg', exif=exif)
    assert engine.read_image(tmp_path / 'turned.jpg').shape == (40, 60, 3)
    Image.fromarray(photo(40, 60)[..., 0]).save(tmp_path / 'grey.png')
    assert (engine.read_image(tmp_path / 'grey.png') == photo(40, 60)[..., :1]).all()


@pytest.mark.parametrize('dataset, n', [('CIFAR10', 20), ('CIFAR100', 4)])
def test_cifar_through_torchvision(tmp_path, monkeypatch, dataset, n):
    """From an archive's files, with four random images each."""
    cls = getattr(torchvision.datasets, dataset)
    folder = tmp_path / cls.base_folder
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return name, md5((folder / name).read_bytes()).hexdigest()

    label = 'labels' if dataset == 'CIFAR10' else 'fine_labels'
    for i, which in enumerate(('train_list', 'test_list')):
        pixels = random_images(4, 32, i).transpose(0, 3, 1, 2).reshape(4, -1)
        monkeypatch.setattr(cls, which, [write(name, {'data': pixels, label: [0, 1, 2, 3]})
                                         for name, _ in getattr(cls, which)])
    digest = write(cls.meta['filename'], {cls.meta['key']: ['a', 'b', 'c', 'd']})[1]
    monkeypatch.setattr(cls, 'meta', {**cls.meta, 'md5': digest})
    opt = options('--dataset', dataset, '--dataroot', tmp_path)
    train, y, test, y_test, classes = cifar.read_torchvision(opt)
    assert train.shape == (n, 32, 32, 3) and y.tolist() == [0, 1, 2, 3] * (n // 4)
    assert np.array_equal(train[:4], random_images(4, 32, 0)) and classes == ['a', 'b', 'c', 'd']
    assert np.array_equal(test, random_images(4, 32, 1)) and y_test.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize('name', ['Digits', 'ClutteredDigits'])
def test_digits(name):
    """The same each time; training and test images differ, all classes are in both."""
    arrays = train, y, test, y_test, _ = cifar.DATASETS[name][0](options('--dataset', name))
    copies = 1 + (name == 'ClutteredDigits')
    assert train.shape == (copies * 1437, 32, 32, 3) and test.shape == (360, 32, 32, 3)
    assert {*y} == {*y_test} == {*range(10)} and train.dtype == np.uint8 and train.max() == 255
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}
    again = cifar.DATASETS[name][0](options('--dataset', name, '--seed', '1'))
    assert all(map(np.array_equal, arrays, again))


def test_a_cluttered_digit_is_somewhere_among_others():
    train, y, *_ = cifar.read_cluttered_digits(None)
    digits, labels, *_ = cifar.scikit_digits(16)
    assert np.array_equal(y, np.tile(labels, 2))
    for i in range(0, len(train), 29):
        canvas, digit = train[i, :, :, 0], digits[i % len(digits)]
        places = np.lib.stride_tricks.sliding_window_view(canvas, (16, 16))  # (17, 17, 16, 16)
        assert (places >= digit).all((2, 3)).any() and (canvas > 0).sum() > (digit > 0).sum()
    assert not np.array_equal(train[0], train[1437])  # at another place


# ------------------------------------------------------------------ small images: augmentation

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


def epoch_of(data, epoch=3):
    """{number of an image: its pixels} in an epoch, in order."""
    return {int(i): image for x, y in data.train_batches(epoch)
            for image, i in zip(x, y, strict=True)}


def test_an_epoch_shows_each_image_once_in_an_order_of_seed_and_epoch():
    first = epoch_of(data_of(33))
    assert sorted(first) == list(range(33))
    assert sum(len(y) for _, y in data_of(33).train_batches(3)) == 33
    orders = [[*first], [*epoch_of(data_of(33), 4)], [*epoch_of(data_of(33, '--seed', 1))]]
    assert len({*map(tuple, orders)}) == 3
    again, plain = epoch_of(data_of(33)), data_of(33, '--no-flip', '--randomcrop_pad', 0)
    assert all(torch.equal(again[i], image) for i, image in first.items())
    for i, image in epoch_of(plain).items():
        assert torch.equal(image, plain.normalise(plain.images[i:i + 1])[0])


def test_crops_do_not_depend_on_ranks_or_the_batch_size():
    alone = epoch_of(data_of(33, '--batch_size', 8))
    for argv in (['--batch_size', 8], ['--batch_size', 2]):
        parts = [epoch_of(data_of(33, *argv, rank=rank, world=2)) for rank in (0, 1)]
        together = parts[0] | parts[1]
        assert len(parts[0]) == len(parts[1]) == 16 and len(together) == 32  # one is left out
        assert all(torch.equal(image, alone[i]) for i, image in together.items())
        # Each global batch is shared out between the ranks.
        assert {*[*parts[0]][:4], *[*parts[1]][:4]} == {*[*alone][:8]}


def test_every_test_image_counts_once_on_any_number_of_ranks():
    for world in (1, 2, 5):
        seen = [i for rank in range(world)
                for _, y in data_of(33, rank=rank, world=world).test_batches() for i in y.tolist()]
        assert sorted(seen) == list(range(33))


def test_fractions_are_stratified():
    labels = np.repeat([0, 1, 2], [100, 40, 3])
    chosen = cifar.stratified(labels, 0.25, 0)
    assert np.bincount(labels[chosen]).tolist() == [25, 10, 1] and len({*chosen}) == 36
    assert np.array_equal(chosen, cifar.stratified(labels, 0.25, 0))
    assert {*chosen} != {*cifar.stratified(labels, 0.25, 1)}


def test_normalised_by_the_whole_training_set(work):
    """Also with a part of it; the checkpoint tells how, in RGB."""
    cifar.main([*SMALL, '--save', 'a', '--train_fraction', '0.4', '--epochs', '1'])
    stored, opt = load('a')['data'], options(*SMALL, '--randomcrop_pad', 0, '--no-flip')
    images = cifar.read_folder(opt)[0].astype(float)
    assert stored['mean'] == pytest.approx(images.mean((0, 1, 2)).tolist())
    assert stored['std'] == pytest.approx(images.std((0, 1, 2)).tolist())
    data = cifar.DeviceData(opt, place(), *cifar.read_arrays(opt, place()))
    x = torch.cat([x for x, _ in data.train_batches(0)])
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), rtol=1e-3, atol=0)


@pytest.mark.parametrize('dataset, argv, flip', [
    ('folder', [], True), ('Digits', [], False), ('Digits', ['--flip'], True),
    ('folder', ['--no-flip'], False)])
def test_mirrored_where_a_class_stays_itself(work, dataset, argv, flip):
    cifar.main([*SMALL, '--dataset', dataset, '--train_fraction', '0.1', '--epochs', '1',
                '--test_fraction', '0.1', '--save', 'a', *argv])
    assert log_of('a')[0]['flip'] is flip


# ------------------------------------------------------------------ imagenet.py: images

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
    rows, columns = np.meshgrid(np.arange(200), np.arange(100), indexing='ij')
    image = np.stack([rows, columns, rows], -1).astype(np.uint8)
    rng = np.random.default_rng(0)
    crops = np.stack([imagenet.random_crop(image, 98, rng, 'short') for _ in range(300)])
    top, bottom = crops[:, 0, 0, 0].astype(int), crops[:, -1, 0, 0].astype(int)
    assert crops.shape == (300, 98, 98, 3)                       # of 224×112
    assert (abs(bottom - top - 97 * 200 / 224) < 2).all()        # all at one scale
    assert top.min() < 3 and bottom.max() > 196 and crops[:, 0, 0, 1].max() > 10


# ------------------------------------------------------------------ imagenet.py: archives

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
    return tmp_path


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
    train, test = data.train.listing, data.test.listing
    assert (len(train.names), len(test.names)) == (9, 6) and data.opt.crop == 'short'
    assert train.names[0] == b'002.Bird_1/Bird_1.jpg' and train.labels[0] == 1
    assert data.info['classes'] == ['001.Bird_0', '002.Bird_1', '003.Bird_2']
    x, y = (torch.cat(parts) for parts in zip(*data.test_batches(), strict=True))
    assert sorted(y.tolist()) == [0, 0, 1, 1, 2, 2]
    pixels = x.permute(0, 2, 3, 1) * data.std + data.mean  # nothing but the bird is left
    assert [round(float(p.mean())) for p in pixels] == [200 + i for i in range(10, 16)]
    assert pixels.std((1, 2)).max() < 3


def test_scenes(archives):
    data = loader(*SCENES)
    assert data.train.listing.labels.tolist() == [0] * 5 + [1] * 5
    assert data.info['classes'] == ['airport inside', 'bakery']
    assert [y for _, ys in data.test_batches() for y in ys.tolist()] == [0] * 3 + [1] * 3


@pytest.mark.parametrize('path, wrong, words', [
    ('cub/CUB_200_2011/bounding_boxes.txt', '7 1 2 3\n', 'CUB-200-2011'),
    ('cub/CUB_200_2011/train_test_split.txt', '1 1\n', 'CUB-200-2011'),
    ('cub/CUB_200_2011/images/002.Bird_1/Bird_4.jpg', '', 'Bird_4.jpg: not an image'),
    ('scenes/TestImages.txt', 'church/1.jpg\n', 'church/1.jpg: a class without'),
    ('scenes/Images/bakery/Train_1.jpg', 'x', 'Train_1.jpg: not an image')])
def test_what_is_wrong_in_an_archive_is_named(archives, refused, path, wrong, words):
    Path(path).write_text(wrong)
    argv = [*(CUB if 'cub' in path else SCENES), *TINY, '--width', '0.0625', '--nthread', '1']
    refused(imagenet.main, argv, words)


def test_order_and_crops_depend_on_neither_workers_nor_ranks(archives):
    argv = [*SCENES, '--crop', 'area']
    x, y = (torch.cat(parts) for parts in zip(*loader(*argv).train_batches(3), strict=True))
    assert len(x) == 10 and sorted(y.tolist()) == [0] * 5 + [1] * 5
    parts = [zip(*loader(*argv, '--nthread', 2, rank=rank, world=2).train_batches(3), strict=True)
             for rank in (0, 1)]
    (x0, y0), (x1, y1) = ([torch.cat(part) for part in each] for each in parts)
    assert torch.equal(torch.stack([x0, x1], 1).flatten(0, 1), x)
    assert torch.equal(torch.stack([y0, y1], 1).flatten(), y)
    for other in (loader(*argv).train_batches(4), loader(*argv, '--seed', 1).train_batches(3)):
        assert not torch.equal(torch.cat([x for x, _ in other]), x)


# ------------------------------------------------------------------ fine-tuning

@pytest.mark.parametrize('dataset, method', [
    (CUB, '--beta 1000'), (SCENES, '--alpha 0.9 --beta 1000'), (CUB, '--min_l2 0.01')],
    ids=['AT', 'AT+KD', 'gradients'])
def test_what_is_frozen_stays_bit_for_bit(archives, dataset, method):
    """A teacher is fine-tuned, then a student that learns from it: the rest of it moves."""
    argv = [*TINY, *dataset, '--student_params', 'student.pt7', '--save', 's', *method.split()]
    if '--beta' in method:
        torch.save({'params': trained(7, depth=34)}, 'resnet34.pt7')
        imagenet.main([*TINY, *dataset, '--student_params', 'resnet34.pt7', '--save', 'logs/t',
                       '--epochs', '1'])
        argv += ['--teacher_params', 't']
    imagenet.main(argv)
    before, after, record = load_file('student.pt7')['params'], load('s')['params'], log_of('s')[-1]
    frozen = {name for name in after if name.split('.')[0] in ('conv0', 'bn0', 'group0')
              or any(part.startswith('bn') for part in name.split('.'))}
    assert after.keys() == before.keys() and len(after['fc.bias']) == 2 + (dataset is CUB)
    for name in after.keys() - {'fc.weight', 'fc.bias'}:
        assert torch.equal(after[name], before[name]) == (name in frozen), name
    assert record['n_parameters'] == sum(after[name].numel() for name in after.keys() - frozen)
    assert (record['freeze'], record['fix_batch_norm'], record['crop']) == (1, True, 'short')
    assert (record['batch_size'], record['epoch_step']) == (64, [30, 45])
    assert len(record.get('at_losses', [])) == 2 * ('--beta' in method)


def load_file(path):
    return torch.load(path, weights_only=True)


def test_other_parts_can_be_frozen(archives):
    argv = [*TINY, *SCENES, '--epochs', '1', '--student_params', 'student.pt7']
    imagenet.main([*argv, '--freeze', '0', '--no-fix_batch_norm', '--save', 'all'])
    imagenet.main([*argv, '--freeze', '2', '--no-fix_batch_norm', '--save', 'two'])
    before, moved, two = (load_file(p)['params'] for p in ('student.pt7', 'all/model.pt7',
                                                           'two/model.pt7'))
    assert not any(torch.equal(moved[k], before[k]) for k in moved)
    equal = {k for k in two if torch.equal(two[k], before[k])}
    assert equal == {k for k in two if k.split('.')[0] in ('conv0', 'bn0', 'group0', 'group1')}
    assert any(k.endswith(STATISTICS) for k in equal)


def test_a_tuned_run_goes_on_without_the_file_that_it_began_with(archives):
    argv = [*TINY, *SCENES, '--student_params', 'student.pt7', '--no-fix_batch_norm']
    imagenet.main([*argv, '--save', 'whole'])
    imagenet.main([*argv, '--save', 'parts', '--epochs', '1'])
    Path('student.pt7').unlink()
    imagenet.main(['--resume', 'parts', '--dataroot', 'scenes', '--epochs', '2', '--nthread', '1'])
    same_run('whole', 'parts')


def test_exported_at_the_end_and_evaluated(archives, capsys):
    argv = [*TINY, *CUB, '--student_params', 'student.pt7', '--epochs', '1']
    imagenet.main([*argv, '--save', 's', '--export', 'x.hkl'])
    arrays, params = hickle.load('x.hkl'), load('s')['params']
    assert arrays.keys() == params.keys()
    assert all(np.array_equal(arrays[k], p) for k, p in params.items())
    for run in ('s', 'x.hkl'):
        capsys.readouterr()
        imagenet.main([*TINY, *CUB, '--evaluate', run])
        error = f'{run}: test error {100 - log_of("s")[0]["test_acc"]:.2f}%, loss '
        found, loss = capsys.readouterr().out.splitlines()[-1].split(error)
        assert found == '' and float(loss) == pytest.approx(log_of('s')[0]['test_loss'], abs=1e-4)


def test_imagenet_layout(tmp_path, monkeypatch):
    """train/ and val/ of --imagenetpath, from scratch: crops by area, nothing frozen."""
    monkeypatch.chdir(tmp_path)
    for part, n in (('train', 6), ('val', 4)):
        for i in range(n):
            write_image(Path(f'data/{part}/n{i % 2}/{i}.JPEG'), photo(40 + 3 * i, 50, i))
    imagenet.main([*TINY, '--imagenetpath', 'data', '--width', '0.0625', '--epochs', '1',
                   '--batch_size', '4', '--save', 'a'])
    record, new = log_of('a')[0], imagenet_resnet(18, 0.0625, 2)[1]
    assert record['num_classes'] == 2 and (record['crop'], record['freeze']) == ('area', 0)
    assert not any(torch.equal(p, new[k]) for k, p in load('a')['params'].items())
    assert load('a')['data']['mean'] == pytest.approx([123.675, 116.28, 103.53])
    cv2.imwrite('data/val/n0/0.JPEG', np.zeros((1, 1, 3), np.uint8))  # as small as can be
    imagenet.main([*TINY, '--imagenetpath', 'data', '--evaluate', 'a'])
