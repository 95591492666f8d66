"""The method: attention maps, the losses of attention transfer and knowledge distillation, and teachers.

Paper: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv 1612.03928.

    teacher = load_teacher('resnet_16_2_teacher')                 # logs/resnet_16_2_teacher/model.pt7
    with torch.no_grad():
        teacher_logits, teacher_groups = teacher.f(x, teacher.params, training=False)
    loss, at_losses = transfer_loss(logits, groups, labels, teacher_logits, teacher_groups,
                                    alpha=0.9, temperature=4, beta=1e3, at_groups=(0, 1, 2))
"""
import os
import re
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet import (
    IMAGENET_BLOCKS,
    NIN_CONVS,
    STATISTICS,
    Network,
    Params,
    freeze,
    imagenet_resnet,
    imagenet_resnet_forward,
    imagenet_resnet_shapes,
    initialize,
    network_in_network,
    network_in_network_forward,
    network_in_network_shapes,
    trainable,
    wide_resnet,
    wide_resnet_forward,
    wide_resnet_shapes,
)

__all__ = ['InputError', 'Network', 'Params', 'Trained', 'activation_loss', 'at_loss', 'attention_map',
           'find_checkpoint', 'fold_batch_norm', 'freeze', 'gradient_at_loss', 'imagenet_resnet', 'input_gradient',
           'kd_loss', 'load_network', 'load_teacher', 'make_adapters', 'min_l2_loss', 'network_in_network',
           'new_classifier', 'read_checkpoint', 'symmetry_loss', 'trainable', 'transfer_loss', 'wide_resnet']

CHECKPOINT = 'model.pt7'  # the weights' file in a run's folder
TORCHVISION = {'torchvision': 'ResNet34_Weights', 'torchvision-18': 'ResNet18_Weights'}  # its own, by our names
ADAPTER = 'adapter'      # what the names of F-ActT's convolutions begin with
LARGEST_FILE = 2 ** 30   # bytes of weights: ten times a ResNet-34; a compressed file could hold any number


class InputError(ValueError):
    """Something a user gave does not work; the message is the one line to show."""


# ------------------------------------------------------------------------------------------- losses

