"""The method: attention maps, the losses of attention transfer and of distillation, teachers.

Paper: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv 1612.03928.

    teacher = load_teacher('resnet_16_2_teacher')      # logs/resnet_16_2_teacher/model.pt7
    with torch.no_grad():
        _, teacher_groups = teacher.f(x, teacher.params, training=False)
    logits, groups = f(x, params, training=True)
    loss = F.cross_entropy(logits, y) + 1e3 * sum(map(at_loss, groups, teacher_groups))

`LOSSES` lists the losses that the scripts offer. To add one, write a function and add an entry: its
option, its checks, and its names in logs, folders and tables are made from the entry.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet import (
    NETWORKS,
    Network,
    Params,
    freeze,
    imagenet_resnet,
    initialize,
    network_in_network,
    trainable,
    wide_resnet,
)
from weights import InputError, Model, fold_batch_norm, load_model, new_classifier, new_model

__all__ = ['LOSSES', 'MAPPINGS', 'NETWORKS', 'Batch', 'InputError', 'Loss', 'Model', 'Network',
           'Params', 'activation_loss', 'at_loss', 'attention_map', 'fold_batch_norm', 'freeze',
           'gradient_at_loss', 'imagenet_resnet', 'input_gradient', 'kd_loss', 'load_model',
           'load_teacher', 'make_adapters', 'min_l2_loss', 'network_in_network', 'new_classifier',
           'new_model', 'objective', 'symmetry_loss', 'trainable', 'wide_resnet']

ADAPTER = 'adapter'  # prefix of the names of F-ActT's 1×1 convolutions


# ---------------------------------------------------------------------------- attention maps

# Activations A (N, C, H, W) and a power p to maps (N, H, W), section 3.1. A ≥ 0 unless p = 2.
MAPPINGS = {'sum': lambda A, p: A.pow(p).sum(1),    # F_sum^p(A) = Σ_c |A_c|^p
            'max': lambda A, p: A.pow(p).amax(1)}   # F_max^p(A) = max_c |A_c|^p


def attention_map(A: Tensor, mapping: str = 'sum', power: float = 2,
                  size: Sequence[int] | None = None) -> Tensor:
    """Activations (N, C, H, W) to attention maps (N, H·W), each of unit L2 norm (section 3.1).

    `mapping` is one of MAPPINGS, with p = `power` ≥ 1. If `size` (h, w) is given, the maps are
    average-pooled to it, then normalised. Raises ValueError for an unknown mapping or wrong shape.

    Tokens A (N, L, D) of a transformer, as A.transpose(1, 2).unsqueeze(3), have maps (N, L). Drop
    the class token first, as A[:, 1:].
    """
    if mapping not in MAPPINGS:
        raise ValueError(f'mapping {mapping!r}: must be one of {", ".join(MAPPINGS)}')
    if A.dim() != 4:
        raise ValueError(f'activations of shape {tuple(A.shape)}: must be (N, C, H, W)')
    A = at_least_float32(A)
    if power != 2:  # a square needs no absolute value
        A = A.abs()
    if power > 2:  # high powers could overflow, and normalised maps do not depend on A's scale
        largest = A.detach().amax((1, 2, 3), keepdim=True)
        A = A / largest.clamp_min(torch.finfo(A.dtype).tiny)
    Q = MAPPINGS[mapping](A, power)                # (N, H, W)
    if size is not None and Q.shape[1:] != tuple(size):
        Q = F.adaptive_avg_pool2d(Q, tuple(size))  # (N, h, w)
    return F.normalize(Q.flatten(1))               # (N, h·w)


def at_least_float32(t: Tensor) -> Tensor:
    """Casts to float32, and leaves float64: losses have this precision with every --dtype."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def common_size(student: Tensor, teacher: Tensor) -> list[int]:
    """The smaller height and smaller width of two groups. Raises ValueError for wrong shapes."""
    if student.dim() != 4 or teacher.dim() != 4 or len(student) != len(teacher):
        shapes = f'{tuple(student.shape)} and {tuple(teacher.shape)}'
        raise ValueError(f'activations of shapes {shapes}: must be (N, C, H, W) with the same N')
    return [min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True)]


