"""Fine-tuning in imagenet.py: the archives of CUB-200-2011 and MIT Indoor 67 in miniature, and what
is fixed."""
import os
import signal
from pathlib import Path

import cv2
import hickle
import numpy as np
import pytest
import torch
from helpers import CPU, affine_export, files, load, photo, same, stop_at_step, stopped_after

import imagenet as script
from resnet import NETWORKS, STATISTICS, freeze, imagenet_resnet
from training.images import read_cub, read_scenes
from training.log import read_log
from weights import Model, export_folded, load_model

SMALL = ['--image_size', '64', '--epochs', '2', '--nthread', '0', '--lr', '0.01']
CUB = ['--dataset', 'cub', '--dataroot', 'cub']
SCENES = ['--dataset', 'scenes', '--dataroot', 'scenes']


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image[..., ::-1])


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """cub/CUB_200_2011 with three classes and scenes/ with two, as their archives have them."""
    script.listings.cache_clear()  # of another test's folders
    rng, cub = np.random.default_rng(0), tmp_path / 'cub' / 'CUB_200_2011'
    lists = {name: [] for name in ('images', 'image_class_labels', 'train_test_split',
                                   'bounding_boxes')}
    for i in range(1, 16):
        name = f'00{i % 3 + 1}.Bird_{i % 3}/Bird_{i}.jpg'
        image = photo(100, 120, i) // 2
        x, y = rng.integers(0, 40, 2)
        image[y:y + 50, x:x + 60] = 200 + i  # the bird
        write(cub / 'images' / name, image)
        for key, values in (('images', name), ('image_class_labels', i % 3 + 1),
                            ('train_test_split', int(i <= 9)),
                            ('bounding_boxes', f'{x:.1f} {y:.1f} 60.0 50.0')):
            lists[key].append(f'{i} {values}')
    for name, lines in lists.items():
        (cub / f'{name}.txt').write_text('\n'.join(lines) + '\n')
    for part, n in (('Train', 5), ('Test', 3)):
        names = [f'{c}/{part}_{i}.jpg' for c in ('airport inside', 'bakery') for i in range(n)]
        for i, name in enumerate(names):
            write(tmp_path / 'scenes' / 'Images' / name, photo(90, 110, i))
        (tmp_path / 'scenes' / f'{part}Images.txt').write_text('\n'.join(names))
    torch.save({'params': trained(2)}, tmp_path / 'student.pt7')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(seed, classes=5, depth=18, width=0.0625):
    """The parameters of a network whose statistics are not those of a new one."""
    f, params = imagenet_resnet(depth, width, classes, seed)
    f(torch.randn(4, 3, 64, 64) + 1, params, True)
    return {k: p.detach() for k, p in params.items()}


def main(*argv):
    run(argv)


def run(argv):
    script.main([*SMALL, *argv])


def loaded(*argv):
    opt = script.make_parser().parse_args([*SMALL, '--batch_size', '64', *argv])
    script.fill_defaults(opt)
    return script.ImageLoader(opt, CPU)


# ---------------------------------------------------------------------------- archives

def test_cub(archives):
    train, test = read_cub(Path('cub'))
    assert (len(train.names), len(test.names)) == (9, 6)
    assert set(train.labels) == set(test.labels) == {0, 1, 2}
    assert train.names[0] == b'002.Bird_1/Bird_1.jpg' and train.labels[0] == 1
    direct = read_cub(Path('cub/CUB_200_2011'))[0]
    assert direct.root == train.root and (direct.boxes == train.boxes).all()
    data = loaded(*CUB)
    assert data.opt.crop == 'short'
    (x, y), = data.test_batches()
    assert sorted(y.tolist()) == [0, 0, 1, 1, 2, 2]
    pixels = (x.permute(0, 2, 3, 1) * data.std + data.mean)  # nothing but the bird is left
    assert [round(float(p.mean())) for p in pixels] == [200 + i for i in range(10, 16)]
    assert pixels.std((1, 2)).max() < 3


def test_scenes(archives):
    train, test = read_scenes(Path('scenes'))
    assert train.labels.tolist() == [0] * 5 + [1] * 5
    assert test.labels.tolist() == [0] * 3 + [1] * 3
    assert train.names[0] == b'airport inside/Train_0.jpg' and train.boxes is None
    (x, y), = loaded(*SCENES).test_batches()
    assert x.shape == (6, 3, 64, 64) and y.tolist() == test.labels.tolist()


