"""visualize.py: where a map peaks, the picture peaks; curves show what the logs say."""
from argparse import Namespace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import fake_log, photo, write_image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import cifar
import visualize
from utils import new_network

OPT = Namespace(image_size=None, dataset=None, mapping='sum', power=2)
GREY = [120, 130, 110]


def save(folder, net, num_classes=3, size=None, **settings):
    """An untrained network; where its input is zero, which is grey, its activations are."""
    _, params, network = new_network(net, settings, num_classes)
    size = size or ([64, 64] if net == 'resnet' else [32, 32])
    data = {'classes': [f'class {i}' for i in range(num_classes)], 'size': size, 'mean': GREY,
            'std': [60, 60, 0]}  # as of a channel that never changes
    Path(folder).mkdir()
    torch.save({'params': params, 'network': network, 'data': data}, f'{folder}/model.pt7')


def network_of(*peaks, classes=()):
    """A network whose groups peak at these positions of 4×4, whatever the image; it predicts 1."""
    groups = [torch.zeros(1, 2, 16) for _ in peaks]
    for A, peak in zip(groups, peaks, strict=True):
        A[..., peak] = 3
    groups = [A.view(1, 2, 4, 4) for A in groups]
    return {'run': 'a', 'label': 'WRN', 'f': lambda x, p, training: (torch.tensor([[0., 9.]]),
                                                                     groups),
            'params': {'weight': groups[0]}, 'data': visualize.CIFAR | {'classes': classes},
            'classes': len(classes) or 2}


@pytest.mark.parametrize('net, size, settings, groups', [
    ('wrn', 32, {'depth': 10, 'width': .25}, 3), ('resnet', 128, {'width': .0625}, 4)])
