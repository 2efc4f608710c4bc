// What the way forward leaves of a channel: its statistics, and the running statistics moved.
// Mirror: numpy_ops.bn_update_running
#pragma once
#include "channel.cuh"
#include "mask.cuh"
#include "moments.cuh"

// Writes mean and variance of channel c where they are wanted. Both are NaN where a mask has left nothing of the batch.
DEVICE void set_statistics(const Statistics& statistics, const ChannelMoments& batch, long long c) {
    if (!statistics.pairs) return;
    statistics.pairs[2 * c] = !MASKED || batch.count > 0 ? batch.mean : batch.var();
    statistics.pairs[2 * c + 1] = batch.var();
    if (MASKED && c == 0 && statistics.count_left) *statistics.count_left = batch.count;
}

// The running statistics of one channel; kernels on chip read them early, as memory takes its time.
struct ChannelRunning {
    double mean, var;
};
DEVICE ChannelRunning read_running(const Running& running, long long c) {
    return {running.mean.get(c), running.var.get(c)};
}

// running = (1 - momentum) * running + momentum * batch for channel c, with the unbiased variance of the batch.
// `before` is what read_running has read. Where there is no momentum it is 1 / (batches + 1), batches being the number
// of those before this one; a number below 0, which is no count, stands for 0.
DEVICE void move_running(const ChannelMoments& batch, const ChannelRunning& before, const Running& running,
                         const long long* batches, long long c) {
    double momentum = running.momentum;
    if (batches && momentum != momentum) momentum = 1 / ((double)max(*batches, 0LL) + 1);
    const double var = batch.m2 / (batch.count - 1);
    running.mean.set(c, __dmul_rn(1 - momentum, before.mean) + __dmul_rn(momentum, batch.mean));
    running.var.set(c, __dmul_rn(1 - momentum, before.var) + __dmul_rn(momentum, var));
}

// Moves the running statistics of channel c as move_running does; the thread of channel 0 counts the batch as well, so
// that `batches` must not be the counter itself.
DEVICE void update_running(const ChannelMoments& batch, const ChannelRunning& before, const Running& running,
                           const long long* batches, long long c) {
    move_running(batch, before, running, batches, c);
    if (c == 0 && running.batches) *running.batches += 1;
}
