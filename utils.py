"""The method: attention maps, the losses of attention transfer and knowledge distillation, and teachers.

Paper: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv 1612.03928.

    teacher = load_teacher('resnet_16_2_teacher')                 # logs/resnet_16_2_teacher/model.pt7
    with torch.no_grad():
        teacher_logits, teacher_groups = teacher.f(x, teacher.params, training=False)
    loss, at_losses = transfer_loss(logits, groups, labels, teacher_logits, teacher_groups,
                                    alpha=0.9, temperature=4, beta=1e3, at_groups=(0, 1, 2))
"""
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet import STATISTICS, Network, Params, trainable, wide_resnet, wide_resnet_shapes

__all__ = ['InputError', 'Network', 'Params', 'Trained', 'at_loss', 'attention_map', 'find_checkpoint',
           'fold_batch_norm', 'kd_loss', 'load_network', 'load_teacher', 'read_checkpoint', 'trainable',
           'transfer_loss', 'wide_resnet']

CHECKPOINT = 'model.pt7'  # the weights' file in a run's folder


class InputError(ValueError):
    """Something a user gave does not work; the message is the one line to show."""


# ------------------------------------------------------------------------------------------- losses

def widen(t: Tensor) -> Tensor:
    """At least float32: losses are computed so, whatever the compute type."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def attention_map(A: Tensor, mapping: str = 'sum', power: float = 2, size: Sequence[int] | None = None) -> Tensor:
    """Activations (N, C, H, W) to attention maps (N, H·W), each of unit L2 norm (section 3.1).

    `mapping` is F_sum^p(A) = Σ_c |A_c|^p ('sum') or F_max^p(A) = max_c |A_c|^p ('max'), p = `power` ≥ 1.
    A map not of `size` (h, w) is average-pooled to it before it is normalised.
    """
    A = widen(A).abs().pow(power)
    Q = A.sum(1) if mapping == 'sum' else A.amax(1)  # (N, H, W)
    if size is not None and Q.shape[1:] != tuple(size):
        Q = F.adaptive_avg_pool2d(Q, tuple(size))    # (N, h, w)
    return F.normalize(Q.flatten(1))                 # (N, h·w)


def at_loss(student: Tensor, teacher: Tensor, mapping: str = 'sum', power: float = 2) -> Tensor:
    """Attention transfer between two groups' activations, (N, C, H, W) and (N, C', H', W'): a scalar (eq. 2).

    The mean over samples and positions of (Q_S/‖Q_S‖ − Q_T/‖Q_T‖)². The paper writes β/2 and a norm that is not
    squared; its code squares, takes the mean and has no ½, and so does this: the paper's β = 10³ "divided by
    the number of elements in the attention map and the batch size" is that mean. Maps of unequal size are
    average-pooled to the smaller.
    """
    size = [min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    Q_S, Q_T = (attention_map(A, mapping, power, size) for A in (student, teacher))
    return (Q_S - Q_T).square().mean()


def kd_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float) -> Tensor:
    """Knowledge distillation (Hinton et al., 2015) from logits (N, K), (N, K) and labels (N,): a scalar.

    α T² KL(softmax(teacher/T) ‖ softmax(student/T)) + (1 − α) CE, means over samples.
    """
    log_p, log_q = (F.log_softmax(widen(z) / temperature, dim=1) for z in (student, teacher))
    soft = F.kl_div(log_p, log_q, reduction='batchmean', log_target=True) * temperature ** 2
    return alpha * soft + (1 - alpha) * F.cross_entropy(widen(student), labels)


def transfer_loss(logits: Tensor, groups: Sequence[Tensor], labels: Tensor, teacher_logits: Tensor,
                  teacher_groups: Sequence[Tensor], *, alpha: float, temperature: float, beta: float | Tensor,
                  at_groups: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """A student's whole loss, KD + β Σ_g AT_g, and its AT_g, each a scalar without β (section 4.1.1).

    Where alpha is 0 it is CE + β Σ_g AT_g, and the teacher may have other classes.
    """
    loss = (kd_loss(logits, teacher_logits, labels, temperature, alpha) if alpha
            else F.cross_entropy(widen(logits), labels))
    at_losses = [at_loss(groups[g], teacher_groups[g]) for g in at_groups]
    return loss + beta * sum(at_losses), at_losses


# ------------------------------------------------------------------------------------------- weight files

def read_checkpoint(path: str | Path) -> dict:
    """What `torch.save` wrote to `path`, on the CPU, without running any code from it.

    Raises InputError where there is no such file, or it is no checkpoint of tensors and plain values.
    """
    try:
        with warnings.catch_warnings(action='ignore'):  # torch warns of what it then refuses
            state = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise InputError(f'{path}: there is no such file') from None
    except Exception as e:  # torch reports a broken or foreign file by a dozen exception types
        reason = (str(e).strip().splitlines() or [''])[0][:100]
        raise InputError(f'{path}: not a checkpoint, or a damaged one ({type(e).__name__}: {reason})') from None
    if not isinstance(state, dict):
        raise InputError(f'{path}: not a checkpoint: it holds a {type(state).__name__}, not a dict')
    return state


def student_params(state: dict, path: str | Path) -> Params:
    """The bare student of a checkpoint: 'student.' taken off, 'teacher.' left out, floats as float32.

    Early files of the published code keep the running statistics apart, under 'stats'.
    """
    params = state.get('params')
    if not isinstance(params, dict):
        raise InputError(f"{path}: not a checkpoint of this code: it has no dict 'params'")
    params = params | (state.get('stats') or {})
    for name, tensor in params.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(f'{path}: not a checkpoint of this code: params[{name!r}] is no named tensor')
        if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InputError(f'{path}: params[{name!r}] is not stored in full')
    if any(name.startswith('student.') for name in params):
        params = {name.removeprefix('student.'): t for name, t in params.items() if name.startswith('student.')}
    return {name: tensor.detach().float() for name, tensor in params.items()}


def recognise_wide_resnet(params: Params, path: str | Path) -> tuple[int, float, int]:
    """Depth, width and classes of a Wide ResNet, from its parameters' names and shapes.

    Raises InputError, with the first name that does not fit, where they are not those of a Wide ResNet.
    """
    try:
        blocks = sum(f'group0.block{b}.conv0' in params for b in range(len(params)))
        classes, channels = params['fc.weight'].shape
        # int(c·w) = int(c·(int(64w)/64)) for c = 16, 32, 64: the last group's channels tell the width.
        depth, width = 6 * blocks + 4, channels / 64
        expected = wide_resnet_shapes(depth, width, classes)
    except (KeyError, ValueError) as e:
        raise InputError(f'{path}: not a Wide ResNet ({e})') from None
    for name in [*expected, *params]:
        found, wanted = tuple(params[name].shape) if name in params else None, expected.get(name)
        if found != wanted:
            raise InputError(f'{path}: not a Wide ResNet: {name} is {found}, but WRN-{depth}-{width:g} has {wanted}')
    return depth, width, classes


def find_checkpoint(run: str | Path) -> Path:
    """The checkpoint of `run`: a name under logs/, a run's folder, or a file.

    Raises InputError with the places it looked in.
    """
    candidates = [Path('logs', run, CHECKPOINT), Path(run, CHECKPOINT), Path('logs', run), Path(run)]
    for path in candidates:
        if os.path.isfile(path):  # False for an impossible name, too
            return path
    raise InputError(f'there is no checkpoint {run}: looked for {", ".join(map(str, candidates))}')


@dataclass(frozen=True)
class Trained:
    """A trained network as it was read from a file."""
    f: Network
    params: Params
    name: str           # as WRN-16-2
    num_classes: int
    n_groups: int
    n_parameters: int   # trainable ones


def load_network(run: str | Path) -> Trained:
    """A trained network; its architecture follows from its parameters' names and shapes.

    `run` is a name under logs/, a run's folder, or a checkpoint file, of this code or the published one. Raises
    InputError where the file or its contents do not fit.
    """
    path = find_checkpoint(run)
    params = student_params(read_checkpoint(path), path)
    depth, width, num_classes = recognise_wide_resnet(params, path)
    n_parameters = sum(p.numel() for name, p in params.items() if not name.endswith(STATISTICS))
    f = wide_resnet(depth, width, num_classes)[0]
    return Trained(f, params, f'WRN-{depth}-{width:g}', num_classes, 3, n_parameters)


def load_teacher(run: str | Path) -> Trained:
    """As `load_network`, with batch norm folded; nothing in it requires gradients."""
    trained = load_network(run)
    return replace(trained, params=fold_batch_norm(trained.params))


def fold_batch_norm(params: Params) -> Params:
    """The same network for evaluation: batch norm at its running statistics, folded where that is possible.

    `bn1` of a pre-activation block directly follows `conv0`: it goes into `conv0.{weight,bias}`. Any other
    becomes the affine `name.{a,b}`, y = a·x + b, of shape (C, 1, 1). Computed in float64.
    """
    folded = {name: tensor.detach() for name, tensor in params.items()}
    for bn in [name.removesuffix('.running_var') for name in params if name.endswith('.running_var')]:
        weight, bias, mean, var = (folded.pop(f'{bn}.{name}').double()
                                   for name in ('weight', 'bias', 'running_mean', 'running_var'))
        scale = weight / torch.sqrt(var + 1e-5)  # (C,)
        shift = bias - mean * scale
        dtype = params[f'{bn}.weight'].dtype
        if bn.endswith('.bn1'):
            conv = bn.removesuffix('bn1') + 'conv0'
            folded[f'{conv}.weight'] = (folded.pop(conv).double() * scale[:, None, None, None]).to(dtype)
            folded[f'{conv}.bias'] = shift.to(dtype)
        else:
            folded[f'{bn}.a'], folded[f'{bn}.b'] = (t.to(dtype)[:, None, None] for t in (scale, shift))
    return folded
