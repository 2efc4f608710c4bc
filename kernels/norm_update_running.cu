// norm_update_running: running = (1 - momentum) * running + momentum * mean over the samples of mean and unbiased
// variance, for each channel of instance norm
//
// A warp takes a channel, each of its threads some of the N samples.
// Mirror: numpy_norms.norm_update_running
#include "running.cuh"
#include "team.cuh"

extern "C" __global__ void REGISTERS(64) norm_update_running(
    Statistics statistics,
    Running running,                         // there is a momentum, and there are no batches
    double count,                            // number of values of each row
    // sizes
    long long N,
    long long C) {
    const long long c = (blockIdx.x * (long long)THREADS + threadIdx.x) / WARP;
    double sums[2] = {0, 0};
    const double* const first = statistics.pairs + 2 * min(c, C - 1);
    const double pivot = first[0] - first[0] == 0 ? first[0] : 0;  // values that are all the same: exact; inf - inf: NaN
    for (long long n = threadIdx.x % WARP; n < N; n += WARP) {
        sums[0] += first[2 * n * C] - pivot;
        sums[1] += first[2 * n * C + 1];
    }
    lanes_sum<WARP>(sums);
    if (c >= C || threadIdx.x % WARP > 0) return;
    const double samples = (double)N;
    const ChannelMoments mean = {count, pivot + sums[0] / samples, sums[1] / samples * count};
    move_running(mean, read_running(running, c), running, nullptr, c);
}
