"""Command lines: the parser, its types, the options that both scripts share, and their checks."""
import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from training.errors import one_line
from utils import LOSSES, MAPPINGS, active_losses, losses_needing, teacher_losses
from weights import TORCHVISION, InputError, find_checkpoint, read_checkpoint

# Groups of options. With --resume those of RUN and DEVICES, and paths (PLACES), may be changed.
NETWORK, DATA, TRAINING, TRANSFER = 'network', 'data', 'training', 'losses'
AUGMENT = 'training images'
PLACES, RUN, DEVICES = 'where things are', 'run', 'devices'
# Options of RUN and DEVICES for training only; options of other groups that apply to testing, too.
TRAINING_ONLY = {'save', 'resume', 'overwrite', 'save_every', 'test_every', 'check_teacher',
                 'tensorboard', 'capture'}
ALSO_TESTING = {'dtype', 'batch_size', 'deterministic'}
MAX_WORKERS = 16  # largest default of --nthread; a worker reads about 600 images per second


# ---------------------------------------------------------------------------- parser and types

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends the default to a help text that does not state it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ''
        given = action.default is None or action.default is False or 'default' in text
        return text if given else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with one-line errors, exit status 2, and options in named groups."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter,
                         **{'usage': '%(prog)s [options]', **kwargs})
        self.needs: dict[str, tuple[str, ...]] = {}  # by option; see `adder`

    def error(self, message: str) -> NoReturn:
        self.exit(2, one_line(f'{self.prog}: error: {message}') + '\n')

    def adder(self, title: str) -> Callable[..., argparse.Action]:
        """A function that adds options to the group with this title.

        It takes the arguments of add_argument, and `needs`: the option does nothing unless at least
        one of these other options is on.
        """
        existing = next((g for g in self._action_groups if g.title == title), None)
        group = existing or self.add_argument_group(title)

        def add(*names: str, needs: tuple[str, ...] = (), **kwargs: Any) -> argparse.Action:
            action = group.add_argument(*names, **kwargs)
            self.needs |= {action.dest: needs} if needs else {}
            return action
        return add

    def given(self, argv: list[str] | None) -> dict[str, Any]:
        """Only the options that are on a command line, without defaults of others."""
        unset = dict.fromkeys((action.dest for action in self._actions), ...)
        parsed = vars(self.parse_args(argv, argparse.Namespace(**unset)))
        return {name: value for name, value in parsed.items() if value is not ...}

    def with_defaults(self, given: dict[str, Any]) -> argparse.Namespace:
        """All options: those given, and defaults for the rest."""
        return argparse.Namespace(**vars(self.parse_args([])) | given)

    def without_effect(self, opt: argparse.Namespace, given: dict[str, Any]) -> list[str]:
        """Options given, not equal to their default, that do nothing: all they need is off."""
        return [name for name, needs in self.needs.items()
                if given.get(name, self.get_default(name)) != self.get_default(name)
                and not any(getattr(opt, other) for other in needs)]

    def check_effect(self, opt: argparse.Namespace, given: dict[str, Any]) -> None:
        """Raises InputError for the first option without effect."""
        for name in self.without_effect(opt, given):
            *others, last = (f'--{other}' for other in self.needs[name])
            needed = f'{", ".join(others)} or {last}' if others else last
            raise InputError(f'--{name} does nothing without {needed}')

    def options_in(self, *titles: str) -> set[str]:
        """The names of the options in these groups."""
        return {a.dest for g in self._action_groups if g.title in titles for a in g._group_actions}

    def checked(self, name: str, value: Any) -> Any:
        """An option's value from a checkpoint, after the same checks as on the command line."""
        if value is None:
            return None
        action = next(a for a in self._actions if a.dest == name)
        flag = isinstance(action, argparse.BooleanOptionalAction) or action.nargs == 0
        if flag and type(value) is not bool:
            raise InputError(f'--{name}: must be true or false, not {value!r:.100}')
        try:
            value = value if flag else (action.type or str)(value)
        except (argparse.ArgumentTypeError, ValueError, TypeError) as e:
            raise InputError(f'--{name}: {e}') from None
        if action.choices and value not in action.choices:
            raise InputError(f'--{name}: must be one of {", ".join(map(str, action.choices))}')
        return value