def test_maps_peak_where_the_image_is_not_blank(work, net, size, settings, groups):
    save('run', net, **settings)
    for corner in range(4):
        image = np.full((size, size, 3), GREY, np.uint8)
        y, x = corner // 2 * size * 3 // 4, corner % 2 * size * 3 // 4
        image[y:y + size // 4, x:x + size // 4] = photo(size // 4, size // 4)
        maps, _ = visualize.maps_of(visualize.load('run', OPT), image, OPT)
        assert len(maps) == groups
        for Q in maps:
            quarters = [part.sum() for half in np.split(Q, 2) for part in np.split(half, 2, 1)]
            assert int(np.argmax(quarters)) == corner


def test_a_maps_pixels_are_drawn_over_those_of_the_image():
    """A map of 4×4 with a peak at row 0, column 3, over a black image of 8×8."""
    (Q,), predicted = visualize.maps_of(network_of(3), np.zeros((8, 8, 3), np.uint8), OPT)
    assert predicted == 1 and Q.tolist() == [[0, 0, 0, 1], *[[0] * 4] * 3]
    figure = Figure(figsize=(.8, .8), dpi=100)
    canvas, ax = FigureCanvasAgg(figure), figure.add_axes((0, 0, 1, 1))
    visualize.show(ax, np.zeros((8, 8, 3), np.uint8), Q)
    canvas.draw()
    red, _, blue, _ = np.moveaxis(np.asarray(canvas.buffer_rgba()).astype(int), 2, 0)
    y, x = np.unravel_index((red - blue)[2:-2, 2:-2].argmax(), (76, 76))
    assert 0 <= y < 18 and 58 <= x < 76
    assert (red < blue)[40:-2, 2:40].all()  # jet: low is blue


# Inches of the picture: an image is 0.8 wide and 0.95 high, there is a gap before each network.
@pytest.mark.parametrize('argv, width, height', [
    (['run', 'trained', '--dataset', 'ClutteredDigits', '--index', '0,5'], 1 + 2 * 3.15, 2),
    (['many', '--dataset', 'ClutteredDigits', '--index', '3'], 4.15, 1),
    (['run', 'large', '--images', 'a.png', 'b.png', 'a.png'], 1 + 3.15 + 4.15, 3),
    (['large', '--images', 'a.png', '--image_size', '96', '--mapping', 'max'], 5.15, 1)])
def test_pictures_of_runs(work, capsys, argv, width, height):
    save('run', 'wrn', num_classes=10, depth=10, width=.25)
    save('large', 'resnet', width=.0625)
    save('many', 'wrn', num_classes=100, depth=10, width=.25)
    cifar.main(['--dataset', 'ClutteredDigits', '--depth', '10', '--width', '0.5', '--epochs', '1',
                '--train_fraction', '0.01', '--test_fraction', '0.02', '--save', 'trained',
                '--dtype', 'double'])
    write_image('a.png', photo(70, 90))
    write_image('b.png', photo(40, 30))
    visualize.main([*argv, '--output', 'maps.png'])
    h, w = cv2.imread('maps.png').shape[:2]
    assert (w / 250, h / 250) == pytest.approx((.8 * width, .95 * height + .4), abs=.02)
    assert capsys.readouterr().out.endswith('maps.png\n')


def test_a_network_sees_images_of_the_size_that_it_was_trained_on(work):
    """Or of --image_size."""
    opt = visualize.make_parser().parse_args(
        ['run', '--dataset', 'ClutteredDigits', '--index', '5'])
    (image,), (label,), classes = visualize.from_data_set(opt)
    assert image.shape == (32, 32, 3) and classes[label].isdigit()
    save('run', 'wrn', size=[16, 24], depth=10, width=.25)
    for opt.image_size, shape in ((0, (16, 24, 3)), (48, (48, 48, 3))):
        own = visualize.load('run', opt)['resized'](image)
        assert own.shape == shape and abs(own.mean() - image.mean()) < 2


def test_each_network_has_its_own_maps_group_by_group():
    networks, image = [network_of(0, 5), network_of(9, 3, 6)], np.zeros((8, 8, 3), np.uint8)
    figure = visualize.draw_maps(networks, [[image] * 2] * 2, [None] * 2, ['', ''], [], OPT)
    drawn = [int(ax.images[1].get_array().argmax()) for ax in figure.axes if len(ax.images) > 1]
    assert drawn == [0, 5, 9, 3, 6] * 2


@pytest.mark.parametrize('own, expected', [
    ([], '✓ dog'), (['cat', 'dog'], '✓ dog'), (['cow', 'pig'], 'pig'), (['x', 'y', 'z'], 'y')])
def test_a_prediction_is_right_or_wrong_only_among_the_same_classes(own, expected):
    network, image = network_of(0, classes=own), np.zeros((8, 8, 3), np.uint8)
    figure = visualize.draw_maps([network], [[image]], [1], ['dog'], ['cat', 'dog'], OPT)
    assert figure.axes[-1].get_xlabel() == expected


def test_curves(work):
    """Median, least and greatest of three seeds at epochs 1, 2, 3 that all have tested."""
    for seed, errors in enumerate([[60, 50, 40], [80, 40, 30], [70, 45, 20, 10]]):
        fake_log(f'a_seed{seed}', errors, epochs=4)
    fake_log('b_seed0', [None, 55, None], epochs=4)  # not tested in its last epoch
    figure = visualize.draw_curves(['a_seed0', 'a_seed1', 'b_seed0', 'a_seed2', 'none'])
    ax, = figure.axes
    tests = [line for line in ax.lines if line.get_linestyle() == '-']
    assert [line.get_label() for line in tests] == ['a', 'b']
    assert tests[0].get_xydata().tolist() == [[1, 70], [2, 45], [3, 30]]
    assert tests[1].get_xydata().tolist() == [[2, 55]]
    band = ax.collections[0].get_paths()[0].vertices
    assert {*map(tuple, band)} == {(1, 60), (1, 80), (2, 40), (2, 50), (3, 20), (3, 40)}
    fake_log('other/a_seed0', [50, 40])  # another experiment
    ax, = visualize.draw_curves(['a_seed0', 'other/a_seed0']).axes
    assert [line.get_label() for line in ax.lines[1::2]] == ['a', 'other/a']
    for name, start in (('curves.svg', b'<?xml'), ('curves.pdf', b'%PDF')):
        visualize.main(['a_seed0', 'a_seed1', '--curves', '--output', name])
        assert Path(name).read_bytes().startswith(start)


def test_wrong_options_and_files(work, refused):
    save('run', 'wrn', depth=10, width=.25)
    Path('text.png').write_text('text')
    for argv, word in (
            (['run'], 'either'),
            (['run', '--images', 'a.png', '--dataset', 'ClutteredDigits'], 'either'),
            (['run', '--images', 'text.png', '--output', 'a.jpg'], '.png, .svg or .pdf'),
            (['run', '--images', 'text.png'], 'text.png: not an image'),
            (['nothing', '--images', 'text.png'], 'no checkpoint nothing'),
            (['run', '--dataset', 'ClutteredDigits', '--index', '360'], 'are 360 test images'),
            (['run', '--dataset', 'ClutteredDigits', '--index', ''], 'are 360 test images'),
            (['run', '--curves'], 'run: no log.txt')):
        refused(visualize.main, argv, word)
    assert not Path('attention.png').exists()
