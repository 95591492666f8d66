"""The method: attention maps, the losses and their options, the objective, teachers.

Paper: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv 1612.03928.

    teacher_f, teacher_params = load_teacher('resnet_16_2_teacher')   # logs/…/model.pt7
    with torch.no_grad():
        _, teacher_groups = teacher_f(x, teacher_params, training=False)
    logits, groups = f(x, params, training=True)
    loss = F.cross_entropy(logits, y) + 1e3 * sum(map(at_loss, groups, teacher_groups))

A new loss is a function, a mean over samples (each rank has its own); an option in
`add_loss_options`; in `objective` its `if` and its term, named …_loss or …_losses. A loss that
needs a teacher is also named in TEACHER_LOSSES, one that needs the gradient at the image in
GRADIENT_LOSSES, one that compares groups or has adapters in `check_networks`.
"""
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet import NETWORKS, STATISTICS, InputError, Model, Network, Params, initialize

TEACHER_LOSSES = ('beta', 'factt', 'alpha', 'grad_at')
GRADIENT_LOSSES = ('grad_at', 'symmetry', 'min_l2')
CHECKPOINT = 'model.pt7'  # in a run's folder
# Weights that weights.py downloads by torchvision: our name, theirs.
PRETRAINED = {'torchvision': 'ResNet34_Weights', 'torchvision-18': 'ResNet18_Weights'}

# |A| of activations A (N, C, H, W), or A itself if p = 2, to maps (N, H, W), section 3.1.
MAPPINGS = {'sum': lambda A, p: A.pow(p).sum(1),    # F_sum^p(A) = Σ_c |A_c|^p
            'max': lambda A, p: A.pow(p).amax(1)}   # F_max^p(A) = max_c |A_c|^p


# ------------------------------------------------------------------ maps and losses

def at_least_float32(t: Tensor) -> Tensor:
    """float32, or double for doubles: the precision of the losses with every --dtype."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def attention_map(A: Tensor, mapping: str = 'sum', power: float = 2,
                  size: torch.Size | None = None) -> Tensor:
    """Activations (N, C, H, W) to attention maps (N, H·W) of unit L2 norm (section 3.1).

    `mapping` is one of MAPPINGS, with p = `power` ≥ 1. Maps are average-pooled to `size` (h, w),
    where given, before they are normalised.
    """
    A = at_least_float32(A) if power == 2 else at_least_float32(A).abs()
    if power > 2:  # high powers could overflow, and normalised maps do not depend on A's scale
        largest = A.detach().amax((1, 2, 3), keepdim=True)
        A = A / largest.clamp_min(torch.finfo(A.dtype).tiny)
    Q = MAPPINGS[mapping](A, power)                # (N, H, W)
    if size is not None and Q.shape[1:] != size:
        Q = F.adaptive_avg_pool2d(Q, size)         # (N, h, w)
    return F.normalize(Q.flatten(1))               # (N, h·w)


def common_size(A: Tensor, B: Tensor) -> torch.Size:
    """The smaller height and width of two groups (N, C, H, W)."""
    return torch.Size(map(min, A.shape[2:], B.shape[2:]))


def map_similarity(groups: Sequence[Tensor], teacher_groups: Sequence[Tensor],
                   mapping: str = 'sum', power: float = 2) -> Tensor:
    """The mean cosine similarity of two networks' maps, (groups,). Raises InputError."""
    if len(groups) != len(teacher_groups):
        raise InputError(f'maps of {len(groups)} and {len(teacher_groups)} groups differ in number')
    maps = [[attention_map(A, mapping, power, common_size(*pair)) for A in pair]
            for pair in zip(groups, teacher_groups, strict=True)]
    return torch.stack([(Q_S * Q_T).sum(1).mean() for Q_S, Q_T in maps])


def at_loss(student: Tensor, teacher: Tensor, mapping: str = 'sum', power: float = 2) -> Tensor:
    """Activation-based attention transfer between groups (N, C, H, W) and (N, C', H', W') (eq. 2).

    The mean of (Q_S/‖Q_S‖ − Q_T/‖Q_T‖)² over samples and positions, as in the published code; the
    paper has ½ and a norm that is not squared.
    """
    size = common_size(student, teacher)
    Q_S = attention_map(student, mapping, power, size)            # (N, h·w)
    Q_T = attention_map(teacher.detach(), mapping, power, size)
    return (Q_S - Q_T).square().mean()


