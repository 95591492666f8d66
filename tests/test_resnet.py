"""The functional networks: names, sizes, initialisation; outputs as plain formulas or torchvision."""
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import draw

import weights
from resnet import (
    STATISTICS,
    InputError,
    freeze,
    imagenet_resnet,
    network_in_network,
    trainable,
    wide_resnet,
)
from utils import new_network


def count(params):
    return sum(p.numel() for p in trainable(params).values())


def shapes(params):
    return {name: tuple(p.shape) for name, p in params.items()}


def close(ours, expected):
    """Compares logits and groups."""
    for a, b in zip((ours[0], *ours[1]), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def plain_bn(x, p, name, training):
    """Batch norm by its formula; the identity where the network has none."""
    if f'{name}.weight' not in p:
        return x
    mean, var = (p[f'{name}.{part}'] for part in STATISTICS)
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    scale = p[f'{name}.weight'] / (var + 1e-5).sqrt()
    return (x - mean[:, None, None]) * scale[:, None, None] + p[f'{name}.bias'][:, None, None]


def with_statistics(params, seed=0):
    """The same, with running statistics and biases that are not those of the start."""
    for i, (name, p) in enumerate(params.items()):
        if p.dim() == 1 and not name.endswith('.weight'):
            p.data.copy_(draw(len(p), seed=seed + i, dtype=torch.float).abs() + 0.3)
    return params


# ------------------------------------------------------------------ sizes and names

@pytest.mark.parametrize('depth, width, number', [
    (16, 1, 175_066), (16, 2, 691_674), (40, 1, 563_930), (40, 2, 2_243_546)])
def test_sizes_of_wide_resnets(depth, width, number):
    assert count(wide_resnet(depth, width)[1]) == number


@pytest.mark.parametrize('width, batch_norm, number', [
    (1, True, 1_005_642), (0.5, True, 256_298),
    (0.5, False, 256_298 - 800)])  # a bias a channel in place of weight and bias; 800 channels
def test_sizes_of_nin(width, batch_norm, number):
    assert count(network_in_network(width, batch_norm=batch_norm)[1]) == number


def test_names_and_shapes_of_a_wide_resnet():
    expected = {'conv0': (16, 3, 3, 3), 'fc.weight': (10, 128), 'fc.bias': (10,)}
    norms = {'bn': 128}
    for g, (before, out) in enumerate(((16, 32), (32, 64), (64, 128))):
        for b in range(2):
            block, channels = f'group{g}.block{b}', out if b else before
            expected |= {f'{block}.conv0': (out, channels, 3, 3),
                         f'{block}.conv1': (out, out, 3, 3)}
            norms |= {f'{block}.bn0': channels, f'{block}.bn1': out}
        expected[f'group{g}.block0.convdim'] = (out, before, 1, 1)
    expected |= {f'{name}.{part}': (size,) for name, size in norms.items()
                 for part in ('weight', 'bias', 'running_mean', 'running_var')}
    assert shapes(wide_resnet(16, 2)[1]) == expected
    assert 'group0.block0.convdim' not in wide_resnet(16, 1)[1]  # 16 channels in and out
    assert wide_resnet(16, 0.5)[1]['conv0'].shape == (16, 3, 3, 3)


def test_names_and_groups_of_imagenet_resnets():
    f, params = imagenet_resnet(34, 0.125, 5)
    expected = shapes(params)
    assert expected['conv0'] == (64, 3, 7, 7) and expected['bn0.weight'] == (64,)
    for g, (blocks, out) in enumerate(zip((3, 4, 6, 3), (8, 16, 32, 64), strict=True)):
        assert expected[f'group{g}.block0.convdim'][0] == out
        assert expected[f'group{g}.block0.bndim.running_var'] == (out,)
        assert expected[f'group{g}.block{blocks - 1}.conv1'] == (out, out, 3, 3)
        assert f'group{g}.block{blocks}.conv0' not in expected
        assert f'group{g}.block1.convdim' not in expected
    assert 'group0.block0.convdim' not in imagenet_resnet(18, 1, 5)[1]  # 64 channels in and out
    _, groups = f(torch.zeros(1, 3, 64, 96), params, False)
    assert [g.shape[1:] for g in groups] == [(8, 16, 24), (16, 8, 12), (32, 4, 6), (64, 2, 3)]


@pytest.mark.parametrize('f, shapes', [
    (wide_resnet(10, 2), [(32, 20, 28), (64, 10, 14), (128, 5, 7)]),
    (network_in_network(0.25), [(24, 20, 28), (48, 10, 14), (48, 5, 7)])])
def test_groups_at_any_image_size(f, shapes):
    logits, groups = f[0](torch.zeros(2, 3, 20, 28), f[1], False)
    assert logits.shape == (2, 10) and [g.shape[1:] for g in groups] == shapes


@pytest.mark.parametrize('net, settings, text', [
    ('wrn', {'depth': 17}, 'depth 17: .*6n.4'), ('wrn', {'depth': 4}, 'depth 4'),
    ('wrn', {'width': 0.05}, 'no channels'), ('nin', {'width': 0.01}, 'no channels'),
    ('resnet', {'depth': 50}, 'depth 50: .*18 or 34'), ('resnet', {'width': 0.01}, 'no channels')])
def test_networks_that_cannot_be(net, settings, text):
    with pytest.raises(InputError, match=text):
        new_network(net, settings, 10)


# ------------------------------------------------------------------ initialisation

def test_initialisation():
    params = wide_resnet(16, 2)[1]
    for name, p in params.items():
        if p.dim() > 1:
            fan_in = p[0].numel()
            assert p.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.15), name
        elif name.endswith('running_var'):
            assert (p == 1).all()
        elif not name.endswith('.weight'):
            assert not p.any(), name
        assert p.requires_grad != name.endswith(STATISTICS)
    gamma = torch.cat([p for k, p in params.items() if k.endswith('.weight') and p.dim() == 1])
    assert 0 <= gamma.min() < 0.05 and 0.95 < gamma.max() < 1
    assert gamma.mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize('build', [wide_resnet, network_in_network, imagenet_resnet])