def number(low: float, high: float = math.inf, *, above: bool = False, whole: bool = False
           ) -> Callable[[Any], float]:
    """An argparse type: a finite number ≥ `low` (`above`: > `low`) and ≤ `high`, perhaps whole."""
    wanted = f'{"a whole" if whole else "a"} number {"above" if above else "from"} {low:g}'
    wanted += '' if high == math.inf else f'{" and up" * above} to {high:g}'
    highest = min(high, 2 ** 63 - 1) if whole else high

    def parse(text: Any) -> float:
        try:
            value = float(text)
            if whole:  # 4.0 is 4, and a long number keeps all its digits
                value = int(text) if not value.is_integer() or abs(value) >= 2 ** 53 else int(value)
        except (ValueError, OverflowError):
            value = math.nan
        high_enough = low < value if above else low <= value
        if not high_enough or not value <= highest or value == math.inf:
            raise argparse.ArgumentTypeError(f'must be {wanted}, not {str(text)[:50]!r}')
        return value
    return parse


def milestones(text: Any) -> list[int]:
    """An argparse type: a JSON list of different epochs. Returns it sorted."""
    try:
        epochs = text if isinstance(text, list) else json.loads(text)
    except (ValueError, RecursionError):
        epochs = None
    wrong = not isinstance(epochs, list) or not all(type(e) is int and e > 0 for e in epochs)
    if wrong or len(set(epochs)) < len(epochs):
        raise argparse.ArgumentTypeError("must be a JSON list of different whole numbers above 0, "
                                         f"such as '[60,120,160]', not {str(text)[:50]!r}")
    return sorted(epochs)


def indices(text: Any) -> list[int]:
    """An argparse type: different whole numbers from 0 on, with commas between them."""
    parts = [str(i) for i in text] if isinstance(text, list) else str(text).split(',')
    if not all(p.strip().isdecimal() for p in parts) or len({int(p) for p in parts}) < len(parts):
        raise argparse.ArgumentTypeError("must be different whole numbers, such as '0,1', not "
                                         f'{str(text)[:50]!r}')
    return [int(p) for p in parts]


def path_or_none(text: Any) -> str | None:
    """An argparse type: a path. '' has the same effect as leaving the option out."""
    if text != '' and not str(text).strip():
        raise argparse.ArgumentTypeError('must name a folder or a file, but is blank')
    return str(text) or None


# ---------------------------------------------------------------------------- shared options

def add_options(parser: Parser, **defaults: Any) -> None:
    """Adds the options that both scripts share. `defaults`: {option: default of this script}."""
    add_training_options(parser)
    add_loss_options(parser)
    add_run_options(parser)
    add_device_options(parser)
    parser.set_defaults(**defaults)


def add_training_options(parser: Parser) -> None:
    add = parser.adder(TRAINING)
    add('--batch_size', type=number(1, 2 ** 31, whole=True), help='global batch size')
    add('--epochs', type=number(1, whole=True), help='epochs to train')
    add('--lr', type=number(0, above=True), help='learning rate before its first drop')
    add('--epoch_step', type=milestones, help='JSON list of epochs after which the lr drops')
    add('--lr_decay_ratio', type=number(0, 1, above=True),
        help='the lr is multiplied by this at each drop')
    add('--weight_decay', type=number(0), help='weight decay, on every trainable parameter')
    add('--seed', default=0, type=number(0, 2 ** 63 - 1, whole=True),
        help='random seed (default: 0)')
    add('--dtype', default='float', choices=('float', 'bfloat16', 'half', 'double'),
        help='compute type; parameters stay float32, except with double')
    add('--compile', action=argparse.BooleanOptionalAction,
        help='torch.compile the training step (default: yes on a GPU, except with losses on '
             'gradients)')
    add('--deterministic', action=argparse.BooleanOptionalAction,
        help='only use deterministic algorithms (default: yes with losses on gradients, else no)')