def edited(path, number, line):
    """Replaces a line, counted from 1, or takes it out."""
    lines = path.read_text().splitlines()
    lines[number - 1:number] = [] if line is None else [line]
    path.write_text('\n'.join(lines) + '\n')


@pytest.mark.parametrize('name, number, line, text', [
    ('images', 4, '4 001.Bird_0/nothing.jpg',
     'images.txt:4: must be "number file (in images/)"'),
    ('images', 4, '4', 'images.txt:4: must be'),
    ('images', 4, 'x 002.Bird_1/Bird_1.jpg', 'images.txt:4: must be'),
    ('images', 4, '3 002.Bird_1/Bird_1.jpg', 'each image once'),
    ('image_class_labels', 2, '2 0', 'image_class_labels.txt:2: must be "number class"'),
    ('image_class_labels', 2, '2 three', 'image_class_labels.txt:2'),
    ('image_class_labels', 2, None, 'image_class_labels.txt: no line for image 2'),
    ('image_class_labels', 2, '2 9', 'class 4 of 9 has no training images'),
    ('train_test_split', 15, '15 2', 'train_test_split.txt:15: must be "number 0 or 1"'),
    ('train_test_split', 15, '99 1', 'images.txt: no line for image 99'),
    ('bounding_boxes', 7, '7 1 2 3', 'bounding_boxes.txt:7: must be "number x y width height"'),
    ('bounding_boxes', 7, '7 1 2 -3 4', 'bounding_boxes.txt:7'),
    ('bounding_boxes', 7, '7 1 2 nan 4', 'boxes.txt:7'),
    ('bounding_boxes', 7, '7 500 2 30 40', 'Bird_7.jpg: its bounding box lies outside')])
def test_wrong_lines_of_cub_are_named(archives, refused, name, number, line, text):
    edited(Path(f'cub/CUB_200_2011/{name}.txt'), number, line)
    refused(run, [*CUB, '--width', '0.0625'], text)


@pytest.mark.parametrize('part, number, line, text', [
    ('Train', 3, 'bakery/no.jpg', 'TrainImages.txt:3: must be "class/file"'),
    ('Train', 3, 'no.jpg', 'TrainImages.txt:3'), ('Train', 3, 'a/b/no.jpg', 'TrainImages.txt:3'),
    ('Train', 3, 'bakery/Train_0.jpg', 'TrainImages.txt:6'),  # the second time that it comes
    ('Test', 1, 'bakery/Train_0.jpg', 'TestImages.txt:1')])
def test_wrong_lines_of_scenes_are_named(archives, refused, part, number, line, text):
    edited(Path(f'scenes/{part}Images.txt'), number, line)
    refused(run, [*SCENES, '--width', '0.0625'], text)


def test_lists_name_nothing_outside_of_their_folder(archives, refused):
    """By its whole path, by a way up, and through a link to elsewhere."""
    write(archives / 'x.jpg', photo(90, 110))
    for images in ('cub/CUB_200_2011/images', 'scenes/Images'):
        write(archives / images / '..' / 'x.jpg', photo(90, 110))
        Path(images, 'link').symlink_to(archives)
    for name in (archives / 'x.jpg', '../x.jpg', 'link/x.jpg'):
        edited(Path('cub/CUB_200_2011/images.txt'), 4, f'4 {name}')
        refused(run, CUB, 'images.txt:4: must be')
        edited(Path('scenes/TestImages.txt'), 1, str(name))
        refused(run, SCENES, 'TestImages.txt:1: must be')


def test_what_is_read_is_not_replaced(archives, refused):
    Path('s').mkdir()
    for name in ('s/model.pt7', 'w.pth'):
        Path(name).write_bytes(Path('student.pt7').read_bytes())
    before = files(archives)
    refused(run, [*CUB, '--student_params', 's', '--save', './s', '--overwrite'],
            '--save s/model.pt7 is one of the inputs')
    Path('logs').mkdir()
    Path('logs/cub_ResNet-18-0.0625_seed0').symlink_to(Path('s').absolute())  # the default --save
    refused(run, [*CUB, '--student_params', 's', '--overwrite'], 'model.pt7 is one of the inputs')
    tuning = [*SMALL, *CUB, '--student_params', 'w.pth', '--save', 'new']
    for argv in (tuning, ['--evaluate', 'w.pth']):
        refused(script.main, [*argv, '--export', './w.pth'],
                '--export ./w.pth is one of the inputs')
    assert files(archives) == before