def kd_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² KL(teacher ‖ student) of logits (N, K) at temperature T (Hinton et al., 2015)."""
    log_p = F.log_softmax(at_least_float32(student) / temperature, 1)
    log_q = F.log_softmax(at_least_float32(teacher.detach()) / temperature, 1)
    return F.kl_div(log_p, log_q, reduction='batchmean', log_target=True) * temperature ** 2


def activation_loss(student: Tensor, teacher: Tensor, adapter: Tensor | None = None) -> Tensor:
    """F-ActT: mean squared difference of unit-norm activations (N, C, H, W) (section 4.1.2).

    `adapter` (C', C, 1, 1) is a 1×1 convolution from the student's to the teacher's channels.
    """
    size = common_size(student, teacher)
    A_S, A_T = (A if A.shape[2:] == size else F.adaptive_avg_pool2d(A, size)
                for A in map(at_least_float32, (student, teacher.detach())))
    A_S = A_S if adapter is None else F.conv2d(A_S, adapter)                    # (N, C', h, w)
    return (F.normalize(A_S.flatten(1)) - F.normalize(A_T.flatten(1))).square().mean()


def input_gradient(logits: Tensor, x: Tensor, labels: Tensor, create_graph: bool = True) -> Tensor:
    """J = ∂ℓ/∂x (N, C, H, W), ℓ the sum over the batch of the cross-entropies (eq. 3)."""
    loss = F.cross_entropy(at_least_float32(logits), labels, reduction='sum')
    return at_least_float32(torch.autograd.grad(loss, x, create_graph=create_graph)[0])


def half_squared_norm(J: Tensor) -> Tensor:
    """½‖J‖², mean over samples. J (N, C, H, W) is, for gradient AT, J_S − J_T (eq. 4).

    For the symmetry norm it is J − flip(J(flip(x))) (eq. 6), for min-l2 J itself.
    """
    return J.square().flatten(1).sum(1).mean() / 2


# ------------------------------------------------------------------ the objective

def objective(f: Network, params: Params, teacher: Model | None, x: Tensor, y: Tensor,
              opt: Namespace, decay: float | Tensor = 1.0, adapters: Params | None = None
              ) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of images x (N, 3, H, W), (1 − α) CE + Σ weight · term, and a dict of metrics.

    The metrics are means over the batch. `teacher` is (f, params); without it the losses that need
    one are left out, and the weight of cross-entropy is 1. `decay` multiplies beta and factt.
    """
    gradient = uses_gradients(opt)
    if gradient:
        x = x.detach().requires_grad_()
    logits, groups = f(x, params, True)
    if teacher:
        with torch.set_grad_enabled(opt.grad_at > 0):
            t_logits, t_groups = teacher[0](x, teacher[1], False)
    chosen = opt.at_groups or range(len(groups))
    J = input_gradient(logits, x, y) if gradient else None
    ce = F.cross_entropy(at_least_float32(logits), y)
    loss, terms = (1 - opt.alpha if teacher else 1) * ce, {'ce_loss': ce}
    if opt.beta and teacher:
        at = terms['at_losses'] = torch.stack(
            [at_loss(groups[g], t_groups[g], opt.mapping, opt.power) for g in chosen])
        loss = loss + opt.beta * decay * at.sum()
    if opt.factt and teacher:
        act = terms['act_losses'] = torch.stack(
            [activation_loss(groups[g], t_groups[g], (adapters or {}).get(f'adapter{g}'))
             for g in chosen])
        loss = loss + opt.factt * decay * act.sum()
    if opt.alpha and teacher:
        terms['kd_loss'] = kd_loss(logits, t_logits, opt.temperature)
        loss = loss + opt.alpha * terms['kd_loss']
    if opt.grad_at and teacher:
        J_T = input_gradient(t_logits, x, y, create_graph=False)
        terms['grad_at_loss'] = half_squared_norm(J - J_T)
        loss = loss + opt.grad_at * terms['grad_at_loss']
    if opt.symmetry:
        m = x.detach().flip(3).requires_grad_()
        J_m = input_gradient(f(m, params, True)[0], m, y)
        terms['symmetry_loss'] = half_squared_norm(J - J_m.flip(3))
        loss = loss + opt.symmetry * terms['symmetry_loss']
    if opt.min_l2:
        terms['min_l2_loss'] = half_squared_norm(J)
        loss = loss + opt.min_l2 * terms['min_l2_loss']
    return loss, {'loss': loss, **accuracies(logits, y), **terms}


def accuracies(logits: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Of logits (N, K), in %: acc (top-1) and, where there are more than five classes, acc5."""
    correct = logits.topk(min(5, logits.shape[1]), 1).indices == y[:, None]     # (N, min(5, K))
    acc = {'acc': 100 * correct[:, 0].double().mean()}
    return acc | ({'acc5': 100 * correct.any(1).double().mean()} if logits.shape[1] > 5 else {})


# ------------------------------------------------------------------ options of the losses

def number(text: str) -> float:
    """An argparse type: a finite number from 0 on."""
    if not 0 <= float(text) < float('inf'):
        raise ArgumentTypeError(f'must be a finite number from 0 on, not {text}')
    return float(text)


def whole_number(text: str) -> int:
    """An argparse type: a whole number from 0 on; '4.0' is 4."""
    if not number(text).is_integer():
        raise ArgumentTypeError(f'must be a whole number, not {text}')
    return int(number(text))


def whole_numbers(text: str) -> list[int]:
    """An argparse type: '2,3' or '[2,3]' to [2, 3]."""
    return [whole_number(part) for part in text.strip('[] ').split(',') if part.strip()]


def add_loss_options(parser: ArgumentParser) -> None:
    add = parser.add_argument_group('losses: weights (0: off) and settings').add_argument
    add('--beta', default=0, type=number, help='attention transfer, AT')
    add('--factt', default=0, type=number, help='full-activation transfer, F-ActT')
    add('--alpha', default=0, type=number, help='distillation, KD; cross-entropy has 1 − alpha')
    add('--grad_at', default=0, type=number, help='gradient-based attention transfer')
    add('--symmetry', default=0, type=number, help='symmetry norm of the gradient at the image')
    add('--min_l2', default=0, type=number, help='norm of the gradient at the image')
    add('--temperature', default=4, type=number, help='of knowledge distillation')
    add('--mapping', default='sum', choices=MAPPINGS, help='channels to an attention map')
    add('--power', default=2, type=number, help='exponent p ≥ 1 of the attention map')
    add('--at_groups', type=whole_numbers, help='groups of beta and factt, such as 0,2')
    add('--at_epochs', type=whole_numbers, metavar='FIRST,END',
        help='use the teacher in epochs FIRST to END − 1, the first is 0 (default: all)')
    add('--beta_decay', default='none', choices=('none', 'step', 'linear', 'cosine'),
        help='schedule of beta and factt')


def uses_gradients(opt: Namespace) -> list[str]:
    """The losses on gradients whose weight is not 0."""
    return [name for name in GRADIENT_LOSSES if getattr(opt, name)]


def check_loss_options(parser: ArgumentParser, opt: Namespace, teacher: str) -> None:
    """Ends with the parser's error where losses and other options contradict each other."""
    losses = [name for name in TEACHER_LOSSES if getattr(opt, name)]
    if losses and not getattr(opt, teacher):
        parser.error(f'--{losses[0]} needs a teacher: --{teacher}')
    if getattr(opt, teacher) and not losses:
        parser.error(f'--{teacher} needs a loss: --{", --".join(TEACHER_LOSSES)}')
    if not (0 <= opt.alpha <= 1 and opt.power >= 1 and opt.temperature > 0):
        parser.error('--alpha must be from 0 to 1, --power 1 or more, --temperature above 0')
    if opt.at_epochs and not (len(opt.at_epochs) == 2
                              and opt.at_epochs[0] < opt.at_epochs[1] <= opt.epochs):
        parser.error('--at_epochs must be FIRST,END with FIRST < END, up to --epochs')
    if uses_gradients(opt) and (opt.compile or opt.dtype == 'half'):
        parser.error(f'--{uses_gradients(opt)[0]} works neither with --compile (torch.compile has '
                     'no double backward) nor with --dtype half (underflow)')


# ------------------------------------------------------------------ networks and teachers

def new_network(net: str, settings: dict[str, Any], num_classes: int, seed: int = 0
                ) -> tuple[Network, Params, dict[str, Any]]:
    """(f, params, network): a new network, and the dict that rebuilds it. Raises InputError."""
    settings = NETWORKS[net].settings(settings)
    try:
        f, params = NETWORKS[net].build(num_classes=num_classes, seed=seed, **settings)
    except ValueError as e:
        raise InputError(f'--net {net}: {e}') from None
    return f, params, {'net': net, 'num_classes': num_classes, **settings}


def label_of(network: dict[str, Any]) -> str:
    """The name of a network, such as WRN-16-2."""
    kind = NETWORKS[network['net']]
    return kind.label(**kind.settings(network))


def find_checkpoint(run: str | Path) -> Path:
    """The checkpoint of a run: in its folder, in a folder of this name under logs/, or a file."""
    if str(run) in PRETRAINED:
        return Path(run)
    places = (Path(run, CHECKPOINT), Path(run), Path('logs', run, CHECKPOINT), Path('logs', run))
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise InputError(f'there is no checkpoint {run}: train it first (looked for '
                         f'{", ".join(map(str, places))})')
    return path


def read_checkpoint(run: str | Path) -> dict[str, Any]:
    """The content of a run's checkpoint or another file of torch; no code in it is run.

    {} for torchvision's weights and HDF5 files, which weights.py reads. Raises InputError.
    """
    path = find_checkpoint(run)
    if path.suffix == '.hkl' or str(path) in PRETRAINED:
        return {}
    try:
        return dict(torch.load(path, map_location='cpu', weights_only=True))
    except Exception as e:  # torch raises many types for files that are damaged, or no checkpoints
        raise InputError(f'{path}: not a weight file, or damaged ({type(e).__name__})') from None


def load_network(run: str) -> tuple[Network, Params, dict[str, Any]]:
    """(f, params, state) of a run, a weight file, or 'torchvision'; nothing requires gradients.

    `state` is the file's content, with at least `network`. A file of your own needs `params` and
    `network`, see `new_network`. Raises InputError.
    """
    state = read_checkpoint(run)
    network = state.get('network')
    try:
        if isinstance(network, dict) and 'form' not in network:
            f, new, _ = new_network(network['net'], network, network['num_classes'])
            params = {name: at_least_float32(p.detach()) for name, p in state['params'].items()}
            shapes = {name: tuple(p.shape) for name, p in new.items()}
        else:
            import weights  # names and shapes of published files
            f, params, shapes, network = weights.load(str(find_checkpoint(run)), state)
    except Exception as e:  # a file may hold anything; HDF5 raises a dozen types
        what = 'not downloaded' if run in PRETRAINED else 'not a weight file, or damaged'
        raise InputError(f'{run}: {what} ({e!r})') from None
    for name in shapes | params:
        found, wanted = tuple(params[name].shape) if name in params else None, shapes.get(name)
        if found != wanted:
            raise InputError(f'{run}: {name} is {found or "missing"}, but {label_of(network)} has '
                             f'{wanted or "none"}')
        if not params[name].isfinite().all():
            raise InputError(f'{run}: {name} is not finite')
    return f, params, state | {'network': network}


def load_teacher(run: str) -> Model:
    """(f, params) of a run under logs/, a run's folder, or a weight file. Raises InputError."""
    return load_network(run)[:2]


@torch.no_grad()
def group_shapes(f: Network, params: Params, size: Sequence[int]) -> list[torch.Size]:
    """The shapes (C, H, W) of the groups, for images of size (H, W)."""
    x = torch.zeros(1, 3, *size, dtype=next(iter(params.values())).dtype)
    return [A.shape[1:] for A in f(x, params, False)[1]]


def moving_statistics(params: Params) -> list[Tensor]:
    """The running statistics of batch norm that is not frozen."""
    return [t for name, t in params.items() if name.endswith(STATISTICS)
            and params[name.rpartition('.')[0] + '.weight'].requires_grad]


def check_networks(opt: Namespace, f: Network, params: Params, teacher: Model | None,
                   size: Sequence[int]) -> Params:
    """Raises InputError where a loss cannot use the networks. `size` is the images' (H, W).

    Returns F-ActT's adapters, {'adapter{g}': (C', C, 1, 1)}, for groups whose channels differ.
    """
    student, teacher = group_shapes(f, params, size), teacher and group_shapes(*teacher, size)
    groups = opt.at_groups or range(len(student))
    if max(groups, default=-1) >= len(student):
        raise InputError(f'--at_groups {max(groups)}: the student has {len(student)} groups')
    if uses_gradients(opt) and moving_statistics(params):
        raise InputError(f'--{uses_gradients(opt)[0]} needs a network without batch norm, with '
                         'which the gradient at one image depends on the others: --net nin '
                         '--no-batch_norm, or --fix_batch_norm of imagenet.py')
    if not teacher or not (opt.beta or opt.factt):
        return {}
    if len(teacher) != len(student):
        raise InputError(f'the teacher has {len(teacher)} groups, the student {len(student)}')
    if opt.deterministic and any(student[g][1:] != teacher[g][1:] for g in groups):
        raise InputError('--deterministic: groups of different sizes are pooled, for which a GPU '
                         'has no deterministic algorithm')
    pairs = {g: (teacher[g][0], student[g][0]) for g in groups if teacher[g][0] != student[g][0]}
    shapes = {f'adapter{g}': (*pair, 1, 1) for g, pair in pairs.items()}
    return initialize(shapes, opt.seed) if opt.factt else {}


def check_classes(what: str, state: dict[str, Any], classes: Sequence[str]) -> None:
    """Raises InputError unless a network has these classes, or as many where names are unknown."""
    known = (state.get('data') or {}).get('classes') or classes
    if state['network']['num_classes'] != len(classes) or list(known) != list(classes):
        raise InputError(f'{what}: its {state["network"]["num_classes"]} classes are not the '
                         f'{len(classes)} of the data')
