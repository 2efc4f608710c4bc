"""Draw all graphs of `benchmarks/gpu_cudnn.py` with NVIDIA's own frontend; no GPU is needed."""

import cudnn
import numpy as np
from gpu_cudnn import Sketch, draw_backward, draw_elementwise, draw_inference, draw_training
from gpu_cudnn_norms import NORMS, draw_norm, draw_norm_backward

from cupybn._cli.problem import OPERATIONS, PASSES, Problem, problem_of


def drawn(problem, operation, draw):
    """Draw a graph, and check that it has all inputs and outputs of the sketch."""
    sketch = Sketch(cudnn, problem, {}, flat=draw is draw_elementwise)
    draw(sketch, operation)
    found = {tensor.name for tensor in sketch.graph.get_inputs()}
    assert found == sketch.inputs.keys(), (found, sketch.inputs.keys())
    outputs = {tensor.uid for tensor in sketch.graph.get_outputs()}
    assert outputs == {tensor.uid for tensor in sketch.outputs.values()}


for shape, axis in ((4, 8, 6, 6), 1), ((4, 6, 6, 8), -1), ((4, 8), 1), ((4, 8, 6), 1), ((4, 8, 2, 3, 4), 1):
    problem = Problem(shape, np.dtype(np.float16), axis)
    for operation in OPERATIONS.values():
        draws = [draw_inference, draw_elementwise]
        if operation.training:
            draws = [draw_backward if operation.backward else draw_training]
        for draw in draws:
            drawn(problem, operation, draw)
for op in NORMS:
    problem = problem_of(op, (16, 64), np.dtype(np.float16))
    for operation in PASSES[op].values():
        drawn(problem, operation, draw_norm_backward if operation.backward else draw_norm)
print(f"drawn by {cudnn.__version__}")
