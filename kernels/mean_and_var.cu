// mean_and_var: mean and biased variance of each channel, from the P parts of bn_stats
//
// A thread per channel.
// Mirror: numpy_ops.mean_and_var
#include "moments.cuh"

extern "C" __global__ void LAUNCH_BOUNDS mean_and_var(
    const double* moments_count,             // [P]
    const double* moments_mean,              // [P, C]
    const double* moments_m2,                // [P, C]
    // outputs
    data_t* mean,                            // [C]
    data_t* var,                             // [C]
    // sizes
    long long parts,
    long long C) {
    const long long c = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (c >= C) return;
    Moments all = {0, 0, 0};
    for (long long p = 0; p < parts; p++)
        all = merge(all, {moments_count[p], moments_mean[p * C + c], moments_m2[p * C + c]});
    narrow(all.mean, mean[c]);
    narrow(all.m2 / all.count, var[c]);
}
