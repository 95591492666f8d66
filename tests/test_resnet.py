"""The functional networks against the same networks in torch.nn, and their parameters."""
import pytest
import torch
from torch import nn

from resnet import STATISTICS, trainable, wide_resnet
from weights import fold_batch_norm, new_model


class Block(nn.Module):
    def __init__(self, ni, no, stride):
        super().__init__()
        self.bn0, self.bn1 = nn.BatchNorm2d(ni), nn.BatchNorm2d(no)
        self.conv0 = nn.Conv2d(ni, no, 3, stride, 1, bias=False)
        self.conv1 = nn.Conv2d(no, no, 3, 1, 1, bias=False)
        self.convdim = nn.Conv2d(ni, no, 1, stride, bias=False) if ni != no else None

    def forward(self, x):
        o = torch.relu(self.bn0(x))
        y = self.conv1(torch.relu(self.bn1(self.conv0(o))))
        return y + (x if self.convdim is None else self.convdim(o))


class Reference(nn.Module):
    """A pre-activation Wide ResNet, written from the paper's figure."""

    def __init__(self, n, width, classes):
        super().__init__()
        self.conv0 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        channels = [16, *(int(c * width) for c in (16, 32, 64))]
        for g in range(3):
            blocks = nn.Module()
            for b in range(n):
                ni = channels[g] if b == 0 else channels[g + 1]
                blocks.add_module(f'block{b}', Block(ni, channels[g + 1], 2 if g and not b else 1))
            self.add_module(f'group{g}', blocks)
        self.bn, self.fc = nn.BatchNorm2d(channels[3]), nn.Linear(channels[3], classes)

    def forward(self, x):
        x, groups = self.conv0(x), []
        for g in range(3):
            for block in getattr(self, f'group{g}').children():
                x = block(x)
            groups.append(x)
        return self.fc(torch.relu(self.bn(x)).mean((2, 3))), groups

    def load(self, params):
        whole = ('weight', 'bias', *STATISTICS)
        state = {(k if k.endswith(whole) else f'{k}.weight'): v.detach()
                 for k, v in params.items()}
        missing, unexpected = self.load_state_dict(state, strict=False)
        assert not unexpected and all(k.endswith('num_batches_tracked') for k in missing)


@pytest.mark.parametrize('depth, width, count', [
    (16, 1, 175_066), (16, 2, 691_674), (40, 1, 563_930), (40, 2, 2_243_546)])
def test_parameter_counts(depth, width, count):
    params = wide_resnet(depth, width, 10)[1]
    assert sum(p.numel() for p in trainable(params).values()) == count


def test_parameter_names_and_shapes():
    params = wide_resnet(16, 2, 10)[1]
    assert {k for k in params if not k.startswith('group')} == {
        'conv0', 'fc.weight', 'fc.bias',
        'bn.weight', 'bn.bias', 'bn.running_mean', 'bn.running_var'}
    assert params['conv0'].shape == (16, 3, 3, 3)
    assert params['group0.block0.convdim'].shape == (32, 16, 1, 1)
    assert params['group1.block0.bn0.weight'].shape == (32,)
    assert params['group1.block0.bn1.bias'].shape == (64,)
    assert params['group2.block1.conv1'].shape == (128, 128, 3, 3)
    assert params['fc.weight'].shape == (10, 128)
    assert [k for k in params if 'convdim' in k] == [f'group{g}.block0.convdim' for g in range(3)]
    assert 'group0.block0.convdim' not in wide_resnet(16, 1, 10)[1]  # 16 channels in and out


@pytest.mark.parametrize('depth, width', [(10, 1), (16, 0.4), (22, 1.5)])
def test_equals_the_same_network_in_modules(depth, width):
    f, params = wide_resnet(depth, width, 7, seed=3)
    module = Reference((depth - 4) // 6, width, 7)
    module.load(params)
    x = torch.randn(5, 3, 16, 16)
    for training in (True, True, False):
        module.train(training)
        logits, groups = f(x, params, training)
        expected, expected_groups = module(x)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        for a, b in zip(groups, expected_groups, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(params['bn.running_var'], module.bn.running_var)
    f(x, params, True)[0].sum().backward()
    module.train()(x)[0].sum().backward()
    torch.testing.assert_close(params['group1.block0.conv0'].grad,
                               module.group1.block0.conv0.weight.grad, rtol=1e-3, atol=1e-4)


def test_groups_and_any_image_size():
    f, params = wide_resnet(10, 1, 10)
    logits, groups = f(torch.randn(2, 3, 20, 28), params, False)
    assert logits.shape == (2, 10)
    assert [g.shape for g in groups] == [(2, 16, 20, 28), (2, 32, 10, 14), (2, 64, 5, 7)]


def test_groups_are_not_overwritten_by_the_rest_of_the_network():
    f, params = wide_resnet(10, 0.5, 10)
    groups = f(torch.randn(2, 3, 8, 8), params, True)[1]
    assert (groups[2] < 0).any()  # no in-place ReLU ran over it


def test_base_is_a_prefix():
    f, params = wide_resnet(10, 0.5, 10)
    x = torch.randn(2, 3, 8, 8)
    prefixed = {f'student.{k}': v for k, v in params.items()}
    assert torch.equal(f(x, prefixed, False, 'student.')[0], f(x, params, False)[0])


def test_initialisation():
    params, again, other = (wide_resnet(16, 2, 10, seed)[1] for seed in (0, 0, 1))
    assert all(torch.equal(params[k], again[k]) for k in params)
    assert not torch.equal(params['conv0'], other['conv0'])
    w = params['group2.block1.conv1']
    assert w.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    gamma = torch.cat([p for k, p in params.items() if k.endswith('.weight') and p.dim() == 1])
    assert gamma.min() >= 0 and gamma.max() < 1
    assert gamma.mean().item() == pytest.approx(0.5, abs=0.05)
    assert all(not p.any() for k, p in params.items() if k.endswith(('.bias', '.running_mean')))
    assert all((p == 1).all() for k, p in params.items() if k.endswith('.running_var'))
    assert all(p.requires_grad != k.endswith(STATISTICS) for k, p in params.items())


def test_initialisation_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    wide_resnet(10, 1, 10)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('depth', [-2, 4, 9, 15, 17])
def test_depth_must_be_6n_plus_4(depth):
    with pytest.raises(ValueError, match='6n\\+4'):
        wide_resnet(depth, 1, 10)


def test_width_must_leave_channels():
    with pytest.raises(ValueError, match='group 0 has no channels'):
        wide_resnet(16, 0.05, 10)


@pytest.mark.parametrize('width', [0.5, 1])
def test_folded_network_equals_the_unfolded_one(width):
    model = new_model('wrn', {'depth': 16, 'width': width}, 10, seed=1)
    f, params = model.f, model.params
    for _ in range(3):
        f(torch.randn(8, 3, 16, 16) + 1, params, True)  # running statistics that are not 0 and 1
    folded, x = fold_batch_norm(model).params, torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        (a, a_groups), (b, b_groups) = f(x, params, False), f(x, folded, False)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for p, q in zip(a_groups, b_groups, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4)
    assert not any('running' in k or '.bn1.' in k for k in folded)
    assert folded['group0.block0.conv0.bias'].any() and 'group0.block0.bn0.a' in folded
    assert not any(t.requires_grad for t in folded.values())
