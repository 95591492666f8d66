"""Each loss: its formula in NumPy (float64), gradcheck, and the properties of the paper."""
import numpy as np
import pytest
import torch
from helpers import options
from torch.autograd import gradcheck, gradgradcheck

from resnet import classify, network_in_network
from utils import (
    activation_loss,
    at_loss,
    attention_map,
    gradient_at_loss,
    input_gradient,
    kd_loss,
    make_adapters,
    min_l2_loss,
    new_model,
    objective,
    symmetry_loss,
)


def draw(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def numpy_map(A, mapping, power):
    A = np.abs(A.numpy().astype(np.float64)) ** power
    Q = (A.sum(1) if mapping == 'sum' else A.max(1)).reshape(len(A), -1)
    return Q / np.sqrt((Q ** 2).sum(1, keepdims=True))


def numpy_softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize('mapping', ['sum', 'max'])
@pytest.mark.parametrize('power', [1, 2, 4])
def test_attention_map(mapping, power):
    A = draw(3, 5, 4, 6)
    Q = attention_map(A, mapping, power)
    assert Q.shape == (3, 24)
    np.testing.assert_allclose(Q.numpy(), numpy_map(A, mapping, power), rtol=1e-12)
    np.testing.assert_allclose(Q.norm(dim=1).numpy(), 1, rtol=1e-12)


@pytest.mark.parametrize('power', [4, 100])
def test_high_powers_of_large_activations(power):
    A = (3e4 * draw(2, 3, 4, 4)).requires_grad_()
    expected = attention_map(A, 'sum', power)
    scaled = numpy_map(A.detach() / 3e4, 'sum', power)
    np.testing.assert_allclose(expected.detach(), scaled, rtol=1e-9)
    small = A.detach().float().requires_grad_()
    Q = attention_map(small, 'sum', power)
    torch.testing.assert_close(Q.double(), expected, rtol=1e-3, atol=1e-5)
    Q.square().sum().backward()
    assert small.grad.isfinite().all()
    assert attention_map(torch.zeros(1, 2, 3, 3), 'max', power).isfinite().all()


@pytest.mark.parametrize('mapping', ['sum', 'max'])
def test_at_loss_is_the_mean_squared_difference_of_maps(mapping):
    S, T = draw(3, 5, 4, 4), draw(3, 8, 4, 4, seed=1)
    expected = ((numpy_map(S, mapping, 2) - numpy_map(T, mapping, 2)) ** 2).mean()
    assert at_loss(S, T, mapping).item() == pytest.approx(expected, rel=1e-12)


def test_tokens_of_a_transformer_as_the_docstring_has_them():
    S, T = draw(2, 1 + 6, 5), draw(2, 1 + 6, 8, seed=1)  # (N, class token and L, D)
    maps = [(A[:, 1:] ** 2).sum(2) for A in (S, T)]      # (N, L)
    maps = [Q / Q.norm(dim=1, keepdim=True) for Q in maps]
    A, B = (A[:, 1:].transpose(1, 2).unsqueeze(3) for A in (S, T))
    assert 'A.transpose(1, 2).unsqueeze(3)' in attention_map.__doc__
    torch.testing.assert_close(attention_map(A), maps[0])
    torch.testing.assert_close(at_loss(A, B), (maps[0] - maps[1]).square().mean())


def test_other_mappings_are_refused():
    with pytest.raises(ValueError, match='must be one of sum, max'):
        attention_map(draw(1, 2, 3, 3), 'mean')


@pytest.mark.parametrize('loss', [at_loss, activation_loss])
def test_other_shapes_are_refused_and_the_teacher_gets_no_gradient(loss):
    S = draw(2, 3, 4, 4).requires_grad_()
    for T in (draw(3, 3, 4, 4), draw(2, 48), draw(2, 3, 16), draw(2, 1, 3, 4, 4), draw(3, 4, 4)):
        with pytest.raises(ValueError, match=r'must be \(N, C, H, W\) with the same N'):
            loss(S, T)
        with pytest.raises(ValueError, match='with the same N'):
            loss(T, S)
    with pytest.raises(ValueError, match=r'must be \(N, C, H, W\)'):
        attention_map(draw(2, 48))
    T = draw(2, 3, 2, 4, seed=1).requires_grad_()
    loss(S, T).backward()
    assert S.grad.any() and T.grad is None


def test_at_loss_pools_the_larger_map():
    S, T = draw(2, 3, 8, 8), draw(2, 4, 4, 4, seed=1)
    Q = (S.numpy() ** 2).sum(1).reshape(2, 4, 2, 4, 2).mean((2, 4)).reshape(2, 16)  # 2×2 means
    Q /= np.sqrt((Q ** 2).sum(1, keepdims=True))
    expected = ((Q - numpy_map(T, 'sum', 2)) ** 2).mean()
    assert at_loss(S, T).item() == pytest.approx(expected, rel=1e-12)
    assert at_loss(T, S).item() == pytest.approx(expected, rel=1e-12)


def test_at_loss_does_not_see_the_scale_of_activations():
    S, T = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    assert at_loss(7 * S, 0.1 * T).item() == pytest.approx(at_loss(S, T).item(), rel=1e-12)
    assert at_loss(3 * S, S).item() == pytest.approx(0, abs=1e-30)


def test_at_loss_of_dead_activations_has_finite_gradients():
    S = torch.zeros(2, 3, 4, 4, requires_grad=True)
    at_loss(S, draw(2, 3, 4, 4, dtype=torch.float32)).backward()
    assert S.grad.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_losses_are_computed_in_float32(dtype):
    S = 200 * draw(2, 3, 4, 4, dtype=dtype)  # 200² > 65504 / 3
    T = draw(2, 3, 4, 4, seed=1, dtype=dtype)
    assert at_loss(S, T).dtype == torch.float32
    assert at_loss(S, T).item() == pytest.approx(at_loss(S.double(), T.double()).item(), rel=1e-5)
    z, t = draw(4, 5, dtype=dtype), draw(4, 5, seed=1, dtype=dtype)
    assert kd_loss(z, t, 4).dtype == torch.float32
    assert kd_loss(z, t, 4).item() == pytest.approx(kd_loss(z.double(), t.double(), 4).item(),
                                                    rel=1e-5)


def fixed(logits, groups):
    """A network that gives these whatever it sees."""
    return lambda x, params, training: (logits, groups)


@pytest.mark.parametrize('alpha', [0, 0.9, 1])
@pytest.mark.parametrize('temperature', [1, 4])
def test_kd_loss(alpha, temperature):
    z, t, y = draw(6, 5), draw(6, 5, seed=1), torch.tensor([0, 1, 2, 3, 4, 0])
    p, q = numpy_softmax(z.numpy() / temperature), numpy_softmax(t.numpy() / temperature)
    kl = (q * (np.log(q) - np.log(p))).sum(1).mean()
    ce = -np.log(numpy_softmax(z.numpy())[np.arange(6), y.numpy()]).mean()
    kd = temperature ** 2 * kl
    assert kd_loss(z, t, temperature).item() == pytest.approx(kd, rel=1e-12)
    opt = options('--alpha', alpha, '--temperature', temperature)
    teacher = (fixed(t, ()), {})
    loss, figures = objective(fixed(z, ()), {}, teacher, draw(6, 3, 4, 4), y, opt)
    assert loss.item() == pytest.approx(alpha * kd + (1 - alpha) * ce, rel=1e-12)
    assert figures['ce_loss'].item() == pytest.approx(ce, rel=1e-12)
    assert ('kd_loss' in figures) == (alpha > 0)


def test_gradients():
    S, T = draw(2, 3, 4, 4).requires_grad_(), draw(2, 4, 4, 4, seed=1)
    assert gradcheck(lambda s: at_loss(s, T), S)
    assert gradcheck(lambda s: at_loss(s, T, 'max', 1), S)
    assert gradcheck(lambda s: at_loss(s, T, 'sum', 4), S)
    assert gradcheck(lambda s: at_loss(s, T, 'max', 3), S)
    assert gradcheck(lambda s: at_loss(s, T[:, :, ::2, ::2]), S)
    t = draw(3, 5, seed=2)
    assert gradcheck(lambda z: kd_loss(z, t, 4), draw(3, 5).requires_grad_())


def test_objective_adds_the_chosen_groups_with_beta():
    S = [draw(2, 3, 4, 4, seed=i) for i in range(3)]
    T = [draw(2, 6, 4, 4, seed=9 + i) for i in range(3)]
    z, t, x, y = draw(2, 5), draw(2, 5, seed=1), draw(2, 3, 4, 4), torch.tensor([1, 2])
    opt = options('--beta', 100, '--at_groups', '0,2', '--mapping', 'max', '--power', 3)
    loss, figures = objective(fixed(z, S), {}, (fixed(t, T), {}), x, y, opt, decay=0.5)
    maps = [[numpy_map(A, 'max', 3) for A in groups] for groups in (S, T)]
    expected = [((maps[0][g] - maps[1][g]) ** 2).mean() for g in (0, 2)]
    assert figures['at_losses'].tolist() == pytest.approx(expected, rel=1e-12)
    ce = torch.nn.functional.cross_entropy(z, y).item()
    assert loss.item() == pytest.approx(ce + 50 * sum(expected), rel=1e-12)


# ---------------------------------------------------------------------------- full activations

def numpy_unit(A):
    A = A.reshape(len(A), -1)
    return A / np.sqrt((A ** 2).sum(1, keepdims=True))


def test_activation_loss_with_and_without_an_adapter():
    S, T, W = draw(3, 4, 5, 6), draw(3, 7, 5, 6, seed=1), draw(7, 4, 1, 1, seed=2)
    adapted = np.einsum('oc,nchw->nohw', W[:, :, 0, 0].numpy(), S.numpy())
    expected = ((numpy_unit(adapted) - numpy_unit(T.numpy())) ** 2).mean()
    assert activation_loss(S, T, W).item() == pytest.approx(expected, rel=1e-12)
    U = draw(3, 4, 5, 6, seed=3)
    expected = ((numpy_unit(S.numpy()) - numpy_unit(U.numpy())) ** 2).mean()
    assert activation_loss(S, U).item() == pytest.approx(expected, rel=1e-12)
    assert gradcheck(activation_loss, (S.requires_grad_(), T, W.requires_grad_()))


def test_activation_loss_pools_the_larger():
    S, T = draw(2, 3, 8, 8), draw(2, 3, 4, 4, seed=1)
    pooled = S.numpy().reshape(2, 3, 4, 2, 4, 2).mean((3, 5))
    expected = ((numpy_unit(pooled) - numpy_unit(T.numpy())) ** 2).mean()
    assert activation_loss(S, T).item() == pytest.approx(expected, rel=1e-12)
    assert activation_loss(T, S).item() == pytest.approx(expected, rel=1e-12)


def test_adapters_exactly_where_widths_differ():
    S, T = (new_model('nin', {'width': width}, 3) for width in (1 / 32, 1 / 24))  # 3, 6, 6 channels
    adapters = make_adapters(S, T, [0, 1, 2], seed=0)
    assert S.group_channels == (3, 6, 6) and T.group_channels == (4, 8, 8)
    assert {name: tuple(t.shape) for name, t in adapters.items()} == {
        'adapter0': (4, 3, 1, 1), 'adapter1': (8, 6, 1, 1), 'adapter2': (8, 6, 1, 1)}
    assert all(t.requires_grad and t.std() > 0 for t in adapters.values())
    assert make_adapters(S, T, [2], seed=0).keys() == {'adapter2'}
    assert make_adapters(S, S, [0, 1, 2], seed=0) == {}


# ---------------------------------------------------------------------------- gradients

def tiny_network(seed=0):
    """A NIN of width 1/48 in float64, without batch norm; smooth almost everywhere."""
    f, params = network_in_network(1 / 48, 3, seed, batch_norm=False, pool_relu=False)
    return f, {name: p.detach().double().requires_grad_() for name, p in params.items()}


def numpy_input_gradient(f, params, x, y, eps=1e-6):
    """∂ℓ/∂x by central differences, ℓ the sum of the cross-entropies."""
    def loss(x):
        p = numpy_softmax(f(torch.from_numpy(x), params, True)[0].detach().numpy())
        return -np.log(p[np.arange(len(p)), y.numpy()]).sum()

    x, J = x.detach().numpy(), np.zeros(x.shape)
    for i in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[i] = eps
        J[i] = (loss(x + step) - loss(x - step)) / (2 * eps)
    return J


@pytest.fixture
def images():
    return draw(2, 3, 6, 6, seed=4).requires_grad_(), torch.tensor([0, 2])


def test_gradient_losses_against_finite_differences(images):
    x, y = images
    (f, params), (g, teacher) = tiny_network(), tiny_network(seed=1)
    J_S, J_T = numpy_input_gradient(f, params, x, y), numpy_input_gradient(g, teacher, x, y)
    J_m = numpy_input_gradient(f, params, x.flip(3), y)
    J, T = (input_gradient(n(x, p, True)[0], x, y) for n, p in ((f, params), (g, teacher)))
    assert np.abs(J_S).max() > 1e-2
    np.testing.assert_allclose(J.detach().numpy(), J_S, atol=1e-7)
    mirrored = x.detach().flip(3).requires_grad_()
    M = input_gradient(f(mirrored, params, True)[0], mirrored, y)
    for loss, expected in ((gradient_at_loss(J, T), J_S - J_T),
                           (symmetry_loss(J, M), J_S - J_m[..., ::-1]), (min_l2_loss(J), J_S)):
        assert loss.item() == pytest.approx((expected ** 2).sum() / 2 / len(x), rel=1e-5)


@pytest.mark.parametrize('loss', ['grad_at', 'symmetry', 'min_l2'])
def test_double_backward_of_gradient_losses(images, loss):
    """The losses' gradients with respect to the parameters, against finite differences of them."""
    x, y = images
    f, params = tiny_network()
    g, teacher = tiny_network(seed=1)
    names = [name for name in params if name.endswith('weight')][-4:]

    def function(*tensors):
        p = params | dict(zip(names, tensors, strict=True))
        J = input_gradient(f(x, p, True)[0], x, y)
        if loss == 'grad_at':
            J_T = input_gradient(g(x, teacher, False)[0], x, y, create_graph=False)
            return gradient_at_loss(J, J_T)
        if loss == 'min_l2':
            return min_l2_loss(J)
        mirrored = x.detach().flip(3).requires_grad_()
        return symmetry_loss(J, input_gradient(f(mirrored, p, True)[0], mirrored, y))

    assert gradcheck(function, [params[name] for name in names], atol=1e-6)


def test_input_gradient_by_gradgradcheck(images):
    x, y = images
    f, params = tiny_network()

    def loss(x):
        return torch.nn.functional.cross_entropy(f(x, params, True)[0], y, reduction='sum')
    assert gradgradcheck(loss, x)


def test_symmetry_norm_is_zero_for_a_flip_invariant_network_only(images):
    x, y = images
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4, 3, 3, 3, generator=generator, dtype=torch.float64)
    params = {'fc.weight': torch.randn(3, 4, generator=generator, dtype=torch.float64),
              'fc.bias': torch.zeros(3, dtype=torch.float64)}

    def norm(weight):
        def logits(x):
            features = torch.relu(torch.nn.functional.conv2d(x, weight, padding=1))
            return classify(features, params, '')
        mirrored = x.detach().flip(3).requires_grad_()
        J_m = input_gradient(logits(mirrored), mirrored, y)
        return symmetry_loss(input_gradient(logits(x), x, y), J_m).item()

    assert norm(weight + weight.flip(3)) == pytest.approx(0, abs=1e-25)
    assert norm(weight) > 1e-3
