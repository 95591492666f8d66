"""Attention pictures: where a map peaks, the picture peaks; what is written in it is true."""
import base64
from pathlib import Path
from xml.etree import ElementTree

import cv2
import matplotlib
import numpy as np
import pytest
import torch

import visualize
from resnet import imagenet_resnet, wide_resnet
from utils import load_teacher

SVG = '{http://www.w3.org/2000/svg}'


@pytest.fixture
def networks(work):
    """A small run of each kind; zero input, zero activations: no biases but the classifier's."""
    save('small', wide_resnet(10, 0.25, 3)[1])
    save('large', imagenet_resnet(18, 0.125, 3)[1])
    return work


def save(name, params, always=None):
    """A run of these parameters; one that predicts the class `always`, if one is given."""
    if always is not None:
        params['fc.bias'].data[always] = 1e4
    Path(name).mkdir()
    torch.save({'params': params}, f'{name}/model.pt7')


def corner_image(path, size, colour, at, patch):
    """An image of one colour, with noise in corner 0, 1 (top), 2 or 3 (bottom)."""
    image = np.empty((size, size, 3), np.uint8)
    image[:] = colour
    y, x = (size - patch) * (at // 2), (size - patch) * (at % 2)
    image[y:y + patch, x:x + patch] = np.random.default_rng(0).integers(0, 256, (patch, patch, 3))
    cv2.imwrite(path, image[..., ::-1])


def draw(*argv):
    """The picture's size in inches, its texts, and its images (H, W, RGBA), the scale's last."""
    visualize.main([*argv, '--output', 'maps.svg'])
    root = ElementTree.parse('maps.svg').getroot()
    images = []
    for image in root.iter(f'{SVG}image'):
        data, = (value for name, value in image.items() if name.endswith('href'))
        png = np.frombuffer(base64.b64decode(data.partition(',')[2]), np.uint8)
        pixels = cv2.imdecode(png, cv2.IMREAD_UNCHANGED)
        images.append(cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA)[::-1])
    size = [float(root.get(side).removesuffix('pt')) / 72 for side in ('width', 'height')]
    return size, [text.text for text in root.iter(f'{SVG}text')], images


def heat(image, colourmap):
    """The values 0 to 255 that the colours stand for."""
    table = matplotlib.colormaps[colourmap](np.arange(256), bytes=True)
    colours, pixels = (rgba[..., :3] @ [1, 256, 256 ** 2] for rgba in (table, image))
    order = np.argsort(colours)
    values = order[np.searchsorted(colours[order], pixels)]
    assert np.array_equal(colours[values], pixels)
    return values