def widen(t: Tensor) -> Tensor:
    """At least float32: losses are computed so, whatever the compute type."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def attention_map(A: Tensor, mapping: str = 'sum', power: float = 2, size: Sequence[int] | None = None) -> Tensor:
    """Activations (N, C, H, W) to attention maps (N, H·W), each of unit L2 norm (section 3.1).

    `mapping` is F_sum^p(A) = Σ_c |A_c|^p ('sum') or F_max^p(A) = max_c |A_c|^p ('max'), p = `power` ≥ 1.
    A map not of `size` (h, w) is average-pooled to it before it is normalised. Raises ValueError for another mapping.
    """
    if mapping not in ('sum', 'max'):
        raise ValueError(f"mapping {mapping!r}: must be 'sum' or 'max'")
    A = widen(A)
    if power != 2:  # a square needs no absolute value
        A = A.abs()
    if power > 2:  # the map does not depend on the scale, and high powers of large activations would be infinite
        A = A / A.detach().amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(A.dtype).tiny)
    A = A.pow(power)
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
                  at_groups: Sequence[int], mapping: str = 'sum', power: float = 2) -> tuple[Tensor, list[Tensor]]:
    """A student's whole loss, KD + β Σ_g AT_g, and its AT_g, each a scalar without β (section 4.1.1).

    Where alpha is 0 it is CE + β Σ_g AT_g, and the teacher may have other classes. What the teacher gives must be
    without a graph: nothing here detaches it.
    """
    loss = (kd_loss(logits, teacher_logits, labels, temperature, alpha) if alpha
            else F.cross_entropy(widen(logits), labels))
    at_losses = [at_loss(groups[g], teacher_groups[g], mapping, power) for g in at_groups]
    return loss + beta * sum(at_losses), at_losses


def activation_loss(student: Tensor, teacher: Tensor, adapter: Tensor | None = None) -> Tensor:
    """Full-activation transfer, F-ActT, from (N, C', H', W') to (N, C, H, W): a scalar (section 4.1.2).

    The mean over samples and elements of the squared difference, each sample's activations being of unit L2 norm.
    `adapter` (C', C, 1, 1) is the 1×1 convolution of a student whose width differs. Activations of unequal size are
    average-pooled to the smaller.
    """
    size = [min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    student, teacher = (widen(A) if list(A.shape[2:]) == size else F.adaptive_avg_pool2d(widen(A), size)
                        for A in (student, teacher))
    student = student if adapter is None else F.conv2d(student, adapter)  # (N, C', h, w)
    A_S, A_T = (F.normalize(A.flatten(1)) for A in (student, teacher))    # (N, C'·h·w)
    return (A_S - A_T).square().mean()


def make_adapters(groups: Sequence[Tensor], teacher_groups: Sequence[Tensor], at_groups: Sequence[int], seed: int
                  ) -> Params:
    """The 1×1 convolutions of `activation_loss`, adapter{g} (C', C, 1, 1), for those of at_groups whose widths differ.

    `groups` and `teacher_groups` are what the networks give for any input.
    """
    widths = {g: (teacher_groups[g].shape[1], groups[g].shape[1]) for g in at_groups}
    return initialize({f'{ADAPTER}{g}': (*pair, 1, 1) for g, pair in widths.items() if pair[0] != pair[1]}, seed)


def input_gradient(logits: Tensor, x: Tensor, labels: Tensor, create_graph: bool = True) -> Tensor:
    """J = ∂ℓ/∂x (N, C, H, W), ℓ the sum over the batch of the cross-entropies of logits (N, K) (eq. 3).

    x must require gradients and the logits have been computed from it. Without batch statistics each sample's J is
    its own gradient. With `create_graph` J can be differentiated, by double backpropagation.
    """
    loss = F.cross_entropy(widen(logits), labels, reduction='sum')
    return widen(torch.autograd.grad(loss, x, create_graph=create_graph)[0])


def gradient_at_loss(J_S: Tensor, J_T: Tensor) -> Tensor:
    """Gradient-based attention transfer, ½‖J_S − J_T‖², between gradients (N, C, H, W): a mean over samples (eq. 4)."""
    return (J_S - J_T.detach()).square().flatten(1).sum(1).mean() / 2


def symmetry_loss(J: Tensor, J_mirrored: Tensor) -> Tensor:
    """½‖J(x) − flip(J(flip(x)))‖², a mean over samples; `J_mirrored` is J(flip(x)), (N, C, H, W) (eq. 6).

    The flip is horizontal. It is zero for a network that sees an image and its mirror image alike.
    """
    return (J - J_mirrored.flip(3)).square().flatten(1).sum(1).mean() / 2


def min_l2_loss(J: Tensor) -> Tensor:
    """½‖J‖², a mean over samples of J (N, C, H, W): double backpropagation (Drucker & LeCun, 1992)."""
    return J.square().flatten(1).sum(1).mean() / 2


# ------------------------------------------------------------------------------------------- weight files

def read_checkpoint(path: str | Path) -> dict:
    """What `torch.save` wrote to `path`, on the CPU, without running any code from it.

    Raises InputError where there is no such file, or it is no checkpoint of tensors and plain values.
    """
    try:
        if zipfile.is_zipfile(path):  # torch.save compresses nothing: what grows when read is no file of its
            with zipfile.ZipFile(path) as file:
                if sum(part.file_size for part in file.infolist()) > os.path.getsize(path):
                    raise ValueError('it is compressed')
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


def read_hickle(path: str | Path) -> Params:
    """The arrays of a dict that hickle 2, 3, 4 or 5 wrote, by name, read array by array; nothing is unpickled.

    Raises InputError where the file is not one of those, or holds anything but numbers stored in it.
    """
    params = {}

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if isinstance(item, h5py.Group):
            return
        size = 4 * (item.size or 0) + sum(4 * t.numel() for t in params.values())
        numbers = item.shape is not None and item.dtype.kind in 'fiu'
        if not numbers or size > LARGEST_FILE or item.is_virtual or item.external:
            raise InputError(f'{path}: not the weights of a network: {name} is {item.dtype} of shape {item.shape}')
        params[name.partition('/')[0].strip('\'"')] = torch.from_numpy(np.asarray(item[()], dtype=np.float32))

    try:
        with h5py.File(path, 'r') as file:
            # hickle 2: data_0/NAME/data_0, 3: data_0/'NAME'/data_0, 4: data/'NAME'/data, 5: data/"NAME"
            top = next((name for name in ('data', 'data_0') if name in file), None)
            if top is None or not isinstance(file.get(top, getlink=True), h5py.HardLink):
                raise InputError(f'{path}: not a file that hickle wrote')
            file[top].visititems(visit)
    except (OSError, RuntimeError, KeyError, UnicodeError, AttributeError) as e:
        raise InputError(f'{path}: not an HDF5 file of weights, or a damaged one ({e})') from None
    return params


def read_weights(path: Path) -> tuple[Params, dict]:
    """The parameters in a weight file, named as in `resnet`, floats as float32.

    It may be a checkpoint of this code or the published one, a dict of parameters, torchvision's state dict, or
    the published exports (`.hkl`, or the same as a dict). With them come the options stored in it, if any. Raises
    InputError where it is none.
    """
    if path.suffix == '.hkl':
        return own_names(read_hickle(path)), {}
    state = read_checkpoint(path)
    params = state.get('params', state)
    if not isinstance(params, dict):
        raise InputError(f"{path}: not a checkpoint of this code: its 'params' are no dict")
    if isinstance(state.get('stats'), dict):  # early published files keep the running statistics apart
        params = params | state['stats']
    for name, tensor in params.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise InputError(f'{path}: not the weights of a network: {name!r} is no named tensor')
        if tensor.device.type != 'cpu' or tensor.is_complex():
            raise InputError(f'{path}: {name} is no tensor of real numbers')
        if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InputError(f'{path}: {name} is not stored in full')
    options = state.get('options')
    return (own_names({name: tensor.detach().float() for name, tensor in params.items()}),
            options if isinstance(options, dict) else {})


# ------------------------------------------------------------------------------------------- names

def torchvision_name(name: str) -> str:
    """The name in torchvision's state dict of a parameter of `imagenet_resnet`."""
    for ours, theirs in ((r'group(\d)\.block(\d+)', lambda m: f'layer{int(m[1]) + 1}.{m[2]}'),
                         (r'\bconvdim$', 'downsample.0.weight'), (r'\bbndim\.', 'downsample.1.'),
                         (r'\bconv1$', 'conv2.weight'), (r'\bconv0$', 'conv1.weight'),
                         (r'\bbn1\.', 'bn2.'), (r'\bbn0\.', 'bn1.')):
        name = re.sub(ours, theirs, name)
    return name


OF_TORCHVISION = {torchvision_name(name): name for name in imagenet_resnet_shapes((3, 4, 6, 3), 1, (2, 4, 8, 16), 1)}


def own_names(params: Params) -> Params:
    """Parameters under the names of `resnet`, from those of any file; what is unknown keeps its name.

    'student.' is taken off, and 'teacher.' left out. Folded files have `conv_dim`, the attention-transfer export
    has affines y = a·x + b.
    """
    if any(name.startswith('student.') for name in params):
        params = {name.removeprefix('student.'): t for name, t in params.items() if name.startswith('student.')}
    if 'layer1.0.conv1.weight' in params:
        params = {OF_TORCHVISION.get(name, name): t for name, t in params.items()
                  if not name.endswith('num_batches_tracked')}
    renamed = {}
    for name, tensor in params.items():
        name = re.sub(r'\baffine(\d)\b', r'bn\1', name).replace('affine_last', 'bn').replace('conv_dim', 'convdim')
        renamed[name] = tensor.reshape(-1, 1, 1) if name.endswith(('.a', '.b')) else tensor
    return renamed


def export_torchvision(params: Params) -> Params:
    """The state dict of torchvision's resnet18 or resnet34, from the parameters of `imagenet_resnet` at width 1."""
    exported = {torchvision_name(name): tensor.detach() for name, tensor in params.items()}
    for name in [name for name in exported if name.endswith('running_var')]:
        exported[name.replace('running_var', 'num_batches_tracked')] = torch.tensor(0)
    return exported


def is_torchvision(network: 'Trained') -> bool:
    """Whether a network is torchvision's resnet18 or resnet34: of width 1, with all its batch norm."""
    shapes = {name: tuple(t.shape) for name, t in network.params.items()}
    return any(shapes == imagenet_resnet_shapes(blocks, 64, (64, 128, 256, 512), network.num_classes)
               for blocks in IMAGENET_BLOCKS.values())


def export_folded(params: Params) -> Params:
    """The published naming of a folded ImageNet ResNet: `conv.{weight,bias}`, shortcuts `conv_dim`."""
    folded = {name if name.endswith(('.weight', '.bias')) else f'{name}.weight': tensor
              for name, tensor in fold_batch_norm(params).items()}
    return {name.replace('convdim', 'conv_dim'): tensor for name, tensor in folded.items()}


# ------------------------------------------------------------------------------------------- networks of files

@dataclass(frozen=True)
class Trained:
    """A trained network as it was read from a file."""
    f: Network
    params: Params
    name: str           # as WRN-16-2
    num_classes: int
    n_groups: int
    n_parameters: int   # trainable ones


def check_shapes(params: Params, expected: dict[str, tuple[int, ...]], optional: str, name: str, path: Path) -> None:
    """Raises InputError, with the first parameter that does not fit, where these are not those expected.

    Those whose name has the regular expression `optional` in it may be missing.
    """
    for key in [*expected, *params]:
        found, wanted = tuple(params[key].shape) if key in params else None, expected.get(key)
        if found != wanted and not (found is None and re.search(optional, key)):
            raise InputError(f'{path}: {key} is {found or "missing"}, but {name} has {wanted or "none"}')


def recognise_wide_resnet(params: Params, path: Path) -> Trained:
    """The Wide ResNet that has these parameters. Raises InputError where they are not those of one."""
    try:
        blocks = sum(f'group0.block{b}.conv0' in params for b in range(len(params)))
        num_classes, channels = params['fc.weight'].shape
        # int(c·w) = int(c·(int(64w)/64)) for c = 16, 32, 64: the last group's channels tell the width.
        depth, width = 6 * blocks + 4, channels / 64
        expected = wide_resnet_shapes(depth, width, num_classes)
    except (KeyError, ValueError) as e:
        raise InputError(f'{path}: not a Wide ResNet ({e})') from None
    name = f'WRN-{depth}-{width:g}'
    check_shapes(params, expected, '$^', name, path)
    f = partial(wide_resnet_forward, blocks=blocks)
    return Trained(f, params, name, num_classes, 3, count_trainable(params))


def recognise_imagenet_resnet(params: Params, path: Path) -> Trained:
    """The ImageNet ResNet, folded or not, that has these parameters. Raises InputError where there is none."""
    bare = {name.removesuffix('.weight'): tuple(t.shape) for name, t in params.items() if t.dim() == 4}
    blocks = tuple(sum(f'group{g}.block{b}.conv0' in bare for b in range(len(bare))) for g in range(4))
    depth = {counts: depth for depth, counts in IMAGENET_BLOCKS.items()}.get(blocks)
    try:
        num_classes, _ = params['fc.weight'].shape
        widths = [bare[f'group{g}.block0.conv1'][0] for g in range(4)]
        expected = imagenet_resnet_shapes(blocks, bare['conv0'][0], widths, num_classes)
    except (KeyError, ValueError) as e:
        raise InputError(f'{path}: not an ImageNet ResNet ({e})') from None
    if depth is None:
        raise InputError(f'{path}: a ResNet with {blocks} blocks; a ResNet-18 has 2, 2, 2, 2, a -34 3, 4, 6, 3')
    preactivation, optional = 'bn.a' in params, r'\.bndim\.'  # the published students had none
    if preactivation:
        expected = affine_shapes(expected)
    elif 'conv0.bias' in params:
        expected, optional = folded_shapes(expected), r'\.convdim\.bias$'
    name = f'ResNet-{depth}' + (f'-{widths[-1] / 512:g}' if widths[-1] != 512 else '')
    check_shapes(params, expected, optional, name, path)
    f = partial(imagenet_resnet_forward, blocks=blocks, preactivation=preactivation)
    return Trained(f, params, name, num_classes, 4, count_trainable(params))


def recognise_network_in_network(params: Params, path: Path, pool_relu: bool) -> Trained:
    """The NIN that has these parameters. Raises InputError where they are not those of one."""
    batch_norm = 'group0.bn0.weight' in params
    try:
        num_classes, channels = params['fc.weight'].shape
        widths = [len(params[name if batch_norm else f'{name}.weight']) for name in NIN_CONVS]
        expected = network_in_network_shapes(widths, num_classes, batch_norm)
    except (KeyError, ValueError, TypeError) as e:
        raise InputError(f'{path}: not a Network-in-Network ({e})') from None
    name = f'NIN-{channels / 192:g}'
    check_shapes(params, expected, '$^', name, path)
    f = partial(network_in_network_forward, pool_relu=pool_relu)
    return Trained(f, params, name, num_classes, 3, count_trainable(params))


def folded_shapes(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes once batch norm is folded into the convolutions."""
    folded = {name: shape for name, shape in shapes.items() if name.startswith('fc.')}
    for name, shape in shapes.items():
        if len(shape) == 4:
            folded |= {f'{name}.weight': shape, f'{name}.bias': shape[:1]}
    return folded


def affine_shapes(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the attention-transfer export, whose pre-activation blocks have affines for batch norm."""
    affine = {name: shape for name, shape in shapes.items() if len(shape) == 4 or name.startswith('fc.')}
    sizes = {'bn0': shapes['conv0'][0], 'bn': shapes['fc.weight'][1]}
    for name, shape in affine.items():
        if name.startswith('group') and name.endswith('conv0'):
            sizes[name.replace('conv0', 'bn0')], sizes[name.replace('conv0', 'bn1')] = shape[1], shape[0]
    del sizes['group0.block0.bn0']
    return affine | {f'{name}.{ab}': (size, 1, 1) for name, size in sizes.items() for ab in 'ab'}


def count_trainable(params: Params) -> int:
    return sum(p.numel() for name, p in params.items() if not name.endswith(STATISTICS))


def find_checkpoint(run: str | Path) -> Path:
    """The checkpoint of `run`: a run's folder, a file, or where there is neither a name under logs/.

    Raises InputError with the places it looked in.
    """
    candidates = dict.fromkeys([Path(run, CHECKPOINT), Path(run), Path('logs', run, CHECKPOINT), Path('logs', run)])
    for path in candidates:
        if os.path.isfile(path):  # False for an impossible name, too
            return path
    raise InputError(f'there is no checkpoint {run}: looked for {", ".join(map(str, candidates))}')


def load_network(run: str | Path) -> Trained:
    """A trained network; its architecture follows from its parameters' names and shapes.

    (And, where a NIN has no ReLU before its poolings, from the options in its checkpoint.)

    `run` is a name under logs/, a run's folder, or a weight file, of this code, the published one or torchvision; or
    'torchvision', which fetches its ResNet-34 ('torchvision-18': its ResNet-18). Raises InputError where the file or
    its contents do not fit.
    """
    if run in TORCHVISION:
        return recognise_imagenet_resnet(own_names(fetch_torchvision(TORCHVISION[run])), Path(run))
    path = find_checkpoint(run)
    params, options = read_weights(path)
    if 'group0.conv0' in params or 'group0.conv0.weight' in params:
        # Whether a ReLU precedes the poolings cannot be seen in the parameters.
        return recognise_network_in_network(params, path, options.get('pool_relu') is not False)
    stem = params.get('conv0', params.get('conv0.weight'))
    if stem is not None and stem.shape[2:] == (7, 7):
        return recognise_imagenet_resnet(params, path)
    return recognise_wide_resnet(params, path)


def new_classifier(network: Trained, num_classes: int, seed: int) -> tuple[Network, Params]:
    """A trained network to be fine-tuned: its parameters require gradients, and fc is new, drawn from the seed."""
    shapes = {'fc.weight': (num_classes, network.params['fc.weight'].shape[1]), 'fc.bias': (num_classes,)}
    params = {name: t.detach() if name.endswith(STATISTICS) else torch.nn.Parameter(t)
              for name, t in network.params.items()}
    return network.f, params | initialize(shapes, seed)


def fetch_torchvision(weights: str) -> Params:
    """torchvision's weights of that name for ImageNet, downloaded once. Raises InputError where they cannot be."""
    from torchvision import models  # here, because it takes seconds
    try:
        return getattr(models, weights).DEFAULT.get_state_dict(check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as e:
        raise InputError(f'torchvision could not fetch its weights ({e})') from None


def load_teacher(run: str | Path) -> Trained:
    """As `load_network`, with batch norm folded; nothing in it requires gradients."""
    trained = load_network(run)
    return replace(trained, params=fold_batch_norm(trained.params))


def fold_batch_norm(params: Params) -> Params:
    """The same network for evaluation: batch norm at its running statistics, folded where that is possible.

    Where it directly follows a convolution (all of an ImageNet ResNet or a NIN; `bn1` of a pre-activation block) it
    goes into that, as `conv.{weight,bias}`. Any other becomes the affine `name.{a,b}`, y = a·x + b, of shape
    (C, 1, 1). Computed in float64.
    """
    follows = {'bn0': 'conv0', 'bn1': 'conv1', 'bn2': 'conv2', 'bndim': 'convdim'}
    follows = {'bn1': 'conv0'} if 'bn.weight' in params else follows
    folded = {name: tensor.detach() for name, tensor in params.items()}
    for bn in [name.removesuffix('.running_var') for name in params if name.endswith('.running_var')]:
        weight, bias, mean, var = (folded.pop(f'{bn}.{name}').double() for name in ('weight', 'bias', *STATISTICS))
        scale = weight / torch.sqrt(var + 1e-5)  # (C,)
        shift = bias - mean * scale
        dtype = params[f'{bn}.weight'].dtype
        block, _, last = bn.rpartition('.')
        if last in follows:
            conv = f'{block}.{follows[last]}'.removeprefix('.')
            folded[f'{conv}.weight'] = (folded.pop(conv).double() * scale[:, None, None, None]).to(dtype)
            folded[f'{conv}.bias'] = shift.to(dtype)
        else:
            folded[f'{bn}.a'], folded[f'{bn}.b'] = (t.to(dtype)[:, None, None] for t in (scale, shift))
    return folded