def test_missing_lists_and_classes(archives, refused):
    lines = Path('scenes/TestImages.txt').read_text().splitlines()
    Path('scenes/TestImages.txt').write_text('\n'.join(lines[:3]))
    refused(run, SCENES, 'class 2 of 2 has no test images')
    Path('scenes/TestImages.txt').unlink()
    refused(run, SCENES, 'scenes/TestImages.txt: there is no such file')
    Path('cub/CUB_200_2011/bounding_boxes.txt').unlink()
    refused(run, CUB, 'bounding_boxes.txt: there is no such file')


def test_a_fifo_is_no_image_of_a_list(archives, refused):
    """Nobody would ever write to it: to read it would never end."""
    for path in ('cub/CUB_200_2011/images/002.Bird_1/Bird_4.jpg',
                 'scenes/Images/bakery/Test_1.jpg'):
        Path(path).unlink()
        os.mkfifo(path)
    refused(run, CUB, 'images.txt:4: must be "number file (in images/)"')
    refused(run, SCENES, 'TestImages.txt:5: must be "class/file"')


def test_random_crops_of_the_rescaled_image():
    pixels = np.meshgrid(np.arange(200), np.arange(100), [0], indexing='ij')
    image = np.stack(pixels, -1)[:, :, 0].astype(np.uint8)
    rng = np.random.default_rng(0)
    crops = np.stack([script.random_crop(image, 98, rng, 'short') for _ in range(300)])
    assert crops.shape[1:] == (98, 98, 3)  # of 224×112
    height = crops[:, -1, 0, 0].astype(int) - crops[:, 0, 0, 0]
    assert (abs(height - 97 * 200 / 224) < 2).all()  # all at one scale
    assert crops[:, 0, 0, 0].min() < 3 and crops[:, -1, 0, 0].max() > 196
    assert crops[:, 0, 0, 1].max() > 10


# ---------------------------------------------------------------------------- training

FROZEN = ('conv0', 'bn0', 'group0')


@pytest.mark.parametrize('dataset, method', [
    (CUB, '--beta 1000'), (SCENES, '--alpha 0.9'), (CUB, '--alpha 0.9 --beta 1000')],
    ids=['AT', 'KD', 'AT+KD'])
def test_what_is_fixed_stays_bit_for_bit(archives, dataset, method):
    """A teacher is fine-tuned, and a student that learns from it; the rest of the student moves."""
    torch.save({'params': trained(7, depth=34)}, 'resnet34.pt7')
    main(*dataset, '--student_params', 'resnet34.pt7', '--save', 'logs/teacher', '--epochs', '1')
    main(*dataset, '--student_params', 'student.pt7', '--save', 's', '--teacher_params', 'teacher',
         *method.split())
    before, after = load('student.pt7')['params'], load('s/model.pt7')['params']
    classes = 3 if dataset is CUB else 2
    assert after.keys() == before.keys() and after['fc.weight'].shape[0] == classes
    fixed = {name for name in after if name.split('.')[0] in FROZEN
             or any(part.startswith('bn') for part in name.split('.'))}
    for name, tensor in after.items():
        if not name.startswith('fc.'):
            assert torch.equal(tensor, before[name]) == (name in fixed), name
    record = read_log(Path('s/log.txt'))[-1]
    assert record['n_parameters'] == sum(after[name].numel() for name in after.keys() - fixed)
    assert record['at_groups'] == [2, 3]
    assert len(record.get('at_losses', [])) == 2 * ('--beta' in method)
    assert (record['freeze'], record['fix_batch_norm'], record['crop']) == (1, True, 'short')


def test_defaults(archives):
    main(*CUB, '--student_params', 'student.pt7', '--save', 's', '--epochs', '1')
    record = read_log(Path('s/log.txt'))[0]
    assert (record['batch_size'], record['epoch_step']) == (64, [30, 45])
    assert record['depth'] is None and record['num_classes'] == 3
    assert record['network'] == 'ResNet-18-0.0625'
    opt = script.make_parser().parse_args([*CUB, '--student_params', 'student.pt7'])
    script.fill_defaults(opt)
    assert (opt.lr, opt.epochs, opt.batch_size) == (0.01, 60, 64)


