// Running statistics. Mirror: numpy_ops.bn_update_running
#pragma once
#include "channel.cuh"
#include "moments.cuh"

// running = (1 - momentum) * running + momentum * batch for channel c, with the unbiased variance of the batch.
// batches, where it is given, is the number of batches before this one, and the momentum 1 / (batches + 1). A number below
// 0, which is no count, stands for 0.
DEVICE void update_running(const Moments& batch, Vector running_mean, Vector running_var, double momentum,
                           const long long* batches, long long c) {
    if (batches) momentum = 1 / ((double)max(*batches, 0LL) + 1);
    const double var = batch.m2 / (batch.count - 1);
    running_mean.set(c, __dmul_rn(1 - momentum, running_mean.get(c)) + __dmul_rn(momentum, batch.mean));
    running_var.set(c, __dmul_rn(1 - momentum, running_var.get(c)) + __dmul_rn(momentum, var));
}