def add_loss_options(parser: Parser) -> None:
    add = parser.adder(TRANSFER)
    for loss in LOSSES:
        add(f'--{loss.flag}', default=0, type=number(0, 1 if loss.mixes else math.inf),
            metavar='WEIGHT', help=f'{loss.help}; 0: off')
    decaying = tuple(loss.flag for loss in LOSSES if loss.decays)
    grouped, mapped, softened = (tuple(loss.flag for loss in LOSSES if need in loss.needs)
                                 for need in ('groups', 'maps', 'temperature'))
    listed = {flags: ', '.join(f'--{flag}' for flag in flags) for flags in (decaying, grouped)}
    add('--beta_decay', default='none', choices=('none', 'step', 'linear', 'cosine'),
        needs=decaying, help=f'schedule of {listed[decaying]}: none, step (follows the lr), linear '
                             'or cosine (both to 0)')
    add('--temperature', default=4, type=number(0, 1e6, above=True), needs=softened,
        help='temperature T of knowledge distillation, --alpha')
    add('--at_groups', type=indices, needs=grouped,
        help=f'residual groups for {listed[grouped]}, the first is 0, for example 0,2 (default: '
             'all; imagenet.py: 2,3)')
    add('--at_epochs', type=indices, metavar='FIRST,END', needs=teacher_loss_flags(),
        help='use the teacher only in epochs FIRST to END − 1; the first epoch is 0 (default: all)')
    add('--mapping', default='sum', choices=MAPPINGS, needs=(*mapped, 'evaluate'),
        help='how the channels are combined into an attention map')
    add('--power', default=2, type=number(1, 100), needs=(*mapped, 'evaluate'),
        help='exponent p of the attention maps, applied to the absolute activations')


def teacher_loss_flags() -> tuple[str, ...]:
    """The options that are weights of losses that take a teacher."""
    return tuple(loss.flag for loss in LOSSES if loss.needs_teacher)


def add_run_options(parser: Parser) -> None:
    add = parser.adder(RUN)
    add('--save', type=path_or_none, metavar='FOLDER',
        help='folder for log and checkpoint (default: logs/NAME, with a NAME made of the settings)')
    add('--save_every', type=number(1, whole=True), metavar='N',
        help='save a checkpoint also every N steps')
    add('--overwrite', action='store_true',
        help='replace an existing run in --save, when the first new checkpoint is written')
    add('--resume', type=path_or_none, metavar='RUN', help='continue this run, with its options')
    add('--evaluate', type=path_or_none, nargs='?', const=True, metavar='RUN',
        help='only test this run or weight file (without RUN: the teacher). With both RUN and a '
             'teacher, also print the similarity of their attention maps')
    add('--test_every', default=1, type=number(1, whole=True), metavar='N',
        help='test after every N epochs, and after the last')
    add('--check_teacher', action=argparse.BooleanOptionalAction, default=True,
        help='test the teacher before the first epoch (default: yes)')
    add('--tensorboard', action='store_true', help='also write the metrics for TensorBoard')


def add_device_options(parser: Parser) -> None:
    add = parser.adder(DEVICES)
    add('--ngpu', default=1, type=number(0, whole=True),
        help='number of GPUs, if there are any; 0: CPU')
    add('--gpu_id', type=indices, help='which GPUs, for example 0,1 (default: the first --ngpu)')
    add('--cuda', action='store_true', help='fail if there is no GPU')
    add('--capture', action=argparse.BooleanOptionalAction,
        help='launch the training step as one CUDA graph (default: on one GPU)')
    add('--nthread', type=number(0, whole=True),
        help='data loader workers per rank (cifar.py: threads that read image files); 0: none '
             f'(default: CPU cores per rank, at most {MAX_WORKERS})')


