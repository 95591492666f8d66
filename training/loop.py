"""The training loop: a step, an epoch, evaluation, `train`; and `execute`, for the scripts."""
import argparse
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from resnet import Network, Params, trainable
from training.distributed import (
    Rank,
    average_statistics,
    data_parallel,
    launch,
    moving_statistics,
    to_device,
)
from training.graph import recorded, with_fallback
from training.log import Totals
from training.memory import check_step
from training.options import (
    beta_decay,
    check_losses,
    learning_rate,
    options_at,
    settings_name,
)
from training.runs import Run, check_save, fingerprint, resumes_in_place, run_folder
from utils import (
    ADAPTER,
    InputError,
    Model,
    accuracies,
    attention_map,
    common_size,
    load_model,
    load_teacher,
    losses_needing,
    make_adapters,
    objective,
    teacher_losses,
)
from weights import CHECKPOINT, check_not_an_input

AUTOCAST = {'bfloat16': torch.bfloat16, 'half': torch.float16}


class Data(Protocol):
    """What the loop needs of a data set. Each rank gets its own shard, on its device."""
    num_classes: int
    n_train: int
    n_test: int
    size: tuple[int, int]  # height and width of the images

    def train_batches(self, epoch: int, start: int) -> Iterable[tuple[Tensor, Tensor, int, int]]:
        """From batch `start` on: images (n, 3, H, W), labels (n,), the number of samples that count
        on this rank (0 for a placeholder), and the global batch size."""

    def test_batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Images (n, 3, H, W) and labels (n,)."""

    def close(self) -> None:
        """Ends the data loader workers, if there are any."""


@dataclass(frozen=True)
class Task:
    """What a script trains: the student, its data, and the names of its teacher and start."""
    student: Model
    num_classes: int                      # of the data
    load_data: Callable[[Rank], Data]
    teacher: str | None                   # the run or file
    teacher_option: str                   # the option that names it
    start: str | None = None              # the run or file that training starts from


# ---------------------------------------------------------------------------- one step

def autocast(f: Network, dtype: str, device: torch.device) -> Network:
    """The network, computing in the type `dtype`."""
    def run(x: Tensor, params: Params, training: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.autocast(device.type, AUTOCAST.get(dtype), enabled=dtype in AUTOCAST):
            return f(x.double() if dtype == 'double' else x, params, training)
    return run


def make_optimizer(opt: argparse.Namespace, params: Params, device: torch.device
                   ) -> torch.optim.SGD:
    """SGD with momentum 0.9, no Nesterov, weight decay on all that is trained.

    Its momenta start as zeros: fused SGD leaves them uninitialised if a GradScaler skips the first
    step. Its learning rate is a tensor, for the CUDA graph; fused SGD needs float32 on a GPU.
    """
    dtype = torch.float if device.type == 'cuda' else torch.double
    optimizer = torch.optim.SGD(trainable(params).values(), opt.lr, momentum=0.9,
                                weight_decay=opt.weight_decay, fused=True)
    optimizer.param_groups[0]['lr'] = torch.tensor(opt.lr, dtype=dtype, device=device)
    for p in trainable(params).values():
        optimizer.state[p]['momentum_buffer'] = torch.zeros_like(p)
    return optimizer


def wants_compile(opt: argparse.Namespace, rank: Rank) -> bool:
    """Whether to torch.compile: --compile, or by default on a GPU without losses on gradients."""
    compilers = (os.environ.get('CXX'), os.environ.get('CC'), 'g++', 'gcc', 'clang', 'cc')
    if opt.compile and not any(shutil.which(c) for c in compilers if c):
        raise InputError('--compile: there is no C++ compiler on this machine')
    # torch.compile has no double backward, which losses on gradients need.
    by_default = rank.device.type == 'cuda' and not losses_needing(opt, 'gradient')
    return by_default if opt.compile is None else opt.compile


def wants_capture(opt: argparse.Namespace, rank: Rank) -> bool:
    """Whether to launch a step as one CUDA graph: --capture, or by default on a single GPU."""
    obstacle = ('needs a GPU, and there is none' if rank.device.type != 'cuda' else
                'works on one GPU, not on several' if rank.world > 1 else None)
    if opt.capture and obstacle:
        raise InputError(f'--capture: {obstacle}')
    return opt.capture is not False and not obstacle


def forward_backward(run: Run, forward: Callable, *batch: Any) -> dict[str, Tensor]:
    """Runs a batch forward and backward; returns its metrics."""
    run.optimizer.zero_grad()
    loss, metrics = forward(*batch)
    run.scaler.scale(loss).backward()
    return metrics


def make_step(opt: argparse.Namespace, run: Run, f: Network, teacher: Model | None
              ) -> Callable[[Tensor, Tensor, int, int, Tensor], None]:
    """The training step: a batch through the networks, the objective, backward, SGD.

    It updates the run's parameters and the Totals that the run has when `make_step` is called. It
    never waits for the GPU.
    """
    rank, device, totals = run.rank, run.rank.device, run.totals
    t = (autocast(teacher.f, opt.dtype, device), teacher.params) if teacher_losses(opt) else None
    f = autocast(f, opt.dtype, device)

    def forward(x: Tensor, y: Tensor, n: int, n_global: int, decay: Tensor
                ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = objective(f, run.params, t, x, y, opt, decay)
        # DDP averages gradients over ranks. The factor makes that the mean over the global batch.
        loss = loss * (rank.world * n / n_global)
        return loss, {name: v.detach().double() for name, v in metrics.items()}

    adapters = bool(losses_needing(opt, 'adapters'))  # DDP would wait for unused ones
    forward = data_parallel(forward, {name: p for name, p in trainable(run.params).items()
                                      if adapters or not name.startswith(ADAPTER)}, rank)
    eager = fast = partial(forward_backward, run, forward)
    if wants_compile(opt, rank):
        # combo_kernels: several independent small operations in one kernel; only for GPUs.
        compiled = torch.compile(forward, dynamic=False,
                                 options={'combo_kernels': device.type == 'cuda'})
        fast = with_fallback(partial(forward_backward, run, compiled), eager,
                             moving_statistics(run.params), rank.print)

    whole = rank.shard(torch.empty(1).expand(opt.batch_size))[1]  # `expand` takes no memory

    def step(x: Tensor, y: Tensor, n: int, n_global: int, decay: Tensor) -> None:
        # Smaller batches (the last, or with skipped images) run eagerly: no second compilation.
        usual = (n, n_global) == (whole, opt.batch_size)
        metrics = (fast if usual else eager)(x, y, n, n_global, decay)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        totals.add(metrics, n)
    return recorded(step, rank.print) if wants_capture(opt, rank) else step


# ---------------------------------------------------------------------------- epochs

def train_epoch(step: Callable[..., None], data: Data, run: Run) -> dict[str, Any]:
    """Trains the rest of an epoch.

    Returns the objective's metrics as means over the whole epoch, and train_time, the seconds that
    this call took.
    """
    begin, opt, totals = time.perf_counter(), run.opt, run.totals
    decay = torch.tensor(beta_decay(opt, run.epoch), device=run.rank.device)
    label = f'epoch {run.epoch + 1}/{opt.epochs}'
    done = min(run.step * opt.batch_size, data.n_train)
    hidden = None if run.rank.rank == 0 else True  # None: hidden unless stderr is a terminal
    with tqdm(total=data.n_train, initial=done, desc=label, unit='img', leave=False,
              disable=hidden) as bar:
        for x, y, n, n_global in data.train_batches(run.epoch, run.step):
            step(x, y, n, n_global, decay)
            totals.count += n
            run.step += 1
            bar.update(n_global)
            if run.rank.device.type == 'cpu' and not bar.disable:  # on a GPU this would wait for it
                loss = totals.flat[0] / max(totals.count, 1)
                bar.set_postfix_str(f'loss {loss:.3f}', refresh=False)
            run.after_step()
    metrics = totals.means(run.rank)
    if not math.isfinite(metrics['loss']):
        run.diverged()
    return for_log('train', metrics, data.n_train, begin)


def for_log(part: str, metrics: dict[str, Any], n: int, begin: float) -> dict[str, Any]:
    """Renames means for the log by `part` ('train' or 'test'); adds the time and skipped images."""
    skipped = n - metrics.pop('count')
    metrics = {f'{part}_{k}' if k in ('loss', 'acc', 'acc5') else k: v for k, v in metrics.items()}
    return metrics | {f'{part}_time': time.perf_counter() - begin} | (
        {f'{part}_skipped': skipped} if skipped else {})


@torch.no_grad()
def evaluate(model: Model, data: Data, opt: argparse.Namespace, rank: Rank,
             teacher: Model | None = None) -> dict[str, Any]:
    """Figures over all test samples: test_loss (cross-entropy), test_acc, test_acc5 (%), test_time.

    With a teacher also map_similarity: for each group the mean cosine similarity between the two
    networks' attention maps.
    """
    begin, totals = time.perf_counter(), Totals()
    f = autocast(model.f, opt.dtype, rank.device)
    for x, y in data.test_batches():
        logits, groups = f(x, model.params, False)
        metrics = {'loss': F.cross_entropy(logits.float(), y), **accuracies(logits, y)}
        if teacher:
            t_groups = autocast(teacher.f, opt.dtype, rank.device)(x, teacher.params, False)[1]
            metrics['map_similarity'] = map_similarity(groups, t_groups, opt.mapping, opt.power)
        totals.add(metrics, len(y))
        totals.count += len(y)
    return for_log('test', totals.means(rank), data.n_test, begin)


def map_similarity(groups: tuple[Tensor, ...], t_groups: tuple[Tensor, ...], mapping: str,
                   power: float) -> Tensor:
    """The mean cosine similarity of each group's maps with the teacher's: (groups,)."""
    def one(A: Tensor, B: Tensor) -> Tensor:
        size = common_size(A, B)
        Q_A = attention_map(A, mapping, power, size)  # (N, h·w)
        Q_B = attention_map(B, mapping, power, size)
        return (Q_A * Q_B).sum(1).mean()
    return torch.stack([one(A, B) for A, B in zip(groups, t_groups, strict=True)])


def format_errors(record: dict) -> str:
    """The test errors of a record, in words."""
    text = f'test error {100 - record["test_acc"]:.2f}%'
    return text + (f' (top-5 {100 - record["test_acc5"]:.2f}%)' if 'test_acc5' in record else '')


def summary(metrics: dict) -> str:
    """An epoch's metrics in words."""
    train_error = 100 - metrics['train_acc']
    text = (f'train loss {metrics["train_loss"]:.4f}, train error {train_error:.2f}%, '
            f'{metrics["train_time"]:.1f} s')
    if 'test_acc' in metrics:
        text += f'; {format_errors(metrics)}, {metrics["test_time"]:.1f} s'
    return text