def quarter(values):
    """The corner, 0 to 3, with the greatest mean."""
    h, w = (n // 2 for n in values.shape)
    return int(np.argmax([values[y:y + h, x:x + w].mean() for y in (0, h) for x in (0, w)]))


@pytest.mark.parametrize('kind, n', [('activation', 3), ('gradient', 1)])
@pytest.mark.parametrize('colourmap', ['jet', 'viridis'])
def test_maps_peak_where_the_image_is_not_blank(networks, kind, n, colourmap):
    grey = np.round(visualize.CIFAR_MEAN)
    for at in range(4):
        corner_image(f'{at}.png', 32, grey, at, 8)
    _, texts, images = draw('small', '--images', *(f'{at}.png' for at in range(4)), '--kind', kind,
                            '--opacity', '1', '--colourmap', colourmap)
    assert len(images) == 4 + 4 * n * 2 + 1  # plain; each map over a plain one; the scale's bar
    for at in range(4):
        opposite = -5 if at < 2 else 5
        assert np.abs(images[at][opposite, 100, :3] - grey).max() <= 1
        for values in (heat(im, colourmap) for im in images[4 + 2 * n * at:][1:2 * n:2]):
            assert values.max() > 230 and values.min() < 10  # the peak lies between two pixels
            if kind == 'activation':
                assert quarter(values) == at
            else:  # of 1024 pixels some 10 are above the 99th percentile
                assert 0.002 < (values == 255).mean() < 0.02
    assert ('each map: 0' if kind == 'gradient' else 'each map: minimum') in texts
    bar = images[-1][5].astype(int)
    colours = matplotlib.colormaps[colourmap](np.linspace(0, 1, len(bar)), bytes=True)
    assert np.abs(bar - colours).max() < 10


def test_imagenet_networks_and_several_runs_side_by_side(networks):
    corner_image('0.png', 256, [round(255 * m) for m in (0.485, 0.456, 0.406)], 3, 90)
    _, texts, images = draw('large', 'small', 'small/model.pt7', '--images', '0.png', '--opacity',
                            '1')
    assert len(images) == 1 + 2 * (4 + 3 + 3) + 1
    for image in images[2:8:2]:
        assert quarter(heat(image, 'jet')) == 3
    assert not np.array_equal(images[2], images[10])
    assert {'large', 'ResNet-18-0.125', 'small', 'small/model.pt7', 'WRN-10-0.25',
            'group 3'} <= set(texts)


def test_power_mapping_and_opacity(networks):
    corner_image('0.png', 32, (0, 0, 0), 0, 16)
    default, peak, largest, clear = (
        draw('small', '--images', '0.png', *argv)[2]
        for argv in ((), ('--power', '4'), ('--mapping', 'max'), ('--opacity', '0')))
    assert (default[2] != peak[2]).any() and (default[2] != largest[2]).any()
    assert set(np.unique(default[2][..., 3])) <= {127, 128} and not clear[2][..., 3].any()


def test_images_of_a_data_set_with_their_classes_and_those_predicted(networks):
    save('2 always', wide_resnet(10, 0.25, 3)[1], always=2)
    save('of 4', wide_resnet(10, 0.25, 4)[1], always=3)
    for root in ('train', 'test'):  # three classes of folders, in this order
        for old, new in zip('012', ('a $\\frac{$', 'b\x07', 'c\udcff'), strict=True):
            Path('images', root, old).rename(Path('images', root, new))
    _, texts, images = draw('2 always', 'of 4', '--dataset', 'folder', '--dataroot', 'images',
                            '--index', '20,0,7')
    text = iter(texts)  # each is looked for after the one before it
    for expected in ('c\\udcff', 'image', 'a $\\frac{$', 'b\\x07', '2 always', '✓ c\\udcff',
                     '✗ c\\udcff', '✗ c\\udcff', 'of 4', 'class 3', 'class 3', 'class 3'):
        assert expected in text
    last = np.fromfile(sorted(Path('images/test/c\udcff').iterdir())[-1], np.uint8)
    last = cv2.imdecode(last, cv2.IMREAD_COLOR_RGB)
    middles = ((np.arange(16) + 0.5) * len(images[0]) / 16).astype(int)
    assert len(images[0]) > 100 and np.array_equal(images[0][middles][:, middles, :3], last)


def test_digits_are_called_by_their_digit(networks):
    save('7 always', wide_resnet(10, 0.25, 10)[1], always=7)
    _, texts, _ = draw('7 always', '--dataset', 'Digits', '--index', '0')
    label = texts[0]
    assert label in '0123456789' and ('✓ 7' if label == '7' else '✗ 7') in texts


def test_long_names_are_cut_in_the_middle(networks):
    name = 'n01234567 ' + 'a $x_1^2$ long name ' * 6 + 'seed0'
    Path('small').rename(name)
    corner_image(f'{name}.png', 32, (0, 0, 0), 0, 16)
    _, texts, _ = draw(name, '--images', f'{name}.png')
    stem, run = texts[0], texts[2]
    assert len(stem) < len(run) < len(name)
    for text in (stem, run):
        first, last = text.split('…')
        assert name.startswith(first) and name.endswith(last) and 0 <= len(first) - len(last) < 2


def test_a_picture_is_as_wide_as_a_page_unless_images_would_be_tiny(networks):
    corner_image('0.png', 32, (0, 0, 0), 0, 16)
    save('other', wide_resnet(10, 0.25, 3)[1])
    argv = ['small', 'other', 'small/model.pt7', 'other/model.pt7', './small']
    for runs, options, expected in ((2, (), 7.2), (1, (), 5), (5, (), 11),
                                    (1, ('--kind', 'gradient'), 3.5)):
        width, height = draw(*argv[:runs], '--images', '0.png', *options)[0]
        assert abs(width - expected) < (0.01 if expected in (3.5, 7.2) else 0.5)
        assert 1.3 < height < 2.5


@pytest.mark.parametrize('suffix, start', [('png', b'\x89PNG'), ('svg', b'<?xml'),
                                           ('pdf', b'%PDF')])
def test_each_kind_of_file_is_the_same_each_time(networks, suffix, start):
    corner_image('0.png', 32, (0, 0, 0), 0, 16)
    for name in 'ab':
        visualize.main(['small', '--images', '0.png', '--kind', 'gradient', '--output',
                        f'{name}.{suffix}'])
    content = Path(f'a.{suffix}').read_bytes()
    assert content.startswith(start) and content == Path(f'b.{suffix}').read_bytes()
    if suffix == 'png':
        assert cv2.imread('a.png').shape[1] == 3.5 * 300
    assert suffix != 'pdf' or b'DejaVuSans' in content  # a font: text is not drawn as curves


def test_the_data_sets_own_class_is_explained(networks):
    """The gradient is of the loss of the image's class, not of the predicted one."""
    opt = visualize.make_parser().parse_args(['small', '--dataset', 'folder', '--dataroot',
                                              'images', '--kind', 'gradient', '--index', '0'])
    network, ((seen,), names) = load_teacher('small'), visualize.from_data_set(opt)
    x = seen[1].clone().requires_grad_()
    logits = network.f(x, network.params, False)[0]
    J, = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, torch.tensor([0])), x)
    expected = J[0].square().sum(0)
    found = torch.from_numpy(visualize.maps_of(network, seen, names, opt)[1]['gradient'])
    torch.testing.assert_close(found, expected / expected.norm(), rtol=1e-3, atol=1e-5)