def test_initialisation_is_from_the_seed_alone(build):
    torch.manual_seed(1)
    state, params = torch.get_rng_state(), build(width=0.25, seed=3)[1]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = (build(width=0.25, seed=seed)[1] for seed in (3, 4))
    assert all(torch.equal(params[name], again[name]) for name in params)
    assert all(not torch.equal(params[name], other[name]) for name in params
               if params[name].dim() > 1)


# ------------------------------------------------------------------ outputs

def plain_wrn(x, p, n, training):
    """A pre-activation Wide ResNet, written from the paper's figure."""
    x, groups = F.conv2d(x, p['conv0'], padding=1), []
    for g in range(3):
        for b in range(n):
            block, stride = f'group{g}.block{b}', 2 if g and not b else 1
            o = plain_bn(x, p, f'{block}.bn0', training).relu()
            y = F.conv2d(o, p[f'{block}.conv0'], stride=stride, padding=1)
            y = plain_bn(y, p, f'{block}.bn1', training).relu()
            y = F.conv2d(y, p[f'{block}.conv1'], padding=1)
            convdim = p.get(f'{block}.convdim')
            x = y + (x if convdim is None else F.conv2d(o, convdim, stride=stride))
        groups.append(x)
    x = plain_bn(x, p, 'bn', training).relu().mean((2, 3))
    return x @ p['fc.weight'].T + p['fc.bias'], groups


def plain_nin(x, p, training, pool_relu):
    """Network-in-Network for 32×32 images, as the design lists its layers."""
    pool, groups = (lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
                    lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True),
                    lambda x: F.avg_pool2d(x, 8)), []
    for g, padding in enumerate((2, 2, 1)):
        for b in range(3):
            name = f'group{g}.conv{b}'
            w, bias = p.get(name, p.get(f'{name}.weight')), p.get(f'{name}.bias')
            x = F.conv2d(x, w, bias, padding=0 if b else padding)
            x = plain_bn(x, p, f'group{g}.bn{b}', training)
            x = x.relu() if pool_relu or b < 2 else x
        groups.append(x)
        x = pool[g](x)
    return x.flatten(1) @ p['fc.weight'].T + p['fc.bias'], groups