# ---------------------------------------------------------------------------- parsing

def parse_options(parser: Parser, given: dict[str, Any], teacher: str
                  ) -> tuple[argparse.Namespace, dict | None]:
    """All options, completed from those `given`, and the checkpoint of --resume, or None.

    Options that are not given come from the checkpoint of --resume, all but RUN and DEVICES, or of
    --evaluate, all but RUN, DEVICES, losses and the teacher; else they have their defaults.
    `teacher` is the option that names the teacher. Raises InputError.
    """
    opt, state = parser.with_defaults(given), None
    if opt.evaluate:
        check_tested(parser, given)
        run = getattr(opt, teacher) if opt.evaluate is True else opt.evaluate
        if run is None:
            raise InputError(f'--evaluate: name what to test, as its value or with --{teacher}')
        not_stored = parser.options_in(RUN, DEVICES, TRANSFER) | {teacher, 'student_params'}
        stored = {k: v for k, v in stored_options(parser, run).items() if k not in not_stored}
        opt = parser.with_defaults(stored | given | {'evaluate': run})
    elif opt.resume:
        path = find_checkpoint(opt.resume)
        state = read_checkpoint(path)
        stored = resumable_options(parser, state, path)
        not_kept = parser.options_in(RUN, DEVICES)
        kept = {k: v for k, v in stored.items() if k not in not_kept and v is not None}
        opt = parser.with_defaults(kept | given)
        check_resumable(parser, opt, stored, path)
        opt.save = opt.save or str(path.parent)
    parser.check_effect(opt, given)
    return opt, state


def resumable_options(parser: Parser, state: dict, path: Path) -> dict:
    """The options in a checkpoint. Raises InputError if it cannot be resumed by this script."""
    resumable = {'params', 'optimizer', 'epoch', 'rng'} <= state.keys()
    if not isinstance(state.get('options'), dict) or not resumable:
        raise InputError(f'{path}: holds no state to resume from (it can only be tested, or be a '
                         'teacher)')
    known = parser.with_defaults({})
    if foreign := [name for name in state['options'] if name not in known]:
        raise InputError(f'{path}: written by another script or version: there is no '
                         f'--{foreign[0]} here')
    return checked_options(parser, state['options'], path)


def checked_options(parser: Parser, stored: dict[str, Any], path: Path) -> dict[str, Any]:
    """Options from a file, each checked. Raises InputError, which names file and option."""
    try:
        return {name: parser.checked(name, value) for name, value in stored.items()}
    except InputError as e:
        raise InputError(f'{path}: {e}') from None


def check_tested(parser: Parser, given: dict[str, Any]) -> None:
    """Raises InputError for an option that does nothing with --evaluate."""
    used = ALSO_TESTING | {name for name, needs in parser.needs.items() if 'evaluate' in needs}
    idle = (parser.options_in(NETWORK, AUGMENT, TRAINING, TRANSFER) - used) | TRAINING_ONLY
    if wrong := [name for name in given if name in idle and given[name] is not None]:
        raise InputError(f'--{wrong[0]} does nothing with --evaluate, which does not train')


def stored_options(parser: Parser, run: str) -> dict:
    """The options in a checkpoint that this parser knows; {} for a file that stores none."""
    path = None if run in TORCHVISION else find_checkpoint(run)
    stored = read_checkpoint(path).get('options') if path and path.suffix != '.hkl' else None
    known = parser.with_defaults({})
    if not isinstance(stored, dict):
        return {}
    ours = {k: v for k, v in stored.items() if k in known and v is not None}
    return checked_options(parser, ours, path)


def check_resumable(parser: Parser, opt: argparse.Namespace, stored: dict, path: Path) -> None:
    """Raises InputError if an option that affects the result differs from the checkpoint's."""
    changeable, movable = parser.options_in(RUN, DEVICES), parser.options_in(PLACES)
    for name, old in stored.items():
        new = getattr(opt, name)
        longer = name == 'epochs' and new > old and opt.beta_decay not in ('linear', 'cosine')
        moved = name in movable and None not in (old, new)
        if new != old and not (name in changeable or moved or longer):
            raise InputError(f'--{name} is {old} in {path}, and {new} now: a resumed run keeps its '
                             'options; only --epochs may grow, if --beta_decay is none or step')


