"""The networks: names, sizes, initialisation; outputs as by plain formulas and by torchvision."""
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import close, draw, shaken

import weights
from resnet import STATISTICS, freeze, imagenet_resnet, trainable, wide_resnet
from resnet import network_in_network as nin


def count(params):
    return sum(p.numel() for p in trainable(params).values())


@pytest.mark.parametrize('network, number', [
    (wide_resnet(16, 1), 175_066), (wide_resnet(16, 2), 691_674), (wide_resnet(40, 1), 563_930),
    (wide_resnet(40, 2), 2_243_546), (nin(1), 1_005_642), (nin(0.5), 256_298),
    (nin(0.5, batch_norm=False), 256_298 - 800)])  # of 800 channels: a bias, not weight and bias
def test_published_sizes(network, number):
    assert count(network[1]) == number


@pytest.mark.parametrize('network, stem, size, expected', [
    (wide_resnet(10, 2), 16, (20, 28), [(32, 20, 28), (64, 10, 14), (128, 5, 7)]),
    (wide_resnet(10, 0.5), 16, (8, 8), [(8, 8, 8), (16, 4, 4), (32, 2, 2)]),
    (nin(0.25), 48, (20, 28), [(24, 20, 28), (48, 10, 14), (48, 5, 7)]),
    (imagenet_resnet(18, 0.125), 64, (64, 96),
     [(8, 16, 24), (16, 8, 12), (32, 4, 6), (64, 2, 3)])])
def test_shapes_of_groups_and_a_prefix_of_names(network, stem, size, expected):
    (f, params), x = network, draw(2, 3, *size, dtype=torch.float)
    logits, groups = f(x, params, False)
    assert len(next(iter(params.values()))) == stem
    assert [group.shape[1:] for group in groups] == expected
    prefixed = {f'student.{name}': p for name, p in params.items()}
    assert torch.equal(f(x, prefixed, False, 'student.')[0], logits)


def test_initialisation():
    params = wide_resnet(16, 2)[1]
    for name, p in params.items():
        if p.dim() > 1:
            assert p.std().item() == pytest.approx((2 / p[0].numel()) ** 0.5, rel=0.15), name
        elif not name.endswith('.weight'):
            assert (p == name.endswith('running_var')).all(), name
        assert p.requires_grad != name.endswith(STATISTICS)
    gamma = torch.cat([p for k, p in params.items() if k.endswith('.weight') and p.dim() == 1])
    assert 0 <= gamma.min() < 0.05 and 0.95 < gamma.max() < 1


def test_initialisation_is_from_the_seed_alone():
    for build in (wide_resnet, nin, imagenet_resnet):
        state, params = torch.get_rng_state(), build(width=0.25, seed=3)[1]
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        again, other = (build(width=0.25, seed=seed)[1] for seed in (3, 4))
        assert all(torch.equal(params[name], again[name]) for name in params)
        assert not any(torch.equal(p, other[name]) for name, p in params.items() if p.dim() > 1)


def plain_bn(x, p, name, training):
    """Batch norm by its formula; the identity where the network has none."""
    if f'{name}.weight' not in p:
        return x
    mean, var = (p[f'{name}.{part}'] for part in STATISTICS)
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    scale = p[f'{name}.weight'] / (var + 1e-5).sqrt()
    return (x - mean[:, None, None]) * scale[:, None, None] + p[f'{name}.bias'][:, None, None]


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
    groups = []
    for g, padding in enumerate((2, 2, 1)):
        for b in range(3):
            name = f'group{g}.conv{b}'
            w, bias = p.get(name, p.get(f'{name}.weight')), p.get(f'{name}.bias')
            x = plain_bn(F.conv2d(x, w, bias, padding=0 if b else padding), p,
                         f'group{g}.bn{b}', training)
            x = x.relu() if pool_relu or b < 2 else x
        groups.append(x)
        x = F.avg_pool2d(x, 8) if g == 2 else \
            (F.avg_pool2d if g else F.max_pool2d)(x, 3, 2, ceil_mode=True)
    return x.flatten(1) @ p['fc.weight'].T + p['fc.bias'], groups


@pytest.mark.parametrize('depth, width', [(10, 1), (16, 0.4)])
def test_wide_resnet_is_as_in_the_paper(depth, width):
    (f, params), x = shaken(wide_resnet(depth, width, 7)), draw(4, 3, 12, 16, dtype=torch.float)
    for training in (False, True):
        close(f(x, params, training), plain_wrn(x, params, (depth - 4) // 6, training))


@pytest.mark.parametrize('batch_norm', [True, False])
@pytest.mark.parametrize('pool_relu', [True, False])
def test_nin_with_and_without_batch_norm_and_relu_before_pooling(batch_norm, pool_relu):
    f, params = shaken(nin(0.1, 7, 3, batch_norm, pool_relu))
    x = draw(3, 3, 32, 32, dtype=torch.float)
    assert ('group0.bn0.weight' in params) == ('group0.conv0.bias' not in params) == batch_norm
    for training in (False, True):
        ours = f(x, params, training)
        close(ours, plain_nin(x, params, training, pool_relu))
        assert all((group >= 0).all() == pool_relu for group in ours[1])


@pytest.mark.parametrize('depth', [18, 34])
def test_imagenet_resnet_equals_torchvisions(depth):
    """Size, outputs, running statistics and gradients, with the same weights."""
    module = getattr(torchvision.models, f'resnet{depth}')(num_classes=7)
    f, params = shaken(imagenet_resnet(depth, num_classes=7))
    assert count(params) == sum(p.numel() for p in module.parameters())
    theirs = weights.rename(module.state_dict())
    assert theirs.keys() == params.keys()
    with torch.no_grad():
        for name, p in params.items():
            assert theirs[name].shape == p.shape
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


def test_frozen_parts():
    f, params = shaken(imagenet_resnet(18, 0.0625, 3))
    before = {name: p.clone() for name, p in params.items()}
    x, fixed = draw(2, 3, 64, 64, dtype=torch.float), freeze(params, 0, batch_norm=True)
    close(f(x, fixed, True), f(x, fixed, False))  # batch norm uses its statistics and keeps them
    assert all(torch.equal(before[name], fixed[name]) for name in params)
    assert trainable(fixed).keys() == {name for name in params if '.bn' not in f'.{name}'}
    early = trainable(params).keys() - trainable(freeze(params, 2, batch_norm=False)).keys()
    assert early == {name for name in trainable(params)
                     if name.startswith(('conv0', 'bn0', 'group0', 'group1'))}
