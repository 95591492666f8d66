"""Each loss against its formula in NumPy (float64), by gradcheck, and for the properties that the paper gives it."""
import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from utils import at_loss, attention_map, kd_loss, transfer_loss


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


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


@pytest.mark.parametrize('mapping', ['sum', 'max'])
def test_at_loss_is_the_mean_squared_difference_of_maps(mapping):
    S, T = draw(3, 5, 4, 4), draw(3, 8, 4, 4, seed=1)
    expected = ((numpy_map(S, mapping, 2) - numpy_map(T, mapping, 2)) ** 2).mean()
    assert at_loss(S, T, mapping).item() == pytest.approx(expected, rel=1e-12)


def test_at_loss_pools_the_larger_map():
    S, T = draw(2, 3, 8, 8), draw(2, 4, 4, 4, seed=1)
    Q = (S.numpy() ** 2).sum(1).reshape(2, 4, 2, 4, 2).mean((2, 4)).reshape(2, 16)  # 2×2 means of the map
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
    S, T = 200 * draw(2, 3, 4, 4, dtype=dtype), draw(2, 3, 4, 4, seed=1, dtype=dtype)  # 200² > 65504 / 3
    assert at_loss(S, T).dtype == torch.float32
    assert at_loss(S, T).item() == pytest.approx(at_loss(S.double(), T.double()).item(), rel=1e-5)
    z, t, y = draw(4, 5, dtype=dtype), draw(4, 5, seed=1, dtype=dtype), torch.arange(4)
    assert kd_loss(z, t, y, 4, 0.9).item() == pytest.approx(kd_loss(z.double(), t.double(), y, 4, 0.9).item(), rel=1e-5)


@pytest.mark.parametrize('alpha', [0, 0.9, 1])
@pytest.mark.parametrize('temperature', [1, 4])
def test_kd_loss(alpha, temperature):
    z, t, y = draw(6, 5), draw(6, 5, seed=1), torch.tensor([0, 1, 2, 3, 4, 0])
    p, q = numpy_softmax(z.numpy() / temperature), numpy_softmax(t.numpy() / temperature)
    kl = (q * (np.log(q) - np.log(p))).sum(1).mean()
    ce = -np.log(numpy_softmax(z.numpy())[np.arange(6), y.numpy()]).mean()
    expected = alpha * temperature ** 2 * kl + (1 - alpha) * ce
    assert kd_loss(z, t, y, temperature, alpha).item() == pytest.approx(expected, rel=1e-12)


def test_gradients():
    S, T = draw(2, 3, 4, 4).requires_grad_(), draw(2, 4, 4, 4, seed=1)
    y = torch.tensor([1, 2, 0])
    assert gradcheck(lambda s: at_loss(s, T), S)
    assert gradcheck(lambda s: at_loss(s, T, 'max', 1), S)
    assert gradcheck(lambda s: at_loss(s, T[:, :, ::2, ::2]), S)
    assert gradcheck(lambda z: kd_loss(z, draw(3, 5, seed=2), y, 4, 0.9), draw(3, 5).requires_grad_())


def test_transfer_loss_adds_the_chosen_groups_with_beta():
    S = [draw(2, 3, 4, 4, seed=i) for i in range(3)]
    T = [draw(2, 6, 4, 4, seed=9 + i) for i in range(3)]
    z, t, y = draw(2, 5), draw(2, 5, seed=1), torch.tensor([1, 2])
    loss, at_losses = transfer_loss(z, S, y, t, T, alpha=0.3, temperature=2, beta=100, at_groups=[0, 2])
    assert [a.item() for a in at_losses] == [at_loss(S[0], T[0]).item(), at_loss(S[2], T[2]).item()]
    assert loss.item() == pytest.approx((kd_loss(z, t, y, 2, 0.3) + 100 * sum(at_losses)).item(), rel=1e-12)
