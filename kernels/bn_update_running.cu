// bn_update_running: running = (1 - momentum) * running + momentum * batch, with the unbiased variance of the batch
//
// One block does it all, so that every thread has read the counter before one moves it, and knows whether another one
// has found what is not finite. A thread takes every THREADS-th channel. A batch of less than two values for each
// channel changes nothing.
// Mirror: numpy_ops.bn_update_running
#include "running.cuh"

// The batch of channel c: its moments, or those that its statistics make of `count` values.
DEVICE ChannelMoments batch_of(const Moments& moments, const Statistics& statistics, double count, long long c) {
    if (moments.count) return {count, moments.mean[c], moments.m2[c]};
    return {count, statistics.pairs[2 * c], statistics.pairs[2 * c + 1] * count};
}

extern "C" __global__ void REGISTERS(80) bn_update_running(
    Moments moments,                         // in one part, or null; its batches may be the counter itself
    Running running,
    Statistics statistics,                   // or null: of the batch, where there are no moments
    double count,                            // number of values of each channel, where there are no moments
    // sizes
    long long C) {
    if (moments.count) count = *moments.count;
    bool moves = count > 1;
    if (running.skip_nonfinite) {
        for (long long c = threadIdx.x; moves && running.mean && c < C; c += THREADS) {
            const ChannelMoments batch = batch_of(moments, statistics, count, c);
            moves = running.mean.holds(batch.mean) && running.var.holds(batch.m2 / (count - 1));
        }
        moves = __syncthreads_and(moves);
    }
    for (long long c = threadIdx.x; moves && running.mean && c < C; c += THREADS) {
        const ChannelMoments batch = batch_of(moments, statistics, count, c);
        move_running(batch, read_running(running, c), running, moments.batches, c);
    }
    __syncthreads();
    if (threadIdx.x == 0 && moves && running.batches) *running.batches += 1;
}