# ---------------------------------------------------------------------------- what options mean

def learning_rate(opt: argparse.Namespace, epoch: int) -> float:
    """The learning rate in an epoch (the first is 0). epoch_step counts completed epochs."""
    return opt.lr * opt.lr_decay_ratio ** sum(epoch >= milestone for milestone in opt.epoch_step)


def beta_decay(opt: argparse.Namespace, epoch: int) -> float:
    """The factor of β in an epoch (the first is 0). Section 4.1.1 decays β; how, is our choice."""
    progress = epoch / opt.epochs
    return {'none': 1.0, 'step': learning_rate(opt, epoch) / opt.lr, 'linear': 1 - progress,
            'cosine': (1 + math.cos(math.pi * progress)) / 2}[opt.beta_decay]


def options_at(opt: argparse.Namespace, epoch: int) -> argparse.Namespace:
    """The options in an epoch (the first is 0): outside --at_epochs, no losses with a teacher."""
    first, end = opt.at_epochs or (0, opt.epochs)
    off = {} if first <= epoch < end else {loss.flag: 0 for loss in teacher_losses(opt)}
    return argparse.Namespace(**vars(opt) | off)


def fill_shared_defaults(opt: argparse.Namespace) -> None:
    """Sets the defaults that depend on other options, for options that both scripts share."""
    if opt.deterministic is None:
        opt.deterministic = bool(losses_needing(opt, 'gradient'))
    if opt.nthread is None:
        given = os.environ.get('LOCAL_WORLD_SIZE', '')  # `rank_from_environment` checks it
        ranks = max(1, int(given) if given.isdecimal() else opt.ngpu)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        opt.nthread = min(MAX_WORKERS, max(1, cores // ranks))


def check_losses(opt: argparse.Namespace, teacher: str) -> None:
    """Raises InputError for losses that other options contradict.

    `teacher` is the option that names the teacher.
    """
    if losses := losses_needing(opt, 'gradient'):
        if opt.compile:
            raise InputError(f'--compile: torch.compile cannot differentiate twice, as '
                             f'--{losses[0].flag} needs')
        if opt.dtype == 'half':
            raise InputError(f'--dtype half: the gradients in --{losses[0].flag} would underflow')
    mixed = sum(getattr(opt, loss.flag) for loss in active_losses(opt) if loss.mixes)
    if mixed > 1:
        raise InputError('cross-entropy has the weight 1 − the sum of '
                         + ', '.join(f'--{loss.flag}' for loss in LOSSES if loss.mixes)
                         + f', which must be at most 1, not {mixed:g}')
    if opt.at_epochs and (len(opt.at_epochs) != 2 or not
                          opt.at_epochs[0] < opt.at_epochs[1] <= opt.epochs):
        raise InputError('--at_epochs: must be two numbers FIRST,END with FIRST < END, up to '
                         f'--epochs, {opt.epochs}')
    if (losses := teacher_losses(opt)) and getattr(opt, teacher) is None:
        raise InputError(f'--{losses[0].flag} needs a teacher: name it with --{teacher}')


def settings_name(opt: argparse.Namespace, network: str, teacher: str | None) -> str:
    """The default of --save: logs/ and a name made of the settings."""
    parts = [opt.dataset, network]
    for loss in active_losses(opt):
        parts.append(f'{loss.label.replace(" ", "-")}{getattr(opt, loss.flag):g}')
        if 'maps' in loss.needs and (opt.mapping, opt.power) != ('sum', 2):
            parts.append(f'{opt.mapping}{opt.power:g}')
    parts += [f'from_{Path(teacher).stem}'] if teacher else []
    return f'logs/{"_".join(parts)}_seed{opt.seed}'