def describe(what: str, model: Model, data: Data, opt: argparse.Namespace, rank: Rank,
             teacher: Model | None = None) -> None:
    """Prints a trained network's name, its test error, and how similar its maps are to a teacher's.

    Does not test it if it has another number of classes than the data.
    """
    text = f'{what}: {model.name}, {model.n_parameters:,} parameters'
    if model.num_classes != data.num_classes:
        rank.print(f'{text}, not tested: it has {model.num_classes} classes, '
                   f'the data {data.num_classes}')
        return
    test = evaluate(model, data, opt, rank, teacher)
    rank.print(f'{text}, {format_errors(test)} on {data.n_test:,} images, '
               f'loss {test["test_loss"]:.4f}')
    if teacher:
        values = ', '.join(f'{v:.4f}' for v in test['map_similarity'])
        rank.print(f'mean cosine similarity of the attention maps with those of {teacher.name}, '
                   f'group by group: {values}')


# ---------------------------------------------------------------------------- a run

def train(run: Run, student: Model, data: Data, teacher: Model | None) -> None:
    """Trains the remaining epochs. Each adds a record to the log."""
    opt, rank, steps = run.opt, run.rank, {}
    if run.epoch >= opt.epochs and not resumes_in_place(opt):
        run.save()  # a finished run, resumed with another --save: it is only copied
    while run.epoch < opt.epochs:
        lr, now = learning_rate(opt, run.epoch), options_at(opt, run.epoch)
        run.optimizer.param_groups[0]['lr'].fill_(lr)
        if (with_teacher := bool(teacher_losses(now))) not in steps:
            run.totals = Totals() if steps else run.totals
            steps[with_teacher] = run.totals, make_step(now, run, student.f, teacher)
        run.totals, step = steps[with_teacher]
        metrics = train_epoch(step, data, run)
        average_statistics(run.params, rank)
        if (run.epoch + 1) % opt.test_every == 0 or run.epoch + 1 == opt.epochs:
            metrics |= evaluate(replace(student, params=run.params), data, opt, rank)
        record = vars(opt) | {'epoch': run.epoch + 1, 'lr': lr} | metrics
        run.after_epoch(record | run_info(run, student, data))
        if opt.tensorboard and rank.rank == 0:
            write_events(opt.save, run.epoch, metrics | {'lr': lr})
        rank.print(f'epoch {run.epoch}/{opt.epochs}: lr {lr:g}, {summary(metrics)}')
        run.stop_if_told()
    rank.print(f'{opt.save}: all {opt.epochs} epochs are done')


