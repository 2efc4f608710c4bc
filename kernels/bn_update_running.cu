// bn_update_running: running = (1 - momentum) * running + momentum * batch, with the unbiased variance of the batch
//
// One block does it all, so that every thread has read the counter before one moves it. A thread takes every THREADS-th
// channel. A batch of less than two values for each channel changes nothing.
// Mirror: numpy_ops.bn_update_running
#include "running.cuh"

extern "C" __global__ void REGISTERS(80) bn_update_running(
    Moments moments,                         // in one part; its batches may be the counter itself
    Running running,
    // sizes
    long long C) {
    const double count = *moments.count;
    const bool defined = count > 1;
    for (long long c = threadIdx.x; defined && running.mean && c < C; c += THREADS)
        move_running({count, moments.mean[c], moments.m2[c]}, read_running(running, c), running, moments.batches, c);
    __syncthreads();
    if (threadIdx.x == 0 && defined && running.batches) *running.batches += 1;
}
