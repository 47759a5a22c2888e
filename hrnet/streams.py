"""Independent parts of a network side by side on a GPU, most of which one branch after the other leaves idle."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@functools.cache
def side_streams(device: torch.device, count: int) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(count)]


def side_by_side(
    calls: Sequence[Callable[[], Tensor]], inputs: Sequence[Tensor], parallel: bool = True
) -> list[Tensor]:
    """Results of calls that do not wait for each other; on a GPU each but the first has a CUDA stream of its own.

    The backward pass of each runs on its stream too: autograd goes by the stream of the forward pass.

    Args:
        calls: what to compute; on return, the current stream waits for all of it.
        inputs: every tensor that the calls read and that their caller made.
        parallel: False computes one after the other there too.
    """
    if not parallel or not inputs[0].is_cuda:
        return [call() for call in calls]
    main = torch.cuda.current_stream(inputs[0].device)
    streams = side_streams(inputs[0].device, len(calls) - 1)
    for stream in streams:
        stream.wait_stream(main)
    results = []
    for call, stream in zip(calls, [main, *streams], strict=True):
        with torch.cuda.stream(stream):
            results.append(call())
    for stream, result in zip(streams, results[1:], strict=True):
        main.wait_stream(stream)
        if torch.is_grad_enabled():
            # Autograd may let go of them while another stream still reads. Without gradients nothing is freed between
            # a fork and its join, and a captured graph must not be told: it would keep all memory apart.
            result.record_stream(main)
            for tensor in inputs:
                tensor.record_stream(stream)
    return results