def run_info(run: Run, student: Model, data: Data) -> dict[str, Any]:
    """The entries of a record on the network, the data and the machine."""
    own = [p.numel() for name, p in trainable(run.params).items() if not name.startswith(ADAPTER)]
    return {'network': student.name, 'n_parameters': sum(own), 'num_classes': data.num_classes,
            'device': str(run.rank), 'torch': torch.__version__}


def summary_writer() -> type:
    """torch's writer for TensorBoard. Raises InputError if that is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # imported here: that takes seconds
    except ImportError:
        raise InputError('--tensorboard: not installed: pip install tensorboard') from None
    return SummaryWriter


def write_events(folder: str, epoch: int, metrics: dict[str, Any]) -> None:
    """Writes an epoch's metrics for TensorBoard. Epoch 1 deletes files of a previous run."""
    for old in Path(folder).glob('events.out.tfevents.*') if epoch == 1 else ():
        old.unlink()
    with summary_writer()(folder, purge_step=epoch) as events:
        for name, value in metrics.items():
            several = isinstance(value, list)
            for i, scalar in enumerate(value if several else [value]):
                events.add_scalar(f'{name}/{i}' if several else name, scalar, epoch)


# ---------------------------------------------------------------------------- a script's work

def execute(opt: argparse.Namespace, state: dict | None, task: Task) -> None:
    """Tests or trains, as the options say. Wrong options raise InputError before any work."""
    if opt.evaluate:
        model = load_model(opt.evaluate)
        check_classes(opt.evaluate, model, task.num_classes)
        teacher = load_teacher(task.teacher) if task.teacher not in (None, opt.evaluate) else None
        check_groups_agree(opt.evaluate, model, task.teacher, teacher)
        launch(partial(test_only, opt, task, model, teacher), opt)
        return
    check_options(opt, task)
    if opt.tensorboard:
        summary_writer()
    opt.save = opt.save or settings_name(opt, task.student.name, task.teacher)
    check_save(opt)
    check_not_an_input('--save', Path(opt.save, CHECKPOINT), [task.teacher, task.start])
    launch(partial(train_student, opt, state, task, check_teacher(opt, task)), opt)