def pooled(A: Tensor, size: list[int]) -> Tensor:
    """Average-pools activations (N, C, H, W) to (N, C, h, w), unless `size` (h, w) is (H, W)."""
    A = at_least_float32(A)
    return A if list(A.shape[2:]) == size else F.adaptive_avg_pool2d(A, size)


# ---------------------------------------------------------------------------- losses

def at_loss(student: Tensor, teacher: Tensor, mapping: str = 'sum', power: float = 2) -> Tensor:
    """Attention transfer between two groups, (N, C, H, W) and (N, C', H', W'): a scalar (eq. 2).

    The mean over samples and positions of (Q_S/‖Q_S‖ − Q_T/‖Q_T‖)². The paper has β/2 and a norm
    that is not squared. The published code has the mean of squares (squared as in eq. 5) without ½;
    so has this function. Maps of different sizes are average-pooled to the smaller size. The
    teacher is detached. Raises ValueError for wrong shapes.
    """
    size = common_size(student, teacher)
    Q_S = attention_map(student, mapping, power, size)            # (N, h·w)
    Q_T = attention_map(teacher.detach(), mapping, power, size)
    return (Q_S - Q_T).square().mean()


def kd_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Knowledge distillation (Hinton et al., 2015) between logits (N, K): a scalar.

    T² KL(softmax(teacher/T) ‖ softmax(student/T)), the mean over samples. The student's whole loss
    is α times this + (1 − α) times cross-entropy.
    """
    log_p = F.log_softmax(at_least_float32(student) / temperature, dim=1)  # (N, K)
    log_q = F.log_softmax(at_least_float32(teacher) / temperature, dim=1)
    return F.kl_div(log_p, log_q, reduction='batchmean', log_target=True) * temperature ** 2


def activation_loss(student: Tensor, teacher: Tensor, adapter: Tensor | None = None) -> Tensor:
    """Full-activation transfer, F-ActT, (N, C', H', W') to (N, C, H, W): a scalar (section 4.1.2).

    The mean squared difference over samples and elements, of samples scaled to unit L2 norm.
    `adapter` (C', C, 1, 1) is a 1×1 convolution from the student's to the teacher's channels.
    Activations of different sizes are average-pooled to the smaller size. The teacher is detached.
    """
    size = common_size(student, teacher)
    A_S, A_T = pooled(student, size), pooled(teacher.detach(), size)
    A_S = A_S if adapter is None else F.conv2d(A_S, adapter)              # (N, C', h, w)
    A_S, A_T = F.normalize(A_S.flatten(1)), F.normalize(A_T.flatten(1))   # (N, C'·h·w)
    return (A_S - A_T).square().mean()


def input_gradient(logits: Tensor, x: Tensor, labels: Tensor, create_graph: bool = True) -> Tensor:
    """J = ∂ℓ/∂x (N, C, H, W), ℓ the sum over the batch of the cross-entropies (eq. 3).

    x must require gradients, and the logits (N, K) must be computed from it. If the network uses no
    batch statistics, J[i] is the gradient of sample i's own loss. With `create_graph` J can be
    differentiated again.
    """
    loss = F.cross_entropy(at_least_float32(logits), labels, reduction='sum')
    return at_least_float32(torch.autograd.grad(loss, x, create_graph=create_graph)[0])


def gradient_at_loss(J_S: Tensor, J_T: Tensor) -> Tensor:
    """Gradient-based AT: ½‖J_S − J_T‖², gradients (N, C, H, W), mean over samples (eq. 4)."""
    return (J_S - J_T.detach()).square().flatten(1).sum(1).mean() / 2


def symmetry_loss(J: Tensor, J_mirrored: Tensor) -> Tensor:
    """½‖J(x) − flip(J(flip(x)))‖², mean over samples (eq. 6); `J_mirrored` is J(flip(x)).

    The flip is horizontal. The loss is 0 for a network whose logits do not change with the flip.
    """
    return (J - J_mirrored.flip(3)).square().flatten(1).sum(1).mean() / 2


def min_l2_loss(J: Tensor) -> Tensor:
    """½‖J‖², mean over samples, J (N, C, H, W): double backpropagation (Drucker & LeCun, 1992)."""
    return J.square().flatten(1).sum(1).mean() / 2


# ---------------------------------------------------------------------------- registry of losses

class Batch(NamedTuple):
    """The inputs of the losses, for a batch of N images and K classes.

    The teacher's outputs are None without a teacher. A gradient J = ∂ℓ/∂x is None unless an active
    loss needs it.
    """
    labels: Tensor                                  # (N,)
    logits: Tensor                                  # (N, K)
    groups: tuple[Tensor, ...]                      # each (N, C, H, W)
    teacher_logits: Tensor | None                   # (N, K')
    teacher_groups: tuple[Tensor, ...] | None       # each (N, C', H', W')
    gradient: Tensor | None                         # (N, 3, H, W), of the student
    teacher_gradient: Tensor | None
    mirrored_gradient: Tensor | None                # of the student at the mirrored images
    params: Params                                  # the student's, and the adapters


NEEDS = {'groups', 'maps', 'logits', 'temperature', 'gradient', 'teacher_gradient',
         'mirrored_gradient', 'adapters'}


@dataclass(frozen=True)
class Loss:
    """A loss that is added to cross-entropy.

    flag:    the option that sets its weight, without dashes; 0 turns the loss off
    label:   its name in tables and folder names
    log:     its name in the log
    help:    the help text of the option
    needs:   its inputs besides the student's groups and logits: 'groups' (the teacher's; both
             networks must have equally many), 'maps' (attention maps, set by --mapping and
             --power), 'logits' (the teacher's; both networks must have the same classes),
             'temperature' (set by --temperature), 'gradient', 'teacher_gradient',
             'mirrored_gradient', 'adapters' (see `make_adapters`)
    values:  (batch, options) → the unweighted loss: a scalar, or a value per group, to be summed
    decays:  whether --beta_decay applies to the weight
    mixes:   whether cross-entropy is weighted by 1 − this weight, which is then at most 1
    """
    flag: str
    label: str
    log: str
    help: str
    needs: tuple[str, ...]
    values: Callable[[Batch, Any], Tensor]
    decays: bool = False
    mixes: bool = False

    def __post_init__(self) -> None:
        if unknown := {*self.needs} - NEEDS:
            raise ValueError(f'{self.flag} needs {unknown}: known are {", ".join(sorted(NEEDS))}')

    @property
    def needs_teacher(self) -> bool:
        """Whether it takes a teacher."""
        return bool({'groups', 'logits', 'teacher_gradient'} & {*self.needs})


def at_losses(batch: Batch, opt: Any) -> Tensor:
    return torch.stack([at_loss(batch.groups[g], batch.teacher_groups[g], opt.mapping, opt.power)
                        for g in opt.at_groups])


def act_losses(batch: Batch, opt: Any) -> Tensor:
    return torch.stack([activation_loss(batch.groups[g], batch.teacher_groups[g],
                                        batch.params.get(f'{ADAPTER}{g}')) for g in opt.at_groups])


LOSSES = [
    Loss('beta', 'AT', 'at_losses', 'weight of attention transfer', ('groups', 'maps'), at_losses,
         decays=True),
    Loss('factt', 'F-ActT', 'act_losses', 'weight of full-activation transfer',
         ('groups', 'adapters'), act_losses, decays=True),
    Loss('alpha', 'KD', 'kd_loss', 'weight of knowledge distillation; cross-entropy has 1 − alpha',
         ('logits', 'temperature'),
         lambda b, opt: kd_loss(b.logits, b.teacher_logits, opt.temperature), mixes=True),
    Loss('grad_at', 'gradient AT', 'grad_at_loss', 'weight of gradient-based attention transfer',
         ('logits', 'gradient', 'teacher_gradient'),
         lambda b, opt: gradient_at_loss(b.gradient, b.teacher_gradient)),
    Loss('symmetry', 'symmetry norm', 'symmetry_loss', 'weight of the symmetry norm',
         ('gradient', 'mirrored_gradient'),
         lambda b, opt: symmetry_loss(b.gradient, b.mirrored_gradient)),
    Loss('min_l2', 'min-l2', 'min_l2_loss', "weight of the input gradient's norm",
         ('gradient',), lambda b, opt: min_l2_loss(b.gradient)),
]


def active_losses(opt: Any) -> list[Loss]:
    """The losses whose weight is not 0."""
    return [loss for loss in LOSSES if getattr(opt, loss.flag)]


def losses_needing(opt: Any, *needs: str) -> list[Loss]:
    """The active losses that need at least one of these inputs; see `Loss.needs`."""
    return [loss for loss in active_losses(opt) if set(needs) & set(loss.needs)]


def teacher_losses(opt: Any) -> list[Loss]:
    """The active losses that take a teacher."""
    return [loss for loss in active_losses(opt) if loss.needs_teacher]


# ---------------------------------------------------------------------------- the objective

def run_networks(f: Network, params: Params, teacher: tuple[Network, Params] | None, x: Tensor,
                 labels: Tensor, opt: Any) -> Batch:
    """Runs the student and the teacher, if any, and computes the inputs of the active losses."""
    if losses_needing(opt, 'gradient'):
        x.requires_grad_()
    logits, groups = f(x, params, True)
    t_logits = t_groups = t_gradient = gradient = mirrored_gradient = None
    if teacher:
        with torch.set_grad_enabled(bool(losses_needing(opt, 'teacher_gradient'))):
            t_logits, t_groups = teacher[0](x, teacher[1], False)
    if losses_needing(opt, 'gradient'):
        gradient = input_gradient(logits, x, labels)
    if losses_needing(opt, 'teacher_gradient'):
        t_gradient = input_gradient(t_logits, x, labels, create_graph=False)
        t_logits = t_logits.detach()
    if losses_needing(opt, 'mirrored_gradient'):
        mirrored = x.detach().flip(3).requires_grad_()
        mirrored_gradient = input_gradient(f(mirrored, params, True)[0], mirrored, labels)
    return Batch(labels, logits, groups, t_logits, t_groups, gradient, t_gradient,
                 mirrored_gradient, params)


def objective(f: Network, params: Params, teacher: tuple[Network, Params] | None, x: Tensor,
              labels: Tensor, opt: Any, decay: float | Tensor = 1.0
              ) -> tuple[Tensor, dict[str, Tensor]]:
    """The training loss of images x (N, 3, H, W) and labels (N,), and a dict of metrics.

    The loss is (1 − α) CE + Σ weight · loss over the active losses; `decay` multiplies the weights
    with Loss.decays. The metrics are means over the batch: loss, acc and acc5 (top-1 and top-5
    accuracy in %; acc5 only with six or more classes), ce_loss, and each unweighted loss under its
    name in the log.
    """
    batch = run_networks(f, params, teacher, x, labels, opt)
    ce = F.cross_entropy(at_least_float32(batch.logits), labels)
    active, parts = active_losses(opt), {}
    total = (1 - sum(getattr(opt, loss.flag) for loss in active if loss.mixes)) * ce
    for loss in active:
        weight = getattr(opt, loss.flag) * (decay if loss.decays else 1)
        parts[loss.log] = loss.values(batch, opt)
        total = total + weight * parts[loss.log].sum()
    return total, {'loss': total, **accuracies(batch.logits, labels), 'ce_loss': ce, **parts}


def accuracies(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Accuracies of logits (N, K) in %: acc (top-1) and, with six or more classes, acc5 (top-5)."""
    correct = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]  # (N, min(5, K))
    acc = {'acc': 100 * correct[:, 0].double().mean()}
    return acc | ({'acc5': 100 * correct.any(1).double().mean()} if logits.shape[1] > 5 else {})


# ---------------------------------------------------------------------------- teachers

def load_teacher(run: str) -> Model:
    """`weights.load_model`, with batch norm folded; no parameter requires gradients."""
    return fold_batch_norm(load_model(run))


def make_adapters(student: Model, teacher: Model, at_groups: Sequence[int], seed: int) -> Params:
    """The 1×1 convolutions of `activation_loss`, for groups whose numbers of channels differ.

    Returns {'adapter{g}': weight of shape (C', C, 1, 1)}.
    """
    pairs = {g: (teacher.group_channels[g], student.group_channels[g]) for g in at_groups}
    shapes = {f'{ADAPTER}{g}': (*pair, 1, 1) for g, pair in pairs.items() if pair[0] != pair[1]}
    return initialize(shapes, seed)