@pytest.mark.parametrize('depth, width', [(10, 1), (16, 0.4)])
def test_wide_resnet_is_as_in_the_paper(depth, width):
    f, params = wide_resnet(depth, width, 7, seed=3)
    x, params = draw(4, 3, 12, 16, dtype=torch.float), with_statistics(params)
    for training in (False, True):  # the second changes the running statistics
        close(f(x, params, training), plain_wrn(x, params, (depth - 4) // 6, training))


@pytest.mark.parametrize('batch_norm', [True, False])
@pytest.mark.parametrize('pool_relu', [True, False])
def test_nin_with_and_without_batch_norm_and_relu_before_pooling(batch_norm, pool_relu):
    f, params = network_in_network(0.1, 7, 3, batch_norm, pool_relu)
    x, params = draw(3, 3, 32, 32, dtype=torch.float), with_statistics(params)
    assert any('.bn' in name for name in params) == batch_norm
    assert any(name.endswith('conv0.bias') for name in params) != batch_norm
    for training in (False, True):
        ours = f(x, params, training)
        close(ours, plain_nin(x, params, training, pool_relu))
        assert all((group >= 0).all() == pool_relu for group in ours[1])


@pytest.mark.parametrize('depth', [18, 34])
def test_imagenet_resnet_equals_torchvisions(depth):
    """Size, outputs, running statistics and gradients, with the same weights."""
    module = getattr(torchvision.models, f'resnet{depth}')(num_classes=7)
    f, params = imagenet_resnet(depth, num_classes=7)
    assert count(params) == sum(p.numel() for p in module.parameters())
    theirs = weights.rename(module.state_dict())
    assert shapes(theirs) == shapes(params)
    with torch.no_grad():
        for name, p in with_statistics(params).items():
            theirs[name].copy_(p)  # which is the module's own
    x = draw(2, 3, 64, 64, dtype=torch.float)
    for training in (False, True):
        ours, expected = f(x, params, training)[0], module.train(training)(x)
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    ours.square().mean().backward()
    expected.square().mean().backward()
    torch.testing.assert_close(params['group1.block0.bndim.running_var'],
                               module.layer2[0].downsample[1].running_var)
    torch.testing.assert_close(params['group3.block1.conv0'].grad,
                               module.layer4[1].conv1.weight.grad, rtol=1e-3, atol=1e-3)


def test_base_is_a_prefix_of_all_names():
    for (f, params), size in ((wide_resnet(10, 0.25), 8), (network_in_network(0.05), 8),
                              (imagenet_resnet(18, 0.03), 32)):
        x = draw(2, 3, size, size, dtype=torch.float)
        prefixed = {f'student.{name}': p for name, p in params.items()}
        assert torch.equal(f(x, prefixed, False, 'student.')[0], f(x, params, False)[0])


# ------------------------------------------------------------------ frozen parts

def test_frozen_batch_norm_uses_its_statistics_and_keeps_them():
    f, params = imagenet_resnet(18, 0.0625, 3)
    params = freeze(with_statistics(params), 0, batch_norm=True)
    before = {name: p.clone() for name, p in params.items()}
    x = draw(2, 3, 64, 64, dtype=torch.float)
    close(f(x, params, True), f(x, params, False))
    assert all(torch.equal(before[name], params[name]) for name in params)
    assert {name for name in trainable(params) if name.rpartition('.')[2] in ('weight', 'bias')} \
        == {'fc.weight', 'fc.bias'}  # convolutions have bare names
    assert 'conv0' in trainable(params)


def test_frozen_groups():
    params = imagenet_resnet(18, 0.0625, 3)[1]
    frozen = {name for name, p in freeze(params, 2, batch_norm=False).items()
              if not p.requires_grad and not name.endswith(STATISTICS)}
    assert frozen == {name for name in params if not name.endswith(STATISTICS)
                      and name.startswith(('conv0', 'bn0', 'group0', 'group1'))}
    assert trainable(freeze(params, 0, False)).keys() == trainable(params).keys()