def check_options(opt: argparse.Namespace, task: Task) -> None:
    """Checks the options of a run, except its folder and teacher. Raises InputError."""
    check_losses(opt, task.teacher_option)
    student = task.student
    if (losses := losses_needing(opt, 'gradient')) and moving_statistics(student.params):
        raise InputError(f'--{losses[0].flag}: {student.name} has batch norm, through which the '
                         'gradient at one sample depends on the others: use a network without it '
                         '(cifar.py --net nin --no-batch_norm), or imagenet.py --fix_batch_norm')
    if max(opt.at_groups) >= student.n_groups:
        raise InputError(f'--at_groups {max(opt.at_groups)}: the student has {student.n_groups} '
                         'groups, counted from 0')


def check_teacher(opt: argparse.Namespace, task: Task) -> Model | None:
    """Loads the teacher. Raises InputError if a loss cannot use its groups or classes."""
    if task.teacher is None:
        return None
    teacher = load_teacher(task.teacher)
    if losses := losses_needing(opt, 'groups'):
        check_groups_agree(f'--{losses[0].flag}: the student', task.student, task.teacher, teacher)
    if losses := losses_needing(opt, 'logits'):
        check_classes(f'--{losses[0].flag}: the teacher {task.teacher}', teacher, task.num_classes)
    return teacher


