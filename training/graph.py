"""Compiles a training step and records it as one CUDA graph, each with a fallback."""
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from training.errors import first_line

WARM_UP = 3  # eager steps per batch size before recording, to compile and choose algorithms
Step = Callable[[Tensor, Tensor, int, int, Tensor], None]


def with_fallback(fast: Callable, plain: Callable, kept: list[Tensor],
                  print_line: Callable[[str], None]) -> Callable:
    """`fast`; if its first call fails, prints why, and uses the fallback `plain` from then on.

    The compiler is assumed to be the cause. `kept` are tensors that the failed call may have
    changed: they are restored.
    """
    chosen = None

    def run(*args: Any) -> Any:
        nonlocal chosen
        if chosen:
            return chosen(*args)
        before = [t.clone() for t in kept]
        try:
            result = fast(*args)
            chosen = fast
        except Exception as e:  # an error with another cause is raised again by `plain`
            for t, value in zip(kept, before, strict=True):
                t.copy_(value)
            cause = getattr(e, 'inner_exception', e)
            print_line('the training step could not be compiled, and is slower: '
                       f'{type(cause).__name__}: {first_line(cause)}')
            chosen = plain
            result = plain(*args)
        return result
    return run


def recorded(step: Step, print_line: Callable[[str], None]) -> Step:
    """`step`, recorded as a CUDA graph at the WARM_UP-th batch of a size, and replayed after that.

    The step may only change tensors in place (parameters, momenta, totals), and its learning rate
    must be a tensor. If recording fails, a line says why, and the steps run eagerly.
    """
    seen, graphs, pool, works = Counter(), {}, torch.cuda.graph_pool_handle(), True

    def run(x: Tensor, y: Tensor, n: int, n_global: int, decay: Tensor) -> None:
        nonlocal works
        key = (x.shape, n, n_global)
        if key in graphs:
            graph, inputs = graphs[key]
            for to, source in zip(inputs, (x, y, decay), strict=True):
                to.detach().copy_(source)
            graph.replay()
            return
        step(x, y, n, n_global, decay)
        seen[key] += 1
        if works and seen[key] == WARM_UP:
            try:
                graphs[key] = record(step, x, y, n, n_global, decay, pool)
            except RuntimeError as e:
                first = e.__context__ if isinstance(e.__context__, RuntimeError) else e
                works = False
                print_line('the training step could not be recorded as a CUDA graph, and is '
                           f'slower: {first_line(first)}')
    return run


def record(step: Step, x: Tensor, y: Tensor, n: int, n_global: int, decay: Tensor, pool: object
           ) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """Records the step without running it. Returns the graph and the tensors of its inputs."""
    device = torch.cuda.current_device()
    memory = torch.cuda.get_device_properties(device).total_memory
    if 2 * torch.cuda.max_memory_allocated(device) > memory:
        raise RuntimeError('it may need more than the memory of the GPU')
    inputs = [t.detach().clone() for t in (x, y, decay)]
    stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    try:
        # thread_local: meanwhile another thread may pin memory for the next batch
        with torch.cuda.graph(graph, pool=pool, capture_error_mode='thread_local'):
            step(*inputs[:2], n, n_global, inputs[2])
    finally:
        torch.cuda.set_stream(stream)  # if recording fails, older torch stays on its stream
    return graph, inputs