def save_as(form, params):
    """The parameters in a file of another kind, and its name."""
    if form == 'folded':
        f, _ = imagenet_resnet(18, 0.0625, 5)
        folded = export_folded(Model(f, params, '', 5, NETWORKS['resnet']))
        hickle.dump({k: t.numpy() for k, t in folded.items()}, 'x.hkl')
    elif form == 'affine':
        affine = affine_export(8, (8, 8, 16, 16), 5)
        hickle.dump({k: t.numpy() for k, t in affine.items()}, 'x.hkl')
    else:
        torch.save({'student.' + k: t for k, t in params.items()}, 'x.pth')
    return 'x.pth' if form == 'published' else 'x.hkl'


@pytest.mark.parametrize('form', ['folded', 'affine', 'published'])
def test_students_of_any_format(archives, form):
    path = save_as(form, trained(2))
    source = load_model(path).params
    argv = [*SCENES, '--student_params', path, '--lr', '0.001']
    main(*argv, '--save', 'whole')
    with stopped_after(1):
        main(*argv, '--save', 'parts')
    Path(path).unlink()  # a run that is resumed does not need it
    script.main(['--resume', 'parts'])
    whole = load('whole/model.pt7')
    assert same(whole, load('parts/model.pt7'))
    params = whole['params']
    assert params.keys() == source.keys()
    moved = {k for k in params if 'fc.' not in k and not torch.equal(params[k], source[k])}
    assert moved == {k for k in params if k[:6] in ('group1', 'group2', 'group3')
                     and '.bn' not in k}
    script.main(['--evaluate', 'whole', '--nthread', '0'])


def test_at_alone_needs_no_common_classes_and_kd_does(archives, refused):
    torch.save({'params': trained(7, classes=7)}, 'teacher.pt7')
    argv = [*CUB, '--student_params', 'student.pt7', '--teacher_params', 'teacher.pt7',
            '--epochs', '1']
    main(*argv, '--beta', '1000', '--save', 's')
    refused(run, [*argv, '--alpha', '0.9'],
            '--alpha: the teacher teacher.pt7 has 7 classes, the data 3')


def test_losses_on_gradients_where_batch_norm_is_fixed(archives, refused):
    argv = [*SCENES, '--student_params', 'student.pt7', '--min_l2', '0.1']
    main(*argv, '--symmetry', '0.1', '--epochs', '1', '--save', 's')
    assert read_log(Path('s/log.txt'))[0]['symmetry_loss'] > 0


def test_folder_and_parts_of_what_is_fixed(archives):
    Path('folder/train').parent.mkdir()
    Path('scenes/Images').rename('folder/train')
    Path('folder/test').symlink_to('train')
    argv = ['--dataset', 'folder', '--dataroot', 'folder', '--epochs', '1']
    main(*argv, '--student_params', 'student.pt7', '--freeze', '0', '--no-fix_batch_norm',
         '--crop', 'area', '--save', 's')
    before, after = load('student.pt7')['params'], load('s/model.pt7')['params']
    assert not any(torch.equal(after[k], before[k]) for k in after)
    # Not fine-tuned, and partly frozen all the same, statistics too.
    main(*argv, '--width', '0.0625', '--freeze', '2', '--save', 'new')
    new, after = imagenet_resnet(18, 0.0625, 2)[1], load('new/model.pt7')['params']
    equal = {k for k in after if torch.equal(after[k], new[k])}
    assert equal == {k for k in after if k.split('.')[0] in (*FROZEN, 'group1')}


def test_freeze():
    params = imagenet_resnet(18, 0.0625, 2)[1]

    def fixed(groups, batch_norm):
        return {k for k, p in freeze(params, groups, batch_norm).items() if not p.requires_grad}

    assert fixed(0, False) == {k for k in params if k.endswith(STATISTICS)}
    norms = ('bn0.', 'bn1.', 'bndim.')
    assert fixed(0, True) == {k for k in params if any(part in k for part in norms)}
    assert fixed(2, True) == fixed(0, True) | {
        k for k in params if k.split('.')[0] in (*FROZEN, 'group1')}


def test_stopped_and_resumed_elsewhere(archives, monkeypatch):
    argv = [*CUB, '--student_params', 'student.pt7', '--batch_size', '4', '--min_l2', '0.01']
    main(*argv, '--save', 'whole')
    stop_at_step(monkeypatch, 2, signal.SIGTERM)
    with pytest.raises(SystemExit, match='143'):
        main(*argv, '--save', 'parts')
    monkeypatch.undo()
    monkeypatch.chdir(archives)
    script.main(['--resume', 'parts', '--save', 'elsewhere'])
    assert same(load('whole/model.pt7'), load('elsewhere/model.pt7'))