def check_classes(what: str, model: Model, num_classes: int) -> None:
    if model.num_classes != num_classes:
        raise InputError(f'{what} has {model.num_classes} classes, the data {num_classes}')


def check_groups_agree(what: str, model: Model, run: str | None, teacher: Model | None) -> None:
    if teacher and model.n_groups != teacher.n_groups:
        raise InputError(f'{what} has {model.n_groups} groups, '
                         f'the teacher {run} {teacher.n_groups}')


def on_device(model: Model | None, rank: Rank, dtype: str) -> Model | None:
    return model and replace(model, params=to_device(model.params, rank.device, dtype == 'double'))


def test_only(opt: argparse.Namespace, task: Task, model: Model, teacher: Model | None,
              rank: Rank) -> None:
    with closing(task.load_data(rank)) as data:
        describe(opt.evaluate, on_device(model, rank, opt.dtype), data, opt, rank,
                 on_device(teacher, rank, opt.dtype))


def train_student(opt: argparse.Namespace, state: dict | None, task: Task, teacher: Model | None,
                  rank: Rank) -> None:
    # Options that need what this machine lacks raise InputError here, before any work.
    if not wants_capture(opt, rank) and opt.capture is None and rank.device.type == 'cuda':
        rank.print('several GPUs: the training step is not recorded as a CUDA graph')
    compiled, student = wants_compile(opt, rank), task.student
    adapters = make_adapters(student, teacher, opt.at_groups, opt.seed) \
        if losses_needing(opt, 'adapters') else {}
    params = to_device(student.params | adapters, rank.device, opt.dtype == 'double')
    scaler = torch.amp.GradScaler(rank.device.type, enabled=opt.dtype == 'half')
    run = Run(opt, rank, params, make_optimizer(opt, params, rank.device), scaler, student.spec,
              fingerprint(teacher.params) if teacher else None)
    if state:
        run.restore(state)
    teacher = on_device(teacher, rank, opt.dtype)
    with closing(task.load_data(rank)) as data:
        run.check_progress(data.n_train)
        shard = math.ceil(min(opt.batch_size, data.n_train) / rank.world)
        check_step(student, shard, data.size, opt.dtype, compiled, rank.device)
        rank.print(f'{opt.save}: {student.name} on {data.n_train:,} images, {rank}')
        if teacher and opt.check_teacher:
            describe(f'teacher {task.teacher}', teacher, data, opt, rank)
        with run_folder(run, state), run.stop:
            train(run, student, data, teacher)
