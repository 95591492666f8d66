"""Attention pictures: where a map peaks, the picture peaks."""
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import visualize
from resnet import imagenet_resnet, wide_resnet
from visualize import GAP, LINE

CELL = 64


@pytest.fixture
def networks(work):
    """A small run of each kind; zero input, zero activations: they have no biases but the classifier's."""
    for name, (_, params) in (('small', wide_resnet(10, 0.25, 3)), ('large', imagenet_resnet(18, 0.125, 3))):
        Path(name).mkdir()
        torch.save({'params': params}, f'{name}/model.pt7')
    return work


def corner_image(path, size, colour, at, patch):
    """An image of one colour but for noise in a corner: 0 top left, 1 top right, 2 bottom left, 3 bottom right."""
    image = np.empty((size, size, 3), np.uint8)
    image[:] = colour
    y, x = (size - patch) * (at // 2), (size - patch) * (at % 2)
    image[y:y + patch, x:x + patch] = np.random.default_rng(0).integers(0, 256, (patch, patch, 3))
    cv2.imwrite(path, image[..., ::-1])


def cells(path, rows, columns):
    """The pictures in the picture: [row][column]."""
    picture = cv2.imread(path)
    assert len(picture) == 2 * LINE + rows * (CELL + LINE)
    assert picture.shape[1] >= columns * (CELL + GAP)  # the last column may be wider, for the network's name
    return [[picture[2 * LINE + r * (CELL + LINE):][:CELL, c * (CELL + GAP):][:, :CELL] for c in range(columns)]
            for r in range(rows)]


def heat(cell, colourmap):
    """The values 0 to 255 that the colours stand for."""
    table = cv2.applyColorMap(np.arange(256, dtype=np.uint8), colourmap).reshape(256, 3).astype(int)
    return np.abs(cell[:, :, None].astype(int) - table).sum(-1).argmin(-1)


def quarter(values):
    """The corner, 0 to 3, with the greatest mean."""
    h, w = values.shape
    return int(np.argmax([values[y:y + h // 2, x:x + w // 2].mean() for y in (0, h // 2) for x in (0, w // 2)]))


@pytest.mark.parametrize('kind, columns', [('activation', 4), ('gradient', 2)])
@pytest.mark.parametrize('colourmap', ['jet', 'viridis'])
def test_maps_peak_where_the_image_is_not_blank(networks, kind, columns, colourmap):
    for at in range(4):
        corner_image(f'{at}.png', 32, np.round(visualize.CIFAR_MEAN), at, 8)
    visualize.main(['small', '--images', *(f'{at}.png' for at in range(4)), '--kind', kind, '--opacity', '1', '--cell',
                    str(CELL), '--colourmap', colourmap, '--output', 'maps.png'])
    for at, row in enumerate(cells('maps.png', 4, columns)):
        assert abs(row[0][CELL - 1 - (at // 2) * (CELL - 1), CELL // 2].astype(int)
                   - np.round(visualize.CIFAR_MEAN)[::-1]).max() <= 1  # the image itself, not coloured
        for cell in row[1:]:
            values = heat(cell, visualize.COLOURMAPS[colourmap])
            assert values.max() > 150 and values.min() < 10  # the greatest value lies between two pixels
            if kind == 'activation':
                assert quarter(values) == at


def test_imagenet_networks_and_several_runs_side_by_side(networks):
    mean = [round(255 * m) for m in (0.485, 0.456, 0.406)]
    corner_image('0.png', 256, mean, 3, 90)
    visualize.main(['large', 'small', '--images', '0.png', '--opacity', '1', '--cell', str(CELL), '--output',
                    'maps.png'])
    row, = cells('maps.png', 1, 1 + 4 + 3)
    for cell in row[1:4]:
        assert quarter(heat(cell, cv2.COLORMAP_JET)) == 3
    assert not np.array_equal(row[1], row[5])


def test_power_mapping_and_opacity(networks):
    corner_image('0.png', 32, (0, 0, 0), 0, 16)

    def picture(*argv):
        visualize.main(['small', '--images', '0.png', '--cell', str(CELL), '--output', 'x.png', *argv])
        return cv2.imread('x.png').astype(int)
    default = picture()
    assert (default != picture('--power', '4')).any() and (default != picture('--mapping', 'max')).any()
    clear = picture('--opacity', '0')[2 * LINE:2 * LINE + CELL]
    assert np.array_equal(clear[:, :CELL], clear[:, CELL + GAP:][:, :CELL])  # nothing laid over it


def test_images_of_a_data_set(networks, capsys):
    argv = ['small', '--dataset', 'folder', '--dataroot', 'images', '--cell', str(CELL), '--opacity', '0']
    visualize.main([*argv, '--index', '20,0'])
    assert '2 images, 1 networks' in capsys.readouterr().out
    last = cv2.imread(str(sorted(Path('images/test/2').iterdir())[-1]))
    shown = cells('attention.png', 2, 4)[0][0]
    assert np.array_equal(shown, cv2.resize(last, (CELL, CELL), interpolation=cv2.INTER_NEAREST))


def test_the_data_sets_own_class_is_explained(networks):
    """The gradient is of the loss of the image's class, not of the predicted one."""
    opt = visualize.make_parser().parse_args(['small', '--dataset', 'folder', '--dataroot', 'images', '--kind',
                                              'gradient', '--index', '0'])
    network, (shown, *_) = visualize.load_teacher('small'), visualize.from_data_set(opt).values()
    x = shown.x.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(network.f(x, network.params, False)[0], torch.tensor([0]))
    J, = torch.autograd.grad(loss, x)
    expected = J[0].square().sum(0)
    found = torch.from_numpy(visualize.maps_of(network, shown, opt)['gradient'])
    torch.testing.assert_close(found, expected / expected.norm(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('argv, text', [
    (['small'], '--images'), (['small', '--images', '0.png', '--dataset', 'Digits'], '--images'),
    (['nothing', '--images', '0.png'], 'no checkpoint nothing'),
    (['small', '--images', 'no.png'], 'no.png: not an image'),
    (['small', '--images', '0.png', '--output', 'x.jpg'], '--output x.jpg'),
    (['small', '--images', '0.png', '--output', 'no/x.png'], '--output no/x.png'),
    (['small', '--dataset', 'folder', '--dataroot', 'images', '--index', '21'], '--index 21: there are 21 test images'),
    (['large', '--dataset', 'folder', '--dataroot', 'images'], 'large: an ImageNet network'),
    (['small', '--images', '0.png', '--power', '0.5'], '--power'), (['small', '--images', 'thin.png'], 'too long'),
    (['small', '--images', '0.png', '--index', '1'], '--index is for --dataset'),
    (['small', '--dataset', 'Digits', '--image_size', '64'], '--image_size is for')])
def test_bad_input(networks, refused, argv, text):
    corner_image('0.png', 32, (0, 0, 0), 0, 16)
    cv2.imwrite('thin.png', np.zeros((1, 60000), np.uint8))
    refused(visualize.main, argv, text)
    assert not Path('attention.png').exists()
