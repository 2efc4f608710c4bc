// Running statistics. Mirror: numpy_ops.bn_update_running
#pragma once
#include "channel.cuh"
#include "moments.cuh"

// The running statistics of a channel: read early, as memory takes its time.
struct Running {
    double mean, var;
};
DEVICE Running read_running(const Vector& mean, const Vector& var, long long c) { return {mean.get(c), var.get(c)}; }

// running = (1 - momentum) * running + momentum * batch for channel c, with the unbiased variance of the batch.
// batches, where it is given, is the number of batches before this one, and the momentum 1 / (batches + 1). A number below
// 0, which is no count, stands for 0.
DEVICE void update_running(const Moments& batch, const Running& before, const Vector& running_mean,
                           const Vector& running_var, double momentum, const long long* batches, long long c) {
    if (batches) momentum = 1 / ((double)max(*batches, 0LL) + 1);
    const double var = batch.m2 / (batch.count - 1);
    running_mean.set(c, __dmul_rn(1 - momentum, before.mean) + __dmul_rn(momentum, batch.mean));
    running_var.set(c, __dmul_rn(1 - momentum, before.var) + __dmul_rn(momentum, var));
}
